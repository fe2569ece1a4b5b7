"""Runs one emulated module on prepared inputs: ``python emulator_probe.py MODULE.so INPUTS.npz STEM-OF-A-CU-FILE``.

Exits 0 where every schedule gives the expected results and 3 at the first difference. A process of its own, without
torch: a broken kernel may crash it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

import numpy as np

SCHEDULES = range(6)
NAN = np.float32(np.nan)


def load(path):
    loader = importlib.machinery.ExtensionFileLoader("_cuda_emul", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_cuda_emul", path, loader=loader))
    loader.exec_module(module)
    return module


def at(array):
    return array.ctypes.data


def aligned(array):
    """The array's bytes at a multiple of 16, with bytes of NaN around them."""
    raw = np.full(array.nbytes + 256, 0xFF, dtype=np.uint8)
    start = -raw.ctypes.data % 16 + 64
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def agree(got, expected, tolerance):
    return np.allclose(got.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance)


def linear_bitmap(cuda, data):
    x, words, starts, values = (aligned(data[f"strips_{name}"]) for name in ("x", "words", "starts", "values"))
    expected = data["strips_expected"][:11]
    tokens, rows = expected.shape
    y = np.full(expected.shape, np.nan, dtype=np.float16)
    cuda.bitmap_linear(
        at(x), at(words), at(starts), at(values), 0, at(y), tokens, rows, x.shape[1], int(data["strips_most"]), 2, 0,
        x.shape[1] % 8 == 0, 0,
    )  # fmt: skip
    return agree(y, expected, 2e-3)


def linear_bitmap_tiles(cuda, data):
    x, words, starts, values = (aligned(data[f"strips_{name}"]) for name in ("x", "words", "starts", "values"))
    expected, good = data["strips_expected"], True
    for tokens, splits in ((37, 1), (20, 3)):
        shape = tokens, expected.shape[1]
        y, sums = np.full(shape, np.nan, dtype=np.float16), aligned(np.full((splits, *shape), NAN))
        cuda.bitmap_tiles(
            at(x), at(words), at(starts), at(values), 0, at(y), at(sums) if splits > 1 else 0, tokens, shape[1],
            x.shape[1], int(data["strips_most"]), splits, 2, 0, x.shape[1] % 8 == 0, 0,
        )  # fmt: skip
        good &= agree(y, expected[:tokens], 2e-3)
    return good


def packing_bitmap(cuda, data):
    crow, col = (aligned(data[f"strips_{name}"]) for name in ("crow", "col"))
    values = aligned(data["strips_csr_values"].astype(np.float32))
    order = aligned(np.arange(values.size, dtype=np.int32)[::-1])
    rows, across, strips = crow.size - 1, -(-data["strips_x"].shape[1] // 64), data["strips_starts"].size - 1
    words, counts = aligned(np.zeros(strips * 32, np.uint32)), np.full(strips, -1, np.int32)
    cuda.bitmap_words(at(crow), at(col), at(words), at(counts), rows, across, strips, 0)
    good = np.array_equal(words, data["strips_words"].view(np.uint32))
    good &= np.array_equal(np.cumsum(counts), data["strips_starts"][1:])
    starts = aligned(data["strips_starts"])
    for given, places in ((values, 0), (aligned(values[::-1]), at(order))):
        packed = aligned(np.zeros(data["strips_values"].size, np.float16))
        cuda.bitmap_values(
            at(crow), at(col), places, at(given), 0, at(words), at(starts), at(packed), 2, rows, across, strips, 0
        )
        good &= np.array_equal(packed, data["strips_values"])
    return good


def linear_delta(cuda, data):
    x, starts, deltas, values = (aligned(data[f"delta_{name}"]) for name in ("x", "starts", "deltas", "values"))
    expected, good = data["delta_expected"], True
    for tokens in (1, 2, 3, 7):
        y = np.full((tokens, expected.shape[1]), NAN)
        cuda.delta_linear(
            at(x), at(starts), at(deltas), at(values), 0, at(y), tokens, expected.shape[1], x.shape[1], 0, 0, 0
        )
        good &= agree(y, expected[:tokens], 2e-5)
    return good


def sddmm(cuda, data):
    good = True
    for name, vector in (("odd", False), ("even", True)):
        parts = ("x", "dy", "crow", "col", "edges")
        x, dy, crow, col, edges = (aligned(data[f"sddmm_{name}_{part}"]) for part in parts)
        expected, (tokens, rows), columns = data[f"sddmm_{name}_expected"], dy.shape, x.shape[1]
        for few in (tokens, 31):
            out = aligned(np.full(col.size, NAN))
            cuda.sddmm_tiles(at(dy), at(x), at(edges), at(col), at(out), few, rows, columns, 2, vector, 0)
            good &= agree(out, expected if few == tokens else data[f"sddmm_{name}_few"], 1e-2)
        stride = -(-tokens // 4) * 4
        turned = [np.zeros((t.shape[1], stride), np.float32) for t in (dy, x)]
        turned[0][:, :tokens], turned[1][:, :tokens] = dy.T, x.T
        turned = [aligned(t) for t in turned]
        out = aligned(np.full(col.size, NAN))
        cuda.sddmm_rows(at(turned[0]), at(turned[1]), stride, at(crow), at(col), at(out), rows, 2, 0)
        good &= agree(out, expected, 1e-3)
    return good


def masking(cuda, data):
    good = True
    for n in (data["mask_w"].size, 37):
        w, mask = aligned(data["mask_w"][:n]), aligned(data["mask_mask"][:n])
        out = aligned(np.full(n, NAN))
        cuda.masked_copy(at(w), at(mask), at(out), n, 4, 0)
        good &= np.array_equal(out, np.where(mask, w, 0))
        cut, kept, counts = np.float32([0.5]), aligned(np.full(n, 7, np.uint8)), np.zeros(2, np.int64)
        cuda.threshold_mask(at(w), at(cut), 0, at(kept), at(out), at(counts), n, 0)
        good &= np.array_equal(kept, abs(w) >= 0.5) and np.array_equal(out, np.where(abs(w) >= 0.5, w, 0))
        good &= counts[0] == kept.sum() and counts[1] == 0
        grad, scores = aligned(w[::-1]), aligned(np.ones(n, np.float32))
        cuda.mask_gradient(at(grad), at(w), at(mask), at(scores), n, 0, 0)
        good &= np.array_equal(grad, np.where(mask, w[::-1], 0)) and agree(scores, 1 + w[::-1] * w, 1e-6)
        p, first, second = aligned(w), aligned(np.zeros(n, np.float32)), aligned(np.zeros(n, np.float32))
        grad = aligned(w[::-1])
        step = 0.9, 0.1, 0.99, 0.01, 1e-8, 0.1, 10
        cuda.masked_adamw(at(p), at(grad), at(first), at(second), at(mask), n, 0, *step, 0)
        step = w * 0.9 - 0.1 * grad / (abs(grad) * 0.1 * 10 + 1e-8) * 0.1
        good &= agree(p, np.where(mask, step, 0), 1e-5) and agree(first, np.where(mask, 0.1 * grad, 0), 1e-6)
        good &= agree(second, np.where(mask, 0.01 * grad**2, 0), 1e-6)
    return good


def linear_csr(cuda, data):
    x, crow, col, values = (aligned(data[f"csr_{name}"]) for name in ("x", "crow", "col", "values"))
    expected = data["csr_expected"]
    tokens, rows = expected.shape
    good = True
    for few in (1, 2, 4, 7):
        y = np.full((few, rows), NAN)
        cuda.csr_linear_few(
            at(x), at(crow), at(col), at(values), 0, at(y), few, rows, x.shape[1], values.size, 0, 0, 0
        )
        good &= agree(y, expected[:few], 2e-5)
    stride = -(-tokens // 4) * 4
    turned = np.full((x.shape[1], stride), NAN)
    turned[:, :tokens] = x.T
    turned = aligned(turned)
    y = np.full((tokens, rows), NAN)
    cuda.csr_linear_many(
        at(turned), stride, at(crow), at(col), at(values), 0, at(y), tokens, rows, values.size, 0, 0, 0
    )
    return good and agree(y, expected, 2e-5)


def selection(cuda, data):
    tensors = [aligned(data["select_a"]), aligned(data["select_b"])]
    listed = [(at(x), x.size, 0) for x in tensors]
    good = True
    for k, value, masks in zip(data["select_k"], data["select_kth"], data["select_masks"]):
        state, bins = np.zeros(cuda.SELECT_STATE_BYTES // 8, np.int64), np.zeros(cuda.RADIX_BINS + 1, np.int64)
        cuda.select_begin(at(state), at(bins), int(k), 0)
        for shift, width in ((21, 11), (10, 11), (0, 10)):
            cuda.select_histogram(listed, 0, False, shift, width, at(state), 0, shift == 21, at(bins), 0)
            cuda.select_digit(at(state), at(bins), width, 0)
        found = np.full(1, NAN)
        cuda.select_value(at(state), 0, False, 0, at(found), 0)
        chunks = [-(-x.size // cuda.SELECT_CHUNK) for x in tensors]
        counts, nan = np.zeros(sum(chunks), np.int64), np.zeros(1, np.int64)
        for one, before in zip(listed, (0, chunks[0])):  # as two launches, here
            cuda.select_count_ties([one], before, 0, False, 0, at(state), at(counts), at(nan), 0)
        cuda.select_scan(at(counts), counts.size, 0)
        got = [aligned(np.full(x.size, 7, np.uint8)) for x in tensors]
        into = [(at(x), x.size, at(mask)) for x, mask in zip(tensors, got)]
        cuda.select_mask(into, 0, 0, False, 0, at(state), at(counts), 0)
        good &= found[0] == value and np.array_equal(np.concatenate(got), masks) and nan[0] == 0
    many = np.arange(700, dtype=np.int64) % 5  # more than one round of the scan
    expected = np.cumsum(many) - many
    cuda.select_scan(at(many), many.size, 0)
    return good and np.array_equal(many, expected)


def main() -> int:
    module, inputs, case = sys.argv[1:]
    cuda, data = load(module), np.load(inputs)
    for seed in SCHEDULES:
        cuda.use_schedule(seed)
        try:
            good = globals()[case](cuda, data)
        except RuntimeError as error:
            print(f"schedule {seed}: {error}")
            return 3
        if not good:
            print(f"schedule {seed}: wrong result")
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
