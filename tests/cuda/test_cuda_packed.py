"""keep="packed" on a GPU: the form that a kernel reads alone, as it ran before, back to the bit."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_tensors import DTYPES, weight

import sparseprune as sp
from sparseprune import _native, backends, device_memory, layouts, ops, reference
from sparseprune.cuda import _environment, packed
from sparseprune.nn.packed_only import PackedLinear
from sparseprune.nn.sparsify.memory import memory_of
from sparseprune.packing import GpuKind

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runner"))
from fake_card import CARD, a_card

LAYOUTS = {"csr": (None, None), "bsr": ((4, 2), None), "nm": (None, (2, 4))}


def layout_of(kind, rows, columns, density, dtype):
    w = weight(rows, columns, density, dtype)
    if kind == "nm":
        w = w * reference.nm_mask(w.abs(), 2, 4)
    return layouts.from_dense(w, kind, *LAYOUTS[kind])


def moved(layout, device):
    return type(layout)(**{**vars(layout), **{n: t.to(device) for n, t in layout.tensors().items()}})


def called(x, form, bias=None, residual=None, activation="none"):
    return packed.packed_linear(x, form.values, form.index, form.offsets, None, bias, residual, form.plan, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_form_multiplies_and_comes_back_to_the_bit(device, close, kind, density, dtype):
    layout = layout_of(kind, 36, 200, density, dtype)
    if kind == "csr" and dtype == torch.float32:
        layout.values[:3] = torch.tensor([0.0, -0.0, float("nan")])
    kinds, bias = set(), weight(1, 36, 1.0, dtype, seed=1)[0]
    for tokens in (1, 8, 64):
        form = ops.pack_for_gpu(moved(layout, device), tokens)
        kinds.add(form.plan.kind)
        again = ops.unpack(form, layout.layout, *LAYOUTS[kind], dtype)
        for name, tensor in layout.tensors().items():
            found = again.tensors()[name].cpu().contiguous().view(torch.uint8)
            assert torch.equal(found, tensor.contiguous().view(torch.uint8)), name
        if layout.values.isnan().any():
            continue
        for rows in (0, 1, 8, 21):
            x, residual = torch.randn(rows, 200).to(dtype), torch.randn(rows, 36).to(dtype)
            expected = reference.dense_linear(x, layout.to_dense(), bias, "relu") + residual
            close(called(x.to(device), form, bias.to(device), residual.to(device), "relu").cpu(), expected)
    if dtype == torch.float32:
        assert GpuKind.ENTRIES in kinds and GpuKind.STRIPS not in kinds
    elif density >= 0.5:
        assert kinds == {GpuKind.STRIPS}


@pytest.mark.parametrize("dtype, tokens", [(torch.float16, 1), (torch.float32, 1), (torch.float32, 64)], ids=str)
def test_a_call_in_another_dtype_or_with_more_tokens(device, close, dtype, tokens):
    """As under autocast; and what a form has no kernel for is unpacked."""
    layout = layout_of("csr", 20, 1300, 0.06 if dtype == torch.float32 else 0.5, dtype)
    form = ops.pack_for_gpu(moved(layout, device), tokens)
    for other in DTYPES:
        for rows in (3, 30):
            x = torch.randn(2 * rows, 1300)[::2].to(other)
            expected = reference.dense_linear(x, layout.to_dense().to(other), None, "none")
            close(called(x.to(device), form).cpu(), expected)


def test_weights_without_rows_columns_or_entries(device):
    for rows, columns in ((0, 5), (5, 0), (4, 6)):
        for dtype in (torch.float16, torch.float32):
            layout = layouts.CSR.from_dense(torch.zeros(rows, columns, dtype=dtype))
            form = ops.pack_for_gpu(moved(layout, device), 1)
            y = called(torch.ones(3, columns, dtype=dtype, device=device), form)
            assert y.shape == (3, rows) and not y.any()
            assert torch.equal(form.to_dense().cpu(), torch.zeros(rows, columns))


def test_the_form_is_smaller_than_what_it_came_from(device):
    for density, kind, bytes_a_weight in ((0.5, GpuKind.STRIPS, 1.14), (0.1, GpuKind.DELTAS, 0.45)):
        layout = moved(layout_of("csr", 256, 1024, density, torch.float16), device)
        form = ops.pack_for_gpu(layout, 1)
        assert form.plan.kind == kind and form.nbytes <= bytes_a_weight * 256 * 1024
        assert form.nbytes < sum(t.nbytes for t in layout.tensors().values()) / 1.5


def test_forms_of_the_other_device_are_refused():
    form = ops.pack(layout_of("csr", 36, 200, 0.5, torch.float32))
    parts = form.values, form.index, form.offsets, None, None, None
    told = backends.explain_op("packed_linear", torch.ones(2, 200), *parts, form.plan, "none")
    assert "cuda: needs a form packed for a GPU, got one for the CPU" in told
    plan = form.plan._replace(kind=int(GpuKind.ENTRIES))
    told = backends.explain_op("packed_linear", torch.ones(2, 200), *parts, plan, "none")
    assert "native: needs a form packed for the CPU, got one for a GPU" in told


# Layers, on a card that is none, by the kernels under the emulator.


@pytest.fixture
def card(monkeypatch, emulator):
    emulator.use_schedule(0)
    monkeypatch.setattr(_native, "CUDA", emulator)
    _environment.why_not_here.cache_clear()
    monkeypatch.setattr(_environment, "why_not_here", lambda index: "")
    monkeypatch.setattr(_environment, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(_environment, "_multiprocessors", lambda index: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    # Ops see the tensors as those of the CPU that they are.
    monkeypatch.setattr(packed, "why_not_cuda", lambda *tensors: [])
    with a_card(monkeypatch):
        monkeypatch.delenv("SPARSEPRUNE_BACKEND")
        yield


def everything(module, name):
    return True


def model_of(dtype=torch.float16, density=0.5):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32, bias=False)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data.mul_(torch.rand_like(layer.weight) < density)
    return model.to(dtype).requires_grad_(False)


def sparse(keep="packed", device=CARD, dtype=torch.float16, density=0.5, **options):
    model = model_of(dtype, density).to(device)
    report = sp.sparsify_(model, layout="csr", keep=keep, filter_fn=everything, **{"tokens": 1, **options})
    return model, report


def same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    return set(left) == set(right) and all(torch.equal(t.cpu(), right[name].cpu()) for name, t in left.items())


@pytest.mark.emul
@pytest.mark.parametrize("dtype, density", [(torch.float16, 0.5), (torch.float16, 0.08), (torch.float32, 0.3)], ids=str)
def test_a_model_runs_from_packed_forms_alone(card, close, tmp_path, dtype, density):
    model, report = sparse(dtype=dtype, density=density, tokens=(1, 64))
    dense = model_of(dtype, density)
    memory = memory_of(model)
    forms = [t for i in (0, 2) for p in model[i].packed for t in p.tensors().values()]
    assert isinstance(model[0], PackedLinear) and model[0].exact and {t.device for t in forms} == {CARD}
    assert memory.canonical == 0 and memory.resident == memory.packed == sum(t.nbytes for t in forms)
    assert f"{memory.resident:,} resident" in str(report) and report.memory == memory
    assert not list(model[0].buffers()) and [n for n, _ in model[0].named_parameters()] == ["bias"]
    with torch.no_grad():
        for rows in (0, 1, 7, 40):
            x = torch.randn(rows, 96).to(dtype)
            close(model(x.to(CARD)).cpu(), dense(x))
    told = sp.explain(model[0], torch.ones(1, 96, dtype=dtype).to(CARD))
    assert "packed_linear" in told and "cuda: runs" in told and "kept packed" in told
    sp.save(model, tmp_path / "one.safetensors")
    loaded = sp.load(model_of(dtype, density).to(CARD), tmp_path / "one.safetensors", keep="packed")
    assert isinstance(loaded[0], PackedLinear) and loaded[0].like.device == CARD and same_state(loaded, model)
    assert same_state(copy.deepcopy(model), model)
    sp.densify_(model)
    assert torch.equal(model[0].weight.cpu(), dense[0].weight) and model[0].weight.device == CARD


@pytest.mark.emul
def test_another_device_is_packed_anew_or_refused(card, close):
    model, _ = sparse()
    other, _ = sparse("canonical")
    for device in ("cpu", CARD):
        model.to(device)
        assert model[0].like.device == torch.device(device) and same_state(model, other)
        x = torch.randn(3, 96).half()
        close(model(x.to(device)).cpu(), model_of()(x))
    model.to(torch.bfloat16), other.to(torch.bfloat16)
    assert model[0].like.dtype == torch.bfloat16 and same_state(model, other)
    with pytest.raises(RuntimeError, match="float64"):
        model.double()
    rounded, _ = sparse(device="cpu", dtype=torch.float32, value_dtype="int8")
    with pytest.raises(RuntimeError, match=r"asked for its values in torch.float32 on cuda:0, .*keep the file"):
        rounded.to(CARD)
    assert rounded[0].like.device.type == "cpu"
    rounded, _ = sparse(device="cpu", dtype=torch.float32, value_dtype="bfloat16")
    rounded.to(CARD, torch.bfloat16)
    assert rounded[0].exact and rounded[0].like.dtype == torch.bfloat16


@pytest.mark.emul
def test_a_card_that_the_kernels_do_not_run_on_is_refused(card, monkeypatch):
    packed_model, _ = sparse(device="cpu")
    monkeypatch.setattr(_native, "CUDA", None)
    monkeypatch.setattr(_native, "why_no_cuda", lambda: "built without CUDA; SPARSEPRUNE_CUDA=1")
    with pytest.raises(ValueError, match=r"keep='packed': 0.weight: built without CUDA.*keep='canonical' runs it"):
        sparse()
    with pytest.raises(RuntimeError, match=r"its weight on cuda:0 \(built without CUDA"):
        packed_model.to(CARD)


@pytest.mark.emul
def test_a_gradient_is_refused_and_inference_is_not(card, close):
    model, _ = sparse()
    x = torch.randn(2, 96).half().to(CARD).requires_grad_()
    with pytest.raises(RuntimeError, match=r"a gradient.*densify_\(model\) first"):
        model(x)
    with torch.no_grad():
        close(model(x).cpu(), model_of()(x.detach().cpu()))


@pytest.mark.emul
def test_what_was_made_of_the_canonical_tensors_goes_with_them(card):
    model, _ = sparse("canonical")
    values = model[0].values
    device_memory.remembered("test", (torch.ones(1),), lambda: 1)  # of a weight that is gone
    device_memory._ENTRIES["mine"] = device_memory._Entry((device_memory.MemoryState(values),), None, "made")
    del values
    from sparseprune.nn.sparsify.memory import keep_packed_forms_

    keep_packed_forms_(model)
    assert "mine" not in device_memory._ENTRIES
