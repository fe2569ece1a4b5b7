"""RMSNorms in one pass: found by what they compute, and taken out again without a trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune.nn.fusion import FusedRMSNorm


class Norm(nn.Module):
    """As most language models write it; offset: as some do, 1 + weight."""

    def __init__(self, width: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.offset + self.weight) * wide.to(x.dtype)


class Wrong(Norm):
    """Holds an eps and uses another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2e-5)


def model(*norms: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    linear = nn.Linear(40, 40)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(40, 40) < 0.2)
    return nn.Sequential(linear, *norms).eval()


def fused(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, FusedRMSNorm)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_and_the_names_stay(dtype):
    net = model(Norm(40), nn.RMSNorm(40), Norm(40, eps=1e-2)).to(dtype)
    before, x = net.state_dict(), torch.randn(2, 3, 40).to(dtype)
    originals = list(net)[1:]
    with torch.no_grad():
        expected = net(x)
        report = sp.sparsify_(net, layout="csr")
        assert fused(net) == ["1", "2", "3"]
        assert [f.what for f in report.fusions if not f.reason] == ["RMSNorm"] * 3
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(twin(x), expected, rtol=tolerance, atol=tolerance)
        sp.densify_(net)
    assert list(net)[1:] == originals and torch.equal(net(x), expected)
    assert list(net.state_dict()) == list(before)


def test_what_only_looks_like_one_is_left_alone_with_a_reason():
    net = model(Norm(40, offset=1.0), Wrong(40), nn.LayerNorm(40, bias=False), nn.PReLU(40))
    x = torch.randn(5, 40)
    report = sp.sparsify_(net, layout="csr")
    assert fused(net) == []
    assert [f.name for f in report.fusions if "its forward is not" in f.reason] == ["1", "2"]
    watched = model(Norm(40), Norm(40))
    watched[1].register_forward_hook(lambda *_: None)
    watched[2].forward = lambda x: x + 1
    report = sp.sparsify_(watched, layout="csr")
    assert [f.reason for f in report.fusions] == ["a hook observes the module"] * 2
    assert torch.equal(watched(x), watched[1](watched[0](x)) + 1)


class Back(Norm):
    """Gives back the dtype it was given, as Gemma's."""

    def forward(self, hidden):
        return super().forward(hidden.float()).to(hidden.dtype)


class Half(Norm):
    """Computes in the dtype of its weight, as T5's."""

    def forward(self, hidden):
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide if self.weight.dtype == torch.float32 else wide.to(self.weight.dtype))


class Gated(Norm):
    def forward(self, hidden, gate=None):
        return super().forward(hidden if gate is None else hidden * gate.sigmoid())


KINDS = [Norm, Back, Half, Gated, lambda width: nn.RMSNorm(width, eps=1e-5), nn.RMSNorm]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", DTYPES[:2])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_dtypes_of_input_and_weight_that_differ(kind, first):
    """As where norms stay in float32 beside Linears in bfloat16; first: in which the model is fused."""
    net = model(kind(40)).to(first).requires_grad_(False)
    plain = copy.deepcopy(net)[1]
    sp.sparsify_(net, layout="csr")
    assert fused(net) == ["1"]
    norm, x = net[1], torch.randn(3, 40)
    for weight in DTYPES:
        norm.to(weight), plain.to(weight)
        for given in DTYPES:
            found, expected = norm(x.to(given)), plain(x.to(given))
            assert found.dtype == expected.dtype
            tolerance = 3e-2 if {weight, given} & {torch.bfloat16, torch.float16} else 1e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_compiled_graph_holds_the_forward_that_a_call_takes():
    net, x, gate = model(Back(40), Gated(40)).requires_grad_(False), torch.randn(3, 40), torch.randn(3, 40)
    sp.sparsify_(net, layout="csr")
    torch.compiler.reset()
    for norm, args in ((net[1], (x,)), (net[1], (x.bfloat16(),)), (net[2], (x, gate))):
        found = torch.compile(norm, fullgraph=True, backend="eager")(*args)
        assert found.dtype == args[0].dtype
        torch.testing.assert_close(found, norm(*args))
    torch.compiler.reset()


def test_a_half_model_with_norms_in_float32_runs_as_before():
    net = nn.Sequential(*model(Back(40)), nn.Linear(40, 8)).bfloat16().eval()
    net[1].float()
    plain, x = copy.deepcopy(net), torch.randn(3, 40).bfloat16()
    with torch.no_grad():
        sp.sparsify_(net, layout="csr", filter_fn=lambda module, name: name == "0")
        assert fused(net) == ["1"]
        torch.testing.assert_close(net(x), plain(x), rtol=3e-2, atol=3e-2)
        net[1].eps = plain[1].eps = 5.0  # whoever computes it
        assert torch.equal(net[1](x), plain[1](x))
        net[1].load_state_dict({"weight": torch.arange(40.0)}, assign=True)
        plain[1].load_state_dict({"weight": torch.arange(40.0)})
        assert torch.equal(net[1](x), plain[1](x))


def test_the_names_and_number_of_its_arguments_stay():
    net = model(Back(40), Gated(40), Norm(40), nn.RMSNorm(40))
    plain, x, gate = copy.deepcopy(net), torch.randn(3, 40), torch.randn(3, 40)
    sp.sparsify_(net, layout="csr")
    assert fused(net) == ["1", "2", "3", "4"]
    with torch.no_grad():
        for mine, theirs, name in zip(list(net)[1:], list(plain)[1:], ("hidden", "hidden", "x", "x")):
            torch.testing.assert_close(mine(**{name: x}), theirs(x), rtol=1e-5, atol=1e-5)
            for wrong in ((), (x, x, x)):
                with pytest.raises(TypeError):
                    mine(*wrong)
            with pytest.raises(TypeError, match="other"):
                mine(other=x)
        for args, kwargs in (((x, gate), {}), ((x,), {"gate": gate}), ((), {"hidden": x, "gate": gate})):
            torch.testing.assert_close(net[2](*args, **kwargs), plain[2](x, gate), rtol=1e-5, atol=1e-5)


class Named(nn.Module):
    """BERT's output block, its arguments named otherwise."""

    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(40, 40), nn.LayerNorm(40), nn.Dropout(0.1)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


def test_an_output_block_whose_arguments_have_other_names_stays():
    net = nn.ModuleDict({"block": Named()}).eval()
    sp.prune_(net, 0.5)
    plain, x = copy.deepcopy(net), torch.randn(3, 40)
    report = sp.sparsify_(net, layout="csr")
    assert "its forward takes x, residual, not hidden_states and input_tensor" in [f.reason for f in report.fusions]
    with torch.no_grad():
        expected = plain["block"](x=x, residual=x)
        torch.testing.assert_close(net["block"](residual=x, x=x), expected, rtol=1e-4, atol=1e-5)


def test_gradients_autocast_compilation_and_a_missing_core(monkeypatch, close):
    net = model(Norm(40))
    twin = copy.deepcopy(net)
    sp.sparsify_(net, layout="csr")
    x = torch.randn(3, 40)
    for each in (net, twin):
        each(x).square().sum().backward()
    close(net[1].weight.grad, twin[1].weight.grad)
    with torch.no_grad():
        direct = net[1](x)
        close(torch.compile(net[1], fullgraph=True, backend="eager")(x), direct)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net[1](x.bfloat16())
            assert half.dtype == twin[1](x.bfloat16()).dtype == torch.float32
        monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
        close(net[1](x), direct)
    with pytest.raises(ValueError, match="weight expected"):
        net[1](torch.randn(3, 41))


def test_an_assigned_weight_stays_after_densify():
    net = model(Norm(40))
    sp.sparsify_(net, layout="csr")
    gain = torch.arange(40.0)
    net.load_state_dict({**net.state_dict(), "1.weight": gain}, assign=True)
    x = torch.randn(4, 40)
    with torch.no_grad():
        expected = net(x)
        sp.densify_(net)
        assert torch.equal(net[1].weight, gain)
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_brings_it_back(tmp_path):
    net, empty = model(Norm(40)), model(Norm(40, eps=1e-5))
    sp.sparsify_(net, layout="csr")
    sp.save(net, tmp_path / "net.safetensors")
    sp.load(empty, tmp_path / "net.safetensors")
    x = torch.randn(4, 40)
    assert fused(empty) == ["1"] and torch.equal(empty(x), net(x))


class Measured(Norm):
    """Its offset may change in place."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.offset = torch.zeros(())  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Norm, Measured])
def test_what_a_norm_computes_with_may_change(kind):
    net = model(kind(40))
    plain, x = copy.deepcopy(net), torch.randn(3, 40)
    sp.sparsify_(net, layout="csr")
    assert fused(net) == (["1"] if kind is Norm else [])
    assert net[1].offset == 0
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
        for each in (net, plain):
            if kind is Norm:
                each[1].offset = 1.0
            else:
                each[1].offset += 1.0
        for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(twin(x), plain(x), rtol=1e-4, atol=1e-5)
        sp.densify_(net)
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
