"""Every CUDA kernel against the reference: the same text on the emulator under several schedules, and on a card."""

from __future__ import annotations

import math

import pytest
import torch

from sparseprune import layouts, reference
from sparseprune.cuda import matmul, selection

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


def weight(rows, columns, density, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) / math.sqrt(max(1.0, columns * density))
    return (w * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


def amid_nan(tensor, device, lead=8):
    """The tensor on the device as a view with NaN before and behind it: what is read out of bounds shows."""
    room = torch.full((lead + tensor.numel() + 64,), math.nan, dtype=tensor.dtype, device=device)
    view = room[lead : lead + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def csr_on(device, w):
    layout = layouts.CSR.from_dense(w)
    return layout.crow_indices.to(device), layout.col_indices.to(device), amid_nan(layout.values, device)


# Strips.


@pytest.mark.parametrize("shape", [(16, 64), (17, 65), (1, 1), (40, 200), (33, 130)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_strips_hold_the_weight(shape, density):
    w = weight(*shape, density, torch.float16)
    csr = layouts.CSR.from_dense(w)
    strips = matmul.pack_strips(shape, csr.crow_indices, csr.col_indices, csr.values)
    across, down = -(-shape[1] // 64), -(-shape[0] // 16)
    got = torch.zeros(down * 16, across * 64, dtype=w.dtype)
    for strip in range(down * across):
        words = [int(word) & 0xFFFFFFFF for word in strips.words[strip * 32 : strip * 32 + 32]]
        values = iter(strips.values[int(strips.starts[strip]) : int(strips.starts[strip + 1])])
        for nibble in range(8):
            for lane in range(32):
                for bit in range(4):
                    if words[lane] >> (nibble * 4 + bit) & 1:
                        row = strip // across * 16 + lane // 4 + 8 * (nibble % 2)
                        column = strip % across * 64 + lane % 4 * 16 + nibble // 2 * 4 + bit
                        got[row, column] = next(values)
        assert next(values, None) is None
    assert torch.equal(got[: shape[0], : shape[1]], w) and int(got.count_nonzero()) == int(w.count_nonzero())
    assert strips.most == int((strips.starts[1:] - strips.starts[:-1]).max())


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
    strips = matmul.pack_strips((rows, columns), *csr_on(device, w))
    y = matmul.strips_linear(amid_nan(x, device), strips, bias.to(device))
    close(y.cpu(), reference._dense_linear(x, w, bias, "none"))


def test_strips_linear_goes_round_its_ring(device, close):
    """Enough strips a warp that every stage of the ring is used more than once, with very uneven strips."""
    rows, columns, tokens = 16, 64 * 8 * 6 + 24, 5
    w = weight(rows, columns, 0.5, torch.float16)
    w[:, 64 * 8 : 64 * 16] = 0
    w[:, 64 * 30 : 64 * 31] = 0.125
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).half()
    strips = matmul.pack_strips((rows, columns), *csr_on(device, w))
    close(matmul.strips_linear(amid_nan(x, device), strips).cpu(), reference._dense_linear(x, w, None, "none"))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(device, close, activation):
    w, bias = weight(16, 64, 0.5, torch.float16), weight(1, 16, 1.0, torch.float16, seed=1)[0]
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)).half()
    crow, col, values = csr_on(device, w)
    expected = reference._dense_linear(x, w, bias, activation)
    strips = matmul.pack_strips((16, 64), crow, col, values)
    close(matmul.strips_linear(x.to(device), strips, bias.to(device), activation).cpu(), expected)
    got = matmul.csr_as_it_is(x.to(device), crow, col, values, bias.to(device), activation)
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
    got = matmul.csr_as_it_is(amid_nan(x, device), crow, col, values, bias.to(device), "none")
    close(got.cpu(), reference._dense_linear(x, w, bias, "none"))


def test_csr_linear_reads_no_dropped_column(device):
    """An entry that is not stored takes nothing from x, be it infinite: also where a load of four spans two rows."""
    w = torch.zeros(3, 8)
    w[0, 1], w[1, 2], w[2, 5] = 1.0, 2.0, 3.0
    for tokens in (1, 12):
        x = torch.full((tokens, 8), math.inf)
        x[:, [1, 2, 5]] = 1.0
        got = matmul.csr_as_it_is(x.to(device), *csr_on(device, w), None, "none")
        assert torch.equal(got.cpu(), torch.tensor([1.0, 2.0, 3.0]).expand(tokens, 3))


def test_csr_linear_takes_its_three_ways(device, close, monkeypatch):
    ways = []
    for name in ("strips_linear", "csr_as_it_is"):
        real = getattr(matmul, name)
        monkeypatch.setattr(matmul, name, lambda *args, name=name, real=real: (ways.append(name), real(*args))[1])
    crow, col, values = csr_on(device, weight(16, 64, 0.5, torch.float16))
    dense = reference.csr_to_dense(crow.cpu(), col.cpu(), values.cpu(), 64)
    for tokens in (2, 2, 17):
        x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens)).half()
        y = matmul.csr_linear(x.to(device), crow, col, values, None, "none")
        close(y.cpu(), reference._dense_linear(x, dense, None, "none"))
    assert ways == ["strips_linear", "strips_linear", "csr_as_it_is"]


def test_strips_are_made_again_when_the_values_change(device, close):
    crow, col, values = csr_on(device, weight(16, 64, 0.5, torch.float16))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).half().to(device)
    first = matmul.csr_linear(x, crow, col, values, None, "none")
    values.mul_(2)
    close(matmul.csr_linear(x, crow, col, values, None, "none"), first * 2)


def test_no_tokens_and_no_entries(device):
    crow, col, values = csr_on(device, torch.zeros(5, 8))
    assert matmul.csr_linear(torch.zeros(0, 8, device=device), crow, col, values, None, "none").shape == (0, 5)
    bias = torch.arange(5.0, device=device)
    got = matmul.csr_linear(torch.ones(2, 8, device=device), crow, col, values, bias, "none")
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


# What only a card has.


@pytest.mark.gpu
def test_a_graph_replays_csr_linear_and_selection():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can see")
    crow, col, values = csr_on("cuda", weight(256, 512, 0.5, torch.float16))
    x = torch.randn(4, 512, device="cuda", dtype=torch.float16)
    matmul.csr_linear(x, crow, col, values, None, "none")  # makes the strips, which a recording may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul.csr_linear(x, crow, col, values, None, "none")
        kth = selection.kth_magnitude([x], 7)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, matmul.csr_linear(x, crow, col, values, None, "none"), rtol=0, atol=0)
    assert torch.equal(kth, selection.kth_magnitude([x], 7))


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
    assert matmul._why_not_nm(*arguments[0], 2, 4, bias.cuda(), "relu") == []
    close(matmul.nm_linear(*arguments[0], 2, 4, bias.cuda(), "relu").cpu(), reference._dense_linear(x, w, bias, "relu"))
