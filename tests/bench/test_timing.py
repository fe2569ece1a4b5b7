"""Interleaved timing, the choice of the fastest, and the cache. No test asserts how long anything takes."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch

from sparseprune import bench
from sparseprune.bench import machine, timing


class Clock:
    """A clock that only moves when a fake kernel says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def kernel(self, seconds, log=None, name=""):
        def run():
            self.now += seconds
            if log is not None:
                log.append(name)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


@pytest.fixture
def store(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "timings.json"
    monkeypatch.setenv("SPARSEPRUNE_CACHE", str(path))
    monkeypatch.setattr(machine, "load", lambda: 0.5)
    return path


def test_interleave_reports_times_and_ratios(clock):
    result = bench.interleave({"dense": clock.kernel(0.004), "sparse": clock.kernel(0.001)}, rounds=4, min_time=0.02)
    assert result.calls == {"dense": 5, "sparse": 20}
    assert result.time("dense").median == pytest.approx(0.004)
    assert result.ratio("sparse", "dense").median == pytest.approx(4.0)
    assert result.time("sparse").count == 4


def test_every_round_runs_everyone_and_another_starts(clock):
    log: list[str] = []
    runs = {name: clock.kernel(1.0, log, name) for name in "abc"}
    bench.interleave(runs, rounds=3, min_time=0.0, warm_up=1)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"


def test_ratio_is_formed_within_a_round(clock):
    """A machine that runs 10 times slower in every second round leaves the ratio and its quartiles alone."""
    calls = {"dense": 0, "sparse": 0}

    def kernel(name, seconds):
        def run():
            clock.now += seconds * (10 if calls[name] % 2 else 1)
            calls[name] += 1

        return run

    runs = {"dense": kernel("dense", 2.0), "sparse": kernel("sparse", 1.0)}
    result = bench.interleave(runs, rounds=6, min_time=0.0)
    ratio = result.ratio("sparse", "dense")
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert result.time("dense").high == pytest.approx(20.0)


def test_cold_samples_leave_eviction_outside_the_clock(clock):
    result = bench.interleave({"a": clock.kernel(0.5)}, rounds=2, min_time=0.0, evict_bytes=1 << 12)
    assert result.time("a").median == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"min_time": -1.0}, {"warm_up": 0}, {"min_time": float("nan")}])
def test_interleave_refuses(wrong):
    with pytest.raises(ValueError, match="expected"):
        bench.interleave({"a": lambda: None}, **wrong)
    with pytest.raises(ValueError, match="at least one candidate"):
        bench.interleave({})


def test_quartiles():
    spread = bench.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.low, spread.median, spread.high, spread.count) == (2.0, 3.0, 4.0, 5)
    assert bench.Spread.of([7.0]) == bench.Spread(7.0, 7.0, 7.0, 1)


def choose(clock, times, **options):
    """times[name][tokens]: seconds."""

    def setup(per):
        return lambda count: clock.kernel(per[count])

    return bench.choose_fastest({name: setup(per) for name, per in times.items()}, **options)


def test_worst_token_count_decides(clock):
    times = {"dense": {1: 1.0, 8: 1.0}, "csr": {1: 0.2, 8: 0.9}, "bsr": {1: 0.5, 8: 0.6}}
    choice = choose(clock, times, tokens=(1, 8), min_time=0.0)
    assert choice.name == "bsr" and choice.ratio == pytest.approx(1 / 0.6)
    assert choice.ratios["csr"] == pytest.approx({1: 5.0, 8: 1 / 0.9})
    assert "bsr 1.67" in choice.reason and not choice.cached


def test_dense_stays_where_the_gain_is_too_small(clock):
    times = {"dense": {4: 1.0}, "csr": {4: 0.95}}
    choice = choose(clock, times, tokens=(4,), min_time=0.0)
    assert (choice.name, choice.ratio) == ("dense", 1.0)
    assert "csr 1.05" in choice.reason
    assert choose(clock, times, tokens=(4,), min_time=0.0, min_ratio=1.05).name == "csr"


def test_choose_refuses(clock):
    with pytest.raises(ValueError, match="baseline 'dense'"):
        choose(clock, {"csr": {1: 1.0}}, tokens=(1,))
    with pytest.raises(ValueError, match="tokens"):
        choose(clock, {"dense": {1: 1.0}}, tokens=())


def key(name, tokens):
    return bench.layer_key((16, 32), 0.1, name, tokens, torch.float32)


def test_cache_spares_the_measurement(clock, store):
    times = {"dense": {4: 1.0}, "csr": {4: 0.25}}
    first = choose(clock, times, tokens=(4,), min_time=0.0, key=key)

    def never(count):
        raise AssertionError("a cached timing was measured again")

    again = bench.choose_fastest({"dense": never, "csr": never}, tokens=(4,), key=key)
    assert again.cached and not first.cached
    assert (again.name, again.ratio) == (first.name, first.ratio)
    assert again.milliseconds["dense"] == first.milliseconds["dense"]
    assert [path.name for path in store.parent.iterdir()] == [store.name]
    # another token count is measured on its own
    with pytest.raises(AssertionError, match="measured again"):
        bench.choose_fastest({"dense": never, "csr": never}, tokens=(4, 8), key=key)


def test_a_busy_machine_is_said_and_its_timings_are_made_again_on_a_quiet_one(clock, store, monkeypatch):
    times = {"dense": {4: 1.0}, "csr": {4: 0.25}}
    cores = os.cpu_count()
    monkeypatch.setattr(machine, "load", lambda: 3.0 * cores)
    first = choose(clock, times, tokens=(4,), min_time=0.0, key=key)
    assert first.doubt == f"timed under load {3.0 * cores:.1f} on {cores} cores"
    again = choose(clock, times, tokens=(4,), min_time=0.0, key=key)
    assert again.cached and again.doubt == first.doubt
    monkeypatch.setattr(machine, "load", lambda: 1.1 * cores)  # what went before on all cores is no other's work
    quiet = choose(clock, times, tokens=(4,), min_time=0.0, key=key)
    assert not quiet.cached and quiet.doubt == ""
    monkeypatch.setattr(machine, "load", lambda: 3.0 * cores)
    assert choose(clock, times, tokens=(4,), min_time=0.0, key=key).doubt == ""  # timed when it was quiet


def test_rounds_that_disagree_are_said(clock, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: None)
    calls = iter([1.0, 1.0, *[0.5, 2.0] * 3])  # two warm-up calls first

    def sparse(count):
        def run():
            clock.now += next(calls)

        return run

    def dense(count):
        return clock.kernel(1.0)

    found = bench.choose_fastest({"dense": dense, "csr": sparse}, tokens=(4,), min_time=0.0, rounds=6)
    assert found.doubt == "csr ran from 0.50 to 2.00 times as fast as dense at 4 tokens"


def test_cache_can_be_turned_off(clock, store, monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "off")
    times = {"dense": {4: 1.0}, "csr": {4: 0.25}}
    assert not choose(clock, times, tokens=(4,), min_time=0.0, key=key).cached
    assert not choose(clock, times, tokens=(4,), min_time=0.0, key=key).cached
    assert bench.cache_path() is None and not store.exists()


def test_cache_goes_to_the_user_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSEPRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bench.cache_path() == tmp_path / "sparseprune" / "timings.json"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "timings": 3}', '{"version": 1, "timings": {"a": 1}}'])
def test_broken_cache_is_said_and_replaced(store, text):
    store.parent.mkdir(parents=True)
    store.write_text(text)
    with pytest.warns(RuntimeWarning, match="cached timings are not used"):
        cache = bench.default_cache()
    assert cache.get("k") is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.put({"k": {"ratio": 2.0}})
    assert json.loads(store.read_text())["timings"] == {"k": {"ratio": 2.0}}


def test_two_writers_keep_each_others_entries(store):
    one, two = bench.default_cache(), bench.default_cache()
    one.put({"a": {"ratio": 1.0}})
    two.put({"b": {"ratio": 2.0}})
    assert bench.default_cache().get("a") == {"ratio": 1.0}
    assert bench.default_cache().get("b") == {"ratio": 2.0}


@pytest.mark.skipif(os.name != "posix", reason="a folder in place of a file is told apart by POSIX errors")
def test_unwritable_cache_costs_only_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(RuntimeWarning):
        bench.TimingCache(blocked / "timings.json").put({"a": {"ratio": 1.0}})


def test_key_names_what_the_time_depends_on():
    threads = torch.get_num_threads()
    base = key("csr", 4)
    assert base != key("csr", 8) and base != key("bsr", 4)
    assert base != bench.layer_key((32, 16), 0.1, "csr", 4, torch.float32)
    assert base != bench.layer_key((16, 32), 0.2, "csr", 4, torch.float32)
    assert base != bench.layer_key((16, 32), 0.1, "csr", 4, torch.bfloat16)
    assert base != bench.layer_key((16, 32), 0.1, "csr", 4, torch.float32, note="bf16 values")
    assert f"threads={threads}" in base and torch.__version__ in base


def test_machine_is_described():
    about = bench.describe()
    assert about["threads"] == torch.get_num_threads() and about["cpu"] and about["torch"] == torch.__version__
    assert about["tier"] in bench.one_line()
    json.dumps(about)
