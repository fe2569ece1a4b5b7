"""sparsity_report: what is kept, in which layout, in how many bytes."""

from __future__ import annotations

import json

import torch
from torch import nn

import sparseprune as sp


def test_every_kind_of_layer_is_counted_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
    for layer in (model[0], model[1]):
        sp.ops.apply_mask_(layer.weight, sp.ops.magnitude_mask(layer.weight, 409))
    model.add_module("tied", nn.Linear(64, 64, bias=False))
    model.tied.weight = model[2].weight
    before = sp.sparsity_report(model)
    assert [layer.name for layer in before.layers] == ["0", "1", "2"]
    assert before.nnz == 409 * 2 + 4096 and before.total == 3 * 4096
    assert before.parameters == sum(p.numel() for p in model.parameters())
    assert before.dense_bytes == 4 * before.parameters
    model[0] = sp.SparseLinear.from_linear(model[0])
    model[1] = sp.MaskedLinear.from_linear(model[1])
    after = sp.sparsity_report(model)
    assert [layer.layout for layer in after.layers] == ["csr", "masked", "dense"]
    assert (after.nnz, after.total, after.parameters) == (before.nnz, before.total, before.parameters)
    assert (after.dense_bytes, after.sparse_bytes) == (before.dense_bytes, before.sparse_bytes)
    assert after["0"].sparse_bytes < 0.14 * after["0"].dense_bytes
    assert after["2"].sparse_bytes == after["2"].dense_bytes
    assert json.loads(json.dumps(after.to_dict()))["nnz"] == after.nnz
    assert "density" in str(after) and "masked" in str(after)


def test_the_report_agrees_with_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 96))
    sp.prune_(model, sparsity=0.9)
    report = sp.sparsity_report(model)
    sp.save(model, tmp_path / "a.safetensors")
    file = sp.checkpoint.describe(tmp_path / "a.safetensors")
    assert [x.sparse_bytes for x in report.layers] == [x.sparse_bytes for x in file.layers]
    assert report.dense_bytes == file.dense_bytes
