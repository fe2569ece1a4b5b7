"""Linears that stay dense, held in bfloat16 or int8 for calls of few rows where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _native, bench, native
from ...tensor_state import fingerprint
from ..fusion import hooked
from ..replace import replace_
from ..rounded import RoundedLinear, rounded_copy
from .reports import LayerChoice
from .timing import FEW, MIN_RATIO, copies_in_turn, rows_for, without_grad

__all__ = ["round_", "rounded_ratio"]


def round_(
    model: nn.Module, counts: tuple[int, ...], value_dtype: str = "bfloat16", exact: Collection[nn.Module] = ()
) -> list[LayerChoice]:
    """Puts a RoundedLinear wherever a dense Linear in float32 is slower at one of the counts of up to 8 rows, but for
    those in ``exact``.
    """
    few = sorted(rows for rows in counts if rows <= FEW)
    choices: list[LayerChoice] = []
    memo: dict[tuple[Any, ...], dict[int, float]] = {}  # layers that are timed alike are chosen alike
    replacements: dict[int, nn.Module] = {}
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear or not isinstance(linear._parameters.get("weight"), nn.Parameter):
            continue
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        ratio, reason, most = None, "", 0
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            reason = f"needs float32 on the CPU, got {weight.dtype} on {weight.device}"
        elif _native.C is None:
            reason = _native.why_no_c() or ""
        elif hooked(linear):
            reason = "a hook observes the module"
        elif linear in exact:
            reason = "exact_layers keeps it in float32"
        elif not few:
            reason = f"no call of up to {FEW} rows among tokens={counts}"
        else:
            alike = weight.shape, bias is None, linear.weight.requires_grad
            if alike not in memo:
                memo[alike] = {rows: rounded_ratio(linear.weight, bias, rows, value_dtype) for rows in few}
            found = memo[alike]
            most = max((rows for rows, gain in found.items() if gain >= MIN_RATIO), default=0)
            ratio = max(found.values())
            reason = f"{value_dtype} runs " + ", ".join(f"{gain:.2f} at {rows} tokens" for rows, gain in found.items())
        if most:
            replacements[id(linear)] = RoundedLinear.from_linear(linear, most, value_dtype)
        density = float(torch.count_nonzero(weight)) / max(1, weight.numel())
        layout = value_dtype if most else "dense"
        choices.append(LayerChoice(name, (linear.out_features, linear.in_features), density, layout, ratio, reason))
    replace_(model, replacements)
    return choices


def rounded_ratio(
    weight: Tensor, bias: Tensor | None, rows: int, value_dtype: str = "bfloat16"
) -> float:
    """Dense time / time from a copy in this dtype, each from memory. A weight that wants a gradient is compared with
    its copy at every call, which is timed too.
    """
    learns, weight = weight.requires_grad, weight.detach()
    copies = copies_in_turn(weight.numel() * weight.element_size())

    def dense(count: int) -> Callable[[], object]:
        x, weights = rows_for(weight, count), [weight, *(weight.clone() for _ in range(copies - 1))]
        return without_grad(lambda: [F.linear(x, each, bias) for each in weights])

    def rounded(count: int) -> Callable[[], object]:
        x, weights = rows_for(weight, count), [rounded_copy(weight, value_dtype) for _ in range(copies)]
        exact = [weight, *(weight.clone() for _ in range(copies - 1))] if learns else []

        def run() -> object:
            compared = [fingerprint(each) for each in exact]
            return compared, [native.rounded.rounded_linear(x, each.values, bias, each.scale) for each in weights]

        return without_grad(run)

    shape, note = (weight.shape[0], weight.shape[1]), f"values={value_dtype}" + (",learns" if learns else "")
    found = bench.choose_fastest(
        {"dense": dense, "rounded": rounded},
        tokens=(rows,),
        min_ratio=MIN_RATIO,
        key=lambda label, count: bench.layer_key(shape, 1.0, label, count, weight.dtype, note),
    )
    return found.ratios["rounded"][rows]
