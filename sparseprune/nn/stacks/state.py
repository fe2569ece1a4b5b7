"""What a program was built from, and whether it is that still: asked at every call, so the loops run in C. And what a
call of it keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ...tensor_state import TensorStates
from ..direct import is_plain, why_not_direct
from ..fusion import FusedActivations
from ..linear import SparseLinear
from ..unread import unread
from .build import StackProgram
from .functions import CalledFunctions
from .masks import Unsupported
from .recognise import LayerParts, UnknownLayer
from .weights import Generations

__all__ = ["IN_TRAINING", "Modules", "Ready", "StackCall", "StackWeights", "Weights", "layers_in"]

IN_TRAINING = "a module inside is in training mode"

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ATTENTION = (None, "sdpa", "eager")  # implementations that compute softmax(QK)V of the mask they are given
_training = itemgetter("training")


class Modules:
    """The modules of a stack, all below ``root``, as they were."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules = list(root.modules())
        self._classes = list(map(type, self._modules))
        self._dicts = [vars(m) for m in self._modules]
        self._children = [d["_modules"] for d in self._dicts]
        self._parameters = [d["_parameters"] for d in self._dicts]
        self._buffers = [d["_buffers"] for d in self._dicts]
        self._hooks = [d[name] for d in self._dicts for name in _HOOKS]
        self._child = list(self._now(self._children))
        self._parameter = list(self._now(self._parameters))
        self._buffer = list(self._now(self._buffers))
        self._held = [t for t in chain(self._parameter, self._buffer, self._now(self._dicts)) if isinstance(t, Tensor)]
        self._then = [dict(d) for d in self._children]
        # Numbers and names that layers compute with, such as the eps of a norm, and the dicts above.
        self._attributes = [{**d, "training": False} for d in self._dicts]
        configs = {id(c): c for d in self._dicts if (c := d.get("config")) is not None}
        self._configs = [c for c in configs.values() if hasattr(c, "_attn_implementation")]
        self._attention = list(map(_attention_of, self._configs))
        self._called = CalledFunctions(dict.fromkeys(self._classes), filter(None, self._attention))
        self._beside: list[Tensor] = []
        self._tensors: TensorStates | None = None

    def settle(self) -> None:
        """To be called once layers and program are known to agree: from then on the tensors that are no parameters and
        no weights of ours, buffers and others, are to hold what they hold, for the program has no place for them.
        """
        own = [d for m, d in zip(self._modules, self._dicts) if not isinstance(m, SparseLinear)]
        held = chain(self._now([d["_buffers"] for d in own]), self._now(own))
        self._beside = list({id(t): t for t in held if isinstance(t, Tensor) and is_plain(t)}.values())
        self._tensors = TensorStates(self._beside) if self._beside else None

    def learns(self) -> bool:
        """Whether a parameter, or a tensor in the place of one, wants a gradient."""
        return any(t is not None and t.requires_grad for t in chain(self._parameter, self._beside))

    def versions(self) -> tuple[tuple[int, int], ...] | None:
        """What changes with the tensors while these are the :meth:`same`; None where that cannot be told."""
        try:
            return tuple((t.data_ptr(), t._version) for t in self._held)
        except RuntimeError:  # of inference mode, or without memory
            return None

    def why_not_float32(self) -> str | None:
        """Which parameter is no float32 tensor on the CPU."""
        for p in self._parameter:
            if p is not None and (type(p) is not nn.Parameter or p.dtype is not torch.float32 or not p.is_cpu):
                return f"needs float32 parameters on the CPU, got {type(p).__name__}, {p.dtype} on {p.device}"
        return None

    @staticmethod
    def _now(dicts: list[dict[str, Any]]) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, dicts))

    def call_the_same(self) -> bool:
        """Whether the forwards call what they called."""
        return self._called.same()

    def same(self) -> bool:
        """Whether these are the children, parameters and buffers still, by identity and in number, of modules in eval
        with the classes and attributes that they had, whose forwards call what they called, and whose tensors hold what
        they held.
        """
        return (
            self._children == self._then
            and _all_is(self._now(self._parameters), self._parameter)
            and _all_is(self._now(self._buffers), self._buffer)
            and all(map(is_, map(type, self._modules), self._classes))
            and self._called.same()
            and all(map(is_, map(_attention_of, self._configs), self._attention))
            and self._same_attributes()
            and (self._tensors is None or self._tensors.unchanged())
        )

    def _same_attributes(self) -> bool:
        try:
            return self._dicts == self._attributes  # in C, by identity first
        except (RuntimeError, ValueError):  # a tensor that is compared with another one has no truth
            return False

    def eager(self) -> bool:
        """Whether an attention adds its mask to the scores, whatever its dtype."""
        return any(config._attn_implementation == "eager" for config in self._configs)

    def trains(self) -> bool:
        """Whether one of these modules is in training mode, and each still where it was."""
        return any(map(_training, self._dicts)) and _all_is(self._now(self._children), self._child)

    def why_not(self) -> str | None:
        """What about the modules stands against running past them."""
        if any(map(_training, self._dicts)):
            return IN_TRAINING
        if nn_module._has_any_global_hook():
            return "a global module hook is set"
        if any(self._hooks) and any(_active(hook) for hooks in self._hooks for hook in hooks.values()):
            return "a hook observes a module inside"
        replaced = [d["forward"] for d in self._dicts if "forward" in d]
        if any(not isinstance(forward, FusedActivations) for forward in replaced):
            return "the forward of a module inside was replaced"
        for config in self._configs:
            if config._attn_implementation not in _ATTENTION:
                return f"attention runs as {config._attn_implementation!r}"
        return None


def _attention_of(config: Any) -> Any:
    """What transformers has registered as the attention that this configuration names."""
    module = sys.modules.get("transformers.modeling_utils")
    functions = getattr(module, "ALL_ATTENTION_FUNCTIONS", None)
    return None if functions is None else functions.get(config._attn_implementation)


def _all_is(now: Iterator[Any], then: list[Any]) -> bool:
    end = object()
    return all(map(is_, now, then)) and next(now, end) is end


def _active(hook: Any) -> bool:
    """False for the hook by which transformers records hidden states, while nothing is being recorded."""
    module = sys.modules.get("transformers.utils.output_capturing")
    if module is None or getattr(hook, "__module__", None) != module.__name__:
        return True
    collector = getattr(module, "_active_collector", None)
    return collector is None or bool(collector.get())


def layers_in(modules: Modules) -> tuple[nn.Module, ...]:
    """The layers of a stack, of one class. :class:`UnknownLayer` where they are not."""
    layers: tuple[nn.Module, ...] = tuple(modules.root._modules.values())  # type: ignore[arg-type]
    if not layers:
        raise UnknownLayer("it has no layers")
    if len({type(layer) for layer in layers}) > 1:
        raise UnknownLayer("its layers are of several classes")
    return layers


class StackWeights:
    """The parameters of a stack as they were: ``copied`` into packed forms, or ``read`` where they lie. Of the copied
    ones, those whose id is in ``always`` are compared at every call.

    :mod:`sparseprune.tensor_state` says when a copy is trusted; what is read must only lie where, and as, it lay.
    """

    def __init__(
        self, sparse: Sequence[SparseLinear], read: Iterable[Tensor | None], copied: Iterable[Tensor], always: set[int]
    ) -> None:
        self._sparse = sparse
        self._read = list({id(t): t for t in read if t is not None}.values())
        self._addresses = list(map(Tensor.data_ptr, self._read))
        self._strides = list(map(Tensor.stride, self._read))
        self._generations = Generations(())
        self._copied = TensorStates(list({id(t): t for t in copied}.values()), always)

    def packed(self) -> Self:
        """To be called once the packed forms are there."""
        self._generations = Generations(self._sparse)
        return self

    def fresh(self) -> bool:
        """Whether all of them hold what they held. For the tensors; that they are still the modules' own is for
        :meth:`Modules.same` to say.
        """
        if not self._generations.same() or list(map(Tensor.data_ptr, self._read)) != self._addresses:
            return False
        if list(map(Tensor.stride, self._read)) != self._strides:
            return False
        return self._copied.unchanged()


class Weights(StackWeights):
    """Those of an encoder, whose program reads no weight where it lies; dense ones are compared at every call."""

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        modules = {id(p.module): p.module for layer in layers for p in layer.projections}
        norms = [n for layer in layers for n in (layer.attention_norm, layer.ffn_norm) if n is not None]
        biases = [p.bias for layer in layers for p in layer.projections if p.bias is not None]
        # A part of a bias is copied; a whole one is read.
        sliced = [p for layer in layers for p in layer.projections if p.bias is not None and p.outputs != len(p.bias)]
        dense: list[Tensor] = [p.bias for p in sliced if p.bias is not None]
        copied: list[Tensor] = []
        for module in modules.values():
            if isinstance(module, SparseLinear):
                copied += module.sources()
            else:
                packed = isinstance(module, nn.MultiheadAttention)
                dense.append(getattr(module, "in_proj_weight" if packed else "weight"))
        read = biases + [t for n in norms for t in (n.weight, n.bias) if isinstance(t, Tensor)]
        sparse = [m for m in modules.values() if isinstance(m, SparseLinear)]
        super().__init__(sparse, read, copied + dense, {id(t) for t in dense})


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A program bound to its tensors. groups: for each layer, which call it shares; in_tuples: layers give tuples;
    names: of a layer's arguments, the hidden states first.
    """

    modules: Modules
    weights: StackWeights
    layers: tuple[nn.Module, ...]
    groups: tuple[int, ...]
    built: StackProgram
    program: Any
    in_tuples: bool
    names: tuple[str, ...]


class StackCall:
    """One call of a stack: what its layers were to get, and the result."""

    def __init__(self, bound: Any, dry: bool) -> None:
        self.bound, self.dry = bound, dry
        self.done, self._next = False, 0
        self._given: Any = None  # to the first layer, and what stands for it between the others
        self._between: Any = None

    def layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer ``index`` gives: something to hand on, or behind the last one the result."""
        bound = self.bound
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop(bound.names[0], None)
        if index != self._next or (index and hidden is not self._between):
            raise Unsupported("its forward does more between two layers than hand on hidden states")
        if index == 0:
            self._given = hidden
            self._between = unread(hidden) if isinstance(hidden, Tensor) else None
        if len(args) >= len(bound.names):
            raise Unsupported("its layers get more arguments than they name")
        self._next = index + 1
        self._note(index, args, kwargs)
        result = self._between
        if self._next == len(bound.layers):
            result = self._finish(self._given)
            self.done = True
        return (result,) if bound.in_tuples else result

    def _check_direct(self, mask: Any, places: Any) -> None:
        """:class:`Unsupported` where a gradient or a mode wants a layer's mask or the tensors of its places."""
        places = places if isinstance(places, tuple) else (places,)
        why = why_not_direct(*(t for t in (mask, *places) if isinstance(t, Tensor)))
        if why is not None:
            raise Unsupported(why)

    def undo(self) -> None:
        """Takes back what the program changed beside its result."""

    def _note(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the layer ``index`` was to get beside the hidden states. :class:`Unsupported` where the program
        has no place for it.
        """
        raise NotImplementedError

    def _finish(self, hidden: Any) -> Tensor:
        raise NotImplementedError
