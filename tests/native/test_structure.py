"""Structures that the compiled core packs: to the entry those that torch's sorts give, and nothing read outside."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sparseprune import _native, ops
from sparseprune.native import linear_masked
from sparseprune.packing import pack_structure, structure

pytestmark = pytest.mark.skipif(_native.C is None, reason="the compiled core is not built")

SHAPES = [(1, 1), (7, 13), (64, 96), (300, 1000), (16, 70000), (48, 0), (0, 48)]
BLOCKS = [(1, 1), (16, 1), (8, 1), (4, 4), (1, 4), (2, 3), (1, 16)]


def of_mask(mask):
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    return crow, mask.nonzero()[:, 1].int()


@pytest.mark.parametrize(("shape", "blocksize"), list(itertools.product(SHAPES, BLOCKS)))
def test_the_core_packs_as_torch_does(shape, blocksize, monkeypatch):
    (rows, columns), (r, c) = shape, blocksize
    if rows % r or columns % c:
        pytest.skip("no such blocks in this shape")
    torch.manual_seed(0)
    for density, tokens, transpose in itertools.product((0.0, 0.05, 0.4, 1.0), (1, 8, 32, 128), (False, True)):
        csr = of_mask(torch.rand(rows // r, columns // c) < density)
        packed = pack_structure(shape, blocksize, *csr, tokens, transpose)
        with monkeypatch.context() as patch:
            patch.setattr(structure, "_native", SimpleNamespace(C=None))
            expected = pack_structure(shape, blocksize, *csr, tokens, transpose)
        assert packed.plan == expected.plan
        for name, tensor in expected.tensors().items():
            assert torch.equal(packed.tensors()[name], tensor) and packed.tensors()[name].dtype == tensor.dtype, name


def test_columns_in_any_order_pack_as_torch_does(monkeypatch):
    crow, col = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([9, 2, 5, 7, 0], dtype=torch.int32)
    packed = pack_structure((3, 10), (1, 1), crow, col)
    monkeypatch.setattr(structure, "_native", SimpleNamespace(C=None))
    expected = pack_structure((3, 10), (1, 1), crow, col)
    assert all(torch.equal(packed.tensors()[name], tensor) for name, tensor in expected.tensors().items())


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("crow", "col", "what"),
    [
        ([0, 1, 2, 3], [0, 1, 10], r"col_indices expected in \[0, 10\), got 10"),
        ([0, 1, 2, 3], [0, -1, 2], r"col_indices expected in \[0, 10\), got -1"),
        ([0, 2, 1, 3], [0, 1, 2], "crow_indices expected to rise, falls in row 1"),
        ([0, 1, 2, 9], [0, 1, 2], "crow_indices expected from 0 to 3, got 0 to 9"),
        ([-4, 1, 2, 3], [0, 1, 2], "crow_indices expected from 0 to 3, got -4 to 3"),
    ],
)
def test_indices_that_point_outside_are_refused(crow, col, what, transpose):
    indices = torch.tensor(crow, dtype=torch.int32), torch.tensor(col, dtype=torch.int32)
    with pytest.raises(ValueError, match=what):
        pack_structure((3, 10), (1, 1), *indices, transpose=transpose)


def test_indices_without_bytes_are_left_to_torch():
    indices = torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):  # the core would read address 0
        pack_structure((3, 10), (1, 1), *map(mode.from_tensor, indices))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 64), (3, 0), (0, 3)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_mask_is_listed_as_torch_lists_it(shape, strided):
    torch.manual_seed(0)
    mask = (torch.rand(shape[::-1]).t() if strided else torch.rand(shape)) < 0.25
    kept = linear_masked._kept(mask)
    if mask.numel() == 0 or mask.sum() > 0.3 * mask.numel():
        assert kept.crow is None
        return
    crow, col = of_mask(mask)
    assert torch.equal(kept.crow, crow) and torch.equal(kept.col, col)
    assert torch.equal(kept.place, mask.flatten().nonzero().flatten())


def test_a_mask_written_in_place_is_read_again():
    torch.manual_seed(0)
    x, w, mask = torch.randn(4, 16), torch.randn(8, 16), torch.rand(8, 16) < 0.2
    for _ in range(2):
        torch.testing.assert_close(ops.masked_linear(x, w, mask), x @ (w * mask).t())
        mask.copy_(torch.rand(8, 16) < 0.2)
