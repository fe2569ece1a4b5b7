"""The compiled sparse matmul, tier by tier, against dense torch: odd shapes, every packed kind, value type and token
count.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseprune import _native, layouts, ops, reference, tensor_state
from sparseprune.activations import ACTIVATIONS
from sparseprune.native import linear, norms, sddmm
from sparseprune.packing import Kind, Packed, to_dense

TOKENS = (0, 1, 2, 3, 5, 8, 9, 17, 31, 50, 64, 65, 130)


def weight(rows: int, columns: int, density: float, block: tuple[int, int] = (1, 1)) -> layouts.Layout:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    r, c = block
    kept = torch.rand(rows // r, 1, columns // c, 1, generator=generator) < density
    w = torch.randn(rows // r, r, columns // c, c, generator=generator) * kept
    w = w.reshape(rows, columns)
    return layouts.CSR.from_dense(w) if block == (1, 1) else layouts.BSR.from_dense(w, block)


def dense_of(packed: Packed) -> Tensor:
    return to_dense(packed.index, packed.offsets, packed.values, packed.scale, packed.plan)


WEIGHTS = {
    "empty rows": weight(70, 130, 0.02),
    "half": weight(200, 101, 0.5),
    "ninety": weight(320, 600, 0.1),
    "dense": weight(33, 17, 1.0),
    "zero": weight(16, 8, 0.0),
    "one": weight(1, 1, 1.0),
    "one column": weight(40, 1, 0.5),
    "one row": weight(1, 515, 0.3),
    "no columns": layouts.CSR.from_dense(torch.zeros(7, 0)),
    "no rows": layouts.CSR.from_dense(torch.zeros(0, 9)),
    "16x1": weight(80, 77, 0.3, (16, 1)),
    "8x1": weight(72, 200, 0.3, (8, 1)),
    "4x1": weight(36, 300, 0.3, (4, 1)),
    "2x2": weight(34, 50, 0.3, (2, 2)),
    "3x5": weight(33, 50, 0.3, (3, 5)),
    "16x16": weight(64, 64, 0.3, (16, 16)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("tuned", [1, 8, 32, 128])
def test_matches_dense(tier, name, tuned, close):
    layout = WEIGHTS[name]
    packed, dense = ops.pack(layout, tokens=tuned), layout.to_dense()
    for n in TOKENS:
        x = torch.randn(n, dense.shape[1])
        close(linear.linear(x, packed), F.linear(x, dense), torch.float32)


@pytest.mark.parametrize("name", ["half", "ninety", "16x1", "8x1", "4x1"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(tier, name, activation, close):
    layout = WEIGHTS[name]
    dense = layout.to_dense()
    bias = torch.randn(dense.shape[0])
    for tuned in (1, 128):
        packed = ops.pack(layout, tokens=tuned)
        for n in (1, 7, 65):
            x, residual = 2 * torch.randn(n, dense.shape[1]), torch.randn(n, dense.shape[0])
            expected = reference.activate(F.linear(x, dense, bias), activation) + residual
            close(linear.linear(x, packed, bias, residual, activation), expected)


@pytest.mark.parametrize("name", ["half", "ninety", "16x1", "8x1", "2x2", "one column", "dense"])
def test_epilogue_and_layer_norm(tier, name, close):
    layout = WEIGHTS[name]
    dense = layout.to_dense()
    bias, gain, shift = (torch.randn(dense.shape[0]) for _ in range(3))
    for tuned in (1, 8, 128):
        packed = ops.pack(layout, tokens=tuned)
        for n in (0, 1, 7, 31, 65, 130):
            x, residual = 2 * torch.randn(n, dense.shape[1]), torch.randn(n, dense.shape[0])
            for add, activation in ((residual, "none"), (None, "gelu")):
                plain = reference.activate(F.linear(x, dense, bias), activation) + (0 if add is None else add)
                expected = F.layer_norm(plain, gain.shape, gain, shift, 1e-5)
                close(linear.linear(x, packed, bias, add, activation, (gain, shift, 1e-5)), expected)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_narrow_values(tier, name, values, close):
    layout = WEIGHTS[name]
    for tuned in (1, 8, 128):
        packed = ops.pack(layout, tokens=tuned, value_dtype=values)
        dense = dense_of(packed)
        largest = F.pad(layout.to_dense(), (0, 1)).abs().amax(1, keepdim=True)
        rounding = largest / (254 if values == "int8" else 256)
        assert ((dense - layout.to_dense()).abs() <= rounding + 1e-7).all()
        for n in (1, 2, 9, 70):
            x, bias = torch.randn(n, dense.shape[1]), torch.randn(dense.shape[0])
            close(linear.linear(x, packed, bias), F.linear(x, dense, bias))


@pytest.mark.parametrize("name", WEIGHTS)
def test_sddmm(tier, name, close):
    layout = WEIGHTS[name]
    rows, columns = layout.shape
    packed = ops.pack(layout)
    for n in (0, 1, 64, 150):
        x, dy = torch.randn(n, columns), torch.randn(n, rows)
        args = (x, dy, packed.index, packed.offsets, packed.perm, packed.plan, layout.values.numel())
        close(sddmm.packed_sddmm(*args), reference.packed_sddmm(*args))


def test_packing_keeps_every_value():
    for layout in WEIGHTS.values():
        for tuned in (1, 8, 32, 128):
            assert torch.equal(dense_of(ops.pack(layout, tokens=tuned)), layout.to_dense())
            assert torch.equal(dense_of(ops.pack(layout, tokens=tuned, transpose=True)), layout.to_dense().t())


def test_wide_columns_beyond_16_bits(tier, close):
    columns = 70001
    w = torch.zeros(18, columns)
    w[:, ::997] = torch.randn(18, len(range(0, columns, 997)))
    w[3] = 0
    w[5, 65536:65800] = 1.0
    blocks = layouts.BSR.from_dense(w[:16], (16, 1)), layouts.BSR.from_dense(w, (2, 1))
    for layout in (layouts.CSR.from_dense(w), *blocks):
        for tuned in (1, 128):
            packed = ops.pack(layout, tokens=tuned)
            for n in (1, 3, 70):
                x = torch.randn(n, columns)
                close(linear.linear(x, packed), F.linear(x, layout.to_dense()), torch.float32)


def test_more_than_32_mib_of_outputs(tier, close):
    """From there on y lies in huge pages where the system has them."""
    layout = weight(3000, 40, 0.2)
    x = torch.randn(3001, 40)
    close(linear.linear(x, ops.pack(layout)), F.linear(x, layout.to_dense()))


def test_strided_inputs(tier, close):
    layout = WEIGHTS["ninety"]
    rows, columns = layout.shape
    packed, dense = ops.pack(layout), layout.to_dense()
    wide = torch.randn(40, columns + 24)
    for x in (wide[:, 24:], torch.randn(columns, 40).t(), torch.randn(2, 3, 5, columns), wide[::2, :columns]):
        residual = torch.randn(*x.shape[:-1], rows + 3)[..., :rows]
        close(linear.linear(x, packed, None, residual), F.linear(x, dense) + residual)


def test_infinity_and_nan_stay_where_they_are(tier):
    layout = WEIGHTS["ninety"]
    dense = layout.to_dense()
    x = torch.randn(70, dense.shape[1])
    x[4, 0], x[69, 5] = float("inf"), float("nan")
    for n in (1, 8, 70):
        y = linear.linear(x[:n], ops.pack(layout))
        reached = (dense[:, 0] != 0) & (n > 4)
        clean = torch.isfinite(y)
        assert clean[:4].all() and clean[5:69].all()
        if n > 4:
            assert torch.equal(~clean[4], reached)
        if n == 70:
            assert torch.equal(torch.isnan(y[69]), dense[:, 5] != 0)


@pytest.mark.parametrize("shape", [(5, 1), (3, 64), (2, 7, 100), (0, 8), (33, 384)])
def test_add_layer_norm(tier, shape, close):
    x, residual, gain, shift = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    for add in (residual, None):
        total = x if add is None else x + add
        expected = F.layer_norm(total, shape[-1:], gain, shift, 1e-5)
        close(norms.add_layer_norm(x, add, gain, shift, 1e-5), expected)


def test_many_threads_share_one_weight(tier):
    chosen = [(WEIGHTS[name], tuned) for name in ("half", "16x1") for tuned in (1, 128)]
    packs = [(ops.pack(layout, tokens=tuned), layout.to_dense()) for layout, tuned in chosen]
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i in range(30):
            packed, dense = packs[(i + seed) % len(packs)]
            x = torch.randn(1 + (37 * i + seed) % 150, dense.shape[1], generator=generator)
            if not torch.allclose(linear.linear(x, packed), x @ dense.t(), rtol=1e-4, atol=1e-4):
                wrong.append(f"thread {seed}, call {i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (16, 1)])
def test_a_team_gives_what_one_thread_gives(tier, block):
    """Large enough that several threads are worth waking; who takes which tile and row block must not show."""
    layout = weight(1040, 768, 0.4, block)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(_products(layout))
    finally:
        torch.set_num_threads(before)
    for one, team in zip(*results):
        assert torch.equal(one, team)


def _products(layout: layouts.Layout) -> list[Tensor]:
    """y at few and at many tokens, and the gradient of the values."""
    generator = torch.Generator().manual_seed(5)
    x, dy = torch.randn(200, 768, generator=generator), torch.randn(200, 1040, generator=generator)
    results = []
    for n in (1, 7, 30, 64, 200):
        packed = ops.pack(layout, tokens=n)
        if packed.plan.kind == Kind.GROUPS:
            results.append(linear.linear(x[:n], packed))
            results.append(linear.linear(x[:n], packed, norm=(torch.ones(1040), torch.zeros(1040), 1e-5)))
    packed, size = ops.pack(layout, tokens=128), layout.values.numel()
    results.append(sddmm.packed_sddmm(x, dy, packed.index, packed.offsets, packed.perm, packed.plan, size))
    return results


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
def test_memory_stays_flat():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    packs = [ops.pack(WEIGHTS[name], tokens=t) for name in ("ninety", "16x1", "half") for t in (1, 128)]
    inputs = [[torch.randn(n, packed.shape[1]) for n in (1, 8, 70)] for packed in packs]

    def calls(times: int) -> None:
        for _ in range(times):
            for packed, xs in zip(packs, inputs):
                for x in xs:
                    linear.linear(x, packed)

    calls(50)
    before = resident()
    calls(500)
    assert resident() - before < 4 << 20


def test_the_canonical_ops_remember_a_structure_only_while_it_is_unchanged(close):
    layout = WEIGHTS["ninety"]
    x = torch.randn(9, layout.shape[1])
    crow, col = layout.crow_indices.clone(), layout.col_indices.clone()
    close(ops.csr_linear(x, crow, col, layout.values), F.linear(x, layout.to_dense()))
    rows = torch.arange(layout.shape[0]).roll(1)
    moved = layouts.CSR.from_dense(layout.to_dense()[rows])
    if moved.nnz == layout.nnz:
        crow.copy_(moved.crow_indices)
        col.copy_(moved.col_indices)
        close(ops.csr_linear(x, crow, col, moved.values), F.linear(x, moved.to_dense()))
    held = len(tensor_state._MADE)
    del crow, col
    assert len(tensor_state._MADE) < held


def test_the_core_is_what_runs():
    packed = ops.pack(WEIGHTS["half"])
    assert _native.C is not None
    assert linear.why_not_linear(torch.randn(2, 101), packed) == []
    assert any("CPU" in reason for reason in linear.why_not_linear(torch.randn(2, 101, device="meta"), packed))


def test_the_default_dtype_does_not_reach_the_kernel():
    packed = ops.pack(layouts.from_dense(torch.eye(5, 7), "csr"))
    x = torch.randn(2, 3, 7)
    torch.set_default_dtype(torch.float64)
    try:
        y = linear.linear(x, packed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float32 and torch.equal(y, x[..., :5])


def test_a_kind_or_an_activation_that_is_not_there_is_refused():
    layout = WEIGHTS["half"]
    packed, x = ops.pack(layout), torch.randn(3, layout.shape[1])
    for kind in (len(Kind), -1):
        other = replace(packed, plan=packed.plan._replace(kind=kind))
        with pytest.raises(ValueError, match="kind expected"):
            linear.linear(x, other, None, None, "none")
        with pytest.raises(ValueError, match="kind expected"):
            _ = other.n_values
    core, numbers = _native.require_c(), torch.zeros(3, layout.shape[0])
    for code in (len(ACTIVATIONS), -1):
        with pytest.raises(ValueError, match="activation: code expected"):
            packed.weight.linear(0, 0, 0, code, x.data_ptr(), x.stride(0), 3, numbers.data_ptr())
    bitmask = packed.plan._replace(kind=Kind.BITMASK)
    places = (packed.index, packed.offsets, x, numbers)
    index, offsets, inputs, outputs = (t.data_ptr() for t in places)
    with pytest.raises(ValueError, match="which alone this kernel reads"):
        core.sddmm(bitmask, index, offsets, inputs, x.stride(0), outputs, numbers.stride(0), 3, outputs)
