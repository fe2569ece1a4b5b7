"""``sparseprune sensitivity``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from typing import Any

from ..._arguments import check_file, path_of, real, whole
from ..._files import write_text
from .. import shared

ABOUT = "How much each layer's pruning costs, and the densities suggested for a global budget."
EXAMPLE = "sparseprune sensitivity --model folder --text calibration.txt --sparsity 0.6 --out sensitivity.json"
PLACE = 7


def options(command: argparse.ArgumentParser) -> None:
    shared.model_options(command)
    command.add_argument("--text", required=True, type=path_of, help="calibration text")
    command.add_argument("--sparsity", type=real("[0, 1)"), default=0.5, help="global fraction of zeros (default 0.5)")
    command.add_argument("--windows", type=whole(1), default=32, help="windows of calibration text (default 32)")
    command.add_argument(
        "--loss-windows", type=whole(1), default=8, help="of these, how many the loss is measured on (default 8)"
    )
    command.add_argument(
        "--densities", type=real("(0, 1]"), nargs="+", default=[0.7, 0.5, 0.3],
        help="tried in each group (default 0.7 0.5 0.3)",
    )  # fmt: skip
    command.add_argument("--context", type=whole(2), default=512)
    shared.device_option(command)
    command.add_argument("--out", type=path_of, help="write the densities as JSON, and a plot beside it")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ...language import perplexity
    from ...nn import prunable_linears
    from ...pruning.oneshot import block_of, fast_bfloat16, sensitivity

    device = shared.find_device(arguments)
    shared.read_text(arguments.text)
    picture = None
    if arguments.out is not None:
        picture = arguments.out.with_suffix(".png")
        if picture == arguments.out:
            raise ValueError(f"--out expected a .json file, got {arguments.out}, where the plot goes")
        check_file(arguments.out, "--out")
        check_file(picture, "--out's plot")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--out draws a plot too, which needs matplotlib; pip install 'sparseprune[plot]'")
    model, tokenizer = shared.language_model(arguments)
    model.to(device)
    windows = shared.text_windows(arguments, tokenizer).to(device)
    judged = windows[:: max(1, len(windows) // arguments.loss_windows)][: arguments.loss_windows]
    linears = prunable_linears(model)
    groups = list(dict.fromkeys(block_of(model, linears).values()))
    total, done, begin = len(groups) * len(arguments.densities), 0, time.perf_counter()

    def loss(pruned: Any) -> float:
        device = next(pruned.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bfloat16(device)):
            return perplexity(pruned, judged).loss

    def progress(group: str, density: float, value: float) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - begin) / done * (total - done) / 60
        print(f"[{done}/{total}, {left:.0f} min left] {group} at density {density:.2f}: loss {value:.4f}", flush=True)

    print(f"{total} losses of {len(groups)} groups, each on {judged.numel():,} tokens", flush=True)
    found = sensitivity(model, linears, list(windows.split(1)), loss, densities=arguments.densities, progress=progress)
    print(found.table())
    densities = found.suggest(1 - arguments.sparsity)
    print(f"suggested for {arguments.sparsity:g} zeros in all:")
    for group, members in found.members.items():
        print(f"  {group}: density {densities[members[0]]:.4f}")
    if picture is not None:
        write_text(arguments.out, json.dumps(densities, indent=2) + "\n")
        found.plot(picture)
        print(f"written to {arguments.out} (for prune_(..., densities=)) and {picture}")
    return 0
