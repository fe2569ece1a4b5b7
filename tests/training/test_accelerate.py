"""Two processes started by accelerate, with the loaders that it prepares: one set of masks, and a resume to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")


@pytest.mark.slow
def test_accelerate_launches_a_run_that_resumes(torchrun, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    torchrun(Path(__file__).with_name("accelerated.py"), tmp_path, launcher=launch)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert "expected the bare model, got DistributedDataParallel" in first["wrapped"]["error"]
    for seedable in (False, True):
        runs = [found[f"{name} {seedable}"] for found in (first, second) for name in ("whole", "killed")]
        assert {run["processes"] for run in runs} == {2} and len({run["hash"] for run in runs}) == 1
        # 100 examples in two shares of 7 batches, four times over.
        assert len(runs[0]["history"]["steps"]) == 28 and runs[0]["density"] == 173 / 576
        for run in runs:
            assert run["history"] == runs[0]["history"]
            for name, value in run["state"].items():
                assert torch.equal(value, runs[0]["state"][name]), name
