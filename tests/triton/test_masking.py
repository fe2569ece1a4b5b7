"""Element-wise Triton kernels against the reference, in buffers with NaN around them."""

from __future__ import annotations

import pytest
import torch

from sparseprune import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1,), (7, 293), (2, 16, 64)]


def _values(shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _mask(shape, device, seed=9):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.6).to(device)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_mask_and_masked_copy(device, guards, dtype, shape):
    mask = guards.around(_mask(shape, device))
    w = _values(shape, dtype, device)
    w[~mask] = float("nan")  # what is pruned may hold anything
    w, expected = guards.around(w), reference.masked_copy(w, mask)
    copy = ops.masked_copy(w, mask)
    assert torch.equal(copy, expected)
    assert ops.apply_mask_(w, mask) is w
    assert torch.equal(w, expected)


def test_the_kernels_are_interpreted_or_compiled_as_the_test_says(device):
    pytest.importorskip("triton")
    from sparseprune.triton.kernels import masking

    assert type(masking.apply_mask_kernel).__name__ == ("InterpretedFunction" if device == "cpu" else "JITFunction")


def test_mask_of_nothing(device):
    empty = torch.zeros(0, 5, device=device)
    assert ops.apply_mask_(empty, empty.bool()).shape == (0, 5)
    assert ops.masked_copy(empty, empty.bool()).shape == (0, 5)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_mask(device, guards, dtype, shape):
    w = _values(shape, dtype, device)
    w.view(-1)[-1] = -float("inf")
    w.view(-1)[0] = 0.5
    threshold = guards.around(torch.tensor(0.5, dtype=dtype, device=device))
    got = ops.threshold_mask(guards.around(w), threshold)
    for one, other in zip(got, reference.threshold_mask(w, threshold)):
        assert torch.equal(one, other)


def test_threshold_mask_rejects_nan(device):
    w = torch.ones(3000, device=device)
    w[2999] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ops.threshold_mask(w, torch.tensor(0.5, device=device))


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_gradient(device, guards, close, dtype, scores):
    shape = (13, 171)
    grad, w, mask = _values(shape, dtype, device), _values(shape, dtype, device, 1), _mask(shape, device)
    score_grad = _values(shape, torch.float32, device, 2) if scores else None
    expected = grad.clone(), None if score_grad is None else score_grad.clone()
    reference.mask_gradient_(expected[0], w, mask, expected[1])
    grad, score_grad = guards.around(grad), None if score_grad is None else guards.around(score_grad)
    ops.mask_gradient_(grad, guards.around(w), guards.around(mask), score_grad)
    assert torch.equal(grad, expected[0])
    if score_grad is not None:
        close(score_grad, expected[1])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_adamw(device, guards, close, dtype, masked):
    shape = (11, 97)
    mask = guards.around(_mask(shape, device)) if masked else None
    p = _values(shape, dtype, device)
    first, second = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    mine = [guards.around(t) for t in (p, first, second)]
    other = [t.clone() for t in (p, first, second)]
    for step in (1, 2, 3):
        grad = guards.around(_values(shape, dtype, device, step))
        numbers = (step, 1e-2, 0.9, 0.95, 1e-8, 0.1)
        ops.masked_adamw_(mine[0], grad, mine[1], mine[2], mask, *numbers)
        reference.masked_adamw_(other[0], grad, other[1], other[2], mask, *numbers)
    for one, expected in zip(mine, other):
        close(one, expected)
        assert mask is None or not one[~mask].any()
