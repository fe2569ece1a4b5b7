"""The article as a program: one ``nn.Linear(128, 10)`` on real text, cross-entropy, Adam at 0.001, pruned by a GAN.

The words of clinc10's questions are hashed into 128 features; ten domains are told apart. A tenth of the weights stays,
by the recurrence. About fifteen seconds: python examples/article.py. ``sparseprune article`` does more of it: both
conventions, every mode, learned scores and magnitude beside the GAN, a Chinese set, a record.
"""

from __future__ import annotations

import torch
from torch import nn

import sparseprune as sp
from sparseprune.data import RowLoader, hashed_rows
from sparseprune.training import evaluate


def main(retention: float = 0.1, epochs: int = 2, seed: int = 0) -> dict[str, dict[str, float]]:
    """Returns the test loss and accuracy, dense and pruned, and the density reached."""
    torch.manual_seed(seed)
    data = sp.data.load_set("clinc10")
    rows = {name: (hashed_rows(part.texts), torch.tensor(part.labels)) for name, part in data.splits.items()}
    train = RowLoader(*rows["train"], batch_size=64, shuffle=True, seed=seed)
    valid, test = (RowLoader(*rows[name], batch_size=64) for name in ("valid", "test"))

    model = nn.Linear(128, 10)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.001)
    for epoch in range(epochs):
        for x, y in train:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimiser.step()
        print(f"Epoch {epoch + 1}  Loss {loss.item():.4f}  U 1.0000")
    dense = evaluate(model, test)

    factors = sp.Factors.from_retention(retention, convention="text")
    schedule = sp.RetentionSchedule(r0=0.1, z_min=factors.update)
    config = sp.GANConfig(
        schedule=schedule, epochs=epochs, lr=0.001, weight_decay=0.0, ce=1.0, rescale=factors.trim, seed=seed
    )
    print(f"{factors}\nU by the recurrence: {[round(u, 4) for u in schedule.densities(5)]}")

    def line(step: dict[str, float]) -> None:
        if (step["step"] + 1) % len(train) == 0:
            print(f"Epoch {step['epoch'] + 1}  Loss {step['ce']:.4f}  U {step['density']:.4f}")

    pruner = sp.GANPruner(model, config)  # its teacher is the model as it is now
    pruner.fit(train, valid, loss=nn.CrossEntropyLoss, callback=line)
    model = pruner.finalize()
    print("Pruning is finished")
    return {"dense": dense, "pruned": {**evaluate(model, test), "density": pruner.density}}


if __name__ == "__main__":
    for name, figures in main().items():
        print(f"{name}: {figures}")
