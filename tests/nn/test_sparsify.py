"""sparsify_ and densify_ on whole models: what is chosen, what is fused, what comes back."""

from __future__ import annotations

import copy
import json
import pickle
import random

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn.fusion import FUSED as FUSED_MODULES


def prune(model, density=0.1, layout="element"):
    torch.manual_seed(3)
    for linear in sp.nn.prunable_linears(model).values():
        rows, columns = linear.weight.shape
        keep = torch.rand(rows, columns) < density
        if layout == "block":
            keep = (torch.rand(rows // 16, columns) < density).repeat_interleave(16, 0)
        with torch.no_grad():
            linear.weight.mul_(keep)
    return model


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def distilbert():
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=99)
    return transformers.DistilBertModel(config).eval()


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=99,
    )
    return transformers.LlamaForCausalLM(config).eval()


def encoder():
    from sparseprune.runner.text_encoder import TextEncoder

    return TextEncoder(vocab_size=99, num_labels=3, hidden=64, ffn=128, layers=2).eval()


def torch_encoder():
    return nn.Sequential(
        nn.Embedding(99, 64), nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)
    ).eval()


MODELS = {"bert": bert, "distilbert": distilbert, "llama": llama, "encoder": encoder, "torch encoder": torch_encoder}
FUSED = {"bert": 6, "distilbert": 2, "llama": 7, "encoder": 2, "torch encoder": 0}


def run(model):
    tokens = torch.arange(18).view(2, 9) * 5 % 97 + 1
    result = model(tokens)
    for name in ("logits", "last_hidden_state"):
        result = getattr(result, name, result)
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fuse", [True, False])
def test_the_function_stays_and_comes_back_bit_for_bit(name, fuse):
    model = prune(MODELS[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = run(model)
        report = sp.sparsify_(model, layout="csr", fuse=fuse)
        assert sum(isinstance(m, sp.SparseLinear) for m in model.modules()) == len(report.converted) > 0
        assert len([f for f in report.fusions if not f.reason]) == (FUSED[name] if fuse else 0)
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(run(twin), expected, rtol=1e-4, atol=1e-5)
        assert sp.densify_(model).notes == {}
        assert not any(isinstance(m, (sp.SparseLinear, *FUSED_MODULES)) for m in model.modules())
        assert torch.equal(run(model), expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["bert", "encoder"])
def test_a_sparse_model_trains_as_the_dense_one_does(name):
    model = prune(MODELS[name]())
    twin = copy.deepcopy(model)
    sp.sparsify_(twin, layout="csr")
    for each in (model, twin):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        run(each.train()).square().sum().backward()
    dense, sparse = dict(model.named_parameters()), dict(twin.named_parameters())
    for key, parameter in dense.items():
        if key in sparse:
            torch.testing.assert_close(sparse[key].grad, parameter.grad, rtol=1e-3, atol=1e-5)
        else:
            kept = parameter != 0
            values = sparse[key.removesuffix("weight") + "values"]
            torch.testing.assert_close(values.grad, parameter.grad[kept], rtol=1e-3, atol=1e-5)


def test_auto_measures_and_says_why(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.Linear(512, 512)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.02)
        model[2].weight.mul_((torch.rand(32, 1024) < 0.02).repeat_interleave(16, 0))
    report = sp.sparsify_(model, tokens=(8, 64))
    assert report["3"].layout == "dense" and "no zeros" in report["3"].reason
    for name in ("0", "2"):  # which one wins is this machine's business, that the choice follows the time is ours
        assert (report[name].layout != "dense") == (report[name].ratio >= 1.1)
        assert "tokens" in report[name].reason
    assert report["0"].layout in ("csr", "nm4:8", "dense")
    assert report["2"].layout in ("csr", "bsr16x1", "nm4:8", "dense")
    assert str(report).count("\n") >= 4 and report.to_dict()["layers"][0]["name"] == "0"


def test_a_report_says_that_it_was_timed_on_a_busy_machine_and_comes_back_from_json(monkeypatch):
    from sparseprune.bench import machine

    def made(load):
        monkeypatch.setattr(machine, "load", lambda: load)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
        sp.prune_(model, 0.9)
        return sp.sparsify_(model, tokens=4)

    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    busy = made(1000.0)
    assert busy["0"].doubt.startswith("timed under load 1000.0 on ")
    warning = str(busy).splitlines()[-1]
    assert warning.startswith("warning: timed under load 1000.0 on ") and "2 choices may be wrong" in warning
    assert busy.outline() == [f"{len(busy.converted)} of 2 layers sparse", warning]
    assert "under load" not in str(made(0.0))
    again = sp.nn.SparsifyReport.from_dict(json.loads(json.dumps(busy.to_dict())))
    assert again == busy and str(again) == str(busy)
    with pytest.raises(ValueError, match="expected what SparsifyReport"):
        sp.nn.SparsifyReport.from_dict({"layers": [{"name": "0"}]})


def test_auto_keeps_dense_where_dense_wins(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    from sparseprune import bench

    def dense_wins(candidates, *, baseline="dense", **_):
        return bench.Choice(baseline, 1.0, "dense wins")

    monkeypatch.setattr(bench, "choose_fastest", dense_wins)
    model = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5)
    report = sp.sparsify_(model)
    assert [layer.layout for layer in report.layers] == ["dense", "dense"]
    assert all(type(m) is nn.Linear for m in model)
    assert [layer.reason for layer in report.layers] == ["dense wins"] * 2
    few = sp.sparsify_(model, tokens=4)  # where looking at a weight counts
    assert all(layer.reason.endswith("for inference freeze it first, requires_grad_(False)") for layer in few.layers)
    frozen = sp.sparsify_(model.requires_grad_(False), tokens=4)
    assert [layer.reason for layer in frozen.layers] == ["dense wins"] * 2


@pytest.mark.parametrize("options", [{}, {"tokens": (1, 64), "dense_value_dtype": "int8"}], ids=["exact", "rounded"])
def test_the_callers_random_state_stays_whether_timings_are_known_or_made(options, monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    model = prune(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 5)), 0.1)
    before = torch.get_rng_state()
    sp.sparsify_(model, filter_fn=lambda module, fqn: fqn != "3", **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_forced_layouts_and_a_module_under_two_names():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(32, 32)})
    prune(model, layout="block")
    sp.sparsify_(model, layout="bsr", blocksize=(16, 1))
    assert model["a"] is model["b"][0] and model["a"].blocksize == (16, 1)
    assert isinstance(model["c"], sp.SparseLinear)


def test_a_layout_that_does_not_fit_leaves_the_model_alone():
    model = prune(nn.Sequential(nn.Linear(32, 32), nn.Linear(30, 32)), layout="block")
    with pytest.raises(ValueError, match=r"sparsify_: 1: .*multiple of m"):
        sp.sparsify_(model, layout="nm", nm=(4, 4))
    assert all(type(m) is nn.Linear for m in model)


@pytest.mark.parametrize(
    "model, options, message",
    [
        (nn.Linear(4, 4), {}, "SparseLinear.from_linear"),
        (nn.Sequential(nn.Linear(4, 4)), {"layout": "coo"}, "layout expected one of"),
        (nn.Sequential(nn.Linear(4, 4)), {"value_dtype": "int4"}, "value_dtype expected one of"),
        (nn.Sequential(nn.Linear(4, 4)), {"tokens": 0}, "tokens expected"),
        (nn.Sequential(nn.Linear(4, 4)), {"tokens": ()}, "tokens expected"),
        (nn.Sequential(nn.Linear(4, 4)), {"filter_fn": lambda m, n: False}, "nothing selected"),
        (nn.Sequential(nn.ReLU()), {}, "no nn.Linear"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        sp.sparsify_(model, **options)


def test_inference_mode_is_refused_for_what_it_makes_can_never_learn():
    model = prune(nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch.inference_mode; call it outside"):
        sp.sparsify_(model, layout="csr")
    assert type(model[0]) is nn.Linear
    with torch.no_grad():
        sp.sparsify_(model, layout="csr")
    model(torch.ones(2, 32)).sum().backward()
    assert model[0].values.grad is not None


def test_a_masked_linear_is_sparsified_by_its_mask():
    masked = sp.MaskedLinear.from_linear(nn.Linear(16, 16), torch.rand(16, 16) < 0.3)
    model = nn.Sequential(masked).eval()
    x = torch.randn(4, 16)
    with torch.no_grad():
        expected = model(x)
        sp.sparsify_(model, layout="csr")
        torch.testing.assert_close(model(x), expected)
    assert model[0].nnz == int(masked.mask.sum())


def test_a_low_rank_term_is_named_by_densify():
    model = prune(nn.Sequential(nn.Linear(16, 16)), 0.5)
    sp.sparsify_(model, layout="csr")
    model[0].set_low_rank_(torch.randn(2, 16), torch.randn(16, 2))
    x = torch.randn(3, 16)
    expected = model(x)
    report = sp.densify_(model)
    assert "rank 2" in report.notes["0"] and "0:" in str(report)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class Doubled(nn.Module):
    """Two Linears through one activation: fusing it into either would change the result."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU()

    def forward(self, x):
        return self.act(self.left(x)) + self.act(self.right(x))


class NotAnOutput(nn.Module):
    """The children of BERT's output block, put together otherwise."""

    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(16, 16), nn.LayerNorm(16), nn.Dropout(0.1)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states)) + input_tensor


def test_what_only_looks_like_a_pattern_is_left_alone():
    holder = nn.ModuleDict({"doubled": Doubled(), "output": NotAnOutput()}).eval()
    prune(holder, 0.5)
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = holder["doubled"](x), holder["output"](x, x)
        report = sp.sparsify_(holder, layout="csr")
        torch.testing.assert_close(holder["doubled"](x), expected[0])
        torch.testing.assert_close(holder["output"](x, x), expected[1])
    assert [f.reason for f in report.fusions] == ["its forward is not LayerNorm(dropout(dense(x)) + residual)"]


def test_a_hook_prevents_fusion():
    model = prune(nn.Sequential(nn.Linear(16, 16), nn.GELU()), 0.5).eval()
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    report = sp.sparsify_(model, layout="csr")
    assert "hook" in report.fusions[0].reason
    model(torch.randn(2, 16))
    assert len(seen) == 1


def test_auto_gives_each_call_size_what_is_faster(monkeypatch):
    from sparseprune import bench
    from sparseprune.nn.sparsify import sparsify, timing

    ratios = {1: 2.0, 128: 0.8}

    def choose(candidates, *, tokens, **_):
        (rows,) = tokens
        ran = [len(candidates[name](rows)()) for name in ("dense", "csr")]
        assert ran[0] == ran[1] and (ran[0] > 1) == (rows == 1)  # few rows: copies in turn, from memory
        return bench.Choice("csr", ratios[rows], "", {"csr": {rows: ratios[rows]}})

    monkeypatch.setattr(bench, "choose_fastest", choose)
    monkeypatch.setattr(sparsify, "CACHED", 0)
    monkeypatch.setattr(timing, "_IN_TURN", 3 * 4 * 24 * 40)
    model = prune(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)), 0.5).eval()
    x = torch.randn(3, 50, 24)
    with torch.no_grad():
        expected = [model(x), model(x[:1, :1])]
    report = sp.sparsify_(model, tokens=(1, 128), fuse=False)
    assert report["0"].ratio == 2.0 and "0.80 at 128 tokens; dense from 12 on" in report["0"].reason
    assert model[0].tokens == (1, 128) and model[0].dense_from == 12
    with torch.no_grad():
        for got, want in zip([model(x), model(x[:1, :1])], expected):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    ratios[1] = 0.9
    sp.densify_(model)
    assert sp.sparsify_(model, tokens=(1, 128)).converted == []
    ratios.update({1: 0.9, 128: 3.0})  # dense for the small calls only: one form cannot say that, so the layer stays
    assert sp.sparsify_(model, tokens=(1, 128)).converted == []


@pytest.mark.parametrize("tokens", [1, (1, 8, 128)], ids=str)
@pytest.mark.parametrize(
    "how",
    [{"value_dtype": "float32"}, {"value_dtype": "bfloat16"}, {"value_dtype": "int8"}, {"activations": "int8"}],
    ids=lambda how: "-".join(how.values()),
)
def test_no_layer_that_auto_makes_sparse_is_slower_than_dense(monkeypatch, how, tokens):
    """Whatever is measured: the times are drawn, and the call of each size that was timed must run what was faster."""
    from sparseprune import bench
    from sparseprune.bench import choose

    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    drawn, measured = random.Random(5), []

    def interleave(ready, *_, **__):
        measured.append({name: drawn.uniform(0.5, 2.0) for name in ready})
        return bench.Comparison({name: [seconds] for name, seconds in measured[-1].items()}, dict.fromkeys(ready, 1))

    monkeypatch.setattr(choose, "interleave", interleave)
    counts = (tokens,) if isinstance(tokens, int) else tokens
    kept_dense = made_sparse = 0
    for sparsity in (0.5, 0.7, 0.9) * 8:
        measured.clear()
        model = prune(nn.Sequential(nn.Linear(64, 48)), 1 - sparsity).eval()
        chosen = sp.sparsify_(model, tokens=tokens, **{"value_dtype": "int8", **how})["0"]
        assert len(measured) == len(counts)
        kept_dense += chosen.layout == "dense"
        if chosen.layout == "dense":
            continue
        made_sparse += 1
        dense_from = model[0].dense_from or max(counts) + 1
        assert any(times["dense"] >= 1.1 * times[chosen.layout] for times in measured)
        for rows, times in zip(counts, measured):
            assert rows >= dense_from or times[chosen.layout] <= times["dense"], (rows, times)
    assert kept_dense and made_sparse


class TwoCallers(nn.Module):
    """A block whose Linear and activation are called from outside it too."""

    def __init__(self, block):
        super().__init__()
        self.block, self.last = block, nn.Linear(16, 16)

    def forward(self, x):
        linear, activation = self.block.children()
        return self.last(self.block(x) + linear(x) + activation(x))


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(16, 16), nn.ReLU()

    def forward(self, x):
        return self.act(self.dense(x))


def twice():
    linear, activation = nn.Linear(16, 16), nn.ReLU()
    return nn.Sequential(linear, activation, linear, activation)


@pytest.mark.parametrize(
    "make", [twice, lambda: TwoCallers(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), lambda: TwoCallers(Feed())]
)
def test_other_callers_of_what_was_fused_get_what_they_got(make, close):
    torch.manual_seed(0)
    model, x = prune(make(), 0.5).eval(), torch.randn(5, 16)
    dense = copy.deepcopy(model)
    report = sp.sparsify_(model, layout="csr")
    with torch.no_grad():
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(each(x), dense(x))
    assert any(isinstance(m, TwoCallers) for m in model.modules()) == bool(report.fusions)
    sp.densify_(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
    close(model(x), dense(x))


@pytest.mark.parametrize("make", [Feed, lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU())])
def test_what_changes_after_fusing_is_seen(make, close):
    model, x = prune(nn.Sequential(make()), 0.5).eval(), torch.randn(5, 16)
    report = sp.sparsify_(model, layout="csr")
    assert [f.reason for f in report.fusions] == [""]
    linear, activation = model[0].children()
    name = list(model[0]._modules)[1]
    seen = []
    with torch.no_grad():
        before = linear(x)
        handles = [
            m.register_forward_hook(lambda module, args, out: seen.append((module, out))) for m in (linear, activation)
        ]
        close(model(x), before.relu())
        assert [m for m, _ in seen] == [linear, activation]
        close(seen[0][1], before)
        for handle in handles:
            handle.remove()
        model(x)
        assert len(seen) == 2
        model[0]._modules[name] = nn.Tanh()
        close(model(x), before.tanh())
        model[0]._modules[name] = nn.Sequential(nn.Dropout(0.5), nn.ReLU())
        model[0]._modules[name].train()
        assert not torch.equal(model(x), model(x))


def output_block():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=16, intermediate_size=16, hidden_dropout_prob=0.5)
    from transformers.models.bert.modeling_bert import BertOutput

    model = prune(nn.ModuleDict({"output": BertOutput(config)}), 0.5).eval()
    dense = copy.deepcopy(model)["output"]
    sp.sparsify_(model, layout="csr")
    assert type(model["output"]).__name__ == "FusedOutput"
    return model["output"], dense


def test_a_fused_output_sees_dropout_hooks_and_other_modules(close):
    block, dense = output_block()
    x, residual, seen = torch.randn(4, 16), torch.randn(4, 16), []
    with torch.no_grad():
        close(block(x, residual), dense(x, residual))
        block.dropout.train()  # and nothing else, as for estimates of uncertainty
        assert not torch.equal(block(x, residual), block(x, residual))
        block.dropout.eval()
        handle = block.dense.register_forward_hook(lambda module, args, out: seen.append(out) or out * 2)
        close(block(x, residual), dense.LayerNorm(2 * dense.dense(x) + residual))
        assert len(seen) == 1
        handle.remove()
        block.LayerNorm = nn.LayerNorm(16, elementwise_affine=False)
        close(block(x, residual), block.LayerNorm(dense.dense(x) + residual))


def test_a_fused_output_has_the_dtype_of_its_layer_norm_under_autocast():
    block, dense = output_block()
    x, residual = torch.randn(4, 16), torch.randn(4, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = block(x, residual), dense(x, residual)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_hooks_go_on_watching(close):
    """Hooks that change what goes in and comes out, and the handles that remove them; gradients' hooks too."""
    torch.manual_seed(0)
    model, x, seen = prune(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), 0.5), torch.randn(4, 16), []
    plain = copy.deepcopy(model)
    handles = [
        model[0].register_forward_hook(lambda module, args, out: out * 2),
        model[1].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True),
        model[1].register_full_backward_hook(lambda module, grads, out: seen.append(out[0].shape)),
    ]
    expected = model(x)
    sp.sparsify_(model, layout="csr")
    assert all(isinstance(m, sp.SparseLinear) for m in model)
    close(model(x), expected)
    model(x).sum().backward()
    assert seen == [(4, 16)]
    sp.densify_(model)
    close(model(x), expected)
    sp.sparsify_(model, layout="csr")
    for handle in handles:
        handle.remove()
    close(model(x), plain(x))


class Tripled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 3


class TripledByCall(nn.Linear):
    def __call__(self, input):
        return super().__call__(input) * 3


@pytest.mark.parametrize("kind", [Tripled, TripledByCall])
def test_a_linear_with_a_forward_of_its_own_stays(kind, close):
    model, x = prune(nn.Sequential(nn.Linear(16, 16), kind(16, 16), nn.Linear(16, 16)), 0.5), torch.randn(4, 16)
    model[2].forward = lambda input: input + 1
    expected = model(x)
    report = sp.sparsify_(model, layout="csr")
    assert [type(m) for m in model] == [sp.SparseLinear, kind, nn.Linear]
    name = "forward" if kind is Tripled else "__call__"
    assert f"{name} of its own" in report["1"].reason and "was replaced" in report["2"].reason
    close(model(x), expected)


class Noting(Feed):
    calls = 0

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return super().forward(x)


def test_what_a_fused_block_notes_at_itself_stays():
    model, x = prune(nn.Sequential(Noting()), 0.5).eval(), torch.randn(2, 16)
    assert [f.reason for f in sp.sparsify_(model, layout="csr").fusions] == [""]
    calls = model[0].calls
    model(x), model(x)
    assert model[0].calls == calls + 2 and model[0].last is x and model[0]._modules["dense"].nnz
    assert isinstance(model[0].dense, sp.SparseLinear) and isinstance(model[0].act, nn.ReLU)


class Gated(nn.Module):
    """As Llama's feed-forward: one activation between two Linears that read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_an_activation_is_fused_with_one_linear(close):
    model = prune(nn.Sequential(Gated()), 0.5).eval()
    x = torch.randn(3, 24)
    with torch.no_grad():
        expected = model(x)
        report = sp.sparsify_(model, layout="csr")
        assert [(f.name, f.what) for f in report.fusions] == [("0.gate", "silu")]
        close(model(x), expected)
        model[0].gate.register_forward_hook(lambda module, args, result: None)
        close(model(x), expected)


@pytest.mark.parametrize("tokens", [0, (), (1, 0), 1.5, (1, 2.0), "12", (1, "a"), None], ids=repr)
def test_tokens_that_count_nothing_are_refused(tokens):
    model = prune(nn.Sequential(nn.Linear(8, 8)), 0.5)
    with pytest.raises(ValueError, match="tokens expected one or more whole numbers >= 1, got "):
        sp.sparsify_(model, tokens=tokens)
    assert type(model[0]) is nn.Linear
