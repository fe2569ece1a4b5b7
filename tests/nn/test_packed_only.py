"""keep="packed": what is left runs as before, unpacks to the bit or refuses, and nothing else is held."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune import _native, ops
from sparseprune.checkpoint import CheckpointError
from sparseprune.checkpoint.file import Content
from sparseprune.nn.packed_only import PackedLinear, keep_packed_
from sparseprune.nn.sparsify.memory import keep_packed_forms_, memory_of
from sparseprune.nn.stacks import stack_of
from tests.nn.stack_models import body, make, programs, prune_, stack, tokens

pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")
LAYOUTS = {
    "csr": {"layout": "csr"},
    "bsr": {"layout": "bsr", "blocksize": (4, 1)},
    "square": {"layout": "bsr", "blocksize": (2, 2)},
    "nm": {"layout": "nm", "nm": (2, 4)},
}


def everything(module: nn.Module, name: str) -> bool:
    return True


def pruned(layout: str = "csr", frozen: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 20, bias=False), nn.LayerNorm(20)).eval()
    granularity = {"bsr": sp.Block(4, 1), "square": sp.Block(2, 2), "nm": sp.NM(2, 4)}.get(layout, "element")
    sp.prune_(model, sparsity=0.5, granularity=granularity, filter_fn=everything)
    return model.requires_grad_(not frozen)


def sparse(layout: str = "csr", keep: str = "packed", tokens=64, **options) -> nn.Module:
    model = pruned(layout)
    sp.sparsify_(model, tokens=tokens, keep=keep, filter_fn=everything, **LAYOUTS[layout], **options)
    return model


def x(rows: int = 7) -> Tensor:
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows))


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    left_state, right_state = left.state_dict(), right.state_dict()
    assert set(left_state) == set(right_state)
    for name, tensor in left_state.items():
        assert torch.equal(tensor, right_state[name]) and tensor.dtype == right_state[name].dtype, name


def answer_into(model: nn.Module, rows: Tensor, out: Tensor) -> None:
    with torch.no_grad():
        out.copy_(model(rows))


def test_a_process_that_is_started_takes_the_model():
    """Its memory is handed over as open files, which must still be there when the process is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 24)).requires_grad_(False).eval()
    sp.prune_(model, sparsity=0.5, filter_fn=everything)
    sp.sparsify_(model, layout="csr", keep="packed", filter_fn=everything)
    rows, out = torch.randn(3, 512), torch.zeros(3, 24).share_memory_()
    child = torch.multiprocessing.get_context("spawn").Process(target=answer_into, args=(model, rows, out))
    child.start()
    child.join(100)
    assert child.exitcode == 0
    torch.testing.assert_close(out, model(rows))


@pytest.mark.parametrize("options", [{}, {"tokens": (1, 128)}, {"value_dtype": "bfloat16"}], ids=str)
def test_an_exported_program_takes_any_number_of_rows(options):
    """None of the questions that a layer asks about them may be left in the program as a condition."""
    model = nn.Sequential(sparse(**options), sp.nn.RoundedLinear.from_linear(nn.Linear(20, 4), 8, "bfloat16"))
    model.requires_grad_(False).eval()
    rows = torch.export.Dim("rows", min=1, max=500)
    program = torch.export.export(model, (x(),), dynamic_shapes=({0: rows},)).module()
    model[1] = model[1].to_linear()
    for count in (1, 7, 300):
        torch.testing.assert_close(program(x(count)), model(x(count)))


@pytest.mark.parametrize("count", [1, 64, (1, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_runs_as_before_and_unpacks_to_the_bit(layout, count):
    model, other = sparse(layout, tokens=count), sparse(layout, "canonical", tokens=count)
    assert isinstance(model[0], PackedLinear) and model[0].exact
    assert not [name for name, _ in model[0].named_parameters() if name != "bias"] and not list(model[0].buffers())
    for rows in (0, 1, 7, 100):
        assert torch.equal(model(x(rows)), other(x(rows)))
    assert_same_state(model, other)
    assert torch.equal(model[0].weight, other[0].weight) and torch.equal(model[0].values, other[0].values)
    assert model[0].nnz == other[0].nnz
    assert str(sp.sparsity_report(model)) == str(sp.sparsity_report(other))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x()), other(x()))
        assert_same_state(copied, other)
    sp.densify_(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, pruned(layout)[0].weight)


def test_zeros_that_were_stored_come_back_with_their_sign():
    layer = sp.SparseLinear.from_linear(pruned()[0], tokens=1)
    layer.values.data[:3] = torch.tensor([0.0, -0.0, float("nan")])
    before = layer.state_dict()
    model = nn.Sequential(layer, nn.Linear(36, 4)).requires_grad_(False)
    sp.sparsify_(model, layout="csr", keep="packed", filter_fn=everything)
    found = model[0].state_dict()
    assert model[0].exact and torch.equal(found["col_indices"], before["col_indices"])
    assert torch.equal(found["values"].view(torch.int32), before["values"].view(torch.int32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_else_is_held(layout):
    model = sparse(layout, "canonical", tokens=(1, 64))
    memory_of(model)  # packs it
    held = [weakref.ref(t) for t in (*model[0].to_layout().tensors().values(), *model[0]._forms.tensors())]
    assert len(held) > 6
    keep_packed_forms_(model)
    gc.collect()
    assert not [ref() for ref in held if ref() is not None]
    forms = [tensor for layer in (model[0], model[2]) for p in layer.packed for tensor in p.tensors().values()]
    memory = memory_of(model)
    assert sum(t.nbytes for t in forms) == memory.packed == memory.resident and memory.canonical == 0


def test_each_number_of_tokens_keeps_its_form_in_another_dtype():
    model = sparse("csr", "packed", tokens=(1, 128))
    kinds = [p.plan.kind for p in model[0].packed]
    assert len(kinds) == 2
    model.to(torch.bfloat16).to(torch.float32)
    assert [p.plan.kind for p in model[0].packed] == kinds


def test_the_report_counts_what_is_there():
    model = pruned()
    dense = sum(model[i].weight.nbytes for i in (0, 2))
    kept = sp.sparsify_(model, layout="csr", tokens=1, keep="packed", filter_fn=everything).memory
    assert kept.dense == dense and kept.canonical == 0
    assert kept.resident == kept.packed == sum(model[i].packed_nbytes for i in (0, 2))
    model = pruned()
    report = sp.sparsify_(model, layout="csr", tokens=1, filter_fn=everything)
    layouts = [t.nbytes for i in (0, 2) for t in model[i].to_layout().tensors().values()]
    assert (report.memory.dense, report.memory.packed, report.memory.canonical) == (dense, kept.packed, sum(layouts))
    assert report.memory.resident > kept.packed + sum(layouts)  # and where values enter it
    assert f"{report.memory.resident:,} resident" in str(report)
    learning = sp.sparsify_(pruned(frozen=False), layout="csr", tokens=1, filter_fn=everything).memory
    assert learning.packed == kept.packed


def test_values_that_were_rounded_are_refused_or_the_same(tmp_path):
    model, other = sparse(value_dtype="bfloat16"), sparse(keep="canonical", value_dtype="bfloat16")
    assert torch.equal(model(x()), other(x()))
    assert torch.equal(copy.deepcopy(model)(x()), other(x()))
    before = {name: id(module) for name, module in model.named_modules()}
    for ask in (model.state_dict, lambda: model[0].values, lambda: model[0].weight, lambda: sp.densify_(model),
                lambda: model.to(torch.float16)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"exact|float16.*bfloat16 alone; save\(model, path, value_dtype"):
            ask()
    assert before == {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(CheckpointError, match=r"save: 0: .*exact values"):
        sp.save(model, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())
    for name, each in (("one", model), ("two", other)):
        sp.save(each, tmp_path / f"{name}.safetensors", value_dtype="bfloat16")
    one, two = (sp.load(pruned(), tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert_same_state(one, two)
    assert_same_state(model.to(torch.bfloat16), other.to(torch.bfloat16))
    assert torch.equal(model(x().bfloat16()), other(x().bfloat16()))


def test_int8_that_was_rounded_is_refused(tmp_path):
    model = sparse(value_dtype="int8")
    for value_dtype in ("float32", "bfloat16", "int8"):
        with pytest.raises(CheckpointError, match="int8 alone; keep the file"):
            sp.save(model, tmp_path / "no.safetensors", value_dtype)
    with pytest.raises(RuntimeError, match="int8 alone"):
        sp.densify_(model)
    assert torch.equal(model(x()), sparse(keep="canonical", value_dtype="int8")(x()))


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16"])
def test_each_layer_is_written_as_its_kernels_hold_it(tmp_path, value_dtype):
    for name, keep in (("one", "packed"), ("two", "canonical")):
        sp.save(sparse(keep=keep, value_dtype=value_dtype), tmp_path / name, value_dtype="inference")
    one, two = (sp.load(pruned(), tmp_path / name) for name in ("one", "two"))
    assert_same_state(one, two)
    assert (tmp_path / "one").stat().st_size == (tmp_path / "two").stat().st_size


@pytest.mark.parametrize("failing", ["pack", "unpack"])
def test_a_layer_that_could_not_be_packed_is_whole(failing, monkeypatch):
    model, other = sparse(keep="canonical"), sparse(keep="canonical")

    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(ops, failing, fail)
        keep_packed_(model[0])
    assert type(model[0]) is sp.SparseLinear and model[0].dense_from == other[0].dense_from
    assert_same_state(model, other)
    assert torch.equal(model(x()), other(x()))
    packed = sparse()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(ops, failing, fail)
        packed.to(torch.bfloat16)
    assert torch.equal(packed[0](x()), other[0](x()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_packed_anew(dtype):
    model, other = sparse(), sparse(keep="canonical")
    assert_same_state(model.to(dtype), other.to(dtype))
    assert torch.equal(model(x().to(dtype)), other(x().to(dtype)))
    with pytest.raises(RuntimeError, match="float64"):
        model.double()
    with pytest.raises(RuntimeError, match="its weight on meta"):
        sparse().to("meta")


def test_what_needs_a_gradient_is_refused():
    model = sparse().train()
    with pytest.raises(RuntimeError, match=r"a gradient.*densify_\(model\) first"):
        model(x().requires_grad_(True))
    assert "RuntimeError: a gradient is needed" in sp.explain(model[0], x().requires_grad_(True))
    assert "kept packed" in sp.explain(model[0], x())
    with torch.no_grad():
        assert torch.equal(model(x().requires_grad_(True)), sparse(keep="canonical")(x()))
    with pytest.raises(RuntimeError, match="would be lost"):
        model[0].values.mul_(2)


DENSIFY = r"densify_\(model\) first"
RELOAD = "load the file that the model came from with keep='canonical'"
WRITES = {
    "values": lambda layer: setattr(layer, "values", nn.Parameter(torch.zeros(3))),
    "values as a tensor": lambda layer: setattr(layer, "values", torch.zeros(3)),
    "indices": lambda layer: setattr(layer, "col_indices", torch.zeros(3, dtype=torch.int32)),
    "weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(36, 24))),
    "nothing": lambda layer: delattr(layer, "values"),
    "meta": lambda layer: layer.to("meta"),
    "float64": lambda layer: layer.double(),
    "complex64": lambda layer: layer._apply(lambda tensor: tensor.to(torch.complex64)),
    "a gradient": lambda layer: layer(x().requires_grad_(True)),
}


@pytest.mark.parametrize("value_dtype, remedy", [("float32", DENSIFY), ("bfloat16", RELOAD), ("int8", RELOAD)])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_refused_says_what_to_do(write, value_dtype, remedy):
    layer = sparse(value_dtype=value_dtype)[0]
    with pytest.raises(RuntimeError, match=rf"expected to be run, was asked for .*{value_dtype} alone; .*{remedy}"):
        WRITES[write](layer)
    assert torch.equal(layer(x()), sparse(value_dtype=value_dtype)[0](x()))


def test_writes_to_the_weight_name_what_can_be_done():
    layer = sparse()[0]
    with pytest.raises(RuntimeError, match=r"weight expected to be read, got a write: .*densify_") as error:
        layer.weight.zero_()
    assert ".values" not in str(error.value)  # which refuses them too
    with pytest.raises(RuntimeError, match=rf"asked for another values, .*; {DENSIFY}"):
        torch.func.functional_call(layer, {"values": torch.zeros(3)}, x())


@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8"])
def test_calls_that_no_packed_form_serves_say_why(value_dtype):
    layer = sparse(value_dtype=value_dtype)[0]
    with pytest.raises(RuntimeError, match=r"no packed form computes .*got torch.float64.*; pass x in float32"):
        layer(x().double())
    assert "RuntimeError: needs float32" in sp.explain(layer, x().double())
    with pytest.raises(RuntimeError, match="a functorch transform is active"):
        torch.func.vmap(layer)(x()[None])
    exact = sparse()[0]
    assert exact(x().double()).dtype == torch.float64  # by its layout, unpacked


def test_an_unknown_value_dtype_is_named_before_what_is_lost(tmp_path):
    with pytest.raises(CheckpointError, match="value_dtype expected one of float32, bfloat16, int8, inference, got"):
        sp.save(sparse(value_dtype="int8"), tmp_path / "a", value_dtype="int4")


def test_other_values_are_refused():
    model, before = sparse(), sparse()(x())
    with pytest.raises(RuntimeError, match=r"expected no new values, got 0.values; load into the original"):
        model.load_state_dict(sparse(keep="canonical").state_dict())
    assert torch.equal(model(x()), before)


def test_arguments_are_checked_before_anything_changes():
    model = pruned(frozen=False)
    with pytest.raises(ValueError, match=r"expected a frozen model, got 0.weight .*requires_grad_\(False\) first"):
        sp.sparsify_(model, layout="csr", keep="packed", filter_fn=everything)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="keep expected one of"):
        sp.sparsify_(model, layout="csr", keep="both", filter_fn=everything)
    with pytest.raises(ValueError, match=r"up to float32, got 0.weight in torch.float64"):
        sp.sparsify_(pruned().double(), layout="csr", keep="packed", filter_fn=everything)


@pytest.mark.parametrize("name", ["bert", "modernbert", "torch batch"])
def test_a_program_goes_on(name):
    pytest.importorskip("transformers")
    options = {"layout": "csr", "engine": "program", "filter_fn": lambda module, fqn: "layer" in fqn}
    model, other = (prune_(make(name)).requires_grad_(False) for _ in range(2))
    sp.sparsify_(other, **options)
    expected = body(other, name)(tokens(2, 9))
    report = sp.sparsify_(model, keep="packed", **options)
    assert [choice.engine for choice in report.stacks] == ["program"]
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with programs(each) as notes:
            assert torch.equal(body(each, name)(tokens(2, 9)), expected)
        assert notes == [None]
    assert report.memory.canonical == 0
    if name != "modernbert":  # whose program reads the halves of one weight by themselves
        assert report.memory.resident == report.memory.packed == sum(
            m.packed_nbytes for m in model.modules() if isinstance(m, PackedLinear)
        )
        shared = {t.data_ptr() for t in stack(model)._bound.program.tensors}
        for layer in (m for m in model.modules() if isinstance(m, PackedLinear)):
            assert layer._any().values.data_ptr() in shared
    sp.densify_(model)
    sp.densify_(other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_program_of_products_in_int8_goes_on():
    pytest.importorskip("transformers")
    model, other = (prune_(make("bert", ffn=48)).requires_grad_(False) for _ in range(2))
    options = {"layout": "csr", "engine": "program", "filter_fn": lambda module, fqn: "layer" in fqn,
               "value_dtype": "int8", "activations": "int8"}  # fmt: skip
    sp.sparsify_(other, **options)
    sp.sparsify_(model, keep="packed", **options)
    assert torch.equal(body(model, "bert")(tokens(2, 9)), body(other, "bert")(tokens(2, 9)))


@pytest.mark.parametrize("dtypes", [{"value_dtype": "bfloat16"}, {"value_dtype": "int8", "activations": "int8"}])
def test_a_program_that_needs_parts_of_a_rounded_weight_is_left(dtypes):
    pytest.importorskip("transformers")
    options = {"layout": "csr", "filter_fn": lambda module, fqn: "layer" in fqn, **dtypes}
    model, other = (prune_(make("modernbert", ffn=48)).requires_grad_(False) for _ in range(2))
    sp.sparsify_(other, engine="layers", **options)
    report = sp.sparsify_(model, engine="program", keep="packed", **options)
    assert [(s.engine, s.nbytes) for s in report.stacks] == [("layers", 0)]
    assert "rounds a weight that its program needs in parts" in str(report)
    assert report.memory.canonical == 0 and all(stack_of(m) is None for m in model.modules())
    assert torch.equal(body(model, "modernbert")(tokens(2, 9)), body(other, "modernbert")(tokens(2, 9)))


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8"])
def test_a_file_is_loaded_packed_and_saved_again(tmp_path, value_dtype):
    sp.save(sparse(keep="canonical", value_dtype=value_dtype), tmp_path / "one.safetensors", value_dtype)
    model = sp.load(pruned(), tmp_path / "one.safetensors", keep="packed")
    other = sp.load(pruned(), tmp_path / "one.safetensors").requires_grad_(False)
    assert isinstance(model[0], PackedLinear) and model[0].exact and model[2].exact
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x()), other(x()))
    assert_same_state(model, other)
    assert memory_of(model).resident == memory_of(model).packed
    sp.save(model, tmp_path / "two.safetensors", value_dtype)
    assert_same_state(sp.load(pruned(), tmp_path / "two.safetensors"), other)
    assert_same_state(sp.load(model, tmp_path / "one.safetensors"), other)  # into what is packed
    with pytest.raises(CheckpointError, match="keep expected one of"):
        sp.load(pruned(), tmp_path / "one.safetensors", keep="all")


@pytest.mark.parametrize("keep", ["canonical", "packed"])
def test_loading_holds_one_dense_tensor_at_a_time(tmp_path, monkeypatch, keep):
    sp.save(sparse(keep="canonical"), tmp_path / "one.safetensors")
    alive: list[weakref.ref] = []
    tensor = Content.tensor

    def noted(self, name):
        assert not [ref() for ref in alive if ref() is not None], name
        found = tensor(self, name)
        if name in self.structure.encoded:  # the others are the file's own bytes
            alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Content, "tensor", noted)
    sp.load(pruned(), tmp_path / "one.safetensors", keep=keep)
    assert len(alive) == 2


def test_a_folder_whose_program_needs_another_dtype_is_read_packed(tmp_path):
    pytest.importorskip("transformers")
    model = prune_(make("bert")).requires_grad_(False)
    sp.sparsify_(model, layout="csr", engine="program", filter_fn=lambda module, fqn: "layer" in fqn)
    expected = body(model.bfloat16(), "bert")(tokens(2, 9))
    model.save_pretrained(tmp_path)
    again = sp.load(tmp_path, keep="packed")
    assert isinstance(again.get_submodule("encoder.layer.0.output.dense"), PackedLinear)
    with programs(again) as notes:
        assert torch.equal(body(again, "bert")(tokens(2, 9)), expected)
    assert "needs float32 parameters" in notes[0]


def test_a_folder_is_written_and_read_packed(tmp_path):
    pytest.importorskip("transformers")
    import transformers

    model = prune_(make("bert")).requires_grad_(False)
    options = {"layout": "csr", "filter_fn": lambda module, fqn: "layer" in fqn}
    other = copy.deepcopy(model)
    sp.sparsify_(model, keep="packed", **options)
    sp.sparsify_(other, **options)
    model.save_pretrained(tmp_path)
    found = transformers.AutoModel.from_pretrained(tmp_path)
    assert_same_state(found, other)
    packed = sp.load(tmp_path, keep="packed")
    assert any(isinstance(m, PackedLinear) for m in packed.modules())
    assert torch.equal(body(packed, "bert")(tokens(2, 9)), body(found.requires_grad_(False), "bert")(tokens(2, 9)))


_MEASURE = """
import ctypes, gc, json, sys
import torch, sparseprune as sp
from torch import nn

def status():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = (line.split() for line in open("/proc/self/status"))
    return {line[0]: int(line[1]) * 1024 for line in found if line[0] in ("VmRSS:", "VmHWM:")}

def model():
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(96)]).eval()

def everything(module, name):
    return True

path, what = sys.argv[1:]
torch.manual_seed(0)
if what == "make":
    made = model().requires_grad_(False)
    sp.prune_(made, 0.5, scope="layer", filter_fn=everything)
    sp.sparsify_(made, layout="csr", tokens=1, value_dtype="bfloat16", filter_fn=everything)
    sp.save(made, path, "bfloat16")
    sys.exit()
small = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)  # what is imported on the way
small[0].weight.data[::2] = 0
sp.sparsify_(small, layout="csr", tokens=1, filter_fn=everything)
sp.save(small, path + ".small")
sp.load(nn.Sequential(nn.Linear(64, 64)), path + ".small", keep=what)
with torch.device("meta"):
    loaded = model()
open("/proc/self/clear_refs", "w").write("5")
before = status()
sp.load(loaded, path, keep=what).requires_grad_(False)
peak = status()["VmHWM:"] - before["VmRSS:"]
with torch.no_grad():
    loaded(torch.randn(1, 1024))
print(json.dumps({"resident": status()["VmRSS:"] - before["VmRSS:"], "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fresh_process_takes_the_memory_of_the_packed_form(tmp_path):
    path = tmp_path / "one.safetensors"

    def run(what: str) -> str:
        command = [sys.executable, "-P", "-c", _MEASURE, str(path), what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("make")
    dense, layer, file = 96 * 4 << 20, 4 << 20, path.stat().st_size
    packed = 96 * (1024 * 1024 * (2 / 2 + 1 / 8))
    found = json.loads(run("packed"))
    assert found["resident"] < 1.1 * packed + (16 << 20) < 0.62 * dense  # chunks for huge pages are of 16 MiB
    # The file, what stays, and the work on one layer.
    assert found["peak"] < file + 1.1 * packed + (16 << 20) + 12 * layer < 0.8 * dense
    assert json.loads(run("canonical"))["resident"] > 1.3 * dense
