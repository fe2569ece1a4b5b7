"""Models from folders of transformers: sparse ones, and dense architectures beside a checkpoint of ours."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from .._files import in_home
from ..checkpoint.error import CheckpointError, about
from ..checkpoint.file import FORMAT, read
from ..checkpoint.fit import fill
from ..nn.packed_only import KEEP
from ..nn.sparsify.memory import keep_packed_forms_
from .transformers import require

__all__ = ["load_folder", "save_pretrained"]

_GENERATION = "generation_config.json"
_CONFIG, _WEIGHTS = "config.json", ("model.safetensors", "model.safetensors.index.json")
# Building a model changes, for as long as it takes, what the whole process makes: ours and transformers' own does.
_BUILDING = threading.RLock()


def load_folder(path: str | os.PathLike[str], keep: str = "canonical") -> nn.Module:
    """The model that ``config.json`` describes, in eval mode, with the weights of ``path``.

    path: a folder that ``save_pretrained`` wrote (``model.safetensors``, or shards), sparse or dense; a checkpoint by
    :func:`sparseprune.save` beside a ``config.json`` (and, where there is one, ``generation_config.json``); or the
    folder of one, where it holds no other weights. keep: as in :func:`sparseprune.load`.
    CheckpointError where something of that is missing or does not fit.
    """
    if keep not in KEEP:
        raise CheckpointError(f"load: keep expected one of {KEEP}, got {keep!r}")
    place = Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    if not place.exists() or not (folder / _CONFIG).is_file():
        what = f"{_CONFIG} in {folder}" if place.exists() else "such file or folder"
        raise CheckpointError(
            f"{path}: expected weights beside the {_CONFIG} of a transformers model, found no {what}; build the model "
            "and use load(model, path)"
        )
    if place.is_dir() and any((place / name).is_file() for name in _WEIGHTS):
        with about(path):
            kind = _architecture(folder)
            from .conversion import noting_failures

            with _BUILDING, noting_failures() as failed:
                try:
                    model, found = kind.from_pretrained(str(place), output_loading_info=True)
                except MemoryError:
                    raise
                except Exception as error:  # whatever transformers makes of files that are not what it expects
                    raise ValueError(f"cannot be loaded: {_told(failed) or error}") from error
            if found["missing_keys"]:
                raise ValueError(f"expected every weight, got none for {', '.join(sorted(found['missing_keys'])[:3])}")
            if keep == "packed":
                keep_packed_forms_(model.requires_grad_(False))
            return model
    file = _only_checkpoint(place) if place.is_dir() else place
    content = read(file)
    with about(file):
        kind = _architecture(folder)
        with _parameters_on_meta(), _described():
            model = kind._from_config(require().AutoConfig.from_pretrained(str(folder)))
        if model.can_generate() and (folder / _GENERATION).is_file():
            try:
                model.generation_config = model.generation_config_class.from_pretrained(str(folder))
            except Exception as error:
                raise ValueError(f"{_GENERATION} cannot be read: {error}") from error
        fill(model, content, keep)
    return model.eval()


def _told(failed: list[str]) -> str:
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"{failed[0]}{more}; the folder is damaged, copy or save it again" if failed else ""


@contextmanager
def _described() -> Iterator[None]:
    """Turns whatever transformers makes of a configuration that is none into a ValueError that names the file."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{_CONFIG} does not describe a model: {error}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it modules that this thread makes get no memory for their parameters, one at a time apart, and models of
    transformers no first values; buffers have theirs. Other threads make their modules as ever.
    """
    models: Any = require().PreTrainedModel
    mine = threading.get_ident()
    with _BUILDING:
        register, initialise = nn.Module.register_parameter, models.init_weights

        def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(self, name, param)
            if param is not None and not param.is_meta and threading.get_ident() == mine:
                self._parameters[name] = nn.Parameter(param.to("meta"), param.requires_grad)

        def not_mine(self: nn.Module) -> None:
            if threading.get_ident() != mine:
                initialise(self)

        nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
        models.init_weights = not_mine
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            models.init_weights = initialise


def save_pretrained(model: Any, folder: str | os.PathLike[str], value_dtype: str = "float32", **options: Any) -> None:
    """``model.save_pretrained(folder, **options)`` with every pruned weight in its smallest encoding, also where no
    layer runs sparse yet; ``value_dtype``: "bfloat16" or "int8" round the kept ones, as in :func:`sparseprune.save`.
    ``state_dict`` among the options, as ``model.state_dict()`` gives it, is what is written instead of the model's own.
    ``~`` is the home folder, as for ``load``. ValueError where tensors of a sparse layer are missing in ``state_dict``
    or do not agree.
    """
    require()
    from .quantizer import in_our_form, register

    register()
    with in_our_form(model, value_dtype, options.get("state_dict")) as ours:
        model.save_pretrained(in_home(folder), **{**ours, **options})


def _architecture(folder: Path) -> Any:
    """The class that ``config.json`` names, one of transformers' own."""
    transformers = require()
    try:
        names = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{_CONFIG} expected JSON with architectures, got others ({error})") from None
    kind = getattr(transformers, names[0], None) if len(names) == 1 and isinstance(names[0], str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{_CONFIG}: architectures expected the name of one transformers model, got {names!r}")
    return kind


def _only_checkpoint(folder: Path) -> Path:
    found = [file for file in sorted(folder.glob("*.safetensors")) if _is_ours(file)]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: expected {_WEIGHTS[0]} or one checkpoint by sparseprune.save, found {len(found)}"
        )
    return found[0]


def _is_ours(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False
