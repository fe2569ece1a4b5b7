"""Huge pages under packed weights: the copies are right, apart, aligned, and go when they are no longer held."""

import itertools
import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch

import sparseprune as sp
from sparseprune import _native, layouts, native, ops
from sparseprune.nn import SparseLinear
from sparseprune.packing import huge_pages, in_huge_pages

pytestmark = pytest.mark.skipif(_native.C is None, reason="needs the compiled core")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int16])
@pytest.mark.parametrize("shape", [(70001,), (33001, 2), (9 << 20,)])
def test_copies_are_the_same_and_aligned(dtype, shape):
    tensor = torch.randint(-100, 100, shape).to(dtype)
    copy = in_huge_pages(tensor)
    assert copy.dtype == dtype and copy.shape == tensor.shape and torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr() and copy.data_ptr() % 64 == 0 and copy.is_contiguous()


def test_small_tensors_stay():
    tensor = torch.randn((64 << 10) // 4 - 1)
    assert in_huge_pages(tensor) is tensor
    assert in_huge_pages(torch.empty(0)).numel() == 0


def test_copies_of_many_threads_lie_apart():
    held: list[torch.Tensor] = []

    def work() -> None:
        held.extend([huge_pages._place(65 + i % 7) for i in range(20000)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in held)
    assert len(spans) == 80000 and all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_nobody_holds_is_freed():
    for size in (1 << 20, 20 << 20):  # many in a chunk, and more than a chunk holds
        source = torch.ones(size, dtype=torch.uint8)
        in_huge_pages(source)
        before = resident()
        for _ in range((400 << 20) // size):
            in_huge_pages(source)
        assert resident() - before < 100 << 20


def test_a_pickle_holds_the_weight_alone():
    packed = ops.pack(layouts.from_dense(torch.randn(256, 512), "csr"), tokens=128)
    packed = packed.in_huge_pages("index", "offsets", "values")
    assert packed.values.untyped_storage().nbytes() > 8 << 20
    content = pickle.dumps(packed)
    assert len(content) < packed.nbytes + 4 * packed.perm.numel() + 20000
    again = pickle.loads(content)
    x = torch.randn(3, 512)
    assert torch.equal(native.linear.linear(x, again), native.linear.linear(x, packed))


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8"])
def test_layers_follow_their_values_into_huge_pages(values):
    """Packed in inference mode, changed and packed again outside of it."""
    linear = torch.nn.Linear(300, 500)
    sp.prune_(torch.nn.Sequential(linear), 0.5)
    layer = SparseLinear.from_linear(linear, value_dtype=values, tokens=(1, 128)).eval()
    for rows in (1, 67):
        x = torch.randn(rows, 300)
        with torch.inference_mode():
            first = layer(x)
        packed = layer._packed(layer._forms.for_rows(rows))
        assert packed.values.untyped_storage().nbytes() > 8 << 20 and not packed.values.is_inference()
        with torch.no_grad():
            layer.values.mul_(2)
            twice = layer(x)
            assert torch.allclose(twice - layer.bias, 2 * (first - layer.bias), atol=1e-4)
            layer.values.div_(2)
            assert torch.allclose(layer(x), first, atol=1e-5)
            again = layer._packed(layer._forms.for_rows(rows))
            assert again.index.data_ptr() == packed.index.data_ptr()
            assert again.values.untyped_storage().nbytes() > 8 << 20
