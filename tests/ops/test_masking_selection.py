"""The public selection and masking ops: checks, schemas, autograd, compile, and processes that sum histograms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.library import opcheck

from sparseprune import ops

T = torch.ops.sparseprune


def test_tensor_in_tensor_out_and_list_in_list_out():
    w = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert ops.kth_magnitude(w, 2).item() == 3
    assert ops.kth_magnitude([w, torch.tensor([9.0])], 1).item() == 9
    assert ops.topk_mask(w, 1).tolist() == [[True, False], [False, False]]
    assert ops.magnitude_mask(w, 1).tolist() == [[False, True], [False, False]]
    first, second = ops.topk_mask([torch.ones(2), torch.ones(3)], 3)
    assert first.tolist() == [True, True] and second.tolist() == [True, False, False]
    assert ops.topk_mask([], 0) == []


def test_errors_say_expected_and_got():
    w = torch.ones(4, 6)
    for call, message in (
        (lambda: ops.kth_magnitude(w, 0), r"k expected in \[1, 24\]"),
        (lambda: ops.kth_magnitude(w, 25), "got 25"),
        (lambda: ops.topk_mask(w, -1), r"\[0, 24\]"),
        (lambda: ops.topk_mask([w, w.double()], 1), "one dtype"),
        (lambda: ops.topk_mask(torch.ones(3, dtype=torch.int64), 1), "floating"),
        (lambda: ops.topk_mask(torch.tensor([float("nan")]), 1), "NaN"),
        (lambda: ops.cut_mask(w, torch.ones(2), 1), "0-dim"),
        (lambda: ops.nm_mask(w, 2, 4), "m=4 must divide"),
        (lambda: ops.nm_mask(w, 5, 2), "n expected"),
        (lambda: ops.block_scores(w, (3, 2)), "must divide"),
        (lambda: ops.apply_mask_(w, torch.ones(4, 6)), "torch.bool"),
        (lambda: ops.apply_mask_(w, torch.ones(6, 4, dtype=torch.bool)), "shape"),
        (lambda: ops.mask_gradient_(w, w[:2], w > 0), "w expected shape"),
        (lambda: ops.masked_adamw_(w, w, w, w, None, 0), "step"),
        (lambda: ops.threshold_mask(w, torch.ones(3)), "0-dim"),
        (lambda: ops.RadixSelect(0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_opcheck():
    w, mask = torch.randn(12, 8), torch.rand(12, 8) < 0.5
    for op, arguments in (
        (T.kth_magnitude, ([w, w[0]], 3)),
        (T.topk_mask, ([w, w[0]], 30)),
        (T.magnitude_mask, ([w], 30)),
        (T.cut_mask, ([w, w[1]], w[0, 0].clone(), 1, True)),
        (T.radix_histogram, ([w], 0, 0, False)),
        (T.nm_mask, (w, 2, 4)),
        (T.block_scores, (w, 4, 2)),
        (T.apply_mask_, (w.clone(), mask)),
        (T.masked_copy, (w, mask)),
        (T.threshold_mask, (w, torch.tensor(0.3))),
        (T.mask_gradient_, (w.clone(), w, mask, torch.zeros(12, 8))),
        (T.mask_gradient_, (w.clone(), w, mask, None)),
        (T.masked_adamw_, (w.clone(), w, w * 0, w * 0, mask, 3, 1e-3, 0.9, 0.99, 1e-8, 0.01)),
    ):
        opcheck(op, arguments)


def test_a_mutated_saved_tensor_makes_backward_raise():
    mask = torch.ones(5, dtype=torch.bool)
    for write in (
        lambda x: ops.apply_mask_(x, mask),
        lambda x: ops.masked_adamw_(x, x.detach().clone(), torch.zeros(5), torch.zeros(5), None, 1),
        lambda x: ops.mask_gradient_(x, x.detach().clone(), mask),
        lambda x: ops.mask_gradient_(torch.zeros(5), torch.zeros(5), mask, x),
    ):
        x = torch.randn(5, requires_grad=True)
        y = (x * x).sum()
        write(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_nothing_else_is_changed_and_no_gradient_flows():
    w = torch.randn(30, requires_grad=True)
    before = w.detach().clone()
    mask = ops.magnitude_mask(w, 10)
    masked = ops.masked_copy(w, mask)
    assert not masked.requires_grad and torch.equal(w.detach(), before)
    assert ops.apply_mask_(w, mask) is w and int((w != 0).sum()) == 10


def test_compile_fullgraph():
    def prune(w, other):
        masks = ops.magnitude_mask([w, other], 25)
        ops.apply_mask_(w, masks[0])
        return w * 2, ops.kth_magnitude(other, 2)

    w, other = torch.randn(6, 7), torch.randn(9)
    expected = prune(w.clone(), other)
    got = torch.compile(prune, backend="aot_eager", fullgraph=True)(w.clone(), other)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_strided_weights():
    w, mask = torch.randn(8, 6).t(), torch.rand(6, 8) < 0.5
    expected = w * mask
    ops.apply_mask_(w, mask)
    assert torch.equal(w, expected)


def summed(parts, k, magnitude, dtype):
    """Runs one RadixSelect a part in lockstep; what `reduce` would sum is summed here."""
    selects = [ops.RadixSelect(k, dtype, magnitude) for _ in parts]
    while not selects[0].done:
        counts = sum(s.histogram(p) for s, p in zip(selects, parts))
        for s in selects:
            s.update(counts)
    masks, before = [], 0
    for s, part in zip(selects, parts):
        masks.append(ops.cut_mask(part, s.threshold, s.own_ties(before), magnitude))
        before += s.own_equal
    assert before == selects[0].equal
    return selects[0], masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("magnitude", [False, True])
def test_summed_histograms_equal_one_process(dtype, magnitude):
    w = (torch.randn(3000, generator=torch.Generator().manual_seed(5)) * 4).round().to(dtype) / 4
    parts = [[w[:100], w[100:1300].reshape(30, 40)], [w[1300:1300]], [w[1300:]]]
    for k in (1, 7, 300, 1500, 3000):
        select, masks = summed(parts, k, magnitude, dtype)
        whole = ops.magnitude_mask(w, k) if magnitude else ops.topk_mask(w, k)
        got = torch.cat([m.reshape(-1) for part in masks for m in part])
        assert torch.equal(got, whole) and int(got.sum()) == k
        if magnitude:
            assert torch.equal(select.threshold, ops.kth_magnitude(w, k))


def test_radix_select_errors_and_run():
    w = torch.randn(50)
    select = ops.RadixSelect(20)
    with pytest.raises(RuntimeError, match="rounds"):
        _ = select.threshold
    assert torch.equal(select.run([w], lambda counts: counts, 0, 1)[0], ops.topk_mask(w, 20))
    with pytest.raises(ValueError, match="NaN"):
        ops.RadixSelect(1).run([torch.tensor([float("nan")])], lambda counts: counts, 0, 1)
    with pytest.raises(ValueError, match="number of entries"):
        ops.RadixSelect(51).run([w], lambda counts: counts, 0, 1)
    assert copy.deepcopy(select).above == select.above


@pytest.mark.parametrize("name", ["reference", "native"])
def test_a_backend_can_be_forced(monkeypatch, name):
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", name)
    assert int(ops.topk_mask(torch.randn(100), 40).sum()) == 40


def test_float64_runs_on_the_reference():
    w = torch.randn(40, dtype=torch.float64)
    assert ops.kth_magnitude(w, 3).dtype == torch.float64
    assert int(ops.nm_mask(w, 1, 4).sum()) == 10


def test_a_threshold_that_is_a_number_is_rounded_to_the_dtype_of_w_alone():
    w = torch.tensor([0.1], dtype=torch.float64)
    mask, kept, count = ops.threshold_mask(w, 0.1)
    assert mask.tolist() == [True] and torch.equal(kept, w) and int(count) == 1
    assert ops.threshold_mask(w.half(), 0.1)[0].tolist() == [True]
