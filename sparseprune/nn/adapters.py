"""peft's wrappers, known by the module their classes come from: which Linears are adapters, and what a wrapped layer is
called.
"""

from __future__ import annotations

from torch import nn

__all__ = ["adapter_reasons", "own_name"]

#: Children of peft's classes that hold the model's own layers; everything else in them belongs to an adapter.
_OWN = frozenset({"base_model", "model", "base_layer", "modules_to_save"})
_ADAPTER = "part of a peft adapter, which is small already; filter_fn chooses it all the same"
_COPY = "peft's copy of the layer before training, which does not run"


def adapter_reasons(model: nn.Module) -> dict[str, str]:
    """fqn -> why it stays, of every Linear that belongs to a peft adapter, or that peft has put aside."""
    modules = dict(model.named_modules())
    wrappers = {fqn for fqn, module in modules.items() if _is_peft(module)}
    reasons: dict[str, str] = {}
    for fqn, module in modules.items() if wrappers else ():
        if not isinstance(module, nn.Linear):
            continue
        # The innermost wrapper decides: a layer of the model may lie within several.
        inside = [name for name in wrappers if name != fqn and (not name or fqn.startswith(name + "."))]
        if not inside:
            continue
        innermost = max(inside, key=len)
        child = fqn[len(innermost) + 1 if innermost else 0 :].partition(".")[0]
        if child == "original_module":
            reasons[fqn] = _COPY
        elif child not in _OWN:
            reasons[fqn] = _ADAPTER
    return reasons


def own_name(model: nn.Module, fqn: str) -> str:
    """The name that a layer has without the peft wrapper it is in: ``classifier`` for ``classifier.base_layer`` and
    ``classifier.modules_to_save.default``.
    """
    parts = fqn.split(".")
    for tail in (1, 2):
        if len(parts) > tail and parts[-tail] in ("base_layer", "modules_to_save"):
            parent = ".".join(parts[:-tail])
            if _is_peft(model.get_submodule(parent)):
                return own_name(model, parent)
    return fqn


def _is_peft(module: nn.Module) -> bool:
    # Some of the model's own classes get a peft base when they are wrapped, so only the class itself counts.
    return type(module).__module__.partition(".")[0] == "peft"
