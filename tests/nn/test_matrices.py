"""Matrices that no Linear holds: experts, convolutions, Conv1D, packed attention. Pruned in their place, run sparse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn.matrices import Experts, PatchLinear, shared_linears, unpack_, unpackable

IDS = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def causal(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.1}  # fmt: skip
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config).eval()
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
    return transformers.Qwen3MoeForCausalLM(config).eval()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.other = nn.MultiheadAttention(16, 4, kdim=8, vdim=12, batch_first=True)

    def forward(self, x):
        x = self.layer(x)
        return self.other(x, x[..., :8], x[..., :12])[0]


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    if isinstance(model, Encoder):
        return model(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))).clone()
    return model(input_ids=IDS).logits.clone()


MODELS = {"encoder": lambda: Encoder().eval(), **{n: lambda n=n: causal(n) for n in ("gpt2", "mixtral", "qwen")}}


@pytest.mark.parametrize("name", MODELS)
def test_they_are_pruned_where_they_are(name, close):
    model = MODELS[name]()
    before, kinds = run(model), {n: type(m) for n, m in model.named_modules()}
    state = {n: v.clone() for n, v in model.state_dict().items()}
    close(run(shared_linears(model)), before)
    report = sp.prune_(model, 0.5)
    assert {n: type(m) for n, m in model.named_modules()} == kinds and list(model.state_dict()) == list(state)
    zeros = sum(int((v == 0).sum()) - int((state[n] == 0).sum()) for n, v in model.state_dict().items())
    total = sum(v.numel() for n, v in state.items() if v.dim() > 1)
    assert report.kept == report.total - round(0.5 * report.total)
    assert report.total - report.kept == zeros and report.total > 0.5 * (total - 2 * 40 * 32)
    for n, value in model.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], state[n][kept]), n
    assert not any("experts" in n or "c_attn" in n or "in_proj" in n for n in (*report.other_weights, *report.skipped))


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_criteria_that_look_at_data_see_them_too(name, criterion):
    model = MODELS[name]()
    kinds = {n: type(m) for n, m in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    text = torch.randint(1, 40, (24, 14), generator=torch.Generator().manual_seed(2))
    report = sp.prune_(model, 0.5, criterion=criterion, data=list(text.split(8)))
    assert report.kept == report.total - round(0.5 * report.total)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    names = [n for n in report.masks if "c_attn" in n or "experts.parts" in n]
    assert len(names) == (2 if name == "gpt2" else 16)
    assert bool(run(model).isfinite().all())


@pytest.mark.parametrize("name", MODELS)
def test_they_run_sparse_train_and_reload(name, close, tmp_path):
    model = MODELS[name]()
    sp.prune_(model, 0.8)
    expected = run(model)
    chosen = sp.sparsify_(model, layout="csr", engine="layers")
    sparse = [n for n, m in model.named_modules() if isinstance(m, sp.SparseLinear)]
    assert len(chosen.converted) == len(sparse) > 3
    close(run(model), expected)
    model.train()
    (model(input_ids=IDS, labels=IDS).loss if name != "encoder" else model(torch.ones(1, 2, 16)).sum()).backward()
    assert any(model.get_submodule(n).values.grad is not None for n in sparse)
    model.eval()
    sp.save(model, tmp_path / "pruned.safetensors")
    again = sp.load(MODELS[name](), tmp_path / "pruned.safetensors")
    close(run(again), expected)
    if name != "encoder":
        model.save_pretrained(tmp_path / "folder")
        loaded, found = type(model).from_pretrained(tmp_path / "folder", output_loading_info=True)
        assert not any(found.values())
        close(run(loaded), expected)
    sp.densify_(again)
    close(run(again), expected)


def test_what_is_not_pruned_is_left_as_it_is():
    model = causal("mixtral")
    sp.prune_(model, 0.5, filter_fn=lambda module, name: "self_attn" in name)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: "self_attn" in name)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 9, 13)), (nn.Conv2d(5, 7, 1), (2, 5, 3, 4)),
        (nn.Conv2d(5, 7, 1, stride=2, bias=False), (2, 5, 7, 4)), (nn.Conv2d(3, 4, (2, 3), stride=(2, 3)), (3, 8, 7)),
        (nn.Conv1d(4, 6, 3, stride=3), (2, 4, 10)), (nn.Conv3d(2, 5, (1, 2, 2), stride=(1, 2, 2)), (2, 2, 3, 4, 6)),
        (nn.Conv2d(3, 8, 4, stride=4, padding="valid"), (1, 3, 8, 8)),
    ],
)  # fmt: skip
def test_convolutions_whose_windows_are_apart_are_matrices(conv, shape, close):
    model = nn.Sequential(conv, nn.ReLU()).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    assert unpack_(model) == ["0"] and isinstance(model[0], PatchLinear)
    found = model(x)
    close(found, expected)
    close(torch.autograd.grad(found.square().sum(), x)[0], gradient)
    assert torch.equal(model[0].weight, conv.weight) and model[0].weight.data_ptr() != conv.weight.data_ptr()
    sp.prune_(model, 0.5)
    expected = model(x)
    sp.sparsify_(model, layout="csr")
    assert isinstance(model[0].linear, sp.SparseLinear)
    close(model(x), expected)


def test_other_convolutions_and_experts_stay(close):
    for conv in (nn.Conv2d(3, 3, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(3, 3, 2, stride=2, padding=1),
                 nn.Conv2d(3, 3, 2, stride=2, dilation=2)):  # fmt: skip
        assert unpackable(conv, convolutions=True) is None
    experts = causal("mixtral").model.layers[0].mlp.experts
    assert unpackable(experts) is Experts
    odd = copy.deepcopy(experts)
    odd.act_fn, odd._apply_gate = nn.Identity(), lambda both: both.chunk(2, dim=-1)[0]
    assert unpackable(odd) is None or not hasattr(type(experts), "_apply_gate")
    turned = nn.Module()
    turned.act_fn = nn.SiLU()
    turned.gate_up_proj, turned.down_proj = nn.Parameter(torch.ones(2, 8, 12)), nn.Parameter(torch.ones(2, 6, 8))
    assert unpackable(turned) is None


def test_a_vision_model_saves_its_patches_as_a_linear(close, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=12, patch_size=4
    )
    model = transformers.ViTModel(config).eval()
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert unpack_(model) == ["embeddings.patch_embeddings.projection"]
        sp.prune_(model, 0.8)
        expected = model(images).last_hidden_state
        sp.sparsify_(model, layout="csr", engine="layers")
        close(model(images).last_hidden_state, expected)
        model.save_pretrained(tmp_path)
        again, found = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(found.values())
        assert isinstance(again.embeddings.patch_embeddings.projection.linear, sp.SparseLinear)
        close(again(images).last_hidden_state, expected)
        sp.save(model, tmp_path / "own.safetensors")
        torch.manual_seed(0)
        fresh = sp.load(transformers.ViTModel(config).eval(), tmp_path / "own.safetensors")
        close(fresh(images).last_hidden_state, expected)


def test_a_load_that_fails_leaves_them(tmp_path):
    model = causal("mixtral")
    sp.prune_(model, 0.8)
    sp.sparsify_(model, layout="csr")
    model.model.norm = nn.LayerNorm(32)
    sp.save(model, tmp_path / "other.safetensors")
    target = causal("mixtral")
    with pytest.raises(ValueError, match="norm"):
        sp.load(target, tmp_path / "other.safetensors")
    assert type(target.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    target.save_pretrained(tmp_path / "still")
