"""Files whose digest is right and whose content is not: one clear error each, before memory is taken for them."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sparseprune as sp
from sparseprune import checkpoint
from sparseprune.checkpoint import CheckpointError
from sparseprune.checkpoint.file import digest


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))
    model.register_buffer("flags", torch.rand(3, 5) < 0.5)
    sp.prune_(model, sparsity=0.9)
    return model.eval()


def sparse() -> nn.Module:
    model = net()
    sp.sparsify_(model, layout="csr")
    model[0].set_low_rank_(torch.randn(2, 32), torch.randn(96, 2))
    return model


def rewrite(path, change=lambda structure, tensors: None, text=None):
    """``change`` is applied to structure and tensors in place; ``text``: the structure as it is to stand there."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    structure = json.loads(metadata["structure"])
    change(structure, tensors)
    metadata["structure"] = json.dumps(structure) if text is None else text(structure)
    metadata["digest"] = digest(tensors, metadata["structure"])
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)


def encoded(**values):
    return lambda s, t: s["encoded"]["0.weight"].update(values)


def how(**values):
    return lambda s, t: s["sparse"]["0"].update(values)


def put(**values):
    return lambda s, t: t.update(values)


STRUCTURES = {
    "an unknown key": lambda s, t: s.update(code=1),
    "an unknown encoding key": encoded(code=1),
    "an unknown way to run": how(code=1),
    "no dictionary of encodings": lambda s, t: s.update(encoded=[]),
    "an encoding that is none": lambda s, t: s["encoded"].update({"0.weight": [1]}),
    "a kind of encoding that is a list": encoded(encoding=["csr"]),
    "a dtype that is a dictionary": encoded(dtype={}),
    "a shape with a fraction": encoded(shape=[96.0, 32]),
    "a shape with a truth value": encoded(shape=[True, 32]),
    "a shape beyond 64 bits": encoded(shape=[2**70, 2**70]),
    "an empty shape": encoded(shape=[0, 2**31 - 1], nnz=0),
    "blocks beyond the matrix": encoded(encoding="bsr", block=[2**62, 1]),
    "blocks of an empty matrix": encoded(encoding="bsr", block=[2**62, 2**62], shape=[0, 0], nnz=0),
    "n over m": encoded(encoding="nm", nm=[5, 4]),
    "m beyond a byte": encoded(encoding="nm", nm=[1, 512]),
    "a count that is text": encoded(nnz="all"),
    "bits of a negative size": lambda s, t: s["encoded"]["flags"].update(shape=[-3, -5]),
    "bits of a huge size": lambda s, t: s["encoded"]["flags"].update(shape=[2**40, 2**40, 0]),
    "bits of many dimensions": lambda s, t: s["encoded"]["flags"].update(shape=[1] * 1000),
    "a tie to a list": lambda s, t: s["ties"].update({"x": ["0.bias"]}),
    "a tie to itself": lambda s, t: s["ties"].update({"x": "x"}),
    "a tie of what is stored": lambda s, t: s["ties"].update({"0.bias": "2.bias"}),
    "a size that is text": lambda s, t: s["linears"].update({"0": "96x32"}),
    "a larger size": lambda s, t: s["linears"].update({"0": [9600, 3200]}),
    "a size of nothing": lambda s, t: s["linears"].update({"0": [0, 0]}),
    "a Linear that is not there, sparse": lambda s, t: (
        s["linears"].update(x=[1, 1]), s["sparse"].update(x=s["sparse"]["0"])
    ),
    "a Linear that is not there, masked": lambda s, t: (s["linears"].update(x=[1, 1]), s["masked"].append("x")),
    "a Linear that is not there, rounded": lambda s, t: (
        s["linears"].update(x=[1, 1]), s.update(rounded={"x": [1, "int8"]})
    ),
    "a masked list": lambda s, t: s["masked"].append([]),
    "masked and sparse": lambda s, t: s["masked"].append("0"),
    "fused by number": lambda s, t: s.update(fused=1),
    "rounded rows that are text": lambda s, t: s.update(rounded={"2": ["1", "int8"]}),
    "rounded to a dtype of nobody": lambda s, t: s.update(rounded={"2": [1, "int4"]}),
    "rounded to a dtype that is a list": lambda s, t: s.update(rounded={"2": [1, ["int8"]]}),
    "rounded rows without their dtype": lambda s, t: s.update(rounded={"2": 1}),
    "a layout of dictionaries": how(layout={}),
    "a value dtype that is a list": how(value_dtype=[]),
    "a value dtype that is a dictionary": how(value_dtype={}),
    "no tokens": how(tokens=[]),
    "tokens beyond a kernel": how(tokens=[10**30]),
    "dense from nowhere": how(dense_from=-1),
    "an activation of nobody": how(own_activation=None),
    "blocks with csr": how(blocksize=[1, 1]),
    "bsr without blocks": how(layout="bsr"),
    "blocks that do not divide": how(layout="bsr", blocksize=[5, 1]),
    "nm that does not fit": how(layout="nm", nm=[2, 5]),
    "a scalar factor": put(**{"0.low_rank_a": torch.tensor(1.0)}),
    "factors that disagree": put(**{"0.low_rank_a": torch.zeros(3, 32)}),
    "one factor": lambda s, t: t.pop("0.low_rank_a"),
    "a factor for a dense layer": put(**{"flags.low_rank_a": torch.zeros(1)}),
    "a factor that is encoded, of a huge rank": lambda s, t: (
        t.pop("0.low_rank_a"), t.pop("0.low_rank_b"),
        [
            (
                s["encoded"].update({f"0.low_rank_{x}": {"encoding": "delta8", "shape": shape, "dtype": "float32", "values": "float32", "nnz": 0}}),  # noqa: E501
                t.update({f"0.low_rank_{x}::index": torch.zeros(0, dtype=torch.uint8), f"0.low_rank_{x}::values": torch.zeros(0)}),  # noqa: E501
            )
            for x, shape in (("a", [2**30, 32]), ("b", [96, 2**30]))
        ],
    ),
    "text where numbers belong": put(**{"0.weight::values": torch.zeros(3, dtype=torch.int64)}),
    "a value too few": lambda s, t: t.update({"0.weight::values": t["0.weight::values"][:-1]}),
    "a value too many": lambda s, t: t.update({"0.weight::values": torch.zeros(len(t["0.weight::values"]) + 1)}),
    "an index of rows": put(**{"0.weight::index": torch.zeros(2, 2, dtype=torch.uint8)}),
    "a part too many": put(**{"0.weight::more": torch.zeros(1)}),
    "plain and encoded": put(**{"0.weight": torch.zeros(96, 32)}),
    "integers for a bias": put(**{"0.bias": torch.zeros(96, dtype=torch.int64)}),
    "complex for a bias": put(**{"0.bias": torch.zeros(96, dtype=torch.complex64)}),
    "numbers for bits": lambda s, t: (
        s["encoded"].pop("flags"), t.pop("flags::index"), t.update(flags=torch.ones(3, 5))
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", STRUCTURES)
def test_a_crafted_file_is_refused_and_the_model_stays(tmp_path, attack):
    path, model = tmp_path / "a.safetensors", net()
    sp.save(sparse(), path)
    rewrite(path, STRUCTURES[attack])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        sp.load(model, path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 1500
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_activation_of_the_layer_comes_back(tmp_path):
    path = tmp_path / "a.safetensors"
    sp.save(sparse(), path)
    rewrite(path, lambda s, t: (s.update(fused=False), s["sparse"]["0"].update(activation="silu", own_activation=True)))
    assert sp.load(net(), path)[0].activation == "silu"


TEXTS = {
    "no JSON": lambda s: "{",
    "nothing": lambda s: "",
    "a list": lambda s: "[]",
    "null": lambda s: "null",
    "deep lists": lambda s: "[" * 100_000 + "]" * 100_000,
    "deep lists inside": lambda s: json.dumps({**s, "ties": {"x": 0}}).replace("0}", "[" * 500 + "]" * 500 + "}"),
    "a number of many digits": lambda s: json.dumps(s).replace('"nnz": ', '"nnz": ' + "9" * 5000),
    "a key twice": lambda s: '{"fused": true, ' + json.dumps(s)[1:],
    "no number": lambda s: json.dumps({**s, "fused": float("nan")}),
    "half a letter": lambda s: json.dumps({**s, "ties": {"\ud800": "\udfff"}}),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_crafted_text_is_refused(tmp_path, text):
    path = tmp_path / "a.safetensors"
    sp.save(sparse(), path)
    rewrite(path, text=TEXTS[text])
    for read in (lambda: sp.load(net(), path), lambda: checkpoint.describe(path)):
        with pytest.raises(CheckpointError, match="structure") as caught:
            read()
        str(caught.value).encode()


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0, 2**64], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0] * 1000, "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0, -1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "OBJECT", "shape": [0], "data_offsets": [0, 0]}},
        {"__metadata__": {"format": 1}},
        {"a": []},
        [],
        b"[" * 100_000,
        b"\xff\xff",
    ],
    ids=str,
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    raw(path, header)
    for read in (lambda: sp.load(net(), path), lambda: checkpoint.describe(path)):
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read()


SMALL = """
import resource, sys, torch
from torch import nn
import sparseprune as sp
from sparseprune import checkpoint
path = sys.argv[1]
model = nn.Sequential(nn.Linear(32, 96))
try:
    sp.load(model, path)  # so that all that is imported late is there
except ValueError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (lambda: sp.load(model, path), lambda: checkpoint.describe(path)):
    try:
        print(read()["0"].nnz)
    except ValueError as error:
        print(type(error).__name__, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_small_file_takes_little_memory_whatever_it_declares(tmp_path):
    path, side = tmp_path / "a.safetensors", 30_000
    spec = {"encoding": "delta8", "shape": [side, side], "dtype": "float32", "values": "float32", "nnz": 0}
    structure = {"encoded": {"0.weight": spec}, "ties": {}, "linears": {"0": [side, side]}, "sparse": {}, "masked": [],
                 "fused": False}  # fmt: skip
    tensors = {
        "0.weight::index": torch.zeros(0, dtype=torch.uint8), "0.weight::values": torch.zeros(0),
        "0.bias": torch.zeros(96),
    }  # fmt: skip
    text = json.dumps(structure)
    metadata = {"format": "sparseprune", "version": "1", "structure": text, "digest": digest(tensors, text)}
    save_file(tensors, path, metadata)
    assert path.stat().st_size < 6000
    run = subprocess.run([sys.executable, "-P", "-c", SMALL, str(path)], check=True, capture_output=True, text=True)
    loaded, described, grown = run.stdout.splitlines()
    assert loaded.startswith("CheckpointError") and "expected up to [96, 32], as in the model" in loaded
    assert described == "0" and int(grown) < 64  # MiB


def test_what_is_no_file_is_named(tmp_path):
    folder, fifo = tmp_path / "folder.safetensors", tmp_path / "fifo.safetensors"
    folder.mkdir()
    os.mkfifo(fifo)
    for path, kind in ((folder, "a folder"), (fifo, "a FIFO"), ("/dev/null", "a device"), ("a\0b", "null")):
        for read in (lambda path=path: sp.load(net(), path), lambda path=path: checkpoint.describe(path)):
            with pytest.raises(CheckpointError, match=kind):
                read()
    (tmp_path / "run.json").write_text("[1, 2]")
    (tmp_path / "empty").touch()
    for path in (tmp_path / "run.json", tmp_path / "empty", __file__):
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            checkpoint.describe(path)
