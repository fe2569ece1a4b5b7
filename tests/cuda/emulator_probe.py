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


def bitmap_linear(cuda, data):
    x, words, starts, values = (aligned(data[f"strips_{name}"]) for name in ("x", "words", "starts", "values"))
    expected = data["strips_expected"]
    tokens, rows = expected.shape
    y = np.full(expected.shape, np.nan, dtype=np.float16)
    cuda.bitmap_linear(
        at(x), at(words), at(starts), at(values), 0, at(y), tokens, rows, x.shape[1], int(data["strips_most"]), 2, 0,
        x.shape[1] % 8 == 0, 0,
    )  # fmt: skip
    return agree(y, expected, 2e-3)


def csr_linear(cuda, data):
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


def select(cuda, data):
    tensors = [aligned(data["select_a"]), aligned(data["select_b"])]
    good = True
    for k, value, masks in zip(data["select_k"], data["select_kth"], data["select_masks"]):
        state, bins = np.zeros(cuda.SELECT_STATE_BYTES // 8, np.int64), np.zeros(cuda.RADIX_BINS + 1, np.int64)
        cuda.select_begin(at(state), at(bins), int(k), 0)
        for shift, width in ((21, 11), (10, 11), (0, 10)):
            for x in tensors:
                cuda.select_histogram(at(x), x.size, 0, False, shift, width, at(state), 0, shift == 21, at(bins), 0)
            cuda.select_digit(at(state), at(bins), width, 0)
        found = np.full(1, NAN)
        cuda.select_value(at(state), 0, False, 0, at(found), 0)
        chunks = [-(-x.size // cuda.SELECT_CHUNK) for x in tensors]
        counts, nan = np.zeros(sum(chunks), np.int64), np.zeros(1, np.int64)
        firsts = [at(counts), at(counts) + 8 * chunks[0]]
        for x, first in zip(tensors, firsts):
            cuda.select_count_ties(at(x), x.size, 0, False, 0, at(state), first, at(nan), 0)
        cuda.select_scan(at(counts), counts.size, 0)
        got = [np.full(x.size, 7, np.uint8) for x in tensors]
        for x, first, mask in zip(tensors, firsts, got):
            cuda.select_mask(at(x), x.size, 0, False, 0, at(state), first, at(mask), 0)
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
