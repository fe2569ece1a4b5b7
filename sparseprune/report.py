"""What a model holds, layer by layer: entries kept, layout, and bytes dense and sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .encodings import smallest
from .nn import MaskedLinear, SparseLinear
from .nn.other_weights import describe_weights, other_weights

__all__ = ["LayerSparsity", "SparsityReport", "file_report", "sparsity_report"]

_STATE = (
    "layers {layers} are a SparseLinear's own tensors (values and indices), as state_dict() and save_pretrained write "
    "them, their in_features read off the highest index. No from_pretrained reads them: load them by load_state_dict "
    "into the model sparsified the same way, and write it with sparseprune.save"
)


@dataclass(frozen=True)
class LayerSparsity:
    """One weight `[N, K]`. ``layout``: what runs it, or in a file its encoding; bytes of the weight dense and in its
    smallest encoding, without bias.
    """

    name: str
    shape: tuple[int, int]
    nnz: int
    layout: str
    dense_bytes: int
    sparse_bytes: int

    @property
    def density(self) -> float:
        """nnz / (N * K); 1 for an empty weight."""
        return self.nnz / (self.shape[0] * self.shape[1]) if self.shape[0] * self.shape[1] else 1.0


@dataclass(frozen=True)
class SparsityReport:
    """``layers`` in the model's order; ``other_bytes``: everything else the model holds; ``parameters``: all entries,
    counted dense. ``other_weights``: larger weights that are none of the layers, with their share of the parameters,
    which the density does not speak of. ``note``: what else is to be known. Prints as a table; ``report[name]`` is one
    layer.
    """

    layers: list[LayerSparsity]
    other_bytes: int
    parameters: int
    other_weights: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def __getitem__(self, name: str) -> LayerSparsity:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def nnz(self) -> int:
        """Kept entries of all layers."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def total(self) -> int:
        """Entries of all layers, counted dense."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def density(self) -> float:
        """nnz / total; 1 where there are no layers."""
        return self.nnz / self.total if self.total else 1.0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the whole model, dense."""
        return sum(layer.dense_bytes for layer in self.layers) + self.other_bytes

    @property
    def sparse_bytes(self) -> int:
        """Bytes of the whole model, every layer in its smallest encoding."""
        return sum(layer.sparse_bytes for layer in self.layers) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: ``layers`` and the totals."""
        return {
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "density": layer.density} for layer in self.layers
            ],
            "nnz": self.nnz,
            "total": self.total,
            "density": self.density,
            "parameters": self.parameters,
            "other_bytes": self.other_bytes,
            "dense_bytes": self.dense_bytes,
            "sparse_bytes": self.sparse_bytes,
            "other_weights": dict(self.other_weights),
            "note": self.note,
        }

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [6])
        head = f"{'layer':<{width}}  {'shape':>12}  {'kept':>12}  density  {'layout':<8}"
        lines = [f"{head}  {'dense B':>12}  {'sparse B':>12}"]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>12}  {layer.nnz:>12,}  {layer.density:7.4f}  {layer.layout:<8}  "
                f"{layer.dense_bytes:>12,}  {layer.sparse_bytes:>12,}"
            )
        layers_dense = sum(layer.dense_bytes for layer in self.layers)
        layers_sparse = sum(layer.sparse_bytes for layer in self.layers)
        share = layers_sparse / layers_dense if layers_dense else 1.0
        lines.append(
            f"layers: {self.nnz:,} of {self.total:,} kept (density {self.density:.4f}), "
            f"{layers_sparse:,} of {layers_dense:,} bytes ({share:.3f})"
        )
        lines.append(
            f"in all: {self.sparse_bytes:,} of {self.dense_bytes:,} bytes "
            f"({self.sparse_bytes / max(1, self.dense_bytes):.3f}), {self.parameters:,} parameters counted dense"
        )
        lines += [f"not among the layers: {name}: {what}" for name, what in self.other_weights.items()]
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Every Linear, SparseLinear and MaskedLinear of ``model`` with what it keeps and the bytes of its weight `[N, K]`.

    Sparse bytes are those of the smallest encoding, as :func:`sparseprune.save` writes them without loss. A low-rank
    term counts as kept entries. Tied weights count once. Densities are shares in [0, 1] of the layers named alone;
    ``parameters`` counts entries of the whole model. Weights on the meta device are passed over; nothing is changed.
    """
    layers = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            weight, layout, extra = module.held(), module.layout, module.blocksize
            factors = [f for f in (module.low_rank_a, module.low_rank_b) if f is not None]
            counted |= {id(module._parameters.get("values"))} | {id(f) for f in factors}
        elif isinstance(module, nn.Linear):
            if id(module.weight) in counted:
                continue
            weight, extra, factors = module.weight.detach(), None, []
            counted.add(id(module.weight))
            layout = "masked" if isinstance(module, MaskedLinear) else "dense"
        else:
            continue
        if weight.is_meta or weight.dim() != 2:
            continue
        dense_bytes = weight.numel() * weight.element_size()
        more = sum(f.numel() for f in factors)
        encoded, _, _ = smallest(weight, extra=[extra] if extra else [])
        layers.append(
            LayerSparsity(
                name,
                (weight.shape[0], weight.shape[1]),
                int((weight != 0).sum()) + more,
                layout,
                dense_bytes,
                min(dense_bytes, encoded) + more * weight.element_size(),
            )
        )
    others = {id(p): p for p in (*model.parameters(), *model.buffers()) if id(p) not in counted}
    structure = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, SparseLinear | MaskedLinear)
        for buffer in module.buffers(recurse=False)
    }
    other = [p for key, p in others.items() if key not in structure]
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return SparsityReport(
        layers,
        sum(p.numel() * p.element_size() for p in other),
        total + sum(p.numel() for p in other if isinstance(p, nn.Parameter)),
        other_weights(model),
    )


def file_report(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], encodings: Mapping[str, str], kept: Mapping[str, int]
) -> SparsityReport:
    """Of a file: its tensors by name and the bytes of each there; of those encoded sparsely, whose tensors may be on
    the meta device, the encoding and how many entries are not zero. Layers are the matrices called ``weight``, and what
    a state dict holds of a SparseLinear; a low-rank term counts as kept entries, a mask not at all: as
    :func:`sparsity_report` has it.
    """
    layers, taken, sparse = [], set(), []
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "values" and (found := _sparse_layer(prefix, tensors)) is not None:
            layer, parts = found
            sparse.append(layer.name)
        elif last == "weight" and tensor.dim() == 2:
            dense_bytes, nnz = tensor.numel() * tensor.element_size(), kept.get(name)
            if nnz is None:
                nnz = int(torch.count_nonzero(tensor))
            shape = (tensor.shape[0], tensor.shape[1])
            layer = LayerSparsity(prefix, shape, nnz, encodings.get(name, "dense"), dense_bytes, sizes[name])
            parts = [name]
        else:
            continue
        beside = {own: f"{prefix}.{own}" if prefix else own for own in ("low_rank_a", "low_rank_b", "mask")}
        factors = [beside["low_rank_a"], beside["low_rank_b"]]
        if all(factor in tensors for factor in factors):
            more, stored = sum(tensors[f].numel() for f in factors), sum(sizes[f] for f in factors)
            layer = replace(layer, nnz=layer.nnz + more, sparse_bytes=layer.sparse_bytes + stored)
            parts += factors
        mask = tensors.get(beside["mask"])
        if mask is not None and mask.dtype == torch.bool and tuple(mask.shape) == layer.shape:
            parts.append(beside["mask"])
        layers.append(layer)
        taken.update(parts)
    left = {name: t for name, t in tensors.items() if name not in taken}
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers) + sum(t.numel() for t in left.values())
    weights = [(name, tuple(t.shape), "") for name, t in left.items() if t.dim() >= 2]
    return SparsityReport(
        layers,
        sum(t.numel() * t.element_size() for t in left.values()),
        total,
        describe_weights(weights, total),
        _STATE.format(layers=", ".join(sparse[:3]) + (f" and {len(sparse) - 3} more" if len(sparse) > 3 else ""))
        if sparse
        else "",
    )


def _sparse_layer(prefix: str, tensors: Mapping[str, Tensor]) -> tuple[LayerSparsity, list[str]] | None:
    """The layer whose values are called ``prefix.values``, and the names of its tensors; None where they are no
    SparseLinear's.
    """
    parts = ("values", "crow_indices", "col_indices", "indices")
    names = {part: f"{prefix}.{part}" if prefix else part for part in parts}
    found = {part: tensors[name] for part, name in names.items() if name in tensors}
    values = found["values"]
    if any(t.is_meta or (part != "values" and (t.is_floating_point() or t.dim() == 0)) for part, t in found.items()):
        return None
    if set(found) == {"values", "crow_indices", "col_indices"} and values.dim() in (1, 3):
        r, c = (1, 1) if values.dim() == 1 else (values.shape[1], values.shape[2])
        col = found["col_indices"]
        shape = ((len(found["crow_indices"]) - 1) * r, (int(col.max()) + 1 if len(col) else 0) * c)
        layout = "csr" if values.dim() == 1 else f"bsr{r}x{c}"
    elif set(found) == {"values", "indices"} and values.dim() == 2 and found["indices"].shape == values.shape:
        n, m = _pattern(found["indices"])
        shape = (values.shape[0], values.shape[1] // n * m)
        layout = f"nm{n}:{m}"
    else:
        return None
    dense_bytes = shape[0] * shape[1] * values.element_size()
    stored = sum(t.numel() * t.element_size() for t in found.values())
    layer = LayerSparsity(prefix, shape, int(torch.count_nonzero(values)), layout, dense_bytes, stored)
    return layer, [names[part] for part in found]


def _pattern(indices: Tensor) -> tuple[int, int]:
    """(n, m) of places within their groups of m, `[N, K / m * n]`: they rise within a group. m: a power of two."""
    m = 1 << int(indices.max()).bit_length() if indices.numel() else 1
    for n in range(min(m, indices.shape[1]), 1, -1):
        if indices.shape[1] % n == 0:
            groups = indices.view(len(indices), -1, n).int()
            if bool((groups[:, :, 1:] > groups[:, :, :-1]).all()):
                return n, m
    return 1, m
