"""Which kernel a call on a GPU would take: asked with tensors that have a device and no memory."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparseprune as sp
from sparseprune import _native, backends, device_memory, reference, tensor_state
from sparseprune.cuda import _environment, linear, sddmm, structures
from sparseprune.nn.routes import Call, choose_packed_route, choose_route
from sparseprune.triton import _environment as triton_environment


class Module:
    """Stands for sparseprune._cuda: whether it is there and can run is all that a choice asks."""

    reason = ""

    def why_not_here(self):
        return self.reason


@pytest.fixture
def card(monkeypatch):
    """A card of capability 9.0 that torch can name and not reach, with our kernels and without Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_environment, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(_native, "CUDA", Module())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    _environment.why_not_here.cache_clear()
    monkeypatch.setattr(triton_environment, "_why_no_triton", lambda: "Triton is not installed")
    monkeypatch.setattr(backends, "_warned_on_gpu", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield monkeypatch
    _environment.why_not_here.cache_clear()


def calls(dtype, values_dtype=None):
    """op -> arguments, for a weight `[128, 256]`, 20 tokens."""

    def fake(*shape, kind=dtype):
        return torch.empty(shape, dtype=kind, device="cuda")

    x, dy, values = fake(20, 256), fake(20, 128), fake(900, kind=values_dtype or dtype)
    crow, col = fake(129, kind=torch.int32), fake(900, kind=torch.int32)
    blocks = fake(9, kind=torch.int32), fake(30, kind=torch.int32), fake(30, 16, 1, kind=values_dtype or dtype)
    nm = fake(128, 64, kind=values_dtype or dtype), fake(128, 64, kind=torch.uint8)
    w, mask = fake(128, 256), fake(128, 256, kind=torch.bool)
    return {
        "csr_linear": (x, crow, col, values, None, "relu"),
        "csr_linear_dx": (dy, crow, col, values, 256),
        "sddmm": (x, dy, crow, col, 1, 1),
        "bsr_linear": (x, *blocks, None, "none"),
        "nm_linear": (x, *nm, 1, 4, None, "none"),
        "nm_linear_dx": (dy, *nm, 1, 4, 256),
        "nm_sddmm": (x, dy, nm[1], 1, 4),
        "apply_mask_": (w, mask),
        "masked_copy": (w, mask),
        "threshold_mask": (w, fake()),
        "kth_magnitude": ([w], 3),
        "topk_mask": ([w], 3),
    }


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16,), (torch.bfloat16, torch.float32)], ids=str)
def test_nothing_falls_back(card, dtypes):
    """Also under autocast: x in 16 bits, values in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op, arguments in calls(*dtypes).items():
            assert backends.choose(op, *arguments).backend == "cuda", op


def test_square_blocks_go_to_triton_where_it_is(card):
    blocks = [torch.empty(9, dtype=torch.int32, device="cuda"), torch.empty(30, dtype=torch.int32, device="cuda")]
    values, x = torch.empty(30, 16, 16, device="cuda"), torch.empty(4, 256, device="cuda")
    assert backends.choose("bsr_linear", x, *blocks, values, None, "none").backend == "cuda"
    card.setattr(triton_environment, "_why_no_triton", lambda: None)
    card.setattr(triton_environment, "_LAUNCHED", {0: ""})
    card.setattr(triton_environment, "_capability", lambda index: (9, 0))
    assert backends.choose("bsr_linear", x, *blocks, values, None, "none").backend == "triton"
    assert "fill the tensor cores" in backends.explain_op("bsr_linear", x, *blocks, values, None, "none")


def test_the_reference_on_a_gpu_is_said_once_an_op(card):
    card.setattr(_native, "CUDA", None)
    made = calls(torch.float32)
    for op in ("csr_linear", "sddmm"):
        with pytest.warns(RuntimeWarning, match=f"runs {op} in plain torch on the GPU"):
            assert backends.choose(op, *made[op]).backend == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.choose(op, *made[op])
    assert "reference: runs, in plain torch" in backends.explain_op("csr_linear", *made["csr_linear"])


def test_a_module_that_cannot_run_on_this_card_is_a_reason(card):
    """Built for another card, or with a CUDA newer than the driver: asked before anything is launched."""
    card.setattr(Module, "reason", "no kernel image is available for execution on the device")
    with pytest.warns(RuntimeWarning, match=r"cannot run on cuda:0: no kernel image .*; reinstall on this machine"):
        assert backends.choose("csr_linear", *calls(torch.float32)["csr_linear"]).backend == "reference"


def test_a_2_4_weight_is_read_as_csr_where_torchs_product_does_not_run(card):
    def broken(index):
        return None, "cuSPARSELT not supported on your machine."

    def fake(*shape, kind=torch.float16):
        return torch.empty(shape, dtype=kind, device="cuda")

    arguments = fake(20, 256), fake(128, 128), fake(128, 128, kind=torch.uint8), 2, 4, None
    for found, reasons in (broken, 1), (lambda index: (lambda dense: dense, ""), 0):
        card.setattr(linear, "semi_structured", found)
        told = linear.why_not_semi_structured(*arguments)
        assert len(told) == reasons and all("does not run on this card: cuSPARSELT not" in text for text in told)
        assert backends.choose("nm_linear", *arguments, "none").backend == "cuda"


def test_a_card_that_is_not_there_has_no_2_4_product():
    linear.semi_structured.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    compress, reason = linear.semi_structured(0)
    assert compress is None and reason
    linear.semi_structured.cache_clear()


def test_triton_that_cannot_launch_is_a_reason(card):
    """As where there is no C compiler: the call goes on to the CUDA kernel."""
    card.setattr(triton_environment, "_why_no_triton", lambda: None)
    card.setattr(triton_environment, "_capability", lambda index: (9, 0))
    card.setattr(triton_environment, "_LAUNCHED", {})

    def kernels(name):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    card.setattr(triton_environment, "kernels", kernels)
    card.setattr(torch, "zeros", lambda *shape, **options: torch.ones(1, device="meta"))
    blocks = [torch.empty(9, dtype=torch.int32, device="cuda"), torch.empty(30, dtype=torch.int32, device="cuda")]
    values, x = torch.empty(30, 16, 16, device="cuda"), torch.empty(4, 256, device="cuda")
    assert backends.choose("bsr_linear", x, *blocks, values, None, "none").backend == "cuda"
    told = backends.explain_op("bsr_linear", x, *blocks, values, None, "none")
    assert "Triton cannot launch a kernel here (RuntimeError: Failed to find C compiler.)" in told


def test_host_memory_never_reaches_the_real_module(monkeypatch):
    class Real(Module):
        runtime_version = 13000

    monkeypatch.setattr(_native, "CUDA", Real())
    parts = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), torch.ones(1).half()
    with pytest.raises(ValueError, match="expected CUDA tensors, got one on cpu"):
        linear.pack_strips((1, 4), *parts)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 4, device="cuda", dtype=torch.float16)
        with pytest.raises(ValueError, match="csr_as_it_is: expected tensors on one device, got cuda:0, cpu"):
            linear.csr_as_it_is(x, *parts, None, "none")


def test_a_forced_reference_is_no_surprise(card):
    card.setenv("SPARSEPRUNE_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("csr_linear", *calls(torch.float32)["csr_linear"]).backend == "reference"


def test_what_no_kernel_takes_is_named(card):
    """float64, and more than a grid or an int32 can count."""
    made = calls(torch.float32)
    x, crow, col, values, *rest = made["csr_linear"]
    many = torch.empty(_environment.MOST_TOKENS + 1, 256, device="cuda")
    told = backends.explain_op("csr_linear", many, crow, col, values, *rest)
    assert "needs at most 2097120 tokens in one call" in told
    huge = torch.empty(2**31, device="cuda")
    assert "needs fewer than 2^31 kept entries" in backends.explain_op("csr_linear", x, crow, col, huge, *rest)
    assert "got float64" in backends.explain_op("csr_linear", x.double(), crow, col, values, *rest)


@pytest.fixture
def layer():
    return sp.SparseLinear.from_linear(torch.nn.Linear(256, 128), "csr", dense_from=20, activation="relu").eval()


def test_a_layer_is_dense_from_as_many_rows_as_it_was_told(layer, card):
    def call(x, values, training=False):
        return choose_route(x, (), values, None, layer._forms, layer.dense_from, training).call

    x, few, values = (torch.empty(shape, device="cuda") for shape in ((20, 256), (19, 256), (900,)))
    assert call(x, values) is Call.UNPACKED
    assert call(few, values) is call(x, values, training=True) is Call.CANONICAL
    learning = torch.empty(900, device="cuda", requires_grad=True)
    assert call(x, learning) is Call.CANONICAL
    with torch.no_grad():
        assert call(x, learning) is Call.UNPACKED
    card.setenv("SPARSEPRUNE_BACKEND", "cuda")
    assert call(x, values) is Call.CANONICAL


def test_the_weight_of_a_dense_call_is_unpacked_once(monkeypatch, close):
    layer = sp.SparseLinear.from_linear(torch.nn.Linear(12, 8), "csr", activation="relu").eval().requires_grad_(False)
    monkeypatch.setattr(device_memory, "_ENTRIES", OrderedDict())
    x, residual = torch.randn(3, 12), torch.randn(3, 8)
    for _ in range(2):
        close(layer._unpacked_on_gpu(x, layer.bias, residual, "relu"), layer(x, residual=residual))
    assert len(device_memory._ENTRIES) == 1
    layer.values.mul_(2)
    close(layer._unpacked_on_gpu(x, layer.bias, None, "relu"), layer(x))


def test_the_reference_asks_the_device_nothing():
    """With tensors without memory a question raises."""
    with FakeTensorMode():
        crow, col = torch.empty(129, dtype=torch.int32), torch.empty(900, dtype=torch.int32)
        x, dy, values = torch.empty(20, 256), torch.empty(20, 128), torch.empty(900)
        assert reference.csr_linear(x, crow, col, values, None, "relu").shape == (20, 128)
        assert reference.csr_linear_dx(dy, crow, col, values, 256).shape == (20, 256)
        assert reference.sddmm(x, dy, crow, col, 1, 1).shape == (900, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_on_a_gpu_multiplies_16_bits_as_they_are(card, dtype):
    products = []
    linear = torch.nn.functional.linear
    card.setattr(torch.nn.functional, "linear", lambda x, *rest: products.append(x.dtype) or linear(x, *rest))
    x, w, bias = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((20, 64), (32, 64), (32,)))
    assert reference.dense_linear(x, w, bias, "relu").dtype == dtype
    reference.dense_linear(x, w.float(), bias, "relu")
    assert products == [dtype, torch.float32]


def test_explain_shows_the_backward_too():
    layer = sp.SparseLinear.from_linear(torch.nn.Linear(8, 4), "csr").double()
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    told = sp.explain(layer, x)
    assert "backward, for the input: csr_linear_dx" in told and "backward, for the values: sddmm" in told
    layer.values.requires_grad_(False)
    assert "sddmm" not in sp.explain(layer, x)
    with torch.no_grad():
        assert "backward" not in sp.explain(layer, x)


# What is remembered, and which stream reads it.


class Streams:
    """The caller's stream, which a test chooses, and an allocator that is told who reads."""

    def __init__(self, monkeypatch):
        self.current, self.log, self.recording = 1, [], False
        monkeypatch.setattr(device_memory, "_stream", lambda tensor: self.current)
        monkeypatch.setattr(device_memory, "_note_stream", lambda tensor: self.log.append(("reads", self.current)))
        monkeypatch.setattr(device_memory, "capturing", lambda device: self.recording)
        monkeypatch.setattr(device_memory, "_IN_GRAPHS", [])
        monkeypatch.setattr(device_memory, "_ENTRIES", OrderedDict())


def test_the_readers_of_a_pack_are_noted_once_each(monkeypatch):
    streams, weight = Streams(monkeypatch), torch.ones(3)
    first = device_memory.remembered("test", (weight,), lambda: (weight * 2,))
    assert streams.log == [("reads", 1)]
    assert device_memory.remembered("test", (weight,), lambda: None) is first and len(streams.log) == 1
    streams.current = 2
    for _ in range(2):
        assert device_memory.remembered("test", (weight,), lambda: None) is first
    assert streams.log[1:] == [("reads", 2)]


def test_what_is_made_takes_nothing_from_the_calling_thread(monkeypatch):
    """Not its memory pool, as torch.compile has one for a CUDA graph, nor autocast or inference mode."""
    streams, weight = Streams(monkeypatch), torch.ones(3, 3)

    def make():
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return threading.current_thread(), weight @ weight

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        thread, made = device_memory.remembered("test", (weight,), make)
    assert thread is not threading.current_thread()
    assert made.dtype == torch.float32 and not made.is_inference()

    def broken():
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        device_memory.remembered("broken", (weight,), broken)
    assert streams.log and len(device_memory._ENTRIES) == 1


def test_it_is_made_behind_the_callers_work_and_done_before_anyone_reads_it(monkeypatch):
    log = []

    class Stream:
        cuda_stream = 7

        def wait_stream(self, other):
            log.append(("waits for", other))

        def synchronize(self):
            log.append("synchronized")

    monkeypatch.setattr(device_memory, "_side_stream", lambda index: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(log.append(("on", stream))))
    with device_memory._on_side_stream(torch.ones(1), "current"):
        log.append("made")
    (_, waited), (_, on), *rest = log
    assert waited == "current" and isinstance(on, Stream) and rest == ["made", "synchronized"]


def test_every_layer_of_a_large_model_is_packed_once(monkeypatch):
    Streams(monkeypatch)
    weights, made = [torch.ones(2) for _ in range(1500)], []
    for _ in range(2):
        for weight in weights:
            device_memory.remembered("test", (weight,), lambda: made.append(1))
    assert len(made) == len(weights)
    del weights, weight
    later = [torch.ones(2) for _ in range(100)]
    for weight in later:
        device_memory.remembered("test", (weight,), lambda: None)
    assert len(device_memory._ENTRIES) == len(later), "what was made of weights that are gone is dropped"


def test_memory_seen_as_another_dtype_is_another_weight(monkeypatch):
    Streams(monkeypatch)
    weight = torch.ones(4, dtype=torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        assert device_memory.remembered("test", (weight.view(dtype),), lambda dtype=dtype: dtype) is dtype


def test_a_recording_is_looked_for_on_the_tensors_device(monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    with FakeTensorMode():
        tensors = [torch.empty(1, device=f"cuda:{index}") for index in (0, 1)]
    assert [_environment.capturing(tensor.device) for tensor in tensors] == [False, True]


def test_what_a_graph_reads_stays(monkeypatch):
    streams, weight = Streams(monkeypatch), torch.ones(3)
    streams.recording = True
    assert device_memory.remembered("test", (weight,), lambda: (weight * 2,)) is None, "nothing is made while recording"
    streams.recording = False
    made = device_memory.remembered("test", (weight,), lambda: (weight * 2,))
    streams.recording = True
    for _ in range(2):
        assert device_memory.remembered("test", (weight,), lambda: None) is made
    assert len(device_memory._IN_GRAPHS) == 1 and device_memory._IN_GRAPHS[0] is made
    streams.recording = False
    weight.add_(1)
    assert device_memory.remembered("test", (weight,), lambda: (weight * 2,)) is not made
    assert device_memory._IN_GRAPHS[0] is made, "the graph still reads the old one"


def test_the_tensors_inside_what_was_made_are_found():
    from sparseprune.cuda.structures import Csr

    one, two = torch.ones(1), torch.ones(2)
    assert [t.numel() for t in device_memory._tensors_in((Csr(one, two), two))] == [1, 2, 2]


LEARNED = {"csr": {"layout": "csr"}, "bsr": {"layout": "bsr", "blocksize": (4, 1)}, "nm": {"layout": "nm"}}


@pytest.mark.parametrize("how", ["plain", "saved elsewhere", "compiled", "reference"])
@pytest.mark.parametrize("layout", LEARNED)
def test_whose_gradient_it_was_is_known(monkeypatch, layout, how):
    """A fused step follows it, which no version counter sees. Hooks give the backward copies of what was saved; a
    compiled graph runs the ops alone.
    """
    torch.manual_seed(0)
    dense = torch.nn.Linear(8, 4)
    dense.weight.data[:, ::2] = 0
    layer, other = (sp.SparseLinear.from_linear(dense, **LEARNED[layout]) for _ in range(2))
    if how in ("reference", "compiled"):  # whose kernels note nothing themselves, as those of a GPU
        monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
    call = torch.compile(layer.train(), backend="aot_eager", fullgraph=True) if how == "compiled" else layer
    since = tensor_state.gradients_so_far()
    assert not tensor_state.learned_since(since, layer.values)
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor)
    with hooks if how == "saved elsewhere" else contextlib.nullcontext():
        y = call(torch.randn(3, 8))
    traced = tensor_state.gradients_so_far()
    y.sum().backward()
    assert tensor_state.learned_since(max(since, traced), layer.values)
    assert tensor_state.learned_since(since, other.values) == (how == "compiled")


def test_a_place_without_memory_is_any():
    since = tensor_state.gradients_so_far()
    with FakeTensorMode():
        fake = torch.empty(3)
    tensor_state.note_gradients(tensor_state.place_of(fake))
    assert tensor_state.learned_since(since, torch.ones(3))
    places = []
    torch.func.grad(lambda v: (places.append(tensor_state.place_of(v)), v.sum())[1])(torch.ones(3))
    assert places == [()]


def test_what_is_known_of_places_is_bounded(monkeypatch):
    monkeypatch.setattr(tensor_state, "_MOST_KNOWN", 8)
    one, weights = torch.ones(1), [torch.ones(1) for _ in range(20)]
    since = tensor_state.gradients_so_far()
    for weight in weights:
        tensor_state.note_gradients(tensor_state.place_of(weight))
        assert len(tensor_state._learned) <= 11
    assert tensor_state.learned_since(since, one), "what was forgotten may have been its own"


def test_the_entries_of_an_nm_weight_are_made_anew_while_a_graph_is_recorded(monkeypatch):
    """They ask the device nothing; what was remembered may be stale where a compiled step learned."""
    streams, indices = Streams(monkeypatch), torch.tensor([[0, 2, 1, 3]], dtype=torch.uint8)
    streams.recording = True
    found = structures.nm_entries(indices, 2, 4)
    assert found.crow.tolist() == [0, 4] and found.col.tolist() == [0, 2, 5, 7]
    assert not device_memory._ENTRIES


def test_an_nm_product_is_not_taken_with_parts_elsewhere(card):
    x, values = torch.empty(4, 64, device="cuda"), torch.empty(8, 16, device="cuda")
    indices = torch.empty(8, 16, dtype=torch.uint8, device="cuda")
    assert not linear._why_not_nm(x, values, indices, 1, 4, torch.empty(8, device="cuda"), "none")
    assert "one device" in "; ".join(linear._why_not_nm(x, values, indices, 1, 4, torch.empty(8), "none"))
    elsewhere = torch.empty(8, 16, dtype=torch.uint8)
    assert "needs indices on cuda:0" in "; ".join(
        sddmm._why_not_nm_sddmm(x, torch.empty(4, 8, device="cuda"), elsewhere, 1, 4)
    )


def test_an_x_elsewhere_is_not_handed_to_the_kernels_of_the_cpu(card):
    """Of a layer that holds its packed form on a GPU alone."""
    like = torch.empty(0, device="cuda", dtype=torch.float16)
    forms = SimpleNamespace(for_rows=lambda rows: "form")
    route = choose_packed_route(torch.empty(2, 8, dtype=torch.float16), (), None, forms, like)
    assert route.call == Call.PACKED
