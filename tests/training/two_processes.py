"""One of two processes that train a GANPruner together; started by torchrun from test_parallel.py.

Argument: the folder that takes what this rank found. The first rank also trains alone, on the same global batches.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from sparseprune import RetentionSchedule
from sparseprune.data import Augment, TokenLoader
from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner
from sparseprune.pruning import MaskSet
from sparseprune.runner.text_encoder import TextEncoder
from sparseprune.training import DistillConfig, DistillPruner

BATCH = 8
#: Everything that is random, at once.
RANDOM: dict[str, Any] = {
    "gumbel": 0.02, "dropout": True, "accumulate": 2, "compensation": "low_rank",
    "discriminator": DiscriminatorConfig(depth=1, width=16, rows=8),
}  # fmt: skip


class Killed(Exception):
    pass


def loader(batch_size: int, rank: int = 0, world: int = 1, augment: Augment | None = None) -> TokenLoader:
    made = rows()
    return TokenLoader(made["input_ids"], made["labels"], batch_size, True, 1, augment, rank=rank, world=world)


def rows() -> dict[str, list[Any]]:
    """96 sequences of one length, so that a mean over half the rows weighs as much as one over the other half."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 20, (96, 6), generator=generator)
    labels = torch.randint(0, 3, (96,), generator=generator)
    ids[:, 0] = ids[:, -1] = 20 + labels
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def pruner_of(seed: int, distributed: Any = "auto", **settings: Any) -> DistillPruner:
    torch.manual_seed(seed)
    model = TextEncoder(23, 3, hidden=16, ffn=32, layers=2, heads=2, max_length=8)
    if settings.get("compensation") == "low_rank":  # something for it to find
        with torch.no_grad():
            model.layers[0].ffn.expand.weight.copy_(torch.randn(32, 1) @ torch.randn(1, 16) / 4)
    base: dict[str, Any] = {
        "schedule": RetentionSchedule(0.1, 0.2), "epochs": 5.0, "lr": 2e-3, "evaluate_every": 10,
    }  # fmt: skip
    if settings.get("method", "gan") != "gan":
        return DistillPruner(model, DistillConfig(**{**base, **settings}), distributed=distributed)
    settings.pop("method", None)
    base["discriminator"] = DiscriminatorConfig(depth=1, width=16, rows=10_000, noise=0.0)
    return GANPruner(model, GANConfig(**{**base, **settings}), distributed=distributed)


def found(pruner: DistillPruner) -> dict[str, Any]:
    model = pruner.finalize()
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "masks": {name: mask.clone() for name, mask in pruner.masks.items()},
        "hash": MaskSet(pruner.masks).mask_hash(), "steps": pruner.history.steps,
        "evaluations": pruner.history.evaluations, "events": pruner.history.events,
    }  # fmt: skip


def together(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for method in ("scores", "gan", "uncertainty"):
        pruner = pruner_of(rank, method=method)  # unlike starts: the first one's is taken
        pruner.fit(loader(BATCH, rank, 2), loader(BATCH))
        results[method] = found(pruner)

    pruner = pruner_of(rank, method="scores")
    results["rows length"] = pruner.total_steps(rows(), batch_size=BATCH)
    pruner.fit(rows(), rows(), batch_size=BATCH)  # all of them in both: each reads its share
    results["rows"] = found(pruner)
    for name in ("rows whole", "rows killed"):

        def stop_at(record: dict[str, Any], stops: bool = name == "rows killed") -> None:
            if stops and record["step"] == 9:  # in the second epoch, a batch after the last checkpoint
                raise Killed

        path = folder / f"{name}.ckpt"
        settings = {"checkpoint": path, "checkpoint_every": 4, "batch_size": BATCH}
        pruner = pruner_of(0, method="scores", epochs=2.0)
        try:
            pruner.fit(rows(), **settings, callback=stop_at)
        except Killed:
            torch.distributed.barrier()
            pruner = pruner_of(0, method="scores", epochs=2.0)
            pruner.fit(rows(), **settings)
        results[name] = found(pruner)
    own = {name: values[rank::2] for name, values in rows().items()}
    try:
        pruner_of(0).fit(own, batch_size=BATCH)
    except ValueError as error:
        results["shares"] = str(error)

    # Without a stop, and killed in the middle: the processes go on as if nothing had been.
    for name, stop in (("whole", None), ("killed", 9)):

        def kill(record: dict[str, Any], stop: int | None = stop) -> None:
            if record["step"] == stop:
                raise Killed

        data = loader(BATCH, rank, 2, Augment(drop=0.1, mask=0.1))
        torch.manual_seed(10 + rank)
        path = folder / f"{name}.ckpt"
        pruner = pruner_of(0, **RANDOM)
        try:
            pruner.fit(data, loader(BATCH), checkpoint=path, checkpoint_every=4, callback=kill)
        except Killed:
            torch.distributed.barrier()
            torch.manual_seed(77)
            pruner = pruner_of(0, **RANDOM)
            pruner.fit(data, loader(BATCH), checkpoint=path, checkpoint_every=4)
        results[name] = found(pruner)

    pruner = pruner_of(0)
    try:
        pruner.fit(loader(BATCH, rank, 2) if rank else loader(BATCH))
    except ValueError as error:
        results["uneven"] = str(error)
    return results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = together(rank, folder)
    torch.distributed.barrier()
    if rank == 0:
        for method in ("scores", "gan"):
            alone = pruner_of(0, "off", method=method)
            alone.fit(loader(2 * BATCH), loader(BATCH))
            results[f"{method} alone"] = found(alone)
        alone = pruner_of(0, "off", method="scores")
        alone.fit(rows(), rows(), batch_size=2 * BATCH)
        results["rows alone"] = found(alone)
        try:
            pruner_of(0, "off", **RANDOM).fit(loader(BATCH), checkpoint=folder / "whole.ckpt")
        except ValueError as error:
            results["alone on theirs"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    # At once: when torch takes its threads down, now and then a process aborts, with its work done and saved.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
