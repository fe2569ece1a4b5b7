"""Every kernel beside its torch baseline, for pytest-benchmark: ``pytest benchmarks --benchmark-only``.

With ``--benchmark-disable`` each contestant runs once and its result is checked. pytest-benchmark times one
contestant after another; ``sparseprune bench`` and ``python -m benchmarks.run`` interleave them, and their ratios are
the ones to trust.
"""

from __future__ import annotations

import functools

import pytest

from sparseprune.bench.cases import SUITES
from sparseprune.bench.contest import Case, Contest
from sparseprune.bench.peers import PEERS
from sparseprune.bench.run import refuse_reference

CASES = [
    Case("linear", (3072, 768), 0.9, "element", 128),
    Case("linear", (3072, 768), 0.9, "element", 8),
    Case("linear", (3072, 768), 0.9, "element", 1),
    Case("linear", (3072, 768), 0.5, "element", 128),
    Case("linear", (3072, 768), 0.9, "16x1", 128),
    Case("linear", (3072, 768), 0.9, "8x1", 128),
    Case("linear", (3072, 768), 0.9, "4x4", 128),
    Case("linear", (3072, 768), 0.5, "2:4", 128),
    Case("training", (768, 768), 0.9, "element", 512),
    Case("training", (768, 768), 0.9, "16x1", 512),
    *(Case(suite, (1_000_000,), 0.9) for suite in ("kth", "topk", "mask", "threshold", "adamw")),
]
BASELINES = {
    "linear": ["torch dense", "torch csr", "torch int8"],
    "training": ["torch dense", "torch dense, masked"],
    "kth": ["torch kthvalue", "np.partition"],
    "topk": ["torch topk"],
    "mask": ["torch mul_"],
    "threshold": ["torch, three passes"],
    "adamw": ["torch fused AdamW + masks"],
}


@functools.lru_cache(maxsize=1)
def contest_of(case: Case) -> Contest:
    return SUITES[case.suite].build(case, [name for name in BASELINES["linear"] if name in PEERS], False)


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in [*BASELINES[case.suite], "ours"]],
    ids=lambda value: f"{value.suite} {value.label}" if isinstance(value, Case) else value,
)
def test_kernel(benchmark, case: Case, name: str) -> None:
    refuse_reference(False)
    contest = contest_of(case)
    if name == "ours":
        name = next(entry for entry in contest.entries if entry.startswith("ours"))
    entry = contest.entries[name]
    wrong = entry.check()
    assert wrong is None, wrong
    benchmark.group = f"{case.suite} {case.label}"
    benchmark.extra_info["case"] = case.to_dict()
    benchmark(entry.run)
