"""What does the adversarial term add? Seven arms, one trainer, matched start, data order and budget.

``python -m benchmarks.ablation --arms gan scores_kd --seeds 0 1 2 --sparsity 0.95 --data clinc10 crosswoz_zh``

Every finished run is appended to ``benchmarks/results/ablation.jsonl``; runs that are there are not repeated, so that
the experiment can be stopped, resumed and extended. ``--table`` only renders what is there.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseprune.bench import describe
from sparseprune.data import SETS, Augment, TextData, TokenLoader, Vocabulary, load_set
from sparseprune.encoder import TextEncoder
from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner, compare, predictions
from sparseprune.pruning.masks import MaskSet
from sparseprune.pruning.schedules import RetentionSchedule

ARMS = ("gmp", "gmp_kd", "scores_kd", "gan", "scores_kd_matched", "gan_frozen_d", "gan_shuffled_d")
CONTRASTS = (
    ("gan", "scores_kd"), ("gan", "scores_kd_matched"), ("gan", "gan_frozen_d"), ("gan", "gan_shuffled_d"),
    ("gan", "gmp_kd"), ("scores_kd", "gmp_kd"), ("gmp_kd", "gmp"),
)  # fmt: skip
FIGURES = ("accuracy", "macro_f1", "agreement", "kl", "ece")
RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"


@dataclass(frozen=True)
class Setting:
    """Everything a run shares with the others of its experiment."""

    hidden: int = 128
    ffn: int = 512
    layers: int = 2
    heads: int = 4
    batch_size: int = 64
    dense_epochs: int = 6
    epochs: float = 5.0
    evaluate_every: int = 60
    train_limit: int = 3000
    max_length: int = 64

    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


SIZES = {
    "small": Setting(),
    "full": Setting(hidden=256, ffn=1024, train_limit=1_000_000, dense_epochs=5, epochs=6.0, evaluate_every=200),
}


def arm_config(arm: str, sparsity: float, seed: int, setting: Setting, stretch: float = 1.0) -> GANConfig:
    """One arm as a configuration of the trainer. stretch: how much longer the matched arm runs."""
    common: dict[str, Any] = {
        "schedule": RetentionSchedule(r0=0.1, z_min=round(1 - sparsity, 10)), "seed": seed, "epochs": setting.epochs,
    }  # fmt: skip
    if arm == "gmp":
        return GANConfig(method="magnitude", ce=1.0, kd=0.0, hidden=0.0, **common)
    if arm == "gmp_kd":
        return GANConfig(method="magnitude", **common)
    if arm == "scores_kd":
        return GANConfig(method="scores", **common)
    if arm == "scores_kd_matched":
        return GANConfig(method="scores", **{**common, "epochs": setting.epochs * stretch})
    mode = {"gan": "trained", "gan_frozen_d": "frozen", "gan_shuffled_d": "shuffled"}[arm]
    return GANConfig(method="gan", discriminator=DiscriminatorConfig(mode=mode), **common)  # type: ignore[arg-type]


class Cell:
    """One data set and seed: loaders, and a dense model trained once and started from by every arm."""

    def __init__(self, name: str, seed: int, setting: Setting):
        self.setting, self.seed = setting, seed
        self.data: TextData = load_set(name).head(train=setting.train_limit)
        vocabulary = Vocabulary.build(self.data.train.texts)
        augment = Augment(drop=0.05, mask=0.05)

        def loader(split: str, train: bool) -> TokenLoader:
            part = self.data.splits[split]
            ids = [vocabulary.encode(text, setting.max_length) for text in part.texts]
            return TokenLoader(ids, part.labels, setting.batch_size, train, seed, augment if train else None)

        self.train, self.valid, self.test = loader("train", True), loader("valid", False), loader("test", False)
        torch.manual_seed(seed)
        self.dense = TextEncoder(
            len(vocabulary), len(self.data.label_names), setting.hidden, setting.ffn, setting.layers, setting.heads,
            setting.max_length,
        )  # fmt: skip
        self._train_dense()
        self.teacher = {split: predictions(self.dense, getattr(self, split)) for split in ("valid", "test")}

    def _train_dense(self) -> None:
        total, step = self.setting.dense_epochs * len(self.train), 0
        optimiser = torch.optim.AdamW(self.dense.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        for epoch in range(self.setting.dense_epochs):
            self.dense.train()
            self.train.set_epoch(epoch)
            for batch in self.train:
                logits = self.dense(batch["input_ids"], batch["attention_mask"])
                optimiser.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(logits, batch["labels"]).backward()
                nn.utils.clip_grad_norm_(self.dense.parameters(), 1.0)
                step += 1
                for group in optimiser.param_groups:
                    group["lr"] = 1e-3 * min(step / (0.1 * total), (total - step + 1) / (0.9 * total))
                optimiser.step()
        self.dense.eval()

    def run(self, config: GANConfig) -> dict[str, Any]:
        """Prunes a copy; every figure of it."""
        pruner = GANPruner(copy.deepcopy(self.dense), config, teacher=copy.deepcopy(self.dense))
        began, cpu = time.monotonic(), time.process_time()
        self.train.set_epoch(0)
        history = pruner.fit(self.train, self.valid)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
        model = pruner.finalize()
        found: dict[str, Any] = {}
        for split, (teacher, targets) in self.teacher.items():
            logits, _ = predictions(model, getattr(self, split))
            found[split] = compare(logits, teacher, targets)
        self.train.set_epoch(1000)
        return {
            **found,
            "dense_accuracy": {s: float((t.argmax(-1) == y).float().mean()) for s, (t, y) in self.teacher.items()},
            "density": pruner.density,
            "steps": len(history.steps),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "fresh_discriminator": pruner.probe(self.train, steps=100),
            "discriminator_accuracy": history.steps[-1].get("discriminator_accuracy"),
            "mask_hash": MaskSet(pruner.masks).mask_hash(),
        }


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """One line in one write, on disk before it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END) or True) and file.read(1) != b"\n":
            file.write(b"\n")
        file.write((json.dumps(record) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return (record["setting"], record["arm"], record["data"], record["sparsity"], record["seed"])


def experiment(
    arms: list[str], seeds: list[int], sparsities: list[float], sets: list[str], size: str, path: Path
) -> None:
    """Runs what is missing, seed by seed, so that a stop leaves whole pairs behind."""
    setting = SIZES[size]
    done = {identity(r): r for r in read(path)}
    for seed in seeds:
        for name in sets:
            cell: Cell | None = None
            for sparsity in sparsities:
                for arm in sorted(arms, key=ARMS.index):
                    key = (setting.key(), arm, name, sparsity, seed)
                    if key in done:
                        continue
                    stretch = 1.0
                    if arm == "scores_kd_matched":
                        pair = [done.get((setting.key(), a, name, sparsity, seed)) for a in ("gan", "scores_kd")]
                        if pair[0] is None or pair[1] is None:
                            print("scores_kd_matched needs gan and scores_kd of the same cell first", flush=True)
                            continue
                        stretch = max(1.0, pair[0]["cpu_seconds"] / pair[1]["cpu_seconds"])
                    cell = cell or Cell(name, seed, setting)
                    found = cell.run(arm_config(arm, sparsity, seed, setting, stretch))
                    record = {
                        "setting": setting.key(), "size": size, "arm": arm, "data": name, "sparsity": sparsity,
                        "seed": seed, "stretch": stretch, **found, "machine": describe(), "finished": time.time(),
                    }  # fmt: skip
                    append(path, record)
                    done[key] = record
                    kept = found["test"]["accuracy"] / found["dense_accuracy"]["test"]
                    print(
                        f"{name} {sparsity} seed {seed} {arm}: kept {kept:.4f}, {found['cpu_seconds']} s CPU",
                        flush=True,
                    )


def paired(records: list[dict[str, Any]], a: str, b: str, figure: str, split: str = "test") -> dict[Any, list[float]]:
    """cell (data, sparsity) -> differences a - b, one a seed that both have."""
    by_key = {(r["arm"], r["data"], r["sparsity"], r["seed"]): r[split][figure] for r in records}
    cells: dict[Any, list[float]] = defaultdict(list)
    for (arm, data, sparsity, seed), value in sorted(by_key.items()):
        other = by_key.get((b, data, sparsity, seed))
        if arm == a and other is not None:
            cells[(data, sparsity)].append(value - other)
    return dict(cells)


def interval(cells: dict[Any, list[float]], draws: int = 10_000, seed: int = 0) -> tuple[float, float, float, int]:
    """(mean, low, high, n): mean over cells of the mean difference; 95 % by drawing cells, then seeds within each."""
    groups = list(cells.values())
    n = sum(map(len, groups))
    if not n:
        return float("nan"), float("nan"), float("nan"), 0
    mean = statistics.fmean(statistics.fmean(g) for g in groups)
    rng = random.Random(seed)
    means = sorted(
        statistics.fmean(statistics.fmean(rng.choices(g, k=len(g))) for g in rng.choices(groups, k=len(groups)))
        for _ in range(draws)
    )
    return mean, means[int(0.025 * draws)], means[int(0.975 * draws) - 1], n


def table(records: list[dict[str, Any]]) -> str:
    """Two tables in Markdown: each arm's means, and the paired differences with their intervals."""
    lines = ["| data | sparsity | arm | n | test accuracy kept | agreement | KL | ECE | fresh D | CPU s |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        groups[(r["data"], r["sparsity"], ARMS.index(r["arm"]))].append(r)
    for (data, sparsity, arm), rows in sorted(groups.items()):

        def mean(figure: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.fmean(r["test"][figure] for r in rows)

        kept = [r["test"]["accuracy"] / r["dense_accuracy"]["test"] for r in rows]
        spread = f" ± {statistics.stdev(kept):.4f}" if len(kept) > 1 else ""
        fresh = statistics.fmean(r["fresh_discriminator"] for r in rows)
        cpu = statistics.fmean(r["cpu_seconds"] for r in rows)
        lines.append(f"| {data} | {sparsity} | `{ARMS[arm]}` | {len(rows)} | {statistics.fmean(kept):.4f}{spread} | "
                     f"{mean('agreement'):.4f} | {mean('kl'):.4f} | {mean('ece'):.4f} | "
                     f"{fresh:.3f} | {cpu:.1f} |")  # fmt: skip
    lines += ["", "| difference | n | cells | accuracy, points | agreement, points | KL |", "|---|---|---|---|---|---|"]
    for a, b in CONTRASTS:
        cells = paired(records, a, b, "accuracy")
        if not cells:
            continue
        entries = []
        for figure, scale in (("accuracy", 100), ("agreement", 100), ("kl", 1)):
            mean_, low, high, n = interval(paired(records, a, b, figure))
            few = min(len(differences) for differences in cells.values()) < 2
            spread = "no interval: one seed" if few else f"{low * scale:+.3f}, {high * scale:+.3f}"
            entries.append(f"{mean_ * scale:+.3f} [{spread}]")
        lines.append(f"| `{a}` - `{b}` | {n} | {len(cells)} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """The paired accuracy differences with their intervals, drawn to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(f"{a} - {b}", interval(paired(records, a, b, "accuracy"))) for a, b in CONTRASTS]
    rows = [row for row in rows if row[1][3]]
    figure, axis = pyplot.subplots(figsize=(7, 0.5 * len(rows) + 1.2))
    for i, (_, (mean, low, high, _n)) in enumerate(rows):
        axis.plot([100 * low, 100 * high], [i, i], color="#2f6f8f", linewidth=2)
        axis.plot([100 * mean], [i], "o", color="#c8452f")
    axis.axvline(0, color="#22303c", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{name} (n = {stats[3]})" for name, stats in rows])
    axis.invert_yaxis()
    axis.set_xlabel("difference in test accuracy, points (95 % bootstrap interval)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, axis="x")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.95])
    parser.add_argument("--data", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="render what is there and stop")
    parser.add_argument("--plot", type=Path, help="also draw the differences to this file")
    options = parser.parse_args(arguments)
    if not options.table:
        experiment(options.arms, options.seeds, options.sparsity, options.data, options.size, options.results)
    records = [r for r in read(options.results) if r["setting"] == SIZES[options.size].key()]
    print(table(records))
    if options.plot and records:
        plot(records, options.plot)


if __name__ == "__main__":
    main()
