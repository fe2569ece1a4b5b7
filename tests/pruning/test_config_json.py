from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass, field

import pytest

from sparseprune._config import Config
from sparseprune.pruning import (
    NM,
    Block,
    CubicSchedule,
    Element,
    Heads,
    Mixture,
    PruneConfig,
    RetentionSchedule,
    Schedule,
)


@dataclass(frozen=True)
class Inner(Config):
    depth: int = 3


@dataclass(frozen=True)
class Outer(Config):
    rate: float
    name: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] | None = None
    inner: Inner = field(default_factory=Inner)
    schedule: Schedule = field(default_factory=lambda: CubicSchedule(0.1))
    extra: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    flag: bool = False


def test_json_and_back():
    config = Outer(1, "y", (3,), (1, 0.5), Inner(7), RetentionSchedule(0.1, 0.1), {"a": 1.5}, 2.0, True)
    assert Outer.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["version"] == 1
    assert Outer.from_dict({"rate": 1, "inner": {"depth": 2}}) == Outer(1.0, inner=Inner(2))
    with pytest.raises(FrozenInstanceError):
        config.rate = 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"raet": 1}, r"unknown key 'raet' \(did you mean 'rate'\?\); known: rate, name"),
        ({"rate": "fast"}, r"Outer.rate: expected float, got 'fast'"),
        ({"rate": True}, r"Outer.rate: expected float"),
        ({"limit": "x"}, r"Outer.limit: expected float or null"),
        ({"sizes": [1, 2.5]}, r"Outer.sizes\[1\]: expected int"),
        ({"pair": [1]}, r"Outer.pair: expected 2 entries"),
        ({"inner": {"depth": None}}, r"Inner.depth: expected int"),
        (
            {"inner": {"kind": "CubicSchedule", "final_density": 0.1}},
            r"Outer.inner: expected Inner, got kind 'CubicSchedule'",
        ),
        ({"schedule": {"kind": "os.system"}}, r"Outer.schedule: unknown kind 'os.system'"),
        ({"schedule": {"kind": "CubicSchedule", "final_density": 2}}, r"final_density expected in"),
        ({"version": 99}, r"version 99"),
        ({"kind": f"{__name__}.Inner", "rate": None}, r"Inner: unknown key 'rate'"),
    ],
)
def test_bad_json_is_one_clear_error(change, message):
    data = {**Outer(1.0).to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        Outer.from_dict(data)


def test_missing_keys_other_kinds_and_broken_text():
    with pytest.raises(ValueError, match="key 'rate' is missing"):
        Outer.from_json("{}")
    with pytest.raises(ValueError, match="not valid JSON"):
        Outer.from_json("{")
    with pytest.raises(ValueError, match="expected this kind"):
        Outer.from_json(Inner().to_json())
    with pytest.raises(ValueError, match="expected an object"):
        Outer.from_json("[]")


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        PruneConfig(criterion=lambda linear, fqn: linear.weight).to_json()
    with pytest.raises(ValueError, match="not JSON compliant"):
        Outer(float("inf")).to_json()


@pytest.mark.parametrize(
    "granularity",
    ["element", Element(), Block(16, 1), NM(2, 4), Heads(per_axis=True), Mixture(Heads(), Block(4, 1), 0.5),
     {"*.query": Heads(), "*": "element"}],
    ids=str,
)  # fmt: skip
def test_a_prune_config_goes_round(granularity):
    config = PruneConfig(RetentionSchedule(0.1, 0.1), "movement", granularity, "layer", begin=3, end=9, every=2)
    assert PruneConfig.from_json(config.to_json()) == config
    assert config.density == 0.1


def test_density_follows_the_schedule():
    assert PruneConfig(schedule=CubicSchedule(0.2), density=0.2).density == 0.2
    assert PruneConfig(density=0.3).schedule == CubicSchedule(0.3) and PruneConfig().schedule == CubicSchedule(0.1)
    with pytest.raises(ValueError, match="final density"):
        PruneConfig(schedule=CubicSchedule(0.2), density=0.3)
    with pytest.raises(ValueError, match="begin < end"):
        PruneConfig(begin=5, end=5)
    with pytest.raises(ValueError, match="every"):
        PruneConfig(every=0)
    with pytest.raises(ValueError, match="scope"):
        PruneConfig(scope="world")


def test_a_class_of_the_users_own_may_have_the_name_of_one_of_ours():
    ours, theirs = PruneConfig(granularity=Block(4, 1)), CubicSchedule

    def own_class():
        @dataclass(frozen=True)
        class CubicSchedule(Schedule):
            final_density: float = 0.3
            more: int = 1

        return CubicSchedule

    own = own_class()
    again = PruneConfig.from_json(ours.to_json())
    assert again == ours and type(again.schedule) is theirs
    config = PruneConfig(schedule=own(more=4))
    assert PruneConfig.from_json(config.to_json()) == config
    assert config.to_dict()["schedule"]["kind"] == f"{__name__}.{own.__qualname__}"
