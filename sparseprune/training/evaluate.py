"""Loss and accuracy of a model on a loader, and how far it is from its teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.batches import device_of, split_batch
from ..pruning.intake import training_data
from ..pruning.reading import evaluating
from ..pruning.rows import IGNORED
from .causal import with_next_tokens
from .losses import LossLike, accuracy_counts, is_classification, make_loss, real_rows, task_loss, weight_of

__all__ = ["compare", "evaluate", "predictions"]


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Any, loss: LossLike = nn.CrossEntropyLoss, *, tokenizer: Any = None, batch_size: int = 32
) -> dict[str, float]:
    """``{"loss", "accuracy"}`` (accuracy for class targets only), means over examples, or over labelled tokens where
    tokens have classes, the loss by the weights of the classes where it has them; the model is in eval meanwhile.
    loader: labelled batches, or rows as in :mod:`~sparseprune.pruning.intake`, in batches of ``batch_size``. Labels of
    a causal language model of transformers are its ``input_ids``, as there: they are shifted here.
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
            mean, size = float(task_loss(compute, logits, batch.targets)), weight_of(compute, logits, batch.targets)
            total += mean * size if size else 0.0
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
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    with evaluating(model):
        for raw in loader:
            batch = with_next_tokens(model, split_batch(raw, device, model))
            out = batch.run(model)
            rows = real_rows(out, batch.targets, batch.output_mask)
            token_targets = batch.targets.unsqueeze(-1) if batch.targets.dim() == 2 else batch.targets.reshape(-1, 1)
            own = real_rows(token_targets, batch.targets, batch.output_mask).reshape(-1)
            if is_classification(rows, own):
                rows, own = rows[own != IGNORED], own[own != IGNORED]
            logits.append(rows.float().cpu())
            targets.append(own.cpu())
    if not any(map(len, targets)):
        raise ValueError("predictions: the loader is empty (an iterator is, once read), or nothing in it is labelled")
    return torch.cat(logits), torch.cat(targets)


def compare(student: Tensor, teacher: Tensor, targets: Tensor, bins: int = 15) -> dict[str, float]:
    """student, teacher: logits `[M, C]`; targets: int64 `[M]`, of which -100 counts for nothing. ValueError on other
    shapes, on NaN, and where no row counts.

    accuracy; macro_f1 over the classes present; agreement (share of rows where both choose the same class); kl (mean
    KL(teacher || student), nats); ece (expected calibration error, Guo et al. 2017, equal-width bins).
    """
    if not is_classification(student, targets):
        raise ValueError(f"compare: expected class targets [M], got {list(targets.shape)} of {targets.dtype}")
    if student.dim() != 2 or teacher.shape != student.shape or len(targets) != len(student):
        shapes = ", ".join(str(list(given.shape)) for given in (student, teacher, targets))
        raise ValueError(f"compare: expected logits [M, C], as many of the teacher, and targets [M], got {shapes}")
    if bins < 1:
        raise ValueError(f"compare: bins expected at least 1, got {bins}")
    keep = targets != IGNORED
    student, teacher, targets = student[keep], teacher[keep], targets[keep]
    if not len(targets):
        raise ValueError("compare: expected a labelled row or more, got none")
    for name, given in (("student", student), ("teacher", teacher)):
        if bool(given.isnan().any()):
            raise ValueError(f"compare: {name} expected numbers, got NaN; the model's outputs are broken")
    chosen = student.argmax(-1)
    log_student, log_teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    confidence = log_student.exp().max(-1).values
    right = (chosen == targets).float()
    slot = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(right[slot == b].mean() - confidence[slot == b].mean()).abs() * (slot == b).float().mean()
            for b in range(bins) if bool((slot == b).any())]  # fmt: skip
    terms = log_teacher.exp() * (log_teacher - log_student)  # of a class that is ruled out: NaN, and 0 in the limit
    scores = []
    for label in targets.unique():
        hit = ((chosen == label) & (targets == label)).sum()
        scores.append(2 * hit / ((chosen == label).sum() + (targets == label).sum()))
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(torch.stack(scores).float().mean()),
        "agreement": float((chosen == teacher.argmax(-1)).float().mean()),
        "kl": float(terms.masked_fill(log_teacher == -torch.inf, 0.0).sum(-1).mean()),
        "ece": float(torch.stack(gaps).sum()),
    }
