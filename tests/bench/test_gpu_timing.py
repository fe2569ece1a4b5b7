"""Timing on a GPU that runs behind the host: a fake one, whose work takes time only when it is waited for."""

from __future__ import annotations

import pytest
import torch

from sparseprune import bench, language
from sparseprune.bench import machine, timing
from sparseprune.nn.sparsify.measure import fitting_layouts
from sparseprune.nn.sparsify.timing import copies_on_gpu


class Device:
    """A clock and a queue: a launch costs the host nothing, a wait takes as long as what is queued."""

    def __init__(self):
        self.now, self.queued = 0.0, 0.0

    def perf_counter(self):
        return self.now

    def synchronize(self, device=None):
        self.now += self.queued
        self.queued = 0.0

    def kernel(self, seconds):
        def run():
            self.queued += seconds
            self.now += 1e-6

        return run


@pytest.fixture
def gpu(monkeypatch):
    device = Device()
    for module in (timing, language):
        monkeypatch.setattr(module, "time", device)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    return device


def test_a_sample_holds_its_own_work_whole(gpu):
    runs = {"dense": gpu.kernel(0.004), "sparse": gpu.kernel(0.001)}
    found = bench.interleave(runs, rounds=4, min_time=0.02, device="cuda")
    assert found.time("dense").median == pytest.approx(0.004, rel=1e-2)
    assert found.ratio("sparse", "dense").median == pytest.approx(4.0, rel=1e-2)
    assert found.calls["dense"] == 5


def test_the_choice_waits_too(gpu):
    candidates = {"dense": lambda rows: gpu.kernel(0.003), "csr": lambda rows: gpu.kernel(0.001)}
    choice = bench.choose_fastest(candidates, tokens=(4,), device="cuda")
    assert choice.name == "csr" and choice.ratio == pytest.approx(3.0, rel=1e-2)


def test_reading_and_writing_are_told_apart(gpu):
    class Output:
        logits = torch.zeros(1, 1, 5, device="meta")
        past_key_values = object()

    class Model:
        def __call__(self, ids, **options):
            gpu.queued += 0.1 if ids.shape[1] > 1 else 0.01
            return Output()

    wait = language._wait
    language._wait = lambda device: wait(torch.device("cuda"))
    try:
        reading, writing = language._once(Model(), torch.zeros(1, 7, dtype=torch.int64, device="meta"), 3)
    finally:
        language._wait = wait
    assert reading == pytest.approx(0.1) and writing == pytest.approx(0.03)


def test_timings_of_two_devices_never_meet(monkeypatch):
    cards = {"cuda:0": ("Card A", (8, 0)), "cuda:1": ("Card A", (9, 0)), "cuda:2": ("Card B", (9, 0))}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[str(device)][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[str(device)][1])
    keys = [bench.layer_key((16, 32), 0.1, "csr", 4, torch.float32, device=device) for device in ("cpu", *cards)]
    assert len(set(keys)) == 4
    assert machine.cpu_model() in keys[0] and "Card A (capability 8.0)" in keys[1]
    assert machine.cpu_model() not in keys[1]
    monkeypatch.setattr(bench.cache, "precision", lambda dtype: "tf32")
    assert bench.layer_key((16, 32), 0.1, "csr", 4, torch.float32, device="cuda:0") != keys[1]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[str(device)][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[str(device)][1])
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
    assert bench.layer_key((16, 32), 0.1, "csr", 4, torch.float32, device="cuda:0") != keys[1]


def test_every_contestant_comes_from_memory():
    """A tenth of a weight that is kept fits the cache where the weight does not."""
    mib = 1 << 20
    assert copies_on_gpu(32 * mib, 3 * mib, 50 * mib) * 3 * mib > 2 * 50 * mib
    assert copies_on_gpu(32 * mib, 32, 50 * mib) == 64, "2 GiB of dense weights at most"
    assert copies_on_gpu(4096 * mib, 400 * mib, 50 * mib) == 1


def test_candidates_are_what_the_kernels_of_the_device_take():
    def names(kept):
        return list(fitting_layouts(kept, gpu=False)), list(fitting_layouts(kept, gpu=True))

    columns, squares = torch.zeros(128, 128, dtype=torch.bool), torch.zeros(128, 128, dtype=torch.bool)
    columns[:16, :7], squares[:32, 32:64] = True, True
    half = torch.arange(128).expand(128, 128) % 4 < 2
    quarter = torch.arange(128).expand(128, 128) % 4 < 1
    assert names(columns) == (["csr", "bsr16x1"], ["csr"])
    assert names(squares) == (["csr", "bsr16x1"], ["csr", "bsr32x32"])
    assert names(half)[1] == ["csr", "nm2:4"] and names(quarter)[1] == ["csr", "nm2:4"]
    assert "nm1:4" not in names(quarter)[1]
