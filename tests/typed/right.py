"""What a user writes. Type checkers must accept every line; test_typed.py asks them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import sparseprune as sp


def prune(model: nn.Module, dense: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], tokens: Tensor) -> nn.Module:
    report = sp.prune_(model, sparsity=0.9, criterion="magnitude", granularity=sp.Block(16, 1), scope="layer")
    print(f"{report.density:.3f}", [layer.name for layer in report.layers], report.masks.density)
    sp.prune_(model, 0.5, criterion="admm", granularity={"*.ffn.*": sp.NM(2, 4), "*": "element"}, data=tokens)
    sp.prune_(model, 0.5, criterion=lambda linear, fqn: linear.weight.abs())
    sp.compensate_(model, dense, [tokens])

    config = sp.DistillConfig(epochs=5, lr=2e-4, schedule=sp.CubicSchedule(0.1), granularity=sp.Heads())
    distilled = sp.DistillPruner(model, config, teacher=dense)
    print(distilled.fit(batches, loss=nn.CrossEntropyLoss).steps[-1]["loss"], distilled.density)
    adversarial = sp.GANPruner(model, sp.GANConfig(discriminator=sp.DiscriminatorConfig(depth=2)))
    model = adversarial.finalize()

    optimizer = sp.AdamW(model.parameters(), lr=1e-3)
    gradual = sp.Pruner(model, sp.PruneConfig(schedule=sp.RetentionSchedule(r0=0.1, z_min=0.1), end=100))
    gradual.prepare(optimizer).step()

    rounding = sp.choose_exact_layers(model, batches, tolerance=0.01)
    print(rounding.exact, rounding.rounded_loss)
    found = sp.sparsify_(model, tokens=(1, 128), exact_layers=rounding.exact)
    print(found, sp.sparsity_report(model).density)
    sp.save(model, "pruned.safetensors")
    sp.densify_(sp.load(model, "pruned.safetensors"))
    layer: sp.SparseLinear = sp.SparseLinear.from_linear(nn.Linear(32, 32), "bsr", (16, 1))
    print(sp.explain(layer, torch.randn(4, 32)), sp.training.evaluate(model, batches)["loss"])
    return model
