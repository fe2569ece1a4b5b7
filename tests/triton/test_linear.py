"""Masked and block-sparse products by Triton kernels: values and gradients against plain torch in float32."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparseprune import ops, reference
from sparseprune.activations import ACTIVATIONS
from sparseprune.triton import linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def exact_products():
    """float32 multiplied exactly, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def _values(shape, dtype, device, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(scale).to(device, dtype)


def _mask(shape, device, keep=0.4):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(9)) < keep).to(device)


def _gradients(run, dy, *leaves):
    """(result, gradients of the leaves) of one call."""
    leaves = [leaf.detach().requires_grad_(True) for leaf in leaves]
    y = run(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(y.dtype))


def _expected(dense_of, dy, x, weights, bias, activation):
    """The same in float32 through plain torch; dense_of turns the differentiated weights into the dense matrix."""

    def run(x, weights, bias):
        return reference.activate(torch.nn.functional.linear(x, dense_of(weights), bias), activation)

    return _gradients(run, dy.float(), x.float(), weights.float(), bias.float())


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 37, 29), (70, 130, 67)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear(device, guards, close, dtype, shape):
    tokens, k, n = shape
    x, dy = _values((tokens, k), dtype, device), _values((tokens, n), dtype, device, 1)
    w, bias, mask = _values((n, k), dtype, device, 2, k**-0.5), _values((n,), dtype, device, 3), _mask((n, k), device)
    w[~mask] = float("nan")  # a pruned weight is never multiplied
    x, dy, w, bias, mask = (guards.around(t) for t in (x, dy, w, bias, mask))
    y, got = _gradients(lambda x, w, b: ops.masked_linear(x, w, mask, b), dy, x, w, bias)
    wanted, gradients = _expected(lambda w: w.masked_fill(~mask, 0), dy, x, w, bias, "none")
    close(y, wanted)
    for one, other in zip(got, gradients):
        assert one.dtype == dtype
        close(one, other, dtype)
    assert not got[1][~mask].any()


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_bit_packed_masks_give_what_byte_masks_give(device, guards, keep):
    x, dy = _values((9, 45), torch.float32, device), _values((9, 70), torch.float32, device, 1)
    w, mask = guards.around(_values((70, 45), torch.float32, device, 2)), _mask((70, 45), device, keep)
    packed = guards.around(linear.pack_mask(mask))
    assert packed.shape == (70, 6)
    assert torch.equal(linear.masked_forward(x, w, packed, bits=True), linear.masked_forward(x, w, mask))
    dx = linear.masked_input_gradient(dy, w, packed, bits=True)
    assert torch.equal(dx, linear.masked_input_gradient(dy, w, mask))
    dw = linear.masked_weight_gradient(dy, x, packed, torch.float32, bits=True)
    assert torch.equal(dw, linear.masked_weight_gradient(dy, x, mask, torch.float32))


def test_masked_linear_takes_any_strides_and_leading_dimensions(device, close):
    x = _values((24, 3, 2), torch.float32, device).permute(1, 2, 0)
    w, mask = _values((24, 17), torch.float32, device, 1).t(), _mask((17, 24), device)
    close(ops.masked_linear(x, w, mask), torch.nn.functional.linear(x, w.masked_fill(~mask, 0)))
    assert ops.masked_linear(x[:0], w, mask).shape == (0, 2, 17)


def test_masked_linear_with_weights_in_float32_and_inputs_in_bfloat16(device, close):
    x, w = _values((6, 40), torch.bfloat16, device), _values((20, 40), torch.float32, device, 1, 0.1)
    mask = _mask((20, 40), device)
    close(ops.masked_linear(x, w, mask), torch.nn.functional.linear(x.float(), w.masked_fill(~mask, 0)))


@pytest.mark.parametrize("bias", [torch.arange(40.0)[::2], torch.ones(1).expand(20)], ids=["strided", "expanded"])
def test_a_bias_of_any_strides(device, guards, close, bias):
    x, w = _values((6, 32), torch.float32, device), _values((20, 32), torch.float32, device, 1)
    mask = _mask((20, 32), device)
    bias = bias.to(device) if bias.stride() == (2,) else bias[:1].to(device).expand(20)
    close(ops.masked_linear(x, w, mask, bias), torch.nn.functional.linear(x, w.masked_fill(~mask, 0), bias))
    crow, col, values = _blocks(3, 2, (16, 16), torch.float32, device)
    wide = torch.arange(96.0, device=device)[::2] if bias.stride() == (2,) else bias[:1].expand(48)
    close(ops.bsr_linear(x, crow, col, values, wide), reference.bsr_linear(x, crow, col, values, wide, "none"))


def test_no_inputs_leave_the_bias(device):
    x, w, bias = torch.ones(2, 3, 0, device=device), torch.ones(5, 0, device=device), torch.arange(5.0, device=device)
    assert torch.equal(ops.masked_linear(x, w, w > 0, bias), bias.expand(2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tokens_take_a_masked_copy(device, monkeypatch, close, dtype):
    x, dy = _values((2, 9, 40), dtype, device), _values((2, 9, 20), dtype, device, 1)
    w, bias, mask = _values((20, 40), torch.float32, device, 2, 0.1), _values((20,), torch.float32, device, 3), None
    mask = _mask((20, 40), device)
    w[~mask] = float("nan")
    fused = linear.masked_linear(x, w, mask, bias), linear.masked_linear_dx(dy, w, mask)
    monkeypatch.setattr(linear, "FUSED_TOKENS", 17)
    monkeypatch.setattr(linear, "_masked", None)  # the fused kernel is not launched
    for got, expected in zip((linear.masked_linear(x, w, mask, bias), linear.masked_linear_dx(dy, w, mask)), fused):
        assert got.dtype == dtype
        close(got, expected)


@pytest.mark.parametrize("setting", ["torch.backends.cuda.matmul.fp32_precision", "torch.backends.fp32_precision"])
def test_either_of_torchs_settings_chooses_tf32(setting):
    """In a process of its own: torch refuses the older setting once the newer one was used."""
    code = (
        "import torch\n"
        "from sparseprune.triton.linear import precision\n"
        "assert precision(torch.float32) == 'ieee'\n"
        "torch.set_float32_matmul_precision('high')\n"
        "assert precision(torch.float32) == 'tf32' and precision(torch.float16) == 'ieee'\n"
        "torch.set_float32_matmul_precision('highest')\n"
        "assert precision(torch.float32) == 'ieee'\n"
        f"if hasattr(torch.backends.cuda.matmul, 'fp32_precision'):\n"
        f"    torch.backends.cuda.matmul.fp32_precision = 'none'\n"
        f"    {setting} = 'tf32'\n"
        "    assert precision(torch.float32) == 'tf32'\n"
        f"    {setting} = 'ieee'\n"
        "    assert precision(torch.float32) == 'ieee'\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_epilogue(device, guards, close, activation):
    x, w = _values((20, 40), torch.float32, device), _values((18, 40), torch.float32, device, 1)
    bias, mask = _values((18,), torch.float32, device, 2), _mask((18, 40), device)
    x[3, 5] = float("nan")
    got = linear.masked_forward(*(guards.around(t) for t in (x, w, mask, bias)), activation)
    close(got, reference.activate(torch.nn.functional.linear(x, w.masked_fill(~mask, 0), bias), activation))


def _blocks(bands, columns, blocksize, dtype, device, keep=0.5):
    """(crow, col, values) of a bsr weight with an empty band, a full one, and blocks of numbers in between."""
    there = torch.rand(bands, columns, generator=torch.Generator().manual_seed(4)) < keep
    there[0], there[-1] = keep > 0, False
    crow = torch.zeros(bands + 1, dtype=torch.int32)
    crow[1:] = there.sum(1).cumsum(0)
    col = there.nonzero()[:, 1].to(torch.int32)
    values = _values((len(col), *blocksize), dtype, device, 5, (columns * blocksize[1]) ** -0.5)
    return crow.to(device), col.to(device), values


@pytest.mark.parametrize(
    ("blocksize", "dtype", "activation"),
    [
        ((16, 16), torch.float32, "gelu"),
        ((16, 16), torch.float32, "silu"),
        ((32, 32), torch.float16, "gelu_tanh"),
        ((64, 64), torch.bfloat16, "relu"),
        ((128, 128), torch.float16, "none"),
        ((128, 128), torch.float32, "none"),
        ((16, 64), torch.float32, "none"),
        ((64, 16), torch.bfloat16, "none"),
    ],
    ids=str,
)
def test_bsr_linear(device, guards, close, blocksize, dtype, activation):
    bands, columns, tokens = 4, 3, 37
    crow, col, values = _blocks(bands, columns, blocksize, dtype, device)
    n, k = bands * blocksize[0], columns * blocksize[1]
    x, dy = _values((tokens, k), dtype, device), _values((tokens, n), dtype, device, 1)
    bias = _values((n,), dtype, device, 2)
    x, dy, bias, crow, col, values = (guards.around(t) for t in (x, dy, bias, crow, col, values))
    y, got = _gradients(lambda x, v, b: ops.bsr_linear(x, crow, col, v, b, activation), dy, x, values, bias)
    wanted, gradients = _expected(lambda v: reference.csr_to_dense(crow, col, v, k), dy, x, values, bias, activation)
    close(y, wanted)
    for one, other in zip(got, gradients):
        close(one, other, torch.bfloat16 if activation != "none" and dtype == torch.float16 else dtype)


def test_bsr_epilogue_is_fused_where_no_gradient_is_wanted(device, close):
    crow, col, values = _blocks(3, 2, (16, 16), torch.float32, device)
    x, bias = _values((2, 5, 32), torch.float32, device), _values((48,), torch.float32, device, 2)
    close(ops.bsr_linear(x, crow, col, values, bias, "gelu"), reference.bsr_linear(x, crow, col, values, bias, "gelu"))


def test_bsr_without_a_block_and_without_a_token(device):
    crow, col, values = _blocks(3, 2, (16, 16), torch.float32, device, keep=0.0)
    x, dy = _values((4, 32), torch.float32, device), _values((4, 48), torch.float32, device)
    assert not ops.bsr_linear(x, crow, col, values).any()
    assert ops.sddmm(x, dy, crow, col, (16, 16)).shape == (0, 16, 16)
    crow, col, values = _blocks(3, 2, (16, 16), torch.float32, device)
    assert ops.bsr_linear(x[:0], crow, col, values).shape == (0, 48)
    assert not ops.sddmm(x[:0], dy[:0], crow, col, (16, 16)).any()


def test_sddmm_reads_strided_tensors(device, guards, close):
    crow, col, _ = _blocks(3, 4, (16, 32), torch.float32, device)
    x, dy = _values((128, 70), torch.float32, device).t(), _values((48, 70), torch.float32, device, 1).t()
    close(ops.sddmm(x, dy, crow, col, (16, 32)), reference.sddmm(x, dy, crow, col, 16, 32), torch.float16)


def test_tuning_takes_the_fastest_and_remembers(device, monkeypatch):
    from sparseprune.triton import _tuning

    monkeypatch.setenv("SPARSEPRUNE_TRITON_TUNE", "1")
    monkeypatch.setattr(_tuning, "_CHOSEN", {})
    timed = []

    def bench(run, device):
        run()
        timed.append(run.args[0])
        return float(-len(timed))  # the later, the faster

    monkeypatch.setattr(_tuning, "do_bench", bench)
    x, w = _values((3, 20), torch.float32, device), _values((10, 20), torch.float32, device, 1)
    mask = _mask((10, 20), device)
    first = ops.masked_linear(x, w, mask)
    (chosen,) = _tuning.chosen().values()
    assert len(timed) > 1 and chosen == timed[-1]
    assert torch.allclose(ops.masked_linear(x[:2], w, mask), first[:2], atol=1e-5)
    assert len(_tuning.chosen()) == 1, "2 and 3 tokens share a bucket"
    monkeypatch.setenv("SPARSEPRUNE_TRITON_TUNE", "0")
    monkeypatch.setattr(_tuning, "_CHOSEN", {})
    ops.masked_linear(x, w, mask)
    assert list(_tuning.chosen().values()) == timed[:1]


def test_nothing_is_timed_where_results_must_not_depend_on_it_or_memory_is_short(monkeypatch, need_package):
    from sparseprune.triton import _tuning

    need_package("triton")
    cuda, taken = torch.device("cuda"), []
    configs = [_tuning.Config((), 4, stages) for stages in (1, 2)]
    monkeypatch.setattr(_tuning, "_name", str)
    monkeypatch.setattr(_tuning, "interpreting", lambda: False)
    monkeypatch.setattr(_tuning, "capturing", lambda device: False)
    monkeypatch.delenv("SPARSEPRUNE_TRITON_TUNE", raising=False)

    def launched(bench):
        monkeypatch.setattr(_tuning, "_CHOSEN", {})
        monkeypatch.setattr(_tuning, "do_bench", bench)
        _tuning.launch("kernel", cuda, (), configs, taken.append)
        return taken[-1]

    def later_is_faster(run, device):
        return -run.args[0].stages

    def no_memory(run, device):
        raise torch.OutOfMemoryError("512 MiB")

    assert launched(later_is_faster) is configs[1]
    assert launched(no_memory) is configs[0] and not _tuning._CHOSEN  # the next call may find more
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert launched(later_is_faster) is configs[0]


def test_a_launch_that_fails_while_recording_says_what_to_do(monkeypatch):
    from sparseprune.triton import _tuning

    def load(config):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_tuning, "_name", str)
    monkeypatch.setattr(_tuning, "capturing", lambda device: True)
    configs = [_tuning.Config((), 4, stages) for stages in (1, 2)]
    with pytest.raises(RuntimeError, match="bsr_linear: expected to be loaded before a CUDA graph is recorded"):
        _tuning.launch("bsr_linear", torch.device("cuda"), (), configs, load)
    monkeypatch.setattr(_tuning, "capturing", lambda device: False)
    with pytest.raises(RuntimeError, match="not permitted"):
        _tuning.launch("bsr_linear", torch.device("cuda"), (), configs[:1], load)


def test_the_structure_of_a_transpose_is_made_once(device, monkeypatch):
    crow, col, values = _blocks(3, 2, (16, 16), torch.float32, device)
    dy = _values((4, 48), torch.float32, device)
    made, transpose = [], linear._transpose
    monkeypatch.setattr(linear, "_transpose", lambda *args: made.append(1) or transpose(*args))
    first = linear.csr_linear_dx(dy, crow, col, values, 32)
    assert torch.equal(linear.csr_linear_dx(dy, crow, col, values, 32), first) and len(made) == 1


def test_do_bench_times_on_this_device(device):
    from sparseprune.triton._tuning import do_bench

    calls = []
    x = torch.ones(100, device=device)
    milliseconds = do_bench(lambda: calls.append(x.sum()), torch.device(device), repeats=3)
    assert len(calls) == 4 and 0 <= milliseconds < 1000


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_products():
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can see")
    crow, col, values = _blocks(3, 2, (32, 32), torch.float16, "cuda")
    x, mask = _values((5, 64), torch.float16, "cuda"), _mask((96, 64), "cuda")
    w = reference.csr_to_dense(crow, col, values, 64)
    expected = ops.bsr_linear(x, crow, col, values), ops.masked_linear(x, w, mask)  # tunes, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.bsr_linear(x, crow, col, values), ops.masked_linear(x, w, mask)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(got, expected))


@pytest.mark.gpu
def test_a_size_that_is_specialised_otherwise_is_recorded_or_refused():
    """16 tokens share the configuration of 5, and are another kernel to Triton: one that was not loaded before."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can see")
    w, mask = torch.randn(96, 64, device="cuda").half(), _mask((96, 64), "cuda")
    ops.masked_linear(torch.randn(5, 64, device="cuda").half(), w, mask)
    x, graph = torch.randn(16, 64, device="cuda").half(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            y = ops.masked_linear(x, w, mask)
    except RuntimeError as error:
        assert "before a CUDA graph is recorded" in f"{error} {error.__context__}"
        return
    graph.replay()
    torch.testing.assert_close(y, ops.masked_linear(x, w, mask), rtol=0, atol=0)


def test_rows_far_apart_are_copied():
    """A kernel's step over them would not fit into 32 bits."""
    far = torch.empty_strided((3, 4), (2**24, 1), device="meta")
    assert linear.flattened(far).stride() == (4, 1)
    near = torch.empty_strided((3, 4), (2**24 - 1, 1), device="meta")
    assert linear.flattened(near).stride() == (2**24 - 1, 1) and linear.flattened(near.t()).stride() == (1, 2**24 - 1)


def test_blocks_of_float32_take_the_memory_of_float32(device, monkeypatch, close):
    """With an x in 16 bits, as under autocast: shared memory holds both as they come."""
    asked, plain = [], linear.configs.bsr_configs
    monkeypatch.setattr(linear.configs, "bsr_configs", lambda *how: asked.append(how[0]) or plain(*how))
    crow, col, values = _blocks(1, 2, (128, 16), torch.float32, device)
    x = _values((3, 32), torch.float16, device)
    got = ops.bsr_linear(x, crow, col, values)
    assert asked == [torch.float32] and got.dtype == torch.float16
    close(got, reference.bsr_linear(x.float(), crow, col, values, None, "none"), torch.float16)
