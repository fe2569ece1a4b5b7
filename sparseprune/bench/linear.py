"""Contests of products with sparse weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, layouts, native, ops
from ..packing import Packed
from .contest import BASELINE, Case, Contest, Entry, close_to, generator_of, runs_native
from .peaks import Work
from .peers import PEERS, Unavailable
from .pruned import layout_of, prune_like

__all__ = ["build_linear", "build_training", "ours_linear"]

#: Relative error allowed, against the sum of |x||w| of each output: float32 sums, and what each lossy value type loses.
_RELATIVE = {"float32": 2e-6, "bfloat16": 5e-3, "int8": 2e-2}


def ours_linear(x: Tensor, packed: Packed, bias: Tensor | None, allow_reference: bool) -> Callable[[], Tensor]:
    """What ``SparseLinear.forward`` runs in inference: the direct call into the compiled core.

    RuntimeError with the reasons where the core cannot take it, unless ``allow_reference``: then whatever the
    dispatcher picks.
    """
    reasons = native.linear.why_not_linear(x, packed)
    forced = backends.forced_backend()
    if forced not in (None, "native"):
        reasons = [*reasons, f"SPARSEPRUNE_BACKEND={forced} asks for another"]
    if not reasons:
        return lambda: native.linear.linear(x, packed, bias)
    if not allow_reference:
        raise Unavailable("the compiled core cannot run it: " + "; ".join(reasons))
    return lambda: ops.packed_linear(x, packed, bias)


def _meets(peer: str, case: Case) -> bool:
    """Whether a peer is worth its time in this case: what knows no blocks meets unstructured weights only, once."""
    if peer == "torch bsr 4x4":
        return case.structure == "4x4"
    if case.suite in ("curve", "tokens") and peer in ("scipy csr", "onnxruntime", "openvino"):
        return False
    return case.structure == "element" or peer in (BASELINE, "torch int8")


def build_linear(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """y = x W^T + b, W pruned: ours with each value type, and the peers named."""
    n, k = case.shape
    generator = generator_of(case)
    w = prune_like(torch.randn(n, k, generator=generator) * k**-0.5, case.structure, case.sparsity)
    bias = torch.randn(n, generator=generator)
    x = torch.randn(case.tokens, k, generator=generator)
    truth = F.linear(x.double(), w.double(), bias.double())
    scale = F.linear(x.double().abs(), w.double().abs(), bias.double().abs())
    kept = int((w != 0).sum())
    flops = 2.0 * kept * case.tokens
    through = 4.0 * case.tokens * (n + k)
    contest = Contest(case)

    def add(name: str, run: Callable[[], Any], relative: float, work: Work, ours: bool = False) -> None:
        contest.entries[name] = Entry(run, lambda: close_to(run(), truth, scale, relative), work, flops, ours)

    dense_work = Work(2.0 * n * k * case.tokens, 4.0 * n * k + through)
    csr_work = Work(flops, 8.0 * kept + through, "l1_fma")
    for name in [BASELINE, *(peer for peer in peers if peer != BASELINE)]:
        if not _meets(name, case):
            continue
        work = csr_work if any(word in name for word in ("csr", "bsr", "mkl")) else dense_work
        if name == "torch int8":
            work = Work(dense_work.flops, dense_work.bytes / 4)
        try:
            run = PEERS[name](w, bias, x)
            add(name, run, 5e-2 if name == "torch int8" else 2e-6, work)
        except Unavailable as error:
            contest.absent[name] = str(error)
    kind = {"element": "csr"}.get(case.structure, f"nm {case.structure}" if ":" in case.structure else "bsr")
    if kind == "bsr":
        kind += f" {case.structure}"
    layout = layout_of(w, case.structure)
    for values, relative in _RELATIVE.items():
        if values != "float32" and case.tokens > 8:
            continue  # smaller values pay where the weights' bytes are the limit
        name = f"ours {kind}" + ("" if values == "float32" else f" {values}")
        try:
            packed = ops.pack(layout, tokens=case.tokens, value_dtype=values)
            run = ours_linear(x, packed, bias, allow_reference)
        except Unavailable as error:
            contest.absent[name] = str(error)
            continue
        unit = "fma" if kind.startswith("bsr") else "l1_fma"
        add(name, run, relative, Work(flops, packed.nbytes + through, unit), ours=True)
    return contest


def build_training(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """Forward and backward of one Linear under a fixed mask: gradients of x, of the kept values and of the bias."""
    del peers
    n, k = case.shape
    generator = generator_of(case)
    w = prune_like(torch.randn(n, k, generator=generator) * k**-0.5, case.structure, case.sparsity)
    mask = w != 0
    bias = torch.randn(n, generator=generator).requires_grad_()
    x = torch.randn(case.tokens, k, generator=generator).requires_grad_()
    dy = torch.randn(case.tokens, n, generator=generator)
    layout = layout_of(w, case.structure)
    values = layout.values.clone().requires_grad_()
    weight = w.clone().requires_grad_()
    packed = ops.pack(layout, tokens=case.tokens)
    packed_t = ops.pack(layout, tokens=case.tokens, transpose=True)
    kept = int(mask.sum())
    contest = Contest(case)

    def dense() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy)

    def masked() -> tuple[Tensor, ...]:
        dx, dw, db = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy)
        return dx, dw.mul_(mask), db

    def sparse() -> tuple[Tensor, ...]:
        y = ops.trained_linear(x, values, packed, packed_t, bias)
        return torch.autograd.grad(y, (x, values, bias), dy)

    with torch.no_grad():
        dx, dw = dy.double() @ w.double(), dy.double().t() @ x.double()
        dx_scale, dw_scale = dy.double().abs() @ w.double().abs(), dy.double().abs().t() @ x.double().abs()

    def check(run: Callable[[], tuple[Tensor, ...]], compact: bool, all_weights: bool) -> Callable[[], str | None]:
        def checked() -> str | None:
            got_x, got_w, _ = run()
            if compact:
                got_w = _with_values(layout, got_w)
            truth = dw if all_weights else dw * mask
            return close_to(got_x, dx, dx_scale, 2e-6) or close_to(got_w, truth, dw_scale, 2e-6)

        return checked

    flops = 3 * 2.0 * kept * case.tokens
    moved = 4.0 * case.tokens * (2 * n + 2 * k)
    dense_work = Work(3 * 2.0 * n * k * case.tokens, 12.0 * n * k + moved)
    contest.entries[BASELINE] = Entry(dense, check(dense, False, True), dense_work, flops)
    contest.entries["torch dense, masked"] = Entry(masked, check(masked, False, False), dense_work, flops)
    if runs_native(allow_reference):
        unit = "l1_fma" if case.structure == "element" else "fma"
        work = Work(flops, 3.0 * packed.nbytes + moved, unit)
        contest.entries["ours"] = Entry(sparse, check(sparse, True, False), work, flops, ours=True)
    else:
        contest.absent["ours"] = "the compiled core is absent"
    return contest


def _with_values(layout: layouts.Layout, values: Tensor) -> Tensor:
    fields = dict(layout.__dict__)
    fields["values"] = values.reshape(layout.values.shape)
    return type(layout)(**fields).to_dense()
