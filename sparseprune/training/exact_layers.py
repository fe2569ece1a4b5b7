"""Which layers lose too much by int8: measured on a validation split, with one of them rounded at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..nn.filters import prunable_linears
from ..nn.simulated import SimulatedLinear, check_dtypes, simulate_
from ..nn.stand_in import put_back_
from ..nn.views import trainable_twin
from ..pruning.intake import training_data
from .evaluate import evaluate
from .losses import LossLike

__all__ = ["RoundingReport", "choose_exact_layers"]


@dataclass(frozen=True)
class RoundingReport:
    """What rounding costs on the split that was asked: the loss of the ``exact_loss`` model, with all layers rounded
    (``rounded_loss``), and with all but those named in ``exact`` (``loss``). ``alone``: layer -> the loss with that one
    rounded, empty where all of them together stayed within ``tolerance``. ``left``: those of ``exact`` that could not
    be rounded at all -> why.
    """

    exact_loss: float
    rounded_loss: float
    loss: float
    tolerance: float
    exact: list[str] = field(default_factory=list)
    alone: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def why(self, name: str) -> str:
        """Why this layer of ``exact`` is so."""
        if name in self.left:
            return self.left[name]
        rise = self._share(self.alone[name])
        return f"rounded alone it changes the loss by {rise:+.2%}, place {list(self.alone).index(name) + 1} of all"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _share(self, loss: float) -> float:
        return loss / self.exact_loss - 1 if self.exact_loss else 0.0

    def __str__(self) -> str:
        found = f"rounding all layers changes the validation loss from {self.exact_loss:.4f} to {self.rounded_loss:.4f}"
        lines = [f"{found} ({self._share(self.rounded_loss):+.2%}; up to {self.tolerance:+.2%} is accepted)"]
        lines += [f"stays exact: {name}: {self.why(name)}" for name in self.exact]
        if self.alone:
            lines.append(f"with these exact the loss is {self.loss:.4f} ({self._share(self.loss):+.2%})")
        return "\n".join(lines)


def choose_exact_layers(
    model: nn.Module, loader: Any, loss: LossLike = nn.CrossEntropyLoss, *,
    layers: Iterable[str] | None = None, value_dtype: str = "int8", activations: str = "int8", tolerance: float = 0.01,
    tokenizer: Any = None,
) -> RoundingReport:  # fmt: skip
    """Which Linears of a pruned ``model`` to hand to ``sparsify_(exact_layers=...)``; the model stays as it is.

    loader: batches of the validation split, or its rows (:mod:`~sparseprune.pruning.intake`), read once for the exact
    model, once with all ``layers`` rounded as the kernels round (default: those that are pruned by default). Where the
    loss then is above (1 + ``tolerance``) times the exact one, each layer is rounded alone, and the layers are made
    exact one by one, from the one that costs most, until it is not; that takes up to two more passes a layer.
    ValueError on dtypes that do not go together, a tolerance below 0, an iterator as ``loader``, and a name that is
    none of the model's Linears.
    """
    check_dtypes("choose_exact_layers", value_dtype, activations)
    if not tolerance >= 0:
        raise ValueError(f"choose_exact_layers: tolerance expected >= 0, got {tolerance!r}")
    loader = training_data(loader, model, tokenizer, "choose_exact_layers", again=True)
    model = trainable_twin(model, "choose_exact_layers", pruned=True)  # with the Linears that sparsify_ will find
    names = list(prunable_linears(model, None) if layers is None else layers)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := [name for name in names if name not in linears]:
        raise ValueError(f"choose_exact_layers: expected names of Linears, got {unknown[0]!r}; sparsify_ comes later")

    def measure(rounded: Iterable[str]) -> tuple[float, dict[str, str]]:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(0)
        try:
            left = simulate_(model, rounded, value_dtype, activations)
            return evaluate(model, loader, loss)["loss"], left
        finally:
            put_back_(model, SimulatedLinear)

    exact_loss = measure([])[0]
    rounded_loss, left = measure(names)
    found, alone, exact = rounded_loss, dict[str, float](), list(left)
    limit = exact_loss + tolerance * abs(exact_loss)
    if not rounded_loss <= limit:
        able = [name for name in names if name not in left]
        costs = {name: measure([name])[0] for name in able}
        alone = dict(sorted(costs.items(), key=lambda item: -item[1]))
        for name in alone:
            exact.append(name)
            found = measure([n for n in able if n not in exact])[0]
            if found <= limit:
                break
    return RoundingReport(exact_loss, rounded_loss, found, tolerance, exact, alone, left)
