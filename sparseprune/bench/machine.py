"""What a timing depends on: CPU, threads, tier, versions, load. Logged beside every figure."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

import sparseprune

from .. import _native, backends

__all__ = ["busy", "cpu_model", "describe", "device_name", "fingerprint", "gpu_kernels", "load", "one_line", "tier"]


@functools.cache
def cpu_model() -> str:
    """The CPU's name with its family and model number: under a hypervisor the name alone may say little."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if not line.strip():
                break
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name


def tier() -> str:
    """The tier of the compiled core in use, or why there is none: ``reference``, or another forced backend."""
    forced = backends.forced_backend()
    if forced not in (None, "native"):
        return forced
    return str(_native.C.tier()) if _native.C is not None else "reference"


def device_name(device: torch.device) -> str:
    """The CPU's name, or a GPU's with its compute capability: two cards of one name and capability are taken as one."""
    if device.type == "cpu":
        return cpu_model()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (capability {major}.{minor})"
    return str(device)


def gpu_kernels() -> str:
    """Which kernels a GPU's timing was made with: the built module, Triton, or a forced backend."""
    forced = backends.forced_backend()
    if forced is not None:
        return forced
    path = getattr(_native.CUDA, "__file__", None)
    built = "none"
    if path:
        status = os.stat(path)
        built = f"{status.st_size:x}.{status.st_mtime_ns:x}"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a vendor's build goes by another name
        triton = "none" if importlib.util.find_spec("triton") is None else "unnamed"
    return f"cuda={built} triton={triton}"


def load() -> float | None:
    """Load average of the last minute; None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy(load: float | None) -> bool:
    """Whether so many run at once that a timing says little: a quarter more than there are cores, since training that
    went before counts in the load itself.
    """
    return load is not None and load > 1.25 * (os.cpu_count() or 1)


@functools.cache
def fingerprint() -> str:
    """Version of the package and of the compiled core's file: a rebuilt core is timed afresh."""
    text = sparseprune.__version__
    path = getattr(_native.C, "__file__", None)
    if path:
        status = os.stat(path)
        text += f"+{status.st_size:x}.{status.st_mtime_ns:x}"
    return text


def describe() -> dict[str, Any]:
    """Everything a reader of a timing must know, ready for JSON."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tier": tier(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_1min": load(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "(unset)"),
        "torch": torch.__version__,
        "sparseprune": sparseprune.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def one_line() -> str:
    """The same in one line for the head of a table."""
    d = describe()
    parts = [
        f"{d['cpu']}, {d['cores']} cores, {d['threads']} threads",
        f"tier {d['tier']} (torch: {d['torch_cpu_capability']})",
        f"load {d['load_1min']}",
        f"torch {d['torch']}",
        f"sparseprune {d['sparseprune']}",
        f"OMP_WAIT_POLICY {d['omp_wait_policy']}",
    ]
    return ", ".join(parts)
