"""The way through a model: block after block, the pruned block's outputs feeding the next one.

Memory on top of the model: one chunk of activations, one matrix as wide as a layer's inputs, one bit a weight for the
masks. The other things that a run keeps (hidden states of the calibration data, statistics, what solvers put aside, the
moments of a block in training) wait in files, unless they are to stay in memory. The values that pruning replaces are
in files in any case, so that solvers may work in the weights' own memory, an error leaves the model as it was, and a
run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..._digest import digest
from ..._files import read_checkpoint, remove_unfinished, replacing, write_text
from ..batches import Batch
from ..granularity import InWeight
from ..masks import MaskSet
from .repeated import Stack, calibrating, capture, find_stacks
from .store import ChunkStore, no_holes, release
from .task import BlockTask, LooseTask, Task

__all__ = ["Progress", "Solver", "prune_blocks_"]


class Solver(Protocol):
    """How one block is pruned. needs_hessian: whether it wants X^T X of a layer's inputs beside their squares.
    teacher: whether it wants the dense model's hidden states, `BlockTask.target`.
    """

    @property
    def needs_hessian(self) -> bool: ...

    @property
    def teacher(self) -> bool: ...

    def prune(self, task: Task) -> MaskSet:
        """Writes the pruned weights into task.linears (and whatever else of the block it tunes) and returns the
        masks. What the parameters held before is safe: it may work in their memory.
        """
        ...


@dataclass(frozen=True)
class Progress:
    """block number index of total has been pruned (or taken over from an earlier run: resumed); seconds so far."""

    block: str
    index: int
    total: int
    seconds: float
    resumed: bool


def _parameters(task: Task) -> dict[str, Tensor]:
    """What a solver may change: the parameters of the block, or only the weights of the Linears of a loose part."""
    if isinstance(task, BlockTask):
        return {name: p.data for name, p in task.module.named_parameters()}
    return {fqn: linear.weight.data for fqn, linear in task.linears.items()}


class _Undo:
    """The replaced values, in files, until the run has succeeded."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=folder, prefix="sparseprune-undo."))
        self.saved: list[tuple[Path, dict[str, Tensor]]] = []

    def remember(self, tensors: dict[str, Tensor]) -> None:
        path = self.folder / f"{len(self.saved)}.pt"
        torch.save({k: v.detach().cpu() for k, v in tensors.items()}, path)
        self.saved.append((path, tensors))

    def restore(self) -> None:
        for path, tensors in self.saved:
            values = torch.load(path, weights_only=True)
            for key, tensor in tensors.items():
                tensor.copy_(values[key])

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _State:
    """The folder of a run: `run.json` says which run it is, `block_N.pt` holds a finished block. Every write is
    atomic.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(identity, sort_keys=True, indent=1)
        path = self.folder / "run.json"
        if path.exists():
            found = json.loads(path.read_text())
            expected = json.loads(text)
            if found != expected:
                differing = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
                raise ValueError(
                    f"one-shot pruning: {path} belongs to another run, it differs in {', '.join(differing)}; resume "
                    "with the same model, data and options, or name an empty folder"
                )
        else:
            write_text(path, text)

    def scratch(self) -> Path:
        """An empty folder for what is temporary."""
        path = self.folder / "scratch"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def close(self) -> None:
        """The temporary things go, the finished blocks stay."""
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)

    def path(self, index: int) -> Path:
        return self.folder / f"block_{index:05d}.pt"

    def load(self, index: int) -> dict[str, Any] | None:
        path = self.path(index)
        if not path.exists():
            return None
        remedy = "delete it, and the run prunes that block again"
        found: dict[str, Any] = read_checkpoint(path, "finished block", remedy)
        return found

    def save(self, index: int, tensors: dict[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        remove_unfinished(self.path(index))
        cpu = {k: v.detach().cpu() for k, v in tensors.items()}
        with replacing(self.path(index)) as temporary:
            torch.save({"tensors": cpu, "masks": {k: v.cpu() for k, v in masks.items()}}, temporary)


# Of a transformers config: what does not change what the model computes, or is in its weights.
_BESIDE = {
    "_commit_hash", "_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def _computing(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {str(key): _computing(value) for key, value in config.items() if key not in _BESIDE}
    return [_computing(value) for value in config] if isinstance(config, list | tuple) else config


def _facts_of(model: nn.Module) -> dict[str, Any]:
    """What a model's outputs hang on, for the folder of a run: its class, its weights and, where it has one, its config
    (the base of a rotary embedding is in no weight).
    """
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config = json.loads(json.dumps(_computing(to_dict()), default=str)) if callable(to_dict) else None
    return {"class": type(model).__qualname__, "config": config, "model": digest(model.state_dict())}


@dataclass
class _Part:
    """Part of the model: a stack, or the Linears that are in none."""

    stack: Stack | None
    linears: dict[str, nn.Linear]


def _parts(model: nn.Module, linears: dict[str, nn.Linear], stacks: list[Stack]) -> list[_Part]:
    parts = []
    left = dict(linears)
    for stack in stacks:
        inside = {f: m for f, m in left.items() if any(f == n or f.startswith(n + ".") for n in stack.names)}
        if inside:
            parts.append(_Part(stack, inside))
            left = {f: m for f, m in left.items() if f not in inside}
    if left:
        parts.append(_Part(None, left))
    return parts


def prune_blocks_(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: list[Batch],
    solver: Solver,
    keep: Mapping[str, int],
    patterns: Mapping[str, InWeight],
    *,
    scope: str = "layer",
    spill: bool | str | os.PathLike[str] = True,
    small_heap: bool = False,
    state: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    take: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Prunes linears (fqn -> Linear of model) in place, keep[fqn] units of patterns[fqn] in each.

    take(fqn, mask bool `[N, K]`) is called once for each. spill: a folder for hidden states and, of weights on the
    CPU, statistics, moments and solvers' copies; True for the system's temporary one, False to keep them in memory.
    small_heap: as in `no_holes`. state: a folder that the caller holds for this run; finished blocks are kept there and
    a second call with the same arguments goes on after them, to the same masks; what is temporary lies there too
    (unless spill names a folder), and what a killed run left of it is removed. Any error, the user's interrupt
    included, leaves the model as it was and is raised again.
    """
    begin = time.perf_counter()
    record = None
    if state is not None:
        seen = digest({i: [batch.args, dict(sorted(batch.kwargs.items()))] for i, batch in enumerate(batches)})
        facts = {**(identity or {}), "keep": dict(keep), "scope": scope, "data": seen}
        record = _State(state, {**facts, **_facts_of(model)})
    named = None if isinstance(spill, bool) else Path(spill)
    scratch = named or (Path(tempfile.gettempdir()) if record is None else record.scratch())
    hidden = None if spill is False else scratch
    # What solvers and statistics put aside crosses no bus: away from the CPU it stays on the device.
    files = hidden if all(linear.weight.device.type == "cpu" for linear in linears.values()) else None
    undo = _Undo(scratch)
    done = 0
    stores: list[ChunkStore] = []

    def finish(task: Task, index: int) -> None:
        """Prunes the task, or takes over what an earlier run made of it."""
        tensors = _parameters(task)
        undo.remember(tensors)
        found = record.load(index) if record is not None else None
        if found is None:
            masks: Mapping[str, Tensor] = solver.prune(task)
            for fqn, linear in task.linears.items():
                if not bool(torch.isfinite(linear.weight).all()):
                    raise ValueError(f"one-shot pruning: {fqn} became NaN or infinite; raise damping or check the data")
            if record is not None:
                record.save(index, tensors, masks)
        else:
            for key, tensor in tensors.items():
                tensor.copy_(found["tensors"][key])
            masks = found["masks"]
        if take is not None:
            for fqn, mask in masks.items():
                take(fqn, mask)
        release()
        if progress is not None:
            progress(Progress(task.name, index, total, time.perf_counter() - begin, found is not None))

    try:
        with calibrating(model), torch.no_grad(), no_holes() if small_heap else nullcontext():
            stacks = find_stacks(model, linears)
            parts = _parts(model, dict(linears), stacks)
            total = sum(1 if p.stack is None else len(p.stack.blocks) for p in parts)
            loose: dict[str, nn.Linear] = {}
            for part in parts:
                captured = None if part.stack is None else capture(model, part.stack, batches, hidden)
                if part.stack is None or captured is None:
                    loose.update(part.linears)
                    continue
                release()
                student = captured.hidden
                stores += [student, captured.calls]
                teacher = None
                if solver.teacher:
                    teacher = student.copy(hidden)
                    stores.append(teacher)
                for b, (name, block) in enumerate(zip(part.stack.names, part.stack.blocks)):
                    inside = {f: m for f, m in part.linears.items() if f == name or f.startswith(name + ".")}
                    task = BlockTask(
                        name, block, inside, {f: keep[f] for f in inside}, {f: patterns[f] for f in inside}, scope, b,
                        captured, student, spill=files,
                    )  # fmt: skip
                    if teacher is not None:  # the dense block, before it is pruned
                        task.target = teacher
                        task.advance(teacher)
                    if inside:
                        finish(task, done)
                    done += 1
                    last = b == len(part.stack.blocks) - 1
                    if not last:
                        task.advance(student)
                captured.close()
            if loose:
                finish(LooseTask("", model, loose, dict(keep), dict(patterns), scope, batches, spill=files), done)
    except BaseException:
        undo.restore()
        raise
    finally:
        undo.close()
        for store in stores:
            store.close()
        if record is not None:
            record.close()
