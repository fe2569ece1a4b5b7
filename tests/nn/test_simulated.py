"""Simulated rounding: the numbers of the int8 kernels, gradients that pass straight through, the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from stack_models import body, make, tokens
from torch import nn

import sparseprune as sp
from sparseprune import _native, ops
from sparseprune.nn.replace import replace_
from sparseprune.nn.simulated import SimulatedLinear, simulate_, simulated
from sparseprune.nn.stand_in import StandIn, put_back_
from sparseprune.reference.int8 import round_tokens, round_values

INT8 = {"value_dtype": "int8", "activations": "int8"}
needs_core = pytest.mark.skipif(_native.C is None, reason="no compiled core")


@pytest.mark.parametrize("shape", [(48, 64), (7, 4), (1, 100), (33, 260)])
@pytest.mark.parametrize("quads", [True, False])
def test_weights_are_rounded_to_the_bit_as_packing_rounds_them(shape, quads):
    torch.manual_seed(shape[0])
    weight = torch.randn(shape) * (torch.rand(shape) < 0.4)
    weight[0] = 0
    weight[-1] = -weight[-1].abs()  # of one sign: pairs decide the scale
    dense = sp.layouts.from_dense(weight, "csr")
    packed = ops.pack(dense, value_dtype="int8", activations="int8" if quads else "float32")
    found = round_values(weight, torch.arange(shape[0]), shape[0], quads)
    assert torch.equal(found, packed.to_dense())
    assert shape[0] == 1 or (found != weight).any()


@needs_core
@pytest.mark.parametrize("dtypes", [INT8, {"value_dtype": "int8"}, {"value_dtype": "bfloat16"}])
@pytest.mark.parametrize("shape", [(48, 64), (7, 4), (33, 260)])
def test_a_layer_gives_what_the_kernel_gives(shape, dtypes, close):
    torch.manual_seed(1)
    holder = nn.Sequential(nn.Linear(shape[1], shape[0]))
    sp.prune_(holder, 0.5, granularity=sp.Block(1, 4), filter_fn=lambda m, n: True)
    sparse = sp.SparseLinear.from_linear(holder[0], layout="bsr", blocksize=(1, 4), **dtypes)
    sparse.eval().requires_grad_(False)
    x = torch.randn(3, 5, shape[1])
    exact = holder(x)
    with simulated(holder, ["0"], dtypes["value_dtype"], dtypes.get("activations", "float32")):
        found = holder(x)
    close(found.detach(), sparse(x))
    assert (found - exact).abs().max() > 1e-4
    assert type(holder[0]) is nn.Linear and torch.equal(holder(x), exact)


def test_gradients_pass_straight_through(close):
    """Those of the product of what was rounded, as if its operands had been the exact ones."""
    torch.manual_seed(2)
    holder = nn.Sequential(nn.Linear(12, 9))
    linear = holder[0]
    simulate_(holder, ["0"], **INT8)
    x = torch.randn(2, 4, 12, requires_grad=True)
    holder(x).square().sum().backward()
    whole, scale = round_tokens(x.detach())
    rounded = (whole * scale).requires_grad_()
    weight = round_values(linear.weight.detach(), torch.arange(9), 9, True).requires_grad_()
    bias = linear.bias.detach().clone().requires_grad_()
    F.linear(rounded, weight, bias).square().sum().backward()
    close(x.grad, rounded.grad)
    close(linear.weight.grad, weight.grad)
    close(linear.bias.grad, bias.grad)


def test_it_is_the_same_layer_to_optimisers_states_copies_and_hooks():
    holder = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6))
    seen = []
    handle = holder[0].register_forward_hook(lambda m, args, out: seen.append(type(m)))
    names, parameters = list(holder.state_dict()), list(holder.parameters())
    first = holder[0]
    left = simulate_(holder, ["0", "1"], **INT8)
    assert left == {} and isinstance(holder[0], SimulatedLinear)
    assert list(holder.state_dict()) == names
    assert all(a is b for a, b in zip(holder.parameters(), parameters))
    twin = copy.deepcopy(holder)
    x = torch.randn(3, 12)
    assert torch.equal(twin(x), holder(x)) and seen[-1] is SimulatedLinear
    put_back_(twin)
    assert type(twin[0]) is nn.Linear and twin[0].weight is not first.weight
    put_back_(holder)
    handle.remove()
    holder(x)
    assert holder[0] is first and len(seen) == 2


def test_what_cannot_be_rounded_says_why():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    assert "multiple of 4" in simulate_(model, ["0"], **INT8)["0"] and type(model[0]) is nn.Linear
    assert simulate_(model, ["1"], **INT8) == {"1": "a ReLU"}
    assert simulate_(nn.Linear(4, 4), [""], **INT8) == {"": "the model is itself the Linear"}
    assert simulate_(model, ["0"], "int8", "float32") == {}


def test_a_layer_under_two_names_is_rounded_under_both():
    model = nn.Module()
    model.first = model.second = nn.Linear(12, 8)
    model.block = nn.Sequential(model.first)
    original = model.first
    assert simulate_(model, ["second"], **INT8) == {}
    assert model.first is model.second is model.block[0] and isinstance(model.first, SimulatedLinear)
    assert simulate_(model, ["first", "second"], **INT8) == {}
    put_back_(model)
    assert model.first is model.second is model.block[0] is original


def test_hooks_are_handed_on_and_back_with_their_kind():
    holder = nn.Sequential(nn.Linear(12, 8))
    seen = []
    holder[0].register_full_backward_hook(lambda *args: seen.append("before"))
    x = torch.randn(3, 12, requires_grad=True)
    simulate_(holder, ["0"], **INT8)
    holder[0].register_forward_pre_hook(lambda *args: seen.append("meanwhile"))
    with pytest.raises(RuntimeError, match="Cannot use both regular backward hooks and full backward hooks"):
        holder[0].register_backward_hook(lambda *args: None)
    holder(x).sum().backward()
    put_back_(holder)
    assert type(holder[0]) is nn.Linear
    holder(x).sum().backward()
    assert seen == ["meanwhile", "before"] * 2


def test_a_hook_that_came_meanwhile_is_of_its_kind_behind_it():
    holder = nn.Sequential(nn.Linear(12, 8))
    simulate_(holder, ["0"], **INT8)
    holder[0].register_full_backward_hook(lambda *args: None)
    put_back_(holder)
    with pytest.raises(RuntimeError, match="Cannot use both regular backward hooks and full backward hooks"):
        holder[0].register_backward_hook(lambda *args: None)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_forward_of_its_own_is_kept():
    model = nn.Sequential(nn.Linear(12, 8), Doubled(8, 4))
    plain = model[0].forward
    model[0].forward = lambda input: plain(input) + 1
    x = torch.randn(3, 12)
    expected = model(x)
    with simulated(model, ["0", "1"]):
        assert torch.equal(model(x), expected)
    left = simulate_(model, ["0", "1"], **INT8)
    assert "its forward was replaced" in left["0"] and "Doubled has a forward of its own" in left["1"]


def test_the_fast_path_stays_closed_while_something_sparse_is_there(monkeypatch):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    opened = layer.activation_relu_or_gelu
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(8, 8)})
    sp.prune_(model, 0.5, filter_fn=lambda m, n: True)
    sp.sparsify_(model, layout="csr", filter_fn=lambda m, n: "linear" in n, fuse=False, engine="layers")
    with simulated(model, []):
        pass
    assert layer.activation_relu_or_gelu == 0 != opened  # nothing was put back
    with simulated(model, ["head"]):
        assert isinstance(model["head"], SimulatedLinear)
    assert layer.activation_relu_or_gelu == 0  # the kernel would read the weights of what is sparse
    sp.densify_(model)
    with simulated(model, ["layer.linear1"]):
        assert layer.activation_relu_or_gelu == 0
    assert layer.activation_relu_or_gelu == opened


def test_autocast_does_not_coarsen_the_steps(close):
    holder = nn.Sequential(nn.Linear(64, 16))
    simulate_(holder, ["0"], **INT8)
    x = torch.randn(5, 64)
    expected = holder(x).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = holder(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@needs_core
def test_layers_may_stay_exact():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    sp.prune_(model, 0.5, granularity=sp.Block(1, 4), filter_fn=lambda m, n: True)
    dense = copy.deepcopy(model)
    how = {"layout": "bsr", "blocksize": (1, 4), "filter_fn": lambda m, n: True}
    report = sp.sparsify_(model.eval().requires_grad_(False), exact_layers=["2"], **how, **INT8)
    assert model[0].activations == "int8" and model[2].activations == model[2].value_dtype == "float32"
    assert "exact_layers" in report["2"].reason and "exact_layers" not in report["0"].reason
    x = torch.randn(9, 64)
    with simulated(dense, ["0"]), torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exact_layers expected names of selected Linears, got '7'"):
        sp.sparsify_(copy.deepcopy(dense), exact_layers=["7"], **how, **INT8)


@needs_core
def test_auto_offers_no_int8_to_exact_layers(monkeypatch):
    from sparseprune import bench

    seen: list[list[str]] = []

    def choose(candidates, tokens, **options):
        seen.append(list(candidates))
        times = {name: dict.fromkeys(tokens, 2.0) for name in candidates}
        return bench.Choice(list(candidates)[-1], 2.0, "as told", times, times)

    monkeypatch.setattr(bench, "choose_fastest", choose)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    sp.prune_(model, 0.5, granularity=sp.Block(1, 4), filter_fn=lambda m, n: True)
    report = sp.sparsify_(model, tokens=16, filter_fn=lambda m, n: True, exact_layers=["0"], **INT8)
    assert [layer.layout for layer in report.layers] == ["csr", "int8 bsr1x4"]
    assert len(seen) == 2 and not [name for name in seen[0] if "int8" in name]


@needs_core
@pytest.mark.parametrize("kept", [[], ["query"], ["key", "output.dense"]])
@torch.no_grad()
def test_whole_programs_with_exact_layers_among_rounded_ones(kept):
    pytest.importorskip("transformers")
    model = make("bert", ffn=52)
    sp.prune_(model, 0.5, granularity=sp.Block(1, 4), filter_fn=lambda m, n: True)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    exact = [n for n in linears if any(n.endswith(end) for end in kept)]
    dense = copy.deepcopy(model)
    report = sp.sparsify_(
        model, layout="csr", filter_fn=lambda m, n: True, engine="program", exact_layers=exact, **INT8
    )
    assert [s.engine for s in report.stacks] == ["program"], report.stacks
    ids = tokens(3, 13)
    found, plain = body(model, "bert")(ids), body(dense, "bert")(ids)
    with simulated(dense, [n for n in linears if n not in exact]):
        expected = body(dense, "bert")(ids)
    # a value beside a border of two steps may fall to either, by the last bit of what came before
    assert (found - expected).abs().max() < 0.25 * (plain - expected).abs().max()


def test_stand_ins_of_another_kind_stay():
    class Healing(StandIn):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = Healing(model[0])
    replace_(model, {id(model[0]): other})
    with simulated(model, ["1"]):
        assert isinstance(model[1], SimulatedLinear)
    assert model[0] is other and type(model[1]) is nn.Linear


def test_a_stand_in_leaves_the_attributes_of_its_linear_alone_and_hands_on_new_ones():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].activations = "gelu"
    with simulated(model, ["0"]):
        model[0].added = 3
    assert type(model[0]) is nn.Linear and model[0].activations == "gelu" and model[0].added == 3
    assert not {"value_dtype", "_with", "_of"} & set(vars(model[0]))
