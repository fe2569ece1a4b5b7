"""One of two processes that prune together; started by torchrun from test_pruner.py, alone outside the package.

Arguments: the mode of the Pruner, and the folder that takes what this rank found.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

import sparseprune as sp
from sparseprune.pruning import PruneConfig, Pruner


def replicated(rank: int, world: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = PruneConfig(schedule=sp.CubicSchedule(0.1), criterion="movement", end=12, every=3)
    pruner = Pruner(model, config).prepare(optimizer)
    for step in range(14):
        generator = torch.Generator().manual_seed(step * world + rank)
        x, y = torch.randn(6, 12, generator=generator), torch.randn(6, 8, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
        # A gradient that differs in its last bits between the processes must not matter.
        model[0].weight.grad.mul_(1 + rank * 1e-6)
        optimizer.step()
        for p in model.parameters():
            torch.distributed.broadcast(p.data, 0)
        pruner.step()
    pruner.finalize()
    return {"hash": pruner.masks.mask_hash(), "kept": pruner.masks.kept, "total": pruner.masks.total}


def sharded(rank: int) -> dict[str, object]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(12, 9 + rank))
    dense = model[0].weight.detach().clone()
    pruner = Pruner(model, PruneConfig(sp.ConstantSchedule(0.1), end=2, every=1), distributed="sharded").prepare()
    pruner.step()
    pruner.finalize()
    return {"dense": dense, "mask": pruner.masks["0"]}


def main(mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(replicated(rank, world) if mode == "replicated" else sharded(rank), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    # At once: when torch takes its threads down, now and then a process aborts, with its work done and saved.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
