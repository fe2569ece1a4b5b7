"""``sparseprune prune``."""

from __future__ import annotations

import argparse

from ..._arguments import Given, real, whole
from .. import shared

ABOUT = (
    "Prune a transformers classifier of texts, pairs or words on your data; fine-tunes it first without --teacher. A"
    " causal language model is pruned in one shot: prune --text FILE --help."
)
EXAMPLE = (
    "sparseprune prune --model microsoft/MiniLM-L12-H384-uncased --train train.tsv --valid dev.tsv --test test.tsv"
)
RESUMES = True
PLACE = 2


def takes_over(rest: list[str]) -> bool:
    """Whether the options are those of a language model, which go to :func:`take_over`."""
    return any(option == "--text" or option.startswith("--text=") for option in rest)


def take_over(rest: list[str]) -> int:
    from ..language import prune

    return prune(rest)


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", action=Given, help="hub name, or folder of a model with config.json; or: encoder")
    for split in ("train", "valid", "test"):
        command.add_argument(
            f"--{split}",
            action=Given,
            metavar="FILE",
            help="TSV (text, label; or two texts, label; no header, no quoting), .jsonl (text and label keys), or"
            " .conll, .bio, .iob (a word, its label in the last column, an empty line between sentences), .csv (the"
            " first row names the columns), .parquet, .arrow, or a folder by Dataset.save_to_disk; UTF-8",
        )
    command.add_argument(
        "--data", action=Given, metavar="FOLDER",
        help="in place of the three: a folder by DatasetDict.save_to_disk, or with files named train, validation, test",
    )  # fmt: skip
    command.add_argument(
        "--labels",
        action=Given,
        metavar="FILE",
        help="names of the labels, one a line, that numbers in the data count from 0 (default: each distinct label of"
        " --train is a class)",
    )
    command.add_argument(
        "--teacher", action=Given, help="folder or name of an already fine-tuned classifier, in place of --model"
    )
    command.add_argument(
        "--lr", action=Given, type=real("(0, inf)"),
        help="learning rate of the weights (default by the hidden size, 4e-4 at 384 and 1e-4 at 768; encoder 1e-3)",
    )  # fmt: skip
    command.add_argument(
        "--dense-epochs", action=Given, type=whole(0),
        help="epochs of dense fine-tuning (default 3, or 500 steps)",
    )
    command.add_argument("--batch-size", action=Given, type=whole(1), default=32, help="texts a step (default 32)")
    command.add_argument(
        "--max-length", action=Given, type=whole(1, 1 << 16), default=128, help="tokens a text (default 128)"
    )
    shared.run_options(command, "prune", "5, or 1200 steps")


def run(arguments: argparse.Namespace) -> int:
    if arguments.config is not None:
        return shared.run_settings(arguments)
    if arguments.model is None:  # the student starts from the teacher's weights
        arguments.model = arguments.teacher
    wanted = ("model",) if arguments.data is not None else ("model", "train", "valid", "test")
    missing = [f"--{name}" for name in wanted if getattr(arguments, name) is None]
    if missing:
        raise ValueError(f"expected {', '.join(missing)}, or --config with the settings.json of a run")
    from ...pruning import make_granularity
    from ...runner import run_prune

    run_prune(
        arguments.model,
        arguments.train,
        arguments.valid,
        arguments.test,
        data=arguments.data,
        labels=arguments.labels,
        out=arguments.out,
        name=arguments.name,
        density=arguments.density,
        granularity=make_granularity(arguments.granularity),
        layers=arguments.layers,
        method=arguments.method,
        compensation=arguments.compensation,
        teacher=arguments.teacher,
        seed=arguments.seed,
        epochs=arguments.epochs,
        dense_epochs=arguments.dense_epochs,
        lr=arguments.lr,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        max_seconds=arguments.max_seconds,
        layout=arguments.layout,
        value_dtype=arguments.value_dtype,
        activations=arguments.activations,
        data_check=arguments.data_check,
        robustness=arguments.robustness,
        quiet=arguments.quiet,
        autocast=arguments.autocast,
        device=arguments.device,
    )
    return 0
