"""Two gloo processes, started by torchrun: one set of masks and weights, and those of one process with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparseprune.gan import GANPruner
from sparseprune.pruning.processes import Processes


@pytest.fixture(scope="module")
def results(torchrun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun(Path(__file__).with_name("two_processes.py"), folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(one, other):
    assert one["hash"] == other["hash"]
    assert one["steps"] == other["steps"] and one["evaluations"] == other["evaluations"]
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("run", ["scores", "gan", "uncertainty", "rows", "whole", "killed"])
def test_both_processes_end_with_the_same_masks_and_weights(results, run):
    same(results[0][run], results[1][run])


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(results):
    same(results[0]["whole"], results[0]["killed"])
    same(results[0]["rows whole"], results[0]["rows killed"])
    assert any(name.endswith("low_rank_a") for name in results[0]["whole"]["state"])
    assert "written by 2 processes, expected 1" in results[0]["alone on theirs"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scores", "gan", "rows"])
def test_two_processes_are_one_with_both_batches(results, method):
    """The same global batches, equal lengths, no noise: what is left are sums in another order."""
    pair, alone = results[0][method], results[0][f"{method} alone"]
    for one, other in zip(pair["steps"], alone["steps"], strict=True):
        assert one["phase"] == other["phase"]
        for key in one.keys() - {"phase"}:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (one["step"], key)
    units = [(pair["masks"][name] == mask).float() for name, mask in alone["masks"].items()]
    assert float(torch.cat([u.flatten() for u in units]).mean()) > 0.995
    for name, value in alone["state"].items():
        torch.testing.assert_close(pair["state"][name], value, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_shares_of_unequal_length_are_refused_everywhere(results):
    for found in results:
        assert "expected one number of steps, got 30 to 60" in found["uneven"]


@pytest.mark.slow
def test_rows_are_shared_and_shares_of_them_refused(results):
    for found in results:
        assert found["rows length"] == len(found["rows"]["steps"]) == 30
        assert "rows are shared among the 2 processes, expected the same ones in each, got others" in found["shares"]


def test_alone_every_exchange_leaves_things_as_they_are():
    processes = Processes()
    layer = nn.Linear(2, 2)
    processes.mean_gradients_(list(layer.parameters()))
    assert layer.weight.grad is None and processes.size == 1
    assert processes.numbers({"a": 1.5}, torch.device("cpu")) == {"a": 1.5}
    assert processes.extremes(2.0, torch.device("cpu")) == (2.0, 2.0) and processes.gather("x") == ["x"]


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match=r"expected the bare model, got DataParallel; pass its \.module"):
        GANPruner(nn.DataParallel(nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match="distributed expected 'auto' or 'off'"):
        GANPruner(nn.Sequential(nn.Linear(4, 4)), distributed="yes")
