"""densify_: every layer an ``nn.Linear`` again."""

from __future__ import annotations

from torch import nn

from ..filters import take_fast_path_
from ..fusion import unfuse_
from ..linear import SparseLinear
from ..packed_only import PackedLinear
from ..replace import replace_
from ..rounded import RoundedLinear
from ..stacks import drop_stacks_
from .reports import DensifyReport

__all__ = ["densify_"]


def densify_(model: nn.Module) -> DensifyReport:
    """Puts an ``nn.Linear`` back in place of every :class:`SparseLinear` and :class:`RoundedLinear`, and undoes the
    fusions.

    The weights are bit-identical to those that were sparsified, except where a low-rank term was added in; the report
    says so. Raises ValueError, nothing changed, on a SparseLinear with an ``activation`` of its own: an ``nn.Linear``
    has none; RuntimeError, nothing changed either, on values that
    ``keep="packed"`` has rounded.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and module.activation != "none":
            raise ValueError(
                f"densify_: {name or 'the model'} expected no activation of its own, got {module.activation!r}, which "
                "an nn.Linear would lose; put layer.to_linear() and the activation's module in its place first"
            )
        if isinstance(module, PackedLinear) and not module.exact:
            module.to_layout()  # which says what is lost
    drop_stacks_(model)
    unfuse_(model)
    take_fast_path_(model)
    replacements: dict[int, nn.Module] = {}
    names, notes = [], {}
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            replacements[id(module)] = module.to_linear()
            names.append(name)
            if module.low_rank_a is not None:
                notes[name] = (
                    f"its low-rank term (rank {module.low_rank_a.shape[0]}) was added to the weight, which is dense now"
                )
        elif isinstance(module, RoundedLinear):
            replacements[id(module)] = module.to_linear()
    replace_(model, replacements)
    return DensifyReport(names, notes)
