"""Models of the ``transformers`` library, from a hub name or a folder."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import densify_

__all__ = ["language_model", "loading", "require"]


def require() -> Any:
    """The module ``transformers``; ImportError with the remedy where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"needs the package transformers ({error}); pip install 'sparseprune[hf]'") from None


@contextmanager
def loading(name: str, kind: str = "") -> Iterator[None]:
    """Turns whatever transformers, on its way to the model ``name``, makes of files that are not what it expects into
    one ValueError that says so; ``kind``: as what it is loaded, for the message.

    FileNotFoundError where ``name`` looks like a path and is no folder, ValueError where it is a file.
    """
    place = Path(name).expanduser()
    if place.is_file():
        raise ValueError(f"model: expected a folder with config.json or a name on the hub, got the file {name!r}")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not place.is_dir():
        raise FileNotFoundError(f"model: no folder {name!r}")
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a configuration alone ends in KeyError, TypeError and classes of its own
        text = textwrap.shorten(str(error), 500, placeholder=" ...").rstrip(".") or type(error).__name__
        if isinstance(error, OSError) and not place.is_dir():
            text += "; without a network give a folder with config.json, or set HF_HUB_OFFLINE=1 to fail at once"
        elif not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
            text += "; its config.json is damaged, or of another kind: copy or save the model again"
        raise ValueError(f"model {name!r} cannot be loaded{kind}: {text}") from error


def language_model(name: str, gguf_file: str | None = None) -> tuple[nn.Module, Any]:
    """(causal language model in float32 and eval mode, its tokenizer), from a hub name or a folder. What a folder runs
    sparse are Linears with zeros here: only those can be pruned, measured and rounded anew.

    ``gguf_file``: name of a GGUF file there, dequantised on loading. Raises FileNotFoundError where ``name`` looks
    like a path and is none, ValueError where it cannot be loaded, or lacks weights, which would be random numbers.
    """
    transformers = require()
    transformers.utils.logging.disable_progress_bar()
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype="float32", output_loading_info=True, **options
        )
    if found["missing_keys"]:
        lacking = sorted(found["missing_keys"])
        raise ValueError(
            f"model {name!r} expected every weight of a {type(model).__name__}, got none for {', '.join(lacking[:3])}"
            f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}; a checkpoint by sparseprune.save is "
            "loaded by sparseprune.load into the dense model"
        )
    densify_(model)
    return model.eval(), tokenizer
