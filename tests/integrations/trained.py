"""A training script for torchrun, as docs/huggingface.md describes it; started by test_trainer.py.

Arguments: the folder that takes what this process found; "whole" or "resumed".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset

import sparseprune as sp
from sparseprune.integrations.learned import LearnedScores
from sparseprune.integrations.terms import Distillation
from sparseprune.integrations.trainer import PruneTrainer


class Words(Dataset):
    def __init__(self, count: int = 48) -> None:
        draw = torch.Generator().manual_seed(3)
        self.ids = torch.randint(5, 13, (count, 7), generator=draw)
        self.labels = (self.ids == 7).any(1).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(7, dtype=torch.int64), "labels": self.labels[i]}


class Killed(Exception):
    pass


class Kill(transformers.TrainerCallback):
    """Stops the run in the middle, after its last checkpoint."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise Killed


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=13, num_labels=2, max_position_embeddings=16, **sizes)
    return transformers.BertForSequenceClassification(config)


def trainer(folder: Path, pruning: sp.PruneConfig, kappa: float | None = None, **options) -> PruneTrainer:
    settings = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 4, "logging_steps": 2, "seed": 1,
        "learning_rate": 1e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return PruneTrainer(
        model=model(), args=args, train_dataset=Words(), eval_dataset=Words(16), pruning=pruning,
        distillation=None if kappa is None else Distillation(kappa=kappa),
    )  # fmt: skip


def settings(**options) -> sp.PruneConfig:
    return sp.PruneConfig(
        **{"schedule": sp.CubicSchedule(0.2), "begin": 1, "end": 8, "every": 1, "criterion": LearnedScores(), **options}
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    whole = trainer(folder / "whole", settings(), kappa=0.2)
    whole.train()
    killed = trainer(folder / "killed", settings(), kappa=0.2)
    killed.add_callback(Kill(6))
    try:
        killed.train()
    except Killed:
        torch.distributed.barrier()
    resumed = trainer(folder / "killed", settings(), kappa=0.2)
    resumed.train(resume_from_checkpoint=True)
    found = {}
    for name, run in (("whole", whole), ("resumed", resumed)):
        pruner = run.pruning.pruner
        found[name] = {
            "hash": pruner.masks.mask_hash(), "kept": pruner.masks.kept, "total": pruner.masks.total,
            "steps": run.state.global_step, "world": run.args.world_size,
            "state": {k: v.clone() for k, v in run.model.state_dict().items()},
        }  # fmt: skip
    torch.save(found, folder / f"{int(os.environ['RANK'])}.pt")
    torch.distributed.barrier()
    os._exit(0)  # at once: when torch takes its threads down, now and then a process aborts, its work done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
