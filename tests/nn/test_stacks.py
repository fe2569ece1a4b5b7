"""Stacks of encoder layers as one program: the same hidden states as layer by layer, for every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from stack_models import body, make, programs, prune_, sparse, stack, tokens
from torch import nn

import sparseprune as sp
from sparseprune.nn.stacks import drop_stacks_, stack_of, use_stacks_

TRANSFORMERS = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "modernbert"]
TORCH = ["torch", "torch batch", "torch gelu", "torch prenorm", "torch prenorm batch gelu", "torch batch nested"]
EVERY = [*TRANSFORMERS, *TORCH]


def real_tokens(batch: int, length: int) -> torch.Tensor:
    """Padding behind the first token, at the end, in between, all but the first token; all real."""
    real = torch.ones(batch, length, dtype=torch.bool)
    real[0, 1 : length // 3] = False
    if batch > 1:
        real[1, 2 * length // 3 + 1 :] = False
    if batch > 2:
        real[2, 1::3] = False
    if batch > 3:
        real[3, 1:] = False
    return real


def need_transformers(name: str) -> None:
    if name in TRANSFORMERS or name == "vit":
        pytest.importorskip("transformers")


@torch.no_grad()
def check(model: nn.Module, name: str, batch: int, length: int) -> None:
    """The program's hidden states against those of the layers, with and without a mask."""
    ids, call = tokens(batch, length), body(model, name)
    real = real_tokens(batch, length)
    with programs(model) as notes:
        found, masked = call(ids), call(ids, real)
    assert notes == [None, None]
    undone = copy.deepcopy(model)
    assert drop_stacks_(undone)
    call = body(undone, name)
    torch.testing.assert_close(found, call(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masked[real], call(ids, real)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture(name):
    need_transformers(name)
    check(sparse(name), name, 5, 13)


@pytest.mark.parametrize("name", ["bert", "modernbert", "mpnet", "torch prenorm"])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 512])
def test_lengths(name, length):
    need_transformers(name)
    check(sparse(name), name, 2, length)


@pytest.mark.parametrize("hidden, heads, ffn", [(24, 3, 40), (40, 5, 33), (64, 1, 16), (128, 2, 130), (36, 3, 1)])
def test_sizes(hidden, heads, ffn):
    """Head depths of 8, 64 and one odd; sizes that no vector divides."""
    check(sparse("torch batch", hidden=hidden, heads=heads, ffn=ffn), "torch batch", 3, 21)


@pytest.mark.parametrize("name", ["bert", "modernbert", "electra"])
def test_eager_masks(name):
    need_transformers(name)
    check(sparse(name, attention="eager"), name, 4, 13)


def test_vit():
    need_transformers("vit")
    model = sparse("vit")
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad(), programs(model) as notes:
        found = model(pixels).last_hidden_state
        states = model(pixels, output_hidden_states=True).hidden_states
        again = model(pixels).last_hidden_state
    assert notes == [None, "the call has output_hidden_states", None]
    drop_stacks_(model)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(found, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, again)
    assert len(states) == 3 and all(map(torch.equal, states, expected.hidden_states))


def test_text_encoder():
    model = make("text")
    prune_(model)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, fqn: "layers" in fqn, engine="program")
    ids, real = tokens(4, 17), real_tokens(4, 17)
    with torch.no_grad(), programs(model) as notes:
        found = model(ids), model(ids, real)
    assert notes == [None, None]
    drop_stacks_(model)
    with torch.no_grad():
        torch.testing.assert_close(found[0], model(ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], model(ids, real), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "mpnet", "torch batch", "torch"])
def test_padding_is_zero_and_an_empty_batch_is_empty(name):
    need_transformers(name)
    model = sparse(name)
    ids, real = tokens(4, 9), real_tokens(4, 9)
    with torch.no_grad(), programs(model) as notes:
        found = body(model, name)(ids, real)
        none = body(model, name)(ids[:0])
    assert notes[0] is None
    assert not found[~real].any()
    assert none.shape == (0, 9, 36)


@pytest.mark.parametrize("layout", ["csr", "bsr", "nm"])
@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_layouts_and_values(layout, values, name):
    """Packed as the layers are: rounded values give the layers' own rounding."""
    need_transformers(name)
    model = make(name, hidden=64, heads=4, ffn=96)
    granularity = {"csr": "element", "bsr": sp.Block(16, 1), "nm": sp.NM(2, 4)}[layout]
    options = {} if layout == "nm" else {"sparsity": 0.6}
    sp.prune_(model, **options, granularity=granularity, scope="layer", filter_fn=lambda module, fqn: "layer" in fqn)
    report = sp.sparsify_(
        model, layout=layout, value_dtype=values, filter_fn=lambda module, fqn: "layer" in fqn, engine="program"
    )
    assert report.stacks[0].engine == "program", str(report)
    check(model, name, 3, 11)


def test_one_token_forms_are_packed_anew():
    """A layer tuned for one token keeps a bitmask, which the program does not read."""
    pytest.importorskip("transformers")
    model = prune_(make("bert"))
    report = sp.sparsify_(model, "csr", 1, filter_fn=lambda module, fqn: "layer" in fqn, engine="program")
    assert report.stacks[0].engine == "program", str(report)
    check(model, "bert", 2, 7)


def test_a_layer_met_twice():
    model = make("torch batch")
    sp.expose_linears_(model)
    model.layers[1] = model.layers[0]
    assert [c.engine for c in use_stacks_(model, "program")] == ["program"]
    check(model, "torch batch", 2, 9)


def test_a_shared_layer_is_packed_once():
    model = make("torch batch")
    model.layers[1] = model.layers[0]
    use_stacks_(model, "program")
    with torch.no_grad():
        assert len(stack(model).ready().built.program.weights) == 4


def test_heads_cut_out():
    """Layers with fewer heads than others, and of another width than the hidden states."""
    model = make("torch batch", hidden=48, heads=4)
    sp.expose_linears_(model)
    attention = model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(48, 24).eval())
    attention.out_proj, attention.num_heads = nn.Linear(24, 48).eval(), 2
    assert [c.engine for c in use_stacks_(model, "program")] == ["program"]
    check(model, "torch batch", 3, 9)


def test_inference_mode():
    model, x = sparse("torch batch"), torch.randn(2, 5, 36)
    with torch.inference_mode(), programs(model) as notes:
        found = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), found) and notes == [None]


def test_auto_measures_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", str(tmp_path / "timings.json"))
    model = prune_(make("torch batch", hidden=64, heads=4, ffn=128), 0.1)
    sp.expose_linears_(model)
    report = sp.sparsify_(model, "csr", tokens=(16, 130), filter_fn=lambda module, fqn: "layers" in fqn)
    (choice,) = report.stacks
    assert choice.layers == 2 and choice.name == "" and choice.ratio is not None
    assert choice.engine == ("program" if choice.ratio >= 1.1 else "layers")
    assert "times the layers" in str(report) and (stack_of(model) is not None) == (choice.engine == "program")
    assert report.to_dict()["stacks"][0]["engine"] == choice.engine


def test_engines_asked_for():
    model = make("torch batch")
    assert use_stacks_(model, "auto")[0].reason == "none of its layers is sparse"
    assert use_stacks_(model, "layers")[0].engine == "layers" and stack_of(model) is None
    with pytest.raises(ValueError, match="engine expected one of"):
        use_stacks_(model, "magic")
    with pytest.raises(ValueError, match="engine expected one of"):
        sp.sparsify_(model, engine="magic")


class Doubled(nn.TransformerEncoder):
    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
        x = src
        for layer in self.layers:
            x = 2 * layer(x)
        return x


def test_a_loop_that_does_more_runs_its_layers():
    model = Doubled(nn.TransformerEncoderLayer(32, 2, 40, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(x)
        use_stacks_(model, "program")
        assert torch.equal(model(x), expected)
        assert "does more between two layers" in stack(model).why_not(x)


class Lying(nn.Module):
    """The structure of BERT's layers, another function."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        mixed = self.attention(hidden_states, attention_mask)[0]
        return self.output(self.intermediate(mixed), hidden_states)


def test_structure_alone_does_not_convince():
    pytest.importorskip("transformers")
    model = make("bert")
    model.encoder.layer = nn.ModuleList(Lying(layer) for layer in model.encoder.layer)
    (choice,) = use_stacks_(model, "program")
    assert choice.engine == "layers" and "differ by" in choice.reason


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.Tanh()), "activation is Tanh"),
        (lambda layer: setattr(layer.output, "LayerNorm", nn.RMSNorm(36)), "norm is RMSNorm"),
        (lambda layer: setattr(layer.output, "dense", nn.Sequential(layer.output.dense)), "holds Sequential"),
        (lambda layer: setattr(layer, "is_decoder", True), "those of a decoder"),
        (lambda layer: layer.double(), "needs float32 parameters"),
    ],
)
def test_what_is_not_known_keeps_its_layers(change, reason):
    pytest.importorskip("transformers")
    model = make("bert")
    change(model.encoder.layer[1])
    (choice,) = use_stacks_(model, "program")
    assert choice.engine == "layers" and reason in choice.reason, choice


def test_shared_groups_keep_their_layers():
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 50}
    albert = t.AlbertModel(t.AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=2)).eval()
    assert all(c.engine == "layers" and c.reason for c in use_stacks_(albert, "program"))


def test_densify_undoes_it():
    model = sparse("torch batch")
    sp.densify_(model)
    assert stack_of(model) is None and "forward" not in vars(model)


def test_explain_says_which_engine_runs_and_why():
    pytest.importorskip("transformers")
    model = sparse("bert")
    hidden = torch.randn(2, 5, 36)
    with torch.no_grad():
        told = sp.explain(model.encoder, hidden)
        assert "one native call of" in told and "bytes" in told
        assert "output_attentions" in sp.explain(model.encoder, hidden, output_attentions=True)
    model.requires_grad_(True)
    assert "one by one: a gradient is needed" in sp.explain(model.encoder, hidden)
    drop_stacks_(model)
    for inputs in ((), (hidden,)):
        told = sp.explain(model.encoder, *inputs)
        assert told.startswith("BertEncoder: this stack runs layer by layer because nobody gave it a program")
    sp.densify_(model)
    sp.sparsify_(model, "csr", engine="layers")
    assert "layer by layer because engine='layers' was asked for" in sp.explain(model.encoder)
    with pytest.raises(TypeError, match="got BertModel"):
        sp.explain(model)


@torch.no_grad()
def test_the_report_has_the_bytes_of_a_program():
    model = prune_(make("torch batch"), 0.1)
    report = sp.sparsify_(model, "csr", filter_fn=lambda module, fqn: "layers" in fqn, engine="program")
    (choice,) = report.stacks
    assert choice.nbytes == stack(model).ready().built.nbytes
    weights = sum(p.numel() for name, p in make("torch batch").named_parameters())
    assert choice.dense_nbytes == 4 * weights
    assert f"reads {choice.nbytes} bytes, dense {choice.dense_nbytes}" in str(report)
    left = use_stacks_(model, "layers")
    assert left[0].nbytes == 0
