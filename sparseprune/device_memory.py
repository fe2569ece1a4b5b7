"""Floor 0: what was made of a weight on a GPU, remembered for the very tensors it was made of.

It is reused as long as those tensors live and nothing can have changed them unseen: the version counter says so, and
for floating-point tensors that no gradient of theirs was computed since, because a fused optimiser's step, which the
counter does not see, follows one. A tensor that wants a gradient is never remembered: ask :func:`may_remember`.

It is made in a thread and on a stream of its own: ``torch.compile`` sends what the calling thread allocates into the
memory of its CUDA graph, which is used again at every replay, and autocast and inference mode belong to a thread, too.
The host waits until it is done, so every stream may read it from then on. A stream that reads it is noted with the
allocator, which then waits for it before the memory is used again. What a CUDA graph has read is kept for the life of
the process: the graph holds addresses, not tensors.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .tensor_state import MemoryState, gradients_so_far, learned_since

__all__ = ["capturing", "forget", "forget_gone", "may_remember", "remembered"]

_LOOKED_AT = 16  # entries that each new one looks at, whether their weight is gone


@dataclass
class _Entry:
    seen: tuple[MemoryState, ...]
    gradients: int | None  # None: made of indices alone, which no optimiser writes
    made: Any
    readers: set[int] = field(default_factory=set)  # streams that the allocator knows of

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        since = self.gradients
        if since is not None and any(t.is_floating_point() and learned_since(since, t) for t in tensors):
            return False
        return all(memory.holds(tensor) for memory, tensor in zip(self.seen, tensors))


_LOCK = threading.RLock()  # a finaliser may run while this thread holds it, and call an op or forget()
_ENTRIES: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
_IN_GRAPHS: list[Any] = []


def capturing(device: torch.device) -> bool:
    """True while the current stream of this device records a CUDA graph: the host may then ask the device nothing."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks of the current device
        return torch.cuda.is_current_stream_capturing()


def may_remember(values: Tensor) -> bool:
    """Whether what is made of these values may be reused: they want no gradient, and their version can be read."""
    return not (values.requires_grad or values.grad is not None or values.is_inference())


def remembered(kind: str, tensors: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
    """What ``make`` gave for these tensors; None where a CUDA graph is being recorded and it was not made before."""
    key = (kind, *((tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) for tensor in tensors))
    recording = capturing(tensors[0].device)
    with _LOCK:
        found = _ENTRIES.get(key)
        if found is not None and found.holds(tensors):
            if recording and not any(kept is found.made for kept in _IN_GRAPHS):
                _IN_GRAPHS.append(found.made)
            _note_reader(_stream(tensors[0]), found)
            return found.made
    if recording:
        return None
    gradients = gradients_so_far() if any(t.is_floating_point() for t in tensors) else None
    seen = tuple(MemoryState(tensor) for tensor in tensors)  # before it is made: a write meanwhile is then noticed
    made = _made_aside(tensors[0], make)
    entry = _Entry(seen, gradients, made)
    _note_reader(_stream(tensors[0]), entry)
    with _LOCK:
        _drop_some()
        _ENTRIES[key] = entry
    return made


def _drop_some() -> None:
    """Drops those whose weight is gone among the next few, in turn: all are looked at before long, none costs much."""
    for _ in range(min(_LOOKED_AT, len(_ENTRIES))):
        key = next(iter(_ENTRIES))
        if any(memory.gone for memory in _ENTRIES[key].seen):
            del _ENTRIES[key]
        else:
            _ENTRIES.move_to_end(key)


def forget_gone() -> None:
    """Drops what was made of weights that are gone."""
    with _LOCK:
        for key in [key for key, entry in _ENTRIES.items() if any(memory.gone for memory in entry.seen)]:
            del _ENTRIES[key]


def _made_aside(tensor: Tensor, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, finished on the tensor's device, from a thread and a stream of its own."""
    current = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None

    def run() -> Any:
        with torch.no_grad(), _on_side_stream(tensor, current) if current else contextlib.nullcontext():
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def forget() -> None:
    """Drops all that was made of weights (strips, transposes, compressed 2:4) but what a CUDA graph reads. To be called
    after writing to frozen weights through ``.data``, which no version counter sees.
    """
    with _LOCK:
        _ENTRIES.clear()


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextlib.contextmanager
def _on_side_stream(tensor: Tensor, current: torch.cuda.Stream) -> Iterator[None]:
    """The side stream of the tensor's device, behind what the caller's stream was given, and done at the end."""
    side = _side_stream(tensor.get_device())
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    side.synchronize()


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _note_reader(stream: int, entry: _Entry) -> None:
    if stream in entry.readers:
        return
    entry.readers.add(stream)
    for tensor in _tensors_in(entry.made):
        _note_stream(tensor)


def _note_stream(tensor: Tensor) -> None:
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _tensors_in(made: Any) -> Iterator[Tensor]:
    """The plain tensors in a tensor, a tensor subclass, a tuple or a dataclass."""
    if isinstance(made, Tensor):
        if type(made) is Tensor:
            yield made
        else:
            names, _ = made.__tensor_flatten__()  # type: ignore[attr-defined]
            for name in names:
                yield from _tensors_in(getattr(made, name))
    elif isinstance(made, tuple):
        for one in made:
            yield from _tensors_in(one)
    elif is_dataclass(made):
        for part in fields(made):
            yield from _tensors_in(getattr(made, part.name))
