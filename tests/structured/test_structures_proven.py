"""A cut is kept only where it changes nothing: else the block is as it was, and the report says why."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseprune as sp
from sparseprune.pruning import Heads, Neurons, attention_blocks, feed_forwards, prune_, shrink_
from sparseprune.structured.whole import WholeModel


class Own(nn.Module):
    """An attention as one writes it: its names are known, what its forward does is not."""

    def __init__(self, scale="head", reshape=-1, dim=32, heads=4):
        super().__init__()
        self.n_heads, self.scale, self.reshape = heads, scale, reshape
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, bias=None):
        b, t, c = x.shape
        q, k, v = (p(x).view(b, t, self.n_heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        width = q.shape[-1] if self.scale == "head" else c // self.n_heads
        scores = q @ k.transpose(-1, -2) / math.sqrt(width)
        mixed = (scores if bias is None else scores + bias).softmax(-1) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(b, t, self.reshape))


class FeedForward(nn.Module):
    """The usual names, and something over all neurons between them."""

    def __init__(self, between=torch.relu):
        super().__init__()
        self.fc1, self.fc2, self.between = nn.Linear(32, 48), nn.Linear(48, 32), between

    def forward(self, x):
        return x + self.fc2(self.between(self.fc1(x)))


class Interleaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(32, 96), nn.Linear(48, 32)

    def forward(self, x):
        both = self.gate_up_proj(x)
        return x + self.down_proj(F.silu(both[..., ::2]) * both[..., 1::2])


BLOCKS = {
    "a scale from the input's width": (lambda: Own("input"), "an output that differs by"),
    "a shape from the input's width": (lambda: Own(reshape=32), "RuntimeError: shape"),
    "a norm without a gain": (lambda: FeedForward(lambda y: F.layer_norm(y, y.shape[-1:])), "an output that differs"),
    "a softmax": (lambda: FeedForward(lambda y: y.softmax(-1)), "an output that differs"),
    "gate and up in turns": (Interleaved, "an output that differs"),
}


@pytest.mark.parametrize("weights", [1.0, 0.01], ids=["large", "small"])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_that_does_otherwise_than_its_names_say_is_left(name, weights):
    make, why = BLOCKS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), make(), nn.Linear(32, 4)).eval()
    for parameter in model.parameters():
        parameter.mul_(3 * weights)
    prune_(model, 0.5, granularity=Heads() if "input" in name else Neurons(), filter_fn=lambda m, f: f.startswith("1"))
    x = torch.randn(4, 6, 8)
    before, state, held = model(x), copy.deepcopy(model.state_dict()), list(model.parameters())
    report = shrink_(model)
    assert not report.heads and not report.neurons and report.parameters_before == report.parameters_after
    assert "does not follow" in report.left["1"] and why in report.left["1"]
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_blocks_of_ones_own_that_follow_are_cut(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 32), Own(), FeedForward(), nn.Linear(32, 4)).to(dtype).eval()
    prune_(model, 0.5, granularity={"1.*": Heads(), "2.*": Neurons()})
    ids = torch.randint(0, 9, (4, 6))
    before, (model[1].training, seed) = model(ids), (True, torch.random.get_rng_state())
    report = shrink_(model)
    assert report.heads == {"1": (4, 2)} and report.neurons == {"2": (48, 24)} and not report.left
    torch.testing.assert_close(model(ids), before, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert [module.training for module in model] == [False, True, False, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Biased(nn.Module):
    """An attention of the second kind is handed something for each of four heads, as nothing but the whole shows."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(9, 32), Own(), Own()
        self.slopes = nn.Parameter(torch.ones(4))

    def forward(self, ids):
        x = self.first(self.embed(ids))
        return self.second(x, self.slopes[:, None, None] * torch.arange(float(ids.shape[1])))


@torch.no_grad()
def test_what_a_block_is_handed_shows_in_the_whole_model_and_the_others_are_cut(close):
    torch.manual_seed(0)
    model = Biased().eval()
    prune_(model, 0.5, granularity=Heads(), scope="layer")
    ids = torch.randint(0, 9, (4, 6))
    before, held = model(ids), dict(model.second.named_parameters())
    report = shrink_(model)
    assert report.heads == {"first": (4, 2)} and set(report.left) == {"second"}
    assert "got RuntimeError: The size of tensor a (2) must match" in report.left["second"]
    assert all(held[name] is parameter for name, parameter in model.second.named_parameters())
    assert model.second.n_heads == 4 and model.second.q_proj.out_features == 32
    close(model(ids), before)


@torch.no_grad()
def test_a_block_that_cannot_be_tried_is_left(close):
    class Wants(Own):
        def forward(self, x, options):
            return super().forward(x * options.factor)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Wants()

        def forward(self, x, *, options):
            return self.attention(x, options)

    model = Model()
    prune_(model, 0.5, granularity=Heads())
    report = shrink_(model)
    assert not report.heads and "cannot be tried: expected attention to run on hidden" in report.left["attention"]


SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CODER = {
    **SIZES, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
}  # fmt: skip
PLAIN = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**{k: v for k, v in PLAIN.items() if k not in SIZES}, "image_size": 16, "patch_size": 4}
FEW = {"max_position_embeddings": 64}


def of(name, **options):
    import transformers

    config = name
    for end in ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "LMHeadModel", "Model"):
        config = config.removesuffix(end)
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def outputs(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (2, 8), generator=generator)
    if model.main_input_name == "pixel_values":
        return model(torch.randn(2, 3, 16, 16, generator=generator))[0]
    given = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
    if "TrOCR" in type(model).__name__:
        given["encoder_hidden_states"] = torch.randn(2, 5, 32, generator=generator)
    return model(input_ids=ids, **given)[0]


LEFT = {
    "xglm": lambda: of("XGLMForCausalLM", **SIZES, **FEW, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4),
    "trocr": lambda: of(
        "TrOCRForCausalLM", **SIZES, **FEW, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48,
        cross_attention_hidden_size=32,
    ),
    "mvp": lambda: of("MvpModel", **CODER, **FEW),
    "led": lambda: of(
        "LEDModel", **CODER, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4
    ),
    "pegasus-x": lambda: of("PegasusXModel", **CODER, **FEW, block_size=4, num_global_tokens=2),
    "fsmt": lambda: of(
        "FSMTModel", **{k: v for k, v in CODER.items() if k != "vocab_size"}, **FEW, langs=["en", "de"],
        src_vocab_size=64, tgt_vocab_size=64,
    ),
    "groupvit": lambda: of("GroupViTTextModel", **PLAIN, **FEW),
    "beit": lambda: of("BeitModel", **IMAGES, use_relative_position_bias=True),
    "beit, shared": lambda: of("BeitModel", **IMAGES, use_shared_relative_position_bias=True),
    "data2vec": lambda: of("Data2VecVisionModel", **IMAGES, use_shared_relative_position_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_architectures_that_cannot_lose_heads_run_as_before(name, close):
    model = LEFT[name]()
    prune_(model, 0.5, granularity=Heads(), scope="layer")
    before = outputs(model)
    report = shrink_(model)
    assert report.left and len(report.heads) == (2 if name == "pegasus-x" else 0)
    assert any("does not follow" in why for why in report.left.values())
    close(outputs(model), before)


TRIED = {
    "bert": lambda: of("BertForMaskedLM", **PLAIN),
    "roberta": lambda: of("RobertaModel", **PLAIN),
    "distilbert": lambda: of("DistilBertModel", vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "llama": lambda: of("LlamaForCausalLM", **PLAIN, num_key_value_heads=2),
    "mistral": lambda: of("MistralForCausalLM", **PLAIN, num_key_value_heads=2, sliding_window=4),
    "qwen2": lambda: of("Qwen2ForCausalLM", **PLAIN, num_key_value_heads=2),
    "gpt2": lambda: of("GPT2LMHeadModel", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "t5": lambda: of(
        "T5ForConditionalGeneration", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    ),
    "bart": lambda: of("BartForConditionalGeneration", **CODER),
    "whisper": lambda: of(
        "WhisperForConditionalGeneration", **CODER, num_mel_bins=8, max_source_positions=20, max_target_positions=32
    ),
    "vit": lambda: of("ViTModel", **IMAGES),
    "opt": lambda: of("OPTForCausalLM", **{**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIED)
def test_the_whole_of_a_plain_model_is_run_and_all_its_blocks_are_cut(name):
    model = TRIED[name]()
    sp.expose_linears_(model)
    attentions, forwards = attention_blocks(model)[0], feed_forwards(model)[0]
    outermost = {block.shares[-1].layer for block in (*attentions, *forwards)}
    assert WholeModel(model, outermost).reached == outermost
    prune_(model, 0.5, granularity=Heads(), scope="layer")
    prune_(model, 0.5, granularity=Neurons(), scope="layer")
    report = shrink_(model)
    assert not report.left and len(report.heads) == len(attentions) and len(report.neurons) == len(forwards)
    assert all(b < a for a, b in (*report.heads.values(), *report.neurons.values()))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("way", ["cut", "loaded"])
def test_a_model_built_from_the_same_configuration_keeps_its_own(name, way, tmp_path, close):
    student = of(name, **PLAIN, num_key_value_heads=2, tie_word_embeddings=False)
    teacher = type(student)(student.config).eval()
    outer = {"shrunken": student, "of it": student.model, "layer": student.model.layers[0].self_attn}
    assert all(module.config is teacher.config for module in outer.values())
    before, said = outputs(teacher), copy.deepcopy(teacher.config.to_dict())
    prune_(student, 0.5, granularity={"*attn*": Heads(), "*mlp*": Neurons()}, scope="layer")
    if way == "cut":
        shrink_(student)
    else:
        other = copy.deepcopy(student)
        shrink_(other)
        sp.save(other, tmp_path / "m.safetensors")
        sp.load(student, tmp_path / "m.safetensors")
    assert teacher.config.to_dict() == said
    assert student.config.num_attention_heads == 2 and student.config.intermediate_size == 24
    assert all(module.config is student.config for module in outer.values())
    close(outputs(teacher), before)
    teacher.save_pretrained(tmp_path / "teacher")
    close(outputs(type(teacher).from_pretrained(tmp_path / "teacher").eval()), before)


@torch.no_grad()
def test_a_part_of_a_configuration_stays_its_part():
    text, vision = {**PLAIN, **FEW}, {**IMAGES}
    model = of("CLIPModel", text_config=text, vision_config=vision, projection_dim=16)
    shared = model.config
    prune_(model, 0.5, granularity=Neurons(), scope="layer")
    report = shrink_(model)
    assert len(report.neurons) == 4 and model.config is not shared and shared.text_config.intermediate_size == 48
    assert model.text_model.config is model.config.text_config
    assert model.vision_model.config is model.config.vision_config
