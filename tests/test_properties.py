"""The public face under random models: whatever shapes, density, pattern, layout and dtype, the stages agree.

A few examples by default; ``HYPOTHESIS_PROFILE=ci`` takes hundreds. A failure prints the example it shrank to.
"""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import sparseprune as sp

FEW = settings(
    max_examples=20, derandomize=True, database=None, deadline=None, print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip
PROFILES = {"default": FEW, "ci": settings(FEW, max_examples=300, derandomize=False)}
PROFILE = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "default")]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 4e-2}
BLOCKS = [(2, 1), (4, 1), (16, 1), (1, 4), (4, 4), (8, 8), (3, 5)]
PATTERNS = [(1, 2), (2, 4), (4, 8), (1, 4)]


@dataclass(frozen=True)
class Case:
    """sizes: widths of the activations, one Linear between two; layouts: what sparsify_ is given."""

    sizes: tuple[int, ...]
    bias: bool
    activation: str
    kind: str
    blocksize: tuple[int, int]
    pattern: tuple[int, int]
    layout: str
    sparsity: float
    scope: str
    dtype: torch.dtype
    rows: int
    seed: int

    @property
    def granularity(self):
        return {"element": "element", "block": sp.Block(*self.blocksize), "nm": sp.NM(*self.pattern)}[self.kind]

    @property
    def unit(self) -> int:
        return self.blocksize[0] * self.blocksize[1] if self.kind == "block" else 1

    @property
    def zeros(self) -> float:
        return 1 - self.pattern[0] / self.pattern[1] if self.kind == "nm" else self.sparsity

    def model(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        between = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "none": nn.Identity}[self.activation]
        layers: list[nn.Module] = []
        for wide, narrow in zip(self.sizes, self.sizes[1:]):
            layers += [nn.Linear(wide, narrow, bias=self.bias), between()]
        return nn.Sequential(*layers).to(self.dtype).eval()

    def sparsify(self, model: nn.Module) -> None:
        options = {"bsr": {"blocksize": self.blocksize}, "nm": {"nm": self.pattern}}.get(self.layout, {})
        sp.sparsify_(model, layout=self.layout, tokens=max(1, self.rows), **options)


@st.composite
def cases(draw) -> Case:
    kind = draw(st.sampled_from(["element", "block", "nm"]))
    blocksize, pattern = draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(PATTERNS))
    step = {"element": 1, "block": blocksize[0] * blocksize[1], "nm": pattern[1]}[kind]
    counts = draw(st.lists(st.integers(1, 40 if step == 1 else max(1, 96 // step)), min_size=2, max_size=4))
    layout = "csr" if kind == "element" else draw(st.sampled_from(["csr", {"block": "bsr", "nm": "nm"}[kind]]))
    return Case(
        sizes=tuple(count * step for count in counts),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["relu", "gelu", "silu", "none"])),
        kind=kind, blocksize=blocksize, pattern=pattern, layout=layout,
        sparsity=draw(st.one_of(st.sampled_from([0.0, 0.5, 0.9]), st.floats(0, 0.97))),
        scope=draw(st.sampled_from(["global", "layer"])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        rows=draw(st.sampled_from([1, 2, 7, 8, 33])),
        seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | sp.SparseLinear)}


def kept_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() != 0 for name, layer in linears(model).items()}


def agree(got: torch.Tensor, expected: torch.Tensor, case: Case, stage: str) -> None:
    assert got.dtype == case.dtype and got.shape == expected.shape
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{stage} of {case}: {m}")


def pruned(case: Case) -> nn.Sequential:
    """The model after prune_, its counts exact and every layer alive where there is a unit for each."""
    model = case.model()
    before = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    assume(all(bool((weight != 0).all()) for weight in before.values()))
    given = None if case.kind == "nm" else case.sparsity
    report = sp.prune_(model, given, granularity=case.granularity, scope=case.scope)
    kept, units = kept_of(model), {name: w.numel() // case.unit for name, w in before.items()}
    total = sum(int(mask.sum()) for mask in kept.values())
    if case.kind == "nm":
        n, m = case.pattern
        assert all(bool((mask.view(len(mask), -1, m).sum(-1) == n).all()) for mask in kept.values())
    elif case.scope == "global":
        count = sum(units.values())
        assert total == case.unit * (count - round(case.sparsity * count))
    else:
        for name, mask in kept.items():
            assert int(mask.sum()) == case.unit * (units[name] - round(case.sparsity * units[name])), name
    assert report.kept == total and report.total == sum(w.numel() for w in before.values())
    for name, mask in kept.items():
        assert torch.equal(linears(model)[name].weight.detach(), before[name] * mask), name
    return model


def stages(case: Case) -> None:
    model, x = pruned(case), torch.randn(case.rows, case.sizes[0], dtype=torch.float64).to(case.dtype)
    masks = kept_of(model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        case.sparsify(model)
        assert all(isinstance(layer, sp.SparseLinear) for layer in linears(model).values())
        agree(model(x), expected, case, "sparsify_")
        agree(model(x[None])[0], expected, case, "a batch of sequences")
        if case.seed % 4 == 0:  # which takes longer than all the rest
            agree(torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)(x), expected, case, "compile")
            torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pruned.safetensors"
            sp.save(model, path)
            fresh = sp.load(case.model(), path)
        assert all(isinstance(layer, sp.SparseLinear) for layer in linears(fresh).values())
        agree(fresh(x), expected, case, "load")
        for one in (model, fresh):
            sp.densify_(one)
            agree(one(x), expected, case, "densify_")
            assert one.state_dict().keys() == dense.keys()
            for name, value in one.state_dict().items():
                assert torch.equal(value, dense[name]), name
    assert all(torch.equal(mask, masks[name]) for name, mask in kept_of(model).items())


@PROFILE
@given(case=cases())
def test_every_stage_gives_the_same_outputs(case: Case) -> None:
    stages(case)


STARVED = Case(
    (6, 2, 10), False, "relu", "block", (2, 1), (1, 2), "csr", sparsity=0.5, scope="global", dtype=torch.float32,
    rows=1, seed=0,
)  # fmt: skip


@PROFILE
@given(case=cases())
@example(case=STARVED)
def test_no_layer_dies_while_there_is_a_unit_for_each(case: Case) -> None:
    units = [wide * narrow // case.unit for wide, narrow in zip(case.sizes, case.sizes[1:])]
    kept = [count - round(case.zeros * count) for count in units]
    assume(all(kept) if case.scope == "layer" else sum(units) - round(case.zeros * sum(units)) >= len(units))
    masks = kept_of(pruned(case))
    assert all(bool(mask.any()) for mask in masks.values()), case


@PROFILE
@given(case=cases(), steps=st.integers(1, 3))
def test_training_moves_what_is_stored_and_nothing_else(case: Case, steps: int) -> None:
    assume(case.dtype == torch.float32)
    model, x = pruned(case), torch.randn(case.rows, case.sizes[0])
    twin = copy.deepcopy(model)
    masks = kept_of(model)
    case.sparsify(model)
    stored = linears(twin)
    optimisers = torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.SGD(twin.parameters(), lr=0.01)
    for _ in range(steps):
        for one, optimiser in zip((model, twin), optimisers):
            optimiser.zero_grad()
            one.train()(x).square().mean().backward()
            if one is twin:
                for name, layer in stored.items():
                    layer.weight.grad.mul_(masks[name])
            optimiser.step()
    sp.densify_(model)
    for name, layer in linears(model).items():
        assert not layer.weight[~masks[name]].any(), name
        agree(layer.weight.detach(), stored[name].weight.detach(), case, name)
    with torch.no_grad():
        agree(model.eval()(x), twin.eval()(x), case, "training")


def test_the_profiles_differ_in_how_much_they_try():
    if os.environ.get("HYPOTHESIS_PROFILE") not in (None, *PROFILES):
        pytest.fail("unknown profile")
    assert PROFILES["ci"].max_examples >= 10 * PROFILES["default"].max_examples
