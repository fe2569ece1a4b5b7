"""Whatever a model does between two modules that run as one, and what it changes later, counts."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseprune as sp
from sparseprune import _native
from sparseprune.nn.stacks import stack_of

needs_core = pytest.mark.skipif(_native.C is None, reason=str(_native.why_no_c()))


class Encoder(nn.TransformerEncoder):
    """Three layers in a loop; subclasses do something between them."""

    def __init__(self):
        layer = nn.TransformerEncoderLayer(32, 2, 40, batch_first=True)
        super().__init__(layer, 3, enable_nested_tensor=False)

    def forward(self, x, tap=None):
        for layer in self.layers:
            x = layer(x)
        return x


class InPlace(Encoder):
    def forward(self, x, tap=None):
        for layer in self.layers[:-1]:
            x = layer(x)
            x += 0.5
        return self.layers[-1](x)


class Averaged(Encoder):
    def forward(self, x, tap=None):
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return torch.stack(found).mean(0)


class Tapped(Encoder):
    def forward(self, x, tap=None, other=None):
        taken = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == tap:
                taken.append(x)
        return taken[0] if taken else x


class Noting(Encoder):
    def forward(self, x, tap=None):
        self.seen = []
        for layer in self.layers:
            x = layer(x)
            self.seen.append(x)
        return x


class Norms(Encoder):
    def forward(self, x, tap=None):
        self.norms = []
        for layer in self.layers:
            x = layer(x)
            self.norms.append(float(x.norm()))
        return x


def encoder(kind):
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    sp.prune_(model, sparsity=0.5)
    return model


@needs_core
@pytest.mark.parametrize("kind", [InPlace, Averaged, Tapped, Noting, Norms])
def test_hidden_states_that_are_read_between_layers_are_those_of_the_layers(kind):
    model, x = encoder(kind), torch.randn(2, 5, 32)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", engine="program")
    for _ in range(2):  # the second call knows already
        with torch.no_grad():
            torch.testing.assert_close(model(x.clone(), tap=0), plain(x.clone(), tap=0), rtol=1e-4, atol=1e-5)
        assert getattr(model, "norms", []) == pytest.approx(getattr(plain, "norms", []), rel=1e-4)
        for mine, theirs in zip(getattr(model, "seen", ()), getattr(plain, "seen", ())):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert "does more between two layers than hand on hidden states" in stack_of(model).why_not(x, tap=0)


@needs_core
def test_a_loop_that_hands_on_alone_stays_a_program():
    model, x = encoder(Encoder), torch.randn(2, 5, 32)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", engine="program")
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        assert stack_of(model).why_not(x) is None and type(model(x)) is torch.Tensor


@needs_core
def test_a_call_that_reads_between_layers_leaves_other_calls_to_the_program(monkeypatch):
    model, x = encoder(Tapped), torch.randn(2, 5, 32)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", engine="program")
    stack = stack_of(model)
    with torch.no_grad():
        for tap in (0, 1, None, 0, 1, None):
            torch.testing.assert_close(model(x, tap=tap), plain(x, tap=tap), rtol=1e-4, atol=1e-5)
            assert stack.why_not(x) is None and stack.why_not(x, tap=None) is None
        begun, begin = [], stack._begin
        monkeypatch.setattr(stack, "_begin", lambda *args: begun.append(args) or begin(*args))
        assert "does more between two layers" in stack.why_not(x, tap=0) and not begun  # which is known by now
        assert stack.why_not(x) is None and begun
        for own in range(20):  # kinds without end: all calls are left to the layers
            model(x, 0) if own == 0 else model(x, tap=1, **{"other": own})
        assert "does more between two layers" in stack.why_not(x)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        model.layers[0].linear1.values.mul_(2.0), plain.layers[0].linear1.weight.mul_(2.0)
        assert stack.why_not(x) is None  # new weights, a new trial
        torch.testing.assert_close(model(x, tap=0), plain(x, tap=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


class Feed(nn.Module):
    """A feed-forward block; subclasses do something with what comes before the activation."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x, pre=False):
        h = self.fc1(x)
        return h if pre else self.fc2(self.act(h))


class Detached(Feed):
    def forward(self, x):
        h = self.fc1(x)
        self.noted = h.detach()
        return self.fc2(self.act(h))


class Kept(Feed):
    def forward(self, x):
        self.noted = self.fc1(x)
        return self.fc2(self.act(self.noted))


class Auxiliary(Feed):
    def forward(self, x):
        h = self.fc1(x)
        if self.training:
            self.noted = h.square().mean()
        return self.fc2(self.act(h))


class Flagged(Feed):
    flag = False

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h)) + (self.fc2(h) if self.flag else 0)


class Sequences(Feed):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h.flip(1) - 1 if h.dim() == 3 else h))


class Dropped(Feed):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc2(self.act(self.drop(self.fc1(x))))


class Shifted(Feed):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(32))

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x) + self.shift))


def asked_before(model, x):
    return model[0](x, pre=True)


def noted(model, x):
    model(x)
    return model[0].noted


def noted_in_training(model, x):
    found = noted(model.train(), x)
    model.eval()
    return found


def flagged(model, x):
    model[0].flag = True
    return model(x)


def trained(model, x):
    torch.manual_seed(3)
    found = model.train()(x)
    model.eval()
    return found


def shifted(model, x):
    model[0].shift.data.fill_(1.0)
    return model(x)


@pytest.mark.parametrize(
    ("kind", "call"),
    [(Feed, asked_before), (Detached, noted), (Kept, noted), (Auxiliary, noted_in_training), (Flagged, flagged),
     (Sequences, nn.Sequential.__call__), (Dropped, trained), (Shifted, shifted), (Feed, nn.Sequential.__call__)],
)  # fmt: skip
def test_what_comes_before_an_activation_is_what_it_was(kind, call):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind()).eval(), torch.randn(2, 3, 16)
    sp.prune_(model, sparsity=0.6)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: True)
    for _ in range(2):
        torch.testing.assert_close(call(model, x), call(plain, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@dataclass
class Answer:
    result: torch.Tensor
    before: torch.Tensor | None = None
    whole: Answer | None = None


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act = nn.Linear(32, 48), nn.GELU()

    def forward(self, x, whole=False):
        before = self.up(x)
        result = self.act(before)
        answer = Answer(result, before if whole is True else None)
        answer.whole = answer
        return answer if whole else result


def test_what_comes_before_an_activation_may_be_handed_back_in_a_dataclass():
    torch.manual_seed(0)
    model, x = nn.Sequential(Answering()).eval(), torch.randn(3, 32)
    sp.prune_(model, sparsity=0.5)
    plain = copy.deepcopy(model)
    assert not [f for f in sp.sparsify_(model, layout="csr").fusions if f.reason]
    ringed = model[0](x, "result")  # which holds itself
    found, expected = model[0](x, True), plain[0](x, True)
    torch.testing.assert_close(ringed.whole.result, expected.result, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.before + 0, expected.before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.result, expected.result, rtol=1e-4, atol=1e-5)


def test_an_activation_that_follows_its_linear_alone_is_fused():
    model = nn.Sequential(Feed()).eval()
    sp.prune_(model, sparsity=0.6)
    report = sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: True)
    assert [(f.what, f.reason) for f in report.fusions] == [("gelu", "")]
    shift = nn.Sequential(Shifted()).eval()
    sp.prune_(shift, sparsity=0.6)
    assert not [f for f in sp.sparsify_(shift, layout="csr", filter_fn=lambda m, n: True).fusions if not f.reason]


class Output(nn.Module):
    """BERT's output block, with more."""

    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(32, 16), nn.LayerNorm(16), nn.Dropout(0.0)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) * self.scale() + input_tensor)


class Gained(Output):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16))

    def scale(self):
        return self.gamma


class HalvedInTraining(Output):
    def scale(self):
        return 0.5 if self.training else 1.0


class Block(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, residual):
        return self.output(x, residual)


class Numbered(Output):
    """By what may be another number later."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def scale(self):
        return self.factor


class Measured(Numbered):
    def __init__(self):
        super().__init__()
        self.factor = torch.ones(())


class Switched(Numbered):
    def __init__(self):
        super().__init__()
        self.factor = True


@pytest.mark.parametrize("kind", [Numbered, Measured, Switched])
def test_a_block_that_reads_numbers_of_its_own_stays(kind):
    torch.manual_seed(0)
    model, given = Block(kind()).eval(), (torch.randn(3, 32), torch.randn(3, 16))
    sp.prune_(model, sparsity=0.5)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: True)
    for each in (model, plain):
        each.output.factor = each.output.factor * 3
    torch.testing.assert_close(model(*given), plain(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Gained, HalvedInTraining])
def test_a_block_that_does_more_than_its_children_stays(kind):
    torch.manual_seed(0)
    model, given = Block(kind()), (torch.randn(3, 32), torch.randn(3, 16))
    sp.prune_(model, sparsity=0.5)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: True)
    assert set(dict(model.named_parameters())) >= {name for name, _ in plain.named_parameters() if "dense" not in name}
    for each in (model, plain):
        each.train()
        if kind is Gained:
            each.output.gamma.data.fill_(3.0)
    torch.testing.assert_close(model(*given), plain(*given), rtol=1e-4, atol=1e-5)


class Rms(nn.Module):
    def __init__(self, halved=False):
        super().__init__()
        self.weight, self.variance_epsilon, self.halved = nn.Parameter(torch.ones(16)), 1e-6, halved

    def forward(self, x):
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return 0.5 * y if self.halved and self.training else y


def test_an_rms_norm_keeps_its_eps_under_its_name_and_its_training():
    x = torch.randn(4, 16)
    model = nn.Sequential(Rms(), nn.Linear(16, 16), Rms(halved=True))
    sp.prune_(model, sparsity=0.5, filter_fn=lambda module, name: True)
    plain = copy.deepcopy(model)
    report = sp.sparsify_(model, layout="csr", filter_fn=lambda module, name: True)
    assert [f.reason == "" for f in report.fusions if f.what == "RMSNorm"] == [True, False]
    for each in (model, plain):
        each.train()
        each[0].variance_epsilon = 5.0
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@needs_core
@pytest.mark.parametrize("where", ["adapter", "temperature"])
def test_parameters_that_do_nothing_yet_keep_layers_as_they_are(where):
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertLayer

    class Adapted(BertLayer):
        def __init__(self, config):
            super().__init__(config)
            self.up = nn.Linear(32, 32)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, hidden_states, *args, **kwargs):
            found = super().forward(hidden_states, *args, **kwargs)
            first = found[0] if isinstance(found, tuple) else found
            first = first + self.up(F.gelu(first))
            return (first, *found[1:]) if isinstance(found, tuple) else first

    class Tempered(BertLayer):
        def __init__(self, config):
            super().__init__(config)
            self.temperature = nn.Parameter(torch.zeros(()))

        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states * self.temperature.exp(), *args, **kwargs)

    kind = Adapted if where == "adapter" else Tempered
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=50, **sizes)
    torch.manual_seed(0)
    model, ids = transformers.BertModel(config).eval(), torch.randint(3, 50, (2, 9))
    for i, layer in enumerate(model.encoder.layer):
        model.encoder.layer[i] = made = kind(config).eval()
        made.load_state_dict(layer.state_dict(), strict=False)
    chosen = {"filter_fn": lambda module, name: "layer" in name and "up" not in name}
    sp.prune_(model, 0.5, **chosen)
    plain = copy.deepcopy(model)
    report = sp.sparsify_(model.requires_grad_(False), layout="csr", engine="program", **chosen)
    assert [stack.engine for stack in report.stacks] == ["layers"] and "is no part of what is known" in str(report)
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            if name.endswith(("up.weight", "temperature")):
                parameter.data.fill_(0.2)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], plain(ids)[0], rtol=1e-4, atol=1e-4)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    sp.prune_(model, 0.5, filter_fn=lambda module, name: "mlp" in name)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", tokens=(1, 16), engine="program", filter_fn=lambda module, name: "mlp" in name)
    return model, plain


def turn_weight(model):
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight.data = projection.weight.data.T


def expand_norm(model):
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data[:1].mul(1.5).expand(32)


@needs_core
@pytest.mark.parametrize("change", [turn_weight, expand_norm])
def test_weights_that_lie_otherwise_are_read_so(change):
    model, plain = llama()
    ids = torch.randint(3, 50, (1, 6))
    with torch.no_grad():
        model(ids)
        for each in (model, plain):
            change(each)
        first, second = (each(ids, use_cache=True) for each in (model, plain))
        torch.testing.assert_close(first.logits, second.logits, rtol=1e-4, atol=1e-4)
        pairs = (model, first), (plain, second)
        more = [each(ids[:, :1], past_key_values=given.past_key_values).logits for each, given in pairs]
        torch.testing.assert_close(*more, rtol=1e-4, atol=1e-4)


@needs_core
def test_a_forward_that_a_class_is_given_later_runs(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    model, plain = llama()
    ids = torch.randint(3, 50, (1, 6))
    before = LlamaMLP.forward
    with torch.no_grad():
        model(ids)
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * before(self, x))
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@needs_core
def test_an_attention_that_is_registered_later_runs(monkeypatch):
    model, plain = llama()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ids, before = torch.randint(3, 50, (1, 6)), ALL_ATTENTION_FUNCTIONS["sdpa"]

    def doubled(*args, **kwargs):
        out, weights = before(*args, **kwargs)
        return 2 * out, weights

    with torch.no_grad():
        model(ids)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", doubled)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused_and_not_zero():
    from torch.autograd import forward_ad

    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    linear = nn.Linear(16, 8).requires_grad_(False)
    sparse = sp.SparseLinear.from_linear(linear, "csr").requires_grad_(False)
    masked = sp.MaskedLinear.from_linear(linear).requires_grad_(False)
    for layer in (sparse, sparse.eval(), masked):
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .*densify_\(model\)"):
            torch.func.jvp(layer, (x,), (tangent,))
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                layer(forward_ad.make_dual(x, tangent))
            layer(x)  # nothing to differentiate here


def test_a_state_that_is_assigned_stays_the_callers():
    source = nn.Linear(8, 4)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    kept = {name: value.clone() for name, value in state.items()}
    layer = sp.MaskedLinear.from_linear(nn.Linear(8, 4), mask=torch.rand(4, 8) < 0.5)
    layer.load_state_dict({**state, "mask": layer.mask}, assign=True)
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert torch.equal(layer.weight, state["weight"] * layer.mask)


def bert(**settings):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=50, **sizes, **settings)
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval().requires_grad_(False)
    sp.prune_(model, 0.5, filter_fn=lambda module, name: "layer" in name)
    plain = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", engine="program", filter_fn=lambda module, name: "layer" in name)
    return model, plain


@needs_core
def test_eager_attention_adds_a_bool_mask_as_its_layers_do():
    model, plain = bert(attn_implementation="eager")
    hidden, mask = torch.randn(2, 7, 32), torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    with torch.no_grad():
        found, expected = (each.encoder(hidden, attention_mask=mask)[0] for each in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_core
def test_a_mask_that_wants_a_gradient_gets_it():
    model, plain = bert()
    hidden, found = torch.randn(2, 7, 32), []
    for each in (model, plain):
        mask = torch.zeros(2, 1, 7, 7, requires_grad=True)
        each.encoder(hidden, attention_mask=mask)[0].square().sum().backward()
        found.append(mask.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


class SiLU(nn.Module):
    """A user's Swish, under the name of torch's."""

    def __init__(self, beta=1.7):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class DoubledGELU(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


class Around(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.up, self.activation = nn.Linear(32, 48), activation

    def forward(self, x):
        return self.activation(self.up(x))


@pytest.mark.parametrize("around", [lambda act: nn.Sequential(nn.Linear(32, 48), act), Around])
@pytest.mark.parametrize("activation", [SiLU, lambda: SiLU(1.0), DoubledGELU])
def test_an_activation_of_a_known_name_is_what_its_own_class_computes(activation, around):
    torch.manual_seed(0)
    model = nn.Sequential(around(activation()), nn.Linear(48, 8)).requires_grad_(False).eval()
    sp.prune_(model, sparsity=0.5)
    plain, x = copy.deepcopy(model), torch.randn(3, 32)
    sp.sparsify_(model, layout="csr")
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    for each in (model, plain):
        for module in each.modules():
            if isinstance(module, SiLU):
                module.beta.fill_(3.0)  # which a layer learns later
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def _gate_(module, kind):
    """Gives the module a factor for what it computes, a tensor that is no parameter."""
    plain = type(module)

    class Gated(plain):
        def forward(self, *args):
            return plain.forward(self, *args) * self.gate

    module.__class__ = Gated
    if kind == "buffer":
        module.register_buffer("gate", torch.ones(1))
    else:
        module.gate = torch.ones(1)


@needs_core
@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_tensor_that_layers_read_beside_their_weights_may_change(family, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50}
    config = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}[family](**sizes, vocab_size=50)
    model = transformers.AutoModel.from_config(config).eval().requires_grad_(False)
    layers = model.encoder.layer if family == "bert" else model.layers
    for layer in layers:
        _gate_(layer.output if family == "bert" else layer.mlp, kind)
    sp.prune_(model, sparsity=0.5)
    dense, ids = copy.deepcopy(model), torch.arange(3, 17).view(2, 7)
    report = sp.sparsify_(model, layout="csr", engine="program")
    assert [choice.engine for choice in report.stacks] == ["program"]

    def check(by_program):
        with torch.no_grad():
            found, expected = model(ids).last_hidden_state, dense(ids).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        owner = model.encoder if family == "bert" else model
        assert (stack_of(owner)._bound is not None) == by_program

    check(True)
    for value in (0.5, 1.0):
        for each in (model, dense):
            for module in each.modules():
                if hasattr(module, "gate"):
                    module.gate.fill_(value)
        check(value == 1.0)
    gradients = []
    for each in (model, dense):
        gates = [module.gate.requires_grad_() for module in each.modules() if hasattr(module, "gate")]
        gradients.append(torch.autograd.grad(each(ids).last_hidden_state.pow(3).mean(), gates))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
