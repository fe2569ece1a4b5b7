"""Prune a classifier inside transformers' Trainer, with the dense model as its teacher, and run it sparse.

python examples/hf_trainer.py sentence-transformers/all-MiniLM-L6-v2 --out pruned
"""

import argparse
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import sparseprune as sp
from sparseprune.integrations.learned import LearnedScores
from sparseprune.integrations.terms import Distillation
from sparseprune.integrations.trainer import PruneTrainer


def accuracy(found: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def train(name: str, out: str, density: float = 0.1, epochs: float = 3, limit: int | None = None) -> dict[str, Any]:
    """name: a hub name or a folder; out: the folder for the sparse model. Returns the accuracies and the density."""
    data = sp.data.load_set("clinc10")
    tokenizer = AutoTokenizer.from_pretrained(name)

    def rows(split: sp.data.Examples) -> list[dict[str, Any]]:
        texts = [text[0] for text in split.texts[:limit]]
        ids = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
        return [{"input_ids": i, "labels": label} for i, label in zip(ids, split.labels)]

    def settings(folder: str) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(Path(out) / folder), num_train_epochs=epochs, per_device_train_batch_size=32,
            learning_rate=1e-4, logging_steps=50, save_strategy="no", report_to=[],
        )  # fmt: skip

    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(data.label_names))
    given: dict[str, Any] = {
        "train_dataset": rows(data.train), "eval_dataset": rows(data.valid), "compute_metrics": accuracy,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }  # fmt: skip
    dense = transformers.Trainer(model=model, args=settings("dense"), **given)
    dense.train()
    before = dense.evaluate()["eval_accuracy"]

    steps = max(3, int(epochs * -(-len(given["train_dataset"]) // 32)))
    pruning = sp.PruneConfig(
        schedule=sp.CubicSchedule(density), begin=steps // 10, end=steps * 7 // 10, every=1, criterion=LearnedScores()
    )
    # The teacher is the dense model as it is now; kappa > 0 would bring in the adversary.
    trainer = PruneTrainer(
        model=model, args=settings("pruned"), pruning=pruning, distillation=Distillation(kappa=0.0), **given
    )
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]

    print(sp.sparsify_(model, tokens=1024))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"dense": before, "pruned": after, "density": trainer.pruning.density}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", default="pruned")
    parser.add_argument("--density", type=float, default=0.1)
    given = parser.parse_args()
    print(train(given.name, given.out, given.density))
    print(f'pipeline("text-classification", model="{given.out}") reads it, after import sparseprune')
