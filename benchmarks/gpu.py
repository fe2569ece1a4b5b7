"""``python benchmarks/gpu.py``: shows on a real card what no other test can: that the GPU kernels are right and fast.

For a machine with an NVIDIA card, CUDA, this checkout and no network: builds sparseprune._cuda for the card, runs the
tests marked ``gpu``, then times whole models, decoding, every CUDA and Triton kernel against its dense and library
baselines (cuBLAS, cuSPARSE, 2:4 through torch), selection and masking; each result is checked before it is timed.
Writes ``benchmarks/results/gpu-NAME.json`` and prints a table; takes at most ten minutes, and says what it left out.

A time is the median of single calls, replayed from a CUDA graph where one can be recorded, each after more than the L2
cache holds was read, as a layer of a large model finds it. "of the roofline" is the least time that the bytes and
operations of a case take at what this card reached on a plain copy and a dense product, over the time measured; for a
model they are those of the dense one, so that sparse ones may pass 100 %.

Cases run in processes of their own, a group each. A kernel that hangs for 90 seconds, or breaks the card's context,
costs its row and the start of the next process; every row is in the file as soon as it is there. ``--tiny`` runs small
cases on the CPU against a module given by ``--module`` (the emulator), so that this code is known to work before there
is a card.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_cases import Case, Place, groups, name_of  # noqa: E402  (this file is run as a program)

FLUSH_BYTES = 256 << 20  # more than any L2
ROUNDS = 30
LONGEST = 90.0  # seconds for one case, or the start of a process, after which it is ended
PEERS = ("dense", "compiled", "cusparse", "torch bsr")  # whose failure is no failure of ours

Row = dict[str, Any]


def wrong(got: Any, expected: Any, allowed: float) -> str | None:
    """Why a result is not the expected one; None where it is, or nothing is expected."""
    if expected is None:
        return None
    if expected.dtype == torch.bool or allowed == 0.0:
        return None if torch.equal(got, expected) else "wrong result"
    worst = float((got.float() - expected).abs().max() / expected.abs().max())
    return None if worst <= allowed else f"wrong result: off by {worst:.1e} of the largest value"


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def synchronize(place: Place) -> None:
    if place.device != "cpu":
        torch.cuda.synchronize()


def broken(place: Place) -> bool:
    """Whether the card's context is lost: every call in this process fails from then on, whoever makes it."""
    try:
        synchronize(place)
    except RuntimeError:
        return True
    return False


def recorded(place: Place, run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """The call replayed from a CUDA graph, or as it is with the reason why not."""
    if place.device == "cpu":
        return run, ""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, ""
    except (RuntimeError, ValueError, AssertionError) as error:
        torch.cuda.synchronize()
        return run, f"no CUDA graph ({first_line(error)})"


def timed(place: Place, run: Callable[[], Any], flush: torch.Tensor) -> float:
    """Microseconds of one call."""
    flush.sum()
    if place.device == "cpu":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000


def measure(place: Place, case: Case, limits: dict[str, float]) -> Row:
    """Checks and times the contestants of a case, in turn within every round. What fails is a note in the row."""
    row: Row = {"op": case.op, "setting": case.setting, "microseconds": {}, "quartiles": {}, "notes": {}}
    try:
        contestants, expected, allowed = case.prepare()
    except Exception as error:  # a row says so; the run goes on
        row["notes"]["case"] = first_line(error)
        row["lost"] = broken(place)
        return row
    if len(contestants) < 2:
        row["notes"]["ours"] = "no kernel of ours takes this call"
    ready = {}
    for name, run in contestants.items():
        try:
            got = run()
            wanted = expected.get(name) if isinstance(expected, dict) else expected
            reason = None if name in case.unchecked else wrong(got, wanted, allowed)
            run()
            synchronize(place)
        except Exception as error:  # a library that lacks a format, or one of our kernels: the row says which
            reason = first_line(error)
            if broken(place):
                row["notes"][name], row["lost"] = reason, True
                return row
        if reason is not None:
            row["notes"][name] = reason
            continue
        ready[name], note = recorded(place, run)
        if note:
            row["notes"][name], row["spoilt"] = note, True
    flush = torch.ones(16 if place.tiny else FLUSH_BYTES // 4, device=place.device)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(2 if place.tiny else ROUNDS):
        for name, run in ready.items():
            samples[name].append(timed(place, run, flush))
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4)
        row["microseconds"][name], row["quartiles"][name] = median, (low, high)
    if limits and (case.bytes or case.operations):
        row["roofline_us"] = 1e6 * max(case.bytes / limits["bandwidth"], case.operations / limits[case.numbers])
    return row


def limits_of(place: Place) -> dict[str, float]:
    """What the card reaches: bytes a second on a plain copy, operations a second on a dense product by dtype."""
    n, side = place.size(1 << 31, 1 << 12), place.size(8192, 32)
    source, to = (torch.ones(n, dtype=torch.uint8, device=place.device) for _ in range(2))
    square = torch.randn(side, side, device=place.device)  # zeros take less power, and so a higher clock
    flush = torch.ones(16, device=place.device)

    def best(run: Callable[[], Any]) -> float:
        return min(timed(place, run, flush) for _ in range(10)) * 1e-6

    found = {"bandwidth": 2 * n / best(lambda: to.copy_(source))}
    for dtype in (torch.float32, torch.float16):
        factor = square.to(dtype)
        found[name_of(dtype)] = 2 * side**3 / best(lambda factor=factor: factor @ factor)
    return found


def table(row: Row) -> str:
    """A case in one line: microseconds of each contestant, how many times faster than dense, share of the roofline."""
    dense, roofline = row["microseconds"].get("dense"), row.get("roofline_us")
    parts = []
    for name, value in row["microseconds"].items():
        ratio = f" ({dense / value:.2f}x)" if dense and name != "dense" else ""
        parts.append(f"{name} {value:.1f} us{ratio}")
    if roofline and len(row["microseconds"]) > 1:
        best = min(value for name, value in row["microseconds"].items() if name != "dense")
        parts.append(f"{roofline / best:.0%} of the roofline")
    parts += [f"{name}: {note}" for name, note in row["notes"].items()]
    return f"{row['op']:14} {row['setting']:52} " + "; ".join(parts)


def child(place: Place, group: str, first: int, limits: dict[str, float]) -> None:
    """Measures a group from its case ``first`` on: one line of JSON before, and one after each. Ends, for the next
    process to go on, after a case that lost the card's context or left a recording half done.
    """
    warnings.filterwarnings("error", "sparseprune runs .* in plain torch on the GPU", RuntimeWarning)
    limits = limits or limits_of(place)
    print(json.dumps({"limits": limits}), flush=True)
    with torch.no_grad():
        for index, case in enumerate(groups(place)[group][first:], first):
            print(json.dumps({"begins": index}), flush=True)
            row = measure(place, case, limits)
            lost, spoilt = row.pop("lost", False), row.pop("spoilt", False)
            print(json.dumps({"row": row}), flush=True)
            if lost:
                os._exit(3)  # what torch does at an ordinary end would fail, or hang
            if spoilt:
                return


def said(command: list[str], end: float, hear: Callable[[dict[str, Any]], None]) -> str:
    """Runs a process and passes on each line of JSON as it comes; returns why it ended, where not by itself and well.

    It is ended where nothing came for LONGEST seconds, and at ``end``.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(LONGEST, end - time.monotonic())))
            except queue.Empty:
                process.kill()  # and not waited for: a hanging kernel may hold it
                return "the time was over" if time.monotonic() >= end else f"nothing came for {LONGEST:.0f} seconds"
            if line is None:
                break
            if line.startswith("{") and line.endswith("}\n"):  # not one that a dying process left half written
                hear(json.loads(line))
        code = process.wait()
        errors.seek(0)
        return f"the process ended with {code}: {errors.read().strip()[-200:]}" if code else ""


def run_group(
    place: Place,
    group: str,
    end: float,
    arguments: list[str],
    limits: dict[str, float],
    keep: Callable[[Row], None],
) -> list[str]:
    """Measures a group; keep: gets each row as it is there; limits: filled by the first process. Returns what was left
    out. A process that dies or hangs is a row; the next one goes on behind it.
    """
    cases = groups(place)[group]
    done = 0
    while done < len(cases) and time.monotonic() < end:
        command = [sys.executable, __file__, "--child", group, "--first", str(done), *arguments]
        command += ["--limits", json.dumps(limits)] if limits else []
        begun, before = done, done

        def hear(message: dict[str, Any]) -> None:
            nonlocal begun, done
            limits.update(message.get("limits", {}))
            begun = message.get("begins", begun)
            if "row" in message:
                done += 1
                keep(message["row"])

        why = said(command, end, hear)
        if why == "the time was over":
            break
        if (why and begun == done) or done == before:
            case, note = cases[done], why or "the process ended without a row"
            done += 1
            keep({"op": case.op, "setting": case.setting, "microseconds": {}, "quartiles": {}, "notes": {"case": note}})
    return [f"{case.op} {case.setting}" for case in cases[done:]]


def failed(row: Row) -> bool:
    """Whether something of ours in it is wrong or did not run."""
    return any(name not in PEERS and name not in row["microseconds"] for name in row["notes"])


def build(timeout: float) -> str:
    """Builds sparseprune._cuda in place for this card; returns how long it took, or why it failed."""
    start = time.perf_counter()
    environment = {**os.environ, "SPARSEPRUNE_CUDA": "1", "SPARSEPRUNE_NATIVE": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"failed: took more than {timeout:.0f} s"
    if run.returncode:
        return f"failed with {run.returncode}: {run.stderr.strip()[-1000:]}"
    return f"{time.perf_counter() - start:.0f} s"


def test(timeout: float) -> dict[str, str]:
    """Runs the tests that need a card, a process for each file, without tuning: file -> pytest's last line, or that its
    time was over.
    """
    end, found = time.monotonic() + timeout, {}
    environment = {**os.environ, "SPARSEPRUNE_TRITON_TUNE": "0"}
    for path in sorted(p for folder in ("cuda", "triton") for p in (ROOT / "tests" / folder).glob("test_*.py")):
        if not re.search(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b", path.read_text(encoding="utf-8")):
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(path)]
        left = max(1.0, end - time.monotonic())
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=min(left, timeout / 2)
            )
        except subprocess.TimeoutExpired:
            found[path.name] = "failed: its time was over"
            continue
        lines = run.stdout.strip().splitlines() or ["no output"]
        found[path.name] = ("failed: " if run.returncode not in (0, 5) else "") + lines[-1]  # 5: none was selected
        if run.returncode not in (0, 5):
            print(run.stdout[-8000:], run.stderr[-2000:], sep="\n", file=sys.stderr)
    return found


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def use_module(path: str) -> None:
    """Takes the module at this path, the emulator's, as sparseprune._cuda."""
    import importlib.machinery
    import importlib.util

    from sparseprune import _native

    loader = importlib.machinery.ExtensionFileLoader("_cuda_emul", path)
    spec = importlib.util.spec_from_file_location("_cuda_emul", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    _native.CUDA = module


def about(place: Place) -> dict[str, Any]:
    if place.tiny:
        return {"gpu": "none: tiny cases on the CPU, no measurement", "torch": torch.__version__}
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main(arguments: list[str] | None = None) -> int:
    """0: all right; 1: a test failed or a result of ours was wrong; 2: this machine cannot run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the result file (default: the card's name)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    parser.add_argument("--seconds", type=float, default=570, help="for everything together (default: 570)")
    parser.add_argument("--no-build", action="store_true", help="use sparseprune._cuda as it is")
    parser.add_argument("--no-tests", action="store_true", help="time without running the gpu tests first")
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, against --module; no measurement")
    parser.add_argument("--module", help="path of the emulated kernels, for --tiny")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--limits", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    place = Place("cpu" if options.tiny else "cuda", options.tiny)
    if options.tiny != (options.module is not None):
        parser.error("--tiny and --module PATH go together")
    if options.module:
        use_module(options.module)
    if not options.tiny and (not torch.cuda.is_available() or torch.version.cuda is None):
        print(
            "benchmarks/gpu.py needs an NVIDIA card, its driver and a torch built for CUDA; "
            f"this torch is {torch.__version__} and sees no such device. Nothing was run.",
            file=sys.stderr,
        )
        return 2
    if options.child:
        child(place, options.child, options.first, options.limits)
        return 0
    end = time.monotonic() + options.seconds
    results: dict[str, Any] = {**about(place), "finished": False}
    name = options.name or re.sub(r"[^a-z0-9]+", "-", results["gpu"].lower()).strip("-")
    path = options.out / f"gpu-{name}.json"
    if not options.no_build and not options.tiny:
        results["build"] = build(options.seconds / 2)
        print(f"build: {results['build']}")
    if not options.no_tests and not options.tiny:
        results["tests"] = test(options.seconds / 3)
        print("gpu tests:", *(f"  {file}: {line}" for file, line in results["tests"].items()), sep="\n")
    rows: list[Row] = []
    limits: dict[str, float] = {}
    results |= {"limits": limits, "rows": rows, "left_out": []}

    def keep(row: Row) -> None:
        rows.append(row)
        print(table(row), flush=True)
        save(path, results)

    passed_on = ["--tiny", "--module", options.module] if options.tiny else []
    for group in groups(place):
        print(f"-- {group}", flush=True)
        results["left_out"] += run_group(place, group, end, passed_on, limits, keep)
    told = [results.get("build", ""), *results.get("tests", {}).values()]
    good = not any(text.startswith("failed") for text in told) and not any(map(failed, rows))
    results |= {"all_right": good, "finished": True}
    save(path, results)
    print(f"{path}: {len(rows)} cases, {len(results['left_out'])} left out for lack of time")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
