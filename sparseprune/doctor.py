"""What this installation can run, and what is missing, one line each. Never raises for a missing part."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass

from . import __version__, _native, backends
from .bench.machine import cpu_model

__all__ = ["Finding", "examine", "render"]

_OPTIONAL = {
    "rich": "progress display; pip install 'sparseprune[demo]'",
    "matplotlib": "plots; pip install 'sparseprune[plot]'",
    "transformers": "pretrained models; pip install 'sparseprune[hf]'",
    "triton": "GPU kernels; pip install 'sparseprune[gpu]' (CUDA builds of torch bring it)",
    "onnxruntime": "a second dense baseline; pip install 'sparseprune[export]'",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination: ``good`` is False where something is missing that a user may want, None where it is
    missing and nothing here could use it.
    """

    what: str
    state: str
    good: bool | None = True
    remedy: str = ""


def _package(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _core() -> list[Finding]:
    core = _native.C
    if core is None:
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
        found = f"compiler found: {compiler}" if compiler else "no C++ compiler on the path"
        return [
            Finding(
                "compiled core", f"absent ({found}); the plain-torch reference runs", False, _native.why_no_c() or ""
            )
        ]
    tiers = ", ".join(core.runnable_tiers())
    return [
        Finding("compiled core", f"loaded, tier {core.tier()} ({core.lanes()} lanes); this CPU can run: {tiers}"),
        Finding(
            "OpenMP",
            "on" if core.openmp else "off: kernels run on one thread",
            core.openmp,
            "" if core.openmp else "install a compiler with OpenMP (on macOS: libomp) and reinstall",
        ),
    ]


def _setting(variable: str, value: str) -> Finding:
    """An environment variable that is set, and what is wrong with it or passed over because of it."""
    reason = _native.why_no_c() or ""
    if variable == "SPARSEPRUNE_CPU" and variable in reason:
        return Finding(variable, value, False, "names no tier that can run here, so the core is not loaded; unset it")
    if variable == "SPARSEPRUNE_BACKEND":
        try:
            forced = backends.forced_backend()
        except ValueError as error:
            return Finding(variable, value, False, f"{error}; every op raises until it is unset")
        if forced != "native":
            return Finding(variable, value, False, f"every op runs in {forced} or raises: no other runs; unset it")
    return Finding(variable, value)


def examine() -> list[Finding]:
    """The findings, in the order in which :func:`render` prints them."""
    import torch

    findings = [
        Finding(
            "sparseprune", f"{__version__} on Python {platform.python_version()}, {sys.platform} {platform.machine()}"
        ),
        Finding("CPU", f"{cpu_model()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        Finding("torch", torch.__version__),
        *_core(),
    ]
    if torch.cuda.is_available():
        findings.append(Finding("GPU", torch.cuda.get_device_name()))
    else:
        findings.append(
            Finding(
                "GPU",
                "no driver or no device that torch can see",
                False,
                "CPU kernels are used; nothing to do without a GPU",
            )
        )
    from .cuda import kernel_status

    findings += [Finding(name, state, good) for name, state, good in kernel_status()]
    for name, use in _OPTIONAL.items():
        version = _package(name)
        findings.append(Finding(name, version or "absent", version is not None, "" if version else use))
    for variable in (
        "SPARSEPRUNE_BACKEND",
        "SPARSEPRUNE_CPU",
        "SPARSEPRUNE_CACHE",
        "OMP_NUM_THREADS",
        "TRITON_INTERPRET",
    ):
        if os.environ.get(variable):
            findings.append(_setting(variable, os.environ[variable]))
    return findings


def render(findings: list[Finding]) -> str:
    """The findings as text: ``ok``, ``--`` or nothing, what, state, and the remedy on a line of its own."""
    width = max(len(f.what) for f in findings)
    lines = []
    for finding in findings:
        mark = {True: "ok", False: "--", None: "  "}[finding.good]
        lines.append(f"{mark}  {finding.what + ':':<{width + 1}} {finding.state}")
        if finding.remedy:
            lines.append(f"      {finding.remedy}")
    return "\n".join(lines)
