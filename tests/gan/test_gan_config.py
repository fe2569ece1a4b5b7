"""The configurations of the adversarial pruner."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparseprune import NM, Block, CubicSchedule, DistillConfig, PruneConfig, RetentionSchedule
from sparseprune.gan import DiscriminatorConfig, GANConfig


def test_json_both_ways():
    config = GANConfig(
        schedule=CubicSchedule(0.05),
        granularity={"*.ffn.*": Block(16, 1), "*": "element"},
        features=("layers.0", "layers.1"),
        discriminator=DiscriminatorConfig(depth=2, width=64, norm="layer", loss="wgan-gp"),
        max_seconds=30.0,
    )
    assert GANConfig.from_json(config.to_json()) == config
    assert GANConfig.from_json(
        GANConfig(schedule=CubicSchedule(0.5), granularity=NM(2, 4)).to_json()
    ).granularity == NM(2, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"density": 0.2, "schedule": RetentionSchedule(r0=0.1, z_min=0.1)},
            "density 0.2 differs from the schedule's final density 0.1",
        ),
        ({"density": float("nan"), "schedule": CubicSchedule(0.1)}, "density nan differs from the schedule's final"),
        ({"density": 1.5}, r"density expected in \(0, 1\], the share of the weights kept, got 1.5"),
        ({"steps": 40.5}, "steps expected a whole number, got 40.5"),
        ({"accumulate": True}, "accumulate expected a whole number, got True"),
        ({"method": "magic"}, "method expected one of scores, magnitude, movement"),
        ({"kappa": 0}, "a run without an adversary; use DistillPruner"),
        ({"warmup": 0.7}, "warmup < prune_until"),
        ({"lr": float("nan")}, "lr expected"),
        ({"ce": 0, "kd": 0, "hidden": 0}, "nothing is left to train on"),
        ({"steps": 0}, "steps expected a number > 0"),
        ({"max_seconds": -1.0}, "max_seconds expected"),
    ],
)
def test_bad_settings_are_said(settings, said):
    with pytest.raises(ValueError, match=said):
        GANConfig(**settings)


def test_spectral_norm_and_a_gradient_penalty_do_not_go_together():
    with pytest.raises(ValueError, match='use norm="layer"'):
        DiscriminatorConfig(loss="wgan-gp")


@pytest.mark.parametrize(
    ("settings", "said"),
    [(({name: value}), f"{name} expected a whole number, got {value}")
     for name in ("depth", "width", "projection", "rows", "patience") for value in (2.5, True)]
    + [({"betas": betas}, "betas expected two numbers") for betas in ((2, 0.9), (0.5,), (0.0, 1.0))],
)  # fmt: skip
def test_bad_settings_of_the_discriminator_are_said_before_the_run(settings, said):
    with pytest.raises(ValueError, match=f"DiscriminatorConfig: {said}"):
        DiscriminatorConfig(**settings)


@pytest.mark.parametrize("density", [0.2, 0.95, 1, 0.01])
def test_a_density_alone_is_where_the_default_schedule_ends(density):
    config = GANConfig(density=density)
    assert config.final_density == density and config.density_at(1.0) == pytest.approx(density)
    assert GANConfig.from_json(config.to_json()) == config
    assert replace(config, density=None).final_density == density
    assert GANConfig(schedule=config.schedule, density=density) == config


def test_unknown_key_is_an_error():
    with pytest.raises(ValueError, match="unknown key 'kapa'"):
        GANConfig.from_json('{"kapa": 1}')


def test_density_is_one_before_the_window_and_final_after_it():
    config = GANConfig(schedule=RetentionSchedule(r0=0.1, z_min=0.1), density=0.1)
    assert config.density_at(0.0) == config.density_at(config.warmup) == 1.0
    assert config.density_at(config.prune_until) == config.final_density == pytest.approx(0.1)
    seen = [config.density_at(i / 100) for i in range(101)]
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("kind", [DistillConfig, GANConfig, PruneConfig])
def test_the_density_falls_by_the_cubic_schedule_unless_another_is_asked_for(kind):
    assert kind().schedule == CubicSchedule(0.1)
    assert kind(density=0.05).schedule == CubicSchedule(0.05)


@pytest.mark.parametrize("wrong", ["cubic", 0.1, None, CubicSchedule])
@pytest.mark.parametrize("kind", [DistillConfig, GANConfig, PruneConfig])
def test_what_is_no_schedule_is_refused_before_the_run(kind, wrong):
    with pytest.raises(ValueError, match=r"schedule expected a Schedule such as sp.CubicSchedule\(0.1\), got"):
        kind(schedule=wrong)
