"""How dense and pruned model stand what they were not trained on: typos, missing words, the longest texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..data import Examples
from ..data.corrupt import drop_words, longest, typos
from ..training import evaluate
from .sources import Source

__all__ = ["CONDITIONS", "judge", "robustness_table"]

CONDITIONS: dict[str, Callable[[Examples], Examples]] = {
    "as it is": lambda split: split,
    "typos in 10 % of the words": lambda split: typos(split, 0.1),
    "typos in 30 % of the words": lambda split: typos(split, 0.3),
    "10 % of the words missing": lambda split: drop_words(split, 0.1),
    "30 % of the words missing": lambda split: drop_words(split, 0.3),
    "the longest quarter": lambda split: longest(split, 0.25),
}


def judge(source: Source, dense: nn.Module, pruned: nn.Module, limit: int = 1000) -> dict[str, Any]:
    """Accuracy of both on ``limit`` examples, spread over the test split, under each of ``CONDITIONS``."""
    test = source.data.head(other=limit).test
    found = {}
    for name, change in CONDITIONS.items():
        changed = change(test)
        loader = source.loader(changed, False)
        accuracies = {which: evaluate(m, loader)["accuracy"] for which, m in (("dense", dense), ("pruned", pruned))}
        found[name] = {"examples": len(changed), **accuracies}
    return found


def robustness_table(found: dict[str, Any]) -> str:
    """One line a condition: accuracy dense and pruned, and what each keeps of its own on the test texts as they are."""
    plain = found["as it is"]
    width = max(map(len, found))
    lines = [f"{'test accuracy under':<{width}}   dense  pruned    kept: dense  pruned"]
    for name, entry in found.items():
        kept = [f"{entry[which] / plain[which]:.3f}" if plain[which] else "-" for which in ("dense", "pruned")]
        lines.append(f"{name:<{width}}  {entry['dense']:.4f}  {entry['pruned']:.4f}  {kept[0]:>13}  {kept[1]:>6}")
    return "\n".join(lines)
