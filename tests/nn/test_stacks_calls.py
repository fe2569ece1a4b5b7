"""When a stack's layers answer instead of the program, and what becomes of the program when something changes."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from stack_models import make, programs, prune_, sparse, stack, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparseprune as sp
from sparseprune.nn.stacks import drop_stacks_, stack_of, use_stacks_
from sparseprune.nn.stacks.masks import Unsupported, real_tokens


@pytest.fixture
def model():
    """BERT with a stack."""
    pytest.importorskip("transformers")
    return sparse("bert")


IDS = tokens(2, 9)


def by_layers(model: nn.Module) -> torch.Tensor:
    undone = copy.deepcopy(model)
    drop_stacks_(undone)
    with torch.no_grad():
        return undone(input_ids=IDS).last_hidden_state


def check(model: nn.Module, answered_by_program: bool = True) -> None:
    """The model gives what its layers give, through the program or not."""
    expected = by_layers(model)
    with torch.no_grad(), programs(model) as notes:
        found = model(input_ids=IDS).last_hidden_state
    assert [note is None for note in notes] == [answered_by_program], notes
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def reason(model: nn.Module, **more) -> str | None:
    with programs(model) as notes:
        model(input_ids=IDS, **more)
    return notes[0]


def test_a_gradient_is_the_layers(model):
    assert reason(model) == "a gradient is needed"
    model(input_ids=IDS).last_hidden_state.square().mean().backward()
    assert model.encoder.layer[0].output.dense.values.grad is not None
    model.requires_grad_(False)
    assert reason(model) is None
    embedded = torch.randn(2, 9, 36, requires_grad=True)
    assert stack(model).why_not(embedded) == "a gradient is needed"


def test_training_and_back(model):
    model.train()
    with torch.no_grad():
        assert reason(model) == "a module inside is in training mode"
    model.eval()
    check(model)
    model.encoder.layer[1].output.dropout.train()
    with torch.no_grad():
        assert reason(model) == "a module inside is in training mode"


def test_hooks_are_called(model):
    seen = []
    for module in (model.encoder.layer[1], model.encoder.layer[0].output.dense):
        handle = module.register_forward_hook(lambda *args: seen.append(1))
        with torch.no_grad():
            assert reason(model) == "a hook observes a module inside"
        handle.remove()
        check(model)
    assert len(seen) == 2
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    with torch.no_grad():
        assert reason(model) == "a global module hook is set"
    handle.remove()


def test_a_replaced_forward_is_called(model):
    layer = model.encoder.layer[0]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states * 0
    with torch.no_grad():
        assert reason(model) == "the forward of a module inside was replaced"
    del layer.forward
    check(model)


def test_modes_and_dtypes(model):
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert reason(model) == "autocast is active"
        with Nothing():
            assert reason(model) == "a torch dispatch or function mode is active"
        assert "in float32" in stack(model).why_not(torch.randn(2, 5, 36).double())
        assert "needs float32 parameters" in stack(model.bfloat16()).why_not(torch.randn(2, 5, 36))
        model.float()
        check(model)


def test_hidden_states_of_every_layer(model):
    with torch.no_grad():
        expected = copy.deepcopy(model)
        drop_stacks_(expected)
        expected = expected(input_ids=IDS, output_hidden_states=True).hidden_states
        found = model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert len(found) == 3 and all(map(torch.equal, found, expected))
        check(model)  # hooks stay on the layers, idle
        model.config.output_hidden_states = True
        found = model(input_ids=IDS).hidden_states
        assert len(found) == 3 and all(map(torch.equal, found, expected))
        assert stack(model).why_not(torch.randn(2, 5, 36)) == "config.output_hidden_states is set"
        model.config.output_hidden_states = False
        check(model)


def test_an_outer_model_records(model):
    """What records is known by the hooks on the layers alone where the call does not say it."""
    capturing = pytest.importorskip("transformers.utils.output_capturing")
    x = torch.randn(2, 5, 36)
    with torch.no_grad():
        model(input_ids=IDS, output_hidden_states=True)
        assert stack(model).why_not(x) is None
        token = capturing._active_collector.set({"hidden_states": []})
        try:
            assert stack(model).why_not(x) == "a hook observes a module inside"
        finally:
            capturing._active_collector.reset(token)


def test_mpnet_collects_hidden_states_itself():
    pytest.importorskip("transformers")
    model = sparse("mpnet")
    with torch.no_grad():
        undone = copy.deepcopy(model)
        drop_stacks_(undone)
        for options in ({"output_hidden_states": True}, {"output_attentions": True}):
            found, expected = model(input_ids=IDS, **options), undone(input_ids=IDS, **options)
            for one, other in zip(
                found.hidden_states or found.attentions, expected.hidden_states or expected.attentions
            ):
                assert torch.equal(one, other)


def test_attention_weights(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=IDS, output_attentions=True).attentions
        assert len(found) == 2 and found[0].shape == (2, 3, 9, 9)
        check(model)


def test_masks_of_one_query_each(model):
    """A causal mask, or one of the user's, is more than padding."""
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    with torch.no_grad():
        undone = copy.deepcopy(model)
        drop_stacks_(undone)
        assert "more than padding" in stack(model).why_not(torch.randn(2, 9, 36), causal)
        found = model(input_ids=IDS, attention_mask=causal).last_hidden_state
        assert torch.equal(found, undone(input_ids=IDS, attention_mask=causal).last_hidden_state)


def test_position_ids_given(model):
    """BERT's places are in its embeddings."""
    places = torch.arange(9).flip(0).expand(2, 9)
    with torch.no_grad():
        assert reason(model, position_ids=places) is None


def test_modernbert_takes_masks_and_places_of_the_user():
    pytest.importorskip("transformers")
    model = sparse("modernbert")
    undone = copy.deepcopy(model)
    drop_stacks_(undone)
    with torch.no_grad():
        for places in (torch.arange(9).flip(0)[None], torch.stack([torch.arange(9), torch.arange(9).flip(0)])):
            with programs(model) as notes:
                found = model(input_ids=IDS, position_ids=places).last_hidden_state
            assert (notes[0] is None) == (len(places) == 1)
            expected = undone(input_ids=IDS, position_ids=places).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        full = torch.ones(2, 1, 9, 9, dtype=torch.bool)
        masks = {"full_attention": full, "sliding_attention": full}  # no window: not what the layers were made for
        with programs(model) as notes:
            found = model(input_ids=IDS, attention_mask=masks).last_hidden_state
        assert "more than padding" in notes[0]
        assert torch.equal(found, undone(input_ids=IDS, attention_mask=masks).last_hidden_state)


@pytest.mark.parametrize(
    "change", ["value", "data", "bias", "replaced", "norm", "loaded", "assigned", "swapped module"]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_changed_weights(model, change, frozen):
    model.requires_grad_(not frozen)
    check(model)
    assert (not stack(model)._bound.weights._copied._others) == frozen
    block = model.encoder.layer[1].output
    with torch.no_grad():
        if change == "value":
            block.dense.values.mul_(2)
        elif change == "data":
            block.dense.values.data = block.dense.values.data * 2
        elif change == "bias":
            block.dense.bias.data = block.dense.bias.data + 1
        elif change == "replaced":
            block.dense.bias = nn.Parameter(block.dense.bias * 3 + 1, requires_grad=not frozen)
        elif change == "norm":
            block.LayerNorm.weight.data.add_(1)
        elif change == "loaded":
            model.load_state_dict(
                {name: t * 1.5 if t.is_floating_point() else t for name, t in model.state_dict().items()}
            )
        elif change == "assigned":
            state = {name: t * 1.5 if t.is_floating_point() else t for name, t in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        else:
            attention = model.encoder.layer[1].attention.self
            attention.query = nn.Linear(36, 36).requires_grad_(not frozen).eval()
    check(model)


@pytest.mark.parametrize("fused", [False, True])
def test_optimisers(model, fused):
    """A fused one leaves version counters alone."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    for _ in range(2):
        check(model)
        model(input_ids=IDS).last_hidden_state.square().mean().backward()
        check(model)  # between the gradient and the step
        optimiser.step()
        optimiser.zero_grad()
        check(model)


def test_a_write_to_frozen_values_and_repack(model):
    model.requires_grad_(False)
    check(model)
    layer = model.encoder.layer[0].intermediate.dense
    layer.values.data.mul_(2)
    layer.repack()
    check(model)


def test_copies_and_pickles(model):
    check(model)
    copied = copy.deepcopy(model)
    assert stack(copied).owner is copied.encoder
    with torch.no_grad():
        copied.encoder.layer[0].output.dense.values.mul_(2)
    check(copied)
    check(model)
    restored = pickle.loads(pickle.dumps(model))
    assert stack(restored).owner is restored.encoder
    check(restored)
    assert torch.equal(by_layers(restored), by_layers(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    check(torch.load(buffer, weights_only=False))


def test_names_and_types_stay(model):
    undone = copy.deepcopy(model)
    drop_stacks_(undone)
    assert list(undone.state_dict()) == list(model.state_dict())
    assert [(n, type(m)) for n, m in undone.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert isinstance(model.encoder.layer, nn.ModuleList) and len(list(model.encoder.layer)) == 2
    layer = model.encoder.layer[0]
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 2, 36)), next(iter(model.encoder.layer))(torch.ones(1, 2, 36)))


def test_a_saved_file_does_not_depend_on_it(model, tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    sp.save(model, tmp_path / "with.safetensors")
    drop_stacks_(model)
    sp.save(model, tmp_path / "without.safetensors")
    held, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("with", "without"))
    assert held.keys() == other.keys() and all(torch.equal(held[name], other[name]) for name in held)
    loaded = sp.load(make("bert"), tmp_path / "with.safetensors").eval()
    use_stacks_(loaded, "program")
    check(loaded)
    torch.testing.assert_close(by_layers(loaded), by_layers(model), rtol=1e-4, atol=1e-4)


def test_compiled_graphs_hold_the_layers(model):
    expected = by_layers(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    check(model)


def test_export(model):
    with torch.no_grad():
        program = torch.export.export(model.encoder, (torch.randn(2, 9, 36),), strict=False)
        x = torch.randn(2, 9, 36)
        found = program.module()(x)
        found = found if isinstance(found, torch.Tensor) else found[0]
        torch.testing.assert_close(found, model.encoder(x)[0], rtol=1e-4, atol=1e-4)


def test_many_threads(model):
    """The first calls of all at once: packing, proof and program are made once, and every answer is right."""
    stack(model).__setstate__(stack(model).__getstate__())
    expected, wrong, barrier = by_layers(model), [], threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(5):
                found = model(input_ids=IDS).last_hidden_state
                if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                    wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_in_training_gets_its_stack():
    pytest.importorskip("transformers")
    trained = prune_(make("bert").train())
    report = sp.sparsify_(trained, layout="csr", filter_fn=lambda module, fqn: "layer" in fqn, engine="program")
    assert report.stacks[0].engine == "program" and trained.encoder.layer[0].training
    check(trained.eval())


def test_another_backend_is_asked_for(model, monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
    with torch.no_grad():
        assert "SPARSEPRUNE_BACKEND" in reason(model)


def test_low_rank_terms_keep_the_layers(model):
    drop_stacks_(model)
    layer = model.encoder.layer[0].output.dense
    layer.set_low_rank_(torch.randn(2, 50), torch.randn(36, 2))
    (choice,) = use_stacks_(model, "program")
    assert (choice.engine, choice.reason) == ("layers", "a low-rank term")
    assert stack_of(model.encoder) is None


@pytest.mark.parametrize(
    "mask, window, message",
    [
        (torch.zeros(2, 1, 5, 5), -1, None),
        (torch.tensor([0.0, 0, 0, 0, float("-inf")]).expand(2, 1, 1, 5), -1, None),
        (torch.zeros(2, 3, 5, 5), -1, "shape"),
        (torch.zeros(2, 1, 5, 5).fill_(0.5), -1, "adds more than 0"),
        (torch.ones(2, 1, 5, 5, dtype=torch.long), -1, "dtype"),
        (torch.ones(2, 1, 4, 5, dtype=torch.bool), -1, "4 rows for 5 queries"),
        (torch.ones(2, 1, 5, 5, dtype=torch.bool), 2, "more than padding"),
        (None, 2, "no mask keeps"),
        (None, 4, None),
        (torch.ones(2, 5, dtype=torch.bool), 2, "does not keep tokens to the window"),
        ("causal", -1, "not a tensor"),
    ],
)
def test_masks(mask, window, message):
    if message is None:
        real_tokens(mask, 2, 5, window, True)
    else:
        with pytest.raises(Unsupported, match=message):
            real_tokens(mask, 2, 5, window, True)


class Negated(nn.LayerNorm):
    def forward(self, input):
        return -super().forward(input)


def other_places(layer):
    """The same number of entries a row, in the first columns."""
    counts = layer.crow_indices.diff().tolist()
    return torch.cat([torch.arange(n) for n in counts]).to(layer.col_indices.dtype)


@pytest.mark.parametrize("change", ["eps", "scaling", "activation", "class", "indices"])
def test_what_layers_compute_with_beside_parameters(model, change):
    """Attributes, classes and buffers that are set once the program is bound."""
    model.requires_grad_(False)
    check(model)
    first = by_layers(model)
    layer = model.encoder.layer[0]
    if change == "eps":
        layer.output.LayerNorm.eps = 2.0
    elif change == "scaling":
        layer.attention.self.scaling = 1.5
    elif change == "activation":
        layer.attention.self.query.activation = "relu"
    elif change == "class":
        layer.output.LayerNorm.__class__ = Negated
    else:
        layer.output.dense.col_indices = other_places(layer.output.dense)
    assert not torch.allclose(by_layers(model), first, atol=1e-3)
    check(model, change != "class")
    model.train()
    model.eval()
    check(model, change != "class")


def dense_queries():
    model = prune_(make("bert"))
    sp.sparsify_(
        model, layout="csr", engine="program", filter_fn=lambda module, fqn: "layer" in fqn and "query" not in fqn
    )
    return model.requires_grad_(False)


def test_a_write_to_a_dense_weight_of_the_stack():
    """It has no repack, and its frozen state says nothing: adapters are merged through ``.data``."""
    pytest.importorskip("transformers")
    model = dense_queries()
    check(model)
    for _ in range(2):
        before = by_layers(model)
        model.encoder.layer[0].attention.self.query.weight.data.mul_(3)
        assert not torch.allclose(by_layers(model), before, atol=1e-3)
        check(model)


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_that_is_merged(trained):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = dense_queries()
    check(model)
    before = by_layers(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(4)
    if trained:
        adapted.train()
        adapted(input_ids=IDS).last_hidden_state.sum().backward()
        adapted.eval()
    merged = adapted.merge_and_unload()
    assert not torch.allclose(by_layers(merged), before, atol=1e-3)
    check(merged)


def test_a_sequence_that_begins_with_padding(model):
    """Heads read the first token, which the program would leave zero; a sequence of padding alone is one of them."""
    undone = copy.deepcopy(model)
    drop_stacks_(undone)
    for place in (slice(0, 3), slice(0, 9)):
        real = torch.ones(2, 9, dtype=torch.long)
        real[1, place] = 0
        with torch.no_grad(), programs(model) as notes:
            found = model(input_ids=IDS, attention_mask=real)
        assert "begins with padding" in notes[0]
        expected = undone(input_ids=IDS, attention_mask=real)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)


class Tagger(nn.Module):
    """Hidden states read by a recurrence, which runs over the padding."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.rnn = encoder, nn.LSTM(36, 8, bidirectional=True, batch_first=True)

    def forward(self, **call):
        return self.rnn(self.encoder(**call).last_hidden_state)[0]


def test_padding_that_something_behind_the_stack_reads():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, vocab_size=50
    )
    real = torch.ones(2, 9, dtype=torch.long)
    for model, read in (
        (Tagger(make("bert")), lambda out: out),
        (transformers.BertForQuestionAnswering(config), lambda out: out.start_logits),
    ):
        model = prune_(model.eval()).requires_grad_(False)
        dense = copy.deepcopy(model)
        report = sp.sparsify_(model, layout="csr", engine="program", filter_fn=lambda module, fqn: "layer" in fqn)
        assert [choice.engine for choice in report.stacks] == ["program"]
        for each, padded in ((model, False), (pickle.loads(pickle.dumps(model)), True)):
            real[0, 5:] = int(not padded)
            with torch.no_grad(), programs(each) as notes:
                found = read(each(input_ids=IDS, attention_mask=real))
                expected = read(dense(input_ids=IDS, attention_mask=real))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert ("reads across tokens" in (notes[0] or "")) == padded


def test_canine_reads_its_padding_between_its_stacks():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CanineConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, max_position_embeddings=64,
        num_hash_buckets=64, local_transformer_stride=16,
    )  # fmt: skip
    model = transformers.CanineModel(config).eval().requires_grad_(False)
    dense = copy.deepcopy(model)
    assert "program" in {choice.engine for choice in sp.nn.stacks.use_stacks_(model, "program")}
    real = torch.ones(2, 32, dtype=torch.long)
    real[0, 20:] = 0
    call = {"input_ids": torch.randint(5, 99, (2, 32)), "attention_mask": real}
    with torch.no_grad():
        found, expected = (each(**call).last_hidden_state[real.bool()] for each in (model, dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_structure_with_the_names_of_another_keeps_its_layers():
    """Longformer's layers have the children of BERT's, and no attention_head_size."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LongformerConfig(
        hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, vocab_size=50,
        attention_window=8,
    )  # fmt: skip
    (choice,) = sp.nn.stacks.use_stacks_(transformers.LongformerModel(config).eval(), "program")
    assert choice.engine == "layers" and "another structure" in choice.reason
