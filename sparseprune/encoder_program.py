"""A stack of layers as data: a list of steps on buffers of features, which one native call takes every token through:
of encoders, and of decoders that get a prompt.

A buffer holds some features of every token. Buffer 0 begins as the stack's input, a step reads one buffer and writes
another, the result is one of them. :meth:`Program.encode` gives the numbers that the ops ``encoder`` and ``prompt``
take, beside the tensors that the steps name by their place in a list; csrc/bindings/encoder.cpp reads and checks them.
Floor 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeVar

from .activations import ACTIVATION_CODES, ACTIVATIONS
from .packing import Plan

__all__ = [
    "COMBINE",
    "WHOLE",
    "Attention",
    "Keep",
    "Linear",
    "Norm",
    "Program",
    "Rotary",
    "Round",
    "Step",
    "StepKind",
    "Weight",
    "decode_plan",
    "encode_plan",
    "result_features",
    "whole_plan",
]

T = TypeVar("T")

COMBINE = ("replace", "add", "multiply")
WHOLE = -1  # in the place of a plan's kind: values `[rows, columns]` hold every column, index and offsets are -1


class StepKind(IntEnum):
    """What a step does; the numbers are those of csrc/cpu/kernels.h, StepKind."""

    LINEAR = 0
    NORM = 1
    ROTARY = 2
    ATTENTION = 3
    ROUND = 4
    KEEP = 5


_VERSION = 1
_STEP_INTS = 16


def whole_plan(rows: int, columns: int) -> Plan:
    """The plan of a weight that is not packed."""
    return Plan(WHOLE, rows, columns, 1, columns, rows)


class Weight(NamedTuple):
    """A packed weight `[rows, columns]`: the places of its values, indices, offsets and scale (-1: none) in the list
    of tensors, and the plan of its packed form.
    """

    values: int
    indices: int
    offsets: int
    scale: int
    plan: Plan

    @property
    def rows(self) -> int:
        return self.plan.rows

    @property
    def columns(self) -> int:
        return self.plan.columns


@dataclass(frozen=True)
class Linear:
    """y = activation(W x + bias) replaces, is added to or multiplies the rows from ``to_row`` on of buffer ``to``; x is
    the rows from ``from_row`` on of buffer ``source``.

    weight: place in the program's weights; bias: place in the tensors, `[rows]` float32, or -1. ``together``: the next
    step neither reads what this one writes nor writes what it reads.
    """

    to: int
    source: int
    weight: int
    bias: int = -1
    activation: str = "none"
    combine: str = "replace"
    to_row: int = 0
    from_row: int = 0
    together: bool = False


@dataclass(frozen=True)
class Norm:
    """LayerNorm over ``rows`` features, or without ``centred`` RMSNorm; weight and bias: places of float32 `[rows]`
    tensors, bias -1 for none.
    """

    to: int
    source: int
    rows: int
    weight: int
    bias: int = -1
    eps: float = 1e-5
    centred: bool = True
    to_row: int = 0
    from_row: int = 0
    together: bool = False


@dataclass(frozen=True)
class Rotary:
    """Turns the first ``depth`` features of ``heads`` heads from ``to_row`` on of buffer ``to`` by the token's place:
    with their halves a, b, (a cos - b sin, b cos + a sin). every: features from one head to the next, 0: ``depth``.
    table: place in the tables of cos `[length, depth]`, or with ``each`` `[B, length, depth]`; sin follows it.
    """

    to: int
    heads: int
    depth: int
    table: int
    to_row: int = 0
    together: bool = False
    every: int = 0
    each: bool = False


@dataclass(frozen=True)
class Attention:
    """softmax(factor * Q K^T + bias) V for every sequence by itself, of ``heads`` heads with ``depth`` features.

    Queries, keys and values begin at rows q_row, k_row and v_row of buffer ``source``; the latter two have kv_heads
    heads. every: features from one head to the next there, 0: ``depth``. window: the most places between a query and
    its keys, -1 for any. causal: a query sees no key behind itself. table: place in the tables of a bias `[heads,
    length of keys, length of queries]`, -1 for none.
    """

    to: int
    source: int
    heads: int
    kv_heads: int
    depth: int
    q_row: int
    k_row: int
    v_row: int
    factor: float
    window: int = -1
    table: int = -1
    to_row: int = 0
    together: bool = False
    every: int = 0
    causal: bool = False


@dataclass(frozen=True)
class Keep:
    """Writes the keys and values from rows k_row and v_row on of buffer ``source``, ``heads`` heads of ``depth``
    features, ``every`` from one to the next (0: ``depth``), to layer ``cache`` of the call's cache, each token at its
    place.
    """

    source: int
    heads: int
    depth: int
    k_row: int
    v_row: int
    cache: int
    every: int = 0
    together: bool = False


@dataclass(frozen=True)
class Round:
    """The ``rows`` features from ``from_row`` on of buffer ``source`` in 8 bits, with a scale and a zero a token, which
    take all of buffer ``to``, of at least rows / 4 + 2 features: what linear steps whose weights are of kind "quads"
    read, and nothing else does.
    """

    to: int
    source: int
    rows: int
    from_row: int = 0
    together: bool = False


Step = Linear | Norm | Rotary | Attention | Round | Keep
_STEPS = "Linear, Norm, Rotary, Attention, Round, Keep"


@dataclass(frozen=True)
class Program:
    """buffers: the features of each; steps in order; weights that linear steps name; result: the buffer that is the
    output.
    """

    buffers: tuple[int, ...]
    weights: tuple[Weight, ...]
    steps: tuple[Step, ...]
    result: int = 0

    def encode(self) -> tuple[list[int], list[float]]:
        """(plan, scalars)."""
        return encode_plan(_VERSION, self.buffers, self.result, self.weights, self.steps, _encode)

    @classmethod
    def decode(cls, plan: Sequence[int], scalars: Sequence[float]) -> Program:
        """The program that :meth:`encode` gave these numbers for. ValueError on a version that is not this one's."""
        buffers, result, weights, steps = decode_plan("encoder", _VERSION, _STEP_INTS, plan, scalars, _decode)
        return cls(buffers, weights, steps, result)


def encode_plan(
    version: int, buffers: Sequence[int], result: int, weights: Sequence[Weight], steps: Sequence[T],
    encode: Callable[[T, list[float]], list[int]],
) -> tuple[list[int], list[float]]:  # fmt: skip
    """(plan, scalars) of a program whose steps ``encode`` gives the whole numbers of, appending the others."""
    scalars: list[float] = []
    plan = [version, len(buffers), *buffers, result, len(weights)]
    for weight in weights:
        plan += [weight.values, weight.indices, weight.offsets, weight.scale, *weight.plan]
    plan.append(len(steps))
    for step in steps:
        plan += encode(step, scalars)
    return plan, scalars


def decode_plan(
    op: str, version: int, step_ints: int, plan: Sequence[int], scalars: Sequence[float],
    decode: Callable[[tuple[int, ...], Sequence[float]], T],
) -> tuple[tuple[int, ...], int, tuple[Weight, ...], tuple[T, ...]]:  # fmt: skip
    """(buffers, result, weights, steps) that :func:`encode_plan` gave these numbers for; ValueError on another
    version.
    """
    if plan[0] != version:
        raise ValueError(f"{op}: plan expected version {version}, got {plan[0]}")
    numbers = iter(plan[1:])

    def take(n: int) -> tuple[int, ...]:
        return tuple(next(numbers) for _ in range(n))

    buffers = take(next(numbers))
    result = next(numbers)
    weights = []
    for _ in range(next(numbers)):
        values, indices, offsets, scale = take(4)
        weights.append(Weight(values, indices, offsets, scale, Plan(*take(len(Plan._fields)))))
    steps = tuple(decode(take(step_ints), scalars) for _ in range(next(numbers)))
    return buffers, result, tuple(weights), steps


def result_features(plan: Sequence[int]) -> int:
    """The features of the result of the program that :meth:`Program.encode` gave this plan for."""
    _, count, *rest = plan
    buffers, result = rest[:count], rest[count]
    return buffers[result]


def _encode(step: Step, scalars: list[float]) -> list[int]:
    def scalar(value: float) -> int:
        scalars.append(value)
        return len(scalars) - 1

    if isinstance(step, Linear):
        kind, source = StepKind.LINEAR, step.source
        numbers = [step.weight, step.to_row, step.from_row, step.bias]
        numbers += [ACTIVATION_CODES[step.activation], COMBINE.index(step.combine)]
    elif isinstance(step, Norm):
        kind, source = StepKind.NORM, step.source
        numbers = [step.rows, step.to_row, step.from_row, step.weight, step.bias, scalar(step.eps), int(step.centred)]
    elif isinstance(step, Rotary):
        kind, source = StepKind.ROTARY, step.to
        numbers = [step.heads, step.depth, step.to_row, step.table, step.every, int(step.each)]
    elif isinstance(step, Attention):
        kind, source = StepKind.ATTENTION, step.source
        numbers = [step.heads, step.kv_heads, step.depth, step.to_row, step.q_row, step.k_row, step.v_row]
        numbers += [step.window, scalar(step.factor), step.table, step.every, int(step.causal)]
    elif isinstance(step, Keep):
        kind, source = StepKind.KEEP, step.source
        numbers = [step.heads, step.depth, step.k_row, step.v_row, step.every, step.cache]
    elif isinstance(step, Round):
        kind, source = StepKind.ROUND, step.source
        numbers = [step.rows, step.from_row]
    else:
        raise TypeError(f"encoder: a step expected one of {_STEPS}, got {type(step).__name__}")
    to = step.source if isinstance(step, Keep) else step.to
    numbers = [int(kind), to, source, int(step.together), *numbers]
    return numbers + [0] * (_STEP_INTS - len(numbers))


def _decode(numbers: tuple[int, ...], scalars: Sequence[float]) -> Step:
    kind, to, source, flag, *rest = numbers
    together = bool(flag)
    if kind == StepKind.LINEAR:
        weight, to_row, from_row, bias, activation, combine = rest[:6]
        return Linear(to, source, weight, bias, ACTIVATIONS[activation], COMBINE[combine], to_row, from_row, together)
    if kind == StepKind.NORM:
        rows, to_row, from_row, weight, bias, eps, centred = rest[:7]
        return Norm(to, source, rows, weight, bias, scalars[eps], bool(centred), to_row, from_row, together)
    if kind == StepKind.ROTARY:
        heads, depth, to_row, table, every, each = rest[:6]
        return Rotary(to, heads, depth, table, to_row, together, every, bool(each))
    if kind == StepKind.ROUND:
        rows, from_row = rest[:2]
        return Round(to, source, rows, from_row, together)
    if kind == StepKind.ATTENTION:
        heads, kv_heads, depth, to_row, q_row, k_row, v_row, window, factor, table, every, causal = rest[:12]
        return Attention(
            to, source, heads, kv_heads, depth, q_row, k_row, v_row, scalars[factor], window, table, to_row, together,
            every, bool(causal),
        )  # fmt: skip
    if kind == StepKind.KEEP:
        heads, depth, k_row, v_row, every, cache = rest[:6]
        return Keep(source, heads, depth, k_row, v_row, cache, every, together)
    raise ValueError(f"encoder: a step's kind expected one of {[int(k) for k in StepKind]}, got {kind}")
