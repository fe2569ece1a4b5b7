"""Which layout runs a layer fastest on this machine, dense included."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import bench, layouts
from ...packing import QUAD, why_not_quads
from ..linear import SparseLinear
from ..stacks import weights_in_turn
from .timing import FEW, MIN_RATIO, copies_in_turn, copies_on_gpu, rows_for, without_grad

__all__ = ["Choice", "fitting_layouts", "int8_layouts", "measure"]

_MIN_FILL = 0.8  # share of non-zeros in the stored blocks below which a bsr layout is not tried
_STEPS = 16  # of a program at least, so that what is timed is not its call
_FREEZE = "its weight learns and is looked at in every call: for inference freeze it first, requires_grad_(False)"
# On a GPU: square blocks that fill a tensor core, and what its sparse tensor cores know.
_GPU_BLOCKSIZES = ((128, 128), (64, 64), (32, 32), (16, 16))
_GPU_PATTERNS = ((2, 4),)


class Choice(NamedTuple):
    """label: "dense" or the layout; arguments: of ``SparseLinear.from_linear``; ratio over dense; reason; doubt: what
    speaks against the timing.
    """

    label: str
    arguments: dict[str, Any]
    ratio: float | None
    reason: str
    doubt: str = ""


def fitting_layouts(kept: Tensor, gpu: bool) -> dict[str, dict[str, Any]]:
    """Label -> arguments of from_linear, for every layout that fits the pattern of kept entries `[N, K]` and that the
    kernels of a GPU, or of a CPU, are made for.
    """
    rows, columns = kept.shape
    nnz = int(kept.sum())
    fitting: dict[str, dict[str, Any]] = {"csr": {"layout": "csr"}}
    for r, c in _GPU_BLOCKSIZES if gpu else layouts.COLUMN_BLOCKS:
        if rows % r == 0 and columns % c == 0 and nnz:
            stored = int(kept.view(rows // r, r, columns // c, c).any(3).any(1).sum()) * r * c
            if nnz >= _MIN_FILL * stored:
                fitting[f"bsr{r}x{c}"] = {"layout": "bsr", "blocksize": (r, c)}
                break  # a narrower block has the same zeros and less reuse
    for n, m in _GPU_PATTERNS if gpu else layouts.NM_PATTERNS:
        if columns % m == 0 and nnz and int(kept.view(rows, columns // m, m).sum(2).max()) <= n:
            fitting[f"nm{n}:{m}"] = {"layout": "nm", "nm": (n, m)}
            break
    return fitting


def int8_layouts(kept: Tensor, fitting: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same for products in int8: the layouts in ``fitting``, blocks of quads, and the weight without its zeros left
    out. Empty where the shape has no such form.
    """
    rows, columns = kept.shape
    if why_not_quads((rows, columns)) is not None:
        return {}
    int8 = {"value_dtype": "int8", "activations": "int8"}
    whole = next(r for r in (16, 8, 4, 2, 1) if rows % r == 0)
    found: dict[str, dict[str, Any]] = {"int8": {"layout": "bsr", "blocksize": (whole, 1), **int8}}
    if bool(kept.all()):
        return found
    nnz = int(kept.sum())
    for r in (16, 4, 1):
        if rows % r == 0 and nnz:
            stored = int(kept.view(rows // r, r, columns // QUAD, QUAD).any(3).any(1).sum()) * r * QUAD
            if nnz >= _MIN_FILL * stored:
                return {**found, f"int8 bsr{r}x{QUAD}": {"layout": "bsr", "blocksize": (r, QUAD), **int8}}
    return {**found, **{f"int8 {label}": {**arguments, **int8} for label, arguments in fitting.items()}}


def measure(
    linear: nn.Linear,
    kept: Tensor,
    density: float,
    counts: tuple[int, ...],
    options: dict[str, Any],
    memo: dict[Any, Choice],
    cold: bool,
    activations: str = "float32",
    in_program: bool = False,
) -> Choice:
    """What runs this layer fastest, "dense" included. kept: bool `[N, K]`; options: of every SparseLinear made; memo:
    what was measured before; cold: its weight comes from memory; activations: "int8" allows products in int8 beside
    exact ones; in_program: up to 8 rows of x are those of a step in the program of a decoder, unless the weight learns.
    It reads one form, that of the fewest rows, and never the dense weight.
    """
    if density == 1.0 and activations == "float32":
        return Choice("dense", {}, 1.0, "it has no zeros; prune it first")
    fitting = fitting_layouts(kept, linear.weight.device.type == "cuda") if density < 1.0 else {}
    if activations == "int8":
        options = {**options, "value_dtype": "float32"}
        fitting |= int8_layouts(kept, fitting)
    if not fitting:
        why = why_not_quads((linear.out_features, linear.in_features))
        return Choice("dense", {}, 1.0, f"it has no zeros, and int8 {why}")
    step = None
    if in_program and not linear.weight.requires_grad:
        step = min(counts) if isinstance(options["tokens"], tuple) else options["tokens"]
    contest = _Contest(linear, density, fitting, options, cold, step)
    known = contest.key()
    if known not in memo:
        memo[known] = _choose(contest, counts)
    return memo[known]


@dataclass(frozen=True)
class _Contest:
    """What is timed of one layer: dense against each layout in ``fitting``. step: the rows of x whose packed form up to
    8 rows read as a step of a program; None where all are calls of a module.
    """

    linear: nn.Linear
    density: float
    fitting: dict[str, dict[str, Any]]
    options: dict[str, Any]
    cold: bool
    step: int | None

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.detach()

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features

    def key(self) -> tuple[Any, ...]:
        """What layers have in common that are timed alike."""
        weight, plain = self.linear.weight, self.linear.bias is None
        what = weight.dtype, weight.device, weight.requires_grad, self.options["value_dtype"]
        return self.shape, round(self.density, 2), tuple(self.fitting), plain, self.step, *what

    def fastest(self, sizes: tuple[int, ...]) -> bench.Choice:
        weight = self.weight
        note = f"values={self.options['value_dtype']}" + (",in turn" if self.cold and max(sizes) <= FEW else "")
        note += ",learns" if self.linear.weight.requires_grad else ""  # is compared with what was packed at every call
        step = f",step of a program for {self.step}"

        def key(label: str, rows: int) -> str:
            about = note + step * self._is_step(rows)
            return bench.layer_key(self.shape, round(self.density, 2), label, rows, weight.dtype, about, weight.device)

        candidates = {"dense": self._dense, **{label: self._sparse(label) for label in self.fitting}}
        return bench.choose_fastest(candidates, tokens=sizes, min_ratio=MIN_RATIO, key=key, device=weight.device)

    def _is_step(self, rows: int) -> bool:
        return self.step is not None and rows <= FEW

    def _copies(self, rows: int) -> int:
        weight = self.weight
        if not self.cold or rows > FEW:
            return 1
        if weight.device.type != "cuda":
            return copies_in_turn(weight.nbytes)
        cache = torch.cuda.get_device_properties(weight.device).L2_cache_size
        return copies_on_gpu(weight.nbytes, round(weight.nbytes * self.density), cache)

    def _dense(self, rows: int) -> Callable[[], object]:
        if self._is_step(rows):
            return self._steps(self.linear, rows)
        weight, bias = self.weight, None if self.linear.bias is None else self.linear.bias.detach()
        x, weights = rows_for(weight, rows), [weight, *(weight.clone() for _ in range(self._copies(rows) - 1))]
        return without_grad(lambda: [F.linear(x, each, bias) for each in weights])

    def _sparse(self, label: str) -> bench.choose.Setup:
        def setup(rows: int) -> Callable[[], object]:
            tokens = rows if isinstance(self.options["tokens"], tuple) else self.options["tokens"]
            tokens = self.step if self._is_step(rows) else tokens
            options = {**self.options, "tokens": tokens, **self.fitting[label]}
            layer = SparseLinear.from_linear(self.linear, **options).eval()
            if self._is_step(rows):
                return self._steps(layer, rows)
            x = rows_for(self.weight, rows)
            layers = [layer, *(copy.deepcopy(layer) for _ in range(self._copies(rows) - 1))]
            return without_grad(lambda: [each(x) for each in layers])

        return setup

    def _steps(self, layer: nn.Linear | SparseLinear, rows: int) -> Callable[[], object]:
        x, run = rows_for(self.weight, rows), weights_in_turn(layer, self._copies(rows), _STEPS)
        return without_grad(lambda: run(x))


def _choose(contest: _Contest, counts: tuple[int, ...]) -> Choice:
    if isinstance(contest.options["tokens"], tuple):
        found = {rows: contest.fastest((rows,)) for rows in sorted(counts)}
        ratios = {rows: {label: per[rows] for label, per in c.ratios.items()} for rows, c in found.items()}
        doubts = [c.doubt for c in found.values() if c.doubt]
        choice = _by_call(ratios, contest.fitting, 0 if contest.step is None else FEW)
        choice = choice._replace(doubt=doubts[0] if doubts else "")
    else:
        one = contest.fastest(counts)
        choice = Choice(one.name, contest.fitting.get(one.name, {}), one.ratio, one.reason, one.doubt)
    reason = choice.reason
    if contest.step is not None and min(counts) <= FEW:
        reason += f", up to {FEW} as a step of a program"
    if contest.linear.weight.requires_grad and choice.label == "dense" and min(counts) <= FEW:
        reason += f"; {_FREEZE}"
    return choice._replace(reason=reason)


def _by_call(
    ratios: dict[int, dict[str, float]], fitting: dict[str, dict[str, Any]], together: int
) -> Choice:
    """ratios: rows of x, rising -> label -> dense time / its time. The layout that gains most in the product over the
    call sizes, each of which takes what is faster; dense may win from some size on, not below it. Sizes up to
    ``together`` take the same, so the worst of them counts.
    """
    best, arguments, gain, reason = "dense", {}, 1.0, ""
    for label in fitting:
        found = {rows: per[label] for rows, per in ratios.items() if label in per}
        table = ", ".join(f"{ratio:.2f} at {rows} tokens" for rows, ratio in found.items())
        worst = min((ratio for rows, ratio in found.items() if rows <= together), default=0.0)
        found = {rows: worst if rows <= together else ratio for rows, ratio in found.items()}
        wins = [rows for rows, ratio in found.items() if ratio >= 1.0]
        losing = [rows for rows in found if rows not in wins]
        reason = reason or f"dense wins: {label} runs {table}"
        if not wins or max(found.values()) < MIN_RATIO or (losing and min(losing) < max(wins)):
            continue
        if losing and fitting[label].get("activations") == "int8":
            continue  # which has no unpacked form to change to
        product = math.prod(max(1.0, ratio) for ratio in found.values())
        if product > gain:
            best, gain, arguments = label, product, dict(fitting[label])
            reason = f"{label} runs {table}"
            if losing:
                arguments["dense_from"] = max(math.isqrt(max(wins) * min(losing)), together) + 1
                reason += f"; dense from {arguments['dense_from']} on"
    top = max((per.get(best, 1.0) for per in ratios.values()), default=1.0)
    return Choice(best, arguments, top if best != "dense" else 1.0, reason or "dense wins")
