"""Sparse layers without memory yet, of the size that a folder's files give them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import layouts
from ..checkpoint.state import options_of
from ..encodings import check_spec
from ..nn import SparseLinear

__all__ = ["Placeholder", "headers", "placeholder", "spec_of", "spec_tensor"]


def spec_tensor(spec: Mapping[str, Any]) -> Tensor:
    """How a tensor was encoded, as bytes (JSON) that a file of tensors can hold."""
    return torch.tensor(list(json.dumps(dict(spec), sort_keys=True).encode()), dtype=torch.uint8)


def spec_of(tensor: Tensor) -> dict[str, Any]:
    """The inverse; ValueError on anything else."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > 4096:
        raise ValueError(f"spec expected up to 4096 bytes of JSON, got {tensor.dtype} {list(tensor.shape)}")
    try:
        spec = json.loads(bytes(tensor.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"spec expected JSON ({error})") from None
    check_spec(spec)
    return spec


class Placeholder(SparseLinear):
    """A SparseLinear while it is loaded: transformers initialises weights that it misses by the name ``weight``, and is
    told that there is nothing to do.
    """

    @property
    def weight(self) -> Tensor:
        weight = torch.empty(self.out_features, self.in_features, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def done_(self) -> None:
        """From here on it is a SparseLinear like any other."""
        self.__class__ = SparseLinear  # type: ignore[assignment]
        self.repack()


def placeholder(linear: nn.Linear, ran: Mapping[str, Any], held: Mapping[str, list[int]]) -> Placeholder:
    """A layer on the meta device in the place of ``linear``. ``ran``: how it runs; ``held``: the shapes of what the
    files hold of it (see :func:`headers`), which say how much memory it will take.
    """
    rows, columns = linear.out_features, linear.in_features
    dtype = linear.weight.dtype
    empty: layouts.Layout
    values = torch.empty(0, dtype=dtype, device="cpu")
    none = torch.empty(0, dtype=torch.int32, device="cpu")
    size: tuple[int, ...]
    stored = held.get("values::values", [0])[0]
    if ran["layout"] == "nm":
        n, m = ran["nm"]
        size = (rows, columns // m * n)
        places = torch.arange(n, dtype=torch.uint8, device="cpu").repeat(columns // m).expand(size)
        empty = layouts.NM((rows, columns), n, m, torch.empty(1, dtype=dtype, device="cpu").expand(size), places)
    elif ran["layout"] == "bsr":
        r, c = ran["blocksize"]
        crow = torch.zeros(rows // r + 1, dtype=torch.int32, device="cpu")
        empty = layouts.BSR((rows, columns), (r, c), crow, none, values.view(0, r, c))
        size = (stored // (r * c), r, c)
    else:
        crow = torch.zeros(rows + 1, dtype=torch.int32, device="cpu")
        empty = layouts.CSR((rows, columns), crow, none, values)
        size = (stored,)
    rank = held["low_rank_a"][0] if "low_rank_a" in held else None
    layer = Placeholder(
        empty,
        linear.bias,
        low_rank_a=None if rank is None else torch.empty(rank, columns, dtype=dtype, device="meta"),
        low_rank_b=None if rank is None else torch.empty(rows, rank, dtype=dtype, device="meta"),
        **options_of(ran),
    )
    layer.values = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), linear.weight.requires_grad)
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            wanted = {"col_indices": size[:1], "indices": size}.get(name, tuple(buffer.shape))
            layer._buffers[name] = torch.empty(wanted, dtype=buffer.dtype, device="meta")
    layer.train(linear.training)
    return layer


def headers(files: Sequence[str]) -> dict[str, list[int]]:
    """Name -> shape of the tensors of some safetensors files."""
    found: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found
