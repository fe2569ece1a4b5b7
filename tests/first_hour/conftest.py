"""The first hour of a user, as one walk: prune, sparsify, run, train a little, save, load, densify."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune.nn.filters import prunable_linears


@dataclasses.dataclass
class Walk:
    """``make``: the architecture with its weights, the same at every call; ``run``: model -> the outputs that count;
    ``loss``: model -> a scalar to train by.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module], Tensor]
    check: Callable[..., None]

    def go(self, sparsity: float, layout: str, path: Path, prune: dict[str, Any] | None = None) -> nn.Module:
        """The whole walk, each step's result held against the step before; returns the model that was loaded."""
        model = self.make().eval()
        before = {fqn: linear.weight.detach().clone() for fqn, linear in prunable_linears(model).items()}
        report = sp.prune_(model, sparsity, **(prune or {}))
        masks = self._counts(model, before, report, sparsity)

        expected = self._outputs(model)
        assert not torch.allclose(expected, self._outputs(self.make().eval()), atol=1e-3)  # pruning was felt
        chosen = sp.sparsify_(model, layout=layout, tokens=32)
        assert {choice.name for choice in chosen.layers} == set(masks)
        if layout != "auto":
            assert {choice.name for choice in chosen.converted} == set(masks)
        assert {n for n, m in model.named_modules() if isinstance(m, sp.SparseLinear)} == {
            choice.name for choice in chosen.converted
        }  # fmt: skip
        self.check(self._outputs(model), expected)
        stored = {choice.name: _stored(model.get_submodule(choice.name)) for choice in chosen.converted}
        for name, places in stored.items():
            assert not (masks[name] & ~places).any(), name
            if chosen[name].layout == "csr":
                assert torch.equal(places, masks[name]), name

        losses = self._train(model)
        assert losses[-1] < losses[0]
        model.eval()
        trained = self._outputs(model)
        assert not torch.allclose(trained, expected, atol=1e-4)  # what runs is what was trained
        dense = copy.deepcopy(model)
        sp.densify_(dense)
        assert type(dense) is type(self.make()) and not any(isinstance(m, sp.SparseLinear) for m in dense.modules())
        self.check(trained, self._outputs(dense))
        for name, places in stored.items():  # a sparse layer trains what it stores, and nothing else
            assert not dense.get_submodule(name).weight[~places].any(), name

        sp.save(model, path)
        fresh = self.make().eval()
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.add_(1.0)  # nothing of the model may come from anywhere but the file
        assert sp.load(fresh, path) is fresh
        self.check(self._outputs(fresh), trained)
        back = copy.deepcopy(fresh)
        sp.densify_(back)
        held = dict(dense.state_dict())
        assert list(back.state_dict()) == list(self.make().state_dict())
        for name, value in back.state_dict().items():
            assert torch.equal(value, held[name]), name
        self.check(self._outputs(back), trained)
        return fresh

    def _counts(self, model: nn.Module, before: dict[str, Tensor], report: Any, sparsity: float) -> dict[str, Tensor]:
        total = sum(weight.numel() for weight in before.values())
        masks = {fqn: model.get_submodule(fqn).weight.detach() != 0 for fqn in before}
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert kept == total - round(sparsity * total) == report.kept and report.total == total
        assert set(report.masks) == set(before)
        for fqn, mask in masks.items():
            assert bool(mask.any()), f"{fqn} died"
            assert torch.equal(model.get_submodule(fqn).weight.detach(), before[fqn] * mask), fqn
            assert torch.equal(report.masks[fqn], mask), fqn
        return masks

    def _train(self, model: nn.Module) -> list[float]:
        """Two steps of a fused optimiser, which writes to parameters in a way of its own."""
        model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
        losses = []
        for _ in range(2):
            loss = self.loss(model)
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            return [*losses, float(self.loss(model))]

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> Tensor:
        outputs = self.run(model).clone()
        assert bool(outputs.isfinite().all())
        return outputs


def _stored(layer: nn.Module) -> Tensor:
    """bool `[N, K]`: the entries that a SparseLinear stores; blocks are stored whole, the zeros in them, too."""
    assert isinstance(layer, sp.SparseLinear)
    layout = layer.to_layout()
    return dataclasses.replace(layout, values=torch.ones_like(layout.values)).to_dense() != 0


@pytest.fixture
def walk():
    """``walk(make, run, loss)``: a :class:`Walk`. Outputs agree within 1e-4: layers add up what one layer may differ
    by.
    """

    def check(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def make_walk(make, run, loss) -> Walk:
        def again() -> nn.Module:
            torch.manual_seed(0)
            return make()

        return Walk(again, run, loss, check)

    return make_walk
