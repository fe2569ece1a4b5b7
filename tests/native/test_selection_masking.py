"""Masking and the masked AdamW step in the compiled core, every tier, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from sparseprune import reference
from sparseprune.native import masking
from sparseprune.native._inputs import DTYPE_CODES

DTYPES = tuple(DTYPE_CODES)
SIZES = (0, 1, 7, 8, 16, 63, 1000, 70_001)


def case(n, dtype, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator).to(dtype)
    mask = torch.rand(n, generator=generator) < density
    if n > 10:
        w[:6] = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1e-7, -3e38], dtype=dtype)
    return w, mask


def same_bits(a, b):
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_and_copy(tier, dtype):
    for n in SIZES:
        w, mask = case(n, dtype)
        if n > 20:
            w[12], w[13] = math.nan, math.nan
            mask[12], mask[13] = False, True
        ours, truth = w.clone(), w.clone()
        masking.apply_mask_(ours, mask)
        reference.apply_mask_(truth, mask)
        assert same_bits(ours, truth)
        assert same_bits(masking.masked_copy(w, mask), truth)
        assert same_bits(masking.masked_copy(w[1:], mask[1:]), truth[1:])


def test_large_copies_go_past_the_cache(tier):
    w, mask = case(7 * 2**20 + 3, torch.float32)
    assert same_bits(masking.masked_copy(w, mask), reference.masked_copy(w, mask))
    got = masking.threshold_mask(w, torch.tensor(1.0))
    expected = reference.threshold_mask(w, torch.tensor(1.0))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_mask(tier, dtype):
    for n in SIZES:
        w, _ = case(n, dtype)
        for level in (0.0, 0.5, math.inf):
            threshold = torch.tensor(level, dtype=dtype)
            got, expected = masking.threshold_mask(w, threshold), reference.threshold_mask(w, threshold)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            assert torch.equal(got[2], expected[2])
            assert got[2] == got[0].sum()
    for where in (3, 999):
        w = torch.ones(1000, dtype=dtype)
        w[where] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            masking.threshold_mask(w, torch.tensor(0.5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scored", [False, True])
def test_mask_gradient(tier, dtype, scored, close):
    for n in SIZES:
        generator = torch.Generator().manual_seed(n)
        grad, w = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
        mask = torch.rand(n, generator=generator) < 0.2
        score = torch.randn(n, generator=generator) if scored else None
        got, got_score = grad.clone(), None if score is None else score.clone()
        masking.mask_gradient_(got, w, mask, got_score)
        truth = grad.clone()
        reference.mask_gradient_(truth, w, mask, score)
        assert same_bits(got, truth)
        if score is not None:
            close(got_score, score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_masked_adamw(tier, dtype, masked, close):
    for n in SIZES:
        p, mask = case(n, dtype, seed=1)
        p.nan_to_num_(0.5, 0.5, 0.5)
        states = [(p.clone(), torch.zeros(n), torch.zeros(n)) for _ in range(2)]
        for step in range(1, 5):
            grad = torch.randn(n, generator=torch.Generator().manual_seed(step)).to(dtype)
            if masked and n > 20:
                grad[~mask] = math.nan
            for (weight, m, v), run in zip(states, (masking.masked_adamw_, reference.masked_adamw_)):
                run(weight, grad, m, v, mask if masked else None, step, 1e-2, 0.9, 0.999, 1e-8, 0.1)
        for got, expected in zip(*states):
            close(got, expected)
            if masked:
                assert not got[~mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_sixteen_bit_value_survives_widening_and_narrowing(tier, dtype):
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    every = torch.where(every.isnan(), torch.zeros_like(every), every)
    got = every.clone()
    everything = torch.ones(every.shape, dtype=torch.bool)
    masking.mask_gradient_(got, every, everything, None)
    assert same_bits(got, every)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_rounds_to_the_nearest_even(tier, dtype):
    generator = torch.Generator().manual_seed(0)
    target = torch.cat([torch.randn(4000, generator=generator) * 10.0**e for e in range(-8, 6)])
    # decay 1, gradient 0: p' = p - rate * m / (0 * scale + 1) with m set beforehand: an exact float32 value is stored.
    p = torch.zeros(target.numel(), dtype=dtype)
    m, v = -target / 0.5, torch.zeros_like(target)
    masking.masked_adamw_(p, torch.zeros_like(p), m, v, None, 1, 0.5, 0.5, 0.999, 1.0, 0.0)
    assert same_bits(p, (0.5 / (1 - 0.5) * target).to(dtype))
