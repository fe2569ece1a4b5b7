"""A call never answers from an old weight, however it was changed: by what leaves the version counter alone, too."""

from __future__ import annotations

import copy
import gc
import itertools
import operator
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from sparseprune import SparseLinear, _native
from sparseprune.nn import RoundedLinear
from sparseprune.tensor_state import Cached, TensorState, fingerprint

pytestmark = pytest.mark.skipif(_native.C is None, reason="needs the compiled core")


def sparse_layer(**options):
    torch.manual_seed(0)
    linear = nn.Linear(60, 48)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(48, 60) < 0.3)
    return SparseLinear.from_linear(linear, **options).eval()


def rounded_layer():
    torch.manual_seed(0)
    return RoundedLinear.from_linear(nn.Linear(60, 48), 8).eval()


LAYERS = {
    "csr": sparse_layer,
    "16x1": lambda: sparse_layer(layout="bsr"),
    "two forms": lambda: sparse_layer(tokens=(1, 128)),
    "unpacked": lambda: sparse_layer(dense_from=2),
    "int8": lambda: sparse_layer(value_dtype="int8"),
    "rounded": rounded_layer,
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def learned(layer):
    return "values" if isinstance(layer, SparseLinear) else "weight"


X = torch.linspace(-1, 1, 5 * 60).view(5, 60)


@torch.no_grad()
def is_fresh(layer, call=None):
    """Whether the layer answers with its weight as it is, for one row and for several."""
    weight, tolerance = layer.weight.detach(), 2e-2 if getattr(layer, "value_dtype", "") == "int8" else 1e-5
    if isinstance(layer, RoundedLinear):
        weight = weight.bfloat16().float()
    scale = F.linear(X.abs(), weight.abs()).max()
    call = layer if call is None else call
    return all(bool((call(x) - F.linear(x, weight, layer.bias)).abs().max() <= tolerance * scale) for x in (X[:1], X))


OPTIMISERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_fused_step_between_two_evaluations(layer, name):
    optimiser = OPTIMISERS[name](layer.parameters())
    assert is_fresh(layer)
    for _ in range(3):
        layer(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        assert is_fresh(layer)


@pytest.mark.parametrize("between", [True, False])
def test_weights_frozen_only_while_they_are_evaluated(layer, between):
    """As the two sides of a GAN are, with the gradients of several passes added up."""
    optimiser = OPTIMISERS["AdamW"](layer.parameters())
    for _ in range(3):
        layer.requires_grad_(False)
        assert is_fresh(layer)
        layer.requires_grad_(True)
        layer(X).square().sum().backward()
        layer.requires_grad_(False)
        assert not between or is_fresh(layer)  # after backward, before the step
        layer.requires_grad_(True)
        optimiser.step()
        optimiser.zero_grad()
        layer.requires_grad_(False)
        assert is_fresh(layer)


def test_functional_call_in_a_loop(layer):
    name = learned(layer)
    for frozen in (False, True):
        for step in range(60):
            given = {name: torch.full_like(getattr(layer, name), float(step)).requires_grad_(not frozen)}
            twin = copy.deepcopy(layer)
            twin.load_state_dict({**layer.state_dict(), name: given[name].detach()})
            assert is_fresh(twin, lambda x, given=given: torch.func.functional_call(layer, given, (x,)))
        layer.requires_grad_(False)


@pytest.mark.parametrize("how", ["assigned", "set to None", "registered again"])
def test_a_parameter_is_replaced(layer, how):
    name = learned(layer)
    shape = getattr(layer, name).shape
    for step in range(60):
        fresh = nn.Parameter(torch.full(shape, float(step)), requires_grad=step % 2 == 0)
        if how == "set to None":
            setattr(layer, name, None)
        elif how == "registered again":
            delattr(layer, name)
            layer.register_parameter(name, None)
        setattr(layer, name, fresh)
        del fresh
        gc.collect() if step % 10 == 0 else None
        assert is_fresh(layer)


def test_the_same_memory_under_a_new_parameter(layer):
    """Same address, same version, and, sooner or later, the same id."""
    name = learned(layer)
    for _ in range(20):
        data = getattr(layer, name).data.add_(1)
        setattr(layer, name, nn.Parameter(data, requires_grad=False))
        assert is_fresh(layer)


def test_swapped_tensors(layer):
    name = learned(layer)
    layer.requires_grad_(False)
    for step in range(20):
        assert is_fresh(layer)
        for _ in range(2):
            other = nn.Parameter(torch.full_like(getattr(layer, name), float(step)), requires_grad=False)
            torch.utils.swap_tensors(getattr(layer, name), other)
            del other
        assert is_fresh(layer)


def test_writes_through_data_while_the_weight_learns(layer):
    assert is_fresh(layer)
    for _ in range(3):
        getattr(layer, learned(layer)).data.mul_(2)
        assert is_fresh(layer)
        getattr(layer, learned(layer)).detach().numpy()[...] += 1
        assert is_fresh(layer)


def test_writes_in_inference_mode():
    with torch.inference_mode():
        inside = sparse_layer()
        outside = copy.deepcopy(sparse_layer())
        for layer in (inside, outside.requires_grad_(False)):
            for _ in range(3):
                assert is_fresh(layer)
                layer.values.copy_(torch.randn_like(layer.values))
    frozen = sparse_layer().requires_grad_(False)
    with torch.inference_mode():
        for _ in range(3):
            assert is_fresh(frozen)
            frozen.values.copy_(torch.randn_like(frozen.values))


def test_parameters_that_are_plain_attributes():
    """Parametrised, or put in place by sharding: not among the layer's parameters."""

    class Twice(nn.Module):
        def forward(self, bias):
            return 2 * bias

    layer = sparse_layer()
    parametrize.register_parametrization(layer, "bias", Twice())
    assert is_fresh(layer)
    values = layer.values.detach()
    del layer.values
    for step in range(10):
        layer.values = values + step
        assert is_fresh(layer)


def test_a_copy_in_the_middle_of_training_goes_its_own_way(layer):
    optimiser = OPTIMISERS["AdamW"](layer.parameters())
    for _ in range(3):
        layer(X).square().sum().backward()
        twin = copy.deepcopy(layer)
        optimiser.step()
        assert is_fresh(layer) and is_fresh(twin)


def test_moved_to_meta_and_back():
    layer, state = sparse_layer(), sparse_layer().state_dict()
    layer.to("meta").to_empty(device="cpu")
    layer.train()
    layer.load_state_dict(state)
    assert is_fresh(layer.eval())


def test_another_process_writes():
    layer = sparse_layer().requires_grad_(False)
    assert is_fresh(layer)
    layer.share_memory()
    assert is_fresh(layer)
    # A function of the standard library: the other process need not find this file.
    started = torch.multiprocessing.get_context("spawn").Process(target=operator.iadd, args=(layer.values, 1))
    started.start()
    started.join(60)
    assert started.exitcode == 0
    assert is_fresh(layer)


@pytest.fixture
def fresh_compiler():
    """Graphs of one forward are counted over all layers and tests, and torch refuses to make too many."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dense_from", [None, 2])
@pytest.mark.parametrize("values", ["float32", "int8"])
def test_a_compiled_graph_follows_the_weight(dense_from, values, fresh_compiler):
    layer = sparse_layer(dense_from=dense_from, value_dtype=values)
    assert is_fresh(layer)  # packs, before anything is compiled
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimiser = OPTIMISERS["AdamW"](layer.parameters())
    for _ in range(3):
        assert is_fresh(layer, compiled)
        layer(X).square().sum().backward()
        optimiser.step()
    layer.requires_grad_(False)
    for _ in range(2):
        assert is_fresh(layer, compiled)
        with torch.no_grad():
            layer.values.mul_(2)


def test_a_traced_graph_follows_the_weight():
    layer = sparse_layer()
    with torch.no_grad():
        traced = torch.jit.trace(layer, X, check_trace=False)
        for _ in range(2):
            torch.testing.assert_close(traced(X), F.linear(X, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
            layer.values.data.mul_(2)


@pytest.mark.parametrize("mode", ["inference", "frozen training", "training"])
@pytest.mark.parametrize("into", ["the traced module", "the layer", "a saved file"])
@pytest.mark.parametrize("options", [{}, {"layout": "bsr"}, {"layout": "nm"}, {"dense_from": 2}])
def test_a_traced_module_takes_another_structure_of_the_same_size(options, into, mode, tmp_path):
    torch.manual_seed(0)
    linear = nn.Linear(60, 48)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(3, 60).repeat_interleave(16, 0) < 0.3)
        if options.get("layout") == "nm":
            linear.weight.view(48, 15, 4)[:, :, 2:] = 0
    layer = SparseLinear.from_linear(linear, **options).train("training" in mode).requires_grad_(mode == "training")
    other = copy.deepcopy(layer)
    with torch.no_grad():
        linear.weight.copy_(-2 * linear.weight.flip(1))
    other.load_state_dict({"weight": linear.weight.detach(), "bias": 3 * linear.bias.detach()}, strict=False)
    with torch.set_grad_enabled(mode == "training"):
        expected = F.linear(X, linear.weight, 3 * linear.bias)
        layer(X)  # packs
        traced = torch.jit.trace(layer, X, check_trace=False)
        torch.testing.assert_close(traced(X), layer(X), rtol=1e-4, atol=1e-5)
        if into == "a saved file":
            traced.save(tmp_path / "traced.pt")
            traced = torch.jit.load(tmp_path / "traced.pt")
        (layer if into == "the layer" else traced).load_state_dict(other.state_dict())
        torch.testing.assert_close(traced(X), expected, rtol=1e-4, atol=1e-5)


def test_an_index_that_changes_in_place():
    layer = sparse_layer()
    assert is_fresh(layer)
    layer.col_indices.copy_(sparse_layer().col_indices)  # the same: nothing is packed anew
    assert is_fresh(layer)
    rows = layer.crow_indices.tolist()
    for start, end in itertools.pairwise(rows):  # as a broadcast of another process's buffers would
        layer.col_indices[start:end] = torch.randperm(60)[: end - start].sort().values.int()
    assert is_fresh(layer)


def test_values_of_another_length_are_refused():
    layer = sparse_layer()
    assert is_fresh(layer)
    count = layer.values.numel()
    for grad in (False, True):
        for given in (torch.ones(5), torch.ones(count + 1), torch.ones(0)):
            layer.values = nn.Parameter(given)
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(ValueError, match=f"values expected {count} entries, .* got {given.numel()}; load"),
            ):
                layer(X)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_dict_with_fewer_or_more_values_is_refused(assign, strict):
    layer = sparse_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    count = layer.values.numel()
    for values in (before["values"][:-1], torch.ones(0), torch.ones(count + 1)):
        for given in ({**before, "values": values}, {"values": values}):  # the indices too, or values alone
            with pytest.raises((ValueError, RuntimeError), match=r"values"):
                layer.load_state_dict(given, strict=strict, assign=assign)
            assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items()) and is_fresh(layer)


def test_a_refused_state_dict_changes_nothing():
    layer = sparse_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    broken = {name: tensor.clone() for name, tensor in before.items()}
    broken["values"], broken["col_indices"] = broken["values"][:7], broken["col_indices"][:7]
    for change in (broken, {**before, "col_indices": before["col_indices"] + 60}):
        with pytest.raises(ValueError, match=r"crow_indices|col_indices"):
            layer.load_state_dict(change)
        assert is_fresh(layer) and all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())


def test_many_threads_while_the_weight_changes():
    layer, done = sparse_layer(), threading.Event()
    failed = []

    def call():
        try:
            with torch.no_grad():
                while not done.is_set():
                    layer(X)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        layer.values.data.add_(1)
    done.set()
    for thread in threads:
        thread.join()
    assert not failed and is_fresh(layer)


def test_frozen_weights_are_not_read_again(monkeypatch, layer):
    read = []
    monkeypatch.setattr(
        "sparseprune.tensor_state.fingerprint", lambda tensor: read.append(tensor) or fingerprint(tensor)
    )
    layer.requires_grad_(False)
    assert is_fresh(layer)
    read.clear()
    assert is_fresh(layer) and not read
    layer.requires_grad_(True)
    assert is_fresh(layer) and read


@pytest.mark.parametrize("size", [0, 1, 3, 63, 64, 65, 8191, 8192, 8193, 50_001])
def test_a_fingerprint_changes_with_every_byte(tier, size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    first = fingerprint(data)
    assert first == fingerprint(data.clone())
    for place in {0, size // 2, size - 1} if size else ():
        for bit in (1, 128):
            changed = data.clone()
            changed[place] ^= bit
            assert fingerprint(changed) != first
    if size > 1:
        pair = data.clone()
        pair[0], pair[-1] = 1, 2
        assert fingerprint(pair) != fingerprint(pair.flip(0))


def test_a_fingerprint_does_not_depend_on_the_threads():
    data, threads = torch.randn(300_000), torch.get_num_threads()
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(fingerprint(data))
    torch.set_num_threads(threads)
    assert len(found) == 1


def test_flipped_signs_are_seen():
    """Two flips at the distance of one chain of the hash, which a product of odd numbers alone would cancel."""
    data = torch.randn(4096)
    first = fingerprint(data)
    for step in (1, 2, 8, 16, 32, 64):
        changed = data.clone()
        changed[100] *= -1
        changed[100 + step] *= -1
        assert fingerprint(changed) != first
    assert fingerprint(-data) != first
    assert fingerprint(torch._neg_view(data)) == fingerprint(-data)


def test_what_is_written_while_it_is_made_is_made_again():
    tensor = torch.zeros(3)
    kept = Cached()

    def slow():
        made = tensor.clone()
        tensor.add_(1)
        return made

    kept.of((tensor,), slow)
    assert torch.equal(kept.of((tensor,), tensor.clone), torch.ones(3))
    assert TensorState(tensor).unchanged(tensor) and not TensorState(tensor).unchanged(tensor + 1)


KINDS = ("fsdp1", "fsdp2", "replicated")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k != "fsdp2" else ()) for k in KINDS])
def test_two_processes_evaluate_between_steps(torchrun, kind):
    found = torchrun(Path(__file__).with_name("two_processes.py"), kind)
    assert found.count("wrong 0\n") == 2, found
