"""A run killed at ten random moments, some of them in the middle of a checkpoint's writing, ends as if nothing had
been.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks")
def test_ten_kills_change_no_bit(tmp_path):
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "1"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["kills"] == 10 and log["half_written"] >= 2 and log["left"] == []
    whole, killed = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt")
    assert whole["hash"] == killed["hash"] and whole["history"] == killed["history"]
    assert len(whole["history"]["steps"]) == 60 and any(e["phase"] == "heal" for e in whole["history"]["evaluations"])
    assert whole["state"].keys() == killed["state"].keys()
    assert "layers.0.ffn.expand.low_rank_a" in whole["state"]
    for name, value in whole["state"].items():
        assert torch.equal(value, killed["state"][name]), name
