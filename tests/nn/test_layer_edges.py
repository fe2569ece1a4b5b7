"""A SparseLinear at its edges: empty sizes, second derivatives, sign bits, infinities, no core, its own activation."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseprune as sp
from sparseprune import SparseLinear, _native, explain, reference
from sparseprune.nn import RoundedLinear, direct
from sparseprune.nn.sparsify import sparsify_

LAYOUTS = {"csr": {}, "4x1": {"layout": "bsr", "blocksize": (4, 1)}, "nm": {"layout": "nm"}}


def half_pruned(rows=8, columns=12, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias)
    with torch.no_grad():
        linear.weight.unflatten(1, (columns // 4, 4))[:, :, 2:] = 0
    return linear


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, columns", [(4, 0), (0, 4), (0, 0), (4, 4)])
@pytest.mark.parametrize("core", [True, False])
def test_empty_sizes(layout, rows, columns, core, close, monkeypatch):
    if not core:
        monkeypatch.setattr(_native, "C", None)
    x_shapes = [(0,), (1,), (3,), (2, 0), (70,), ()]
    for bias in (True, False):
        linear = half_pruned(rows, columns, bias)
        for activation in ("none", "gelu"):
            sparse = SparseLinear.from_linear(linear, activation=activation, **LAYOUTS[layout])
            for shape in x_shapes:
                x = torch.randn(*shape, columns)
                torch.full((1000,), float("nan"))  # memory that the result may get
                expected = reference.activate(linear(x), activation)
                residual = torch.randn(expected.shape)
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    close(sparse.eval()(x), expected)
                    close(sparse(x, residual), expected + residual)
                    if rows:
                        norm = nn.LayerNorm(rows)
                        close(sparse(x, residual, norm), norm(expected + residual))
                wanted = x.clone().requires_grad_()
                result = sparse.train()(wanted)
                close(result, expected)
                result.sum().backward()
                assert wanted.grad.shape == x.shape and sparse.values.grad.shape == sparse.values.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives(layout, activation, dtype):
    sparse = SparseLinear.from_linear(half_pruned().to(dtype), activation=activation, **LAYOUTS[layout])
    x = torch.randn(5, 12, dtype=dtype, requires_grad=True)

    def dense(x):
        return reference.activate(F.linear(x, sparse.to_layout().to_dense(), sparse.bias), activation)

    def second(call):
        first = torch.autograd.grad(call(x).pow(3).sum(), (x, sparse.values, sparse.bias), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, sparse.values, sparse.bias))

    for mine, expected in zip(second(sparse), second(dense)):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_second_derivatives_of_the_ops():
    from torch.autograd import gradgradcheck

    w = half_pruned(4, 8).weight.detach().double()
    x, bias = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    mask = w != 0
    assert gradgradcheck(lambda x, w: sp.ops.masked_linear(x, w, mask, bias), (x, w.clone().requires_grad_()))
    for options in ({}, {"layout": "bsr", "blocksize": (4, 1)}, {"layout": "nm"}):
        layer = SparseLinear.from_linear(half_pruned(4, 8).double(), **options)
        for activation in ("none", "silu"):
            layer.activation = activation
            call = lambda x, v, layer=layer: torch.func.functional_call(layer, {"values": v}, (x,))  # noqa: E731
            assert gradgradcheck(call, (x, layer.values.detach().clone().requires_grad_()))


def test_the_negative_and_conjugate_bits():
    sparse = SparseLinear.from_linear(half_pruned()).eval()
    x, residual = torch.randn(3, 12), torch.randn(3, 8)
    with torch.no_grad():
        expected = sparse(-x, -residual)
        for given, add in (
            (torch._neg_view(x), torch._neg_view(residual)),
            (torch.complex(x, x).conj().imag, torch.complex(residual, residual).conj().imag),
        ):
            assert given.is_neg() and add.is_neg()
            assert torch.equal(sparse(given, add), expected)
        sparse.bias = nn.Parameter(torch._neg_view(sparse.bias.detach()))
        torch.testing.assert_close(sparse(x), F.linear(x, sparse.weight, sparse.bias))
        sparse.values = nn.Parameter(torch._neg_view(sparse.values.detach()))
        torch.testing.assert_close(sparse(x), F.linear(x, sparse.weight, sparse.bias))
        rounded = RoundedLinear.from_linear(half_pruned(), 8).eval()
        torch.testing.assert_close(rounded(torch._neg_view(x)), rounded(-x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_far_out(tier, activation):
    inf = float("inf")
    far = [-inf, inf, float("nan"), -3e38, 3e38, -1e30, -1e4, -200.0, -89.0, -88.5, -88.0, -87.0, 89.0, 1e-40, 0.0]
    values = torch.tensor(far)
    sparse = SparseLinear.from_linear(nn.Linear(1, len(far)), activation=activation).eval()
    sparse.bias = nn.Parameter(values)
    with torch.no_grad():
        sparse.values.zero_()
        for rows in (1, 9, 70):
            got = sparse(torch.ones(rows, 1))
            expected = reference.activate(values, activation).expand(rows, -1)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-35, equal_nan=True)


def test_few_tokens_without_a_core(monkeypatch, close):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    x = torch.randn(2, 12)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for values in ("float32", "bfloat16", "int8"):
            linear = half_pruned()
            packed = sp.ops.pack(sp.layouts.from_dense(linear.weight, "csr"), tokens=1, value_dtype=values)
            torch.testing.assert_close(sp.ops.packed_linear(x, packed, linear.bias), linear(x), rtol=3e-2, atol=3e-2)
            model = nn.Sequential(half_pruned())
            sparsify_(model, tokens=(1, 128), value_dtype=values)
            close(model(x), linear(x))


def test_bench_runs_few_tokens_on_the_reference(monkeypatch):
    from sparseprune.bench.cases import SUITES
    from sparseprune.bench.contest import Case

    monkeypatch.setattr(_native, "C", None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        contest = SUITES["linear"].build(Case("linear", (8, 12), 0.5, "element", 1), [], True)
        ours = [entry for entry in contest.entries.values() if entry.ours]
        assert len(ours) == 3 and all(entry.check() is None for entry in ours)


def test_a_torch_without_our_private_names_is_dispatched(monkeypatch, close):
    linear = half_pruned()
    with monkeypatch.context() as patched:
        for name in ("_is_tracing", "_len_torch_dispatch_stack", "_len_torch_function_stack", "_functorch"):
            patched.delattr(torch._C, name)
        direct._questions.cache_clear()
        asked = direct._questions()
        assert all(question() for question in asked) and direct.is_transformed() and direct.is_tracing()
    direct._questions.cache_clear()
    assert not direct.is_tracing() and not direct.is_transformed()
    for i in range(len(asked)):
        with monkeypatch.context() as patched, torch.no_grad():
            known = direct._questions()
            patched.setattr(direct, "_questions", lambda known=known, i=i: (*known[:i], asked[i], *known[i + 1 :]))
            sparse = SparseLinear.from_linear(linear).eval()
            assert direct.why_not_direct(torch.ones(2, 12)) is not None
            close(sparse(torch.ones(2, 12)), linear(torch.ones(2, 12)))
    importlib.import_module("sparseprune.nn.direct")


@pytest.mark.skipif(_native.C is None, reason="needs the compiled core")
def test_explain_tells_what_runs():
    """Each op that explain names is the one that the call dispatches to."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func._schema.name.removeprefix("sparseprune::"))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 12)
    for options in LAYOUTS.values():
        sparse = SparseLinear.from_linear(half_pruned(), **options).eval()
        frozen = SparseLinear.from_linear(
            half_pruned(bias=False), low_rank_a=torch.ones(2, 12), low_rank_b=torch.ones(8, 2), **options
        ).eval()
        frozen.values.requires_grad_(False)  # what learns is the low-rank term alone
        cases = [
            ("trained_linear", True, False, sparse, x),
            ("trained_linear", True, True, sparse, x),
            ("trained_linear", True, False, frozen, x),
            ("packed_linear", False, True, sparse, x),
            ("packed_linear", False, True, frozen, x),
            (f"{sparse.layout}_linear", False, False, sparse, x.double()),
            (f"{sparse.layout}_linear", True, False, sparse, x.double()),
        ]
        for op, grad, autocast, layer, given in cases:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                text = explain(layer, given)
                with Watch() as watch:
                    layer(given)
            assert f"\n{op}:\n" in text and op in watch.seen, (op, text, watch.seen)
        with torch.no_grad():
            assert "compared with what was packed at every call" in explain(sparse, x)
            assert "frozen" in explain(sparse.requires_grad_(False), x)
            low = SparseLinear.from_linear(half_pruned(), low_rank_a=torch.ones(2, 12), low_rank_b=torch.ones(8, 2))
            assert "rank 2" in explain(low.eval(), x)


@pytest.mark.skipif(_native.C is None, reason="needs the compiled core")
@pytest.mark.parametrize("dense", [True, False])
def test_explain_names_no_kernel_for_a_call_that_is_an_error(dense):
    linear = half_pruned().requires_grad_(False)
    layer = linear if dense else SparseLinear.from_linear(linear)
    for x in (torch.randn(4, 11), torch.tensor(1.0), torch.ones(4, 12, dtype=torch.int64)):
        with pytest.raises((ValueError, RuntimeError)):
            layer(x)
        with pytest.raises(ValueError, match=r"explain: input expected \[..., 12\] in floating point, got \["):
            explain(layer, x)
    with pytest.raises(TypeError, match=r"and its input, got (Sparse)?Linear alone; give a layer"):
        explain(layer)
    with pytest.raises(TypeError, match=r"and its input, got (Sparse)?Linear, its input and 1 more; give a layer"):
        explain(layer, torch.randn(4, 12), None)


def test_explain_answers_for_what_stayed_dense():
    x = torch.randn(3, 12)
    model = nn.Sequential(half_pruned(), nn.Linear(12, 8), nn.ModuleDict({"classifier": nn.Linear(12, 8)}))
    assert "dense: F.linear; 0.5000 of its weight is zero\n  sparsify_ has not looked" in explain(model[0], x)
    report = sparsify_(model, layout="auto", tokens=3)
    assert "0.0000 of its weight is zero" in explain(model[1], x) and report["1"].reason in explain(model[1], x)
    assert report.skipped["2.classifier"] in explain(model[2]["classifier"], x)
    sparsify_(model, layout="csr")
    assert isinstance(model[1], SparseLinear)
    assert "has not looked" in explain(sp.densify_(model) and model[1], x)
    rounded = RoundedLinear.from_linear(half_pruned(), 3)
    with torch.no_grad():
        assert "rounded_linear, tier" in explain(rounded.eval(), x)
        assert "1 to 3 rows, got [4, 12]" in explain(rounded, torch.randn(4, 12))
        assert "training mode" in explain(rounded.train(), x)
    assert "a gradient is needed" in explain(rounded.eval(), x)


def test_a_layers_own_activation_is_kept(tmp_path, close):
    model = nn.Sequential(SparseLinear.from_linear(half_pruned(), activation="relu"), nn.GELU(), half_pruned(8, 8))
    x, path = torch.randn(5, 12), tmp_path / "model.safetensors"
    with torch.no_grad():
        expected = model.eval()(x)
        sparsify_(model, layout="csr")
        close(model(x), expected)
        sp.save(model, path)
        fresh = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 8)).eval()
        close(sp.load(fresh, path)(x), expected)
        assert fresh[0].activation == "relu"
        sp.nn.unfuse_(fresh)
        close(fresh(x), expected)
        with pytest.raises(ValueError, match=r"densify_: 0 expected no activation of its own, got 'relu'"):
            sp.densify_(fresh)
        close(fresh(x), expected)
        assert isinstance(fresh[2], SparseLinear)
        fresh[0] = nn.Sequential(fresh[0].to_linear(), nn.ReLU())
        sp.densify_(fresh)
        close(fresh(x), expected)


def test_a_file_from_before_loads_as_it_did(tmp_path, close, monkeypatch):
    """Its activation was that of a fusion, which loading does again."""
    from sparseprune.checkpoint import state
    from sparseprune.nn.fusion import fused_activations

    how_it_ran = state.how
    model, path = nn.Sequential(half_pruned(), nn.GELU()).eval(), tmp_path / "model.safetensors"
    x = torch.randn(5, 12)
    with torch.no_grad():
        expected = model(x)
        sparsify_(model, layout="csr")
        monkeypatch.setattr(state, "how", lambda layer: {**how_it_ran(layer), "activation": "gelu"})
        sp.save(model, path)
        fresh = sp.load(nn.Sequential(nn.Linear(12, 8), nn.GELU()).eval(), path)
        assert fresh[0].activation == "none" and fused_activations(fresh).fused == {"0": ("1", "gelu")}
        close(fresh(x), expected)


def test_onnx_export_names_the_remedy(tmp_path):
    """The exporter that traces; the one by torch.export names the op it does not know."""
    model = nn.Sequential(half_pruned(), nn.GELU()).eval()
    sparsify_(model, layout="csr")
    with pytest.raises(RuntimeError, match=r"got a SparseLinear: densify_\(model\) first"):
        torch.onnx.export(model, (torch.randn(2, 12),), str(tmp_path / "model.onnx"), dynamo=False)
    assert not list(tmp_path.iterdir())
