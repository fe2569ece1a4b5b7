"""What runs as soon as another library is imported, without importing it: the hook by which transformers learns our
format. Knows nothing of torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["watch"]

# Module of another library -> ours, whose ``register()`` is called once that one is there.
_AWAITED = {
    "transformers.modeling_utils": "sparseprune.integrations.quantizer",
    "peft.tuners.lora.model": "sparseprune.integrations.peft",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find an awaited module, and has ours follow its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _AWAITED:
            return None
        for finder in sys.meta_path:
            found = None if isinstance(finder, _Finder) else finder.find_spec(name, path, target)
            if found is not None and found.loader is not None:
                loader: Any = found.loader
                loader.exec_module = _followed(loader.exec_module)
                return found
        return None


def _followed(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def run(module: ModuleType) -> None:
        execute(module)
        _register(module.__name__)

    return run


def watch() -> None:
    """Registers our forms with the libraries that are imported already, and with the others when they are. Also the
    entry point of ``torch.backends``, which torch calls when it is imported: a program that never imports sparseprune
    (a command of another library, say) can read our folders too.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _AWAITED:
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _register(name)


def _register(name: str) -> None:
    ours = importlib.import_module(_AWAITED[name])
    if not getattr(getattr(ours, "__spec__", None), "_initializing", False):  # else it registers at its own end
        ours.register()
