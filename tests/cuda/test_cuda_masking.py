"""Masking through the CUDA kernels against the reference: sizes around a run of 16 bytes, aligned and not."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_tensors import DTYPES, amid_nan

from sparseprune import reference
from sparseprune.cuda import masking

SIZES = [1, 15, 16, 300, 4099]
LEADS = [64, 1]  # elements before the tensor: 16-byte aligned, and not


def made(n, dtype, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(n, device, lead):
    room = torch.ones(lead + n + 64, dtype=torch.bool, device=device)
    view = room[lead : lead + n]
    view.copy_(torch.rand(n, generator=torch.Generator().manual_seed(9)) < 0.4)
    return view, room


def untouched(view, room, lead):
    """What lies around the view is as it was made: NaN, or True for a mask."""
    around = torch.cat([room[:lead], room[lead + view.numel() :]])
    return bool(around.all() if around.dtype == torch.bool else around.isnan().all())


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8], ids=str)
def test_apply_mask_and_masked_copy(device, dtype, n, lead):
    w = (made(n, torch.float32, 1) * 50).abs().to(dtype)
    mask, _ = mask_of(n, device, lead)
    expected = reference.masked_copy(w, mask.cpu())
    if dtype.is_floating_point:
        w = amid_nan(w, device, lead)
        room = w._base
    else:
        w = w.to(device)
    assert torch.equal(masking.masked_copy(w, mask).cpu(), expected)
    masking.apply_mask_(w, mask)
    assert torch.equal(w.cpu(), expected)
    if dtype.is_floating_point:
        assert untouched(w, room, lead)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_mask(device, dtype, n, lead):
    w = made(n, dtype, 1)
    w[:: max(1, n // 7)] = 0.5
    w[-1] = -math.inf
    cut = torch.tensor(0.5, dtype=dtype)
    got = masking.threshold_mask(amid_nan(w, device, lead), cut.to(device))
    for mine, expected in zip(got, reference.threshold_mask(w, cut)):
        assert torch.equal(mine.cpu(), expected)
    w[n // 2] = math.nan
    with pytest.raises(ValueError, match="1 NaN"):
        masking.threshold_mask(w.to(device), cut.to(device))


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_gradient(device, close, dtype, scores, lead):
    for n in SIZES:
        grad, w, total = made(n, dtype, 1), made(n, dtype, 2), made(n, torch.float32, 3) if scores else None
        mask, _ = mask_of(n, device, lead)
        mine, into = amid_nan(grad, device, lead), None if total is None else amid_nan(total, device, lead)
        masking.mask_gradient_(mine, amid_nan(w, device, lead), mask, into)
        reference.mask_gradient_(grad, w, mask.cpu(), total)
        assert torch.equal(mine.cpu(), grad) and untouched(mine, mine._base, lead)
        if total is not None:
            close(into.cpu(), total)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_adamw(device, close, dtype, masked, lead):
    for n in SIZES:
        p, grad = made(n, dtype, 1), made(n, dtype, 2)
        first, second = made(n, torch.float32, 3), made(n, torch.float32, 4).abs()
        mask = mask_of(n, device, lead)[0] if masked else None
        mine = [amid_nan(t, device, lead) for t in (p, grad, first, second)]
        settings = 3, 1e-2, 0.9, 0.99, 1e-8, 0.1
        masking.masked_adamw_(*mine, mask, *settings)
        reference.masked_adamw_(p, grad, first, second, None if mask is None else mask.cpu(), *settings)
        for got, expected in zip(mine, (p, grad, first, second)):
            close(got.cpu(), expected)
            assert untouched(got, got._base, lead)
        if mask is not None:
            assert not any(t[~mask].any() for t in (mine[0], mine[2], mine[3]))


def test_nothing_to_mask(device):
    empty, mask = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.bool, device=device)
    masking.apply_mask_(empty, mask)
    assert masking.masked_copy(empty, mask).numel() == 0
    assert int(masking.threshold_mask(empty, torch.ones((), device=device))[2]) == 0
