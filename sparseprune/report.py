"""What a model holds, layer by layer: entries kept, layout, and bytes dense and sparse."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .encodings import smallest
from .nn import MaskedLinear, SparseLinear

__all__ = ["LayerSparsity", "SparsityReport", "sparsity_report"]


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
    counted dense. Prints as a table; ``report[name]`` is one layer.
    """

    layers: list[LayerSparsity]
    other_bytes: int
    parameters: int

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
        return "\n".join(lines)


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Every Linear, SparseLinear and MaskedLinear of ``model`` with what it keeps and the bytes of its weight `[N, K]`.

    Sparse bytes are those of the smallest encoding, as :func:`sparseprune.save` writes them without loss. A low-rank
    term counts as kept entries. Tied weights count once.
    """
    layers = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            weight, layout, extra = module.to_layout().to_dense().detach(), module.layout, module.blocksize
            factors = [f for f in (module.low_rank_a, module.low_rank_b) if f is not None]
            counted |= {id(module.values)} | {id(f) for f in factors}
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
    )
