"""Models that peft has wrapped: adapters stay, and merging into a sparse layer is refused instead of lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn.filters import select_linears

peft = pytest.importorskip("peft")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.value, self.dense, self.classifier = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return self.classifier(torch.relu(self.dense(self.query(x) + self.value(x))))


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]),
    "lora of the head": lambda: peft.LoraConfig(r=2, target_modules=["query", "classifier"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["query", "value"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["query", "dense"], feedforward_modules=["dense"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["query"]),
}


def wrapped(kind):
    model = peft.get_peft_model(Model(), CONFIGS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "ia3" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_models_own_layers_are_pruned_and_adapters_and_head_stay(kind):
    model = wrapped(kind)
    selection = select_linears(model)
    names = [fqn.removeprefix("base_model.model.").removesuffix(".base_layer") for fqn in selection.selected]
    assert names == ["query", "value", "dense"]
    for fqn, why in selection.skipped.items():
        if "lora_" in fqn:
            assert "part of a peft adapter" in why
        else:
            assert "classifier" in fqn and ("head" in why or "does not run" in why)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n or "ia3" in n or "hada" in n}
    report = sp.prune_(model, 0.9)
    assert report.kept == 768 - round(0.9 * 768)
    sp.sparsify_(model, layout="csr")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert not any(isinstance(m, sp.SparseLinear) for n, m in model.named_modules() if "lora_" in n)


def test_a_filter_may_choose_adapters_all_the_same():
    assert list(select_linears(wrapped("lora"), lambda module, fqn: "lora_A" in fqn).selected) == [
        "base_model.model.query.lora_A.default", "base_model.model.value.lora_A.default",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_a_sparse_layer_is_refused_and_works_once_dense(kind, safe):
    model = wrapped(kind).eval()
    sp.prune_(model, 0.9)
    sp.sparsify_(model, layout="csr", fuse=False)
    x = torch.randn(5, 16)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"expected to be read, got a write.*densify_\(model\)"):
        model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(model(x), expected)
    sp.densify_(model)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=safe)(x), expected, rtol=1e-4, atol=1e-5)
