"""The repeated blocks of a model, found by structure, and what the model hands to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.modes import evaluating
from ..batches import Batch
from ..positions import Positions, decoder_of
from .store import ChunkStore, release

__all__ = ["Capture", "Stack", "Stopped", "calibrating", "capture", "find_stacks", "run_block"]


class Stopped(Exception):
    """Raised inside a forward pass once all that was wanted has been seen."""


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another, the first output of each being the first input of the next."""

    name: str
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]


def _prefixed(fqn: str, name: str) -> bool:
    return name == "" or fqn == name or fqn.startswith(name + ".")


def find_stacks(model: nn.Module, linears: Mapping[str, nn.Linear]) -> list[Stack]:
    """Outermost ModuleLists whose members share a class, then Sequentials, as far as they hold any of linears.

    Candidates only: `capture` checks on real data that the blocks of a stack do feed each other.
    """
    lists: list[tuple[str, nn.Module]] = []
    sequentials: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        children = list(module.children())
        if not children or not any(_prefixed(fqn, name) and fqn != name for fqn in linears):
            continue
        if isinstance(module, nn.ModuleList) and len({type(c) for c in children}) == 1:
            lists.append((name, module))
        elif isinstance(module, nn.Sequential) and len(children) > 1:
            sequentials.append((name, module))
    chosen: list[tuple[str, nn.Module]] = []
    for name, module in (*lists, *sequentials):
        if not any(_prefixed(name, other) or _prefixed(other, name) for other, _ in chosen):
            chosen.append((name, module))
    return [
        Stack(
            name,
            tuple(f"{name}.{child}" if name else child for child, _ in module.named_children()),
            tuple(module.children()),
        )
        for name, module in chosen
    ]


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without a key/value cache and without the fused paths that bypass Linears; all restored
    after.
    """
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        if use_cache:
            config.use_cache = False  # type: ignore[union-attr]
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]


@dataclass
class Capture:
    """hidden: what enters the first block, a tensor `[B, S, D]` a chunk; positions: the real ones of each chunk;
    `call`: the other arguments of a chunk, for each block.
    """

    hidden: ChunkStore
    calls: ChunkStore
    positions: list[Positions] = field(default_factory=list)
    _entry: list[int] = field(default_factory=list)
    _held: tuple[int, Any] | None = None

    def add(self, hidden: Tensor, call: dict[str, Any], positions: Positions) -> None:
        """One more chunk; arguments equal to those of the chunk before (positions, causal masks) are kept once."""
        if not self._entry or not _same(self.call(len(self._entry) - 1), call, _equal):
            self.calls.append(call)
        self._entry.append(len(self.calls) - 1)
        self.hidden.append(hidden)
        self.positions.append(positions)

    def call(self, chunk: int) -> dict[str, Any]:
        entry = self._entry[chunk]
        if self._held is None or self._held[0] != entry:
            self._held = entry, self.calls[entry]
        return self._held[1]

    def close(self) -> None:
        self.hidden.close()
        self.calls.close()


_PLAIN = (bool, int, float, str, type(None))


def _plain(value: Any) -> Any:
    """Arguments as data; caches and other live objects become None, since one call may not see another's."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value if isinstance(value, _PLAIN) else None


def _one(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _same(a: Any, b: Any, alike: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether two nested arguments are the same, their tensors by alike."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and alike(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y, alike) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], alike) for k in a)
    return type(a) is type(b) and a == b


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
    """The hidden states among a block's arguments, and the rest as {"key", "args", "kwargs"}."""
    if args and isinstance(args[0], Tensor):
        return args[0], {"key": None, "args": _plain(args[1:]), "kwargs": _plain(kwargs)}
    for key in ("hidden_states", *kwargs):
        if not args and isinstance(kwargs.get(key), Tensor):
            rest = {k: v for k, v in kwargs.items() if k != key}
            return kwargs[key], {"key": key, "args": (), "kwargs": _plain(rest)}
    return None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def run_block(block: nn.Module, hidden: Tensor, calls: dict[str, Any], index: int) -> Tensor:
    """hidden `[B, S, D]` through block number index with the arguments its model gave it; returns `[B, S, D]`."""
    call = calls["table"][calls["index"][index]]
    kwargs = dict(call["kwargs"])
    args = tuple(call["args"])
    if call["key"] is None:
        args = (hidden, *args)
    else:
        kwargs[call["key"]] = hidden
    output = _first(block(*args, **kwargs))
    if not isinstance(output, Tensor):
        kind = type(block).__name__
        raise TypeError(f"one-shot pruning: block {kind} returned {type(output).__name__}, expected a tensor first")
    return output


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return None
    with suppress(NotImplementedError):
        found = get()
        return found if isinstance(found, nn.Module) else None
    return None


@dataclass
class _Record:
    """inputs: for each block (hidden states, the other arguments), the hidden states of all but the first block only
    while the blocks are passed over. feeding: each output was the next input; kinds: "tensor", the length of a tuple
    that holds nothing else, or None, for each output.
    """

    inputs: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    feeding: bool = True
    kinds: list[str | int | None] = field(default_factory=list)


def _record(model: nn.Module, stack: Stack, batch: Batch, passing: Callable[[Any], Any] | None) -> _Record | None:
    """What each block is called with, in order, and what it returns; None when the blocks are not called once each in
    order.

    passing: builds a stand-in output from the hidden states, so that the blocks need not be computed. Without it the
    blocks run for real, one output in memory at a time; a language model's head never runs, since its logits may take
    more memory than all the blocks.
    """
    record = _Record()
    order: list[int] = []
    sent: Any = None
    hooks = []
    last = len(stack.blocks) - 1

    def before(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal sent
            order.append(index)
            split = _split(args, kwargs)
            if split is None or order != list(range(len(order))):
                order.append(-1)
                raise Stopped
            hidden = split[0]
            if passing is None and index > 0:
                same = isinstance(sent, Tensor) and sent.shape == hidden.shape and torch.equal(sent, hidden)
                record.feeding &= same or not bool(torch.isfinite(hidden).all())
                sent = None
                split = (hidden.new_empty(0), split[1])
            record.inputs.append(split)
            if passing is not None and index == last:
                raise Stopped

        return hook

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal sent
        first, sent = record.inputs[0][0], _first(output)
        alike = isinstance(sent, Tensor) and sent.shape == first.shape and sent.dtype == first.dtype
        alone = isinstance(output, (tuple, list)) and all(e is None for e in output[1:])
        release()
        record.kinds.append("tensor" if alike and output is sent else len(output) if alike and alone else None)

    def stop(*_: Any) -> None:
        raise Stopped

    saved = []
    try:
        if (head := _head(model)) is not None:
            hooks.append(head.register_forward_pre_hook(stop))
        for i, block in enumerate(stack.blocks):
            hooks.append(block.register_forward_pre_hook(before(i), with_kwargs=True))
            if passing is None:
                hooks.append(block.register_forward_hook(after))
            else:
                saved.append((block, block.__dict__.get("forward")))

                def forward(*args: Any, **kwargs: Any) -> Any:
                    split = _split(args, kwargs)
                    assert split is not None
                    return passing(split[0])

                block.forward = forward
        with suppress(Stopped):
            batch.call(model)
    finally:
        for hook in hooks:
            hook.remove()
        for block, original in saved:
            if original is None:
                del block.forward
            else:
                block.forward = original
    return record if order == list(range(len(stack.blocks))) else None


def capture(
    model: nn.Module, stack: Stack, batches: list[Batch], spill: Any = None
) -> Capture | None:
    """Runs the model up to the stack for every batch and keeps what enters it.

    The first batch runs for real, to see that each block's output is the next one's input; None when it is not (or a
    block is skipped or called twice): such a stack has to be treated as one piece. For the rest the blocks are passed
    over. An error leaves nothing in the folder spill.
    """
    decoder = decoder_of(model)
    result = Capture(ChunkStore(spill), ChunkStore(spill))
    passing: Callable[[Any], Any] | None = None
    with ExitStack() as undo:
        undo.callback(result.close)  # whatever comes in between, the user's interrupt included
        for i, batch in enumerate(batches):
            record = _record(model, stack, batch, passing)
            if record is None or (i == 0 and not record.feeding):
                return None
            if i == 0:
                kind = record.kinds[0]
                if all(k == kind for k in record.kinds):
                    passing = _identity if kind == "tensor" else _tupled(kind) if isinstance(kind, int) else None
            table: list[dict[str, Any]] = []
            index: list[int] = []
            for _, given in record.inputs:
                known = next((t for t, other in enumerate(table) if _same(other, given, _one)), None)
                if known is None:
                    known = len(table)
                    table.append(given)
                index.append(known)
            call = {"table": table, "index": index}
            result.add(record.inputs[0][0].detach(), call, Positions.of(batch, decoder))
            del record, table
            release()
        undo.pop_all()
    return result


def _identity(hidden: Any) -> Any:
    return hidden


def _tupled(length: int) -> Callable[[Any], Any]:
    def passing(hidden: Any) -> Any:
        return (hidden, *([None] * (length - 1)))

    return passing
