"""A run that is killed (SIGKILL) again and again and goes on from its checkpoint, beside one that never was.

Arguments: a folder for what comes out, and the seed of the moments. The runs are forks of this process, so that a kill
costs no new start of Python. Everything that is random or stateful in the loop is on.
"""

from __future__ import annotations

import io
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from sparseprune import RetentionSchedule
from sparseprune.data import Augment, TokenLoader
from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner
from sparseprune.pruning import MaskSet
from sparseprune.runner.text_encoder import TextEncoder

STEPS = 60
KILLS = 10
HALF_WRITTEN = (2, 6)  # the kills, by number, that fall into the middle of a checkpoint's writing


def train(folder: Path, name: str, report: int, half_written: bool) -> None:
    """One life of a run: to its end, or to wherever it is killed. Writes a byte to ``report`` after each step."""
    ids = torch.randint(4, 20, (64, 7), generator=torch.Generator().manual_seed(2))
    labels = ids[:, 0] % 3
    torch.manual_seed(0)
    model = TextEncoder(20, 3, hidden=16, ffn=32, layers=2, heads=2, max_length=8)
    with torch.no_grad():  # something for a low-rank term to find
        model.layers[0].ffn.expand.weight.copy_(torch.randn(32, 1) @ torch.randn(1, 16) / 4)
    config = GANConfig(
        schedule=RetentionSchedule(0.1, 0.2), steps=STEPS, gumbel=0.02, dropout=True, accumulate=2,
        autocast="bfloat16", compensation="best", evaluate_every=7,
        discriminator=DiscriminatorConfig(depth=1, width=16, rows=16),
    )  # fmt: skip
    train = TokenLoader(ids.tolist(), labels.tolist(), 8, True, 1, Augment(drop=0.1, mask=0.1))
    valid = TokenLoader(ids.tolist(), labels.tolist(), 32)
    steps = 0

    def stepped(record: dict[str, Any]) -> None:
        nonlocal steps
        steps += 1
        os.write(report, b".")
        if half_written and steps == 2:
            torch.save = cut_short  # type: ignore[assignment]

    whole_save = torch.save

    def cut_short(state: Any, path: Path) -> None:
        content = io.BytesIO()
        whole_save(state, content)
        path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    pruner = GANPruner(model, config)
    history = pruner.fit(train, valid, checkpoint=folder / f"{name}.ckpt", checkpoint_every=1, callback=stepped)
    torch.save(
        {
            "state": pruner.finalize().state_dict(),
            "hash": MaskSet(pruner.masks).mask_hash(),
            "history": history.to_dict(),
        },
        folder / f"{name}.pt",
    )


def live(folder: Path, name: str, half_written: bool = False) -> tuple[int, int]:
    """(process id, the end of the pipe that says how far it is)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            train(folder, name, writing, half_written)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    return child, reading


def died(child: int, reading: int) -> bool:
    """Waits for the child; True: by SIGKILL. RuntimeError where it failed by itself."""
    _, status = os.waitpid(child, 0)
    os.close(reading)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the run failed by itself: {os.waitstatus_to_exitcode(status)}")
    return False


def kill_at_random(child: int, reading: int, moments: random.Random) -> None:
    """After none to three of its steps, and a part of the next."""
    for _ in range(moments.randrange(4)):
        select.select([reading], [], [], 60)
        os.read(reading, 1)
    time.sleep(moments.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(seed)
    assert not died(*live(folder, "whole"))
    kills = halves = 0
    while kills < KILLS:
        half_written = kills in HALF_WRITTEN
        child, reading = live(folder, "killed", half_written)
        if not half_written:
            kill_at_random(child, reading, moments)
        if not died(child, reading):
            break
        kills += 1
        halves += bool(list(folder.glob(".killed.ckpt.*")))
    if kills == KILLS:
        died(*live(folder, "killed"))
    left = sorted(path.name for path in folder.glob(".*"))
    (folder / "log.json").write_text(json.dumps({"kills": kills, "half_written": halves, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
