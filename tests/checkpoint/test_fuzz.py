"""Random damage and random craft, for SPARSEPRUNE_FUZZ_SECONDS (5): nothing but CheckpointError comes out of a file,
the model stays as it was, what is accepted runs, and memory stays small. The seed is fresh and printed; run

    python tests/checkpoint/test_fuzz.py SEED SECONDS ROUND

to begin at a round that failed.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import secrets
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_GROWTH = 300  # MiB, over what the first rounds take; the files are of some KB
WARM = 40  # rounds


def test_random_files():
    seconds, seed = float(os.environ.get("SPARSEPRUNE_FUZZ_SECONDS", "5")), secrets.randbelow(1 << 32)
    run = subprocess.run(
        [sys.executable, __file__, str(seed), str(seconds)], capture_output=True, text=True, timeout=seconds + 300
    )
    print(run.stdout)
    assert run.returncode == 0, f"seed {seed}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    rounds, refused = (int(word) for word in run.stdout.split()[-4:-1:2])
    assert rounds > WARM and 0 < refused < rounds


def main(seed: str, seconds: float, first: int = 0) -> None:
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    path, target, bases = folder / "a.safetensors", empty(), files(folder)
    begin, refused, baseline, number = time.monotonic(), 0, 0, first
    while time.monotonic() < begin + seconds or number < first + WARM + 1:
        chance = random.Random(f"{seed} {number}")
        kind = chance.choice([damage, craft_structure, craft_tensors, craft_header])
        path.write_bytes(chance.choice(bases))
        kind(path, chance)
        try:
            refused += attempt(path, target, folder / "out.safetensors")
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            baseline = used if number < first + WARM else baseline
            assert used < baseline + MOST_GROWTH, f"{used} MiB, {baseline} MiB before"
        except BaseException:
            print(f"seed {seed}, round {number}, {kind.__name__}", flush=True)
            raise
        number += 1
    print(f"seed {seed}: {number - first} rounds {refused} refused")


def empty() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 16))
    model.register_buffer("flags", torch.rand(3, 5) < 0.5)
    model.tied = model[3]
    return model.eval()


def files(folder: Path) -> list[bytes]:
    """One of each kind that save writes."""
    import torch

    import sparseprune as sp
    from sparseprune.nn import RoundedLinear

    found = []
    layouts: list[dict[str, Any]] = [{"layout": "csr"}, {"layout": "bsr", "blocksize": (2, 1)}, {"layout": "nm"}, {}]
    for options in layouts:
        for values in ("float32", "int8"):
            model = empty()
            if options.get("layout") == "nm":
                sp.prune_(model, granularity=sp.NM(2, 4))
            else:
                sp.prune_(model, sparsity=0.8)
            if options:
                sp.sparsify_(model, **options)
                model[2].set_low_rank_(torch.randn(2, 32), torch.randn(16, 2))
            else:
                model[0] = sp.MaskedLinear.from_linear(model[0])
                model[3] = model.tied = RoundedLinear.from_linear(model[3], 4)
            sp.save(model, folder / "base", value_dtype=values)
            found.append((folder / "base").read_bytes())
    return found


def attempt(path: Path, target: Any, out: Path) -> bool:
    """Whether load refused. Every other exception comes out."""
    import torch

    import sparseprune as sp
    from sparseprune import checkpoint

    model = copy.deepcopy(target)
    refused = False
    try:
        sp.load(model, path)
    except checkpoint.CheckpointError as error:
        str(error).encode()
        refused = True
        for (name, value), before in zip(model.state_dict().items(), target.state_dict().values(), strict=True):
            assert torch.equal(value, before), name
    with torch.no_grad():
        model(torch.randn(3, 16))
    try:
        report = checkpoint.describe(path)
        str(report).encode()
        if report.dense_bytes < 1 << 20:
            checkpoint.convert(path, out, dense=True)
            checkpoint.convert(path, out, value_dtype="bfloat16")
    except checkpoint.CheckpointError:
        pass
    return refused


def damage(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content)) if chance.random() < 0.5 else chance.randrange(min(300, len(content)))
        what = chance.randrange(5)
        if what == 0:
            content[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            content[at : at + chance.randint(1, 40)] = chance.randbytes(chance.randint(0, 40))
        elif what == 2:
            del content[at:]
            content += b"\0"
        elif what == 3:
            content[:8] = struct.pack("<Q", chance.choice([0, 1, at, 2**31, 2**63, 2**64 - 1]))
        else:
            content += chance.randbytes(chance.randint(1, 20))
    path.write_bytes(content)


def strange(chance: random.Random) -> Any:
    """A value of JSON that is not expected where it comes to stand."""
    return chance.choice(
        [
            None, True, False, 0, -1, 1, 2, 3, 4, 16, 31, 32, 33, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**62,
            2**63 - 1, 2**63, 2**64, 10**100, 0.5, -0.0, 1e308, "", "x", "0", "0.weight", "csr", "bsr", "nm", "bits",
            "int8", "float64", "bfloat16", "bitmask", "delta4", "delta8", "\0", "\ud800", "ü" * 300, [], {}, [[]], [0],
            [1, 1], [2, 4], [0, 0], [2**31 - 1, 2**31 - 1], [2**62, 1], [0, 2**63], [16, 32], [32, 16], [0.0, 1.0],
            ["0.weight"], {"encoding": "bits", "shape": [2**40]}, {"0": 1}, [1] * 70, [[1] * 3] * 3,
        ]
    )  # fmt: skip


def mutate(found: Any, chance: random.Random) -> None:
    """Changes one node of a JSON value in place."""
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            walk(node[key])

    walk(found)
    if not nodes:
        return
    node, key = chance.choice(nodes)
    what = chance.randrange(6)
    if what == 0 and isinstance(node, dict):
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[chance.choice(["", "x", "0", "2", "0.weight", "2.low_rank_a", "flags", "0.mask"])] = strange(chance)
    elif what == 2:
        other, place = chance.choice(nodes)
        node[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
    elif what == 3 and type(node[key]) is int:
        node[key] += chance.choice([-1, 1])
    else:
        node[key] = strange(chance)


def opened(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


def sealed(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """With a digest that is right."""
    from safetensors.torch import save_file

    from sparseprune.checkpoint.file import digest

    metadata["digest"] = digest(tensors, metadata["structure"])
    save_file(tensors, path, metadata)


def craft_structure(path: Path, chance: random.Random) -> None:
    tensors, metadata = opened(path)
    found = json.loads(metadata["structure"])
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        mutate(found, chance)
    text = json.dumps(found)
    if chance.random() < 0.05:
        at, depth = chance.randrange(len(text)), chance.choice([10, 990, 100_000])
        text = text[:at] + "[" * depth + chance.choice(["]" * depth, ""]) + text[at:]
    sealed(path, tensors, {**metadata, "structure": text})


def craft_tensors(path: Path, chance: random.Random) -> None:
    import torch

    tensors, metadata = opened(path)
    for _ in range(chance.choice([1, 1, 2])):
        name = chance.choice(sorted(tensors))
        tensor = tensors[name]
        changes: list[Callable[[], Any]] = [
            lambda tensor=tensor: tensor[:-1].clone() if tensor.dim() else tensor,
            lambda tensor=tensor: tensor.reshape(-1),
            lambda tensor=tensor: tensor.reshape(1, *tensor.shape),
            lambda tensor=tensor: tensor.to(chance.choice([torch.int64, torch.float64, torch.bfloat16, torch.uint8])),
            lambda: torch.tensor(chance.choice([0.0, float("nan"), 1e30])),
            lambda: torch.zeros(chance.choice([(0,), (0, 5), (7, 7), (1, 1, 1)]), dtype=torch.complex64),
        ]
        what = chance.randrange(len(changes) + 4)
        if what < len(changes):
            tensors[name] = changes[what]()
        elif what == len(changes) and len(tensors) > 1:
            del tensors[name]
        elif what == len(changes) + 1:
            new = chance.choice([f"{name}::index", f"{name}x", "", "2.low_rank_a", "0.mask", "0.weight::crow"])
            tensors[new] = tensor.clone()
        elif tensor.numel():  # other content of the same size
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            for _ in range(chance.randint(1, 8)):
                raw[chance.randrange(raw.numel())] = chance.choice([0, 1, 15, 127, 128, 255, chance.randrange(256)])
            if tensor.dtype == torch.bool:
                raw &= 1
            tensors[name] = raw.view(tensor.dtype).view(tensor.shape)
    sealed(path, tensors, metadata)


def craft_header(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for _ in range(chance.choice([1, 1, 3])):
        mutate(header, chance)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
