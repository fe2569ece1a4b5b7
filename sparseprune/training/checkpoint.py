"""The file that a training run goes on from: one, written by the first process beside its place and renamed into it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._config import Config, described
from .._digest import digest
from .._files import holding, read_checkpoint, remove_unfinished, save_checkpoint
from ..pruning.processes import Processes

__all__ = ["held", "identity", "parse", "random_state", "read", "set_random_state", "write"]

_FORMAT = 7


def random_state(device: torch.device) -> dict[str, Tensor | None]:
    """Of torch's generators: the CPU's, and that of the GPU that trains."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state: Mapping[str, Tensor | None], device: torch.device) -> None:
    """What :func:`random_state` gave, as far as this device has it: a run may go on on another one."""
    cpu, cuda = state["cpu"], state["cuda"]
    assert cpu is not None
    torch.set_rng_state(cpu)
    if device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


def identity(config: Config, teacher: nn.Module) -> dict[str, Any]:
    """Whose run it is: a resumed one must have the same ``config``, and see the same ``teacher``."""
    return {"config": described(config), "teacher": digest(teacher.state_dict())}


@contextmanager
def held(path: Path | None, processes: Processes) -> Iterator[None]:
    """Holds the file, which need not be there, for one run: two would write over one another's steps. BlockingIOError,
    in every process, where another run does. No file: nothing.
    """
    with ExitStack() as ending:
        refused: OSError | None = None
        if path is not None and processes.index == 0:
            place = Path(os.path.realpath(path))
            remedy = "wait for it, or give this run another checkpoint"
            try:
                ending.enter_context(holding(place.parent, remedy, warnings.warn, place.name))
            except OSError as error:
                refused = error
        told = None if path is None else processes.gather(None if refused is None else str(refused))[0]
        if refused is not None:
            raise refused
        if told is not None:
            raise BlockingIOError(told)
        yield


def write(path: Path, state: Mapping[str, Any]) -> None:
    """state: what :func:`identity` gave; ``tensors``; ``processes``, one entry each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"format": _FORMAT, **state})


def read(path: Path, processes: Processes) -> bytes | None:
    """The file as the first process sees it; None where there is none."""
    own = None
    if processes.index == 0:
        remove_unfinished(path)
        own = path.read_bytes() if path.exists() else None
    return processes.gather(own)[0]


def parse(path: Path, saved: bytes, config: dict[str, Any], teacher: str, processes: Processes) -> dict[str, Any]:
    """What was written, on the CPU whatever device it was on; config, teacher: of :func:`identity`. ValueError, with
    the remedy, where it cannot be read or is another run's.
    """
    state = read_checkpoint(path, "training checkpoint", "delete it", saved)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected a training checkpoint of format {_FORMAT}; delete it to start again")
    if state["config"] != config:
        differing = sorted(key for key in {*state["config"], *config} if state["config"].get(key) != config.get(key))
        raise ValueError(
            f"{path}: written under another configuration, it differs in {', '.join(differing)}; delete it or restore "
            "the configuration"
        )
    if state["teacher"] != teacher:
        raise ValueError(f"{path}: written with another teacher; delete it to start again")
    if len(state["processes"]) != processes.size:
        raise ValueError(
            f"{path}: written by {len(state['processes'])} processes, expected {processes.size}; start as many, or "
            "delete it to start again"
        )
    return state
