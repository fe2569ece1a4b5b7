"""Two processes train a sharded or replicated SparseLinear with a fused optimiser and evaluate between the steps;
prints how many answers differed from those of one process.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import sparseprune as sp
from sparseprune import SparseLinear


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sp.prune_(dense, 0.5)
    model = nn.Sequential(SparseLinear.from_linear(dense[0]), nn.ReLU(), SparseLinear.from_linear(dense[2]))
    alone = copy.deepcopy(model)
    if kind == "fsdp1":
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for child in (model[0], model[2], model):
            fully_shard(child, mesh=mesh)
        sharded = model
    else:
        sharded = nn.parallel.DistributedDataParallel(model)
    pairs = [(m, torch.optim.AdamW(m.parameters(), lr=0.05, fused=kind == "replicated")) for m in (sharded, alone)]
    x, wrong = torch.randn(6, 16), 0
    for step in range(6):
        for one, optimiser in pairs:
            optimiser.zero_grad()
            one.train()(x).square().mean().backward()
            optimiser.step()
            one.eval()
        if step % 2:
            for module in sharded.modules():
                if isinstance(module, SparseLinear):
                    module.repack()
        with torch.no_grad():
            for rows in (1, 6):
                wrong += not torch.allclose(sharded(x[:rows]), alone(x[:rows]), atol=1e-4)
    print(f"wrong {wrong}\n", end="")
    dist.destroy_process_group()


main(sys.argv[1])
