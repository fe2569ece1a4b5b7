"""Loops that train a model whose weights hide from nn.Linear: as if it had Linears, and it stays what it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn.matrices import unpack_
from sparseprune.nn.views import LinearViews
from sparseprune.training.features import choose_taps

transformers = pytest.importorskip("transformers")
IDS = torch.randint(1, 13, (3, 9), generator=torch.Generator().manual_seed(1))
SMALL = {"vocab_size": 13, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.1}  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=13, n_embd=32, n_layer=2, n_head=4, n_positions=16, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def opened(model):
    unpack_(model)
    sp.expose_linears_(model)
    return model


def alike(model):
    """The masks of a model with Linears of its own, by the names that pruners give them."""
    return {n: m.weight != 0 for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def gradual(model, make, criterion="magnitude", copied=False):
    pruner = sp.Pruner(model, sp.PruneConfig(schedule=sp.CubicSchedule(0.3), begin=1, end=6, every=2,
                                             criterion=criterion))  # fmt: skip
    optimizer = make(model.parameters())
    pruner.prepare(optimizer)
    for step in range(9):
        model(input_ids=IDS, labels=IDS).loss.backward()
        if step == 4:  # as some loops and wrappers hand them out: gradients laid out otherwise
            for p in model.parameters():
                if p.grad is not None and p.dim() == 2:
                    p.grad = p.grad.T.contiguous().T
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if copied and step == 3:
            pruner = pickle.loads(pickle.dumps(pruner)) if copied == "pickle" else copy.deepcopy(pruner)
            model, rates = pruner.model, optimizer.state_dict()
            optimizer = make(model.parameters())
            optimizer.load_state_dict(rates)
            pruner.prepare(optimizer)
    return pruner, pruner.finalize()


OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-3), "ours": lambda p: sp.AdamW(p, 1e-3, masks={}),
}  # fmt: skip


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
@pytest.mark.parametrize("optimiser", list(OPTIMISERS))
@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_the_pruner_prunes_what_hides_as_if_it_were_linears(make, optimiser, criterion):
    pruner, model = gradual(make(), OPTIMISERS[optimiser], criterion)
    other, exposed = gradual(opened(make()), OPTIMISERS[optimiser], criterion)
    kinds = {type(m).__name__ for m in model.modules()}
    assert ("Conv1D" in kinds) if make is gpt2 else ("MixtralExperts" in kinds)
    assert dict(pruner.masks).keys() == dict(other.masks).keys()
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, other.masks[name]), name
    opened(model)
    ours, theirs = alike(model), alike(exposed)
    for name, mask in pruner.masks.items():
        assert torch.equal(ours[name], theirs[name]) and not bool((ours[name] & ~mask).any())
    a, b = (m(input_ids=IDS).logits for m in (model, exposed))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_pruner_goes_on_with_the_copied_model(how):
    pruner, model = gradual(gpt2(), OPTIMISERS["adam"], copied=how)
    whole, other = gradual(gpt2(), OPTIMISERS["adam"])
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in pruner.masks.items())
    torch.testing.assert_close(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_views_follow_a_model_whose_memory_has_moved():
    model = gpt2()
    views = LinearViews(model)
    first = views.model()
    assert views.model() is first
    block = model.transformer.h[0].mlp.c_fc
    block.weight.data = block.weight.data.clone() + 1
    linear = views.model().get_submodule("transformer.h.0.mlp.c_fc")
    assert views.model() is not first and torch.equal(linear.weight, block.weight.T)
    plain = nn.Sequential(nn.Linear(3, 4))
    assert LinearViews(plain).model() is plain


def test_a_parameter_that_was_replaced_over_the_same_memory_is_the_owner():
    model = gpt2()
    views = LinearViews(model)
    views.model()
    block = model.transformer.h[0].mlp.c_fc
    block.weight = nn.Parameter(block.weight.data)
    linear = views.model().get_submodule("transformer.h.0.mlp.c_fc")
    block.weight.grad = torch.rand(block.weight.shape)
    assert torch.equal(views.gradient(linear), block.weight.grad.T)
    with pytest.raises(RuntimeError, match="belongs to no parameter of the model"):
        views.gradient(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_a_step_looks_for_no_owners(make, monkeypatch):
    """They are found with the views: parameters x layers, at each step, is more than the step of a small model."""
    model = make()
    views = LinearViews(model)
    linears = [m for m in views.model().modules() if isinstance(m, nn.Linear)]
    for p in model.parameters():
        p.grad = torch.rand(p.shape)
    seen = []
    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda *a: seen.append(a) or pytest.fail("looked for"))
    monkeypatch.setattr(model, "parameters", lambda *a: seen.append(a) or pytest.fail("looked for"))
    masks = views.held_masks({linear: torch.ones(linear.weight.shape, dtype=torch.bool) for linear in linears})
    assert all(views.gradient(linear).shape == linear.weight.shape for linear in linears) and not seen
    assert all(bool(mask.all()) for mask in masks.values())


@pytest.mark.parametrize("compensation", ["none", "low_rank"])
@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_the_trainer_prunes_what_hides_as_if_it_were_linears(make, compensation):
    config = sp.DistillConfig(schedule=sp.CubicSchedule(0.3), steps=12, lr=1e-3, compensation=compensation)
    results = []
    for model in (make().eval(), opened(make().eval())):
        pruner = sp.DistillPruner(model, config)
        pruner.fit([{"input_ids": IDS, "labels": IDS}] * 3)
        assert pruner.finalize() is model and not model.training
        results.append((pruner, model))
    (ours, model), (theirs, exposed) = results
    assert ours.density == theirs.density
    assert all(torch.equal(mask, theirs.masks[name]) for name, mask in ours.masks.items())
    torch.testing.assert_close(model(input_ids=IDS).logits, exposed(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
    kinds = {type(m).__name__ for m in model.modules()}
    if compensation == "none":
        assert "SparseLinear" not in kinds and kinds & {"Conv1D", "MixtralExperts"}
        sp.sparsify_(model, layout="csr")
        torch.testing.assert_close(model(input_ids=IDS).logits, exposed(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
    else:
        assert "SparseLinear" in kinds


def test_a_teacher_that_hides_its_weights_is_met_and_left_alone():
    student, teacher = gpt2().eval(), gpt2().eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    pruner = sp.GANPruner(student, sp.GANConfig(schedule=sp.CubicSchedule(0.3), steps=4), teacher=teacher)
    pruner.fit([{"input_ids": IDS, "labels": IDS}])
    pruner.finalize()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert type(teacher.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


def test_a_forward_put_on_from_outside_is_refused():
    model = gpt2()
    model.transformer.forward = model.transformer.forward
    with pytest.raises(ValueError, match=r"forward of transformer was replaced .* expose_linears_"):
        sp.DistillPruner(model, sp.DistillConfig(steps=2))


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_what_hides_is_not_rounded_in_a_loop_of_the_users_own(make):
    config = sp.PruneConfig(value_dtype="int8", activations="int8")
    with pytest.raises(ValueError, match=r"value_dtype='int8' rounds .* which another weight hides; call expose"):
        sp.Pruner(make(), config)
    assert sp.Pruner(opened(make()), config).density == 1


def test_experts_are_no_blocks_to_compare():
    config = transformers.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    model = opened(transformers.MixtralForCausalLM(config))
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "experts" in name]
    assert choose_taps(model, names, "auto") == ("model.layers.0", ["model.layers.0", "model.layers.1"])


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_a_module_with_two_names_stays_one(make):
    model = make().eval()
    blocks = model.transformer.h if make is gpt2 else model.model.layers
    part = "c_fc" if make is gpt2 else "experts"
    setattr(blocks[1].mlp, part, getattr(blocks[0].mlp, part))
    expected = model(input_ids=IDS).logits
    opened(model)
    assert getattr(blocks[1].mlp, part) is getattr(blocks[0].mlp, part)
    assert type(getattr(blocks[0].mlp, part)).__name__ in ("Linear", "Experts")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    again = make()
    blocks = again.transformer.h if make is gpt2 else again.model.layers
    setattr(blocks[1].mlp, part, getattr(blocks[0].mlp, part))
    sp.prune_(again, 0.5)
    sp.sparsify_(again, layout="csr", engine="layers", fuse=False)
    assert getattr(blocks[1].mlp, part) is getattr(blocks[0].mlp, part)
