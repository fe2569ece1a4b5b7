"""MaskSet: which weights of a model are kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import ops
from .._files import replacing
from ..nn.filters import FilterFn, prunable_linears
from ..nn.matrices import shared_linears

__all__ = ["MaskSet"]

_VERSION = 1


@dataclass(frozen=True)
class _Packed:
    """One mask, one bit a weight, row after row."""

    bits: np.ndarray
    shape: torch.Size
    device: torch.device

    @classmethod
    def of(cls, mask: Tensor) -> _Packed:
        flat = mask.detach().cpu().contiguous().numpy().reshape(-1)
        return cls(np.packbits(flat), mask.shape, mask.device)

    def mask(self) -> Tensor:
        bits = np.unpackbits(self.bits, count=self.shape.numel()).view(np.bool_)
        return torch.from_numpy(bits).view(self.shape).to(self.device)

    def kept(self) -> int:
        return int(_ONES[self.bits].sum(dtype=np.int64))


_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class MaskSet(Mapping[str, Tensor]):
    """fqn of a Linear -> bool mask `[N, K]`, True = kept; read-only. Raises ValueError on masks that are not bool
    `[N, K]`.

    Held as one bit a weight: each look-up makes a tensor of its own, on the device the mask came from.
    """

    def __init__(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        self._masks: dict[str, _Packed] = {}
        if isinstance(masks, MaskSet):
            self._masks.update(masks._masks)
            return
        for fqn, mask in masks.items() if isinstance(masks, Mapping) else masks:
            if mask.dtype != torch.bool or mask.dim() != 2:
                raise ValueError(f"MaskSet: mask of {fqn!r} expected bool [N, K], got {mask.dtype} {list(mask.shape)}")
            self._masks[fqn] = _Packed.of(mask)

    def __getitem__(self, fqn: str) -> Tensor:
        return self._masks[fqn].mask()

    @classmethod
    def joined(cls, sets: Iterable[MaskSet]) -> MaskSet:
        """All masks of the sets, in their order, without unpacking them."""
        result = cls({})
        for each in sets:
            result._masks.update(each._masks)
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """The same names, shapes and masks, on whatever devices they came from."""
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._masks.keys() == other._masks.keys() and self.mask_hash() == other.mask_hash()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} layers, {self.kept} of {self.total} kept)"

    @classmethod
    def from_model(cls, model: nn.Module, filter_fn: FilterFn | None = None) -> MaskSet:
        """The non-zero weights of the Linears selected, those among them that hide in other weights (Conv1D, packed
        attention, experts in one tensor), as ``prune_`` finds them.
        """
        linears = prunable_linears(shared_linears(model), filter_fn)
        return cls((fqn, linear.weight.detach() != 0) for fqn, linear in linears.items())

    @property
    def kept(self) -> int:
        """The number of weights kept."""
        return sum(packed.kept() for packed in self._masks.values())

    @property
    def total(self) -> int:
        """The number of weights."""
        return sum(packed.shape.numel() for packed in self._masks.values())

    def shape(self, fqn: str) -> tuple[int, int]:
        """(N, K) of one mask."""
        rows, columns = self._masks[fqn].shape
        return rows, columns

    def kept_of(self, fqn: str) -> int:
        """The number of weights kept in one layer."""
        return self._masks[fqn].kept()

    @property
    def density(self) -> float:
        """kept / total, 1 for no weights at all."""
        return self.kept / self.total if self.total else 1.0

    def mask_hash(self) -> str:
        """SHA-256, hexadecimal, over names, shapes and packed bits, in the order of the names: equal for equal
        masks.
        """
        digest = hashlib.sha256()
        for fqn in sorted(self._masks):
            digest.update(json.dumps([fqn, list(self._masks[fqn].shape)]).encode())
            digest.update(self._masks[fqn].bits.data)
        return digest.hexdigest()

    def apply_(self, model: nn.Module) -> None:
        """Zeroes the model's weights where the masks are False. ValueError where a layer is missing or of another
        shape.
        """
        for fqn, linear in self.layers_of(model).items():
            mask = self[fqn].to(linear.weight.device)
            with torch.no_grad():
                ops.apply_mask_(linear.weight, mask)

    def layers_of(self, model: nn.Module) -> dict[str, nn.Linear]:
        """fqn -> the model's Linear, or one over the memory that it hides in. ValueError where one is missing or of
        another shape.
        """
        modules = dict(shared_linears(model).named_modules())
        found = {}
        for fqn, mask in self._masks.items():
            linear = modules.get(fqn)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"MaskSet: {fqn!r} expected to be a Linear of {type(model).__name__}, got {linear!r}")
            if linear.weight.shape != mask.shape:
                raise ValueError(
                    f"MaskSet: weight of {fqn!r} expected shape {list(mask.shape)}, got {list(linear.weight.shape)}"
                )
            found[fqn] = linear
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, one bit a weight, in one step (a reader sees all of it or nothing)."""
        tensors = {fqn: torch.from_numpy(packed.bits) for fqn, packed in self._masks.items()}
        shapes = {fqn: list(packed.shape) for fqn, packed in self._masks.items()}
        header = {"format": "sparseprune-masks", "version": str(_VERSION), "shapes": json.dumps(shapes)}
        with replacing(path) as temporary:
            save_file({fqn: t for fqn, t in tensors.items() if t.numel()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Reads what :meth:`save` wrote. ValueError on another file, version or shape, and on a damaged file."""
        with _opened(path) as file:
            header = file.metadata() or {}
            if header.get("format") != "sparseprune-masks" or header.get("version") != str(_VERSION):
                raise ValueError(f"MaskSet.load: {path} is no mask file of version {_VERSION}, got {dict(header)}")
            shapes = json.loads(header["shapes"])
            names = set(file.keys())
            loaded = cls({})
            for fqn, shape in shapes.items():
                count = int(np.prod(shape))
                bits = file.get_tensor(fqn).numpy() if fqn in names else np.zeros(0, dtype=np.uint8)
                if bits.dtype != np.uint8 or bits.shape != ((count + 7) // 8,):
                    raise ValueError(f"MaskSet.load: {fqn!r} expected {(count + 7) // 8} bytes, got {bits.shape}")
                if count % 8 and bits[-1] & (0xFF >> count % 8):
                    raise ValueError(f"MaskSet.load: {fqn!r} has bits set behind its last weight")
                loaded._masks[fqn] = _Packed(bits, torch.Size(shape), torch.device("cpu"))
        return loaded


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The file, open; what safetensors says of it names it."""
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        raise IsADirectoryError(f"MaskSet.load: expected a file that MaskSet.save wrote, got the folder {path}")
    try:
        with safe_open(place, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"MaskSet.load: {path} expected to be a file that MaskSet.save wrote, whole, got another or a damaged one: "
            f"{error}"
        ) from None
