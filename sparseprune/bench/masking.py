"""Contests of what writes through masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .contest import Case, Contest, Entry, add_ours_, close_to, generator_of
from .peaks import Work

__all__ = ["build_adamw", "build_mask", "build_threshold"]


def build_mask(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """w[~mask] = 0 in place."""
    del peers
    (n,) = case.shape
    generator = generator_of(case)
    w, mask = torch.randn(n, generator=generator), torch.rand(n, generator=generator) >= case.sparsity
    before, truth = w.clone(), w * mask
    contest = Contest(case, baseline="torch mul_")
    work = Work(0.0, 9.0 * n, update=True)

    def check(run: Callable[[], Any]) -> Callable[[], str | None]:
        def checked() -> str | None:
            w.copy_(before)
            run()
            return None if torch.equal(w, truth) else "another tensor than w * mask"

        return checked

    runs: dict[str, Callable[[], Any]] = {
        "torch mul_": lambda: w.mul_(mask),
        "torch masked_fill_": lambda: w.masked_fill_(~mask, 0.0),
    }
    for name, run in runs.items():
        contest.entries[name] = Entry(run, check(run), work)
    add_ours_(contest, lambda: ops.apply_mask_(w, mask), check, work, allow_reference)
    return contest


def build_threshold(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """threshold -> mask -> masked copy, with the count."""
    del peers
    (n,) = case.shape
    w = torch.randn(n, generator=generator_of(case))
    threshold = w.abs().kthvalue(max(1, round(case.sparsity * n))).values

    def composed() -> tuple[Tensor, Tensor, Tensor]:
        mask = w.abs() >= threshold
        return mask, w * mask, mask.sum()

    truth = composed()
    contest = Contest(case, baseline="torch, three passes")
    work = Work(0.0, 9.0 * n, update=True)

    def check(run: Callable[[], Any]) -> Callable[[], str | None]:
        def checked() -> str | None:
            same = all(torch.equal(got, expected) for got, expected in zip(run(), truth))
            return None if same else "another mask, copy or count"

        return checked

    contest.entries["torch, three passes"] = Entry(composed, check(composed), work)
    add_ours_(contest, lambda: ops.threshold_mask(w, threshold), check, work, allow_reference)
    return contest


def build_adamw(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """One AdamW step that keeps pruned weights at zero: gradient masked, step, weight masked."""
    del peers
    (n,) = case.shape
    generator = generator_of(case)
    mask = torch.rand(n, generator=generator) >= case.sparsity
    start = torch.randn(n, generator=generator) * mask
    grad = torch.randn(n, generator=generator)
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], fused=True, **settings)  # type: ignore[arg-type]
    p, m, v = start.clone(), torch.zeros(n), torch.zeros(n)
    step = [0]

    def dense() -> Tensor:
        parameter.grad = grad * mask
        optimizer.step()
        with torch.no_grad():
            parameter.mul_(mask)
        return parameter

    def ours() -> Tensor:
        step[0] += 1
        ops.masked_adamw_(p, grad, m, v, mask, step[0], 1e-3, 0.9, 0.999, 1e-8, 1e-2)
        return p

    g = (grad * mask).double()
    truth = (start.double() * (1 - 1e-5) - 1e-3 * g / (g.abs() + 1e-8)) * mask  # the first step, biases corrected

    def check(run: Callable[[], Any]) -> Callable[[], str | None]:
        def checked() -> str | None:
            with torch.no_grad():
                parameter.copy_(start)
            optimizer.state.clear()
            p.copy_(start)
            m.zero_()
            v.zero_()
            step[0] = 0
            return close_to(run(), truth, truth.abs() + 1e-3, 1e-5)

        return checked

    contest = Contest(case, baseline="torch fused AdamW + masks")
    work = Work(0.0, 29.0 * n, update=True)  # p, m, v read and written, grad and mask read
    contest.entries["torch fused AdamW + masks"] = Entry(dense, check(dense), work)
    add_ours_(contest, ours, check, work, allow_reference)
    return contest
