"""Why a Triton kernel does not run: true reasons, and never the interpreter behind a user's back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparseprune import backends
from sparseprune._registry import kernels_of
from sparseprune.triton import _environment

EYE = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), torch.eye(16)[None])


def _reasons(op, *args):
    (triton,) = [kernel for kernel in kernels_of(op) if kernel.backend == "triton"]
    return " ".join(triton.why_not(*args))


@pytest.fixture
def interpreter(monkeypatch, need_package):
    """As in a process that asked for the interpreter; reasons only, nothing is launched."""
    need_package("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "triton")


@pytest.mark.parametrize("variables", [{}, {"TRITON_INTERPRET": "1"}, {"SPARSEPRUNE_BACKEND": "triton"}])
def test_cpu_tensors_reach_the_interpreter_only_when_both_variables_ask_for_it(monkeypatch, variables):
    for name in ("TRITON_INTERPRET", "SPARSEPRUNE_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    w = torch.ones(3)
    assert "needs CUDA or ROCm tensors, got cpu" in _reasons("apply_mask_", w, w > 0)
    assert "needs CUDA or ROCm tensors, got cpu" in _reasons("topk_mask", [w], 1)
    assert "needs CUDA or ROCm tensors, got cpu" in _reasons("bsr_linear", torch.ones(2, 16), *EYE, None, "none")


def test_what_can_run_has_no_reason(interpreter):
    w = torch.ones(3)
    assert not _reasons("apply_mask_", w, w > 0)
    assert not _reasons("bsr_linear", torch.ones(2, 16), *EYE, None, "none")
    assert not _reasons("masked_linear", torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3) > 0, None)


def test_each_reason_names_what_was_needed_and_what_came(interpreter):
    x, (crow, col, _) = torch.ones(2, 15), EYE
    wide = torch.ones(3, dtype=torch.float64)
    assert "needs float32, float16, bfloat16, got float64" in _reasons("topk_mask", [wide], 1)
    assert "got 3x5" in _reasons("bsr_linear", x, crow, col, torch.ones(1, 3, 5), None, "none")
    assert "needs blocks [nblocks, r, c]" in _reasons("csr_linear_dx", x, crow, col, torch.ones(1), 15)
    assert "needs contiguous int32 indices, got torch.int64" in _reasons("sddmm", x, x, crow.long(), col, 16, 16)
    assert "needs contiguous tensors" in _reasons("masked_copy", torch.ones(3, 2).t(), torch.ones(2, 3) > 0)
    assert "needs M among 2, 4, 8, 16, 32, got 6" in _reasons("nm_mask", torch.ones(2, 6), 2, 6)
    assert "one dtype" in _reasons("masked_linear_dw", x, x.half(), torch.ones(15, 15) > 0)


def test_triton_missing_is_a_reason(interpreter, monkeypatch):
    monkeypatch.setattr(_environment, "_why_no_triton", lambda: "Triton is not installed")
    assert _reasons("apply_mask_", torch.ones(3), torch.ones(3) > 0) == "Triton is not installed"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        backends.choose("apply_mask_", torch.ones(3), torch.ones(3) > 0)


def test_importing_the_ops_never_imports_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # any import of it now raises ImportError
        "import torch, sparseprune.ops, sparseprune.triton.aot\n"
        "sparseprune.ops.apply_mask_(torch.ones(3), torch.ones(3) > 0)\n"
        "assert sparseprune.triton.aot.specs()\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
