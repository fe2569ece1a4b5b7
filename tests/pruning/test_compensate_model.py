"""compensate_ on a whole model: never more parameters, never a worse fit on the inputs it was judged by, sparse where
a low-rank term earns its place.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseprune as sp


def low_rank_model():
    """Weights that are mostly of rank 2: there a low-rank term beats any choice of kept weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight.copy_(torch.randn(64, 2) @ torch.randn(2, 64) + 0.05 * torch.randn(64, 64))
    return model


def test_the_outputs_come_closer_within_the_budget():
    dense = low_rank_model().eval()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.8)
    kept = {name: int((m.weight != 0).sum()) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    data, held_out = torch.randn(8, 64, 64), torch.randn(256, 64)
    with torch.no_grad():
        before = (model(held_out) - dense(held_out)).square().mean()
        report = sp.compensate_(model, dense, list(data))
        after = (model(held_out) - dense(held_out)).square().mean()
    assert after < 0.5 * before
    for name, layer in report.layers.items():
        assert layer.parameters <= layer.budget == kept[name]
    sparse = [m for m in model.modules() if isinstance(m, sp.SparseLinear)]
    assert sparse and all(m.low_rank_a is not None for m in sparse)
    assert "rank" in str(report)


def test_without_ranks_the_masks_and_the_modules_stay():
    dense = low_rank_model().eval()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    masks = [m.weight != 0 for m in model if isinstance(m, nn.Linear)]
    sp.compensate_(model, dense, [torch.randn(512, 64)], ranks=())
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(not bool((m.weight[~mask]).any()) for m, mask in zip([model[0], model[2]], masks))
    assert model[2].bias is None


def layer_error(model, dense, name, x):
    """Of one layer on its own inputs, as a share of what the dense one gives, the layer's bias taken off."""
    own, twin = model.get_submodule(name), dense.get_submodule(name)
    wanted = twin(x) - (0 if own.bias is None else own.bias)
    return float((twin(x) - own(x)).square().mean() / wanted.square().mean())


@torch.no_grad()
@pytest.mark.parametrize("changed", ["admm", "sparsegpt", "trained", "compensated"])
def test_what_was_fitted_before_is_what_is_compensated(changed):
    """Kept weights were those of the dense model again: what a criterion had refitted was lost, and a bias shift made
    before was added twice.
    """
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False)).eval()
    model, mix = copy.deepcopy(dense), torch.randn(64, 64) * torch.linspace(0.05, 0.6, 64)
    data, judge = [torch.randn(64, 64) @ mix.T + 0.5 for _ in range(16)], torch.randn(1024, 64) @ mix.T + 0.5
    sp.prune_(model, 0.7, criterion=changed if changed in ("admm", "sparsegpt") else "magnitude", data=data)
    if changed == "trained":
        sp.compensate_(model, dense, data, ranks=())
        model[0].bias.add_(0.1)
    elif changed == "compensated":
        sp.compensate_(model, dense, data, ranks=())
    before = layer_error(model, dense, "0", judge)
    own = copy.deepcopy(model)
    report = sp.compensate_(model, dense, data, ranks=())
    assert report.layers["0"].errors["mask"] == pytest.approx(before, rel=0.2)
    assert layer_error(model, dense, "0", judge) <= 1.05 * before
    if report.layers["0"].chosen in ("mask", "bias"):
        assert torch.equal(model[0].weight, own[0].weight)


def test_bad_input():
    dense = low_rank_model()
    with pytest.raises(ValueError, match="got the pruned model; keep a copy"):
        sp.compensate_(dense, dense, [torch.randn(64, 64)])
    sparse = copy.deepcopy(dense)
    sp.prune_(sparse, sparsity=0.5)
    sp.sparsify_(sparse, layout="csr", tokens=8)
    with pytest.raises(ValueError, match=r"none with zeros; call it before sparsify_"):
        sp.compensate_(sparse, dense, [torch.randn(64, 64)])
    broken, model = low_rank_model(), copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="outputs expected finite"):
        sp.compensate_(model, broken, [torch.randn(64, 64)])
    with pytest.raises(ValueError, match="none with zeros"):
        sp.compensate_(copy.deepcopy(dense), dense, [torch.randn(64, 64)])
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    with pytest.raises(ValueError, match="expected a Linear"):
        sp.compensate_(model, nn.Sequential(nn.Linear(3, 3)), [torch.randn(64, 64)])


def test_an_error_in_a_later_layer_leaves_the_model_as_it_was():
    dense = low_rank_model()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    with torch.no_grad():
        model[0].bias[3] = float("nan")  # the second layer reads NaN, the first does not
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        sp.compensate_(model, dense, [torch.randn(64, 64)])
    assert all(torch.equal(before[n].nan_to_num(7), t.nan_to_num(7)) for n, t in model.state_dict().items())


def test_a_model_that_is_a_linear_is_compensated_without_a_low_rank_term():
    dense = low_rank_model()[0]
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.8)
    report = sp.compensate_(model, dense, [torch.randn(512, 64)])
    assert report.layers[""].rank == 0 and type(model) is nn.Linear


class Twice(nn.Module):
    """A layer that it calls under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = low_rank_model()[0]

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_a_layer_of_two_names_stays_one():
    dense = Twice().eval()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.8)
    seen = []
    model.a.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(512, 64)
    before = (model(x) - dense(x)).square().mean()
    report = sp.compensate_(model, dense, [x])
    assert list(report.layers) == ["a"] and model.a is model.b and model.a.low_rank_a is not None
    seen.clear()
    assert (model(x) - dense(x)).square().mean() < before and len(seen) == 2


def hidden_case(kind, transformers):
    """A model whose Linears hide, and how many of them pruning finds."""
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config), 8
    if kind == "mixtral":
        config = transformers.MixtralConfig(
            **size, num_key_value_heads=2, intermediate_size=16, num_local_experts=3, num_experts_per_tok=2,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config), 2 * (4 + 3 * 2)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Embedding(64, 16), nn.TransformerEncoder(layer, 2)), 12


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "packed attention"])
@pytest.mark.parametrize("ranks", [(), (1,)])
def test_linears_that_hide_are_compensated_as_they_are_pruned(kind, ranks):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    dense, count = hidden_case(kind, transformers)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
        if ranks and parameter.dim() >= 2 and len(parameter) != 64:  # no embedding; what a low-rank term is good at
            *more, n, k = parameter.shape
            parameter.data.mul_(0.3).add_(0.3 * torch.randn(*more, n, 1) @ torch.randn(*more, 1, k))
    dense.eval()
    model = copy.deepcopy(dense)
    pruned = sp.prune_(model, 0.5)
    ids = torch.randint(0, 64, (32, 16))

    def gap():
        with torch.no_grad():
            mine, full = model(ids), dense(ids)
        return float(((mine - full) if isinstance(mine, torch.Tensor) else (mine.logits - full.logits)).square().mean())

    before, names = gap(), list(model.state_dict())
    report = sp.compensate_(model, dense, [ids], ranks=ranks)
    assert set(report.layers) == {row.name for row in pruned.layers} and len(report.layers) == count
    assert gap() < before
    ranked = {name for name, found in report.layers.items() if found.rank}
    sparse = {name for name, module in model.named_modules() if isinstance(module, sp.SparseLinear)}
    assert sparse == ranked and bool(ranked) == bool(ranks) and (ranked or list(model.state_dict()) == names)


class Rarely(nn.Module):
    """A second layer that reads one row of what the first gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.first(x).sum() + self.second(x[:1]).sum()


def test_what_few_inputs_reach_stays_and_is_named():
    torch.manual_seed(0)
    dense = Rarely()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    before = model.second.weight.clone()
    with pytest.warns(UserWarning, match="fewer of second, which stay as they are; give more batches"):
        report = sp.compensate_(model, dense, [torch.randn(64, 8)])
    assert list(report.layers) == ["first"] and torch.equal(model.second.weight, before)
    with pytest.raises(ValueError, match="fewer of first, second; give more batches"):
        sp.compensate_(model, dense, [torch.randn(4, 8)])


def test_a_dense_model_in_the_pruned_ones_memory_is_refused():
    """It was pruned along: every error came out 0, and nothing was given back."""
    dense, model = low_rank_model(), low_rank_model()
    model.load_state_dict(dense.state_dict(), assign=True)
    sp.prune_(model, 0.8)
    with pytest.raises(ValueError, match=r"the pruned model's own memory, 0, 2; keep copy\.deepcopy"):
        sp.compensate_(model, dense, [torch.randn(64, 64)])
