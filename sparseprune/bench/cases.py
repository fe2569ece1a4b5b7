"""The registry of what is benchmarked: a contest puts one op of ours beside its dense baseline and its peers.

A suite is a list of :class:`Case`; ``SUITES[name].build(case)`` makes the operands (seeded by the case, so two runs
see the same numbers) and returns a :class:`Contest`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, backends, layouts, ops
from ..native import matmul
from .peaks import Work
from .peers import PEERS, Unavailable

__all__ = ["SUITES", "Case", "Contest", "Entry", "Suite", "prune_like"]

BASELINE = "torch dense"

# : (out_features, in_features) of GOALS: attention and feed-forward of a BERT base, and a square layer of a larger
# model.
SHAPES = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
#: The Linears of MiniLM-L6.
MINILM_SHAPES = ((384, 384), (1536, 384), (384, 1536))


@dataclass(frozen=True)
class Case:
    """One row of a table. ``shape``: (out, in) of a Linear, or (n,) of a flat tensor; ``structure``: what was pruned
    together: ``element``, ``RxC`` blocks or ``N:M``; ``tokens``: rows of x (0 where there are none).
    """

    suite: str
    shape: tuple[int, ...]
    sparsity: float = 0.0
    structure: str = "element"
    tokens: int = 0

    @property
    def label(self) -> str:
        parts = ["x".join(str(size) for size in self.shape)]
        if self.tokens:
            parts.append(f"N={self.tokens}")
        if self.sparsity:
            parts.append(f"{self.structure} {self.sparsity:.0%}")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    """One contestant: ``run()`` is timed; ``check()`` returns None when its result is right, else what is wrong;
    ``work``: what the call cannot avoid; ``kept_flops``: 2 a kept weight and token, for GFLOP/s on kept weights;
    ``ours``: runs our kernels.
    """

    run: Callable[[], Any]
    check: Callable[[], str | None]
    work: Work | None = None
    kept_flops: float = 0.0
    ours: bool = False


@dataclass
class Contest:
    """The contestants of one case. ``absent``: name -> why this contestant is not here."""

    case: Case
    entries: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    baseline: str = BASELINE


@dataclass(frozen=True)
class Suite:
    """``build(case, peers, allow_reference)`` makes the contest; ``cases()``: the cases of the full table."""

    name: str
    about: str
    build: Callable[[Case, Sequence[str], bool], Contest]
    cases: Callable[[], Iterator[Case]]



def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))


def prune_like(w: Tensor, structure: str, sparsity: float) -> Tensor:
    """w: `[N, K]` -> a copy with its smallest magnitudes set to 0; exactly ``round(sparsity * units)`` elements or
    blocks go.

    ``structure``: ``element``, ``RxC`` (blocks by the sum of their magnitudes) or ``N:M`` (N kept of each M along K;
    it fixes its own sparsity, another is a ValueError).
    """
    rows, columns = w.shape
    if structure == "element":
        return w * _keep(w.abs(), sparsity)
    if ":" in structure:
        n, m = (int(part) for part in structure.split(":"))
        if abs(sparsity - (1 - n / m)) > 1e-9:
            raise ValueError(f"structure {structure} expected sparsity {1 - n / m}, got {sparsity}")
        groups = w.view(rows, columns // m, m)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(n, 2).indices, True)
        return (groups * kept).view(rows, columns)
    r, c = (int(part) for part in structure.split("x"))
    blocks = w.view(rows // r, r, columns // c, c)
    kept = _keep(blocks.abs().sum((1, 3)), sparsity)
    return (blocks * kept[:, None, :, None]).view(rows, columns)


def _keep(scores: Tensor, sparsity: float) -> Tensor:
    flat = scores.flatten()
    count = flat.numel() - round(sparsity * flat.numel())
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count).indices] = True
    return mask.view(scores.shape)


def _close(got: Any, truth: Tensor, scale: Tensor, relative: float) -> str | None:
    """None where |got - truth| <= relative * scale everywhere; scale: the magnitudes added up, truth's shape."""
    result = torch.as_tensor(got).detach().to(torch.float64)
    if result.shape != truth.shape:
        return f"shape {list(result.shape)} instead of {list(truth.shape)}"
    excess = (result - truth).abs() - relative * scale
    if bool((excess <= 0).all()):
        return None
    where = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
    return f"at flat index {where}: {result.flatten()[where].item():.7g} instead of {truth.flatten()[where].item():.7g}"

#: Relative error allowed, against the sum of |x||w| of each output: float32 sums, and what each lossy value type loses.
_RELATIVE = {"float32": 2e-6, "bfloat16": 5e-3, "int8": 2e-2}


def _layout_of(w: Tensor, structure: str) -> layouts.Layout:
    if structure == "element":
        return layouts.from_dense(w, "csr")
    if ":" in structure:
        n, m = (int(part) for part in structure.split(":"))
        return layouts.from_dense(w, "nm", nm=(n, m))
    r, c = (int(part) for part in structure.split("x"))
    return layouts.from_dense(w, "bsr", blocksize=(r, c))


def ours_linear(x: Tensor, packed: matmul.Packed, bias: Tensor, allow_reference: bool) -> Callable[[], Tensor]:
    """What ``SparseLinear.forward`` runs in inference: the direct call into the compiled core.

    RuntimeError with the reasons where the core cannot take it, unless ``allow_reference``: then whatever the
    dispatcher picks.
    """
    reasons = matmul.why_not_linear(x, packed)
    forced = backends.forced_backend()
    if forced not in (None, "native"):
        reasons = [*reasons, f"SPARSEPRUNE_BACKEND={forced} asks for another"]
    if not reasons:
        return lambda: matmul.linear(x, packed, bias)
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
    generator = _generator(case)
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
        contest.entries[name] = Entry(run, lambda: _close(run(), truth, scale, relative), work, flops, ours)

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
    layout = _layout_of(w, case.structure)
    for values, relative in _RELATIVE.items():
        if values != "float32" and case.tokens > 8:
            continue  # smaller values pay where the weights' bytes are the limit
        name = f"ours {kind}" + ("" if values == "float32" else f" {values}")
        try:
            packed = ops.pack(layout, tokens=case.tokens, values=values)
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
    generator = _generator(case)
    w = prune_like(torch.randn(n, k, generator=generator) * k**-0.5, case.structure, case.sparsity)
    mask = w != 0
    bias = torch.randn(n, generator=generator).requires_grad_()
    x = torch.randn(case.tokens, k, generator=generator).requires_grad_()
    dy = torch.randn(case.tokens, n, generator=generator)
    layout = _layout_of(w, case.structure)
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
            return _close(got_x, dx, dx_scale, 2e-6) or _close(got_w, truth, dw_scale, 2e-6)

        return checked

    flops = 3 * 2.0 * kept * case.tokens
    moved = 4.0 * case.tokens * (2 * n + 2 * k)
    dense_work = Work(3 * 2.0 * n * k * case.tokens, 12.0 * n * k + moved)
    contest.entries[BASELINE] = Entry(dense, check(dense, False, True), dense_work, flops)
    contest.entries["torch dense, masked"] = Entry(masked, check(masked, False, False), dense_work, flops)
    if _runs_native(allow_reference):
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


def _runs_native(allow_reference: bool) -> bool:
    """Whether our ops would run compiled kernels; always true where the reference is asked for."""
    return allow_reference or (_native.C is not None and backends.forced_backend() in (None, "native"))



def build_selection(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """The k-th largest magnitude of n float32 values, exactly; k = the number kept at this sparsity."""
    del peers
    (n,) = case.shape
    w = torch.randn(n, generator=_generator(case))
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
    _add_ours(contest, lambda: ops.kth_magnitude(w, k), check, work, allow_reference)
    return contest


def build_topk(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """A mask of exactly k of n signed scores."""
    del peers
    (n,) = case.shape
    scores = torch.randn(n, generator=_generator(case))
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
    _add_ours(contest, lambda: ops.topk_mask(scores, k), check, work, allow_reference)
    return contest


def _add_ours(
    contest: Contest,
    run: Callable[[], Any],
    check: Callable[[Callable[[], Any]], Callable[[], str | None]],
    work: Work,
    allow_reference: bool,
) -> None:
    if _runs_native(allow_reference):
        contest.entries["ours"] = Entry(run, check(run), work, ours=True)
    else:
        contest.absent["ours"] = "the compiled core is absent"



def build_mask(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """w[~mask] = 0 in place."""
    del peers
    (n,) = case.shape
    generator = _generator(case)
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
    _add_ours(contest, lambda: ops.apply_mask_(w, mask), check, work, allow_reference)
    return contest


def build_threshold(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """threshold -> mask -> masked copy, with the count."""
    del peers
    (n,) = case.shape
    w = torch.randn(n, generator=_generator(case))
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
    _add_ours(contest, lambda: ops.threshold_mask(w, threshold), check, work, allow_reference)
    return contest


def build_adamw(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """One AdamW step that keeps pruned weights at zero: gradient masked, step, weight masked."""
    del peers
    (n,) = case.shape
    generator = _generator(case)
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
            return _close(run(), truth, truth.abs() + 1e-3, 1e-5)

        return checked

    contest = Contest(case, baseline="torch fused AdamW + masks")
    work = Work(0.0, 29.0 * n, update=True)  # p, m, v read and written, grad and mask read
    contest.entries["torch fused AdamW + masks"] = Entry(dense, check(dense), work)
    _add_ours(contest, ours, check, work, allow_reference)
    return contest



def _grid(
    suite: str,
    shapes: Sequence[tuple[int, ...]],
    tokens: Sequence[int],
    structures: Mapping[str, Sequence[float]],
) -> Iterator[Case]:
    for shape in shapes:
        for count in tokens:
            for structure, sparsities in structures.items():
                for sparsity in sparsities:
                    yield Case(suite, shape, sparsity, structure, count)


_LAYER = {
    "element": (0.5, 0.7, 0.8, 0.9, 0.95),
    "16x1": (0.5, 0.8, 0.9, 0.95),
    "8x1": (0.8, 0.9, 0.95),
    "4x4": (0.8, 0.9, 0.95),
    "2:4": (0.5,),
}
_FLAT = ((1_000_000,), (10_000_000,))

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "linear",
            "y = x W^T + b at N = 1, 8 and 128 tokens",
            build_linear,
            lambda: _grid("linear", SHAPES, (1, 8, 128), _LAYER),
        ),
        Suite(
            "minilm",
            "the Linears of MiniLM-L6 at N = 1024 tokens",
            build_linear,
            lambda: _grid("minilm", MINILM_SHAPES, (1024,), {"element": (0.9,), "16x1": (0.9,)}),
        ),
        Suite(
            "curve",
            "speed-up over sparsity, 3072x768 and 4096x4096 at N = 1, 8 and 128",
            build_linear,
            lambda: _grid(
                "curve",
                ((3072, 768), (4096, 4096)),
                (1, 8, 128),
                dict.fromkeys(("element", "16x1"), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)),
            ),
        ),
        Suite(
            "tokens",
            "cost a token from N = 16 to 4096, 3072x768 at 90 %",
            build_linear,
            lambda: _grid(
                "tokens",
                ((3072, 768),),
                (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
                {"element": (0.9,), "16x1": (0.9,)},
            ),
        ),
        Suite(
            "training",
            "forward and backward under a fixed mask at N = 512",
            build_training,
            lambda: _grid("training", SHAPES[:3], (512,), {"element": (0.8, 0.9, 0.95), "16x1": (0.9,)}),
        ),
        Suite("kth", "k-th largest magnitude", build_selection, lambda: _grid("kth", _FLAT, (0,), {"element": (0.9,)})),
        Suite("topk", "exact top-k mask", build_topk, lambda: _grid("topk", _FLAT, (0,), {"element": (0.9,)})),
        Suite("mask", "mask in place", build_mask, lambda: _grid("mask", _FLAT, (0,), {"element": (0.9,)})),
        Suite(
            "threshold",
            "threshold, mask, masked copy and count",
            build_threshold,
            lambda: _grid("threshold", _FLAT, (0,), {"element": (0.9,)}),
        ),
        Suite("adamw", "masked AdamW step", build_adamw, lambda: _grid("adamw", _FLAT, (0,), {"element": (0.9,)})),
    )
}
