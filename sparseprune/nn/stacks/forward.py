"""The forward of a module that loops over encoder layers, with the whole loop as one native call.

The module keeps its class, its children and their names; its instance gets a ``forward``. That runs the class's own
forward on a view of the module, in which the list of layers is a list of slots. A slot notes what its layer would be
called with and hands the hidden states on; the last one runs the program. Whatever the program does not take raises
:class:`Unsupported`, and the class's forward runs on the module itself.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ...native.encoder import BoundEncoder
from ..direct import why_not_direct, why_not_native
from ..fusion import keep_attributes_
from ..instance_forward import InstanceForward
from ..unread import Read, check_read
from .build import StackProgram, build
from .masks import Unsupported, real_tokens
from .proof import prove
from .recognise import LayerParts, UnknownLayer, check_claimed, recognise
from .state import IN_TRAINING, Modules, Ready, StackCall, Weights, layers_in

__all__ = ["StackForward", "stack_of"]

# Asked of the module or its config: what the layers would have to give beside their result.
_OUTPUTS = ("output_hidden_states", "output_attentions")
_REFUSED = (*_OUTPUTS, "head_mask", "past_key_values", "encoder_hidden_states", "encoder_attention_mask", "use_cache")
_WITHOUT_EFFECT = frozenset({"position_ids", "cache_position", "output_attentions", "output_hidden_states"})
_MOST_READING = 8  # kinds of calls that may read between layers before all are left to them
_MOST_SWAPS, _FEW = 8, 16  # of called functions, each after fewer calls than this, before all are left to the layers

_SWAPPED = "functions that its layers call by name change time and again; once they stay, densify_ and sparsify_ anew"


@dataclass(frozen=True, kw_only=True)
class _Ready(Ready):
    """every: what its layers are; parts: a layer of each group."""

    every: tuple[LayerParts, ...]
    parts: tuple[LayerParts, ...]


class StackForward(InstanceForward):
    """``forward`` of the instance ``owner``, which loops over its ModuleList ``name``. reader: what behind it reads
    across tokens, padding included.

    The same result as the class's forward, except that hidden states of tokens under the mask are zero where they leave
    the last layer; they cost nothing. Weights that want a gradient are compared with what was packed at every call, a
    pass over their bytes; frozen ones (``model.requires_grad_(False)``) are not. It is left to the layers in training,
    where a gradient is needed, under autocast, in a compiled graph, with hooks on a layer, and with anything else in
    the call that the program does not take: :meth:`why_not` says what.
    """

    refused: tuple[str, ...] = _REFUSED  # arguments that only the layers answer

    def __init__(self, owner: nn.Module, name: str, reader: str | None = None) -> None:
        super().__init__(owner)
        self.name, self.reader = name, reader
        self._lock = threading.Lock()
        self._bound: Any = None
        self._refused: tuple[Modules, str, Any] | None = None  # and what tells whether its tensors are the same
        self._reading: tuple[Any, dict[Any, str]] = None, {}  # what is bound; kinds of calls that read between layers
        self._swaps = self._calls = 0  # of called functions, one soon after the other; calls since the last

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "name": self.name, "reader": self.reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if not torch.compiler.is_compiling():
            if (called := self.called_on()) is not owner:
                return self.run_copy(called, args, kwargs)
            try:
                return self._run(args, kwargs, False)
            except Unsupported:
                pass
        return type(owner).forward(owner, *args, **kwargs)

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        """Why the layers, and not the program, answer this call; None where the program does. Nothing is computed
        beyond what comes before the first layer.
        """
        found = self.answered_by(*args, **kwargs)
        return found if isinstance(found, str) else None

    def answered_by(self, *args: Any, **kwargs: Any) -> StackProgram | str:
        """The program that answers this call, or why the layers do."""
        try:
            self._run(args, kwargs, True)
        except _Supported as supported:
            return supported.built
        except Unsupported as reason:
            return str(reason)
        return "its forward does not run its layers"

    def ready(self) -> Any:
        """The program for the layers as they are now. :class:`Unsupported` where they have to run themselves."""
        why = why_not_native()
        if why is not None:
            raise Unsupported(why)
        if self._swaps >= _MOST_SWAPS:
            raise Unsupported(_SWAPPED)
        bound, stack = self._bound, self.owner._modules[self.name]
        modules = bound.modules if bound is not None else None if self._refused is None else self._refused[0]
        if modules is not None and modules.root is stack and modules.trains():
            raise Unsupported(IN_TRAINING)
        self._calls += 1
        if modules is None or modules.root is not stack or not modules.same():
            assert stack is not None
            if modules is not None and modules.root is stack and not modules.call_the_same():
                self._swaps, self._calls = self._swaps + 1 if self._calls < _FEW else 1, 0
                if self._swaps >= _MOST_SWAPS:
                    raise Unsupported(_SWAPPED)
            modules = Modules(stack)
        why = modules.why_not()
        if why is None and torch.is_grad_enabled() and modules.learns():
            why = "a gradient is needed"
        if why is not None:
            raise Unsupported(why)
        if self._refused is not None and self._refused[0] is modules and self._refused[2] == modules.versions():
            raise Unsupported(self._refused[1])
        if bound is None or bound.modules is not modules or not bound.weights.fresh():
            why = modules.why_not_float32()
            if why is not None:
                raise Unsupported(why)
            return self._rebind(modules)
        return bound

    def _rebind(self, modules: Modules) -> Any:
        with self._lock:
            bound = self._bound
            same = bound is not None and bound.modules.root is modules.root and bound.modules.same()
            if bound is not None and same and bound.weights.fresh():
                return bound  # another thread was first
            known = bound if bound is not None and bound.modules is modules else None
            try:
                with torch.no_grad():
                    self._bound = bound = self._bind(modules, known)
            except UnknownLayer as error:
                self._bound, self._refused = None, (modules, str(error), modules.versions())
                raise Unsupported(str(error)) from None
            if known is None:
                modules.settle()
            self._refused = None
            return bound

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], dry: bool) -> Any:
        owner = self.owner
        self._check_call(args, kwargs)
        bound = self.ready()
        reading = self._reading[1] if self._reading[0] is bound else {}
        if reading and (known := reading.get(_kind_of(args, kwargs))) is not None:
            raise Unsupported(known)
        call = self._begin(bound, dry)
        view: Any = object.__new__(type(owner))
        vars(view).update(vars(owner))
        vars(view).pop("forward", None)
        if isinstance(owner, nn.TransformerEncoder):
            vars(view)["use_nested_tensor"] = False  # the program leaves padding out by itself
        vars(view)[self.name] = [_Slot(call, i, layer) for i, layer in enumerate(call.bound.layers)]
        try:
            result = type(owner).forward(view, *args, **kwargs)
            check_read(result, view, owner)
        except (Unsupported, Read) as error:
            reason = str(error)
            if isinstance(error, Read):
                reason = f"its forward does more between two layers than hand on hidden states: {error.name}"
            if call.done:
                call.undo()
            if call.done or isinstance(error, Read):  # what it did such a call will do again
                self._reading = bound, {**reading, _kind_of(args, kwargs): reason}
                if len(reading) == _MOST_READING:
                    self._bound, self._refused = None, (bound.modules, reason, bound.modules.versions())
            raise Unsupported(reason) from None
        if not call.done:
            raise Unsupported("its forward does not run its layers")
        keep_attributes_(view, owner, "use_nested_tensor", self.name)
        return result

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """:class:`Unsupported` where the module itself is asked for more than its result."""
        for name in self.refused:
            value = kwargs.get(name)
            if value is not None and value is not False:
                raise Unsupported(f"the call has {name}")
        if len(args) > 1:
            for name, value in zip(self._names(), args):
                if name in self.refused and value is not None and value is not False:
                    raise Unsupported(f"the call has {name}")
        config = getattr(self.owner, "config", None)
        if config is not None:
            for name in _OUTPUTS:
                if getattr(config, name, False) and kwargs.get(name) is not False:
                    raise Unsupported(f"config.{name} is set")

    def _bind(self, modules: Modules, known: Any) -> Any:
        return _bind(modules, known)

    def _begin(self, bound: Any, dry: bool) -> Any:
        return _Call(bound, dry, self.reader)

    def _names(self) -> tuple[str, ...]:
        return _argument_names(type(self.owner))


def _kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a call is told beside tensors: the arguments that it gives, and of those that say how, what they say."""
    names = sorted(kwargs)
    values = (v if v is None or type(v) in (bool, int, str) else type(v) for v in chain(args, map(kwargs.get, names)))
    return len(args), *names, *values


def stack_of(module: nn.Module) -> StackForward | None:
    """The stack that runs this module's loop, where there is one."""
    return StackForward.of(module)


class _Supported(Exception):
    """Raised by the last slot instead of running the program ``built``."""

    def __init__(self, built: StackProgram) -> None:
        self.built = built


class _Slot:
    """Stands where a layer stood; attributes are the layer's."""

    __slots__ = ("_call", "_index", "_layer")

    def __init__(self, call: StackCall, index: int, layer: nn.Module) -> None:
        self._call, self._index, self._layer = call, index, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call.layer(self._index, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Call(StackCall):
    def __init__(self, bound: _Ready, dry: bool, reader: str | None) -> None:
        super().__init__(bound, dry)
        self.reader = reader
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]] | None] = [None] * len(bound.parts)

    def _note(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        group = self.bound.groups[index]
        known = self._calls[group]
        if known is None:
            self._calls[group] = args, kwargs
        elif not (
            len(args) == len(known[0])
            and kwargs.keys() == known[1].keys()
            and all(map(_same, chain(args, kwargs.values()), chain(known[0], map(known[1].__getitem__, kwargs))))
        ):
            raise Unsupported("layers of one kind get different arguments")

    def _finish(self, hidden: Any) -> Tensor:
        bound = self.bound
        if type(hidden) is not Tensor or hidden.is_nested or hidden.dim() != 3 or hidden.dtype is not torch.float32:
            plain = isinstance(hidden, Tensor) and not hidden.is_nested
            what = f"{list(hidden.shape)} {hidden.dtype}" if plain else type(hidden).__name__
            raise Unsupported(f"needs hidden states [B, S, D] in float32, got {what}")
        why = why_not_direct(hidden)
        if why is not None:
            raise Unsupported(why)
        first = bound.parts[0].sequence_first
        x = hidden.transpose(0, 1) if first else hidden
        real: Tensor | None = None
        tables: list[Tensor] = []
        for i, (parts, call) in enumerate(zip(bound.parts, self._calls)):
            assert call is not None
            mask, positions = _mask_and_positions(parts, bound.names[1:], *call)
            self._check_direct(mask, positions)
            if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype is torch.bool and bound.modules.eager():
                raise Unsupported("the attention is eager, which adds a bool mask to the scores")
            found = real_tokens(mask, x.shape[0], x.shape[1], parts.window, parts.mask != "src_key_padding_mask")
            if i == 0:
                real = found
            elif not _agree(real, found):
                raise Unsupported("layers of different kinds get masks with different padding")
            if bound.built.tables.get(parts.kind, -1) == len(tables):
                tables += _tables(parts, positions, x.shape[1])
        if real is not None:
            self._look_behind(real)
        if self.dry:
            raise _Supported(bound.built)
        y = bound.program(x, real, tables)
        return y.transpose(0, 1).contiguous() if first else y

    def _look_behind(self, real: Tensor) -> None:
        """:class:`Unsupported` where what stands at padding, zero behind the program, is known to be read: heads read
        the first token, whatever it is.
        """
        if not bool(real[:, :1].all()):
            raise Unsupported("a sequence begins with padding, and heads read the first token")
        if self.reader is not None and not bool(real.all()):
            raise Unsupported(f"there is padding, and {self.reader} reads across tokens")


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    pair = isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right)
    return pair and all(map(is_, left, right))


def _agree(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        rest = right if left is None else left
        return rest is None or bool(rest.all())
    return torch.equal(left, right)


def _mask_and_positions(
    parts: LayerParts, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """(the mask, the tensors that bring positions) of a layer's arguments."""
    mask = positions = None
    wanted = "position_embeddings" if parts.rotary else "position_bias" if parts.biased else None
    for name, value in chain(zip(names, args), kwargs.items()):
        if value is None or value is False:
            continue
        if name == parts.mask:
            mask = value
        elif name == wanted:
            positions = value
        elif name not in _WITHOUT_EFFECT or value is True:
            raise Unsupported(f"its layers get {name}")
    if wanted is not None and positions is None:
        raise Unsupported(f"its layers get no {wanted}")
    return mask, positions


def _tables(parts: LayerParts, positions: Any, length: int) -> list[Tensor]:
    """cos and sin `[S, depth]`, or the bias `[heads, S keys, S queries]`."""
    if parts.rotary:
        if not isinstance(positions, tuple) or len(positions) != 2:
            raise Unsupported("position_embeddings are no pair of cos and sin")
        return [_one_for_all(t, (length, parts.depth)).contiguous() for t in positions]
    return [_one_for_all(positions, (parts.heads, length, length)).transpose(1, 2).contiguous()]


def _one_for_all(table: Any, shape: tuple[int, ...]) -> Tensor:
    """table `[B or 1, *shape]` without its first dimension, where it is the same for every sequence."""
    if type(table) is not Tensor or table.dtype is not torch.float32 or table.shape[1:] != shape:
        raise Unsupported(f"expected positions as float32 [B, {', '.join(map(str, shape))}]")
    if len(table) > 1 and table.stride(0) != 0 and not torch.equal(table, table[:1].expand_as(table)):
        raise Unsupported("the sequences of the batch have positions of their own")
    return table[0] if len(table) else table.new_zeros(shape)  # of no sequence: nothing will be read


def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _bind(modules: Modules, known: _Ready | None) -> _Ready:
    """known: the same modules with other weights, whose program needs no new proof. :class:`UnknownLayer` where the
    layers are not known, or do not compute what was thought.
    """
    layers = layers_in(modules)
    every = [recognise(layer) for layer in layers]
    for layer, parts in zip(layers, every):
        check_claimed(layer, [p for m in parts.norms for p in m.parameters()], parts.projections)
    if len({(p.hidden, p.sequence_first) for p in every}) > 1:
        raise UnknownLayer("its layers have different hidden sizes")
    keys = [(p.kind, p.window, p.rotary, p.biased, p.mask) for p in every]
    order = sorted(set(keys), key=keys.index)
    weights = Weights(every)
    built = build(every)
    try:
        program = BoundEncoder(built.tensors, *built.program.encode())
    except (ValueError, TypeError) as error:
        raise UnknownLayer(str(error)) from None
    weights.packed()
    in_tuples = known.in_tuples if known is not None else prove(layers, every, program)
    return _Ready(
        modules=modules, weights=weights, layers=layers, every=tuple(every),
        parts=tuple(every[keys.index(key)] for key in order), groups=tuple(map(order.index, keys)), built=built,
        program=program, in_tuples=in_tuples, names=_argument_names(type(layers[0])),
    )  # fmt: skip
