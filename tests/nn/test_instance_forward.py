"""Copies that share what a module's ``__dict__`` holds answer with their own modules."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import decoder_models
import pytest
import stack_models
import torch
from stack_models import tokens
from torch import nn

import sparseprune as sp
from sparseprune import _native
from sparseprune.nn import explain
from sparseprune.nn.fusion import fuse_, fused_activations, unfuse_
from sparseprune.nn.stacks import drop_stacks_, stack_of
from sparseprune.nn.views import trainable_twin

pytestmark = pytest.mark.skipif(_native.C is None, reason="programs need the compiled core")


def shallow(module: nn.Module) -> nn.Module:
    """copy.copy, with children of its own."""
    twin = copy.copy(module)
    twin._modules = dict(twin._modules)
    return twin


def replicas(model: nn.Module, factor: float) -> nn.Module:
    """What nn.DataParallel makes of a model for one device, its parameters times ``factor``."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module.named_children():
            setattr(twin, name, twins[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, parameter.detach() * factor)
    return twins[model]


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """A copy in every part, layer by layer, its parameters times ``factor``."""
    found = copy.deepcopy(model)
    drop_stacks_(found)
    unfuse_(found)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(factor)
    return found


def encoder(name: str) -> tuple[nn.Module, tuple, dict]:
    if name == "bert":
        pytest.importorskip("transformers")
        return stack_models.sparse("bert"), (), {"input_ids": tokens(2, 9), "return_dict": False}
    return stack_models.sparse("torch batch"), (torch.randn(2, 9, 36),), {}


@pytest.mark.parametrize("name", ["bert", "torch"])
def test_replicas_of_data_parallel_run_their_own_layers(name):
    model, args, kwargs = encoder(name)
    with torch.no_grad():
        before = model(*args, **kwargs)
        twin = replicas(model, 1.5)
        expected = scaled(model, 1.5)(*args, **kwargs)
        torch.testing.assert_close(twin(*args, **kwargs), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(*args, **kwargs), before, rtol=0, atol=0)
        hook = model.register_forward_hook(lambda *_: None)  # torch calls a forward by another way then
        torch.testing.assert_close(replicas(model, 1.5)(*args, **kwargs), expected, rtol=1e-4, atol=1e-4)
        hook.remove()


def test_a_copy_with_other_layers_runs_them():
    model, (x,), _ = encoder("torch")
    twin, other = shallow(model), scaled(model, 1.5)
    twin.layers = other.layers
    with torch.no_grad():
        assert stack_of(model) is not None and stack_of(twin) is None
        assert "runs layer by layer" in explain(twin, x)
        torch.testing.assert_close(twin(x), other(x), rtol=1e-4, atol=1e-4)
        assert "forward" not in vars(twin)
        sp.nn.stacks.use_stacks_(twin, "program")
        assert stack_of(twin).why_not(x) is None and stack_of(model).why_not(x) is None
        torch.testing.assert_close(twin(x), other(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x), scaled(model, 1.0)(x), rtol=1e-4, atol=1e-4)


def test_a_copy_that_was_never_called_gets_a_program_of_its_own():
    model, (x,), _ = encoder("torch")
    twin, other = shallow(model), scaled(model, 1.5)
    twin.layers = other.layers
    sp.nn.stacks.use_stacks_(twin, "program")
    with torch.no_grad():
        assert stack_of(twin).why_not(x) is None
        torch.testing.assert_close(twin(x), other(x), rtol=1e-4, atol=1e-4)


def test_a_copied_decoder_runs_its_own_layers():
    pytest.importorskip("transformers")
    model = decoder_models.sparse("llama")
    body, ids = decoder_models.body(model), decoder_models.prompts()["input_ids"]
    twin, other = shallow(body), scaled(body, 1.5)
    twin.layers = other.layers
    with torch.no_grad():
        expected, embedded = body(ids).last_hidden_state, other.norm.weight.clone()
        other.norm.weight.copy_(body.norm.weight)
        other.embed_tokens.weight.copy_(body.embed_tokens.weight)
        torch.testing.assert_close(twin(ids)[0], other(ids)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(body(ids)[0], expected, rtol=0, atol=0)
        assert not torch.equal(embedded, other.norm.weight)


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def fused() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Feed()).eval().requires_grad_(False)
    sp.prune_(model, sparsity=0.6)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: True)
    assert fused_activations(model[0]) is not None
    return model


def test_copies_of_a_block_with_a_fused_activation():
    model, x = fused(), torch.randn(3, 16)
    before, expected = model(x), scaled(model, 1.5)(x)
    torch.testing.assert_close(replicas(model, 1.5)(x), expected, rtol=1e-4, atol=1e-5)
    twin = shallow(model[0])
    twin.up = scaled(model[0], 2.0).up
    assert fused_activations(twin) is None
    torch.testing.assert_close(twin(x), twin.down(twin.act(twin.up(x))), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    again = shallow(model[0])
    sp.nn.fusion.fuse_(again)
    assert fused_activations(again).owner is again and fused_activations(model[0]) is not None


def test_replicas_of_a_fused_norm():
    model = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16, eps=1e-5)).eval().requires_grad_(False)
    sp.prune_(model, sparsity=0.6)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: True)
    assert type(model[1]).__name__ == "FusedRMSNorm"
    x = torch.randn(3, 16)
    torch.testing.assert_close(replicas(model, 1.5)(x), scaled(model, 1.5)(x), rtol=1e-4, atol=1e-5)


def test_threads_that_call_one_copy():
    model, x = fused(), torch.randn(3, 16)
    expected = scaled(model, 1.5)(x)
    for _ in range(20):
        twin = replicas(model, 1.5)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(twin, [x] * 4):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_twin_with_linears_of_its_own_runs_them():
    """Beside a program over packed attention, which is what training shows as Linears."""
    model, (x,), _ = encoder("torch")
    hidden = nn.Sequential(model, nn.TransformerEncoderLayer(36, 3, 50, batch_first=True)).eval().requires_grad_(False)
    model.layers[0].self_attn = nn.MultiheadAttention(36, 3, batch_first=True).eval().requires_grad_(False)
    twin = trainable_twin(hidden, "test")
    assert stack_of(hidden[0]) is not None and twin[0] is not hidden[0]
    with torch.no_grad():
        expected = hidden(x)
        twin[0].layers[0].self_attn.out_proj.weight = nn.Parameter(torch.zeros(36, 36))
        assert not torch.allclose(twin(x), expected, atol=1e-3)


class Both(nn.Module):
    """Layers that may be a program, and an activation that may be fused, in one forward."""

    def __init__(self, follows: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu") for _ in range(2)
        )
        self.proj, self.act, self.follows = nn.Linear(64, 64), nn.ReLU(), follows

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.act(self.proj(x) if self.follows else x + self.proj(x))


@pytest.mark.parametrize("follows", [True, False])
def test_a_program_and_a_fused_activation_leave_each_other_their_place(follows):
    torch.manual_seed(0)
    model = Both(follows).eval().requires_grad_(False)
    sp.prune_(model, 0.8)
    x = torch.randn(2, 5, 64)
    expected = model(x)
    report = sp.sparsify_(model, layout="csr", engine="program")
    first = vars(model)["forward"]
    again = fuse_(model)
    assert vars(model)["forward"] is first
    if follows:  # sparsify_ fuses first
        assert fused_activations(model) is first and report.stacks[0].engine == "layers"
        assert report.stacks[0].reason == "its forward was replaced"
    else:
        assert stack_of(model) is first and first.why_not(x) is None
        assert "was replaced" in next(found.reason for found in again if found.name == "proj")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
