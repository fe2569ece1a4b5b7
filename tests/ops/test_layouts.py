"""Layouts: bit-identical round trips on odd shapes, and what validate() refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparseprune import layouts


def dense(rows: int, columns: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) < density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (16, 8), (32, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_round_trip(shape, density, dtype):
    w = dense(*shape, density).to(dtype)
    w[:1] = 0
    for layout in (layouts.CSR.from_dense(w), layouts.BSR.from_dense(w, (1, 1)), layouts.NM.from_dense(w, 1, 1)):
        layout.validate()
        assert torch.equal(layout.to_dense(), w) and layout.to_dense().dtype == dtype
    if shape[0] % 16 == 0:
        block = layouts.BSR.from_dense(w, (16, 1))
        block.validate()
        assert torch.equal(block.to_dense(), w)


def test_examples_of_the_docstrings():
    csr = layouts.CSR.from_dense(torch.tensor([[0.0, 5, 0], [7, 0, 9]]))
    assert csr.crow_indices.tolist() == [0, 1, 3] and csr.col_indices.tolist() == [1, 0, 2]
    assert csr.values.tolist() == [5, 7, 9] and csr.nnz == 3
    bsr = layouts.BSR.from_dense(torch.tensor([[0.0, 5, 0], [7, 0, 0]]), (2, 1))
    assert bsr.crow_indices.tolist() == [0, 2] and bsr.col_indices.tolist() == [0, 1]
    assert bsr.values.tolist() == [[[0], [7]], [[5], [0]]] and bsr.nnz == 4
    nm = layouts.NM.from_dense(torch.tensor([[0.0, 5, 0, 7]]), 2, 4)
    assert nm.indices.tolist() == [[1, 3]] and nm.values.tolist() == [[5, 7]]
    short = layouts.NM.from_dense(torch.tensor([[0.0, 0, 0, 7]]), 2, 4)
    assert short.indices.tolist() == [[0, 3]] and short.values.tolist() == [[0, 7]]


def test_nan_is_kept():
    w = torch.tensor([[0.0, float("nan")]])
    assert layouts.CSR.from_dense(w).nnz == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"col_indices": torch.tensor([1, 0, 3], dtype=torch.int32)}, r"values in \[0, 3\)"),
        ({"col_indices": torch.tensor([1, -1, 2], dtype=torch.int32)}, r"values in \[0, 3\)"),
        ({"col_indices": torch.tensor([1, 2, 2], dtype=torch.int32)}, "rising within each row"),
        ({"col_indices": torch.tensor([1, 0, 2])}, "int32"),
        ({"crow_indices": torch.tensor([0, 4, 3], dtype=torch.int32)}, "never falls"),
        ({"crow_indices": torch.tensor([0, 1, 2], dtype=torch.int32)}, "from 0 to 3"),
        ({"crow_indices": torch.tensor([0, 3], dtype=torch.int32)}, "3 entries for 2 rows"),
        ({"values": torch.ones(2)}, "values expected"),
    ],
)
def test_csr_validate_refuses(change, message):
    csr = layouts.CSR.from_dense(torch.tensor([[0.0, 5, 0], [7, 0, 9]]))
    with pytest.raises(ValueError, match=message):
        replace(csr, **change).validate()


def test_bsr_and_nm_refuse():
    w = dense(8, 8, 0.9)
    with pytest.raises(ValueError, match="a divisor of"):
        layouts.BSR.from_dense(w, (3, 1))
    with pytest.raises(ValueError, match="at most 2"):
        layouts.NM.from_dense(torch.ones(2, 4), 2, 4)
    with pytest.raises(ValueError, match="multiple of m"):
        layouts.NM.from_dense(torch.ones(2, 6), 2, 4)
    nm = layouts.NM.from_dense(torch.ones(2, 4), 4, 4)
    with pytest.raises(ValueError, match="rising within each group"):
        replace(nm, indices=torch.zeros_like(nm.indices)).validate()
    with pytest.raises(ValueError, match=r"values in \[0, 4\)"):
        replace(nm, indices=nm.indices + 4).validate()
    bsr = layouts.BSR.from_dense(w, (4, 2))
    with pytest.raises(ValueError, match="values expected"):
        replace(bsr, values=bsr.values[:, :, :1]).validate()
    with pytest.raises(ValueError, match="layout expected"):
        layouts.from_dense(w, "coo")
    with pytest.raises(ValueError, match="blocksize"):
        layouts.from_dense(w, "bsr")
