"""Every CUDA kernel against the reference: the same text on the emulator under several schedules, and on a card."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_tensors import DTYPES, HALVES, amid_nan, csr_on, weight

import sparseprune
from sparseprune import _native, reference
from sparseprune.cuda import deltas, linear, selection, strips
from sparseprune.cuda.strips import splits_for
from sparseprune.cuda.structures import Csr
from sparseprune.tensor_state import note_gradients, place_of

# Strips.


@pytest.mark.parametrize("shape", [(16, 64), (17, 65), (1, 1), (40, 200), (33, 130)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strips_hold_the_weight(device, shape, density, dtype):
    w = weight(*shape, density, dtype)
    strips = linear.pack_strips(shape, *csr_on(device, w), torch.float16)
    bitmap, values_of, w = strips.bitmap, strips.values.cpu(), w.half()
    words_of, starts = bitmap.words.cpu(), bitmap.starts.cpu()
    across, down = -(-shape[1] // 64), -(-shape[0] // 16)
    got = torch.zeros(down * 16, across * 64, dtype=w.dtype)
    for strip in range(down * across):
        words = [int(word) & 0xFFFFFFFF for word in words_of[strip * 32 : strip * 32 + 32]]
        values = iter(values_of[int(starts[strip]) : int(starts[strip + 1])])
        for nibble in range(8):
            for lane in range(32):
                for bit in range(4):
                    if words[lane] >> (nibble * 4 + bit) & 1:
                        row = strip // across * 16 + lane // 4 + 8 * (nibble % 2)
                        column = strip % across * 64 + lane % 4 * 16 + nibble // 2 * 4 + bit
                        got[row, column] = next(values)
        assert next(values, None) is None
    assert torch.equal(got[: shape[0], : shape[1]], w) and int(got.count_nonzero()) == int(w.count_nonzero())
    assert bitmap.most == int((starts[1:] - starts[:-1]).max())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "rows, columns, tokens, density",
    [
        (16, 64, 1, 0.5), (17, 65, 3, 0.5), (1, 1, 1, 1.0), (40, 200, 8, 0.25), (33, 136, 16, 0.75), (20, 70, 9, 1.0),
        (16, 128, 2, 0.0),
    ],
)
def test_strips_linear(device, close, dtype, rows, columns, tokens, density):
    w, bias = weight(rows, columns, density, dtype), weight(1, rows, 1.0, dtype, seed=1)[0]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    strips = linear.pack_strips((rows, columns), *csr_on(device, w))
    y = linear.strips_linear(amid_nan(x, device), strips, bias.to(device))
    close(y.cpu(), reference.dense_linear(x, w, bias, "none"))


def test_strips_linear_goes_round_its_ring(device, close):
    """Enough strips a warp that every stage of the ring is used more than once, with very uneven strips."""
    rows, columns, tokens = 16, 64 * 8 * 6 + 24, 5
    w = weight(rows, columns, 0.5, torch.float16)
    w[:, 64 * 8 : 64 * 16] = 0
    w[:, 64 * 30 : 64 * 31] = 0.125
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).half()
    strips = linear.pack_strips((rows, columns), *csr_on(device, w))
    close(linear.strips_linear(amid_nan(x, device), strips).cpu(), reference.dense_linear(x, w, None, "none"))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(device, close, activation):
    w, bias = weight(16, 64, 0.5, torch.float16), weight(1, 16, 1.0, torch.float16, seed=1)[0]
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)).half()
    crow, col, values = csr_on(device, w)
    expected = reference.dense_linear(x, w, bias, activation)
    strips = linear.pack_strips((16, 64), crow, col, values)
    close(linear.strips_linear(x.to(device), strips, bias.to(device), activation).cpu(), expected)
    got = linear.csr_as_it_is(x.to(device), crow, col, values, bias.to(device), activation)
    close(got.cpu(), expected)


# csr.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, columns, tokens, density",
    [
        (1, 1, 1, 1.0), (9, 300, 1, 0.1), (37, 65, 2, 0.2), (8, 530, 3, 0.9), (5, 64, 8, 0.05), (33, 65, 9, 0.1),
        (40, 33, 130, 0.3),
    ],
)
def test_csr_linear(device, close, dtype, rows, columns, tokens, density):
    w, bias = weight(rows, columns, density, dtype), weight(1, rows, 1.0, dtype, seed=1)[0]
    w[rows // 2] = 0
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    crow, col, values = csr_on(device, w)
    got = linear.csr_as_it_is(amid_nan(x, device), crow, col, values, bias.to(device), "none")
    close(got.cpu(), reference.dense_linear(x, w, bias, "none"))


def test_csr_linear_reads_no_dropped_column(device):
    """An entry that is not stored takes nothing from x, be it infinite: also where a load of four spans two rows."""
    w = torch.zeros(3, 8)
    w[0, 1], w[1, 2], w[2, 5] = 1.0, 2.0, 3.0
    for tokens in (1, 12):
        x = torch.full((tokens, 8), math.inf)
        x[:, [1, 2, 5]] = 1.0
        got = linear.csr_as_it_is(x.to(device), *csr_on(device, w), None, "none")
        assert torch.equal(got.cpu(), torch.tensor([1.0, 2.0, 3.0]).expand(tokens, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, columns, tokens, density",
    [
        (1, 1, 1, 1.0), (9, 300, 1, 0.1), (37, 65, 2, 0.2), (8, 2000, 3, 0.02), (33, 700, 8, 0.9), (5, 64, 6, 0.0),
        (8, 3400, 8, 0.03),  # x does not fit into shared memory
    ],
)
def test_deltas_linear(device, close, dtype, rows, columns, tokens, density):
    w, bias = weight(rows, columns, density, dtype), weight(1, rows, 1.0, dtype, seed=1)[0]
    w[rows // 2] = 0 if rows > 1 else w[0]
    w[0, -1] = 1.0  # behind a gap of many steps
    crow, col, values = csr_on(device, w)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed = deltas.pack_deltas(Csr(crow, col), columns)
    got = deltas.deltas_linear(amid_nan(x, device), packed, packed.filled(values, dtype), bias.to(device), "silu")
    close(got.cpu(), reference.dense_linear(x, w, bias, "silu"))


def test_deltas_read_no_dropped_column(device):
    """Neither a step nor the padding of a row reads x, be it infinite."""
    w = torch.zeros(3, 1000)
    w[0, 999], w[2, 254], w[2, 508] = 1.0, 2.0, 3.0
    x = torch.full((2, 1000), math.inf)
    x[:, [254, 508, 999]] = 1.0
    got = linear.csr_linear(x.to(device), *csr_on(device, w), None, "none")
    assert torch.equal(got.cpu(), torch.tensor([1.0, 0.0, 5.0]).expand(2, 3))
    crow, col, values = csr_on(device, w)
    packed = deltas.pack_deltas(Csr(crow, col), 1000)
    got = deltas.deltas_linear(x.to(device), packed, packed.filled(values, torch.float32))
    assert torch.equal(got.cpu(), torch.tensor([1.0, 0.0, 5.0]).expand(2, 3))


def test_csr_linear_takes_its_four_ways(device, close, monkeypatch):
    ways = []
    for name in ("strips_linear", "deltas_linear", "csr_as_it_is"):
        real = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, name=name, real=real: (ways.append(name), real(*args))[1])
    crow, col, values = csr_on(device, weight(16, 64, 0.5, torch.float16))
    dense = reference.csr_to_dense(crow.cpu(), col.cpu(), values.cpu(), 64)
    for tokens in (2, 17):
        x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens)).half()
        y = linear.csr_linear(x.to(device), crow, col, values, None, "none")
        close(y.cpu(), reference.dense_linear(x, dense, None, "none"))
    linear.csr_linear(x.to(device).float(), crow, col, values.float(), None, "none")
    few = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    y = linear.csr_linear(few.to(device), crow, col, values.float(), None, "none")
    close(y.cpu(), reference.dense_linear(few, dense.float(), None, "none"))
    assert ways == ["strips_linear", "strips_linear", "csr_as_it_is", "deltas_linear"]


def test_strips_are_made_again_when_the_values_change(device, close):
    crow, col, values = csr_on(device, weight(16, 64, 0.5, torch.float16))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).half().to(device)
    first = linear.csr_linear(x, crow, col, values, None, "none")
    values.mul_(2)
    close(linear.csr_linear(x, crow, col, values, None, "none"), first * 2)


def test_values_that_learn_are_never_reused(device, close):
    """A fused optimiser's step leaves the version counter alone, and so does a write through .data."""
    crow, col, values = csr_on(device, weight(16, 64, 0.5, torch.float16))
    values.requires_grad_(True)
    for tokens in (1, 20):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2)).half().to(device)
        first = linear.csr_linear(x, crow, col, values, None, "none")
        values.data.mul_(2)
        close(linear.csr_linear(x, crow, col, values, None, "none"), first * 2)


@pytest.mark.parametrize("whose", ["its own", "nobody knows whose"])
def test_a_gradient_since_makes_frozen_values_new(device, close, whose):
    crow, col, values = csr_on(device, weight(16, 64, 0.5, torch.float16))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).half().to(device)
    first = linear.csr_linear(x, crow, col, values, None, "none")
    values.data.mul_(2)
    note_gradients(place_of(values) if whose == "its own" else ())
    close(linear.csr_linear(x, crow, col, values, None, "none"), first * 2)


@pytest.mark.parametrize("dtype, density", [(torch.float16, 0.5), (torch.float32, 0.05)], ids=str)
def test_frozen_values_beside_learning_ones_are_filled_once(device, monkeypatch, dtype, density):
    crow, col, values = csr_on(device, weight(16, 64, density, dtype))
    x, made = torch.ones(1, 64, dtype=dtype, device=device), []
    for module, owner, name in ((strips, strips, "filled"), (deltas, deltas.Deltas, "filled")):
        fill = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, fill=fill, of=module: made.append(of) or fill(*args))
    parts = [t.detach().clone() for t in (crow, col, values)]
    for step in range(3):
        learning = parts[2].float().requires_grad_()
        sparseprune.ops.csr_linear(x.float(), *parts[:2], learning).sum().backward()
        assert learning.grad is not None
        linear.csr_linear(x, crow, col, values, None, "none")
        assert len(made) == 1, step


# More tokens than one strip product takes.


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "rows, columns, tokens, density, splits",
    [
        (128, 256, 17, 0.5, 1), (130, 333, 33, 0.3, 1), (16, 64, 65, 1.0, 1), (1, 1, 70, 1.0, 1),
        (260, 136, 20, 0.0, 1), (40, 64 * 9, 32, 0.5, 4), (144, 64 * 5 + 8, 70, 0.4, 2), (20, 64 * 4, 3, 0.5, 3),
    ],
)
def test_tiles_linear(device, close, dtype, rows, columns, tokens, density, splits):
    w, bias = weight(rows, columns, density, dtype), weight(1, rows, 1.0, dtype, seed=1)[0]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    strips = linear.pack_strips((rows, columns), *csr_on(device, w))
    y = linear.strips_linear(amid_nan(x, device), strips, bias.to(device), "gelu", splits)
    close(y.cpu(), reference.dense_linear(x, w, bias, "gelu"))


def test_splits_fill_the_card_and_leave_each_work():
    assert splits_for(64, 4096, 64, 108) == 7  # 32 blocks of rows; 216 wanted
    assert splits_for(512, 4096, 64, 108) == 1
    assert splits_for(64, 128, 8, 108) == 2  # at least four strips each
    assert splits_for(64, 128, 1, 108) == 1


def test_no_tokens_and_no_entries(device):
    crow, col, values = csr_on(device, torch.zeros(5, 8))
    assert linear.csr_linear(torch.zeros(0, 8, device=device), crow, col, values, None, "none").shape == (0, 5)
    bias = torch.arange(5.0, device=device)
    got = linear.csr_linear(torch.ones(2, 8, device=device), crow, col, values, bias, "none")
    assert torch.equal(got, bias.expand(2, 5))


# Selection.


def scores_of(sizes, dtype, device, few=False):
    generator = torch.Generator().manual_seed(len(sizes))
    listed = []
    for i, size in enumerate(sizes):
        x = torch.randn(size, generator=generator)
        if few:
            x = torch.randint(-3, 4, (size,), generator=generator).float()
        listed.append(amid_nan((x / (1 + i)).to(dtype), device, lead=i + 1))
    return listed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("few", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("sizes", [[1], [255], [1100, 0, 3], [4096, 5000]], ids=str)
def test_selection(device, dtype, few, sizes):
    tensors = scores_of(sizes, dtype, device, few)
    total, plain = sum(sizes), [t.cpu() for t in tensors]
    for k in sorted({1, total // 3, total}) if total > 1 else [1]:
        k = max(1, k)
        assert torch.equal(selection.kth_magnitude(tensors, k).cpu(), reference.kth_magnitude(plain, k))
        for name in ("topk_mask", "magnitude_mask"):
            got, expected = getattr(selection, name)(tensors, k), getattr(reference, name)(plain, k)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected)), (name, k)


def test_selection_takes_many_tensors_in_few_launches(device, monkeypatch):
    """130 tensors are two launches a step; ties go over from one to the next."""
    generator = torch.Generator().manual_seed(8)
    plain = [torch.randint(-3, 4, (i % 7 * 30,), generator=generator).float() for i in range(151)]
    tensors, total = [t.to(device) for t in plain], sum(t.numel() for t in plain)
    real, calls = _native.CUDA, []

    class Counted:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(real, name)

    monkeypatch.setattr(_native, "CUDA", Counted())
    for k in (1, total // 2, total):
        calls.clear()
        got, expected = selection.topk_mask(tensors, k), reference.topk_mask(plain, k)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected))
        assert sum(name.startswith("select_") for name in calls) == 1 + 3 * (2 + 1) + 2 + 1 + 2
    assert torch.equal(selection.kth_magnitude(tensors, 9).cpu(), reference.kth_magnitude(plain, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_of_special_values(device, dtype):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-7, -1e-7, 6e-8, 65504.0, -65504.0, 2e-38, -3e-38], dtype=dtype)
    for k in range(x.numel() + 1):
        for name in ("topk_mask", "magnitude_mask"):
            got, expected = getattr(selection, name)([x.to(device)], k), getattr(reference, name)([x], k)
            assert torch.equal(got[0].cpu(), expected[0]), (name, k)
        if k:
            assert torch.equal(selection.kth_magnitude([x.to(device)], k).cpu(), reference.kth_magnitude([x], k))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("threshold", [0.0, -1.0, 0.5, math.inf, -math.inf, math.nan])
def test_cut_mask(device, threshold, magnitude):
    tensors = scores_of([300, 17], torch.float32, device, few=True)
    cut = torch.tensor(threshold)
    for ties in (0, 7, 1000):
        got = selection.cut_mask(tensors, cut.to(device), ties, magnitude)
        expected = reference.cut_mask([t.cpu() for t in tensors], cut, ties, magnitude)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected)), ties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_radix_histogram(device, dtype):
    tensors = scores_of([2500, 40], dtype, device)
    plain = [t.cpu() for t in tensors]
    for magnitude in (False, True):
        prefix = 0
        for level, (_, width) in enumerate(reference.RADIX_DIGITS):
            got = selection.radix_histogram(tensors, prefix, level, magnitude)
            expected = reference.radix_histogram(plain, prefix, level, magnitude)
            assert torch.equal(got.cpu(), expected)
            prefix = prefix << width | int(expected[:-1].argmax())


def test_nan_has_no_rank(device):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    x[4321] = math.nan
    for call in (selection.kth_magnitude, selection.topk_mask, selection.magnitude_mask):
        with pytest.raises(ValueError, match="NaN"):
            call([x.to(device)], 10)
    with pytest.raises(ValueError, match="NaN"):
        selection.cut_mask([x.to(device)], torch.tensor(0.5, device=device), 1, False)


@pytest.mark.parametrize("dtype, density, dense", [(torch.float16, 0.5, True), (torch.float32, 0.5, False)], ids=str)
def test_infinity_at_a_pruned_column(device, dtype, density, dense):
    """Strips multiply it by zero, as a dense product does; csr and deltas do not read it."""
    w = weight(20, 70, density, dtype)
    w[:, 3] = 0
    x = torch.ones(2, 70, dtype=dtype, device=device)
    x[0, 3] = math.inf
    y = linear.csr_linear(x, *csr_on(device, w), None, "none")
    assert bool(y[0].isnan().all()) == dense and bool(y[0].isfinite().all()) != dense and bool(y[1].isfinite().all())


# What only a card has.


@pytest.mark.gpu
def test_a_graph_replays_csr_linear_and_selection():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can see")
    crow, col, values = csr_on("cuda", weight(256, 512, 0.5, torch.float16))
    x = torch.randn(4, 512, device="cuda", dtype=torch.float16)
    linear.csr_linear(x, crow, col, values, None, "none")  # makes the strips, which a recording may not
    selection.kth_magnitude([x], 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear.csr_linear(x, crow, col, values, None, "none")
        kth = selection.kth_magnitude([x], 7)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, linear.csr_linear(x, crow, col, values, None, "none"), rtol=0, atol=0)
    assert torch.equal(kth, selection.kth_magnitude([x], 7))


@pytest.mark.gpu
def test_the_first_call_of_a_compiled_graph_makes_what_it_needs():
    """torch.compile sends what its first call allocates into the memory of its CUDA graph."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can see")
    import sparseprune as sp

    dense = torch.nn.Linear(512, 256, bias=False, device="cuda", dtype=torch.float16)
    dense.weight.data.mul_(torch.rand_like(dense.weight) < 0.3)
    layer = sp.SparseLinear.from_linear(dense, "csr").requires_grad_(False)
    compiled = torch.compile(layer, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(4, 512, device="cuda", dtype=torch.float16, requires_grad=True)
        y = compiled(x)
        y.float().square().sum().backward()
        expected = dense(x.detach())
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(x.grad, 2 * expected @ dense.weight, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_kernel_may_be_launched_for_the_first_time_while_recording():
    """CUDA loads a kernel when it is first launched: in a process of its own, nothing was launched before."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can see")
    code = (
        "import torch\n"
        "from sparseprune.cuda import selection\n"
        "x, graph = torch.randn(5000, device='cuda'), torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        "    kth = selection.kth_magnitude([x], 7)\n"
        "graph.replay()\n"
        "assert torch.equal(kth, x.abs().sort(descending=True).values[6])\n"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(sparseprune.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=here)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nm_linear_through_torch(close, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can see")
    from sparseprune.layouts import NM

    w = weight(128, 256, 1.0, dtype)
    w = w * reference.nm_mask(w.abs(), 2, 4)
    nm = NM.from_dense(w, 2, 4)
    x, bias = torch.randn(40, 256).to(dtype), torch.randn(128).to(dtype)
    arguments = [t.cuda() for t in (x, nm.values, nm.indices)], 2, 4, bias.cuda()
    assert linear._why_not_nm(*arguments[0], 2, 4, bias.cuda(), "relu") == []
    close(linear.nm_linear(*arguments[0], 2, 4, bias.cuda(), "relu").cpu(), reference.dense_linear(x, w, bias, "relu"))
