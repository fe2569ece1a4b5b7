"""Selection by Triton kernels: exactly what the reference selects, to the element."""

from __future__ import annotations

import pytest
import torch

from sparseprune import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _list(dtype, device, guards=None):
    """Three tensors with many ties, both zeros, infinities and subnormal numbers; the last is empty."""
    generator = torch.Generator().manual_seed(3)
    big = torch.randn(59, 83, generator=generator)
    big[::3] = big[::3].mul(4).round().div(4)
    small = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-7, -1e-7, 3e-40, 0.25, -0.25])
    tensors = [big.to(device, dtype), small.to(device, dtype), torch.zeros(0, 4, dtype=dtype, device=device)]
    return tensors if guards is None else [guards.around(tensor) for tensor in tensors]


TOTAL = 59 * 83 + 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_kth_magnitude(device, guards, dtype):
    tensors = _list(dtype, device, guards)
    for k in (1, 3, 700, TOTAL - 1, TOTAL):
        assert torch.equal(ops.kth_magnitude(tensors, k), reference.kth_magnitude(tensors, k)), k


@pytest.mark.parametrize("op", ["topk_mask", "magnitude_mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_the_largest(device, guards, dtype, op):
    tensors = _list(dtype, device, guards)
    for k in (0, 1, 700, 2222, TOTAL):
        got = getattr(ops, op)(tensors, k)
        assert sum(int(mask.sum()) for mask in got) == k
        for one, other in zip(got, getattr(reference, op)(tensors, k)):
            assert one.dtype == torch.bool and torch.equal(one, other), k


def test_one_tensor_that_is_not_contiguous(device):
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(device).t()
    assert torch.equal(ops.topk_mask(w, 17), reference.topk_mask([w], 17)[0])


@pytest.mark.parametrize("call", ["kth_magnitude", "topk_mask", "magnitude_mask"])
def test_nan_has_no_rank(device, call):
    w = torch.ones(5000, device=device)
    w[4321] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        getattr(ops, call)([torch.ones(3, device=device), w], 2)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cut_mask(device, guards, dtype, magnitude):
    tensors = _list(dtype, device, guards)
    threshold = guards.around(torch.tensor(0.25, dtype=dtype, device=device))
    for ties in (0, 5, 10_000):
        got = ops.cut_mask(tensors, threshold, ties, magnitude)
        for one, other in zip(got, reference.cut_mask(tensors, threshold, ties, magnitude)):
            assert torch.equal(one, other), ties


def test_cut_mask_rejects_nan(device):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(device)
    threshold = torch.tensor(0.5, device=device)
    ops.cut_mask([x], threshold, 0, False)  # whose last program reaches beyond the end, where nothing counts
    x[4321] = float("nan")
    with pytest.raises(ValueError, match="cut_mask: NaN among the values"):
        ops.cut_mask([x], threshold, 0, False)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_radix_histogram(device, guards, dtype, magnitude):
    tensors = _list(dtype, device, guards)
    tensors[0][5, 5] = float("nan")
    prefix = 0
    for level, (_, width) in enumerate(reference.RADIX_DIGITS):
        got = ops.radix_histogram(tensors, prefix, level, magnitude)
        assert torch.equal(got, reference.radix_histogram(tensors, prefix, level, magnitude)), level
        prefix = (prefix << width) | int(got[:-1].argmax())


@pytest.mark.parametrize("nm", [(1, 2), (2, 4), (3, 8), (4, 16), (1, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nm_mask(device, guards, dtype, nm):
    n, m = nm
    scores = torch.randn(5, 3, 9 * m, generator=torch.Generator().manual_seed(1)).mul(2).round().to(device, dtype)
    assert torch.equal(ops.nm_mask(guards.around(scores), n, m), reference.nm_mask(scores, n, m))


def test_nm_mask_rejects_nan(device):
    scores = torch.ones(3, 8, device=device)
    scores[2, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ops.nm_mask(scores, 2, 4)


@pytest.mark.parametrize("blocksize", [(16, 1), (1, 16), (4, 4), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_scores(device, guards, close, dtype, blocksize):
    rows, cols = blocksize
    scores = torch.rand(3 * rows, 37 * cols, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    got = ops.block_scores(guards.around(scores), blocksize)
    close(got, reference.block_scores(scores, rows, cols))
