"""Heads and neurons of further architectures: packed projections, shared position biases, weights that are no Linear.

Random tiny models of transformers and torch: silenced units, cut units and reloaded units must compute the same.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.checkpoint import CheckpointError
from sparseprune.nn import Attention, expose_linears_
from sparseprune.pruning import Heads, Neurons, attention_blocks, feed_forwards, prune_, shrink_

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def of(name, **options):
    import transformers

    config = getattr(transformers, f"{name.rstrip('*')}Config")
    model = getattr(transformers, f"{name.rstrip('*')}Model")
    return model(config(**{**SIZES, **options}))


def t5(**options):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 40, "d_model": 24, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_heads": 6,
             "relative_attention_num_buckets": 8, "decoder_start_token_id": 0}  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**{**sizes, **options}))
    for module in model.modules():  # the initial bias is too small to show a wrong column
        if isinstance(module, nn.Embedding) and module.embedding_dim == sizes["num_heads"]:
            nn.init.normal_(module.weight, std=2.0)
    return model


def umt5():
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    return UMT5ForConditionalGeneration(
        UMT5Config(vocab_size=40, d_model=24, d_kv=5, d_ff=36, num_layers=2, num_heads=6, decoder_start_token_id=0)
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=8))
    expose_linears_(model)
    return model


def packed_encoder(norm_first=False, **options):
    layer = nn.TransformerEncoderLayer(32, 8, 48, batch_first=True, norm_first=norm_first, **options)
    return nn.Sequential(nn.Embedding(40, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))


def torch_encoder(**options):
    model = packed_encoder(**options)
    for parameter in model.parameters():  # not the same weights in both layers
        nn.init.normal_(parameter, std=0.2)
    expose_linears_(model)
    return model


class Timm(nn.Module):
    """Attention as in the vision transformers of timm."""

    def __init__(self, dim=32, heads=8):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, -1))


class ByHead(Timm):
    """The same names, but query, key and value of one head lie together."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, -1))


class Rigid(Timm):
    """The width of a head follows from the input's: cannot be cut."""

    def forward(self, x):
        b, n, d = x.shape
        packed = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(x)))


def timm(kind=Timm):
    return nn.Sequential(nn.Embedding(40, 32), kind(), Mlp(), kind(), Mlp())


MODELS = {
    "gpt2": gpt2,
    "neox": lambda: of("GPTNeoX"),
    "persimmon": lambda: of("Persimmon", num_key_value_heads=8),
    "phi3": lambda: of("Phi3", num_key_value_heads=4),
    "qwen3": lambda: of("Qwen3", num_key_value_heads=4, head_dim=6),
    "modernbert": lambda: of("ModernBert", global_attn_every_n_layers=1, cls_token_id=1, sep_token_id=2),
    "mpnet": lambda: of("MPNet", pad_token_id=1, max_position_embeddings=24),
    "t5": t5,
    "t5 gated": lambda: t5(feed_forward_proj="gated-gelu"),
    "umt5": umt5,
    "torch": torch_encoder,
    "torch, no bias, norm first": lambda: torch_encoder(bias=False, norm_first=True),
    "timm": timm,
    "by head": lambda: timm(ByHead),
}


def built(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@torch.no_grad()
def outputs(model):
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, decoder_input_ids=ids.flip(0)) if hasattr(model, "decoder") else model(ids)
    return next((getattr(out, key) for key in ("logits", "last_hidden_state") if hasattr(out, key)), out)


def fresh(name):
    """The original architecture with other weights, as a user would have it: not unpacked."""
    torch.manual_seed(7)
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=8)).eval()
    if name.startswith("torch"):
        return packed_encoder(**({"bias": False, "norm_first": True} if "," in name else {})).eval()
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", [Heads(), Neurons()], ids=str)
def test_cut_and_reloaded_models_compute_the_same(name, scope, granularity, close, tmp_path):
    model = built(name)
    if isinstance(granularity, Neurons) and not feed_forwards(model)[0]:
        pytest.fail("no feed-forward block found")
    dense = outputs(model)
    report = prune_(model, 0.6, granularity=granularity, scope="layer" if name == "phi3" else scope)
    masked, names = outputs(model), list(model.state_dict())
    assert not torch.allclose(masked, dense, atol=1e-4)
    shrunk = shrink_(model)
    close(outputs(model), masked)
    assert list(model.state_dict()) == names and not shrunk.left
    units = shrunk.heads if isinstance(granularity, Heads) else shrunk.neurons
    if scope == "layer":
        assert all(after < before for before, after in units.values())
    assert sum(b - a for b, a in units.values()) > 0
    # What the masks removed is really gone: weights that are pruned, and no more (one unit of a block may stay).
    assert shrunk.parameters_after <= shrunk.parameters_before - 0.7 * (report.total - report.kept)

    sp.save(model, tmp_path / "model.safetensors")
    again = sp.load(fresh(name), tmp_path / "model.safetensors")
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(outputs(pickle.loads(pickle.dumps(again))), outputs(model))
    with pytest.raises(CheckpointError):
        sp.load(sp.load(built("neox"), tmp_path / "model.safetensors") if name != "neox" else built("qwen3"),
                tmp_path / "model.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_agrees_or_the_folder_says_the_sizes(name, close, tmp_path):
    """scope="layer" keeps as many units everywhere, which some configurations can describe."""
    model = built(name)
    if not hasattr(model, "save_pretrained"):
        pytest.skip("no transformers model")
    prune_(model, 0.5, granularity=Neurons(), scope="layer")
    shrunk = shrink_(model)
    assert bool(shrunk.unconfigured) == (name == "gpt2")  # whose Conv1D have become Linears
    model.save_pretrained(tmp_path / "neurons")
    close(outputs(type(model).from_pretrained(tmp_path / "neurons").eval()), outputs(model))

    prune_(model, 0.5, granularity=Heads(), scope="layer")
    shrunk = shrink_(model)
    if name in ("phi3", "qwen3", "t5", "t5 gated", "umt5"):
        assert not shrunk.unconfigured and ("head_dim" in model.config.to_dict()) == ("t5" not in name)
        model.save_pretrained(tmp_path / "heads")
        close(outputs(type(model).from_pretrained(tmp_path / "heads").eval()), outputs(model))
    else:  # the width of a head follows from the number of heads
        assert "cannot describe" in shrunk.unconfigured and shrunk.unconfigured in str(shrunk)
        pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "heads")
        assert "quantization_config" in (tmp_path / "heads" / "config.json").read_text()
        close(outputs(type(model).from_pretrained(tmp_path / "heads").eval()), outputs(model))


def test_layers_of_unlike_size_have_no_configuration(tmp_path, close):
    model = built("qwen3")
    prune_(model, 0.5, granularity={"layers.0.mlp*": Neurons()})
    before = copy.deepcopy(model.config.to_dict())
    shrunk = shrink_(model)
    assert "unlike numbers of neurons: [24, 48] of 48" in shrunk.unconfigured
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    close(outputs(type(model).from_pretrained(tmp_path).eval()), outputs(model))


def test_heads_of_one_position_bias_go_together():
    model = built("t5")
    prune_(model, 0.5, granularity=Heads(), filter_fn=lambda m, f: "Attention" in f)
    shrunk = shrink_(model)
    stacks = {}
    for name, (_, left) in shrunk.heads.items():
        stacks.setdefault((name.split(".")[0], name.rpartition(".")[2]), set()).add(left)
    assert set(map(len, stacks.values())) == {1} and len(stacks) == 3
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert bias.weight.shape == (8, bias.embedding_dim) and bias.embedding_dim == shrunk.heads[
        "encoder.block.1.layer.0.SelfAttention"
    ][1]  # fmt: skip


def test_a_head_that_one_layer_uses_stays_in_all_that_share_its_bias(close):
    model = built("t5")
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.o.weight[:, :10] = 0
        model.encoder.block[1].layer[0].SelfAttention.o.weight[:, 5:15] = 0
    before = outputs(model)
    shrunk = shrink_(model)
    assert shrunk.heads["encoder.block.0.layer.0.SelfAttention"] == (6, 5)
    assert shrunk.heads["encoder.block.1.layer.0.SelfAttention"] == (6, 5)
    close(outputs(model), before)


def test_generation_goes_on_after_cutting():
    model = built("t5")
    prune_(model, 0.5, granularity=Heads(), scope="layer")
    ids = torch.randint(3, 40, (1, 5), generator=torch.Generator().manual_seed(3))
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    shrink_(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)


def test_a_configuration_read_at_every_call_wants_layers_alike():
    model = built("phi3")
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight[:, :8] = 0
    shrunk = shrink_(model)
    assert "expected as many in each, got 3, 4; prune with scope='layer'" in shrunk.left["layers.0.self_attn"]
    assert outputs(model).shape == (2, 7, 32)


def test_a_configuration_read_at_every_call_is_set_though_it_cannot_describe_all(close):
    model = built("phi3")
    prune_(model, 0.5, granularity={"*attn*": Heads(), "layers.0.mlp*": Neurons()}, scope="layer")
    before = outputs(model)
    assert "unlike numbers of neurons" in shrink_(model).unconfigured
    close(outputs(model), before)


def test_unpacking_changes_no_output(close):
    packed = fresh("gpt2")
    before = outputs(packed)
    assert expose_linears_(packed)[0] == "transformer.h.0.attn.c_attn"
    close(outputs(packed), before)
    packed = fresh("torch")
    before = outputs(packed)
    expose_linears_(packed)
    close(outputs(packed), before)


def test_what_cannot_be_cut_names_the_remedy():
    import transformers

    model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=8))
    assert "expose_linears_(model)" in attention_blocks(model)[1]["h.0.attn"]
    assert "expose_linears_(model)" in feed_forwards(model)[1]["h.0.mlp"]
    bloom = transformers.BloomModel(transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4))
    assert "alibi" in attention_blocks(bloom)[1]["h.0.self_attention"]
    assert "does not follow" in attention_blocks(Rigid())[1][""]
    assert len(attention_blocks(Timm())[0]) == len(attention_blocks(ByHead())[0]) == 1
    swin = transformers.SwinModel(
        transformers.SwinConfig(image_size=8, patch_size=2, embed_dim=12, depths=[1], num_heads=[3], window_size=2)
    )
    blocks, reasons = attention_blocks(swin)
    assert not blocks and reasons
    assert all("may hold something for each of the 3 heads" in why for why in reasons.values())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_unpacked_attention_is_the_packed_one(batch_first, weights, close):
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(24, 4, kdim=10, vdim=14, batch_first=batch_first)
    ours = Attention(packed)
    q, k, v = torch.randn(3, 5, 24), torch.randn(3, 6, 10), torch.randn(3, 6, 14)
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for mask in (None, torch.randn(5, 6), torch.randn(12, 5, 6), torch.ones(5, 6, dtype=torch.bool).triu(3)):
        added = None if mask is None or mask.dtype == torch.bool else padding.float() * -1e9
        for pad in (None, padding if added is None else added):
            options = {"attn_mask": mask, "key_padding_mask": pad, "need_weights": weights}
            (a, wa), (b, wb) = packed(q, k, v, **options), ours(q, k, v, **options)
            close(b, a)
            assert (wa is None) == (wb is None)
            if wa is not None:
                close(wb, wa)
                apart = {**options, "average_attn_weights": False}
                close(ours(q, k, v, **apart)[1], packed(q, k, v, **apart)[1])
    one = (q[0], k[0], v[0]) if batch_first else (q[:, 0], k[:, 0], v[:, 0])
    close(ours(*one)[0], packed(*one)[0])
    (ours(q, k, v)[0].square().sum()).backward()
    (packed(q, k, v)[0].square().sum()).backward()
    close(ours.k_proj.weight.grad, packed.k_proj_weight.grad)
    with pytest.raises(RuntimeError, match="attn_mask expected 12 x L x S"):
        ours(q, k, v, attn_mask=torch.zeros(11, 5, 6))
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        ours(q, k, v, is_causal=True)


def test_torch_encoders_run_pruned_cut_and_sparse_with_padding(close, tmp_path):
    model = built("torch")
    packed = fresh("torch")
    assert expose_linears_(packed) == ["1.layers.0.self_attn", "1.layers.1.self_attn"] and expose_linears_(packed) == []
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    ids = torch.randint(3, 40, (2, 7))
    prune_(model, 0.5, granularity={"*self_attn*": Heads(), "*linear*": "element"})
    run = lambda m: m[1](m[0](ids), src_key_padding_mask=padding)[~padding]  # noqa: E731
    with torch.no_grad():
        masked = run(model)
        shrink_(model)
        close(run(model), masked)
        sp.sparsify_(model, layout="csr")
        close(run(model), masked)
        sp.save(model, tmp_path / "m.safetensors")
        close(run(sp.load(fresh("torch"), tmp_path / "m.safetensors")), masked)
        sp.densify_(model)
        close(run(model), masked)


def test_a_failed_load_leaves_the_packed_model(tmp_path):
    model = built("gpt2")
    with torch.no_grad():
        model.transformer.wpe = nn.Embedding(9, 32)
    sp.save(model, tmp_path / "other.safetensors")
    target = fresh("gpt2")
    before = outputs(target)
    with pytest.raises(CheckpointError, match=r"wpe\.weight expected shape \[16, 32\]"):
        sp.load(target, tmp_path / "other.safetensors")
    assert torch.equal(outputs(target), before) and type(target.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    target.save_pretrained(tmp_path / "still")


def test_what_cannot_be_unpacked_is_refused():
    with pytest.raises(ValueError, match="expected a model that holds a MultiheadAttention, got one itself"):
        expose_linears_(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="expected no bias_k"):
        expose_linears_(nn.ModuleList([nn.MultiheadAttention(8, 2, add_bias_kv=True)]))


def causal(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, "num_key_value_heads": 8, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def gemma3():
    import transformers

    config = transformers.Gemma3TextConfig(**{"num_key_value_heads": 8, "head_dim": 4, **SIZES})
    return transformers.Gemma3ForCausalLM(config)


def longformer():
    return of("Longformer", attention_window=4, max_position_embeddings=40, pad_token_id=1)


def luke():
    return of("Luke", entity_vocab_size=9, entity_emb_size=8, pad_token_id=1, max_position_embeddings=24)


def layoutlmv3():
    return of(
        "LayoutLMv3", visual_embed=False, max_position_embeddings=24, pad_token_id=1, max_2d_position_embeddings=32,
        coordinate_size=6, shape_size=4, has_relative_attention_bias=True, has_spatial_attention_bias=True,
    )  # fmt: skip


# What goes by the head, or over all neurons, beside the Linears that are cut -> what of the model the reason names.
UNCUT_HEADS = {
    "stablelm": (lambda: causal("StableLm", qk_layernorm=True), "q_layernorm.norms holds 8 parts"),
    "diffllama": (lambda: causal("DiffLlama"), "lambda_q1"),
    "olmo2": (lambda: causal("Olmo2"), "q_norm.weight [32] may run over all 8 heads of 4 features"),
    "olmo2, groups": (lambda: causal("Olmo2", num_key_value_heads=4), "q_norm.weight [32] may run over all 8 heads"),
    "cohere": (lambda: causal("Cohere", use_qk_norm=True), "q_norm.weight [8, 4] may hold something for each"),
    "bitnet": (lambda: causal("BitNet"), "attn_sub_norm.weight [32] may run over all 8 heads"),
    "longformer": (longformer, "query_global.weight [32, 32] may run over all 8 heads"),
    "luke": (luke, "w2e_query.weight [32, 32] may run over all 8 heads"),
    "layoutlmv3": (layoutlmv3, "rel_pos"),
}  # fmt: skip


@torch.no_grad()
def silenced(model, ends):
    """Everything drawn anew, for gains of one hide what they belong to; then the first unit's columns are zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for name, module in model.named_modules():
        if name.endswith(ends) and isinstance(module, nn.Linear):
            module.weight[:, :4] = 0
    return model.eval()


HEAD_ENDS = ("o_proj", "attention.output.dense")
NEURON_ENDS = ("down_proj", "0.output.dense", "1.output.dense")


@pytest.mark.parametrize("name", UNCUT_HEADS)
def test_attentions_with_more_than_is_known_of_heads_are_left(name):
    torch.manual_seed(0)
    make, why = UNCUT_HEADS[name]
    model = silenced(make(), HEAD_ENDS)
    before = outputs(model)
    shrunk = shrink_(model)
    assert not shrunk.heads and len(shrunk.left) >= 2
    assert all(why in reason for place, reason in shrunk.left.items() if "mlp" not in place)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("neurons", [48, 32])
def test_a_norm_of_any_kind_over_the_neurons_leaves_them(neurons):
    torch.manual_seed(0)
    model = silenced(causal("BitNet", intermediate_size=neurons), NEURON_ENDS)
    before = outputs(model)
    shrunk = shrink_(model)
    assert not shrunk.neurons and torch.equal(outputs(model), before)
    assert f"a BitNetRMSNorm runs over the neurons: model.layers.0.mlp.ffn_sub_norm.weight [{neurons}]" in str(shrunk)


CUT = {
    **{name: (lambda name=name: causal(name)) for name in (
        "Qwen3", "Gemma2", "Persimmon", "Olmo", "GPTNeoX", "Phi3", "Apertus", "NanoChat", "Llama", "Cohere"
    )},
    "Gemma3": gemma3,
    "Phi": lambda: causal("Phi", qk_layernorm=True),
    "StableLm": lambda: causal("StableLm"),
    "Esm": lambda: of("Esm", pad_token_id=1, mask_token_id=2),
    "Bert": lambda: of("Bert"),
    "MPNet": MODELS["mpnet"],
    "ModernBert": MODELS["modernbert"],
}  # fmt: skip
SIZES_ALIKE = {  # one number for several things
    "": {},
    "width of a head, heads": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8},
    "neurons, hidden states": {"intermediate_size": 32},
}


@pytest.mark.parametrize("alike", SIZES_ALIKE)
@pytest.mark.parametrize("name", CUT)
def test_norms_of_one_head_and_sizes_alike_are_no_reason_to_leave_a_block(name, alike, close, monkeypatch):
    torch.manual_seed(0)
    for key, value in SIZES_ALIKE[alike].items():
        monkeypatch.setitem(SIZES, key, value)
    model = CUT[name]().eval()
    prune_(model, 0.5, granularity=Heads(), scope="layer")
    prune_(model, 0.5, granularity=Neurons(), scope="layer")
    before = outputs(model)
    shrunk = shrink_(model)
    assert not shrunk.left and len(shrunk.heads) == len(shrunk.neurons) == 2
    assert all(b < a for a, b in (*shrunk.heads.values(), *shrunk.neurons.values()))
    close(outputs(model), before)


@pytest.mark.parametrize("name", [*(n for n in UNCUT_HEADS if n != "bitnet"), "deberta"])
def test_neurons_go_where_heads_must_stay(name, close):
    torch.manual_seed(0)
    model = silenced(of("Deberta") if name == "deberta" else UNCUT_HEADS[name][0](), NEURON_ENDS)
    before = outputs(model)
    shrunk = shrink_(model)
    assert set(shrunk.neurons.values()) == {(48, 44)}
    close(outputs(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_hidden_states_inside_an_attention_is_told_from_one_of_heads(dtype):
    class PreNorm(Timm):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)

        def forward(self, x):
            return super().forward(self.norm(x))

    class OverHeads(Timm):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
            return self.proj(self.norm(mixed))

    torch.manual_seed(0)
    assert [block.heads for block in attention_blocks(PreNorm().to(dtype))[0]] == [8]
    assert attention_blocks(OverHeads().to(dtype))[1] == {"": "norm.weight [32] may run over all 8 heads of 4 features"}


def test_a_norm_of_hidden_states_is_told_where_the_output_lies_outside(close):
    from transformers import PerceiverConfig, PerceiverModel

    torch.manual_seed(0)
    config = PerceiverConfig(
        d_model=32, num_latents=4, d_latents=32, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=4,
        num_cross_attention_heads=4,
    )  # fmt: skip
    model = PerceiverModel(config).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        model.encoder.self_attends[0].attention.output.dense.weight[:, 8:16] = 0
        before = model(inputs=x).last_hidden_state
        shrunk = shrink_(model)
        close(model(inputs=x).last_hidden_state, before)
    assert shrunk.heads["encoder.self_attends.0.attention.self"] == (4, 3)
