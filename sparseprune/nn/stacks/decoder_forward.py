"""The forward of a module that loops over decoder layers, with the whole loop as one native call: one program for new
tokens behind those in a cache, one for prompts.

As :mod:`.forward` does it for encoders: the class's own forward runs on a view whose layers are slots, the last of
which runs a program. Whatever neither takes is answered by the layers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ...decoder_program import MOST_ROWS
from ...native.decoder import BoundDecoder, mask_numbers, table_numbers
from ..direct import why_not_direct
from ..rounded import RoundedLinear
from .decoder_build import make_rows
from .decoder_cache import Prompted, Space, is_empty, space_in
from .decoder_parts import DecoderParts, recognise_decoder
from .decoder_prompt import BoundPrompt, cos_and_sin, positions_of, real_tokens_of
from .decoder_proof import prove_decoder, prove_prompt
from .forward import _OUTPUTS, StackForward, _argument_names, _same, _Supported
from .masks import Unsupported, kept
from .recognise import UnknownLayer, check_claimed
from .state import Modules, Ready, StackCall, layers_in

__all__ = ["DecoderForward"]

_WITHOUT_EFFECT = frozenset({"position_ids", "cache_position", "use_cache"})


@dataclass(frozen=True, kw_only=True)
class _Ready(Ready):
    """parts: of every layer; places: of the layers in a cache; most: new tokens, up to which all of them read the
    weights that the program reads; rounded: tokens, up to which some of them read a rounded copy.
    """

    parts: tuple[DecoderParts, ...]
    places: tuple[int, ...]
    most: int
    rounded: int
    prompts: _Prompts


class _Prompts:
    """The program for prompts, made and proven by the first of them, or the reason why there is none. known: those of
    the same layers with other weights.
    """

    def __init__(
        self, layers: Sequence[nn.Module], parts: Sequence[DecoderParts], known: _Prompts | None = None
    ) -> None:
        self._of = layers, parts
        self._proven: bool = known is not None and known._proven
        self._plain: bool = known is not None and known._plain  # also without a mask
        self._made: BoundPrompt | str | None = None
        self._lock = threading.Lock()

    @property
    def refused(self) -> str | None:
        return self._made if isinstance(self._made, str) else None

    def program(self, plain: bool = False) -> BoundPrompt:
        """plain: for calls without a mask. :class:`Unsupported` where there is none."""
        with self._lock:
            if self._made is None or (isinstance(self._made, BoundPrompt) and plain and not self._plain):
                self._made = self._make(plain)
        if isinstance(self._made, str):
            raise Unsupported(self._made)
        return self._made

    def _make(self, plain: bool) -> BoundPrompt | str:
        layers, parts = self._of
        try:
            with torch.no_grad():
                made = BoundPrompt(parts)
                if not self._proven or (plain and not self._plain):
                    self._plain = prove_prompt(layers, parts, made)
        except UnknownLayer as error:
            return f"prompts have no program: {error}"
        self._proven = True
        return made


class DecoderForward(StackForward):
    """``forward`` of the instance ``owner``, which loops over its ModuleList ``name`` of decoder layers.

    The same result as the class's forward, and the same tokens in the cache; but of padding in front of a prompt hidden
    states, keys and values are zero. A program takes calls of up to 16 new tokens, over all sequences, with a
    DynamicCache or a StaticCache that holds the tokens before them, and prompts without a cache or with an empty one.
    ``by_layers``: why layers answer all prompts.
    """

    refused = (*_OUTPUTS, "head_mask", "encoder_hidden_states", "encoder_attention_mask")

    def __init__(
        self, owner: nn.Module, name: str, reader: str | None = None, by_layers: str | None = None
    ) -> None:
        super().__init__(owner, name, reader)
        self.by_layers = by_layers

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "by_layers": self.by_layers}

    def prompts(self) -> BoundPrompt:
        """The program for prompts to the layers as they are now. :class:`Unsupported` where they have to run."""
        found: BoundPrompt = self.ready().prompts.program()
        return found

    def _bind(self, modules: Modules, known: Any) -> Any:
        layers = layers_in(modules)
        parts = tuple(map(recognise_decoder, layers))
        for layer, own in zip(layers, parts):
            check_claimed(layer, [t for n in own.norms for t in (n.weight, n.bias) if t is not None], own.projections)
        if len({(p.hidden, p.kv_heads, p.depth, p.cache, p.mask) for p in parts}) > 1:
            raise UnknownLayer("its layers have different sizes")
        if len({p.place for p in parts}) < len(parts):
            raise UnknownLayer("two of its layers share a place in the cache")
        built, weights = make_rows(parts)
        try:
            program = BoundDecoder(built.tensors, *built.program.encode())
        except (ValueError, TypeError) as error:  # of numbers that a layer has and the program cannot
            raise UnknownLayer(str(error)) from None
        in_tuples = known.in_tuples if known is not None else prove_decoder(layers, parts, program)
        kinds = list(dict.fromkeys(p.kind for p in parts))
        rows = [m.rows for m in modules.root.modules() if isinstance(m, RoundedLinear)]
        return _Ready(
            modules=modules, weights=weights, layers=layers, parts=parts,
            groups=tuple(kinds.index(p.kind) for p in parts), places=tuple(p.place for p in parts),
            most=min([MOST_ROWS, *rows]), rounded=max(rows, default=0),
            prompts=_Prompts(layers, parts, None if known is None else known.prompts), built=built,
            program=program, in_tuples=in_tuples,
            names=_argument_names(type(layers[0])),
        )  # fmt: skip

    def _begin(self, bound: Any, dry: bool) -> Any:
        return _Call(bound, dry, self.by_layers)

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._check_call(args, kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel() > MOST_ROWS and not ids.is_floating_point():
            # before the masks of so many tokens are made twice
            cache = kwargs.get("past_key_values")
            if cache is not None and not is_empty(cache):
                raise Unsupported(_too_many(ids.shape[0], ids.shape[1], MOST_ROWS))
            if self.by_layers is not None:
                raise Unsupported(self.by_layers)
            bound = self._bound
            refused = None if bound is None else bound.prompts.refused
            if refused is not None and bound.modules.same() and bound.weights.fresh():
                raise Unsupported(refused)


class _Call(StackCall):
    def __init__(self, bound: _Ready, dry: bool, by_layers: str | None) -> None:
        super().__init__(bound, dry)
        self._by_layers = by_layers
        self._first: dict[str, Any] = {}
        self._groups: list[tuple[Any, Any] | None] = [None] * (max(bound.groups) + 1)
        self._space: Space | Prompted | None = None

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
        if kwargs.get("is_causal") is False:
            raise Unsupported("its layers get is_causal=False")
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
        cache = self._first.get(bound.parts[0].cache)
        if cache is None or is_empty(cache):
            return self._prompt(hidden, cache)
        if not 0 < batch * tokens <= bound.most:
            raise Unsupported(_too_many(batch, tokens, bound.most))
        parts = bound.parts[0]
        space = space_in(cache, bound.places, batch, tokens, parts.kv_heads, parts.depth)
        eager = bound.modules.eager()
        masks: list[int] = []
        tables: list[int] = []
        held: list[Any] = []  # what is made here lives until the call is over
        for group, known in enumerate(self._groups):
            assert known is not None
            turned = bound.parts[bound.groups.index(group)].turned
            self._check_direct(*known)
            seen = _mask(known[0], batch, tokens, space, eager)
            for numbers, made in (seen, _table(known[1], batch, tokens, turned)):
                (masks if len(numbers) == 4 else tables).extend(numbers)
                held.append(made)
        if self.dry:
            raise _Supported(bound.built)
        result = bound.program(hidden, space.numbers, space.room, space.past, masks, tables)
        self._space = space
        space.commit(tokens)
        return result

    def _prompt(self, hidden: Tensor, cache: Any) -> Tensor:
        bound, (batch, tokens, _) = self.bound, hidden.shape
        if self._by_layers is not None:
            raise Unsupported(self._by_layers)
        if not batch * tokens:
            raise Unsupported("the prompt is empty")
        if batch * tokens <= bound.rounded:
            raise Unsupported(f"dense layers hold rounded copies for calls of up to {bound.rounded} tokens")
        masks, tables = [], []
        for group, known in enumerate(self._groups):
            assert known is not None
            self._check_direct(*known)
            masks.append(known[0])
            tables += positions_of(known[1], batch, tokens, bound.parts[bound.groups.index(group)].turned)
        configs = bound.modules._configs
        if any(getattr(config, "is_causal", True) is False for config in configs):
            raise Unsupported("config.is_causal is False")
        whole = type(cache).__name__ == "StaticCache"
        real = real_tokens_of(masks, batch, tokens, bound.modules.eager(), whole)
        program = bound.prompts.program(tokens > 1 and any(mask is None for mask in masks))
        if self.dry:
            raise _Supported(program.built)
        if cache is None:
            return program(hidden, real, tables)
        first = bound.parts[0]
        prompted = Prompted(cache, bound.places, (batch, first.kv_heads, tokens, first.depth), real is None)
        result = program(hidden, real, tables, prompted.numbers)
        self._space = prompted
        prompted.commit()
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
        keep = kept(mask)
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
    cos, sin = (table.contiguous() for table in cos_and_sin(positions, batch, tokens, turned))
    if cos.shape != sin.shape:
        raise Unsupported(f"expected cos and sin of one shape, got {list(cos.shape)} and {list(sin.shape)}")
    return table_numbers(cos, sin), (cos, sin)
