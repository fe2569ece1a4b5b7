"""The trainer: every method and granularity, resuming, time limits, recovery, and what it leaves behind."""

from __future__ import annotations

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseprune import NM, Block, CubicSchedule, Heads, Neurons, RetentionSchedule, SparseLinear, load, save
from sparseprune.data import Augment, TokenLoader
from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner
from sparseprune.pruning import Mixture
from sparseprune.pruning.masks import MaskSet
from sparseprune.runner.text_encoder import TextEncoder
from sparseprune.training import DistillConfig, DistillPruner, compare, evaluate
from sparseprune.training.position import first_inputs

SMALL = DiscriminatorConfig(depth=2, width=32, rows=32)


def task(count=192, seed=0, length=10):
    """Sequences whose class is the most frequent of three marker tokens."""
    generator = torch.Generator().manual_seed(seed)
    sequences, labels = [], []
    for _ in range(count):
        size = int(torch.randint(3, length, (1,), generator=generator))
        ids = torch.randint(4, 20, (size,), generator=generator).tolist()
        label = int(torch.randint(0, 3, (1,), generator=generator))
        ids[0] = ids[-1] = 20 + label
        sequences.append(ids)
        labels.append(label)
    return sequences, labels


def loader(augment=None, **options):
    sequences, labels = task(**options)
    return TokenLoader(sequences, labels, batch_size=32, shuffle=True, seed=1, augment=augment)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = TextEncoder(23, 3, hidden=32, ffn=64, layers=2, heads=2, max_length=12)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for batch in loader():
            loss = nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    assert evaluate(model, loader(seed=9))["accuracy"] > 0.95
    return model


def config(method="gan", **settings):
    base = {"schedule": RetentionSchedule(0.1, 0.1), "epochs": 4.0, "lr": 2e-3}
    if method == "gan":
        return GANConfig(**{**base, "discriminator": SMALL, **settings})
    return DistillConfig(method=method, **{**base, **settings})


def pruner_for(model, config=None, *more, **options):
    """The trainer that takes this configuration."""
    return (GANPruner if config.adversarial else DistillPruner)(model, config, *more, **options)


@pytest.mark.parametrize("method", ["gan", "scores", "magnitude", "movement"])
def test_every_method_reaches_its_exact_count_and_keeps_the_task(trained, method):
    pruner = pruner_for(copy.deepcopy(trained), config(method=method, epochs=10.0))
    history = pruner.fit(loader(), loader(seed=9))
    model = pruner.finalize()
    total = sum(m.numel() for m in pruner.masks.values())
    assert sum(int(m.sum()) for m in pruner.masks.values()) == total - round(0.9 * total)
    for name, mask in pruner.masks.items():
        assert torch.all(model.get_submodule(name).weight[~mask] == 0)
    assert evaluate(model, loader(seed=9))["accuracy"] > 0.85
    assert list(model.state_dict()) == list(trained.state_dict())
    assert ("discriminator_accuracy" in history.steps[-1]) == (method == "gan")
    assert history.steps[0]["density"] == 1.0 and history.steps[-1]["phase"] == "heal"
    pickle.loads(pickle.dumps(model))
    copy.deepcopy(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("density", [0.1, 0.01])
def test_both_retention_factors_of_the_article_run_to_the_end(trained, density):
    pruner = pruner_for(copy.deepcopy(trained), config(schedule=RetentionSchedule(0.1, density), density=density))
    pruner.fit(loader())
    total = pruner.gates.total
    assert pruner.gates.kept == total - round((1 - density) * total)


@pytest.mark.parametrize(
    ("granularity", "schedule"),
    [
        (Block(8, 1), CubicSchedule(0.25)),
        (NM(2, 4), CubicSchedule(0.5)),
        ({"*.ffn.*": Neurons(), "*": Heads()}, CubicSchedule(0.5)),
        ({"*.ffn.*": Block(4, 4), "*": "element"}, CubicSchedule(0.25)),
    ],
)
def test_granularities_in_the_loop(trained, granularity, schedule):
    pruner = pruner_for(copy.deepcopy(trained), config(granularity=granularity, schedule=schedule))
    history = pruner.fit(loader())
    model = pruner.finalize()
    assert pruner.density == pytest.approx(schedule.final_density, abs=0.02)
    assert all(a["density"] >= b["density"] for a, b in itertools.pairwise(history.steps))
    ffn = pruner.masks["layers.0.ffn.expand"]
    if granularity == Block(8, 1):
        assert torch.equal(ffn.view(8, 8, 32).all(1), ffn.view(8, 8, 32).any(1))
    if granularity == NM(2, 4):
        assert (ffn.view(64, 8, 4).sum(-1) == 2).all()
    if isinstance(granularity, dict) and "*.ffn.*" in granularity and granularity["*.ffn.*"] == Neurons():
        assert torch.equal(ffn.any(1), model.get_submodule("layers.0.ffn.contract").weight.ne(0).any(0))


def test_both_stages_of_a_mixture_have_scores_of_their_own_and_a_floor_holds(trained):
    settings = config(granularity=Mixture(Block(4, 4)), schedule=RetentionSchedule(0.1, 0.2), floor=0.5)
    pruner = pruner_for(copy.deepcopy(trained), settings)
    shapes = {key: tuple(score.shape) for key, score in pruner.gates.scores.items()}
    assert shapes["layers.0.query"] == (8, 8) and shapes["layers.0.query:then"] == (32, 32)
    assert len(shapes) == 2 * len(pruner.masks)
    pruner.fit(loader())
    total = pruner.gates.total
    assert pruner.gates.kept == total - round(0.8 * total)
    assert all(float(mask.float().mean()) >= 0.099 for mask in pruner.masks.values())


def test_a_pattern_that_fixes_its_density_refuses_another(trained):
    with pytest.raises(ValueError, match=r"use a schedule such as CubicSchedule\(0.5\)"):
        pruner_for(copy.deepcopy(trained), config(granularity=NM(2, 4)))


def frozen_at_once(**settings):
    """Nothing is learned: only what the freeze does to the weights can be seen."""
    return config(
        method="magnitude", steps=4, lr=1e-9, weight_decay=0.0, warmup=0.0, prune_until=0.5, freeze_at=0.99,
        **{"schedule": RetentionSchedule(0.1, 0.3), **settings},
    )  # fmt: skip


def compensated(pruner):
    return next(e for e in pruner.history.events if e["event"] == "compensated")


def chosen(pruner):
    return compensated(pruner)["chosen"]


def test_compensation_brings_the_frozen_student_nearer_to_the_unmasked_one(trained):
    """With nothing learned in between, what compensation gives back answers better than masking alone."""
    distances, kinds = {}, {}
    for compensation in ("none", "bias", "survivors", "low_rank", "best"):
        pruner = pruner_for(copy.deepcopy(trained), frozen_at_once(compensation=compensation))
        pruner.fit(loader(), loader(seed=9) if compensation == "best" else None)
        model = pruner.finalize().eval()
        batch = next(iter(loader(seed=3)))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            distances[compensation] = float((model(**inputs) - trained(**inputs)).square().mean())
        kinds[compensation] = set() if compensation == "none" else set(chosen(pruner).values())
        # The budget is that of the masks alone, to the weight.
        total = pruner.gates.total
        assert pruner.gates.kept == total - round(0.7 * total)
        held = [model.get_submodule(name) for name in pruner.masks]
        spent = [m.nnz if isinstance(m, SparseLinear) else int((m.weight != 0).sum()) for m in held]
        assert sum(spent) <= total - round(0.7 * total)
        if compensation != "none":
            errors = compensated(pruner)["errors"].values()
            assert all(own <= mask for mask, own in errors) and any(own < 0.95 * mask for mask, own in errors)
        if compensation == "bias":
            shifts = {n: model.get_parameter(f"{n}.bias") - trained.get_parameter(f"{n}.bias") for n in pruner.masks}
            assert {n for n, s in shifts.items() if s.abs().max() > 1e-4} == {
                n for n, kind in chosen(pruner).items() if kind == "bias"
            }  # fmt: skip
    assert kinds["bias"] == {"mask", "bias"}
    assert kinds["survivors"] <= {"mask", "bias", "survivors", "survivors and bias"}
    assert any(kind.startswith("rank") for kind in kinds["low_rank"])
    assert kinds["low_rank"] <= {"mask", *(f"rank {2**i}" for i in range(8))}
    assert distances["survivors"] < 0.1 * distances["none"] and distances["best"] < 0.1 * distances["none"]


class Tanned(nn.Module):
    """A Linear that is nearly of rank two: what sparsity cannot keep, two factors can."""

    def __init__(self):
        super().__init__()
        self.inner, self.classifier = nn.Linear(48, 40), nn.Linear(40, 3)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(40, 2) @ torch.randn(2, 48) / 5 + 0.01 * torch.randn(40, 48))

    def forward(self, x):
        return self.classifier(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("granularity", ["element", "4x1", Mixture(Block(4, 4))], ids=str)
def test_low_rank_terms_are_paid_for_trained_saved_and_run_sparse(granularity, close, tmp_path, fussy_blas):
    torch.manual_seed(0)
    model = Tanned()
    x = torch.randn(128, 48)
    batches = [(x[i : i + 32], x[i : i + 32, :3].argmax(1)) for i in range(0, 128, 32)]
    settings = config(
        method="magnitude",
        compensation="low_rank",
        granularity=granularity,
        schedule=CubicSchedule(0.2),
        steps=24,
        lr=1e-2,
    )
    pruner = pruner_for(model, settings)
    found = {}

    def watch(record):
        layer = model.inner
        if record["phase"] == "heal" and not found:
            found.update(a=layer.low_rank_a.detach().clone(), w=layer.weight.detach().clone())

    history = pruner.fit(batches, batches, callback=watch)
    assert chosen(pruner)["inner"] in ("rank 2", "rank 4")
    healed = pruner.model.inner
    rank = len(healed.low_rank_a)
    assert not torch.equal(found["a"], healed.low_rank_a) and not torch.equal(found["w"], healed.weight)
    assert torch.equal(healed.weight != 0, pruner.masks["inner"])
    budget = 40 * 48 - round(0.8 * 40 * 48)
    spent = int(pruner.masks["inner"].sum()) + rank * 88
    assert spent == budget if granularity != "4x1" else budget - 4 < spent <= budget
    assert history.steps[-1]["density"] == spent / (40 * 48) == pruner.density
    with torch.no_grad():
        before = model(x)
        final = pruner.finalize()
        assert type(final.inner) is SparseLinear and final.inner.layout == ("bsr" if granularity == "4x1" else "csr")
        assert final.inner.nnz == spent and pruner.finalize() is final
        close(final(x), before)
        save(final, tmp_path / "m.safetensors")
        again = load(Tanned(), tmp_path / "m.safetensors")
        assert torch.equal(again(x), final(x)) and len(again.inner.low_rank_a) == rank
        assert final.inner.low_rank_a.is_contiguous() and final.inner.low_rank_b.is_contiguous()
    pickle.loads(pickle.dumps(final))


def test_rank_zero_is_an_answer(trained):
    """Low-rank terms worth 2 of 16 inputs' weights cannot pay for a diagonal."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16) * 3 + 0.01 * torch.randn(16, 16))
    x = torch.randn(64, 16)
    batches = [(x[:32], x[:32, :3].argmax(1)), (x[32:], x[32:, :3].argmax(1))]
    settings = frozen_at_once(compensation="low_rank", schedule=CubicSchedule(0.4), granularity={"0": "element"})
    pruner = pruner_for(model, settings)
    pruner.fit(batches, batches)
    assert chosen(pruner) == {"0": "mask"} and isinstance(pruner.finalize()[0], nn.Linear)


def test_the_split_is_chosen_on_the_validation_data():
    """Inputs of few dimensions: what is fitted to one plane is of no use in another."""
    torch.manual_seed(0)
    made = {}
    for name in ("alike", "unlike"):
        model = Tanned()
        plane, another = torch.randn(6, 48), torch.randn(6, 48)
        x, other = torch.randn(256, 6) @ plane, torch.randn(256, 6) @ (plane if name == "alike" else another)
        train = [(x[i : i + 32], x[i : i + 32, :3].argmax(1)) for i in range(0, 256, 32)]
        valid = [(other[i : i + 32], other[i : i + 32, :3].argmax(1)) for i in range(0, 256, 32)]
        pruner = pruner_for(model, frozen_at_once(compensation="survivors", schedule=CubicSchedule(0.5)))
        pruner.fit(train, valid)
        made[name] = chosen(pruner)["inner"]
    assert made["alike"].startswith("survivors") and not made["unlike"].startswith("survivors")


@pytest.mark.parametrize("granularity", [NM(2, 4), Heads(), Mixture(Heads())], ids=str)
def test_what_must_keep_its_pattern_gets_no_low_rank_term(trained, granularity):
    settings = {"granularity": granularity, "schedule": CubicSchedule(0.5)}
    with pytest.raises(ValueError, match=r'takes single weights or blocks off the mask.*use "survivors"'):
        pruner_for(copy.deepcopy(trained), config(compensation="low_rank", **settings))
    pruner = pruner_for(copy.deepcopy(trained), frozen_at_once(compensation="best", **settings))
    pruner.fit(loader())
    assert not any(kind.startswith("rank") for kind in chosen(pruner).values())
    assert all(isinstance(pruner.finalize().get_submodule(name), nn.Linear) for name in pruner.masks)


@pytest.mark.parametrize(("rows", "left"), [(1, ["0", "2"]), (4, [])])
def test_a_layer_is_fitted_to_the_last_batches_or_left_alone(rows, left):
    """Eight rows or more are needed, which one batch does not have."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    batches = [(torch.randn(rows, 8), torch.zeros(rows, dtype=torch.long)) for _ in range(4)]
    pruner = pruner_for(model, frozen_at_once(compensation="survivors"))
    pruner.fit(batches)
    assert compensated(pruner)["left"] == left


def test_reading_the_validation_data_moves_nothing_random():
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.zeros(64, dtype=torch.long))
    shuffled = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model, cpu = nn.Linear(8, 2), torch.device("cpu")
    before = torch.get_rng_state()
    assert [len(x) for x in first_inputs(shuffled, 8, cpu, model)] == [4] * 8
    assert torch.equal(torch.get_rng_state(), before) and first_inputs(None, 8, cpu, model) == []


class Two(nn.Module):
    """Two inputs, given by position."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.classifier = nn.Linear(8, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x, y):
        return self.classifier(torch.relu(self.first(x) + self.second(y)))


def test_a_model_of_two_inputs_is_compensated_too():
    batches = [((torch.randn(8, 8), torch.randn(8, 6)), torch.arange(8) % 3) for _ in range(4)]
    pruner = pruner_for(Two(), frozen_at_once(compensation="best"))
    pruner.fit(batches, batches)
    assert set(chosen(pruner)) == {"first", "second"}


def test_layer_scope_keeps_the_share_of_each_layer(trained):
    pruner = pruner_for(copy.deepcopy(trained), config(scope="layer"))
    pruner.fit(loader())
    for mask in pruner.masks.values():
        assert int(mask.sum()) == mask.numel() - round(0.9 * mask.numel())


def test_the_same_seed_gives_the_same_masks_and_another_does_not(trained):
    def hash_of(seed):
        pruner = pruner_for(copy.deepcopy(trained), config(seed=seed, gumbel=0.02))
        pruner.fit(loader())
        return MaskSet(pruner.masks).mask_hash()

    assert hash_of(0) == hash_of(0)
    assert hash_of(0) != hash_of(1)


class Killed(Exception):
    pass


@pytest.mark.parametrize("compensation", ["survivors", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_step_resumes_to_the_bit(trained, tmp_path, compensation, fussy_blas):
    settings = config(
        gumbel=0.02, dropout=True, accumulate=2, evaluate_every=5, epochs=7.0, compensation=compensation,
        schedule=RetentionSchedule(0.1, 0.3),
    )  # fmt: skip

    def data():
        return loader(augment=Augment(drop=0.1, mask=0.1), count=128)

    def valid():
        return loader(seed=9, count=64)

    whole = pruner_for(copy.deepcopy(trained), settings)
    torch.manual_seed(5)
    history = whole.fit(data(), valid(), checkpoint=tmp_path / "whole", checkpoint_every=1)
    assert len(history.steps) == 14
    frozen = next(step["step"] for step in history.steps if step["phase"] == "heal")
    for stop in (0, 5, frozen - 1, frozen, 13):

        def kill(record, stop=stop):
            if record["step"] == stop:
                raise Killed

        torch.manual_seed(5)
        path = tmp_path / f"killed{stop}"
        with pytest.raises(Killed):
            killed = pruner_for(copy.deepcopy(trained), settings)
            killed.fit(data(), valid(), checkpoint=path, checkpoint_every=1, callback=kill)
        torch.manual_seed(77)
        again = pruner_for(copy.deepcopy(trained), settings)
        if not path.exists():  # killed before the first was written: nothing but the start is left
            torch.manual_seed(5)
        resumed = again.fit(data(), valid(), checkpoint=path, checkpoint_every=1)
        assert resumed.to_dict() == history.to_dict()
        for name, value in whole.finalize().state_dict().items():
            assert torch.equal(value, again.finalize().state_dict()[name]), (stop, name)
        assert MaskSet(whole.masks).mask_hash() == MaskSet(again.masks).mask_hash()


def test_a_resume_does_not_hang_on_where_the_data_lies(tmp_path, fussy_blas):
    """What a loader cuts from a larger tensor lies elsewhere in the next process; a checkpoint has none of the rest."""
    torch.manual_seed(0)
    model, rows = Tanned(), torch.randn(64, 48)
    labels = rows[:, :3].argmax(1)
    settings = config(method="magnitude", compensation="survivors", schedule=CubicSchedule(0.2), steps=12, lr=1e-2)

    def run(path, begin, stop=None):
        memory = torch.zeros(1_000_000)
        data = memory[begin : begin + rows.numel()].view(rows.shape).copy_(rows)
        batches = [(data[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]

        def kill(record):
            if record["step"] == stop:
                raise Killed

        pruner = pruner_for(copy.deepcopy(model), settings)
        pruner.fit(batches, batches, checkpoint=path, checkpoint_every=1, callback=kill)
        return pruner.finalize().state_dict()

    whole = run(tmp_path / "a", 0)
    with pytest.raises(Killed):
        run(tmp_path / "b", 0, stop=5)
    assert (tmp_path / "b").stat().st_size < 500_000
    for name, value in run(tmp_path / "b", 1).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("whose", ["global", "its own", "its sampler's"])
def test_a_plain_shuffling_dataloader_resumes_too(tmp_path, whose):
    torch.manual_seed(0)
    x = torch.randn(96, 8)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    settings = config(epochs=6.0)

    def run(path, stop=None):
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(8)
        options = {"shuffle": True, "generator": own if whose == "its own" else None}
        if whose == "its sampler's":
            options = {"sampler": torch.utils.data.RandomSampler(data, generator=own)}
        made = torch.utils.data.DataLoader(data, batch_size=16, **options)

        def kill(record):
            if record["step"] == stop:
                raise Killed

        pruner = pruner_for(copy.deepcopy(model), settings)
        pruner.fit(made, checkpoint=path, checkpoint_every=4, callback=kill)
        return pruner.finalize().state_dict()

    whole = run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", stop=21)
    for name, value in run(tmp_path / "b").items():
        assert torch.equal(value, whole[name])


def test_a_checkpoint_of_another_run_is_refused(trained, tmp_path):
    path = tmp_path / "c"
    pruner_for(copy.deepcopy(trained), config(steps=3)).fit(loader(), checkpoint=path)
    with pytest.raises(ValueError, match="another configuration"):
        pruner_for(copy.deepcopy(trained), config(steps=4)).fit(loader(), checkpoint=path)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.classifier.bias += 1
    with pytest.raises(ValueError, match="another teacher"):
        pruner_for(other, config(steps=3)).fit(loader(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        pruner_for(copy.deepcopy(trained), config(steps=3)).fit(loader(), checkpoint=path)


def test_a_time_limit_still_ends_at_the_density_and_heals(trained, monkeypatch):
    ticks = itertools.count()  # a clock that goes on by 0.05 s at every look, however slow the machine
    monkeypatch.setattr("sparseprune.training.clock.time", SimpleNamespace(monotonic=lambda: next(ticks) / 20))
    pruner = pruner_for(copy.deepcopy(trained), config(steps=1_000_000, max_seconds=3.0, evaluate_every=10_000))
    history = pruner.fit(loader(), loader(seed=9))
    assert 20 < len(history.steps) <= 31
    assert pruner.density == pytest.approx(0.1, abs=1e-3)
    assert sum(step["phase"] == "heal" for step in history.steps) > 2
    cut = [event for event in history.events if event["event"].startswith("stopped")]
    assert [event["event"] for event in cut] == [f"stopped by max_seconds after {len(history.steps)} of 1000000 steps"]
    whole = pruner_for(copy.deepcopy(trained), config(steps=5, max_seconds=1e6)).fit(loader())
    assert not any(event["event"].startswith("stopped") for event in whole.events)


def test_early_stopping_returns_the_best_state(trained):
    pruner = pruner_for(copy.deepcopy(trained), config(epochs=12.0, evaluate_every=1, patience=3))
    history = pruner.fit(loader(), loader(seed=9))
    healed = [e for e in history.evaluations if e["phase"] == "heal"]
    best = max(healed, key=lambda e: (e["accuracy"], -e["loss"]))
    found = evaluate(pruner.finalize(), loader(seed=9))
    assert found["accuracy"] == best["accuracy"] and found["loss"] == pytest.approx(best["loss"])


class Poisoned(nn.Module):
    """Cross-entropy that is NaN in chosen calls."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, logits, targets):
        self.calls += 1
        loss = nn.functional.cross_entropy(logits, targets)
        return loss * float("nan") if self.calls in self.bad else loss


def test_a_few_bad_steps_are_skipped_and_reported(trained):
    pruner = pruner_for(copy.deepcopy(trained), config())
    history = pruner.fit(loader(), loss=Poisoned({4, 9, 10, 11}))
    events = [e["event"] for e in history.events]
    assert events.count("not finite, step skipped") == 4 and events.count("restored a snapshot") == 1
    assert all(torch.isfinite(p).all() for p in pruner.finalize().parameters())
    assert pruner.density == pytest.approx(0.1, abs=1e-3)


def test_endless_nan_ends_with_a_report(trained):
    pruner = pruner_for(copy.deepcopy(trained), config(epochs=20.0))
    with pytest.raises(RuntimeError, match=r"not finite at step \d+ after 3 restores .*lower lr"):
        pruner.fit(loader(), loss=Poisoned(set(range(5, 1000))))


def test_a_run_too_short_to_give_up_says_that_no_step_counted():
    batches = [(torch.full((4, 8), float("nan")), torch.zeros(4, dtype=torch.long))] * 2
    pruner = pruner_for(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), config(steps=4))
    with pytest.raises(RuntimeError, match="finite, got none in 4"):
        pruner.fit(batches)


def test_loss_as_class_or_instance_and_tuple_batches():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    batches = [(x[i : i + 16], (x[i : i + 16, 0] > 0).long()) for i in range(0, 64, 16)]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    results = []
    for loss in (nn.CrossEntropyLoss, nn.CrossEntropyLoss()):
        pruner = pruner_for(copy.deepcopy(model), config(epochs=5.0))
        pruner.fit(batches, batches, loss)
        results.append(pruner.finalize().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values()))


def test_a_single_linear_is_judged_by_its_logits():
    torch.manual_seed(0)
    x = torch.randn(128, 128)
    batches = [(x[i : i + 32], x[i : i + 32, :10].argmax(1)) for i in range(0, 128, 32)]
    pruner = pruner_for(nn.Linear(128, 10), config(epochs=10.0, ce=1.0))
    history = pruner.fit(batches, batches)
    model = pruner.finalize()
    assert int((model.weight != 0).sum()) == 128 and "discriminator_accuracy" in history.steps[-1]


def test_regression_distils_by_mean_square():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    batches = [(x[i : i + 16], x[i : i + 16, :1] * 2) for i in range(0, 64, 16)]
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    history = pruner_for(model, config(epochs=3.0, schedule=CubicSchedule(0.5))).fit(batches, batches, nn.MSELoss)
    assert "accuracy" not in history.evaluations[-1] and history.evaluations[-1]["loss"] < 10


@pytest.mark.parametrize("targets", [torch.randn(16), torch.randn(16, 1), torch.randint(0, 2, (16,))], ids=str)
def test_one_output_wants_the_loss_of_a_number(targets):
    batches = [(torch.randn(16, 8), targets)]
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    with pytest.raises(ValueError, match=r"cross-entropy expected several outputs a row, got \[16, 1\]; .*MSELoss"):
        pruner_for(copy.deepcopy(model), config(epochs=1.0)).fit(batches)
    with pytest.raises(ValueError, match="cross-entropy expected several outputs"):
        evaluate(model, batches)


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_teacher_of_another_number_of_outputs_is_told(outputs):
    batches = [(torch.randn(16, 8), torch.randint(0, 3, (16,)))]
    student, teacher = (nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, n)) for n in (3, outputs))
    with pytest.raises(ValueError, match=f"expected as many outputs as the model's 3, got {outputs}"):
        pruner_for(student, config("scores", epochs=1.0, features="logits"), teacher).fit(batches)


class Shared(nn.Module):
    """One Linear under two names, used twice."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 32), nn.Linear(32, 4)
        self.first = self.second = nn.Linear(32, 32)

    def forward(self, x):
        return self.leave(torch.relu(self.second(torch.relu(self.first(torch.relu(self.enter(x)))))))


def test_a_low_rank_term_stands_wherever_its_layer_does():
    torch.manual_seed(0)
    x = torch.randn(128, 16)
    batches = [(x[i : i + 16], x[i : i + 16, :4].argmax(1)) for i in range(0, 128, 16)]
    settings = config("scores", compensation="low_rank", epochs=6.0, lr=1e-2, schedule=CubicSchedule(0.3))
    pruner = pruner_for(Shared(), settings)
    pruner.fit(batches, batches)
    trained = pruner.model.eval()
    assert pruner.gates.low_rank and trained.first is trained.second
    before = trained(x)
    model = pruner.finalize().eval()
    assert model.first is model.second and isinstance(model.first, SparseLinear)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("hidden", "rate"), [(384, 4e-4), (768, 1e-4), (32, 1e-3), (None, 1e-3)])
def test_the_learning_rate_follows_the_hidden_size_where_none_is_given(hidden, rate):
    model = nn.Sequential(nn.Linear(8, 3))
    if hidden is not None:
        model.config = SimpleNamespace(hidden_size=hidden)
    x = torch.randn(16, 8)
    pruner = DistillPruner(model, DistillConfig(steps=2, warmup=0.0))
    history = pruner.fit([(x, x[:, :3].argmax(1))])
    assert pruner.config.lr == pytest.approx(rate) and history.steps[0]["lr"] == pytest.approx(rate)
    assert DistillPruner(model, DistillConfig(lr=5e-4)).config.lr == 5e-4


class Tagger(nn.Module):
    """Token classification with an output object, as the transformers models have it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.classifier = nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return SimpleNamespace(logits=self.classifier(x))


def test_token_classification_ignores_padding():
    torch.manual_seed(0)
    ids = torch.randint(4, 20, (32, 6))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    labels = (ids % 4).masked_fill(mask == 0, -100)
    batches = [
        {"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8], "labels": labels[i : i + 8]}
        for i in (0, 8, 16, 24)
    ]
    pruner = pruner_for(Tagger(), config(epochs=30.0, schedule=CubicSchedule(0.3), ce=1.0, kd=0.0, hidden=0.1, lr=5e-3))
    history = pruner.fit(batches, batches)
    assert pruner.reader.taps == ["blocks.0", "blocks.1"] and pruner.reader.entry == "blocks.0"
    assert history.evaluations[-1]["accuracy"] > 0.9


def test_named_and_callable_features(trained):
    pruner = pruner_for(copy.deepcopy(trained), config(features=("layers.1",), steps=4))
    pruner.fit(loader())
    assert pruner.game is not None and len(pruner.game.feature_sizes) == 1

    def look(model, inputs):
        logits = model(**inputs)
        return logits, [logits]

    pruner = pruner_for(copy.deepcopy(trained), config(features=look, steps=4))
    pruner.fit(loader())
    assert pruner.game is not None and pruner.game.feature_sizes == [3]
    with pytest.raises(ValueError, match=r"no module is called 'layers.7'"):
        pruner_for(copy.deepcopy(trained), config(features=("layers.7",)))


def test_bf16_autocast_and_accumulation_run(trained):
    pruner = pruner_for(copy.deepcopy(trained), config(autocast="bfloat16", accumulate=3, steps=6))
    history = pruner.fit(loader())
    assert len(history.steps) == 6 and pruner.finalize().layers[0].query.weight.dtype == torch.float32


def test_streams_need_steps(trained):
    stream = itertools.cycle(list(loader()))
    with pytest.raises(ValueError, match=r"set GANConfig\(steps=...\)"):
        pruner_for(copy.deepcopy(trained), config()).fit(stream)
    pruner = pruner_for(copy.deepcopy(trained), config(steps=8))
    assert len(pruner.fit(stream).steps) == 8
    with pytest.raises(ValueError, match="empty"):
        pruner_for(copy.deepcopy(trained), config()).fit([])


def test_without_a_difference_the_discriminator_finds_none(trained):
    pruner = pruner_for(copy.deepcopy(trained), config())
    assert pruner.null_test(loader(), steps=60) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("cue", ["dropout", "pad"])
def test_a_planted_cue_is_found_out(trained, cue):
    discriminator = DiscriminatorConfig(depth=2, width=64, lr=2e-3, noise=0.0)
    pruner = pruner_for(copy.deepcopy(trained), config(discriminator=discriminator))
    assert pruner.null_test(loader(), steps=250, cue=cue) > 0.6


def test_the_teacher_stays_as_it_was(trained):
    teacher = copy.deepcopy(trained)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    pruner_for(copy.deepcopy(trained), config(steps=6), teacher=teacher).fit(loader())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        pruner_for(teacher, config(), teacher=teacher)
    with pytest.raises(RuntimeError, match="call fit first"):
        pruner_for(copy.deepcopy(trained), config()).finalize()


@pytest.mark.filterwarnings("ignore:DistillPruner. method .* learns from the gradients:UserWarning")
@pytest.mark.parametrize("method", ["magnitude", "movement", "scores"])
def test_a_frozen_layer_is_pruned_and_keeps_its_values(trained, method):
    """What has no gradient is not stepped: no decay, while the masks move and after."""
    model = copy.deepcopy(trained)
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.shape == (64, 32))
    frozen = model.get_submodule(name).requires_grad_(False)
    before, teacher = frozen.weight.detach().clone(), copy.deepcopy(model)
    settings = {"lr": 1e-2, "weight_decay": 0.5, "epochs": 2.0, "heal": "dense", "schedule": CubicSchedule(0.4)}
    pruner = DistillPruner(model, DistillConfig(method=method, **settings), teacher)
    pruner.fit(loader())
    weight = pruner.finalize().get_submodule(name).weight
    kept = weight != 0
    assert 0 < int(kept.sum()) < kept.numel() and torch.equal(weight[kept], before[kept])
    others = zip(model.named_parameters(), teacher.parameters())
    assert any(not torch.equal(new, old) for (fqn, new), old in others if not fqn.startswith(name))


def test_score_gradient_is_dense_gradient_times_weight(trained):
    """dL/ds = dL/dW' * W also where the gate is closed, checked against autograd on W * m."""
    pruner = pruner_for(copy.deepcopy(trained), config(method="scores"))
    gates, batch = pruner.gates, next(iter(loader()))
    gates.close(0.5)
    master = gates.masters["layers.0.query"].detach().clone()
    mask = gates.masks["layers.0.query"].float().requires_grad_(True)

    def loss_of(model):
        return nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    expected = torch.func.functional_call(
        pruner.model, {"layers.0.query.weight": master * mask}, (batch["input_ids"], batch["attention_mask"])
    )
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(expected, batch["labels"]), mask)
    loss_of(pruner.model).backward()
    gates.collect()
    torch.testing.assert_close(gates.scores["layers.0.query"].grad, slope, rtol=1e-4, atol=1e-7)
    assert torch.all(gates.masters["layers.0.query"].grad[~gates.masks["layers.0.query"]] == 0)


def test_compare_knows_its_measures():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    targets = torch.tensor([0, 1, 0, 0])
    same = compare(teacher, teacher, targets)
    assert same["agreement"] == 1 and same["kl"] == pytest.approx(0, abs=1e-7) and same["accuracy"] == 0.75
    sure = torch.softmax(teacher, -1).max()
    assert same["ece"] == pytest.approx(abs(0.75 - float(sure)), abs=1e-6)
    assert same["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    other = compare(-teacher, teacher, targets)
    assert other["agreement"] == 0 and other["kl"] > 1
