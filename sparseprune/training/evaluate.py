"""Loss and accuracy of a model on a loader, and how far it is from its teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.batches import device_of, split_batch
from ..pruning.intake import training_data
from ..pruning.reading import evaluating
from .causal import with_next_tokens
from .losses import LossLike, accuracy_counts, is_classification, make_loss, real_rows, task_loss

__all__ = ["compare", "evaluate", "predictions"]


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Any, loss: LossLike = nn.CrossEntropyLoss, *, tokenizer: Any = None, batch_size: int = 32
) -> dict[str, float]:
    """``{"loss", "accuracy"}`` (accuracy for class targets only), means over examples, or over labelled tokens where
    tokens have classes; the model is in eval meanwhile. loader: labelled batches, or rows as in
    :mod:`~sparseprune.pruning.intake`, in batches of ``batch_size``. Labels of a causal language model of transformers
    are its ``input_ids``, as there: they are shifted here.
    """
    compute = make_loss(loss, model)
    loader = training_data(loader, model, tokenizer, "evaluate", batch_size=batch_size)
    device = device_of(model)
    total = examples = 0.0
    right = counted = 0
    with evaluating(model):
        for raw in loader:
            batch = with_next_tokens(model, split_batch(raw, device, model))
            logits = batch.run(model)
            hits, seen = accuracy_counts(logits, batch.targets, compute)
            right, counted = right + hits, counted + seen
            size = seen if is_classification(logits, batch.targets) else len(batch.targets)
            total += float(task_loss(compute, logits, batch.targets)) * size
            examples += size
    if not examples:
        raise ValueError("evaluate: the loader is empty (an iterator is, once read), or nothing in it is labelled")
    found = {"loss": total / examples}
    return {**found, "accuracy": right / counted} if counted else found


@torch.no_grad()
def predictions(model: nn.Module, loader: Any, *, tokenizer: Any = None) -> tuple[Tensor, Tensor]:
    """(logits `[M, C]` float32, targets `[M]`) over the whole loader, padding and ignored tokens left out.

    Of a causal language model of transformers the targets are the next tokens, as in :func:`evaluate`.
    """
    loader = training_data(loader, model, tokenizer, "predictions")
    device = device_of(model)
    logits, targets = [], []
    with evaluating(model):
        for raw in loader:
            batch = with_next_tokens(model, split_batch(raw, device, model))
            out = batch.run(model)
            logits.append(real_rows(out, batch.targets, batch.output_mask).float().cpu())
            token_targets = batch.targets.unsqueeze(-1) if batch.targets.dim() == 2 else batch.targets.reshape(-1, 1)
            targets.append(real_rows(token_targets, batch.targets, batch.output_mask).reshape(-1).cpu())
    return torch.cat(logits), torch.cat(targets)


def compare(student: Tensor, teacher: Tensor, targets: Tensor, bins: int = 15) -> dict[str, float]:
    """student, teacher: logits `[M, C]`; targets: int64 `[M]`.

    accuracy; macro_f1 over the classes present; agreement (share of rows where both choose the same class); kl (mean
    KL(teacher || student), nats); ece (expected calibration error, Guo et al. 2017, equal-width bins).
    """
    if not is_classification(student, targets):
        raise ValueError(f"compare: expected class targets [M], got {list(targets.shape)} of {targets.dtype}")
    chosen = student.argmax(-1)
    log_student, log_teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    confidence = log_student.exp().max(-1).values
    right = (chosen == targets).float()
    slot = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(right[slot == b].mean() - confidence[slot == b].mean()).abs() * (slot == b).float().mean()
            for b in range(bins) if bool((slot == b).any())]  # fmt: skip
    scores = []
    for label in targets.unique():
        hit = ((chosen == label) & (targets == label)).sum()
        scores.append(2 * hit / ((chosen == label).sum() + (targets == label).sum()))
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(torch.stack(scores).float().mean()),
        "agreement": float((chosen == teacher.argmax(-1)).float().mean()),
        "kl": float((log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()),
        "ece": float(torch.stack(gaps).sum()),
    }
