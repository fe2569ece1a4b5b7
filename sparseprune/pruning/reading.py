"""What the modules of a model read and give while it runs on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.modes import evaluating
from .batches import Batch, check_no_text, unlabelled
from .intake import calibration_data
from .positions import Positions, decoder_of

__all__ = ["collect_inputs", "collect_outputs", "evaluating", "input_norms", "reading", "train_with_dropout"]


def train_with_dropout(model: nn.Module, dropout: bool) -> None:
    """Train mode for its dropout's sake, or eval; modules with running statistics stay in eval, which moves none."""
    model.train(dropout)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


@contextmanager
def reading(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None], outputs: bool = False
) -> Iterator[None]:
    """Calls ``see(name, x)`` with what each module reads at each call, before it runs; with ``outputs``, with what it
    gives. Hooks live only inside the block. What ``see`` raises ends the forward pass.
    """

    def before(name: str) -> Any:
        return lambda module, arguments: see(name, arguments[0])

    def after(name: str) -> Any:
        return lambda module, arguments, result: see(name, result)

    handles = [
        module.register_forward_hook(after(name)) if outputs else module.register_forward_pre_hook(before(name))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect_inputs(
    model: nn.Module, names: Iterable[str], batches: Any, rows: int = 4096, seed: int = 0, *, tokenizer: Any = None,
    unreached: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """fqn -> `[T, K]`, T <= rows: what each named Linear reads while the model runs over the batches in eval mode.

    batches: what the model is called with: a dict (keywords, ``labels`` left out, of which an encoder-decoder's own
    method first makes what its decoder reads), ``(inputs, targets)`` or a tensor; a
    :class:`Batch` is taken as it is; or rows, and text with the ``tokenizer``, as in :mod:`.intake`.
    Positions with ``attention_mask`` 0 (in the decoder beside an encoder, ``decoder_attention_mask``) are left out,
    except where a layer is given a choice of them, as an expert of a mixture is: which ones is not known, and all
    count. At most ``rows`` positions are kept, drawn evenly from all batches, the same of every layer that has as many.
    ValueError on a Linear that the batches never reach, which is left out instead where ``unreached`` says so.
    """
    return _collect(model, names, batches, rows, seed, outputs=False, tokenizer=tokenizer, unreached=unreached)


def collect_outputs(
    model: nn.Module, names: Iterable[str], batches: Any, rows: int = 4096, seed: int = 0, *, tokenizer: Any = None
) -> dict[str, Tensor]:
    """fqn -> `[T, N]`: what each named module gives, at the positions where :func:`collect_inputs` reads."""
    return _collect(model, names, batches, rows, seed, outputs=True, tokenizer=tokenizer)


@torch.no_grad()
def _collect(
    model: nn.Module, names: Iterable[str], batches: Any, rows: int, seed: int, outputs: bool, tokenizer: Any,
    unreached: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    name = "collect_outputs" if outputs else "collect_inputs"
    modules = dict(model.named_modules())
    taken = calibration_data(batches, model, tokenizer, name)
    listed = [
        batch if isinstance(batch, Batch) else Batch(unlabelled(batch, name, model))
        for batch in ([taken] if isinstance(taken, Tensor | Mapping) else taken)
    ]
    for batch in listed:
        check_no_text(batch.inputs)
    if not listed:
        raise ValueError(f"{name}: expected at least one batch, got none")
    share = max(1, math.ceil(rows / len(listed)))
    found: dict[str, list[Tensor]] = {fqn: [] for fqn in names}
    decoder = decoder_of(model)
    positions = Positions(None)
    number = 0

    def see(fqn: str, x: Tensor) -> None:
        flat = positions.rows(fqn, x.detach())
        if len(flat) > share:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            flat = flat[torch.randperm(len(flat), generator=generator)[:share].to(flat.device)]
        found[fqn].append(flat.clone())

    with evaluating(model), reading({fqn: modules[fqn] for fqn in found}, see, outputs):
        for number, batch in enumerate(listed):  # noqa: B007 (read by the hooks)
            positions = Positions.of(batch, decoder)
            batch.call(model)
    missing = [fqn for fqn, parts in found.items() if not parts]
    if missing and not unreached:
        raise ValueError(f"{name}: the batches never reach {', '.join(missing[:10])}; leave them out")
    return {fqn: torch.cat(parts)[:rows] for fqn, parts in found.items() if parts}


@torch.no_grad()
def input_norms(model: nn.Module, linears: Mapping[str, nn.Linear], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """||x_j||_2 over all real rows that reach each Linear, float32 `[K]` by name (the activation side of Wanda's
    score).
    """
    sums = {
        name: torch.zeros(layer.in_features, dtype=torch.float32, device=layer.weight.device)
        for name, layer in linears.items()
    }
    decoder = decoder_of(model)
    positions = Positions(None)

    def see(name: str, x: Tensor) -> None:
        sums[name] += positions.rows(name, x.detach()).float().square().sum(0)

    with evaluating(model), reading(linears, see):
        for batch in batches:
            positions = Positions.of(batch, decoder)
            batch.call(model)
    return {name: total.sqrt() for name, total in sums.items()}
