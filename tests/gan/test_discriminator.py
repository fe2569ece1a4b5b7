"""The discriminator, its losses, the monitor and the gradient balance."""

from __future__ import annotations

import copy
from typing import get_args, get_type_hints

import pytest
import torch

from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner
from sparseprune.gan.discriminator import Discriminator
from sparseprune.gan.game import Game, orthonormal
from sparseprune.gan.losses import LOSSES, adversarial_loss, discriminator_loss, gradient_penalty, pair_accuracy
from sparseprune.gan.monitor import Balance, Monitor
from sparseprune.gan.seeds import seeded
from sparseprune.pruning.batches import real_rows_of as rows_of
from sparseprune.runner.text_encoder import TextEncoder
from sparseprune.training.features import normalise


def game(**settings):
    config = DiscriminatorConfig(width=32, depth=2, lr=2e-3, noise=0.0, **settings)
    return Game(config, kappa=0.2, sizes=[12, 12], condition=12, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize(("depth", "width", "norm"), [(0, 8, "none"), (1, 16, "spectral"), (4, 8, "layer")])
def test_depth_width_and_norm_shape_the_network(depth, width, norm):
    config = DiscriminatorConfig(depth=depth, width=width, norm=norm)
    critic = Discriminator(config, features=6, condition=0, taps=2)
    linears = [m for m in critic.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == depth + 1 and all(layer.out_features == width for layer in linears[:-1])
    assert critic(torch.randn(5, 6), None, torch.zeros(5, dtype=torch.long)).shape == (5,)
    if norm == "spectral":
        assert torch.linalg.matrix_norm(linears[0].weight, 2) < 1.6


@pytest.mark.parametrize("kind", LOSSES)
def test_both_sides_of_each_loss_pull_apart(kind):
    real, fake = torch.tensor([2.0, 1.0]), torch.tensor([-1.0, -2.0])
    assert discriminator_loss(kind, real, fake) < discriminator_loss(kind, fake, real)
    scores = torch.tensor([-1.0, 0.0], requires_grad=True)
    adversarial_loss(kind, scores, real).backward()
    assert (scores.grad < 0).all()  # the student gains by being rated higher


def test_a_loss_that_is_not_there_is_no_other_loss():
    scores = torch.zeros(2)
    for side in (discriminator_loss, adversarial_loss):
        with pytest.raises(ValueError, match="one of hinge, lsgan, wgan-gp, relativistic, got 'minimax'"):
            side("minimax", scores, scores)
    with pytest.raises(ValueError, match="expected the teacher's scores"):
        adversarial_loss("relativistic", scores)
    assert set(get_args(get_type_hints(DiscriminatorConfig)["loss"])) == set(LOSSES)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_real_difference_is_found_and_none_is_not(kind):
    norm = "layer" if kind == "wgan-gp" else "spectral"
    for shift, low, high in ((0.0, 0.45, 0.55), (1.5, 0.9, 1.0)):
        played = game(loss=kind, norm=norm, strong=1.0)
        torch.manual_seed(0)
        for _ in range(150):
            hidden = torch.randn(8, 3, 12)
            moved = hidden.clone()
            moved[..., 0] += shift
            rows = played.rows([hidden, hidden], [moved, moved], hidden, torch.ones(8, 3, dtype=torch.bool))
            seen = played.train_critic(rows, progress=1.0)
        assert low <= seen["accuracy"] <= high, (kind, shift, seen)


def test_shuffled_labels_teach_nothing_and_frozen_never_moves():
    for mode in ("frozen", "shuffled"):
        played = game(mode=mode, strong=1.0)
        before = [p.clone() for p in played.critic.parameters()]
        torch.manual_seed(0)
        for _ in range(100):
            hidden = torch.randn(8, 3, 12)
            rows = played.rows([hidden, hidden], [hidden + 1.0 * (torch.arange(12) == 0), hidden], hidden, None)
            seen = played.train_critic(rows, progress=1.0)
        moved = any(not torch.equal(a, b) for a, b in zip(before, played.critic.parameters()))
        assert moved == (mode == "shuffled")
        assert seen["accuracy"] < 0.8


def test_padding_never_reaches_the_rows():
    hidden = torch.randn(3, 5, 12)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    assert rows_of(hidden, mask).shape == (8, 12)
    marked = hidden.masked_fill(~mask.unsqueeze(-1), float("nan"))
    rows = game().rows([marked, marked], [marked, marked], marked, mask)
    assert torch.isfinite(rows.real).all() and torch.isfinite(rows.condition).all() and len(rows.real) == 16


def test_projection_is_orthonormal_and_features_are_normalised():
    q = orthonormal(40, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.T @ q, torch.eye(8))
    assert orthonormal(8, 8, torch.Generator()) is None
    out = normalise(torch.randn(6, 64, dtype=torch.bfloat16) * 7 + 3)
    assert out.dtype == torch.float32 and out.mean(-1).abs().max() < 1e-5 and (out.var(-1) - 1).abs().max() < 0.1


def test_gradient_penalty_is_zero_at_slope_one():
    critic = Discriminator(DiscriminatorConfig(depth=0, norm="none"), features=4, condition=0, taps=1)
    with torch.no_grad():
        critic.net[0].weight.zero_()
        critic.net[0].weight[0, 1] = 1.0
    args = (torch.randn(6, 4), torch.randn(6, 4), None, torch.zeros(6, dtype=torch.long), torch.Generator())
    assert float(gradient_penalty(critic, *args)) == pytest.approx(0.0, abs=1e-10)


def test_pair_accuracy_counts_ties_half():
    assert pair_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])) == pytest.approx(0.5)


def test_monitor_rests_warns_and_recovers():
    monitor = Monitor(strong=0.9, patience=5)
    for _ in range(12):
        monitor.observe(1.0)
    assert monitor.rest and not monitor.blind
    for _ in range(5):
        monitor.observe(1.0)
    assert monitor.stuck
    monitor.reset()
    for _ in range(60):
        monitor.observe(0.5)
    assert monitor.blind and not monitor.rest and monitor.accuracy == pytest.approx(0.5)


def test_a_discriminator_that_rests_too_long_starts_again():
    played = game(patience=3, strong=0.6)
    hidden = torch.randn(8, 3, 12)
    events = []
    for _ in range(200):
        rows = played.rows([hidden, hidden], [hidden + 2.0 * (torch.arange(12) == 0)] * 2, hidden, None)
        events.append(played.train_critic(rows, progress=1.0)["event"])
    assert any(e and "too strong" in e for e in events) and played.resets >= 1


def test_balance_gives_the_adversarial_term_its_share():
    balance = Balance(kappa=0.2)
    assert balance.weight == 0.0
    for _ in range(5):
        balance.observe(distillation=3.0, adversarial=0.01)
    assert balance.weight == pytest.approx(0.2 * 3.0 / 0.01)
    balance.observe(float("nan"), 1.0)
    assert balance.weight == pytest.approx(60.0)
    balance = Balance(kappa=0.2, limit=10.0)
    balance.observe(1.0, 0.0)
    assert balance.weight == 10.0


def test_a_discriminator_is_drawn_from_its_seed_and_the_random_state_of_no_device_moves(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(5)
    expected, drawn = torch.get_rng_state(), seeds.copy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3 * 7919 + 31)
        twin = Discriminator(DiscriminatorConfig(), 8, 0, 1)
    seeds.clear()
    game = Game(DiscriminatorConfig(), 0.1, [8], 0, 3, torch.device("cpu"))
    assert drawn == [5] and seeds == [] and torch.equal(torch.get_rng_state(), expected)
    for p, q in zip(game.critic.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_probe_borrows_the_random_state(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    before = torch.get_rng_state()
    with seeded(4, torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before) and seeds == []
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("who", ["probe", "null_test"])
def test_a_probe_asks_for_what_it_needs_and_leaves_the_mode(who):
    dense = TextEncoder(30, 3, hidden=16, ffn=24, layers=2, heads=4).eval()
    pruner = GANPruner(copy.deepcopy(dense), GANConfig(epochs=1), teacher=dense)
    batches = [(torch.randint(1, 30, (8, 6)), torch.randint(0, 3, (8,))) for _ in range(3)]
    ask = getattr(pruner, who)
    for steps in (0, -9, 2.5, True):  # with none the answer was 0.5, as if nothing had been found
        with pytest.raises(ValueError, match=f"{who}: steps expected a whole number >= 1, got"):
            ask(batches, steps=steps)
    with pytest.raises(ValueError, match=f"{who}: expected batches that can be read again and again, got none"):
        ask([], steps=2)
    with pytest.raises(ValueError, match=f"{who}: expected batches .* got one that ended after 3, as an iterator"):
        ask(iter(batches), steps=9)
    for training in (True, False):
        pruner.model.train(training)
        assert 0 <= ask(batches, steps=2) <= 1 and pruner.model.training is training
