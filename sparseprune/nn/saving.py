"""Other libraries' own saving, which writes the tensors of a sparse layer under names that their loading does not know
and passes over: while a model holds one, it writes a form that their loading was taught, or refuses.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

__all__ = ["OWN_FORMS", "guard_saving", "is_taught", "mark_unlike_", "unmark_unlike_"]

# Module that must have been imported -> its class, and the methods of it that write weights. PeftModel is not among
# them, nor a transformers model with adapters: they write the adapters only.
_WRITERS = {
    "transformers.modeling_utils": ("PreTrainedModel", ("save_pretrained", "push_to_hub")),
    "sentence_transformers.base.modules.module": ("Module", ("save_torch_weights",)),
    "huggingface_hub.hub_mixin": ("PyTorchModelHubMixin", ("save_pretrained", "push_to_hub")),
}
_OWN_WRITER = "_save_pretrained"  # of huggingface_hub: what a class of the user's writes by is its own affair
#: Module of the table above -> ``form(model, state_dict=...)``: a context within which its saving writes a form that
#: its loading was taught, and gives more options to write with. ``state_dict``: what the caller wants written instead
#: of the model's own state, or None.
OWN_FORMS: dict[str, Callable[..., AbstractContextManager[dict[str, Any]]]] = {}
_UNLIKE = "_sparseprune_unlike_config"
_SHOWN = 3
_guarded: set[str] = set()
_layers: tuple[type[nn.Module], ...] = ()  # whose tensors those libraries do not know


def is_taught(model: nn.Module) -> bool:
    """Whether the library that ``model`` comes from writes our form."""
    return any(isinstance(model, getattr(sys.modules.get(name), _WRITERS[name][0], ())) for name in OWN_FORMS)


def mark_unlike_(model: nn.Module, why: str) -> None:
    """Notes that the model's configuration describes another one, so that saving takes our form."""
    model.__dict__[_UNLIKE] = why
    guard_saving()


def unmark_unlike_(model: nn.Module) -> None:
    model.__dict__.pop(_UNLIKE, None)


def guard_saving(*kinds: type[nn.Module]) -> None:
    """Makes the methods above, while the model they are called on holds a layer of these kinds or of earlier ones,
    write our form where their library was taught it, else raise RuntimeError with the remedy; in those libraries that
    are imported by now.

    Called where such a layer comes to be, by making, copying or unpickling. The check sits at the class: it reaches
    models around the one that was sparsified, stays through deepcopy and pickle, and ends with densify_.
    """
    global _layers
    _layers = (*_layers, *(kind for kind in kinds if kind not in _layers))
    for name, (class_name, methods) in _WRITERS.items():
        if name in _guarded or name not in sys.modules:
            continue
        owner = getattr(sys.modules[name], class_name, None)
        if owner is None:  # in the middle of its import
            continue
        for method in methods:
            setattr(owner, method, _checking(getattr(owner, method), name, getattr(owner, _OWN_WRITER, None)))
        _guarded.add(name)


def _checking(write: Callable[..., Any], library: str, writer: Any) -> Callable[..., Any]:
    @functools.wraps(write)
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = writer is not None and getattr(type(self), _OWN_WRITER, None) is not writer
        if own or getattr(self, "_hf_peft_config_loaded", False):
            return write(self, *args, **kwargs)
        if not isinstance(self, nn.Module) or not _is_ours(self):
            return write(self, *args, **kwargs)
        form = OWN_FORMS.get(library)
        if form is None:
            _refuse_sparse(self, write.__name__)
        if form is None or write.__name__ != "save_pretrained":  # push_to_hub, which calls it
            return write(self, *args, **kwargs)
        given = inspect.signature(write).bind(self, *args, **kwargs).arguments.get("state_dict")
        with form(self, state_dict=given) as options:
            return write(self, *args, **{**options, **kwargs})

    return checked


def _is_ours(model: nn.Module) -> bool:
    return any(isinstance(module, _layers) or _UNLIKE in module.__dict__ for module in model.modules())


def _refuse_sparse(model: nn.Module, what: str) -> None:
    found = [(name, type(module).__name__) for name, module in model.named_modules() if isinstance(module, _layers)]
    names = [name for name, _ in found]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise RuntimeError(
            f"{what}: expected dense layers, got {len(names)} {found[0][1]} in {type(model).__name__} "
            f"({', '.join(names[:_SHOWN])}{more}), which from_pretrained does not know and would fill with random "
            "numbers; sparseprune.densify_(model) first, or sparseprune.save(model, path), and sparseprune.load(model, "
            "path) on the original architecture. A Trainer takes save_strategy='no' meanwhile"
        )
