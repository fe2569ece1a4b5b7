"""What the student is trained on beside the game: task, distillation, hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.rows import IGNORED

__all__ = [
    "LossLike",
    "accuracy_counts",
    "counted",
    "distillation",
    "is_classification",
    "make_loss",
    "real_rows",
    "smoothed",
    "task_loss",
    "weight_of",
]

LossLike = type[nn.Module] | Callable[[Tensor, Tensor], Tensor]


#: What transformers trains on for a ``problem_type`` that is no choice of one class.
_OF_PROBLEM = {"multi_label_classification": "nn.BCEWithLogitsLoss", "regression": "nn.MSELoss"}


def make_loss(loss: LossLike, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss given as a class is instantiated, anything else callable is taken as it is; TypeError on the rest.
    ValueError on one whose ``reduction`` is "sum" or "none", for all figures here are means, and on the default,
    cross-entropy, where the configuration of ``model`` says that its problem is another.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if loss is nn.CrossEntropyLoss and problem in _OF_PROBLEM:
        raise ValueError(
            f"loss: expected {_OF_PROBLEM[problem]} of a model whose problem_type is {problem!r}, got "
            f"nn.CrossEntropyLoss, the default; pass loss={_OF_PROBLEM[problem]}, or nn.CrossEntropyLoss() to insist"
        )
    made: Any = loss() if isinstance(loss, type) else loss
    if not callable(made):
        raise TypeError(f"loss expected a loss class or a callable, got {type(loss).__name__}")
    if getattr(made, "reduction", "mean") in ("sum", "none"):
        raise ValueError(
            f"loss: expected the mean over examples, got {type(made).__name__} with reduction={made.reduction!r}; make "
            'it with reduction="mean"'
        )
    return made


def smoothed(loss: Callable[[Tensor, Tensor], Tensor], share: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``loss`` with label smoothing (Szegedy et al. 2016). ValueError where it is no plain cross-entropy."""
    if not share:
        return loss
    if not isinstance(loss, nn.CrossEntropyLoss) or loss.label_smoothing:
        raise ValueError(
            f"label_smoothing expected nn.CrossEntropyLoss without any of its own, got {loss!r}; smooth in your loss"
        )
    made = copy.deepcopy(loss)
    made.label_smoothing = share
    return made


def is_classification(logits: Tensor, targets: Tensor) -> bool:
    """Integer targets with one dimension less than the logits, which are several: a class for each row or token."""
    return not targets.is_floating_point() and targets.dim() == logits.dim() - 1 and logits.shape[-1] > 1


def task_loss(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """logits `[..., C]`, targets `[...]` of classes: both flattened first, and what is ignored left to a loss that says
    so (``ignore_index``), else left out; outputs of one number `[..., 1]` take the shape `[...]` of their targets; all
    else goes to the loss as it is. 0 where every target is ignored, which a mean cannot tell.
    """
    logits = logits.float()
    if isinstance(loss, nn.CrossEntropyLoss) and (logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)):
        raise ValueError(
            f"loss: cross-entropy expected several outputs a row, got {list(logits.shape)}; give the loss of one "
            "number, such as nn.MSELoss or nn.BCEWithLogitsLoss"
        )
    if is_classification(logits, targets):
        keep, given = counted(targets, loss), targets
        if not bool(keep.any()):
            return logits.sum() * 0.0
        if hasattr(loss, "ignore_index"):
            targets = targets.masked_fill(~keep, loss.ignore_index)
        elif not bool(keep.all()):
            logits, targets = logits[keep], targets[keep]
        try:
            return loss(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        except IndexError as error:
            low, high = int(given[keep].min()), int(given[keep].max())
            if low >= 0 and high < logits.shape[-1]:  # the loss's own
                raise
            raise ValueError(
                f"labels: expected classes from 0 to {logits.shape[-1] - 1}, as many as the model has outputs, or "
                f"{IGNORED} for what counts for nothing, got from {low} to {high}; number them so, or "
                "give the model more outputs"
            ) from error
    if logits.shape == (*targets.shape, 1):  # side by side they would be compared each with each
        return loss(logits.squeeze(-1), targets.to(logits.dtype))
    return loss(logits, targets)


def weight_of(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> float:
    """What the mean that :func:`task_loss` gives was divided by: rows, classes that count, or the weights of those."""
    if not is_classification(logits, targets):
        return float(len(targets))
    keep = counted(targets, loss)
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and loss.weight is not None:
        return float(loss.weight.double()[targets[keep]].sum())
    return float(keep.sum())


def counted(targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """bool, as targets: which classes are not ignored, by -100 or by the loss's own ``ignore_index``."""
    return (targets != IGNORED) & (targets != getattr(loss, "ignore_index", IGNORED))


def real_rows(logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """The rows `[M, C]` that count: for token classes those that are no padding and not ignored; else all."""
    if logits.dim() == 3 and targets.shape == logits.shape[:2]:
        keep = targets != IGNORED
        return logits[keep if mask is None else keep & mask]
    if logits.dim() == 3 and mask is not None and mask.shape == logits.shape[:2]:
        return logits[mask]
    return logits.reshape(-1, logits.shape[-1]) if logits.dim() > 1 else logits.reshape(-1, 1)


def distillation(student: Tensor, teacher: Tensor, temperature: float, classes: bool) -> Tensor:
    """student, teacher: `[M, C]`; tau^2 KL(teacher || student) (Hinton et al. 2015), or the mean square without
    classes; 0 without rows. ValueError where one has more outputs than the other.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"teacher: expected as many outputs as the model's {student.shape[-1]}, got {teacher.shape[-1]}; give one "
            "of the same task, or kd=0"
        )
    if not len(student):
        return student.sum() * 0.0
    if not classes:
        return F.mse_loss(student.float(), teacher.float())
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


@torch.no_grad()
def accuracy_counts(
    logits: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[int, int]:
    """(right, counted) over all rows or tokens whose target is not :func:`counted` out; (0, 0) without classes."""
    if not is_classification(logits, targets):
        return 0, 0
    keep = counted(targets, loss)
    return int(((logits.argmax(-1) == targets) & keep).sum()), int(keep.sum())
