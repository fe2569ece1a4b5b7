from __future__ import annotations

import math
from itertools import pairwise

import pytest

from sparseprune.pruning import (
    ConstantSchedule,
    CubicSchedule,
    Factors,
    LinearSchedule,
    OneShotSchedule,
    RetentionSchedule,
)

STEPS = (1, 2, 3, 4, 5, 6, 10, 20)
TABLE_R = (".19", ".3458", ".578938", ".840075", "1.008027", "1.050337", "1.090753", "1.191547")
TABLE_Z = (".82", ".6742", ".451062", ".199925", ".041973", ".009663", ".009247", ".008453")


def printed(values, digits):
    return [f"{value:.{digits}f}".rstrip("0").lstrip("0") for value in values]


def to_the_last_digit(value, text):
    return f"{value:.{len(text.partition('.')[2])}f}".lstrip("0") == text


def test_the_literal_table():
    schedule = RetentionSchedule(r0=0.1, z_min=0.01, mode="literal")
    states, used = schedule.states(20), schedule.densities(20)
    for step, r, z in zip(STEPS, TABLE_R, TABLE_Z):
        assert to_the_last_digit(states[step - 1][0], r)
        assert to_the_last_digit(states[step - 1][1], z)
        assert used[step - 1] == states[step - 1][1]


def test_the_bounded_tables():
    used = RetentionSchedule(r0=0.1, z_min=0.01).densities(8)
    assert printed(used, 4) == [".82", ".6742", ".4511", ".1999", ".042", ".01", ".01", ".01"]
    assert used[5] == used[7] == 0.01
    used = RetentionSchedule(r0=0.1, z_min=0.1).densities(6)
    assert printed(used, 4) == [".9", ".8371", ".6333", ".3111", ".1", ".1"]
    assert used[4] == 0.1
    assert printed([z for _, z in RetentionSchedule(r0=0.1, z_min=0.1).states(1)], 4) == [".91"]


def test_the_consistent_table():
    schedule = RetentionSchedule(r0=0.1, z_min=0.01, mode="consistent")
    assert printed(schedule.densities(7), 4) == [".82", ".6824", ".4757", ".2363", ".0658", ".0143", ".0102"]
    assert f"{schedule.final_density:.6f}" == "0.010102"
    assert all(r + z == pytest.approx(1, abs=1e-15) for r, z in schedule.states(7))


@pytest.mark.parametrize("r0, z_min", [(0.1, 0.01), (0.3, 0.05), (0.01, 0.002)])
def test_the_invariant(r0, z_min):
    for k, (r, z) in enumerate(RetentionSchedule(r0, z_min, mode="literal").states(30), start=1):
        assert r + z == pytest.approx(1 + k * z_min, abs=1e-12)


@pytest.mark.parametrize("mode", ["literal", "bounded", "consistent"])
def test_nothing_regrown_is_repeated_squaring(mode):
    for k, z in enumerate(RetentionSchedule(r0=0.1, z_min=0.0, mode=mode).densities(6), start=1):
        assert z == pytest.approx(0.9 ** (2**k), rel=1e-9)


def test_literal_leaves_the_densities_at_step_197():
    assert len(RetentionSchedule(mode="literal").densities(196)) == 196
    with pytest.raises(ValueError, match=r"step 197 .*mode='bounded'"):
        RetentionSchedule(mode="literal").densities(197)


EVERY = [
    CubicSchedule(0.1),
    CubicSchedule(0.1, initial_density=0.5),
    LinearSchedule(0.2),
    OneShotSchedule(0.3, at=0.4),
    ConstantSchedule(0.25),
    RetentionSchedule(),
    RetentionSchedule(0.1, 0.1),
    RetentionSchedule(0.01, 0.1),
    RetentionSchedule(mode="literal"),
    RetentionSchedule(mode="consistent"),
]


@pytest.mark.parametrize("schedule", EVERY, ids=str)
def test_every_schedule_falls_from_one_to_its_final_density(schedule):
    progress = [i / 500 for i in range(501)]
    densities = [schedule.density(p) for p in progress]
    assert densities[0] == schedule.density(-3) == 1
    assert densities[-1] == schedule.density(7) == schedule.final_density
    assert all(a >= b > 0 for a, b in pairwise(densities))
    assert type(schedule).from_json(schedule.to_json()) == schedule
    with pytest.raises(ValueError, match="NaN"):
        schedule.density(math.nan)


def test_known_points():
    assert CubicSchedule(0.1).density(0.5) == pytest.approx(1 - (0.9 - 0.9 * 0.5**3))
    assert LinearSchedule(0.2).density(0.25) == pytest.approx(0.8)
    assert [OneShotSchedule(0.3, at=0.4).density(p) for p in (0.4, 0.41)] == [1, 0.3]
    assert ConstantSchedule(0.25).density(0.001) == 0.25


def test_retention_hits_its_densities_and_runs_straight_in_log_density_between():
    schedule = RetentionSchedule()
    used = schedule.densities(6)
    assert [schedule.density(k / 6) for k in range(1, 7)] == pytest.approx(used, rel=1e-12)
    assert schedule.density(2.5 / 6) == pytest.approx(math.sqrt(used[1] * used[2]))
    assert RetentionSchedule(mode="literal").final_density == RetentionSchedule(mode="literal").densities(6)[-1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CubicSchedule(0.0), "final_density expected in"),
        (lambda: LinearSchedule(math.nan), "final_density expected in"),
        (lambda: CubicSchedule(0.5, initial_density=0.4), "never rises"),
        (lambda: OneShotSchedule(0.5, at=1.0), "at expected in"),
        (lambda: ConstantSchedule(1.5), "final_density expected in"),
        (lambda: RetentionSchedule(r0=0.0), "r0 expected in"),
        (lambda: RetentionSchedule(z_min=-0.1), "z_min expected in"),
        (lambda: RetentionSchedule(r0=0.5, z_min=0.6), "never rises"),
        (lambda: RetentionSchedule(mode="wild"), "mode expected"),
        (lambda: RetentionSchedule(z_min=0.25, mode="consistent"), "z_min < 1/4"),
        (lambda: RetentionSchedule(r0=0.1, z_min=0.1, mode="consistent"), "converges from"),
        (lambda: RetentionSchedule(z_min=0.0).final_density, "a window needs z_min > 0"),
    ],
)
def test_bad_values_say_what_is_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_factors_of_the_text():
    for retention in (0.01, 0.1, 0.5, 0.9, 1.0):
        factors = Factors.from_retention(retention)
        assert factors.reduction == 1 - retention
        assert factors.update == factors.pruning == retention
        assert factors.trim == pytest.approx(1 - retention * (1 - retention))


def test_factors_of_the_formulas():
    factors = Factors.from_retention(0.1, convention="formula")
    assert printed([factors.pruning, factors.trim, factors.update], 6) == [".316228", ".351364", ".316228"]
    factors = Factors.from_retention(0.5, convention="formula")
    assert printed([factors.pruning, factors.update], 6) == [".707107", ".707107"] and factors.trim == 1
    assert Factors.from_retention(1, convention="formula").trim == 1


def test_factors_from_demand():
    assert [Factors.from_demand(y).retention for y in (0, 0.05, 1, 10)] == [0.01, 0.01, 0.1, 1.0]
    for y in (-0.1, 10.1, math.nan):
        with pytest.raises(ValueError, match="demand expected"):
            Factors.from_demand(y)
    for retention in (0, -1, 1.1, math.nan):
        with pytest.raises(ValueError, match="retention expected"):
            Factors.from_retention(retention)
    with pytest.raises(ValueError, match="convention expected"):
        Factors.from_retention(0.1, convention="other")
