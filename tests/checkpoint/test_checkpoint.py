"""Checkpoints: small, exact, atomic, and never trusted."""

from __future__ import annotations

import copy
import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparseprune as sp
from sparseprune import checkpoint, encodings, ops
from sparseprune.checkpoint import CheckpointError
from sparseprune.checkpoint.file import digest as digest_of
from sparseprune.nn.fusion import fused_activations


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32, padding_idx=0)
        self.up = nn.Linear(32, 96)
        self.act = nn.GELU()
        self.down = nn.Linear(96, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.register_buffer("seen", torch.arange(5))
        self.register_buffer("flags", torch.rand(3, 5) < 0.5)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.lm_head(self.norm(x + self.down(self.act(self.up(x)))))


def pruned(density=0.1, tied=False, blocks=None, seed=0):
    torch.manual_seed(seed)
    model = Net(tied)
    for linear in (model.up, model.down):
        if blocks:
            scores = ops.block_scores(linear.weight.abs(), blocks)
            keep = ops.topk_mask(scores, int(density * scores.numel()))
            mask = keep.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)
        else:
            mask = ops.magnitude_mask(linear.weight, int(density * linear.weight.numel()))
        ops.apply_mask_(linear.weight, mask)
    return model.eval()


IDS = torch.arange(40).view(4, 10)


def same_state(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_round_trip_is_bit_identical(tmp_path, dtype):
    model = pruned().to(dtype)
    sp.save(model, tmp_path / "a.safetensors")
    fresh = Net().to(dtype)
    assert sp.load(fresh, tmp_path / "a.safetensors") is fresh
    assert same_state(model, fresh)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_was_pruned_takes_few_bytes():
    torch.manual_seed(0)
    dense = torch.randn(768, 768)
    for density, values, limit in ((0.1, None, 0.12), (0.05, None, 0.07), (0.1, "bfloat16", 0.09), (0.1, "int8", 0.05)):
        weight = dense * ops.magnitude_mask(dense, int(density * dense.numel()))
        assert encodings.encode(weight, values).nbytes <= limit * 4 * dense.numel()


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_rounded_values_keep_every_entry(tmp_path, values):
    model = pruned(0.2)
    with torch.no_grad():
        model.up.weight[0, model.up.weight[0] != 0] *= 1e-6
        model.up.weight[0, 0] = 1.0
    sp.save(model, tmp_path / "a.safetensors", value_dtype=values)
    fresh = sp.load(Net(), tmp_path / "a.safetensors")
    for name in ("up", "down"):
        before, after = getattr(model, name).weight, getattr(fresh, name).weight
        assert torch.equal(before != 0, after != 0)
        torch.testing.assert_close(after, before, rtol=1e-2, atol=float(before.detach().abs().max()) / 127)
    assert torch.equal(model.embed.weight, fresh.embed.weight) and torch.equal(model.up.bias, fresh.up.bias)


@pytest.mark.parametrize(
    "layout,options",
    [("csr", {}), ("bsr", {"blocksize": (16, 1)}), ("nm", {"nm": (2, 4)}), ("csr", {"value_dtype": "bfloat16"})],
)
def test_sparse_layers_come_back_as_they_ran(tmp_path, layout, options):
    model = pruned(0.1, blocks=(16, 1) if layout == "bsr" else None)
    if layout == "nm":
        ops.apply_mask_(model.up.weight, ops.nm_mask(model.up.weight.abs(), 2, 4))
        ops.apply_mask_(model.down.weight, ops.nm_mask(model.down.weight.abs(), 2, 4))
    dense = copy.deepcopy(model)
    sp.sparsify_(model, layout=layout, tokens=40, **options)
    sp.save(model, tmp_path / "a.safetensors")
    fresh = sp.load(Net().eval(), tmp_path / "a.safetensors")
    assert isinstance(fresh.up, sp.SparseLinear) and fresh.up.layout == layout
    assert (fresh.up.blocksize, fresh.up.nm) == (model.up.blocksize, model.up.nm)
    assert fresh.up.value_dtype == model.up.value_dtype
    with torch.no_grad():
        assert torch.equal(fresh(IDS), model(IDS))
    assert same_state(sp.load(copy.deepcopy(fresh), tmp_path / "a.safetensors"), fresh)
    sp.densify_(fresh)
    assert same_state(fresh, dense)


def test_the_forms_of_each_call_size_come_back(tmp_path):
    path, model = tmp_path / "a.safetensors", pruned(0.1)
    model.up = sp.SparseLinear.from_linear(model.up, tokens=(1, 128), dense_from=9).eval()
    model.down = sp.SparseLinear.from_linear(model.down, tokens=40).eval()
    sp.save(model, path)
    fresh = sp.load(Net().eval(), path)
    assert (fresh.up.tokens, fresh.up.dense_from) == ((1, 128), 9)
    assert (fresh.down.tokens, fresh.down.dense_from) == ((40,), None)
    with torch.no_grad():
        assert torch.equal(fresh(IDS), model(IDS))

    def before_there_were_several(structure):  # a file of the first version: one number, no dense_from
        structure["sparse"]["down"] = {**structure["sparse"]["down"], "tokens": 40}
        del structure["sparse"]["down"]["dense_from"]

    rewrite(path, before_there_were_several)
    assert sp.load(Net().eval(), path).down.tokens == (40,)
    for wrong in ({"tokens": []}, {"tokens": [0]}, {"tokens": [[1]]}, {"dense_from": 0}, {"dense_from": [9]}):
        sp.save(model, path)
        rewrite(path, lambda structure, wrong=wrong: structure["sparse"]["up"].update(wrong))
        with pytest.raises(CheckpointError, match="ran sparse"):
            sp.load(Net(), path)


def test_fusions_come_back(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)).eval()

    model = make()
    sp.prune_(model, sparsity=0.9)
    sp.sparsify_(model, layout="csr")
    assert fused_activations(model).fused == {"0": ("1", "gelu")}
    sp.save(model, tmp_path / "a.safetensors")
    fresh, x = sp.load(make(), tmp_path / "a.safetensors"), torch.randn(5, 32)
    assert fused_activations(fresh).fused == {"0": ("1", "gelu")} and fresh[0].activation == "none"
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
        assert torch.equal(sp.load(fresh, tmp_path / "a.safetensors")(x), model(x))


def test_low_rank_terms_and_masked_layers(tmp_path):
    model = pruned()
    model.up = sp.SparseLinear.from_linear(
        model.up, low_rank_a=torch.randn(2, 32), low_rank_b=torch.randn(96, 2)
    )
    mask = model.down.weight != 0
    mask[0, :5] = True
    model.down = sp.MaskedLinear.from_linear(model.down, mask)
    sp.save(model, tmp_path / "a.safetensors")
    fresh = sp.load(Net().eval(), tmp_path / "a.safetensors")
    assert torch.equal(fresh.up.low_rank_b, model.up.low_rank_b) and torch.equal(fresh.down.mask, mask)
    with torch.no_grad():
        assert torch.equal(fresh(IDS), model(IDS))
    for _ in range(2):  # into what is there already, too
        sp.load(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh.up.values, model.up.values)


def test_tied_weights_are_stored_once(tmp_path):
    model = pruned(tied=True)
    sp.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sum("embed" in name or "lm_head" in name for name in file.keys()) <= 2  # noqa: SIM118
    fresh = sp.load(Net(tied=True), tmp_path / "a.safetensors")
    assert fresh.lm_head.weight is fresh.embed.weight and same_state(fresh, model)
    assert same_state(sp.load(Net(), tmp_path / "a.safetensors"), model)


def test_shrunken_models_reload(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )

    def make():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()

    model = make()
    sp.prune_(model, sparsity=0.5, granularity=sp.Neurons())
    from sparseprune.structured import shrink_

    shrink_(model)
    sp.save(model, tmp_path / "a.safetensors")
    fresh = sp.load(make(), tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in make().parameters())


def rewrite(path, structure=None, tensors=None, metadata=None, digest=True):
    """Alters a file the way an attacker would: content changed and the digest made right again."""
    with safe_open(path, "pt") as file:
        held, meta = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    found = json.loads(meta["structure"])
    if structure:
        structure(found)
    if tensors:
        tensors(held)
    meta["structure"] = json.dumps(found, sort_keys=True)
    if digest:
        meta["digest"] = digest_of(held, meta["structure"])
    meta.update(metadata or {})
    save_file(held, path, meta)


def grow(held):
    held["up.weight::values"] = torch.cat([held["up.weight::values"], torch.ones(1)])


def set_index(position, value):
    def change(held):
        held["up.weight::index"][position] = value

    return change


ATTACKS = {
    "altered": ({"tensors": lambda t: t["up.weight::values"].mul_(2), "digest": False}, "digest"),
    "structure altered": ({"structure": lambda s: s.update(fused=True), "digest": False}, "digest"),
    "version": ({"metadata": {"version": "99"}}, "version"),
    "format": ({"metadata": {"format": "pt"}}, "format"),
    "encoding": ({"structure": lambda s: s["encoded"]["up.weight"].update(encoding="pickle")}, "encoding"),
    "values added": ({"tensors": grow}, "values expected"),
    "nnz": ({"structure": lambda s: s["encoded"]["up.weight"].update(nnz=-1)}, "nnz"),
    "shape": ({"structure": lambda s: s["encoded"]["up.weight"].update(shape=[96, 31])}, "up.weight"),
    "huge shape": ({"structure": lambda s: s["encoded"]["up.weight"].update(shape=[1 << 40, 1 << 40])}, "up.weight"),
    "shape of another kind": ({"structure": lambda s: s["encoded"]["up.weight"].update(shape="96x32")}, "shape"),
    "index lost": ({"tensors": lambda t: t.pop("up.weight::index")}, "tensors"),
    "index escapes": ({"tensors": set_index(0, 255)}, "index"),
    "unknown key": ({"structure": lambda s: s.update(code="import os")}, "keys"),
    "no dictionary": ({"structure": lambda s: s.update(ties=[])}, "ties"),
    "tie to nothing": ({"structure": lambda s: s["ties"].update({"x": "y"})}, "share"),
    "sparse nonsense": ({"structure": lambda s: s["sparse"].update({"up": {"layout": "coo"}})}, "ran sparse"),
    "wrong block": (
        {
            "structure": lambda s: s["sparse"].update(
                up={"layout": "bsr", "blocksize": [7, 1], "nm": None, "activation": "none", "value_dtype": "float32", "tokens": 1}  # noqa: E501
            )
        },
        "up",
    ),
    "sizes that disagree": ({"structure": lambda s: s["linears"].update(up=[90, 32])}, "up"),
    "name missing": ({"tensors": lambda t: t.pop("norm.bias")}, "norm.bias"),
    "name unexpected": ({"tensors": lambda t: t.update(extra=torch.ones(1))}, "extra"),
    "dense of another shape": ({"tensors": lambda t: t.update({"norm.bias": torch.ones(7)})}, "norm.bias"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_file_is_one_clear_error_and_the_model_stays(tmp_path, attack):
    path = tmp_path / "a.safetensors"
    sp.save(pruned(), path)
    change, message = ATTACKS[attack]
    rewrite(path, **change)
    model = pruned(seed=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        sp.load(model, path)
    assert "a.safetensors" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_empty_and_truncated_files(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        sp.load(Net(), path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        sp.load(Net(), path)
    sp.save(pruned(), path)
    content = path.read_bytes()
    for length in (7, 9, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            sp.load(Net(), path)


def test_int8_scales_must_be_finite(tmp_path):
    path = tmp_path / "a.safetensors"
    sp.save(pruned(), path, value_dtype="int8")
    for bad in (float("nan"), float("inf"), -1.0, 0.0):
        rewrite(path, tensors=lambda t, bad=bad: t["up.weight::scale"].__setitem__(3, bad))
        with pytest.raises(CheckpointError, match="scale"):
            sp.load(Net(), path)
    with pytest.raises(CheckpointError, match="value_dtype"):
        sp.save(pruned(), path, value_dtype="int4")
    model = pruned()
    with torch.no_grad():
        model.up.weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="finite"):
        sp.save(model, path, value_dtype="int8")


def test_every_encoding_refuses_what_does_not_fit():
    torch.manual_seed(0)
    base = torch.randn(32, 64)
    masks = {
        "bitmask": torch.rand(32, 64) < 0.5,
        "delta4": torch.rand(32, 64) < 0.1,
        "delta8": torch.rand(32, 64) < 0.02,
        "bsr": (torch.rand(2, 64) < 0.2).repeat_interleave(16, 0),
        "nm": ops.nm_mask(base, 1, 4),
    }
    wide = torch.zeros(3, 50_000)
    wide[1, [5, 49_999]] = 1.0
    matrices = {name: base * mask for name, mask in masks.items()} | {"csr": wide}
    for name, matrix in matrices.items():
        made = encodings.encode(matrix)
        assert made.encoding == name
        assert torch.equal(encodings.decode(made.spec(), made.tensors), matrix)
        wrong = ({"nnz": made.nnz + 1}, {"shape": [31, 64]}, {"values": "int8"}, {"dtype": "int64"}, {"encoding": "x"})
        for change in wrong:
            with pytest.raises(ValueError):
                encodings.decode({**made.spec(), **change}, made.tensors)
        for part in made.tensors:
            with pytest.raises(ValueError):
                encodings.decode(made.spec(), {**made.tensors, part: made.tensors[part][:-1]})
    made = encodings.encode(wide)
    crow, index = made.tensors["crow"], made.tensors["index"]
    falling = crow.clone()
    falling[2], falling[1] = 0, 2
    beyond = index.view(torch.int16).clone()
    beyond[0] = -1
    twice = index.view(torch.int16).clone()
    twice[1] = twice[0]
    for part in ({"crow": falling}, {"index": beyond.view(torch.uint8)}, {"index": twice.view(torch.uint8)}):
        with pytest.raises(ValueError):
            encodings.decode(made.spec(), {**made.tensors, **part})


def test_odd_matrices_round_trip():
    for shape in ((0, 5), (5, 0), (1, 1), (3, 70_001), (7, 13)):
        for density in (0.0, 0.01, 0.4, 1.0):
            weight = torch.randn(shape) * (torch.rand(shape) < density)
            made = encodings.encode(weight)
            assert torch.equal(encodings.decode(made.spec(), made.tensors), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("values", ["int8", "bfloat16"])
def test_rounding_keeps_every_entry_of_odd_matrices(dtype, values):
    for rows, columns in ((0, 5), (5, 0), (1, 1), (7, 13), (40, 64)):
        weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.3)
        weight[::3] = 0
        weight = weight.to(dtype)
        weight[1:2] *= torch.finfo(dtype).tiny
        made = encodings.encode(weight, values)
        got = encodings.decode(made.spec(), made.tensors)
        assert got.dtype == dtype and torch.equal(got == 0, weight == 0)
        assert encodings.check(made.spec(), made.tensors) == made.nnz
    with pytest.raises(ValueError, match="use value_dtype='float32'"):
        encodings.encode(torch.full((2, 2), 3.4e38), "bfloat16")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # of which the limit would leave a half
    path = tmp_path / "a.safetensors"
    sp.save(pruned(), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            sp.save(pruned(seed=1), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_dense_file_is_of_linears_alone(tmp_path):
    """What convert(dense=True) writes is read by the plain model, strictly, and computes the same."""
    torch.manual_seed(0)
    x = torch.randn(5, 32)
    for kind in ("low rank", "masked"):
        plain = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        model = copy.deepcopy(plain)
        sp.prune_(model, sparsity=0.75)
        if kind == "masked":
            model[0] = sp.MaskedLinear.from_linear(model[0])
        else:
            sp.sparsify_(model, layout="csr")
            model[0].set_low_rank_(torch.randn(2, 32) / 8, torch.randn(32, 2) / 8)
            model.append(model[0])  # the same layer under another name
            plain.append(plain[0])
        sp.save(model, tmp_path / "a.safetensors")
        checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dense=True)
        plain.load_state_dict(load_file(tmp_path / "b.safetensors"))
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)


def test_low_rank_factors_that_do_not_fit_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    sp.prune_(model, sparsity=0.75)
    sp.sparsify_(model, layout="csr")
    model[0].set_low_rank_(torch.randn(2, 32), torch.randn(32, 2))
    sp.save(model, tmp_path / "a.safetensors")
    held = load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = file.metadata()
    for wrong in (torch.zeros(3, 32), torch.zeros(64), torch.zeros(2, 32, dtype=torch.int32)):
        crafted = {**held, "0.low_rank_a": wrong}
        meta["digest"] = digest_of(crafted, meta["structure"])
        save_file(crafted, tmp_path / "b.safetensors", meta)
        with pytest.raises(CheckpointError, match="low_rank_a, low_rank_b expected"):
            checkpoint.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", dense=True)
        with pytest.raises(CheckpointError, match="low_rank_a, low_rank_b expected"):
            checkpoint.describe(tmp_path / "b.safetensors")
        assert not (tmp_path / "c.safetensors").exists()


def test_convert_and_describe(tmp_path):
    model = pruned()
    plain, sparse, back = (tmp_path / f"{name}.safetensors" for name in ("plain", "sparse", "back"))
    save_file(model.state_dict(), plain)
    checkpoint.convert(plain, sparse)
    assert sparse.stat().st_size < plain.stat().st_size
    checkpoint.convert(sparse, back, dense=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_file(back).items())
    assert same_state(sp.load(Net(), sparse), model)
    report = checkpoint.describe(sparse)
    assert report["up"].nnz == int((model.up.weight != 0).sum()) and report["up"].layout == "delta4"
    assert report["up"].sparse_bytes < 0.2 * report["up"].dense_bytes
    assert checkpoint.describe(plain)["up"].layout == "dense"
    with pytest.raises(CheckpointError, match="convert"):
        sp.load(Net(), plain)
