"""Selection in the compiled core, every tier, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from sparseprune import _native, reference
from sparseprune.native import selection
from sparseprune.native._inputs import DTYPE_CODES

DTYPES = tuple(DTYPE_CODES)
SHAPES = [(1,), (7,), (64,), (1000,), (8192,), (8193,), (63, 331), (300, 300)]


def values(shape, dtype, kind, seed=0):
    """Data of one kind; each kind is hard for some way of selecting."""
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    sign = torch.randn(n, generator=generator).sign()
    made = {
        "normal": lambda: torch.randn(n, generator=generator),
        "equal": lambda: torch.full((n,), -0.75),
        "two-valued": lambda: torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1.5,
        "few-valued": lambda: torch.randint(-3, 4, (n,), generator=generator).float(),
        "sorted": lambda: torch.linspace(-3, 5, n),
        "reversed": lambda: torch.linspace(5, -3, n),
        "zeros of both signs": lambda: torch.randint(-1, 2, (n,), generator=generator).float() * 0.0,
        "huge range": lambda: sign * torch.exp(torch.randn(n, generator=generator) * 20),
        "infinite": lambda: torch.where(torch.rand(n, generator=generator) < 0.3, math.inf, 1.0) * sign,
        "lines": lambda: torch.randn(n // 16 + 1, generator=generator).repeat_interleave(16)[:n],
        "last piece": lambda: torch.cat([torch.zeros(n - n // 50), torch.rand(n // 50, generator=generator) + 1]),
    }[kind]()
    return made.to(dtype).reshape(shape)


KINDS = (
    "normal",
    "equal",
    "two-valued",
    "few-valued",
    "sorted",
    "reversed",
    "zeros of both signs",
    "huge range",
    "infinite",
    "lines",
    "last piece",
)


def ranks(n):
    return sorted({1, 2, n // 10, n // 2, n - 1, n} & set(range(1, n + 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kth_magnitude_is_exact_on_any_data(tier, kind, dtype):
    for shape in SHAPES:
        w = values(shape, dtype, kind)
        for k in ranks(w.numel()):
            expected = reference.kth_magnitude([w], k)
            assert torch.equal(selection.kth_magnitude([w], k), expected), (shape, k)
            for magnitude in (False, True):
                by_sample = selection.select("t", [w], k, magnitude)
                assert by_sample == selection.select("t", [w], k, magnitude, force_radix=True)


@pytest.mark.parametrize("kind", KINDS)
def test_topk_mask_has_the_reference_ties(tier, kind):
    pieces = [values((37, 41), torch.float32, kind, 1), torch.zeros(0), values((8191,), torch.float32, kind, 2)]
    total = sum(p.numel() for p in pieces)
    for k in (0, 1, 5, total // 3, total - 1, total):
        for ours, truth in (
            (selection.topk_mask, reference.topk_mask),
            (selection.magnitude_mask, reference.magnitude_mask),
        ):
            got, expected = ours(pieces, k), truth(pieces, k)
            assert [m.shape for m in got] == [p.shape for p in pieces]
            assert sum(int(m.sum()) for m in got) == k
            assert all(torch.equal(a, b) for a, b in zip(got, expected)), k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_large_inputs_and_many_pieces(tier, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(3)
        sizes = [*torch.randint(0, 40, (500,), generator=generator).tolist(), 150_001, 3, 70_000]
        pieces = [(torch.randn(n, generator=generator) * (1 + i % 5)).to(dtype) for i, n in enumerate(sizes)]
        total = sum(sizes)
        for k in (1, total // 100, total // 10, total // 2, total):
            got, expected = selection.magnitude_mask(pieces, k), reference.magnitude_mask(pieces, k)
            assert all(torch.equal(a, b) for a, b in zip(got, expected)), k
            assert torch.equal(selection.kth_magnitude(pieces, k), reference.kth_magnitude(pieces, k))
    finally:
        torch.set_num_threads(before)


def test_a_sample_that_misleads_costs_time_not_exactness(tier):
    # Whole stretches of 16 alike, large only where no aligned line begins: whatever the sample saw, the count decides.
    w = torch.arange(200_000, dtype=torch.float32)
    w[torch.arange(200_000) % 16 < 8] *= -1e-30
    for k in (1, 99_999, 100_000, 100_001, 150_000, 200_000):
        assert torch.equal(selection.kth_magnitude([w], k), reference.kth_magnitude([w], k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_an_error_wherever_it_hides(tier, dtype):
    for n, where in ((5, 4), (9000, 0), (200_000, 123_457), (200_000, 199_999)):
        for bad in (math.nan, -math.nan):
            w = torch.randn(n).to(dtype)
            w[where] = bad
            for call in (
                lambda w: selection.kth_magnitude([w], 1),
                lambda w: selection.topk_mask([w], w.numel()),
                lambda w: selection.topk_mask([w], 0),
                lambda w: selection.cut_mask([w], torch.zeros((), dtype=w.dtype), 3, False),
                lambda w: selection.nm_mask(w, 1, w.numel() if w.numel() < 6 else 5),
            ):
                with pytest.raises(ValueError, match="NaN"):
                    call(w if n % 5 == 0 else torch.cat([w, w[: 5 - n % 5]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [False, True])
def test_histograms_and_cut_masks(tier, dtype, magnitude):
    pieces = [values((5000,), dtype, "few-valued"), values((333,), dtype, "normal"), values((64,), dtype, "infinite")]
    key = reference.sortable_key(pieces[0][:1], magnitude)
    for level, (shift, width) in enumerate(reference.RADIX_DIGITS):
        prefix = int(key) >> (shift + width) if level else 0
        got = selection.radix_histogram(pieces, prefix, level, magnitude)
        assert torch.equal(got, reference.radix_histogram(pieces, prefix, level, magnitude))
    pieces.append(torch.tensor([math.nan, 1, math.nan], dtype=dtype))
    assert selection.radix_histogram(pieces, 0, 0, magnitude)[-1] == 2
    del pieces[-1]
    for level in (2.0, 0.0, -1.0, math.inf):
        threshold = torch.tensor(level, dtype=dtype)
        for ties in (0, 1, 700, 10**6):
            got = selection.cut_mask(pieces, threshold, ties, magnitude)
            expected = reference.cut_mask(pieces, threshold, ties, magnitude)
            assert all(torch.equal(a, b) for a, b in zip(got, expected)), (level, ties)


@pytest.mark.parametrize("n,m", [(1, 1), (1, 2), (2, 4), (4, 8), (3, 7), (16, 32), (1, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nm_mask(tier, n, m, dtype):
    for rows in (1, 3, 17):
        for kind in ("normal", "few-valued", "zeros of both signs"):
            scores = values((rows, m * 5), dtype, kind)
            got = selection.nm_mask(scores, n, m)
            assert torch.equal(got, reference.nm_mask(scores, n, m))
            assert (got.reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("r,c", [(1, 1), (4, 1), (16, 1), (1, 7), (8, 14), (32, 2100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_scores(tier, r, c, dtype, close):
    scores = values((32, 2100), dtype, "normal")
    close(selection.block_scores(scores, r, c), reference.block_scores(scores, r, c))


def test_strided_tensors_are_read_in_logical_order(tier):
    w = torch.randn(50, 60).t()
    assert torch.equal(selection.topk_mask([w], 700)[0], reference.topk_mask([w], 700)[0])


def test_the_native_kernels_are_the_ones_that_run():
    if _native.C is None:
        pytest.skip("no compiled core")
    from sparseprune import backends

    w = torch.randn(10)
    for op, arguments in {"kth_magnitude": ([w], 3), "topk_mask": ([w], 3), "cut_mask": ([w], w[0], 1, True)}.items():
        assert backends.choose(op, *arguments).backend == "native"
