"""Training a pruned block towards its dense outputs: against torch's Adam, what it may change, what it gains."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune.pruning import Element
from sparseprune.pruning.oneshot import reconstruct as module
from sparseprune.pruning.oneshot.reconstruct import fast_bfloat16, reconstruct
from sparseprune.pruning.oneshot.repeated import Capture
from sparseprune.pruning.oneshot.store import ChunkStore, Shelf, Shelved
from sparseprune.pruning.oneshot.task import BlockTask
from sparseprune.pruning.positions import Positions


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def store(values: list[Tensor]) -> ChunkStore:
    result = ChunkStore()
    for value in values:
        result.append(value)
    return result


def task_of(
    block: nn.Module, inputs: list[Tensor], targets: list[Tensor], positions: list[Tensor | None] | None = None
) -> tuple[BlockTask, dict[str, Tensor]]:
    """Half of each Linear's weights masked, and zeroed."""
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    captured = Capture(store([]), store([]))
    call = {"table": [{"key": None, "args": (), "kwargs": {}}], "index": [0]}
    for value, real in zip(inputs, positions or [None] * len(inputs)):
        captured.add(value, call, Positions(real))
    masks = {}
    for name, linear in linears.items():
        masks[name] = sp.ops.topk_mask(linear.weight.detach().float().abs(), linear.weight.numel() // 2)
        linear.weight.data.mul_(masks[name])
    keep = {name: int(mask.sum()) for name, mask in masks.items()}
    patterns = dict.fromkeys(linears, Element())
    return BlockTask("", block, linears, keep, patterns, "layer", 0, captured, store(inputs), store(targets)), masks


def made(chunks: int = 6, seed: int = 0) -> tuple[Block, list[Tensor], list[Tensor]]:
    torch.manual_seed(seed)
    block = Block()
    inputs = [torch.randn(2, 9, 12) for _ in range(chunks)]
    with torch.no_grad():
        return block, inputs, [block(x) for x in inputs]


def test_it_is_torchs_adam_under_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fast_bfloat16", lambda _: False)
    block, inputs, targets = made()
    task, masks = task_of(block, inputs, targets)
    other = copy.deepcopy(block)
    reconstruct(task, masks, epochs=2, rate=0.02)
    weights = {name: dict(other.named_modules())[name].weight for name in masks}
    groups = [
        {"params": [w], "lr": 0.02 * float(w.detach()[masks[n]].square().mean().sqrt())} for n, w in weights.items()
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    start = [group["lr"] for group in groups]
    order = torch.Generator().manual_seed(0)
    number = 0
    for _ in range(2):
        for i in torch.randperm(6, generator=order).tolist():
            number += 1
            for group, lr in zip(adam.param_groups, start):
                group["lr"] = lr * min(1, number / 4) * 0.5 * (1 + math.cos(math.pi * (number - 1) / 12))
            adam.zero_grad()
            ((other(inputs[i]) - targets[i]).square().mean() / targets[i].square().mean()).backward()
            for name, weight in weights.items():
                weight.grad.mul_(masks[name])
            adam.step()
    for name, weight in weights.items():
        torch.testing.assert_close(task.linears[name].weight, weight, rtol=1e-4, atol=1e-6)
        assert bool((weight[~masks[name]] == 0).all())


@pytest.mark.parametrize("bfloat16", [False, True])
def test_it_lowers_the_error_and_touches_nothing_else(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fast_bfloat16", lambda _: bfloat16)
    block, inputs, targets = made(chunks=20)
    task, masks = task_of(block, inputs, targets)
    block.norm.weight.grad = torch.ones(12)
    block.up.weight.grad = torch.full((20, 12), 3.0)
    block.down.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in block.state_dict().items()}

    def error() -> float:
        with torch.no_grad():
            return float(sum((block(x) - y).square().mean() for x, y in zip(inputs, targets)))

    at_first = error()
    with torch.no_grad():  # as the walk calls it
        reconstruct(task, masks, epochs=1, rate=0.02)
    assert error() < 0.8 * at_first
    for name, value in block.state_dict().items():
        if name in ("up.weight", "down.weight"):
            assert torch.equal(value != 0, masks[name.removesuffix(".weight")])
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])
    assert [p.requires_grad for p in block.parameters()] == [True, True, True, True, False, True]
    assert torch.equal(block.norm.weight.grad, torch.ones(12)) and torch.equal(
        block.up.weight.grad, torch.full((20, 12), 3.0)
    )
    assert block.down.weight.grad is None and block.up.bias.grad is None
    block.up.weight.square().sum().backward()  # the hooks are gone
    assert float((block.up.weight.grad - 3.0).abs().max()) > 0


def test_spilled_moments_and_weights_rounded_again_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "fast_bfloat16", lambda _: True)
    monkeypatch.setattr(module, "SLICE", 40)  # some rows that divide neither layer
    monkeypatch.setattr(Shelf, "LEAST", 1)
    shelved: list[Shelved] = []
    get = Shelf.get
    monkeypatch.setattr(Shelf, "get", lambda self, place: shelved.append(place) or get(self, place))
    made_again: list[torch.Size] = []
    rounded = module._Rounded.made

    def watched(self: module._Rounded) -> Tensor:
        made_again.append(self.weight.shape)
        return rounded(self)

    results = []
    for spill, instead in ((None, False), (None, True), (tmp_path, True)):
        block, inputs, targets = made()
        task, masks = task_of(block, inputs, targets)
        task.spill = spill
        with monkeypatch.context() as patch:
            if instead:
                patch.setattr(module._Rounded, "made", watched)
            else:
                patch.setattr(module._Rounded, "instead", lambda saved, _: saved)
            reconstruct(task, masks, epochs=1, rate=0.05)
        results.append([block.up.weight.detach(), block.down.weight.detach()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    assert {*made_again} == {torch.Size([20, 12]), torch.Size([12, 20])}
    assert torch.Size([2, 9, 20]) in {place.shape for place in shelved}, "what tanh keeps"
    assert len(shelved) == 6 * len({place.begin for place in shelved}), "every step uses the file from its begin"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_shelf_gives_back_what_was_put(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path)
    whole = (torch.randn(5, 3, 7, 4) > 0.3) if dtype == torch.bool else torch.randn(5, 3, 7, 4).to(dtype)
    assert shelf.put(whole) is whole, "small"
    monkeypatch.setattr(Shelf, "LEAST", 1)
    for _ in range(2):
        taken = [whole, whole.transpose(1, 2), whole.permute(3, 1, 0, 2), whole[0, 0].t(), whole[2], whole[:, :1]]
        places = [shelf.put(value) for value in taken]
        for value, place in zip(taken[:-1], places):
            assert isinstance(place, Shelved)
            found = place.made()
            assert torch.equal(found, value) and found.stride() == value.stride() and found.dtype == dtype
        assert places[-1] is taken[-1], "has gaps"
        spread = whole[0, 0, 0].expand(6, 4)
        assert shelf.put(spread) is spread
        shelf.clear()
    shelf.close()
    assert not list(tmp_path.iterdir())


def test_pads_do_not_count_and_bfloat16_weights_learn() -> None:
    results = []
    for fill in (0.0, 50.0):
        block, inputs, targets = made()
        positions: list[Tensor | None] = []
        for y in targets:
            real = torch.ones(2, 9, dtype=torch.bool)
            real[1, 5:] = False
            y[~real] = fill
            positions.append(real)
        block = block.bfloat16()
        inputs = [x.bfloat16() for x in inputs]
        task, masks = task_of(block, inputs, targets, positions)
        before = block.up.weight.clone()
        reconstruct(task, masks, epochs=1, rate=0.05)
        assert block.up.weight.dtype == torch.bfloat16 and not torch.equal(block.up.weight, before)
        results.append(block.up.weight)
    assert torch.equal(*results)


class Routed(Block):
    """Of two experts the sign of the first number takes one for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x[0, 0, 0]) > 0 else x + self.other(x)


def test_a_chunk_that_reaches_none_of_the_layers_trains_none() -> None:
    torch.manual_seed(0)
    block = Routed()
    inputs = [torch.randn(2, 9, 12) for _ in range(6)]
    for i, x in enumerate(inputs):
        x[0, 0, 0] = 1.0 if i % 2 else -1.0
    with torch.no_grad():
        targets = [block(x) for x in inputs]
    task, masks = task_of(block, inputs, targets)
    before = block.other.weight.clone()
    reconstruct(task, {"other": masks["other"]}, epochs=1, rate=0.02)
    assert not torch.equal(block.other.weight, before)
    assert torch.equal(block.other.weight != 0, masks["other"])


def test_admm_trains_its_blocks_unless_told_not_to() -> None:
    """On the same data the pruned model comes closer to the dense one; epochs=0 is ADMM alone."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    data = torch.randn(1024, 12)
    with torch.no_grad():
        expected = model(data)
    errors: dict[int, float] = {}
    for epochs in (0, 1, 4):
        pruned = copy.deepcopy(model)
        options = {"epochs": epochs, "rate": 0.02, "chunk_tokens": 64}
        report = sp.prune_(pruned, 0.7, criterion="admm", data=data, criterion_options=options)
        assert report.kept == report.total - round(0.7 * report.total)
        assert all(torch.equal(pruned.get_submodule(f).weight != 0, mask) for f, mask in report.masks.items())
        with torch.no_grad():
            errors[epochs] = float((pruned(data) - expected).square().mean())
    assert errors[4] < errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("options", [{"epochs": -1}, {"rate": 0.0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="epochs of at least 0 and a rate above 0"):
        sp.prune_(Block(), 0.5, criterion="admm", data=torch.randn(64, 12), criterion_options=options)


def test_bfloat16_is_a_property_of_the_device() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not any(flag in flags.split() for flag in ("amx_tile", "amx_bf16")):
        assert not fast_bfloat16(torch.device("cpu"))
    assert not fast_bfloat16(torch.device("meta"))
