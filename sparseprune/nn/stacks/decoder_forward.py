"""The forward of a module that loops over decoder layers, with the whole loop for new tokens as one native call.

As :mod:`.forward` does it for encoders: the class's own forward runs on a view whose layers are slots, the last of
which runs the program. Prompts, and whatever else the program does not take, are answered by the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ...decoder_program import MOST_ROWS
from ...native.decoder import BoundDecoder, mask_numbers, table_numbers
from ..direct import why_not_direct
from ..rounded import RoundedLinear
from .decoder_build import make_rows
from .decoder_cache import Space, space_in
from .decoder_parts import DecoderParts, recognise_decoder
from .decoder_proof import prove_decoder
from .forward import _OUTPUTS, StackForward, _argument_names, _same, _Supported
from .masks import _LOWEST, Unsupported
from .recognise import UnknownLayer
from .state import Modules, Ready, StackCall, layers_in

__all__ = ["DecoderForward"]

_WITHOUT_EFFECT = frozenset({"position_ids", "cache_position", "use_cache"})


@dataclass(frozen=True, kw_only=True)
class _Ready(Ready):
    """parts: of every layer; places: of the layers in a cache; most: new tokens, up to which all of them read the
    weights that the program reads.
    """

    parts: tuple[DecoderParts, ...]
    places: tuple[int, ...]
    most: int


class DecoderForward(StackForward):
    """``forward`` of the instance ``owner``, which loops over its ModuleList ``name`` of decoder layers.

    The same result as the class's forward, and the same tokens in the cache. The program takes calls of up to 16 new
    tokens, over all sequences, with a DynamicCache or a StaticCache that holds the tokens before them.
    """

    refused = (*_OUTPUTS, "head_mask", "encoder_hidden_states", "encoder_attention_mask")

    def _bind(self, modules: Modules, known: Any) -> Any:
        layers = layers_in(modules)
        parts = tuple(map(recognise_decoder, layers))
        if len({(p.hidden, p.kv_heads, p.depth, p.cache, p.mask) for p in parts}) > 1:
            raise UnknownLayer("its layers have different sizes")
        if len({p.place for p in parts}) < len(parts):
            raise UnknownLayer("two of its layers share a place in the cache")
        built, weights = make_rows(parts)
        try:
            program = BoundDecoder(built.tensors, *built.program.encode())
        except ValueError as error:
            raise UnknownLayer(str(error)) from None
        in_tuples = known.in_tuples if known is not None else prove_decoder(layers, parts, program)
        kinds = list(dict.fromkeys(p.kind for p in parts))
        rows = [m.rows for m in modules.root.modules() if isinstance(m, RoundedLinear)]
        return _Ready(
            modules=modules, weights=weights, layers=layers, parts=parts,
            groups=tuple(kinds.index(p.kind) for p in parts), places=tuple(p.place for p in parts),
            most=min([MOST_ROWS, *rows]), built=built, program=program, in_tuples=in_tuples,
            names=_argument_names(type(layers[0])),
        )  # fmt: skip

    def _begin(self, bound: Any, dry: bool) -> Any:
        return _Call(bound, dry)

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._check_call(args, kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel() > MOST_ROWS and not ids.is_floating_point():
            # before the masks of a prompt are made twice
            raise Unsupported(_too_many(ids.shape[0], ids.shape[1], MOST_ROWS))


class _Call(StackCall):
    def __init__(self, bound: _Ready, dry: bool) -> None:
        super().__init__(bound, dry)
        self._first: dict[str, Any] = {}
        self._groups: list[tuple[Any, Any] | None] = [None] * (max(bound.groups) + 1)
        self._space: Space | None = None

    def _note(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self.bound
        if args:
            kwargs = {**dict(zip(bound.names[1:], args)), **kwargs}
        first = self._first
        if index == 0:
            self._first = first = kwargs
            self._check(kwargs)
        parts, group = bound.parts[index], bound.groups[index]
        mine = kwargs.get(parts.mask), kwargs.get("position_embeddings")
        known = self._groups[group]
        if known is None:
            self._groups[group] = mine
        elif mine[0] is not known[0] or not _same(mine[1], known[1]):
            raise Unsupported("layers of one kind get different masks or places")
        if kwargs.keys() != first.keys() or not all(map(is_, kwargs.values(), first.values())):
            varied = {parts.mask, "position_embeddings"}
            if kwargs.keys() != first.keys() or any(kwargs[k] is not first[k] for k in kwargs if k not in varied):
                raise Unsupported("its layers get different arguments")

    def undo(self) -> None:
        if self._space is not None:
            self._space.undo()

    def _check(self, kwargs: dict[str, Any]) -> None:
        parts = self.bound.parts[0]
        known = {parts.mask, parts.cache, "position_embeddings", *_WITHOUT_EFFECT}
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in known:
                raise Unsupported(f"its layers get {name}")

    def _finish(self, hidden: Any) -> Tensor:
        bound = self.bound
        if type(hidden) is not Tensor or hidden.dim() != 3 or hidden.dtype is not torch.float32:
            what = f"{list(hidden.shape)} {hidden.dtype}" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise Unsupported(f"needs hidden states [B, T, D] in float32, got {what}")
        why = why_not_direct(hidden)
        if why is not None:
            raise Unsupported(why)
        batch, tokens, _ = hidden.shape
        if not 0 < batch * tokens <= bound.most:
            raise Unsupported(_too_many(batch, tokens, bound.most))
        parts = bound.parts[0]
        cache = self._first.get(parts.cache)
        space = space_in(cache, bound.places, batch, tokens, parts.kv_heads, parts.depth)
        eager = any(config._attn_implementation == "eager" for config in bound.modules._configs)
        masks: list[int] = []
        tables: list[int] = []
        held: list[Any] = []  # what is made here lives until the call is over
        for group, known in enumerate(self._groups):
            assert known is not None
            turned = bound.parts[bound.groups.index(group)].turned
            seen = _mask(known[0], batch, tokens, space, eager)
            for numbers, made in (seen, _table(known[1], batch, tokens, turned)):
                (masks if len(numbers) == 4 else tables).extend(numbers)
                held.append(made)
        if self.dry:
            raise _Supported
        result = bound.program(hidden, space.numbers, space.room, space.past, masks, tables)
        self._space = space
        space.commit(tokens)
        return result


def _too_many(batch: int, tokens: int, most: int) -> str:
    return f"the call has {batch} x {tokens} new tokens; the program takes 1 to {most}"


def _mask(mask: Any, batch: int, tokens: int, space: Space, eager: bool) -> tuple[tuple[int, ...], Any]:
    """(:func:`mask_numbers`, what they point to). eager: the layers add the mask to the scores."""
    length = space.room if space.whole else space.past + tokens
    if mask is None:
        if tokens > 1 or space.whole:
            raise Unsupported("no mask says what the new tokens see")
        return (0, 0, 0, length), None
    if type(mask) is not Tensor or not mask.is_cpu:
        raise Unsupported(f"the mask is {type(mask).__name__}, not a tensor on the CPU")
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, tokens, length):
        raise Unsupported(f"the mask has shape {list(mask.shape)} for {batch} x {tokens} new tokens and {length} keys")
    if mask.dtype is torch.bool and not eager:
        keep = mask
    elif mask.is_floating_point():
        keep = mask == 0
        if not bool((keep | (mask <= _LOWEST)).all()):
            raise Unsupported("the mask adds more than 0 or minus infinity to the scores")
        if not bool(keep.any(3).all()):  # added to every score alike, it hides nothing from the layers
            raise Unsupported("a token sees nothing")
    else:
        raise Unsupported(f"the mask has dtype {mask.dtype}")
    keep = keep[:, 0].expand(batch, tokens, length)
    if length > 1 and keep.stride(2) != 1:
        keep = keep.contiguous()
    return mask_numbers(keep), keep


def _table(positions: Any, batch: int, tokens: int, turned: int) -> tuple[tuple[int, ...], Any]:
    """(:func:`table_numbers`, what they point to)."""
    if not turned:
        return (0, 0, 0, 0, 0), None
    if not isinstance(positions, tuple) or len(positions) != 2:
        raise Unsupported("its layers get no position_embeddings of cos and sin")
    for table in positions:
        fits = type(table) is Tensor and table.dtype is torch.float32 and table.is_cpu and table.dim() == 3
        if not fits or table.shape[0] not in (1, batch) or table.shape[1:] != (tokens, turned):
            raise Unsupported(f"expected positions as float32 [{batch} or 1, {tokens}, {turned}]")
    cos, sin = (table.contiguous() for table in positions)
    if cos.shape != sin.shape:
        raise Unsupported(f"expected cos and sin of one shape, got {list(cos.shape)} and {list(sin.shape)}")
    return table_numbers(cos, sin), (cos, sin)
