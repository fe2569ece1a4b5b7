"""Memory stays flat: nothing that a call makes outlives it, whichever kernel answers."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn import SparseLinear

CALLS = 1_000_000


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_a_million_calls():
    linear = nn.Linear(64, 64).eval()
    sp.prune_(linear, sparsity=0.8)
    layer = SparseLinear.from_linear(linear, tokens=(1, 16))
    one, several = torch.randn(1, 64), torch.randn(9, 64)
    with torch.inference_mode():
        expected = linear(one), linear(several)

        def call(times: int) -> None:
            for _ in range(times // 2):
                layer(one), layer(several)

        call(10_000)
        before = resident_bytes()
        call(CALLS)
        grown = resident_bytes() - before
        for x, y in zip((one, several), expected):
            torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    # one float a call would be 3.8 MiB; what the allocator rounds is less
    assert grown < 2 << 20, f"{grown} bytes more after {CALLS} calls"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_many_calls_of_a_program():
    """Sequences of changing length, with and without padding, on one thread and on all."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    sp.prune_(model, sparsity=0.8, scope="layer")
    report = sp.sparsify_(model, layout="csr", engine="program")
    assert [choice.engine for choice in report.stacks] == ["program"], str(report)
    batches = [torch.randn(batch, length, 32) for batch, length in ((1, 1), (2, 17), (3, 70))]
    masks = [torch.arange(x.shape[1]) >= torch.tensor([x.shape[1], 1, 5][: len(x)])[:, None] for x in batches]
    calls = 100_000
    with torch.inference_mode():
        expected = [model(x) for x in batches]

        def call(times: int) -> None:
            for _ in range(times // 6):
                for x, mask in zip(batches, masks):
                    model(x), model(x, src_key_padding_mask=mask)

        call(3_000)
        before = resident_bytes()
        call(calls)
        grown = resident_bytes() - before
        for x, y in zip(batches, expected):
            torch.testing.assert_close(model(x), y)
    assert grown < 1 << 20, f"{grown} bytes more after {calls} calls"
