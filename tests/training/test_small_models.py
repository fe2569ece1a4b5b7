"""What the trainer meets in plain models: states with single numbers, callables in a configuration, running statistics,
iterators, losses and dtypes of the user's own.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from sparseprune import CubicSchedule
from sparseprune._config import described
from sparseprune._digest import digest
from sparseprune.training import DistillConfig, DistillPruner, evaluate
from sparseprune.training.guard import Best


class Extra(nn.Module):
    """Keeps something that is no tensor."""

    held: object = None

    def get_extra_state(self):
        return self.held

    def set_extra_state(self, state):
        self.held = state


class Small(nn.Module):
    """Two layers around running statistics, a number and an extra state."""

    def __init__(self, extra: object = None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 3)
        self.norm, self.scale, self.extra = nn.BatchNorm1d(32), nn.Parameter(torch.tensor(1.0)), Extra()
        self.extra.held = extra

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()) * self.scale


def batches(count=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(8, 16, generator=generator, dtype=torch.float32)
        made.append((x.to(dtype), torch.randint(0, 3, (8,), generator=generator)))
    return made


def config(**settings):
    return DistillConfig(**{"schedule": CubicSchedule(0.5), "steps": 8, **settings})


class Killed(Exception):
    pass


def run(path, stop=None, **settings):
    def kill(record):
        if record["step"] == stop:
            raise Killed

    pruner = DistillPruner(Small({"a": [1, torch.ones(2)]}), config(**settings))
    pruner.fit(batches(), checkpoint=path, checkpoint_every=2, callback=kill)
    return pruner.finalize().state_dict()


def test_single_numbers_and_extra_states_are_in_a_checkpoint(tmp_path):
    whole = run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", stop=5)
    again = run(tmp_path / "b")
    assert again["norm.num_batches_tracked"].dim() == again["scale"].dim() == 0
    assert digest(again) == digest(whole)


def test_what_cannot_be_in_a_checkpoint_is_refused_before_the_work(tmp_path):
    pruner = DistillPruner(Small(), config(), teacher=Small(extra=lambda: None))
    with pytest.raises(ValueError, match=r"extra\._extra_state: expected a tensor or what pickle takes, got function"):
        pruner.fit(batches(), checkpoint=tmp_path / "c")
    assert not pruner.history.steps and not list(tmp_path.iterdir())


def test_a_digest_is_of_names_dtypes_shapes_and_content():
    class Holder:
        def __init__(self):
            self.tensor = torch.ones(3)

    values = [
        {}, {"a": torch.zeros(4)}, {"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.zeros(1, 4)},
        {"a": torch.zeros(4, dtype=torch.int32)}, {"a": torch.tensor(0.0)}, {"a": torch.tensor(1)}, {"a": 1},
        {"a": [1]}, {"a": {"b": torch.zeros(4)}}, {"a": torch.zeros(0)}, {"a": torch.zeros(4, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, dtype=torch.complex64)}, {"a": torch.zeros(4, dtype=torch.bool)}, {"a": None},
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert all(digest(value) == digest(copy.deepcopy(value)) for value in values)
    wide = torch.arange(12.0).view(3, 4)
    assert digest({"a": wide.t()}) == digest({"a": wide.t().contiguous()})


def features(model, inputs):
    hidden = model.first(inputs)
    return model.last(model.norm(hidden).relu()) * model.scale, [hidden]


def other_features(model, inputs):
    return features(model, inputs)


def test_a_run_with_a_callable_goes_on(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "c", stop=5, features=features)
    with pytest.raises(ValueError, match="another configuration, it differs in features, lr; delete it"):
        run(tmp_path / "c", features=other_features, lr=0.5)
    assert digest(run(tmp_path / "c", features=features)) == digest(run(tmp_path / "whole", features=features))


def test_a_configuration_is_described_alike_in_every_process():
    code = (
        "from sparseprune import CubicSchedule\n"
        "from sparseprune._config import described\n"
        "from sparseprune.training import DistillConfig\n"
        "from sparseprune.training.causal import is_causal\n"
        "print(described(DistillConfig(schedule=CubicSchedule(0.5), features=is_causal, steps=8)))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    from sparseprune.training.causal import is_causal

    assert found.strip() == str(described(config(features=is_causal)))
    assert described(config(features=is_causal))["features"] == "sparseprune.training.causal.is_causal"
    assert described(config()) == config().to_dict()


def test_dropout_leaves_the_teachers_running_statistics(tmp_path):
    teacher = Small()
    before = digest(teacher.state_dict())
    pruner = DistillPruner(Small(), config(dropout=True), teacher=teacher)
    pruner.fit(batches(), checkpoint=tmp_path / "c", checkpoint_every=2)
    assert digest(teacher.state_dict()) == before
    assert int(pruner.finalize().norm.num_batches_tracked) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_are_float32_whatever_the_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        pruner = DistillPruner(Small(), config())
        pruner.fit(batches(dtype=dtype))
        assert {score.dtype for score in pruner.gates.scores.values()} == {torch.float32}
        assert pruner.finalize().first.weight.dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_iterator_is_read_to_its_end():
    def rows():
        for x, y in batches(20):
            yield from ({"x": a, "label": int(b)} for a, b in zip(x, y))

    listed, read = (DistillPruner(Small(), config(steps=20)) for _ in range(2))
    assert len(read.fit(iter(batches(20))).steps) == 20
    listed.fit(batches(20))
    assert digest(read.finalize().state_dict()) == digest(listed.finalize().state_dict())
    streamed = DistillPruner(Small(), config(steps=20))
    assert len(streamed.fit(rows(), batch_size=8).steps) == 20


def test_classes_that_the_loss_ignores_count_for_nothing():
    model, x = nn.Linear(16, 3), torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    y = torch.tensor([1, 2, 0, 0, 0, 0, 0, -100])
    loss = nn.CrossEntropyLoss(ignore_index=0)
    found = evaluate(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss)
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(model(x[:2]), y[:2]).detach()))

    def plain(logits, targets):
        return -logits.log_softmax(-1)[range(len(targets)), targets].mean()

    own = evaluate(model, [(x, y)], plain)
    assert own["accuracy"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("make", [float, int])
def test_one_number_an_output_is_compared_with_its_own_target(make):
    model, x = nn.Linear(16, 1), torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = 1
        model.bias.zero_()
        x[:, 0] = torch.arange(8)
    y = torch.tensor([make(value) for value in range(8)])
    assert evaluate(model, [(x, y)], nn.MSELoss) == {"loss": 0.0}
    assert evaluate(model, [(x, y[:, None].float())], nn.MSELoss) == {"loss": 0.0}
    pruner = DistillPruner(model, config(), filter_fn=lambda module, fqn: True)
    pruner.fit([(x, y)] * 4, loss=nn.MSELoss)


def test_a_loss_that_is_nan_is_worse_than_any_other():
    best, model = Best(), nn.Linear(2, 2)
    for step, (loss, accuracy) in enumerate([(math.nan, 0.9), (1.0, 0.0), (0.5, 0.0), (math.nan, 0.0)]):
        best.offer({"loss": loss, "accuracy": accuracy}, step, model)
    assert (best.step, best.waited) == (2, 1)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_no_mean_is_refused(reduction):
    model, data = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), [(torch.randn(8, 4), torch.arange(8) % 3)]
    loss = nn.CrossEntropyLoss(reduction=reduction)
    said = f"expected the mean over examples, got CrossEntropyLoss with reduction='{reduction}'"
    with pytest.raises(ValueError, match=said):
        evaluate(model, data, loss)
    with pytest.raises(ValueError, match=said):
        DistillPruner(model, DistillConfig(steps=2)).fit(data, loss=loss)


def two_linears():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("way", ["assign", "copy.copy", "one module", "frozen and pruned"])
def test_a_teacher_in_the_models_memory_is_refused(way):
    """It would be trained and pruned along with the model, and distil nothing."""
    teacher, model = two_linears(), two_linears()
    if way == "assign":
        model.load_state_dict(teacher.state_dict(), assign=True)
    elif way == "copy.copy":
        model = copy.copy(teacher)
    else:
        model[0] = teacher[0]
        if way == "frozen and pruned":
            teacher[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected weights of its own, got the model's own memory in 0\.weight|in 0,"):
        DistillPruner(model, DistillConfig(steps=2), teacher)


def test_what_is_frozen_and_not_pruned_may_be_the_teachers():
    class Tagger(nn.Module):
        def __init__(self, embedding=None):
            super().__init__()
            self.embedding = embedding or nn.Embedding(9, 8).requires_grad_(False)
            self.body = two_linears()

        def forward(self, ids):
            return self.body(self.embedding(ids).mean(1))

    teacher = Tagger()
    model = Tagger(teacher.embedding)
    DistillPruner(model, DistillConfig(steps=2), teacher).fit([(torch.randint(0, 9, (4, 3)), torch.arange(4) % 2)])
    assert model.embedding is teacher.embedding


@pytest.mark.parametrize("method", ["scores", "movement", "fisher", "magnitude"])
def test_frozen_weights_that_gradients_were_to_choose_are_told(method):
    """As those below LoRA: learned scores stayed those of the first step, and movement's all 0, without a word."""
    model = two_linears()
    model[0].weight.requires_grad_(False)
    config = DistillConfig(method=method, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DistillPruner(two_linears(), config)
        if method == "magnitude":
            DistillPruner(model, config)
            return
    with pytest.warns(UserWarning, match=f"method '{method}'.*frozen ones in 0, whose scores stay as they begin"):
        DistillPruner(model, config)
