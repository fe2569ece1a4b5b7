"""One-shot pruning killed (SIGKILL) in the middle of a block, of a file and behind a block, then resumed, beside a run
that never was: for each criterion.

Argument: a folder; prints one JSON object, name of the run -> what it found. The runs are forks of this process, so
that a kill costs no new start of Python.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune.pruning.oneshot.driver import _State

BLOCKS = 4
MOMENTS = ("pass", "pass", "write", "between")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


def data() -> Tensor:
    return torch.randn(256, 24, generator=torch.Generator().manual_seed(1))


def run(criterion: str, state: Path, passes: list[int] | None = None) -> dict[str, Any]:
    """passes: the index of the block at work, once for each forward pass of a Linear."""
    pruned, seen = model(), []
    temporary: list[int] = []

    def progress(each: Any) -> None:
        seen.append(each)
        temporary.append(len(list((state / "scratch").iterdir())))

    options = {"state": state, "chunk_tokens": 64, "progress": progress}
    if passes is not None:
        for module in pruned.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda *_: passes.append(len(seen)))
    report = sp.prune_(pruned, 0.6, criterion=criterion, data=data(), criterion_options=options)
    digest = [float(value.double().square().sum()) for value in pruned.state_dict().values()]
    resumed = sum(each.resumed for each in seen)
    return {"hash": report.masks.mask_hash(), "weights": digest, "resumed": resumed, "temporary": temporary}


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lethal(criterion: str, state: Path, moment: str, at: int) -> None:
    """A run that dies: at forward pass number at, in the middle of writing block number at, or behind it."""
    if moment == "pass":

        class Count(list):  # type: ignore[type-arg]
            def append(self, item: Any) -> None:
                super().append(item)
                if len(self) == at:
                    die()

        run(criterion, state, Count())
    whole = torch.save if moment == "write" else None
    save = _State.save

    def cut_short(content: Any, path: Any) -> None:
        assert whole is not None
        whole(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    def saved(self: _State, index: int, *rest: Any) -> None:
        if index == at and moment == "write":
            torch.save = cut_short  # type: ignore[assignment]
        save(self, index, *rest)
        if index == at:
            die()

    _State.save = saved  # type: ignore[method-assign]
    run(criterion, state)


def forked(work: Callable[[], Any]) -> tuple[bool, Any]:
    """(killed, what work returned in a process of its own)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.write(writing, json.dumps(work()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True, None
    if status:
        raise RuntimeError(f"a run failed by itself: {status}")
    return False, json.loads(content)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    moments = random.Random(0)
    found: dict[str, Any] = {}
    for criterion in ("wanda", "sparsegpt", "admm"):
        passes: list[int] = []
        whole = run(criterion, folder / f"{criterion}_whole", passes)
        found[criterion] = {"whole": whole, "killed": []}
        for number, moment in enumerate(MOMENTS):
            state = folder / f"{criterion}_{number}"
            at = moments.randrange(1, BLOCKS - 1)
            if moment == "pass":  # somewhere in the middle of that block's work
                own = [i for i, block in enumerate(passes, start=1) if block == at]
                at = moments.choice(own[len(own) // 4 :])
            killed, _ = forked(lambda c=criterion, s=state, m=moment, a=at: lethal(c, s, m, a))
            left = sorted(p.name for p in state.iterdir())
            again = run(criterion, state)
            after = sorted(p.name for p in state.iterdir())
            found[criterion]["killed"].append({"killed": killed, "left": left, "after": after, **again})
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
