"""sparsity_report: what is kept, in which layout, in how many bytes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
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


def test_low_rank_terms_and_masks_are_counted_in_a_file_as_in_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 96), nn.Linear(96, 8))
    sp.prune_(model, sparsity=0.9)
    model[0] = sp.SparseLinear.from_linear(model[0])
    model[0].set_low_rank_(torch.randn(3, 96), torch.randn(48, 3))
    model[1] = sp.MaskedLinear.from_linear(model[1])
    sp.save(model, tmp_path / "model.safetensors")
    own, found = sp.sparsity_report(model), sp.checkpoint.describe(tmp_path / "model.safetensors")
    (mine, its) = ([(each.name, each.nnz, each.sparse_bytes) for each in report.layers] for report in (own, found))
    assert mine == its
    assert (own.density, own.parameters, own.other_bytes) == (found.density, found.parameters, found.other_bytes)
    save_file(model[0].state_dict(), tmp_path / "state.safetensors")  # of the layer alone
    assert sp.checkpoint.describe(tmp_path / "state.safetensors").nnz == own["0"].nnz


def state_file(layout, folder, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    for layer in model[1:]:
        layer.weight.data[:4, -1] = 1.0  # the width is read off the highest index kept
    sp.prune_(model, 0.8, granularity=options.pop("granularity", "element"), scope="layer")
    sp.sparsify_(model, layout=layout, fuse=False, **options)
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path, metadata={"format": "pt"})
    return model, path


@pytest.mark.parametrize(
    ("layout", "label", "options"),
    [("csr", "csr", {}), ("bsr", "bsr4x1", {"granularity": "4x1", "blocksize": (4, 1)})],
)
def test_a_state_dict_of_a_sparsified_model_is_recognised(layout, label, options, tmp_path):
    model, path = state_file(layout, tmp_path, **options)
    own, file = sp.sparsity_report(model), sp.checkpoint.describe(path)
    for name in ("1", "2"):
        assert file[name].nnz == own[name].nnz and file[name].layout == label and file[name].shape == own[name].shape
        assert file[name].density == own[name].density < 0.21
    linears = 2 * 32 * 64 + 64 + 32
    assert file["0"].layout == "dense" and file.parameters == own.parameters == linears + 50 * 32
    assert file.dense_bytes == own.dense_bytes and file.sparse_bytes == path.stat().st_size - header(path)
    assert "layers 1, 2 are a SparseLinear's own tensors" in str(file) and "sparseprune.save" in file.note
    assert file.to_dict()["note"] == file.note


def test_a_pattern_is_read_off_a_state_dict(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    sp.prune_(model, granularity=sp.NM(2, 4))
    sp.sparsify_(model, layout="nm", fuse=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    file = sp.checkpoint.describe(tmp_path / "model.safetensors")
    assert [(layer.layout, layer.shape, layer.density) for layer in file.layers] == [
        ("nm2:4", (64, 32), 0.5), ("nm2:4", (32, 64), 0.5),
    ]  # fmt: skip


def test_names_alone_make_no_sparse_layer(tmp_path):
    tensors = {"a.values": torch.ones(3), "b.weight": torch.eye(4), "experts.up": torch.ones(2, 8, 8)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = sp.checkpoint.describe(tmp_path / "a.safetensors")
    assert [layer.name for layer in file.layers] == ["b"] and file.note == "" and file.density == 0.25
    assert file.other_weights == {"experts.up": f"[2, 8, 8], {128 / 147:.3f} of all parameters"}


def header(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")
