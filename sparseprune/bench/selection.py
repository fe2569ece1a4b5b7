"""Contests of exact order statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .contest import Case, Contest, Entry, add_ours_, generator_of
from .peaks import Work

__all__ = ["build_selection", "build_topk"]


def build_selection(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """The k-th largest magnitude of n float32 values, exactly; k = the number kept at this sparsity."""
    del peers
    (n,) = case.shape
    w = torch.randn(n, generator=generator_of(case))
    k = n - round(case.sparsity * n)
    contest = Contest(case, baseline="torch kthvalue")
    truth = torch.from_numpy(np.partition(w.abs().numpy(), n - k)[n - k : n - k + 1].copy())[0]

    def check(run: Callable[[], Any]) -> Callable[[], str | None]:
        def checked() -> str | None:
            got = float(run())
            return None if got == float(truth) else f"{got!r} instead of {float(truth)!r}"

        return checked

    runs: dict[str, Callable[[], Any]] = {
        "torch kthvalue": lambda: w.abs().kthvalue(n - k + 1).values,
        "torch topk": lambda: w.abs().topk(k).values[-1],
        "np.partition": lambda: np.partition(w.abs().numpy(), n - k)[n - k],
    }
    work = Work(0.0, 4.0 * n)
    for name, run in runs.items():
        contest.entries[name] = Entry(run, check(run), work)
    add_ours_(contest, lambda: ops.kth_magnitude(w, k), check, work, allow_reference)
    return contest


def build_topk(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """A mask of exactly k of n signed scores."""
    del peers
    (n,) = case.shape
    scores = torch.randn(n, generator=generator_of(case))
    k = n - round(case.sparsity * n)
    cut = float(np.partition(scores.numpy(), n - k)[n - k])
    truth = scores > cut
    ties = (scores == cut).nonzero().flatten()[: k - int(truth.sum())]  # ours: ties go to the lower index
    truth[ties] = True

    def torch_topk() -> Tensor:
        return torch.zeros(n, dtype=torch.bool).index_fill_(0, scores.topk(k).indices, True)

    def check(run: Callable[[], Any]) -> Callable[[], str | None]:
        return lambda: None if torch.equal(run(), truth) else "not the k largest, ties to the lower index"

    def check_topk() -> str | None:
        mask = torch_topk()  # which of the equal scores it takes is its own affair
        return None if int(mask.sum()) == k and float(scores[mask].min()) == cut else "not the k largest"

    contest = Contest(case, baseline="torch topk")
    work = Work(0.0, 5.0 * n)
    contest.entries["torch topk"] = Entry(torch_topk, check_topk, work)
    add_ours_(contest, lambda: ops.topk_mask(scores, k), check, work, allow_reference)
    return contest
