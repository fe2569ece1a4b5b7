"""The command line: ``sparseprune demo | prune | convert | report | bench | eval | sensitivity | doctor``.

Every command prints one clear line and exits with 2 on bad input, and with 1 where the work itself failed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from ._files import write_text

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["bench"]:  # its options belong to the bench floor, which also runs without this file
        from .bench.command import main as bench

        return bench(given[1:])
    arguments = parser().parse_args(given)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("sparseprune: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, KeyError) as error:
        if arguments.debug:
            raise
        text = str(error) if not isinstance(error, KeyError) else f"unknown name {error}"
        print(f"sparseprune {arguments.command}: error: {' '.join(text.split())}", file=sys.stderr)
        return 2


def _add(commands: Any, name: str, run: Callable[[Any], int], about: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, command=name)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    result = argparse.ArgumentParser(
        prog="sparseprune", description="Prune language models, run them sparse, see the gain measured here."
    )
    result.add_argument("--version", action="version", version=f"sparseprune {__version__}")
    commands = result.add_subparsers(required=True, metavar="command")

    demo = _add(
        commands,
        "demo",
        _demo,
        "Train, prune and measure a small text classifier on built-in data, in about five minutes.",
        "sparseprune demo --data crosswoz_zh --density 0.1 --name chinese",
    )
    demo.add_argument("--data", default="clinc10", help="built-in data set: clinc10 (English) or crosswoz_zh (Chinese)")
    _run_options(demo, "demo")

    prune = _add(
        commands,
        "prune",
        _prune,
        "Prune a transformers classifier of texts, pairs or words on your data; fine-tunes it first without --teacher.",
        "sparseprune prune --model microsoft/MiniLM-L12-H384-uncased --train train.tsv --valid dev.tsv --test test.tsv",
    )
    prune.add_argument("--model", required=True, help="hub name or folder of a classifier; or: encoder")
    for split in ("train", "valid", "test"):
        prune.add_argument(
            f"--{split}", required=True, metavar="FILE",
            help="TSV (text, label; or two texts, label), .jsonl (text and label keys), or .conll, .bio, .iob (a word,"
            " its label in the last column, an empty line between sentences)",
        )
    prune.add_argument("--teacher", help="folder or name of an already fine-tuned classifier")
    prune.add_argument(
        "--lr", type=float, default=3e-5,
        help="learning rate of the weights (default 3e-5; MiniLM-L6 keeps more with 4e-4)",
    )  # fmt: skip
    prune.add_argument("--dense-epochs", type=int, default=3, help="epochs of dense fine-tuning (default 3)")
    prune.add_argument("--batch-size", type=int, default=32)
    prune.add_argument("--max-length", type=int, default=128, help="tokens a text (default 128)")
    _run_options(prune, "prune")

    convert = _add(
        commands,
        "convert",
        _convert,
        "Rewrite a checkpoint: a dense file with zeros becomes sparse, a sparse one dense, values another type.",
        "sparseprune convert runs/demo/pruned.safetensors small.safetensors --values bfloat16",
    )
    convert.add_argument("source", type=Path, help="a .safetensors file, dense or written by sparseprune")
    convert.add_argument("target", type=Path, help="the .safetensors file to write")
    convert.add_argument("--values", default="float32", choices=("float32", "bfloat16", "int8"))
    convert.add_argument("--dense", action="store_true", help="write a plain dense state dict")

    report = _add(
        commands,
        "report",
        _report,
        "Show what a run or a checkpoint holds: the table of a run, or density and bytes per layer.",
        "sparseprune report runs/demo",
    )
    report.add_argument("path", type=Path, help="a run's folder, its run.json, or a .safetensors file")
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")

    commands.add_parser("bench", help="Time our kernels beside dense and other sparse libraries (bench --help).")

    evaluate = _add(
        commands,
        "eval",
        _eval,
        "Perplexity and tokens per second of a language model, dense beside sparse.",
        "sparseprune eval --model folder --checkpoint pruned.safetensors --text test.txt",
    )
    _model_options(evaluate)
    evaluate.add_argument(
        "--checkpoint", type=Path,
        help="a pruned checkpoint of the same model, by sp.save; without it the zeros of --model itself run sparse",
    )  # fmt: skip
    evaluate.add_argument("--text", required=True, type=Path, help="plain text to judge on")
    evaluate.add_argument("--context", type=int, default=512, help="tokens a window (default 512)")
    evaluate.add_argument("--windows", type=int, help="at most that many windows, spread over the text")
    evaluate.add_argument("--new-tokens", type=int, default=32, help="tokens to generate for the speed (default 32)")
    evaluate.add_argument("--values", default="float32", choices=("float32", "bfloat16", "int8"))
    evaluate.add_argument(
        "--dense-values", default="float32", choices=("float32", "bfloat16"),
        help="how calls of few tokens hold what was not pruned, the head among it (default float32, exact)",
    )  # fmt: skip

    sensitivity = _add(
        commands,
        "sensitivity",
        _sensitivity,
        "How much each layer's pruning costs, and the densities suggested for a global budget.",
        "sparseprune sensitivity --model folder --text calibration.txt --sparsity 0.6 --out sensitivity.json",
    )
    _model_options(sensitivity)
    sensitivity.add_argument("--text", required=True, type=Path, help="calibration text")
    sensitivity.add_argument("--sparsity", type=float, default=0.5, help="global fraction of zeros (default 0.5)")
    sensitivity.add_argument("--windows", type=int, default=32, help="windows of calibration text (default 32)")
    sensitivity.add_argument(
        "--loss-windows", type=int, default=8, help="of these, how many the loss is measured on (default 8)"
    )
    sensitivity.add_argument(
        "--densities", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="tried in each group (default 0.7 0.5 0.3)"
    )
    sensitivity.add_argument("--context", type=int, default=512)
    sensitivity.add_argument("--out", type=Path, help="write the densities as JSON, and a plot beside it")

    _add(commands, "doctor", _doctor, "What this installation can run, and what is missing.", "sparseprune doctor")
    return result


def _run_options(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--density", type=float, default=0.1, help="share of weights kept, in (0, 1] (default 0.1)")
    command.add_argument(
        "--granularity", default="element", help="element, RxC blocks such as 16x1, N:M such as 2:4, heads, neurons"
    )
    command.add_argument(
        "--method",
        default="scores",
        choices=("magnitude", "scores", "gan", "movement"),
        help="what decides which weights stay; all but gan without the adversary (default scores)",
    )
    command.add_argument(
        "--compensation",
        default="none",
        choices=("none", "bias", "survivors", "low_rank", "best"),
        help="what stands in for the removed weights, within the same number of parameters (default none)",
    )
    command.add_argument("--layers", metavar="PATTERN", action="append", help="prune only Linears whose name matches")
    command.add_argument("--layout", default="auto", choices=("auto", "csr", "bsr", "nm", "dense"))
    command.add_argument("--epochs", type=float, help="epochs of pruning and healing")
    command.add_argument("--max-seconds", type=float, help="limit on the pruning loop; it still ends at its density")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", default="runs", help="folder of all runs (default runs)")
    command.add_argument("--name", default=name, help=f"the run's folder below it (default {name})")
    command.add_argument("--config", type=Path, metavar="JSON", help="a run's config.json; replaces the other settings")
    command.add_argument("--quiet", action="store_true")


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="hub name or folder of a causal language model")
    command.add_argument("--gguf-file", help="name of a GGUF file in that folder")


def _density(arguments: argparse.Namespace) -> float:
    if not 0 < arguments.density <= 1:
        raise ValueError(f"--density expected in (0, 1], got {arguments.density}")
    return arguments.density


def _config(arguments: argparse.Namespace) -> Any:
    from .runner import RunConfig

    if arguments.config is None:
        return None
    return RunConfig.from_json(arguments.config.read_text(encoding="utf-8"))


def _demo(arguments: argparse.Namespace) -> int:
    from .pruning import make_granularity
    from .runner import run_demo

    run_demo(
        out=arguments.out,
        name=arguments.name,
        data=arguments.data,
        density=_density(arguments),
        granularity=make_granularity(arguments.granularity),
        layers=arguments.layers,
        method=arguments.method,
        compensation=arguments.compensation,
        seed=arguments.seed,
        epochs=arguments.epochs,
        max_seconds=arguments.max_seconds,
        layout=arguments.layout,
        quiet=arguments.quiet,
        config=_config(arguments),
    )
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from .pruning import make_granularity
    from .runner import run, run_prune

    config = _config(arguments)
    if config is not None:
        run(config, out=arguments.out, name=arguments.name, quiet=arguments.quiet)
        return 0
    run_prune(
        arguments.model,
        arguments.train,
        arguments.valid,
        arguments.test,
        out=arguments.out,
        name=arguments.name,
        density=_density(arguments),
        granularity=make_granularity(arguments.granularity),
        layers=arguments.layers,
        method=arguments.method,
        compensation=arguments.compensation,
        teacher=arguments.teacher,
        seed=arguments.seed,
        epochs=5.0 if arguments.epochs is None else arguments.epochs,
        dense_epochs=arguments.dense_epochs,
        lr=arguments.lr,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        max_seconds=arguments.max_seconds,
        layout=arguments.layout,
        quiet=arguments.quiet,
    )
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from .checkpoint import convert

    before = arguments.source.stat().st_size
    convert(arguments.source, arguments.target, values=arguments.values, dense=arguments.dense)
    after = arguments.target.stat().st_size
    print(f"{arguments.source} ({before:,} bytes) -> {arguments.target} ({after:,} bytes, {after / before:.3f})")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    path = arguments.path / "run.json" if arguments.path.is_dir() else arguments.path
    if path.suffix == ".safetensors":
        from .checkpoint import describe

        found = describe(path)
        print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
        return 0
    from .runner import summary

    record = json.loads(path.read_text(encoding="utf-8"))
    print(json.dumps(record, indent=2) if arguments.json else summary(record))
    return 0


def _language_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from .integrations.transformers import language_model

    return language_model(arguments.model, gguf_file=arguments.gguf_file)


def _text_windows(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    from .evaluate import token_windows

    text = arguments.text.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{arguments.text}: expected text, got an empty file")
    return token_windows(tokenizer(text)["input_ids"], arguments.context, arguments.windows)


def _eval(arguments: argparse.Namespace) -> int:
    from .evaluate import perplexity, speed_table, tokens_per_second
    from .nn import prunable_linears, sparsify_

    model, tokenizer = _language_model(arguments)
    windows = _text_windows(arguments, tokenizer)
    models = {"dense": model}
    print(f"dense: {perplexity(model, windows)}")
    pruned = None
    if arguments.checkpoint is not None:
        from . import checkpoint

        pruned, _ = _language_model(arguments)
        checkpoint.load(pruned, arguments.checkpoint)
        print(f"pruned: {perplexity(pruned, windows)}")
    elif any(bool((linear.weight == 0).any()) for linear in prunable_linears(model).values()):
        pruned = copy.deepcopy(model)
    if pruned is not None:
        report = sparsify_(pruned, tokens=(1, 128), values=arguments.values, dense_values=arguments.dense_values)
        rounded = sum(layer.layout != "dense" for layer in report.rounded)
        print(
            f"sparse ({arguments.values}): {perplexity(pruned, windows)}, {len(report.converted)} sparse layers"
            + (f", {rounded} dense in bfloat16" if arguments.dense_values == "bfloat16" else "")
        )
        models["sparse"] = pruned
    print(speed_table(tokens_per_second(models, windows[0, :128], new_tokens=arguments.new_tokens)))
    return 0


def _sensitivity(arguments: argparse.Namespace) -> int:
    import torch

    from .evaluate import perplexity
    from .nn import prunable_linears
    from .pruning.oneshot import block_of, fast_bfloat16, sensitivity

    if not 0 <= arguments.sparsity < 1:
        raise ValueError(f"--sparsity expected in [0, 1), got {arguments.sparsity}")
    if arguments.loss_windows < 1:
        raise ValueError(f"--loss-windows expected at least 1, got {arguments.loss_windows}")
    model, tokenizer = _language_model(arguments)
    windows = _text_windows(arguments, tokenizer)
    judged = windows[:: max(1, len(windows) // arguments.loss_windows)][: arguments.loss_windows]
    linears = prunable_linears(model)
    groups = list(dict.fromkeys(block_of(model, linears).values()))
    total, done, begin = len(groups) * len(arguments.densities), 0, time.perf_counter()

    def loss(pruned: Any) -> float:
        device = next(pruned.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bfloat16(device)):
            return perplexity(pruned, judged).loss

    def progress(group: str, density: float, value: float) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - begin) / done * (total - done) / 60
        print(f"[{done}/{total}, {left:.0f} min left] {group} at density {density:.2f}: loss {value:.4f}", flush=True)

    print(f"{total} losses of {len(groups)} groups, each on {judged.numel():,} tokens", flush=True)
    found = sensitivity(
        model, linears, list(windows.split(1)), loss, densities=arguments.densities, progress=progress
    )
    print(found.table())
    densities = found.suggest(1 - arguments.sparsity)
    print(f"suggested for {arguments.sparsity:g} zeros in all:")
    for group, members in found.members.items():
        print(f"  {group}: density {densities[members[0]]:.4f}")
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(densities, indent=2) + "\n")
        found.plot(arguments.out.with_suffix(".png"))
        print(f"written to {arguments.out} (for prune_(..., densities=)) and {arguments.out.with_suffix('.png')}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine, render

    print(render(examine()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
