"""Triton kernels as tests see them: under the interpreter on the CPU, or on a card.

Triton decides when it is imported whether it interprets, so a test marked ``interpret`` cannot run in a process that
compiles. The first such test starts one child pytest with TRITON_INTERPRET=1 for all that were selected; each test then
reports what its namesake met there. A pytest started with TRITON_INTERPRET=1 runs them where it is, for a debugger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
REPORTS = "SPARSEPRUNE_TEST_REPORTS"  # where the child writes one JSON line a phase of a test
HERE = Path(__file__).parent
BAND = 256  # bytes of 0xFF (NaN in every float dtype, -1, kept) on either side of a guarded tensor

_outcomes: dict[str, dict[str, str]] | None = None


def _interpreted(session: pytest.Session) -> dict[str, dict[str, str]]:
    """node id -> the worst of its phases in the child: outcome, and text where it did not pass."""
    items = [item for item in session.items if item.get_closest_marker("interpret") and item.path.parent == HERE]
    reports = session.config._tmp_path_factory.mktemp("interpret") / "reports.jsonl"  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(session.config.rootpath)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SPARSEPRUNE_BACKEND": "triton", REPORTS: str(reports)}
    child = subprocess.run(
        [*command, "-m", "interpret", *(item.nodeid for item in items)],
        cwd=session.config.rootpath, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    outcomes: dict[str, dict[str, str]] = {}
    for line in reports.read_text(encoding="utf-8").splitlines() if reports.exists() else []:
        report = json.loads(line)
        if outcomes.get(report["nodeid"], {"outcome": "passed"})["outcome"] == "passed":
            outcomes[report["nodeid"]] = report
    silent = f"the interpreting pytest exited {child.returncode} without a report of this test\n{child.stdout[-6000:]}"
    silent += child.stderr[-2000:]
    for item in items:
        outcomes.setdefault(item.nodeid, {"outcome": "failed", "text": silent})
    return outcomes


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    global _outcomes
    if INTERPRETING or pyfuncitem.get_closest_marker("interpret") is None:
        return None
    if _outcomes is None:
        _outcomes = _interpreted(pyfuncitem.session)
    result = _outcomes[pyfuncitem.nodeid]
    if result["outcome"] == "failed":
        pytest.fail(result["text"], pytrace=False)
    if result["outcome"] == "skipped":
        pytest.skip(result["text"])
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not (INTERPRETING and REPORTS in os.environ):
        return
    text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
    text += "".join(f"\n{title}\n{content}" for title, content in report.sections if report.failed)
    with open(os.environ[REPORTS], "a", encoding="utf-8") as file:
        file.write(json.dumps({"nodeid": report.nodeid, "outcome": report.outcome, "text": text}) + "\n")


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpret", marks=pytest.mark.interpret),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request, need_package, monkeypatch) -> str:
    """ "cpu" under the interpreter, or "cuda"; Triton is forced as the backend."""
    need_package("triton")
    if request.param == "cuda":
        if INTERPRETING:
            pytest.skip("TRITON_INTERPRET=1: this process interprets")
        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch can see")
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "triton")
    return request.param


class Guards:
    """Tensors with bands of 0xFF around them: a read outside gives NaN, a write outside is found by :meth:`check`."""

    def __init__(self) -> None:
        self._raw: list[torch.Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
        """`shape`, all bytes 0xFF, between two bands."""
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.full((size + 2 * BAND + -size % 16,), 255, dtype=torch.uint8, device=device)
        self._raw.append(torch.cat([raw[:BAND], raw[BAND + size :]]).clone())
        self._raw.append(raw)
        self._raw.append(torch.tensor(size))
        return raw[BAND : BAND + size].view(dtype).view(shape)

    def around(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy between two bands."""
        copy = self.empty(tuple(tensor.shape), tensor.dtype, tensor.device)
        copy.copy_(tensor)
        return copy

    def check(self) -> None:
        """AssertionError where a band was written."""
        for before, raw, size in zip(self._raw[::3], self._raw[1::3], self._raw[2::3]):
            after = torch.cat([raw[:BAND], raw[BAND + int(size) :]])
            assert torch.equal(before, after), "a kernel wrote outside its buffer"


@pytest.fixture
def guards(monkeypatch):
    """:class:`Guards`; while the test runs, every torch.empty and torch.empty_like is guarded and poisoned too."""
    found = Guards()

    def empty(*shape, dtype=torch.float32, device="cpu", **rest):
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return found.empty(tuple(sizes), dtype, device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: found.empty(tuple(like.shape), like.dtype, like.device))
    yield found
    found.check()
