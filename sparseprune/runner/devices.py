"""Where a run computes: ``--device auto|cpu|cuda``."""

from __future__ import annotations

import re

import torch

__all__ = ["describe_device", "find_device"]


def find_device(name: str) -> torch.device:
    """"auto": a GPU where torch sees one, else the CPU; "cpu"; "cuda", "cuda:1" ... ValueError, with the remedy, on
    another name and where there is no such GPU.
    """
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if name not in ("auto", "cpu") and found is None:
        raise ValueError(f"device expected auto, cpu, cuda or cuda:N, got {name!r}")
    there = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not there):
        return torch.device("cpu")
    if not there:
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "torch sees none" if built else f"torch {torch.__version__} is built without CUDA"
        raise ValueError(
            f"device expected a GPU for {name!r}, got none ({why}); use cpu or auto"
            + ("" if built else ", or install a build of torch for CUDA")
        )
    index = torch.cuda.current_device() if found is None or found[1] is None else int(found[1])
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device expected one of the {count} GPUs here, cuda:0 to cuda:{count - 1}, got {name!r}")
    return torch.device("cuda", index)


def describe_device(device: torch.device) -> str:
    """For a record: the device, and of a GPU its name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
