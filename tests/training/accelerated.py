"""A training script for several processes with accelerate, as docs/lab/gan.md describes it; for test_accelerate.py.

Argument: the folder that takes what this process found.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparseprune import CubicSchedule, DiscriminatorConfig, GANConfig, GANPruner
from sparseprune.pruning import MaskSet


class Killed(Exception):
    pass


def train(accelerator: Any, folder: Path, name: str, stop: int | None) -> dict[str, Any]:
    torch.manual_seed(accelerator.process_index)  # unlike starts: the first process's is taken
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(5))
    data = TensorDataset(x, (x[:, 0] > 0).long())
    loader = accelerator.prepare(DataLoader(data, batch_size=8, shuffle=True))
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))
    config = GANConfig(
        schedule=CubicSchedule(0.3), epochs=4.0, evaluate_every=5, compensation="best", dropout=True,
        discriminator=DiscriminatorConfig(depth=1, width=8),
    )  # fmt: skip
    pruner = GANPruner(model, config)

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == stop:
            raise Killed

    pruner.fit(loader, DataLoader(data, batch_size=25), checkpoint=folder / f"{name}.ckpt", checkpoint_every=3,
               callback=kill)  # fmt: skip
    return {
        "state": pruner.finalize().state_dict(), "hash": MaskSet(pruner.masks).mask_hash(),
        "history": pruner.history.to_dict(), "processes": accelerator.num_processes, "density": pruner.density,
    }  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for seedable in (False, True):
        accelerator = Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable)
        )  # fmt: skip
        found[f"whole {seedable}"] = train(accelerator, folder, f"whole {seedable}", None)
        try:
            train(accelerator, folder, f"killed {seedable}", 17)
        except Killed:
            accelerator.wait_for_everyone()
            found[f"killed {seedable}"] = train(accelerator, folder, f"killed {seedable}", None)
    try:
        GANPruner(accelerator.prepare(nn.Sequential(nn.Linear(4, 4))))
    except ValueError as error:
        found["wrapped"] = {"error": str(error)}
    accelerator.wait_for_everyone()
    torch.save(found, folder / f"{accelerator.process_index}.pt")
    os._exit(0)  # as in two_processes.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
