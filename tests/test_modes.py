"""What looks at a model in eval mode leaves each of its modules in the mode it was in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.language import perplexity, tokens_per_second
from sparseprune.nn.modes import evaluating
from sparseprune.pruning.reading import collect_inputs
from sparseprune.training import evaluate


class Partly(nn.Module):
    """In training, but for a norm that is frozen in eval; one module below that is in training again."""

    def __init__(self):
        super().__init__()
        self.body, self.frozen, self.head = nn.Linear(16, 16), nn.Sequential(nn.BatchNorm1d(16)), nn.Linear(16, 3)
        self.frozen.append(nn.Dropout(0.0))
        self.train()
        self.frozen.eval()
        self.frozen[1].train()

    def forward(self, x):
        return self.head(self.frozen(self.body(x)))


def test_a_module_that_a_parent_in_training_shares_stays_as_it_was():
    shared = nn.Dropout()
    model = nn.Sequential(shared, nn.Sequential(shared)).eval()
    model[1].training = True
    with evaluating(model):
        assert not model[1].training
    assert (model.training, shared.training, model[1].training) == (False, False, True)


X, LABELS = torch.randn(8, 16), torch.randint(0, 3, (8,))
USES = {
    "evaluate": lambda model: evaluate(model, [(X, LABELS)]),
    "collect_inputs": lambda model: collect_inputs(model, ["body"], [X]),
    "wanda": lambda model: sp.prune_(model, 0.5, "wanda", data=X),
    "sparsify_": lambda model: (sp.prune_(model, 0.5), sp.sparsify_(model, layout="csr")),
}


@pytest.mark.parametrize("use", USES)
def test_a_module_that_is_frozen_in_eval_stays_so(use):
    model = Partly()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = model.frozen[0].running_mean.clone()
    USES[use](model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model.frozen[0].running_mean, statistics)


def test_a_language_model_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, torch.arange(11), context=8)
    tokens_per_second({"one": model}, [1, 2], new_tokens=1, repeats=1)
    assert [module.training for module in model.modules()] == before


def test_modes_come_back_after_an_error_and_through_train():
    seen = []

    class Noting(nn.Module):
        def train(self, mode=True):
            seen.append(mode)
            return super().train(mode)

    inner = Noting()
    model, other = nn.Sequential(inner).train(), nn.Sequential(nn.Identity()).eval()
    seen.clear()
    with pytest.raises(KeyError), evaluating(model, other):
        assert not any(module.training for module in [*model.modules(), *other.modules()])
        raise KeyError
    assert inner.training and seen == [False, True] and not other.training
