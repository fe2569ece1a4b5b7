"""The smallest example: one ``nn.Linear(128, 10)`` with cross-entropy and Adam on real text, pruned while it trains.

Bags of words of clinc10's questions are hashed into 128 features; ten domains are told apart. Takes a few seconds:
python examples/linear_128_10.py
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

import sparseprune as sp

FEATURES, CLASSES = 128, 10


def features(texts: list[tuple[str, ...]]) -> Tensor:
    """texts of N examples; returns `[N, 128]`: counts of the words that hash to each feature, in unit rows."""
    counts = torch.zeros(len(texts), FEATURES)
    for row, parts in enumerate(texts):
        for word in " ".join(parts).lower().split():
            counts[row, zlib.crc32(word.encode()) % FEATURES] += 1
    return nn.functional.normalize(counts)


def train(density: float = 0.25, epochs: int = 10, seed: int = 0) -> dict[str, float]:
    """Returns loss and accuracy on the test split and the density reached."""
    torch.manual_seed(seed)
    data = sp.data.load_set("clinc10")
    x, y = features(data.train.texts), torch.tensor(data.train.labels)
    test_x, test_y = features(data.test.texts), torch.tensor(data.test.labels)

    model = nn.Linear(FEATURES, CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loss_function = nn.CrossEntropyLoss()
    batches = len(x) // 32 * epochs
    schedule = sp.RetentionSchedule(r0=0.1, z_min=density) if density < 1 else sp.Constant(1.0)
    pruner = sp.Pruner(model, sp.PruneConfig(schedule=schedule, end=batches // 2, every=20))
    pruner.prepare(optimizer)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            loss = loss_function(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            pruner.step()
        print(f"Epoch {epoch + 1}  Loss {loss.item():.4f}  U {pruner.density:.4f}")
    model = pruner.finalize()
    with torch.no_grad():
        logits = model(test_x)
        kept = (model.weight != 0).float().mean().item()
        accuracy = (logits.argmax(1) == test_y).float().mean().item()
    return {"loss": loss_function(logits, test_y).item(), "accuracy": accuracy, "density": kept}


if __name__ == "__main__":
    dense, pruned = train(density=1.0), train(density=0.25)
    print(f"dense : {dense}\npruned: {pruned}")
