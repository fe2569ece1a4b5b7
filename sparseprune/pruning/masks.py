"""MaskSet: which weights of a model are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import ops
from .._files import replacing
from ..nn.filters import FilterFn, prunable_linears

__all__ = ["MaskSet"]

_VERSION = 1


class MaskSet(Mapping[str, Tensor]):
    """fqn of a Linear -> bool mask `[N, K]`, True = kept; read-only. Raises ValueError on masks that are not bool
    `[N, K]`.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for fqn, mask in masks.items():
            if mask.dtype != torch.bool or mask.dim() != 2:
                raise ValueError(f"MaskSet: mask of {fqn!r} expected bool [N, K], got {mask.dtype} {list(mask.shape)}")
        self._masks = dict(masks)

    def __getitem__(self, fqn: str) -> Tensor:
        return self._masks[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} layers, {self.kept} of {self.total} kept)"

    @classmethod
    def from_model(cls, model: nn.Module, filter_fn: FilterFn | None = None) -> MaskSet:
        """The non-zero weights of the Linears selected."""
        return cls({fqn: linear.weight.detach() != 0 for fqn, linear in prunable_linears(model, filter_fn).items()})

    @property
    def kept(self) -> int:
        """The number of weights kept."""
        return sum(int(torch.count_nonzero(mask)) for mask in self._masks.values())

    @property
    def total(self) -> int:
        """The number of weights."""
        return sum(mask.numel() for mask in self._masks.values())

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
            digest.update(_packed(self._masks[fqn]).tobytes())
        return digest.hexdigest()

    def apply_(self, model: nn.Module) -> None:
        """Zeroes the model's weights where the masks are False. ValueError where a layer is missing or of another
        shape.
        """
        for fqn, linear in self.layers_of(model).items():
            mask = self._masks[fqn].to(linear.weight.device)
            with torch.no_grad():
                ops.apply_mask_(linear.weight, mask)

    def layers_of(self, model: nn.Module) -> dict[str, nn.Linear]:
        """fqn -> the model's Linear. ValueError where one is missing or of another shape."""
        modules = dict(model.named_modules())
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
        tensors = {fqn: torch.from_numpy(_packed(mask)) for fqn, mask in self._masks.items()}
        shapes = {fqn: list(mask.shape) for fqn, mask in self._masks.items()}
        header = {"format": "sparseprune-masks", "version": str(_VERSION), "shapes": json.dumps(shapes)}
        with replacing(path) as temporary:
            save_file({fqn: t for fqn, t in tensors.items() if t.numel()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Reads what :meth:`save` wrote. ValueError on another file, version, shape, or a mask_hash that differs."""
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != "sparseprune-masks" or header.get("version") != str(_VERSION):
                raise ValueError(f"MaskSet.load: {path} is no mask file of version {_VERSION}, got {dict(header)}")
            shapes = json.loads(header["shapes"])
            names = set(file.keys())
            masks = {}
            for fqn, shape in shapes.items():
                count = int(np.prod(shape))
                packed = file.get_tensor(fqn).numpy() if fqn in names else np.zeros(0, dtype=np.uint8)
                if packed.dtype != np.uint8 or packed.shape != ((count + 7) // 8,):
                    raise ValueError(f"MaskSet.load: {fqn!r} expected {(count + 7) // 8} bytes, got {packed.shape}")
                bits = np.unpackbits(packed, count=count).astype(bool)
                masks[fqn] = torch.from_numpy(bits.reshape(shape))
        return cls(masks)


def _packed(mask: Tensor) -> np.ndarray:
    return np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1))
