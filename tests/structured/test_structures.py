from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseprune.nn import MaskedLinear
from sparseprune.pruning import Heads, Neurons, attention_blocks, feed_forwards, prune_, restore_shapes, shrink_
from sparseprune.runner.text_encoder import TextEncoder


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=24, hidden_dim=32, n_layers=2, n_heads=4, max_position_embeddings=16)
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bart():
    from transformers import BartConfig, BartModel

    return BartModel(
        BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4
        )
    )


def encoder():
    return TextEncoder(40, 3, hidden=16, ffn=24, layers=2, heads=4)


MODELS = {"encoder": encoder, "bert": bert, "distilbert": distilbert, "llama": llama, "bart": bart, "vit": vit}


def outputs(model):
    torch.manual_seed(1)
    ids = torch.randn(2, 3, 8, 8) if "ViT" in type(model).__name__ else torch.randint(1, 40, (2, 7))
    with torch.no_grad():
        out = model(ids)
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.fixture(params=MODELS)
def make(request):
    def build():
        torch.manual_seed(0)
        return MODELS[request.param]().eval()

    return build


def test_blocks_are_found(make):
    model = make()
    attentions, reasons = attention_blocks(model)
    assert len(attentions) in (2, 3) and not reasons
    assert all(block.units == 4 for block in attentions)
    forwards, reasons = feed_forwards(model)
    assert len(forwards) == 2 and not reasons


@pytest.mark.parametrize("granularity", [Heads(), Neurons(), Neurons(per_axis=True)], ids=str)
def test_shrinking_changes_no_output_and_reloads(make, granularity, close, tmp_path):
    model = make()
    report = prune_(model, 0.5, granularity=granularity)
    before, names = outputs(model), list(model.state_dict())
    shrunk = shrink_(model)
    close(outputs(model), before)
    assert shrunk.parameters_after < shrunk.parameters_before
    assert list(model.state_dict()) == names and report.density == pytest.approx(0.5, abs=0.02)
    units = shrunk.heads if isinstance(granularity, Heads) else shrunk.neurons
    assert any(b < a for a, b in units.values())
    assert "->" in str(shrunk)

    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")
    shapes = {fqn: tuple(state[f"{fqn}.weight"].shape) for fqn, m in model.named_modules() if isinstance(m, nn.Linear)}
    fresh = make()
    assert restore_shapes(fresh, shapes)
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh), outputs(model))
    assert torch.equal(outputs(copy.deepcopy(fresh)), outputs(model))
    again, total = shrink_(fresh), shrunk.parameters_after
    assert again.parameters_after == again.parameters_before == total


def test_a_shrunken_model_trains():
    model = bert()
    prune_(model, 0.5, granularity={"*attention*": Heads(), "*": Neurons()}, filter_fn=lambda m, f: "encoder" in f)
    shrink_(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids, labels = torch.randint(1, 40, (8, 7)), torch.arange(8) % 3
    losses = []
    for _ in range(8):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_masks_are_cut_with_their_weights(close):
    model = llama().eval()
    prune_(model, 0.5, granularity=Neurons())
    prune_(model, 0.5, granularity=Heads())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, MaskedLinear.from_linear(module))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] = 0  # pruned, yet no unit: its mask says so
        model.model.layers[0].mlp.down_proj.mask[0] = False
        before = model(ids).logits
        shrunk = shrink_(model)
        close(model(ids).logits, before)
    assert shrunk.parameters_after < shrunk.parameters_before
    assert not model.model.layers[0].mlp.down_proj.mask[0].any() and model.model.layers[0].mlp.down_proj.mask[1].any()

    again = llama().eval()
    for name, module in list(again.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            again.set_submodule(name, MaskedLinear.from_linear(module))
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, MaskedLinear)}
    assert restore_shapes(again, shapes)
    assert all(m.mask.shape == m.weight.shape for m in again.modules() if isinstance(m, MaskedLinear))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        close(again(ids).logits, before)


def test_one_unit_of_each_block_stays(close):
    torch.manual_seed(0)
    model = encoder().eval()
    prune_(model, 1.0, granularity={"layers.0.*": Heads(), "layers.1.ffn.*": Neurons()})
    before = outputs(model)
    report = shrink_(model)
    assert report.heads["layers.0"] == (4, 1) and report.neurons["layers.1.ffn"] == (24, 1)
    close(outputs(model), before)


def test_trim_rescales_the_survivors_once():
    torch.manual_seed(0)
    plain, trimmed = encoder(), encoder()
    trimmed.load_state_dict(plain.state_dict())
    prune_(plain, 0.5, granularity=Neurons())
    prune_(trimmed, 0.75, granularity=Neurons(trim_rescale=True))
    kept = trimmed.layers[0].ffn.expand.weight != 0
    ratio = trimmed.layers[0].ffn.expand.weight[kept] / plain.layers[0].ffn.expand.weight[kept]
    assert ratio.tolist() == pytest.approx([0.5 / 0.75] * len(ratio))


def test_what_cannot_be_cut_has_a_reason():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert "packs query, key and value" in attention_blocks(layer)[1]["self_attn"]

    class Odd(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.query, self.key, self.value, self.output = (nn.Linear(8, 8) for _ in range(4))
            if heads:
                self.num_heads = heads

    assert "number of heads is not known" in attention_blocks(Odd(0))[1][""]
    assert "number of heads is not known" in attention_blocks(Odd(3))[1][""]
    biased = nn.ModuleDict({"attention": Odd(2), "relative_attention_bias": nn.Embedding(4, 3)})
    assert "position bias" in attention_blocks(biased)[1]["attention"]

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    assert "LayerNorm runs over the neurons" in feed_forwards(Normed())[1][""]


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"nowhere": (4, 4)}, "is no Linear of TextEncoder"),
        ({"layers.0.query": (8, 16)}, "expected whole heads of 4 that agree"),
        ({"layers.0.query": (6, 16), "layers.0.key": (6, 16)}, "expected whole heads"),
        ({"layers.0.ffn.expand": (8, 16)}, "expected to agree"),
        ({"classifier": (4, 16)}, "belongs to no block"),
        ({"layers.0.query": (0, 16)}, "expected \\(out_features, in_features\\)"),
    ],
)
def test_restoring_refuses_what_does_not_fit(shapes, message):
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        restore_shapes(model, shapes)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
