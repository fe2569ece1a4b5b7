"""``sparseprune export``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..._arguments import check_file, check_folder, path_of
from .. import shared

ABOUT = "Write a model for transformers, or densified for ONNX Runtime."
EXAMPLE = "sparseprune export runs/language model.onnx"
PLACE = 4
#: What the files of a tokenizer end in: its words, its settings, and the templates of chats.
_OF_TOKENIZER = (".json", ".txt", ".model", ".spm", ".jinja")


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=path_of, help="a folder of transformers, or the folder of a run")
    command.add_argument("target", type=path_of, help="a file that ends in .onnx, or a folder for transformers")
    command.add_argument("--value-dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    command.add_argument("--dense", action="store_true", help="a folder that needs no sparseprune")
    shared.device_option(command, "cpu")


def run(arguments: argparse.Namespace) -> int:
    device = shared.find_device(arguments)
    from ...integrations.folder import load_folder, save_pretrained
    from ...nn import SparseLinear, densify_
    from ...runner.folder import RECORDS

    source = _model_folder(arguments.source)
    onnx = arguments.target.suffix == ".onnx"
    if arguments.value_dtype != "float32" and (onnx or arguments.dense):
        raise ValueError(
            f"--value-dtype rounds weights that are held sparse, expected none with {'.onnx' if onnx else '--dense'}, "
            f"got {arguments.value_dtype}; leave it out"
        )
    if onnx:
        check_file(arguments.target, "target")
        return _to_onnx(load_folder(source).to(device), arguments.target)
    check_folder(arguments.target, "target")
    if arguments.target.resolve() == source.resolve():
        raise ValueError(f"target expected another folder than the source, got {arguments.target} for both")
    model: Any = load_folder(source).to(device)
    if arguments.dense:
        densify_(model)
        _check_plain(model)
    # The tokenizer first: of a name that the model writes too, its file is the one that stays.
    of_run = RECORDS if (source / RECORDS[0]).is_file() else ()
    for name in sorted([*source.iterdir(), *source.glob("additional_chat_templates/*")]):
        if name.suffix in _OF_TOKENIZER and name.name not in of_run and not name.match("*.index.json"):
            target = arguments.target / name.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(name.read_bytes())
    if arguments.dense:
        model.save_pretrained(arguments.target)
    else:
        save_pretrained(model, arguments.target, arguments.value_dtype)
    sparse = sum(isinstance(m, SparseLinear) for m in model.modules())
    print(f"{arguments.target}: a folder for transformers, {sparse} layers run sparse")
    return 0


def _check_plain(model: Any) -> None:
    """ValueError where no reader but ours could make the model from its configuration."""
    from ...integrations.description import describe

    found = describe(model)
    if changed := [*found.shapes, *found.counts, *found.unpacked]:
        raise ValueError(
            f"--dense: expected a model that {type(model.config).__name__} describes, got other modules or sizes in "
            f"{changed[0]} (heads or neurons that were cut, or a Linear for a Conv1D), which only sparseprune reads; "
            "leave --dense out, or export to a file that ends in .onnx"
        )


def _model_folder(source: Path) -> Path:
    """Where the model of ``source`` is: of a language model's run its folder inside. ValueError for a run that is not
    finished: what is there may be the run's before.
    """
    from ...runner.language import KIND, MODEL_FOLDER

    inside, record = source / MODEL_FOLDER, source / "run.json"
    if not record.is_file() and _kind(source / "settings.json") in (KIND, "RunConfig"):
        named = f", or name {inside}" if inside.is_dir() else ""
        raise ValueError(
            f"{source}: expected the folder of a finished run, got one that is not finished, whose files may be those "
            f"of the run before; finish it{named}"
        )
    if not (inside / "config.json").is_file() or (record.is_file() and _kind(record) != KIND):
        return source
    return inside


def _kind(path: Path) -> str | None:
    """What a JSON file says it is of; None where it says nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("kind") if isinstance(found, dict) else None


def _to_onnx(model: Any, target: Path) -> int:
    import torch

    from ...integrations.onnx import NO_GAIN, export_onnx

    if model.dtype == torch.bfloat16:
        model.float()  # exact; ONNX Runtime multiplies in no bfloat16
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    worst = export_onnx(model, target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    print(f"{target}: ONNX Runtime answers as torch, off by up to {worst:.2g}. {NO_GAIN}")
    return 0
