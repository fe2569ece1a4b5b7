"""The registry, the correctness gate, tables and the command. Shapes are tiny: no figure means anything here."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from sparseprune import _native, bench
from sparseprune.bench import command, decoding, peers, plots, run, tables
from sparseprune.bench.cases import SUITES
from sparseprune.bench.contest import Case, Contest, Entry
from sparseprune.bench.peaks import Peaks, Work, measure_peaks
from sparseprune.bench.pruned import prune_like
from sparseprune.bench.run import WrongResult, load_results, measure, save_results

needs_core = pytest.mark.skipif(_native.C is None, reason=str(_native.why_no_c()))

SMALL = [
    Case("linear", (48, 40), 0.5, "element", 3),
    Case("linear", (48, 40), 0.9, "16x1", 1),
    Case("linear", (48, 40), 0.9, "8x1", 9),
    Case("linear", (48, 40), 0.5, "4x4", 5),
    Case("linear", (48, 40), 0.5, "2:4", 7),
    Case("decoding", (48, 40), 0.5, "element", 1),
    Case("training", (32, 24), 0.8, "element", 5),
    Case("training", (32, 24), 0.8, "16x1", 5),
    *(Case(suite, (1003,), 0.9) for suite in ("kth", "topk", "mask", "threshold", "adamw")),
]


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(decoding, "BYTES_IN_TURN", 1 << 14)


@needs_core
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.suite} {case.label}")
def test_every_contestant_is_right(case):
    contest = SUITES[case.suite].build(case, list(peers.PEERS), False)
    assert any(entry.ours for entry in contest.entries.values()) and contest.baseline in contest.entries
    for name, entry in contest.entries.items():
        assert entry.check() is None, name
    record = measure(contest, None, rounds=1, min_time=0.0)
    assert record["wrong"] == {} and set(record["results"]) == set(contest.entries)
    assert record["results"][contest.baseline]["ratio"]["median"] == 1.0
    json.dumps(record)
    assert case.label in tables.record_table(record)
    assert tables.case_of(json.loads(json.dumps(record))) == case


@needs_core
@pytest.mark.parametrize("case", [case for case in SMALL if case.suite not in ("kth", "adamw")], ids=str)
def test_a_spoilt_result_is_noticed(case):
    """The gate must be able to fail: spoil one value of every result."""
    contest = SUITES[case.suite].build(case, [], False)
    for entry in contest.entries.values():
        cells = dict(zip(entry.check.__code__.co_freevars, entry.check.__closure__ or ()))
        truth = next((cells[name].cell_contents for name in ("truth", "cut") if name in cells), None)
        if isinstance(truth, tuple):
            truth = truth[0]
        if isinstance(truth, torch.Tensor):
            flat = truth.view(-1)
            flat[0] = ~flat[0] if truth.dtype == torch.bool else flat[0] + 1
            assert entry.check() is not None
            flat[0] = ~flat[0] if truth.dtype == torch.bool else flat[0] - 1


def contest(**wrong):
    """A contest whose contestants are wrong where a reason is given."""
    made = Contest(Case("linear", (2, 2), 0.5, "element", 1))
    for name in ("torch dense", "torch csr", "ours csr"):
        reason = wrong.get(name.replace(" ", "_"))
        made.entries[name] = Entry(lambda: None, lambda reason=reason: reason, None, 8.0, name.startswith("ours"))
    return made


@needs_core
def test_decoding_reads_every_weight_from_memory_and_says_what_one_call_takes(monkeypatch):
    case = Case("decoding", (48, 40), 0.5, "element", 1)
    made = SUITES["decoding"].build(case, [], False)
    for name, entry in made.entries.items():
        assert entry.work.in_turn == entry.calls >= 2
        assert entry.calls * entry.work.bytes >= decoding.BYTES_IN_TURN, name
    seconds = {name: [2.0] for name in made.entries}
    monkeypatch.setattr(run, "interleave", lambda runs, *_, **__: bench.Comparison(seconds, dict.fromkeys(runs, 1)))
    results = measure(made, None)["results"]
    for name, entry in made.entries.items():
        assert results[name]["ms"]["median"] == pytest.approx(2000 / entry.calls)
        assert results[name]["ratio"]["median"] == pytest.approx(entry.calls / made.entries[made.baseline].calls)


def test_the_bandwidth_is_that_of_all_that_is_read_in_turn():
    peaks = Peaks(1e9, 1e9, 1.0, torch.empty(0), {14: 100.0, 20: 10.0})
    assert peaks.limit_seconds(Work(0.0, 1 << 14)) == ((1 << 14) / 100e9, "memory")
    assert peaks.limit_seconds(Work(0.0, 1 << 14, in_turn=64)) == ((1 << 14) / 10e9, "memory")


def test_a_wrong_result_has_no_time():
    record = measure(contest(ours_csr="3 instead of 4"), None, rounds=1, min_time=0.0)
    assert record["wrong"] == {"ours csr": "3 instead of 4"} and "ours csr" not in record["results"]
    assert "WRONG, not timed: ours csr: 3 instead of 4" in tables.record_table(record)
    with pytest.raises(WrongResult, match="baseline torch dense is wrong: nan"):
        measure(contest(torch_dense="nan"), None, rounds=1, min_time=0.0)


def test_the_command_fails_on_a_wrong_result(monkeypatch, capsys):
    spoilt = dataclasses.replace(SUITES["linear"], build=lambda case, peers, allow: contest(ours_csr="3 instead of 4"))
    monkeypatch.setitem(SUITES, "linear", spoilt)
    monkeypatch.setattr(command, "measure_peaks", lambda: pytest.skip("not needed"))
    monkeypatch.setattr(command.machine, "tier", lambda: "reference")
    asked = "--shapes 8x8 --tokens 1 --sparsities 0.5 --structures element --rounds 1 --min-time 0 --allow-reference"
    status = bench.main(asked.split())
    captured = capsys.readouterr()
    assert status == 1 and "WRONG, not timed: 2x2 N=1 element 50%: ours csr: 3 instead of 4" in captured.err


def test_what_some_suite_takes_is_not_refused():
    asked = "--suite kth,linear --shapes 64x64 --tokens 4 --structures element,2:4 --sparsities 0.5,0.9 --peers none"
    arguments = command.parser().parse_args(asked.split())
    cases = list(command.select_cases(arguments))
    command._check_used(arguments, cases)
    kinds = {(case.structure, case.sparsity) for case in cases if case.suite == "linear"}
    assert kinds == {("element", 0.5), ("element", 0.9), ("2:4", 0.5)}


def test_refuses_the_reference(monkeypatch, capsys):
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
    assert bench.main(["--shapes", "8x8"]) == 2
    assert "--allow-reference" in capsys.readouterr().err
    asked = "--shapes 16x16 --tokens 2 --sparsities 0.5 --structures element,16x1 --rounds 1 --min-time 0"
    assert bench.main([*asked.split(), "--allow-reference"]) == 0
    assert "tier reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--suite linaer", "--suite expected"),
        ("--suite=mask\nall", "got mask all"),
        ("--peers torch,tensorflow", "--peers expected"),
        ("--shapes 30x8 --structures 16x1", "must divide"),
        ("--structures 2x", "element, RxC or N:M"),
        ("--structures 2:4 --sparsities 0.9", "no case is left"),
        ("--structures element,2:4 --sparsities 0.8,0.9", "--structures 2:4 would be in no case"),
        ("--structures 2:4 --sparsities 0.5,0.9", "--sparsities 0.9 would be in no case"),
        ("--suite training --structures element,2:4", "--structures 2:4 would be in no case"),
        ("--suite kth --shapes 64x64", "--shapes 64x64 would be in no case of the suites asked for (kth)"),
        ("--suite kth,mask --tokens 4", "--tokens 4 would be in no case of the suites asked for (kth, mask)"),
        ("--suite kth --structures 16x1", "--structures 16x1 would be in no case"),
        ("--suite kth,decoding --peers all", "--peers goes with the suites linear, minilm, curve, tokens, got"),
        ("--suite kth --plots p", "--plots draws what has tokens"),
        ("--structures ,", "--structures expected at least one, got nothing"),
    ],
)
def test_bad_options_get_one_line(asked, said, capsys, monkeypatch):
    monkeypatch.setattr(command, "run_cases", lambda *args, **options: pytest.fail("it ran"))
    assert bench.main(asked.split(" ")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    "asked",
    ["--sparsities 1.5", "--sparsities nan", "--shapes 3072", "--tokens 0", "--tokens a", "--rounds 0", "--threads 0",
     "--min-time inf"],
)  # fmt: skip
def test_bad_numbers_are_refused_by_the_parser(asked, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(asked.split())
    assert stopped.value.code == 2 and "expected" in capsys.readouterr().err


@needs_core
def test_the_command_writes_json_and_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    asked = "--shapes 32x32 --tokens 2 --sparsities 0.5,0.9 --structures element --rounds 2 --min-time 0 --threads 1"
    path = tmp_path / "deep" / "r.json"
    threads = torch.get_num_threads()
    assert bench.main([*asked.split(), "--json", str(path), "--plots", str(tmp_path / "plots")]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "linear, element at 50% / 90%" in out and "ours csr" in out
    data = load_results(path)
    assert data["machine"]["threads"] == 1 and len(data["records"]) == 2 and data["peaks"]["fma_gflops"] > 0
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"speedup.png", "roofline.png"}
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize(("text", "said"), [("x", "not JSON"), ("[]", "format 1"), ('{"format": 9}', "got 9")])
def test_other_files_are_not_results(tmp_path, text, said):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_results(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    save_results(path, [], None)
    before = path.read_text()
    with pytest.raises(TypeError):
        save_results(path, [{"bad": object()}], None)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("structure", "sparsity", "zeros"),
    [("element", 0.37, 710), ("16x1", 0.5, 960), ("4x4", 0.9, 1728), ("2:4", 0.5, 960)],
)
def test_prune_like_is_exact(structure, sparsity, zeros):
    w = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    pruned = prune_like(w, structure, sparsity)
    assert int((pruned == 0).sum()) == pytest.approx(zeros, abs=1)
    assert torch.equal(pruned[pruned != 0], w[pruned != 0])
    with pytest.raises(ValueError, match=r"expected sparsity 0\.5"):
        prune_like(w, "2:4", 0.9)


@needs_core
def test_limits_are_positive_and_the_larger_one_counts():
    peaks = measure_peaks()
    assert peaks.fma > 0 and peaks.l1_fma > 0 and peaks.update > 0 and peaks.read_at(1 << 20) > 0
    better = {**peaks.to_dict(), "fma_gflops": 2 * peaks.fma, "l1_fma_gflops": 1.0, "read_gbs": {"256 KiB": 1e6}}
    peaks.raise_to(better)
    assert peaks.fma == better["fma_gflops"] and peaks.l1_fma > 1.0 and peaks.read_at(200_000) == 1e6
    seconds, what = peaks.limit_seconds(Work(flops=1e12, bytes=1.0))
    assert what == "fma" and seconds == pytest.approx(1e3 / peaks.fma)
    seconds, what = peaks.limit_seconds(Work(flops=1.0, bytes=float(1 << 28), unit="l1_fma"))
    assert what == "memory" and seconds == pytest.approx((1 << 28) / peaks.read_at(1 << 28) / 1e9)


@needs_core
@pytest.mark.parametrize("threads", [1, 2])
def test_peak_kernels_count_their_work(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        c, data = _native.require_c(), torch.arange(1000.0)
        team = threads if c.openmp else 1
        assert c.peak_fma(10) % (2 * c.lanes() * 10 * team) == 0
        assert c.peak_l1_fma(10) == 2 * 8 * c.lanes() * 10 * team
        assert c.peak_read(data.data_ptr(), 1000, 3) == 12000
        assert c.peak_update(data.data_ptr(), 1000) == 8000
        assert torch.equal(data, torch.arange(1000.0))
    finally:
        torch.set_num_threads(before)


def test_break_even():
    assert plots.break_even([0.5, 0.9], [0.5, 2.0]) == pytest.approx(0.7)
    assert plots.break_even([0.9, 0.5], [2.0, 0.5]) == pytest.approx(0.7)
    assert plots.break_even([0.5, 0.9], [1.5, 2.0]) == 0.5
    assert plots.break_even([0.5, 0.9], [0.5, 0.9]) is None


def test_geometric_mean_and_table():
    assert tables.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    text = tables.text_table(["a", "bb"], [["x", "1"], ["yy", "22"]])
    assert text.splitlines() == ["a   bb", "------", "x    1", "yy  22"]
    marked = tables.text_table(["a", "bb"], [["x", "1"]], markdown=True)
    assert marked.splitlines() == ["| a | bb |", "|---|---:|", "| x |  1 |"]
