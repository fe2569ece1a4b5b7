"""What a user gets wrong. Type checkers must refuse every line marked so; test_typed.py asks them."""

from torch import nn

import sparseprune as sp

model = nn.Linear(4, 4)
sp.prune_(model, sparsity="half")  # wrong
sp.prune_(model, 0.5, granularity=4)  # wrong
sp.prune(model, 0.5)  # wrong
sp.DistillConfig(scope="all")  # wrong
sp.DistillConfig(epoch=5)  # wrong
sp.GANPruner(model, sp.DistillConfig())  # wrong
sp.PruneConfig(schedule=0.1)  # wrong
sp.save("pruned.safetensors", model)  # wrong
sp.sparsity_report(model).density()  # wrong
