"""Models of the ``transformers`` library, from a hub name or a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["language_model", "require"]


def require() -> Any:
    """The module ``transformers``; ImportError with the remedy where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"needs the package transformers ({error}); pip install 'sparseprune[hf]'") from None


def language_model(name: str, gguf_file: str | None = None) -> tuple[nn.Module, Any]:
    """(causal language model in float32 and eval mode, its tokenizer), from a hub name or a folder.

    ``gguf_file``: name of a GGUF file there, dequantised on loading. Raises FileNotFoundError where ``name`` looks
    like a path and is none, ValueError where it cannot be loaded, or lacks weights, which would be random numbers.
    """
    transformers = require()
    transformers.utils.logging.disable_progress_bar()
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"model: no folder {name!r}")
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype="float32", output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from None
    if found["missing_keys"]:
        lacking = sorted(found["missing_keys"])
        raise ValueError(
            f"model {name!r} expected every weight of a {type(model).__name__}, got none for {', '.join(lacking[:3])}"
            f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}; a checkpoint by sparseprune.save is "
            "loaded by sparseprune.load into the dense model"
        )
    return model.eval(), tokenizer
