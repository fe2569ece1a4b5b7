"""SparseLinear against the nn.Linear it came from: values, gradients, freshness, copies, saving, and torch's modes."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseprune as sp
from sparseprune import SparseLinear, _native, explain
from sparseprune.activations import ACTIVATIONS
from sparseprune.nn.direct import why_not_direct
from sparseprune.nn.forms import Form, Purpose

LAYOUTS = {
    "csr": {"layout": "csr"},
    "bsr16x1": {"layout": "bsr", "blocksize": (16, 1)},
    "bsr4x4": {"layout": "bsr", "blocksize": (4, 4)},
    "nm2:4": {"layout": "nm", "nm": (2, 4)},
}


def pruned(rows=48, columns=60, layout="csr", bias=True, seed=0):
    """An nn.Linear whose zeros fit the layout."""
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias)
    with torch.no_grad():
        if layout == "nm2:4":
            place = torch.rand(rows, columns // 4, 4).argsort(2).view(rows, columns)
            linear.weight.mul_(place < 2)
        else:
            r, c = LAYOUTS[layout].get("blocksize", (1, 1))
            keep = torch.rand(rows // r, columns // c) < 0.3
            linear.weight.mul_(keep.repeat_interleave(r, 0).repeat_interleave(c, 1))
    return linear


@pytest.fixture(params=LAYOUTS)
def pair(request):
    """(the Linear, its SparseLinear) in each layout."""
    linear = pruned(layout=request.param)
    return linear, SparseLinear.from_linear(linear, **LAYOUTS[request.param])


@pytest.mark.parametrize("shape", [(60,), (0, 60), (1, 60), (3, 5, 60), (2, 0, 60), (67, 60)])
def test_output_in_eval_and_in_training(pair, shape, close):
    linear, sparse = pair
    x = torch.randn(shape)
    with torch.no_grad():
        close(sparse.eval()(x), linear(x))
    close(sparse.train()(x), linear(x))


def test_gradients(pair, close):
    linear, sparse = pair
    linear.bias = nn.Parameter(linear.bias.detach().clone())
    x = torch.randn(7, 60, requires_grad=True)
    y = torch.randn(7, 60).copy_(x.detach()).requires_grad_()
    weight = torch.randn(7, 48)
    (linear(x) * weight).sum().backward()
    (sparse(y) * weight).sum().backward()
    close(y.grad, x.grad)
    close(sparse.bias.grad, linear.bias.grad)
    with torch.no_grad():
        layout = sparse.to_layout()
        grads = type(layout)(**{**layout.__dict__, "values": sparse.values.grad}).to_dense()
        stored = type(layout)(**{**layout.__dict__, "values": torch.ones_like(sparse.values)}).to_dense()
    close(grads, linear.weight.grad * stored)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("training", [False, True])
def test_activation_and_residual(activation, training, close):
    linear = pruned()
    sparse = SparseLinear.from_linear(linear, activation=activation).train(training)
    x, residual = torch.randn(9, 60), torch.randn(9, 48)
    plain = linear(x)
    expected = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[
        activation
    ](plain)
    with torch.set_grad_enabled(training):
        close(sparse(x, residual=residual), expected + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "gelu", "low rank", "unpacked", "training", "reference"])
def test_residual_and_layer_norm(kind, dtype, close, monkeypatch):
    linear = pruned().to(dtype)
    options = {
        "gelu": {"activation": "gelu"},
        "low rank": {"low_rank_a": torch.randn(3, 60).to(dtype), "low_rank_b": torch.randn(48, 3).to(dtype)},
        "unpacked": {"dense_from": 1},
    }
    if kind == "reference":
        monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
    sparse = SparseLinear.from_linear(linear, **options.get(kind, {})).train(kind == "training")
    norm = torch.nn.LayerNorm(48, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    for n in (1, 9, 70):
        x, residual = torch.randn(n, 60).to(dtype), torch.randn(n, 48).to(dtype)
        for add in (residual, None):
            with torch.set_grad_enabled(kind == "training"):
                result, plain = sparse(x, add, norm), sparse(x)
                close(result, norm(plain if add is None else plain + add))
            if kind == "training":
                grads = torch.autograd.grad(result.square().sum(), [sparse.values, norm.weight, norm.bias])
                assert all(bool(g.abs().sum() > 0) for g in grads)


@pytest.mark.parametrize(
    "norm", [torch.nn.LayerNorm(47), torch.nn.LayerNorm((2, 48)), torch.nn.LayerNorm(48, elementwise_affine=False)]
)
def test_a_layer_norm_of_another_kind_is_refused(norm):
    sparse = SparseLinear.from_linear(pruned()).eval()
    with pytest.raises(ValueError, match=r"norm expected over \[48\] with weight and bias, got"), torch.no_grad():
        sparse(torch.ones(2, 60), None, norm)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d(48), torch.nn.RMSNorm(48), (torch.ones(48), torch.zeros(48))])
def test_what_is_no_layer_norm_is_refused(norm):
    sparse = SparseLinear.from_linear(pruned()).eval()
    with pytest.raises(TypeError, match=f"expected an nn.LayerNorm, got {type(norm).__name__}"), torch.no_grad():
        sparse(torch.ones(2, 60), None, norm)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_low_rank_term(activation, close):
    linear = pruned()
    a, b = torch.randn(3, 60), torch.randn(48, 3)
    sparse = SparseLinear.from_linear(linear, activation=activation, low_rank_a=a, low_rank_b=b)
    x, residual = torch.randn(5, 60), torch.randn(5, 48)
    expected = F.linear(x, linear.weight + b @ a, linear.bias)
    expected = F.gelu(expected) if activation == "gelu" else expected
    for mode in (True, False):
        close(sparse.train(mode)(x), expected)
        close(sparse(x, residual), expected + residual)
    close(sparse.weight, linear.weight.detach() + b @ a)
    with torch.autocast("cpu", torch.bfloat16):  # rounds products, and no weight that is made meanwhile
        close(sparse.to_linear().weight, linear.weight.detach() + (b.double() @ a.double()).float())
    assert copy.deepcopy(sparse).to("meta").dense().is_meta
    assert sparse.nnz == int((linear.weight != 0).sum()) + a.numel() + b.numel()
    assert {"low_rank_a", "low_rank_b"} <= set(sparse.state_dict())


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2), ("int8", 3e-2)])
def test_value_dtypes_round_but_keep_the_function(dtype, tolerance):
    linear = pruned(96, 128)
    sparse = SparseLinear.from_linear(linear, value_dtype=dtype).eval()
    x = torch.randn(4, 128)
    with torch.no_grad():
        error = (sparse(x) - linear(x)).abs().max() / linear(x).abs().max()
    assert 0 < error < tolerance
    assert torch.equal(sparse.weight, linear.weight)  # the canonical values stay exact


def test_weight_is_bit_identical_and_read_only(pair):
    linear, sparse = pair
    assert torch.equal(sparse.weight, linear.weight)
    with pytest.raises(AttributeError):
        sparse.weight = torch.zeros(48, 60)
    assert torch.equal(sparse.to_linear().weight, linear.weight)


def check_fresh(sparse, x):
    with torch.no_grad():
        torch.testing.assert_close(sparse.eval()(x), F.linear(x, sparse.weight, sparse.bias), rtol=1e-4, atol=1e-5)


def test_packed_values_follow_every_change(pair):
    _, sparse = pair
    x = torch.randn(5, 60)
    check_fresh(sparse, x)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    sparse.train()(x).sum().backward()
    optimizer.step()
    check_fresh(sparse, x)
    other = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in sparse.state_dict().items()}
    sparse.load_state_dict(other)
    check_fresh(sparse, x)
    with torch.no_grad():
        sparse.values.mul_(2)
    check_fresh(sparse, x)
    sparse.double().float()
    check_fresh(sparse, x)
    sparse.values.data.add_(1)
    sparse.repack()
    check_fresh(sparse, x)


def test_a_layer_built_in_inference_mode_counts_as_frozen(close):
    linear = pruned()
    with torch.inference_mode():
        sparse = SparseLinear.from_linear(linear).eval()
        close(sparse(torch.ones(2, 60)), linear(torch.ones(2, 60)))


def test_load_state_dict_takes_another_structure_or_a_dense_weight(close):
    first, second = pruned(seed=1), pruned(seed=2)
    x = torch.randn(3, 60)
    sparse = SparseLinear.from_linear(first).eval()
    sparse.load_state_dict(SparseLinear.from_linear(second).state_dict())
    with torch.no_grad():
        close(sparse(x), second(x))
        sparse.load_state_dict(first.state_dict())
        close(sparse(x), first(x))


def test_load_state_dict_refuses_a_broken_structure():
    sparse = SparseLinear.from_linear(pruned())
    broken = {name: t.clone() for name, t in sparse.state_dict().items()}
    broken["col_indices"][0] = 10_000
    with pytest.raises(ValueError, match="col_indices"):
        sparse.load_state_dict(broken)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole_and_independent(pair, copier):
    _, sparse = pair
    x = torch.randn(3, 60)
    with torch.no_grad():
        expected = sparse.eval()(x)
        twin = copier(sparse)
        assert torch.equal(twin(x), expected)
        twin.values.zero_()
        assert torch.equal(sparse(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(pair, training, close):
    linear, sparse = pair
    sparse.train(training)
    x = torch.randn(6, 60)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        close(compiled(x), linear(x))
    if training:
        compiled(x).square().sum().backward()
        grad = sparse.values.grad.clone()
        sparse.zero_grad()
        sparse(x).square().sum().backward()
        close(grad, sparse.values.grad)


def test_training_under_compile_sees_each_step():
    linear = pruned()
    sparse = SparseLinear.from_linear(linear).train()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    x = torch.randn(6, 60)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(compiled(x), F.linear(x, sparse.weight, sparse.bias), rtol=1e-4, atol=1e-5)


def test_many_threads_call_one_layer():
    linear = pruned(64, 256)
    sparse = SparseLinear.from_linear(linear).eval()
    inputs = [torch.randn(n, 256) for n in range(1, 9)]
    wrong = []

    def work(x):
        with torch.no_grad():
            expected = linear(x)
            for _ in range(50):
                if not torch.allclose(sparse(x), expected, atol=1e-5):
                    wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def dispatch_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return Watch()


def function_mode():
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return Watch()


MODES = {
    "a dispatch mode": (dispatch_mode, "mode is active"),
    "a function mode": (function_mode, "mode is active"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
    "a dual level": (lambda: torch.autograd.forward_ad.dual_level(), "forward-mode"),
}


@pytest.mark.parametrize("name", MODES)
def test_the_direct_call_gives_way_to(name):
    enter, reason = MODES[name]
    x = torch.randn(3, 60)
    with torch.no_grad():
        assert why_not_direct(x) is None
        with enter():
            assert reason in why_not_direct(x)
            SparseLinear.from_linear(pruned()).eval()(x)


def test_the_direct_call_gives_way_to_gradients_subclasses_and_devices():
    class Labelled(torch.Tensor):
        pass

    with torch.no_grad():
        assert "subclass" in why_not_direct(torch.randn(3).as_subclass(Labelled))
        assert "meta" in why_not_direct(torch.empty(3, device="meta"))
        assert "strided" in why_not_direct(torch.eye(3).to_sparse())
        assert why_not_direct(torch.randn(3, requires_grad=True)) is None
    assert "gradient" in why_not_direct(torch.randn(3, requires_grad=True))


def test_the_direct_call_gives_way_to_functorch_and_tracing(close):
    linear = pruned()
    sparse = SparseLinear.from_linear(linear).eval().requires_grad_(False)
    x = torch.randn(4, 60)
    seen = []

    def call(row):
        seen.append(why_not_direct(row))
        return sparse(row)

    with torch.no_grad():
        close(torch.stack([call(row) for row in x]), linear(x))
        assert seen[-1] is None
        torch.func.vmap(lambda row: seen.append(why_not_direct(row)) or row)(x)
        assert "functorch" in seen[-1]
    traced = torch.jit.trace(call, x, check_trace=False)
    assert "traced" in seen[-1]
    close(traced(x), linear(x))


def test_the_forced_backend_is_honoured(monkeypatch, close):
    linear = pruned()
    sparse = SparseLinear.from_linear(linear).eval()
    x = torch.randn(3, 60)
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
    with torch.no_grad():
        close(sparse(x), linear(x))
        assert "SPARSEPRUNE_BACKEND=reference" in explain(sparse, x)
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "nonsense")
    with torch.no_grad(), pytest.raises(ValueError, match="expected one of"):
        sparse(x)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_the_dtype_of_linear(grad):
    linear = pruned()
    sparse = SparseLinear.from_linear(linear).train(grad)
    x = torch.randn(3, 60)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == linear(x).dtype == torch.bfloat16
        torch.testing.assert_close(sparse(x), linear(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, close):
    linear = pruned()
    sparse = copy.deepcopy(SparseLinear.from_linear(linear)).to(dtype).eval()
    x = torch.randn(3, 60)
    with torch.no_grad():
        y = sparse(x.to(dtype))
    assert y.dtype == dtype
    close(y, linear(x), dtype=dtype if dtype != torch.float64 else torch.float32)


def test_explain_names_the_kernel_and_the_reasons():
    sparse = SparseLinear.from_linear(pruned()).eval()
    with torch.no_grad():
        assert "direct call" in explain(sparse, torch.randn(2, 60))
    text = explain(sparse, torch.randn(2, 60))
    assert "a gradient is needed" in text and "native" in text and "triton" in text
    with pytest.raises(TypeError, match=r"expected a SparseLinear or an nn\.Linear and its input, got ReLU"):
        explain(nn.ReLU(), torch.randn(2, 2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "tanh"}, "activation expected one of"),
        ({"value_dtype": "int4"}, "value_dtype expected one of"),
        ({"layout": "bsr", "blocksize": (7, 1)}, "blocksize"),
        ({"layout": "nm", "nm": (1, 4)}, "non-zeros in each group"),
        ({"layout": "coo"}, "layout expected"),
        ({"low_rank_a": torch.ones(2, 60)}, "together"),
        ({"low_rank_a": torch.ones(2, 60), "low_rank_b": torch.ones(48, 3)}, r"\[48, r\]"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_linear(pruned(), **options)


@pytest.mark.parametrize(
    "x, residual, message",
    [
        (torch.ones(3, 59), None, r"input expected \[..., 60\]"),
        (torch.tensor(1.0), None, "input expected"),
        (torch.ones(3, 60), torch.ones(3, 47), "residual expected"),
        (torch.ones(3, 60), torch.ones(2, 48), "residual expected"),
    ],
)
def test_wrong_widths_never_reach_a_kernel(x, residual, message):
    sparse = SparseLinear.from_linear(pruned()).eval()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        sparse(x, residual)


@pytest.mark.parametrize("values, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2), ("int8", 2e-2)])
@pytest.mark.parametrize("dense_from", [None, 12])
def test_each_call_size_has_its_form(values, tolerance, dense_from):
    linear = pruned(37, 61)
    sparse = SparseLinear.from_linear(linear, value_dtype=values, tokens=(128, 1), dense_from=dense_from).eval()
    assert sparse.tokens == (1, 128)
    outputs = []
    with torch.no_grad():
        for rows in (1, 2, 11, 12, 67):
            x = torch.randn(rows, 61)
            y = sparse(x)
            torch.testing.assert_close(y, linear(x), rtol=tolerance, atol=4 * tolerance)
            outputs.append((x, y))
        for x, y in outputs:  # one function, whatever form ran it
            each = torch.cat([sparse(row[None]) for row in x])
            torch.testing.assert_close(y, each, rtol=1e-4, atol=1e-4)
    assert sparse._forms.used == {
        Form(Purpose.INFERENCE, 1), Form(Purpose.INFERENCE, 128, unpacked=dense_from is not None)
    }  # fmt: skip
    assert sparse.packed_nbytes > (0 if dense_from is None else 4 * 37 * 61)
    with torch.no_grad():
        assert ("F.linear" in explain(sparse, torch.randn(67, 61))) == (dense_from is not None)


def test_every_form_follows_the_values_and_copies_are_whole(close):
    sparse = SparseLinear.from_linear(pruned(21, 33), tokens=(1, 128), dense_from=40).eval()
    x = torch.randn(67, 33)
    with torch.no_grad():
        sparse(x), sparse(x[:1])
        sparse.values.mul_(2)
        for copied in (sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            for rows in (1, 30, 67):
                close(copied(x[:rows]), F.linear(x[:rows], sparse.weight, sparse.bias))
    sparse(x).sum().backward()
    assert sparse.values.grad is not None and bool(torch.isfinite(sparse.values.grad).all())


@pytest.mark.parametrize("options", [{"tokens": ()}, {"tokens": (0, 3)}, {"dense_from": 0}])
def test_call_sizes_are_checked(options):
    with pytest.raises(ValueError, match=r"(tokens|dense_from) expected"):
        SparseLinear.from_linear(pruned(), **options)


def test_a_float64_input_keeps_its_precision():
    linear = pruned(21, 33)
    sparse = SparseLinear.from_linear(linear).eval()
    x = torch.randn(5, 33, dtype=torch.float64)
    with torch.no_grad():
        y = sparse(x)
        expected = F.linear(x, linear.weight.double(), linear.bias.double())
    assert y.dtype == torch.float64 and torch.allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(_native.C is None, reason="needs the compiled core")
@pytest.mark.parametrize("options", [{}, {"value_dtype": "bfloat16"}, {"value_dtype": "int8"},
                                     {"value_dtype": "int8", "activations": "int8"}])  # fmt: skip
def test_a_compiled_graph_rounds_as_a_call_does(options):
    torch.compiler.reset()
    linear = nn.Linear(64, 48)
    sp.prune_(nn.Sequential(linear), 0.7)
    layer = sp.SparseLinear.from_linear(linear, **options).eval().requires_grad_(False)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer(x)  # packs, before anything is compiled
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    torch.compiler.reset()
