"""The layer solvers against brute force and least squares on small matrices."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseprune.pruning.granularity import NM, Block, Element, InWeight
from sparseprune.pruning.oneshot import admm as admm_module
from sparseprune.pruning.oneshot import choosing as choosing_module
from sparseprune.pruning.oneshot.admm import _transpose_, admm_, loss_change, on_the_mask_
from sparseprune.pruning.oneshot.choosing import choose, choose_sliced, row_slices, select_rows, spread
from sparseprune.pruning.oneshot.solvers import wanda_scores
from sparseprune.pruning.oneshot.sparsegpt import damp_, factor_, inverse_factor, sparsegpt_
from sparseprune.pruning.oneshot.store import SpilledMatrix


def problem(rows: int, columns: int, samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(samples, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x / samples


Solved = list[tuple[Tensor, Tensor]]


def sparsegpt(weights: list[Tensor], hessian: Tensor, keeps: list[int], pattern: InWeight, **options: Any) -> Solved:
    """(weights, mask) of copies pruned in place."""
    pruned = [weight.clone() for weight in weights]
    return list(zip(pruned, sparsegpt_(pruned, hessian.clone, keeps, pattern, **options)))


def admm(weights: list[Tensor], hessian: Tensor, keeps: list[int], pattern: InWeight, **options: Any) -> Solved:
    pruned = [weight.clone() for weight in weights]
    return list(zip(pruned, admm_(pruned, hessian.clone, keeps, pattern, **options)))


def damped(hessian: Tensor, damping: float) -> Tensor:
    return damp_(hessian.clone(), damping)


def loss(pruned: Tensor, weight: Tensor, hessian: Tensor) -> float:
    d = (pruned - weight).double()
    return float(((d @ hessian.double()) * d).sum())


def least_squares(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Row by row, the best values on the mask: H_ss v = (H w)_s in float64."""
    h, out = hessian.double(), torch.zeros_like(weight, dtype=torch.float64)
    for i, (row, kept) in enumerate(zip(weight.double(), mask)):
        if kept.any():
            out[i, kept] = torch.linalg.solve(h[kept][:, kept], (h @ row)[kept])
    return out


def test_spread_is_exact_and_even() -> None:
    assert spread(7, 3) == [3, 2, 2]
    assert sum(spread(11, 4)) == 11


def test_rows_keep_their_largest_and_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert select_rows(scores, [2, 1]).tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize("pattern", [Element(), Block(2, 3), NM(1, 3)])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_choose_counts_whole_units(pattern: InWeight, scope: str) -> None:
    scores = torch.rand(8, 9)
    keep = 5 if isinstance(pattern, Block) else 24
    mask = choose(scores, pattern, keep, scope)
    assert int(mask.sum()) == keep * math.prod(pattern.blocksize)
    if isinstance(pattern, Block):
        whole = mask.view(4, 2, 3, 3).permute(0, 2, 1, 3).flatten(2)
        assert bool((whole.all(-1) | ~whole.any(-1)).all())
    if isinstance(pattern, NM):
        assert bool((mask.view(8, 3, 3).sum(-1) == 1).all())


def test_wanda_scores_are_the_change_of_each_output() -> None:
    weight, x = torch.randn(3, 5), torch.randn(40, 5)
    scores = wanda_scores(weight, x.square().mean(0))
    for i, j in itertools.product(range(3), range(5)):
        without = weight.clone()
        without[i, j] = 0
        change = ((x @ weight.T - x @ without.T)[:, i]).square().mean().sqrt()
        torch.testing.assert_close(scores[i, j], change)


def test_one_column_sweep_is_least_squares_given_the_mask() -> None:
    """Removing the columns of a prefix leaves all kept ones free: there the sweep must be exact."""
    weight, hessian = problem(4, 6)
    order = torch.tensor([1e-4, 2e-4, 3e-4, 50.0, 60.0, 70.0])
    weight = weight.sign() * order  # the first three columns go in every row
    ((pruned, mask),) = sparsegpt([weight], hessian, [12], Element(), damping=1e-7, blocksize=6)
    assert mask.tolist() == [[False] * 3 + [True] * 3] * 4
    exact = least_squares(weight, hessian, mask)
    torch.testing.assert_close(pruned.double(), exact, rtol=1e-3, atol=1e-4)


def test_sweep_matches_the_textbook_loop() -> None:
    """Element pruning against removing one column at a time with a freshly inverted Hessian of the columns to the
    right.
    """
    weight, hessian = problem(5, 12, seed=3)
    damp = damped(hessian, 0.01)
    ((pruned, mask),) = sparsegpt([weight], hessian, [30], Element(), damping=0.01, blocksize=4)
    expected = weight.double().clone()
    for j in range(12):
        inverse = torch.linalg.inv(damp[j:, j:].double())
        gone = torch.where(mask[:, j], 0.0, expected[:, j]) / inverse[0, 0]
        expected[:, j:] -= gone[:, None] * inverse[0]
    torch.testing.assert_close(pruned.double(), expected.masked_fill(~mask, 0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [Element(), Block(2, 2), NM(2, 4)])
def test_sweep_counts_are_exact_and_it_beats_zeroing(pattern: InWeight) -> None:
    weight, hessian = problem(8, 24)
    keep = 24 if isinstance(pattern, Block) else 96
    ((pruned, mask),) = sparsegpt([weight], hessian, [keep], pattern, blocksize=10)
    assert int(mask.sum()) == 96
    assert bool((pruned[~mask] == 0).all())
    assert loss(pruned, weight, hessian) < loss(weight * mask, weight, hessian)


@pytest.mark.parametrize("solve", [sparsegpt, admm])
@pytest.mark.parametrize(
    ("rows", "columns", "pattern"),
    [(7, 13, Element()), (7, 40, Element()), (6, 39, Block(2, 3)), (5, 26, Block(1, 2)), (1, 13, Element())], ids=str,
)
@pytest.mark.parametrize("share", [0.04, 0.5, 0.9, 1.0])
def test_rows_keep_the_same_count_over_all_blocks_of_columns(
    rows: int, columns: int, pattern: InWeight, share: float, solve: Any
) -> None:
    """Or one more, the earlier ones, where the count does not go round: not one more in each block of columns."""
    weight, hessian = problem(rows, columns)
    r, c = pattern.blocksize
    keep = round(share * (rows // r) * (columns // c))
    ((pruned, mask),) = solve([weight], hessian, [keep], pattern, scope="row", blocksize=6)
    kept = mask.view(rows // r, r, columns // c, c)[:, 0, :, 0].sum(1)
    assert kept.tolist() == spread(keep, rows // r) and int(mask.sum()) == keep * r * c
    assert bool((pruned[~mask] == 0).all())


def test_few_kept_in_each_row_are_spread_over_the_columns() -> None:
    """One in each row: not all of them in the last block of columns, which is where the share first comes to one."""
    weight, hessian = problem(8, 32)
    ((_, mask),) = sparsegpt([weight], hessian, [8], Element(), scope="row", blocksize=8)
    assert mask.view(8, 4, 8).sum((0, 2)).tolist() == [2, 2, 2, 2]


def test_layers_of_one_input_are_solved_as_if_alone() -> None:
    first, hessian = problem(4, 16)
    second = torch.randn(6, 16)
    together = sparsegpt([first, second], hessian, [20, 60], Element())
    for weight, keep, (pruned, mask) in zip((first, second), (20, 60), together):
        ((alone, alone_mask),) = sparsegpt([weight], hessian, [keep], Element())
        assert torch.equal(mask, alone_mask)
        torch.testing.assert_close(pruned, alone)


def test_dead_inputs_and_rank_deficient_hessians() -> None:
    weight, hessian = problem(4, 8, samples=3)
    hessian[2] = hessian[:, 2] = 0
    ((pruned, mask),) = sparsegpt([weight], hessian, [16], Element())
    assert bool(torch.isfinite(pruned).all()) and int(mask.sum()) == 16
    upper = inverse_factor(hessian.clone, 0.01)
    torch.testing.assert_close(upper.T @ upper @ damped(hessian, 0.01), torch.eye(8), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("solve", [sparsegpt, admm])
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize(
    ("pattern", "keep"), [(Element(), 64), (Element(), 100), (Block(2, 2), 16), (NM(2, 4), 0)], ids=str
)
def test_weights_of_dead_inputs_go_first_and_those_that_stay_keep_their_values(
    pattern: InWeight, keep: int, scope: str, solve: Any, scale: float
) -> None:
    """Half of the inputs are always zero, the others have any scale. 100 of 128 weights: all that live, and some of the
    rest; of a whole layer admm compares them all at once.
    """
    weight, hessian = problem(8, 16)
    dead = torch.arange(16) % 4 < 2
    hessian[dead] = hessian[:, dead] = 0
    hessian *= scale / hessian.diagonal().mean()
    ((pruned, mask),) = solve([weight], hessian, [keep], pattern, scope=scope)
    assert int(mask.sum()) == (64 if isinstance(pattern, NM) else keep * math.prod(pattern.blocksize))
    assert bool(mask[:, ~dead].all())
    torch.testing.assert_close(pruned, weight * mask, rtol=1e-3, atol=2e-4)
    if solve is admm and scope == "layer" and keep == 100:
        kept, rest = mask[:, dead], weight[:, dead].abs()
        assert rest[kept].min() > rest[~kept].max()


@pytest.mark.parametrize("chunk", [2**18, 20])
def test_conjugate_gradients_reach_least_squares_on_the_mask(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admm_module, "POLISHED", chunk)  # two rows at a time: their number does not divide five
    weight, hessian = problem(5, 10, seed=2)
    mask = torch.rand(5, 10) < 0.5
    mask[3] = False
    start = weight * mask
    pull = SpilledMatrix.of(weight @ hessian, None)
    got = on_the_mask_(start.clone(), pull, hessian, mask, iterations=40)
    torch.testing.assert_close(got.double(), least_squares(weight, hessian, mask), rtol=1e-2, atol=1e-3)
    change = loss_change(got, SpilledMatrix.of(start, None), pull, hessian)
    assert change == pytest.approx(loss(got, weight, hessian) - loss(start, weight, hessian), rel=1e-4)


def test_a_factor_in_place_is_the_factor_and_says_when_there_is_none() -> None:
    hessian = damped(problem(1, 9)[1], 0.01)
    for layout in (hessian.clone(), hessian.clone().t()):
        for upper in (False, True):
            factor = layout.clone(memory_format=torch.preserve_format)
            assert factor.stride() == layout.stride() and factor_(factor, upper=upper)
            expected = torch.linalg.cholesky(hessian, upper=upper)
            torch.testing.assert_close(factor, expected)
    assert not factor_(-hessian)


def test_layer_that_admm_does_not_improve_keeps_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(8, 24)
    second = torch.randn(4, 24)
    arguments = ([weight, second], hessian, [96, 36], Element())
    swept = sparsegpt(*arguments)
    change = iter((1.0, -1.0))
    monkeypatch.setattr(admm_module, "loss_change", lambda *_: next(change))
    solved = admm(*arguments)
    assert torch.equal(solved[0][1], swept[0][1]) and not torch.equal(solved[1][1], swept[1][1])
    torch.testing.assert_close(solved[0][0], swept[0][0])


@pytest.mark.parametrize("pattern", [Element(), Block(2, 2), NM(2, 4)])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_admm_counts_are_exact_and_it_beats_the_sweep(pattern: InWeight, scope: str, tmp_path: Path) -> None:
    weight, hessian = problem(8, 24)
    second = torch.randn(4, 24)
    keeps = [24, 9] if isinstance(pattern, Block) else [96, 36]
    arguments = ([weight, second], hessian, keeps, pattern)
    swept = sparsegpt(*arguments, scope=scope)
    solved = admm(*arguments, scope=scope)
    again = admm(*arguments, scope=scope, spill=tmp_path)
    assert all(torch.equal(a, b) for one, other in zip(solved, again) for a, b in zip(one, other))
    assert not list(tmp_path.iterdir())
    damp = damped(hessian, 0.01)
    for original, (old, _), (new, mask), keep in zip((weight, second), swept, solved, keeps):
        expected = original.numel() // 2 if isinstance(pattern, NM) else keep * math.prod(pattern.blocksize)
        assert int(mask.sum()) == expected
        assert bool((new[~mask] == 0).all())
        assert loss(new, original, damp) <= loss(old, original, damp) * (1 + 1e-5)
    assert loss(solved[0][0], weight, damp) < 0.95 * loss(swept[0][0], weight, damp)


def test_admm_comes_close_to_the_best_of_all_masks() -> None:
    ratios = []
    for seed in range(6):
        weight, hessian = problem(1, 8, seed=seed)
        damp = damped(hessian, 0.01)
        ((got, _),) = admm([weight], hessian, [4], Element(), polish=20)
        best = min(
            loss(least_squares(weight, damp, mask), weight, damp)
            for kept in itertools.combinations(range(8), 4)
            for mask in [torch.zeros(1, 8, dtype=torch.bool).index_fill_(1, torch.tensor(kept), True)]
        )
        ratios.append(loss(got, weight, damp) / best)
    assert min(ratios) > 0.999
    assert sorted(ratios)[3] < 1.3


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize(
    ("pattern", "shape", "keep"),
    [
        (Element(), (37, 23), 301),
        (Block(5, 3), (35, 21), 17),
        (NM(1, 3), (37, 21), 0),
    ],
    ids=str,
)
def test_slices_of_rows_choose_and_solve_as_the_whole(
    pattern: InWeight, shape: tuple[int, int], keep: int, scope: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Odd shapes, in slices whose rows divide nothing, with and without files, against one slice."""
    weight, hessian = problem(*shape)
    magnitude = weight.abs().mul_(4).round_()  # with ties
    expected = choose(magnitude, pattern, keep, scope)
    whole = admm([weight], hessian, [keep], pattern, scope=scope)
    swept = sparsegpt([weight], hessian, [keep], pattern, scope=scope)
    for numbers in (1, 7 * shape[1], 2**20):
        monkeypatch.setattr(choosing_module, "SLICE", numbers)
        monkeypatch.setattr(admm_module, "SLICE", numbers)
        monkeypatch.setattr(admm_module, "POLISHED", numbers)
        assert torch.equal(choose_sliced(lambda rows: magnitude[rows], weight, pattern, keep, scope), expected)
        for folder in (None, tmp_path):
            ((got, mask),) = admm([weight], hessian, [keep], pattern, scope=scope, spill=folder)
            assert torch.equal(mask, whole[0][1])
            torch.testing.assert_close(got, whole[0][0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole[0][1], swept[0][1])


@pytest.mark.parametrize("solve", [sparsegpt, admm])
def test_weights_of_any_dtype_and_layout_are_solved_in_float32(solve: Any) -> None:
    weight, hessian = problem(9, 14)
    weight = weight.bfloat16()
    ((expected, mask),) = solve([weight.float()], hessian, [60], Element())
    for given in (weight, weight.t().contiguous().t()):
        ((got, found),) = solve([given], hessian, [60], Element())
        assert got.dtype == torch.bfloat16 and got.stride() == given.stride()
        assert torch.equal(found, mask) and torch.equal(got, expected.bfloat16())
    turned = weight.float().t().contiguous().t()
    ((got, found),) = solve([turned], hessian, [60], Element())
    assert torch.equal(found, mask) and torch.equal(got, expected)


def test_a_hessian_is_fetched_again_for_more_damping() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    hessian[0, 1] = hessian[1, 0] = 1.04  # not positive definite with damping 0.01
    fetched: list[Tensor] = []

    def fetch() -> Tensor:
        fetched.append(hessian.clone())
        return fetched[-1]

    upper = inverse_factor(fetch, 0.01)
    assert len(fetched) == 2
    torch.testing.assert_close(upper.T @ upper @ damped(hessian, 0.1), torch.eye(4), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"damping 1\.0"):
        inverse_factor(lambda: 500 * torch.ones(2, 2) - 400 * torch.eye(2), 0.01)


def test_a_square_is_transposed_in_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admm_module, "TILE", 4)
    matrix = torch.arange(121.0).view(11, 11)
    expected, place = matrix.t().clone(), matrix.data_ptr()
    assert torch.equal(_transpose_(matrix), expected) and matrix.data_ptr() == place


def test_rows_are_covered_once_in_whole_units() -> None:
    for rows, columns, numbers, whole in ((1536, 576, 2**19, 1), (37, 8, 64, 5), (0, 4, 8, 1), (3, 1000, 10, 2)):
        slices = list(row_slices((rows, columns), numbers, whole))
        assert [i for part in slices for i in range(rows)[part]] == list(range(rows))
        assert all((part.stop - part.start) % whole == 0 for part in slices[:-1])
    assert [part.stop for part in row_slices((1536, 576), 2**19)] == [896, 1536]


@pytest.mark.parametrize("spilled", [False, True])
def test_rows_of_a_matrix_come_back(spilled: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" if spilled else None
    values = torch.randn(7, 3)
    matrix = SpilledMatrix.of(values.clone(), folder)
    got = matrix[2:5]
    assert torch.equal(got, values[2:5])
    got.zero_()  # a copy
    assert torch.equal(matrix[:], values)
    matrix[5:7] = values[:2]
    matrix.opened().add_(1)
    assert torch.equal(matrix[:], torch.cat([values[:5], values[:2]]) + 1)
    if folder is not None:
        assert not list(folder.iterdir())
        assert matrix._file is not None
        matrix._file.truncate(40)
        with pytest.raises(OSError, match=r"rows 2 to 7 .* expected 60 bytes, got 16"):
            matrix[2:7]
    matrix.close()
