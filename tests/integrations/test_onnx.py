"""Models for ONNX Runtime: what is written answers as torch, and what does not is no file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sparseprune as sp

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from sparseprune.integrations.onnx import export_onnx  # noqa: E402

IDS = torch.arange(10).view(2, 5)


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(10, 16), nn.Linear(16, 16)
        sp.prune_(self, 0.5, filter_fn=lambda module, fqn: True)

    def forward(self, input_ids):
        return self.linear(self.embedding(input_ids))


class Session:
    """An ONNX Runtime whose first answer of a call has this in its first place."""

    value = 0.0

    def __init__(self, *args, **kwargs) -> None:
        self._session = onnxruntime._own(*args, **kwargs)

    def run(self, *args):
        (got,) = self._session.run(*args)
        got = got.copy()
        got.reshape(-1)[0] = self.value
        return [got]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_written_answers_as_torch(dtype, tmp_path):
    model = Scorer().to(dtype)
    sp.sparsify_(model, layout="csr")
    assert export_onnx(model, tmp_path / "model.onnx", {"input_ids": IDS}) < 1e-3
    assert isinstance(model.linear, sp.SparseLinear) and model.linear.values.dtype == dtype
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for ids in (IDS, IDS[:1, :1], IDS.repeat(2, 3)):
        (got,) = session.run(None, {"input_ids": ids.numpy()})
        expected = model(ids).detach()
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_an_answer_that_torch_does_not_give_is_no_file(value, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "_own", onnxruntime.InferenceSession, raising=False)
    monkeypatch.setattr(Session, "value", value)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(RuntimeError, match=r"expected to answer as torch within .* nothing was written"):
        export_onnx(Scorer(), tmp_path / "model.onnx", {"input_ids": IDS})
    assert not list(tmp_path.iterdir())


def test_a_nan_of_the_model_hides_no_difference(tmp_path, monkeypatch):
    """The comparison of the other entries goes on."""
    model = Scorer()
    with torch.no_grad():
        model.linear.weight[-1] = float("nan")
    assert export_onnx(model, tmp_path / "model.onnx", {"input_ids": IDS}) < 1e-3
    (tmp_path / "model.onnx").unlink()
    monkeypatch.setattr(onnxruntime, "_own", onnxruntime.InferenceSession, raising=False)
    monkeypatch.setattr(Session, "value", 5.0)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(RuntimeError, match="off by up to"):
        export_onnx(model, tmp_path / "model.onnx", {"input_ids": IDS})
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_the_runtime_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"float32 or float16, got a model in bfloat16; call model\.float\(\)"):
        export_onnx(Scorer().bfloat16(), tmp_path / "model.onnx", {"input_ids": IDS})
    assert not list(tmp_path.iterdir())


def test_differences_that_are_no_numbers():
    from sparseprune.integrations.onnx import _difference

    nan, inf = float("nan"), float("inf")
    one = np.array([1.0, nan, inf, -inf], np.float32)
    assert _difference(one, one.copy()) == (0.0, 1.0)
    assert _difference(np.ones(4, np.float32), one)[0] == inf
    assert _difference(one, one[:2])[0] == inf
    assert _difference(one[1:], one[1:]) == (0.0, 0.0)
