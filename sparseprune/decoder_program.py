"""A stack of decoder layers as data: a list of steps on buffers of features, which one native call takes the new tokens
of a few sequences through, with the cache of keys and values.

A buffer holds some features of every new token. Buffer 0 begins as the stack's input, a step reads one buffer and
writes another, the result is one of them. :meth:`Program.encode` gives the numbers that the op ``decoder`` takes,
beside the tensors that the steps name by their place in a list; csrc/bindings/decoder.cpp reads and checks them. Floor
0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from .activations import ACTIVATION_CODES, ACTIVATIONS
from .encoder_program import WHOLE, Weight, decode_plan, encode_plan, result_features, whole_plan

__all__ = [
    "MOST_ROWS",
    "WHOLE",
    "Attention",
    "Linear",
    "Norm",
    "Program",
    "RowNorm",
    "RowStepKind",
    "Step",
    "Weight",
    "result_features",
    "whole_plan",
]

MOST_ROWS = 16  # new tokens of a call, over all sequences; csrc/cpu/kernels.h, kMostRows


class RowStepKind(IntEnum):
    """What a step does; the numbers are those of csrc/cpu/kernels.h, RowStepKind."""

    LINEAR = 0
    ATTENTION = 1
    NORM = 2


_VERSION = 1
_STEP_INTS = 28


@dataclass(frozen=True)
class RowNorm:
    """LayerNorm over some features of a token, or without ``centred`` RMSNorm; weight and bias: places of float32
    tensors, weight -1: no norm, bias -1: none.
    """

    weight: int = -1
    bias: int = -1
    eps: float = 1e-5
    centred: bool = False


_NO_NORM = RowNorm()


@dataclass(frozen=True)
class Linear:
    """y = activation(W x + bias) replaces, or with ``add`` is added to, the features from ``to_row`` on of buffer
    ``to``; x is those from ``from_row`` on of buffer ``source``, normed by ``norm``, or with ``gated`` multiplied with
    as many that follow them.

    weight: place in the program's weights; bias: place in the tensors, `[rows]` float32, or -1. ``together``: the next
    step neither reads what this one writes nor writes what it reads.
    """

    to: int
    source: int
    weight: int
    bias: int = -1
    activation: str = "none"
    add: bool = False
    gated: bool = False
    norm: RowNorm = field(default=_NO_NORM)
    to_row: int = 0
    from_row: int = 0
    together: bool = False


@dataclass(frozen=True)
class Norm:
    """The norm of ``rows`` features."""

    to: int
    source: int
    rows: int
    norm: RowNorm
    to_row: int = 0
    from_row: int = 0
    together: bool = False


@dataclass(frozen=True)
class Attention:
    """softmax(factor * Q K^T) V over the keys and values of a layer's cache, to which those of the new tokens are
    written first. ``heads`` heads of ``depth`` features, kv_heads of keys and values.

    q, k, v: (row of the first head, features from one head to the next) in buffer ``source``. Each query and key is
    normed by q_norm and k_norm, then its first ``turned`` features, in halves a and b, become (a cos - b sin, b cos + a
    sin). cache, mask, table: places in the call; mask -1: a token sees all up to itself.
    """

    to: int
    source: int
    heads: int
    kv_heads: int
    depth: int
    q: tuple[int, int]
    k: tuple[int, int]
    v: tuple[int, int]
    factor: float
    cache: int
    turned: int = 0
    table: int = 0
    mask: int = -1
    q_norm: RowNorm = field(default=_NO_NORM)
    k_norm: RowNorm = field(default=_NO_NORM)
    to_row: int = 0
    together: bool = False


Step = Linear | Norm | Attention


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
        buffers, result, weights, steps = decode_plan("decoder", _VERSION, _STEP_INTS, plan, scalars, _decode)
        return cls(buffers, weights, steps, result)


def _encode(step: Step, scalars: list[float]) -> list[int]:
    def scalar(value: float) -> int:
        scalars.append(value)
        return len(scalars) - 1

    def norm(n: RowNorm) -> list[int]:
        return [n.weight, n.bias, -1 if n.weight < 0 else scalar(n.eps), int(n.centred)]

    if isinstance(step, Linear):
        kind = RowStepKind.LINEAR
        numbers = [step.weight, int(step.add), int(step.gated), step.to_row, step.from_row, step.bias]
        numbers += [ACTIVATION_CODES[step.activation], *norm(step.norm)]
    elif isinstance(step, Norm):
        kind = RowStepKind.NORM
        numbers = [step.rows, step.to_row, step.from_row, *norm(step.norm)]
    elif isinstance(step, Attention):
        kind = RowStepKind.ATTENTION
        numbers = [step.heads, step.kv_heads, step.depth, step.to_row, *step.q, *step.k, *step.v, scalar(step.factor)]
        numbers += [step.turned, step.cache, step.mask, step.table, *norm(step.q_norm), *norm(step.k_norm)]
    else:
        raise TypeError(f"decoder: a step expected one of Linear, Norm, Attention, got {type(step).__name__}")
    numbers = [int(kind), step.to, step.source, int(step.together), *numbers]
    return numbers + [0] * (_STEP_INTS - len(numbers))


def _decode(numbers: tuple[int, ...], scalars: Sequence[float]) -> Step:
    kind, to, source, flag, *rest = numbers
    together = bool(flag)

    def norm(four: Sequence[int]) -> RowNorm:
        weight, bias, eps, centred = four
        return _NO_NORM if weight < 0 else RowNorm(weight, bias, scalars[eps], bool(centred))

    if kind == RowStepKind.LINEAR:
        weight, add, gated, to_row, from_row, bias, activation = rest[:7]
        return Linear(
            to, source, weight, bias, ACTIVATIONS[activation], bool(add), bool(gated), norm(rest[7:11]), to_row,
            from_row, together,
        )  # fmt: skip
    if kind == RowStepKind.NORM:
        rows, to_row, from_row = rest[:3]
        return Norm(to, source, rows, norm(rest[3:7]), to_row, from_row, together)
    if kind == RowStepKind.ATTENTION:
        heads, kv_heads, depth, to_row, q, q_step, k, k_step, v, v_step, factor = rest[:11]
        turned, cache, mask, table = rest[11:15]
        return Attention(
            to, source, heads, kv_heads, depth, (q, q_step), (k, k_step), (v, v_step), scalars[factor], cache, turned,
            table, mask, norm(rest[15:19]), norm(rest[19:23]), to_row, together,
        )  # fmt: skip
    raise ValueError(f"decoder: a step's kind expected one of {[int(k) for k in RowStepKind]}, got {kind}")
