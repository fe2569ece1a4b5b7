"""Floor 0: whether a tensor is what it was, and so whether what was made of it may be used again.

Address and version counter do not identify a tensor: fused optimisers, writes through ``.data``, other processes and
inference tensors leave the counter alone, and memory is used again. So what was made of a tensor is reused without a
look at its bytes only where nothing could have changed them unseen, and else where their fingerprint agrees.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ._native import require_c

__all__ = [
    "Cached",
    "MemoryState",
    "TensorState",
    "TensorStates",
    "cached_by",
    "fingerprint",
    "gradients_at",
    "gradients_so_far",
    "learned_since",
    "note_gradients",
    "note_sampled",
    "place_of",
    "unchanged",
]

T = TypeVar("T")

_version, _learns, _grad = attrgetter("_version"), attrgetter("requires_grad"), attrgetter("grad")

_gradients = 0  # how often the gradient of sparse values was computed in this process
_anywhere = 0  # what that was when nobody could say of which values
_learned: dict[int, int] = {}  # part of a place -> what it was when the gradient of the values there was computed
_MOST_KNOWN = 1 << 16
_thread = threading.local()


def place_of(tensor: Tensor) -> tuple[int, ...]:
    """What identifies its memory: the storage, which sharding moves about, and the address, which an alias shares.
    Empty where it has none of its own: while it is traced, inside a transform, for other kinds of tensor.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return ()
    return tensor.untyped_storage()._cdata, tensor.data_ptr()


def note_gradients(place: tuple[int, ...] = ()) -> None:
    """Says that the values at this :func:`place_of`, or, without one, any, may be about to change: an optimiser's step
    follows their gradient, and a fused one is not seen by the version counter. Weights frozen then are looked at again.
    """
    global _gradients, _anywhere
    _gradients += 1
    if not place or len(_learned) > _MOST_KNOWN:
        _anywhere = _gradients
        _learned.clear()
    _learned.update(dict.fromkeys(place, _gradients))


def note_sampled() -> None:
    """:func:`note_gradients` by the op that computes a gradient and knows not of which values, unless its caller does,
    inside :func:`gradients_at`.
    """
    if not getattr(_thread, "known", False):
        note_gradients()


@contextmanager
def gradients_at(place: tuple[int, ...]) -> Iterator[None]:
    """Within it this thread computes the gradient of the values there."""
    _thread.known = True
    try:
        yield
    finally:
        _thread.known = False
        note_gradients(place)


def gradients_so_far() -> int:
    """How often :func:`note_gradients` was called in this process."""
    return _gradients


def learned_since(gradients: int, tensor: Tensor) -> bool:
    """Whether a gradient that may be this tensor's was computed after :func:`gradients_so_far` was ``gradients``."""
    if gradients == _gradients:
        return False
    last = [_anywhere, *(_learned.get(part, 0) for part in place_of(tensor))]
    return len(last) == 1 or max(last) > gradients


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and 64 bits of all bytes of a CPU tensor: a pass at about the speed of memory."""
    if tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.detach().resolve_neg().contiguous()
    return tensor.shape, tensor.dtype, require_c().fingerprint(tensor.data_ptr(), tensor.nbytes)


class TensorState:
    """A tensor as it was at one moment.

    weak: hold the tensor by a weak reference, for caches that outlive it. A strong one keeps its memory, and so its
    address, and lets ``torch.utils.swap_tensors`` take it, which refuses tensors with weak references.

    always: compare the bytes of frozen ones too. For weights of modules that others made: their owners know of no
    repack, and write through ``.data`` as they like, as peft does where it merges an adapter.
    """

    __slots__ = ("_always", "_print", "_trusted", "_weak")

    def __init__(self, tensor: Tensor, weak: bool = False, always: bool = False) -> None:
        self._weak, self._always = weak, always
        self._note(tensor, fingerprint(tensor))

    def _note(self, tensor: Tensor, found: tuple[Any, ...]) -> None:
        self._print = found
        # Trusted: the very tensor, at this version, and where it could learn, at its address and with no gradient
        # computed anywhere since. None where it may change unseen: it learns, its version cannot be read, or other
        # processes write to it.
        self._trusted: tuple[Any, int, int | None, int, object] | None = None
        learns = tensor.requires_grad or tensor.grad is not None
        if self._always or learns or tensor.is_inference() or tensor.is_shared():
            return
        same, memory = (weakref.ref(tensor), None) if self._weak else (tensor, tensor.untyped_storage())
        address = tensor.data_ptr() if tensor.is_floating_point() else None
        self._trusted = same, tensor._version, address, _gradients, memory

    def unchanged(self, tensor: Tensor) -> bool:
        """Whether this tensor holds what the one noted held."""
        trusted = self._trusted
        if trusted is not None:
            same, version, address, gradients, _ = trusted
            if (
                (same() if self._weak else same) is tensor
                and (
                    address is None
                    or (
                        not tensor.requires_grad
                        and tensor.data_ptr() == address
                        and gradients == _gradients
                        and tensor.grad is None
                    )
                )
                and tensor._version == version
            ):
                return True
        found = fingerprint(tensor)
        if found != self._print:
            return False
        self._note(tensor, found)
        return True


class TensorStates:
    """Many tensors as they were at one moment, asked for at every call of a fast path: those that nothing changes
    unseen all at once, in loops that run in C, the others one by one.
    """

    def __init__(self, tensors: Sequence[Tensor], always: Collection[int] = ()) -> None:
        """always: the ids of those whose bytes are compared though they are frozen."""
        self._tensors = list(tensors)
        self._states = [TensorState(t, always=id(t) in always) for t in self._tensors]
        self._sort()

    def _sort(self) -> None:
        pairs = list(zip(self._states, self._tensors))
        frozen = [t for s, t in pairs if s._trusted is not None]
        self._others = [(s, t) for s, t in pairs if s._trusted is None]
        self._frozen, self._versions = frozen, list(map(_version, frozen))
        self._floats = [t for t in frozen if t.is_floating_point()]
        self._addresses = list(map(Tensor.data_ptr, self._floats))
        self._gradients = _gradients

    def unchanged(self) -> bool:
        """Whether all of them hold what they held."""
        trusted = (
            list(map(_version, self._frozen)) == self._versions
            and list(map(Tensor.data_ptr, self._floats)) == self._addresses
            and not any(map(_learns, self._floats))
            and not any(grad is not None for grad in map(_grad, self._floats))
            and _gradients == self._gradients
        )
        asked = self._others if trusted else list(zip(self._states, self._tensors))
        if not all(state.unchanged(tensor) for state, tensor in asked):
            return False
        if any(state._trusted is not None for state, _ in asked):
            self._sort()  # some were frozen since
        return True


class MemoryState:
    """A tensor's memory at one moment, where its bytes are too far away to be looked at, as on a GPU: the same storage,
    offset, shape and version are taken for the same content. Holds the tensor by nothing.

    A freed storage is never taken for the next one at its address. Inference tensors, whose version cannot be read,
    count as frozen.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._state = self._state_of(tensor)

    @staticmethod
    def _state_of(tensor: Tensor) -> tuple:
        version = -1 if tensor.is_inference() else tensor._version
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), version

    def holds(self, tensor: Tensor) -> bool:
        return not self._storage.expired() and self._state == self._state_of(tensor)

    @property
    def gone(self) -> bool:
        return bool(self._storage.expired())


class Cached(Generic[T]):
    """One thing made of tensors, and made again once they hold something else. Copies and pickles are empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # many threads may ask at once; it is made once
        self._found: tuple[tuple[TensorState, ...], T] | None = None

    def of(self, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """What ``make`` gives of these tensors."""
        found = self._found
        if found is None or not unchanged(found[0], tensors):
            with self._lock:
                found = self._found
                if found is None or not unchanged(found[0], tensors):
                    # TensorState before it is made: a write meanwhile is then noticed by the next call.
                    self._found = found = tuple(TensorState(t) for t in tensors), make()
        return found[1]

    @property
    def made(self) -> T | None:
        """What was made last, stale or not."""
        return None if self._found is None else self._found[1]

    def drop(self) -> None:
        """Forgets what was made."""
        self._found = None

    def __reduce__(self) -> tuple:
        return type(self), ()


def unchanged(states: tuple[TensorState, ...], tensors: tuple[Tensor, ...]) -> bool:
    """Whether each tensor holds what the one in its place held."""
    return all(map(TensorState.unchanged, states, tensors))


_LOCK = threading.RLock()  # a weak reference may die, and call forget, while this thread holds it
_MADE: OrderedDict[tuple, tuple[tuple[weakref.ref, ...], tuple[TensorState, ...], Any]] = OrderedDict()
_MOST_MADE = 256


def cached_by(key: tuple, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
    """What ``make`` gives, kept for these very tensors until one dies or holds something else."""
    key = (*key, *(id(t) for t in tensors))
    with _LOCK:
        found = _MADE.get(key)
        if found and all(ref() is t for ref, t in zip(found[0], tensors)) and unchanged(found[1], tensors):
            _MADE.move_to_end(key)
            return found[2]
    states = tuple(TensorState(t, weak=True) for t in tensors)
    made = make()

    def forget(_: object, lock: threading.RLock = _LOCK, kept: OrderedDict = _MADE) -> None:  # outlives the module
        with lock:
            kept.pop(key, None)

    with _LOCK:
        _MADE[key] = (tuple(weakref.ref(t, forget) for t in tensors), states, made)
        while len(_MADE) > _MOST_MADE:
            _MADE.popitem(last=False)
    return made
