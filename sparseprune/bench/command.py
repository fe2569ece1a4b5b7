"""The command ``sparseprune bench``: our kernels beside dense and other sparse libraries, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .._arguments import Parser, check_folder, one_line, path_of, real, whole
from . import machine, plots, tables
from .cases import SUITES, WITH_PEERS
from .contest import BASELINE, Case
from .peaks import measure_peaks
from .peers import PEERS
from .run import WrongResult, refuse_reference, run_cases, save_results

__all__ = ["main", "parser"]

_QUICK_PEERS = (BASELINE, "torch csr", "torch int8")
_EVICT = 96 << 20


def parser() -> argparse.ArgumentParser:
    """The command line of ``sparseprune bench``."""
    suites = "\n".join(f"  {name:<10} {suite.about}" for name, suite in SUITES.items())
    result = Parser(
        prog="sparseprune bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times our kernels interleaved with torch dense and with other sparse libraries, on this machine.\n"
        "Every result is checked before its time is reported. A ratio above 1 is faster than the baseline.",
        epilog=f"suites:\n{suites}\n\nexamples:\n"
        "  sparseprune bench --shapes 3072x768 --tokens 128 --sparsities 0.8,0.9 --structures element,16x1\n"
        "  sparseprune bench --suite kth,mask,adamw --threads 1\n"
        "  sparseprune bench --suite curve --peers all --json curve.json --plots plots/",
    )
    result.add_argument("--suite", default="linear", help="one or more of the suites below, or all (default: linear)")
    result.add_argument("--shapes", type=_shapes, help="OUTxIN,... in place of the suite's own")
    result.add_argument("--tokens", type=_numbers(int, 1, 1 << 20), help="rows of x, e.g. 1,8,128")
    result.add_argument("--sparsities", type=_numbers(float, 0.0, 0.9999), help="fractions of zeros, e.g. 0.8,0.9")
    result.add_argument("--structures", type=_list, help="element, RxC blocks, N:M, e.g. element,16x1")
    result.add_argument(
        "--peers",
        type=_list,
        help=f"all, none, or some of: {', '.join(PEERS)} (default: {', '.join(_QUICK_PEERS)}); "
        f"in the suites {', '.join(WITH_PEERS)}",
    )
    result.add_argument("--threads", type=whole(1, 4096), help="torch.set_num_threads (default: torch's own)")
    result.add_argument("--rounds", type=whole(1), default=9, help="samples of each contestant (default 9)")
    result.add_argument(
        "--min-time", type=real("[0, inf)"), default=0.02, help="seconds a sample at least (default 0.02)"
    )
    result.add_argument("--cold", action="store_true", help="read 96 MiB before every call: operands come from memory")
    result.add_argument("--details", action="store_true", help="print every contest in full, not only the summary")
    result.add_argument("--json", type=path_of, help="write all figures to this file")
    result.add_argument("--plots", type=path_of, help="draw speed-up and roofline plots into this folder")
    result.add_argument("--allow-reference", action="store_true", help="time plain torch where the core is absent")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for a wrong result, 2 for what cannot be asked or run."""
    arguments = parser().parse_args(argv)
    try:
        cases = list(select_cases(arguments))
        peers = select_peers(_QUICK_PEERS if arguments.peers is None else arguments.peers)
        _check_used(arguments, cases)
        refuse_reference(arguments.allow_reference)
        _check_outputs(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"sparseprune bench: error: {one_line(error)}", file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        return _run(arguments, cases, peers)
    except WrongResult as error:
        print(f"sparseprune bench: error: {one_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise  # nobody reads the figures any more: no error to tell of
    except (OSError, RuntimeError) as error:
        print(f"sparseprune bench: error: {one_line(error)}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)


def _check_used(arguments: argparse.Namespace, cases: Sequence[Case]) -> None:
    """ValueError on what is asked for and would change nothing."""
    for option in ("shapes", "structures", "peers"):
        if getattr(arguments, option) == []:
            raise ValueError(f"--{option} expected at least one, got nothing; leave it out for the suite's own")
    suites = dict.fromkeys(case.suite for case in cases)
    shown = ", ".join(suites)
    for option, found in (
        ("shapes", {case.shape for case in cases}),
        ("tokens", {case.tokens for case in cases}),
        ("structures", {case.structure for case in cases}),
        ("sparsities", {case.sparsity for case in cases}),
    ):
        for value in getattr(arguments, option) or []:
            if value not in found:
                text = "x".join(map(str, value)) if option == "shapes" else value
                why = "N:M has one sparsity alone, and flat tensors have no shapes, tokens and structures"
                raise ValueError(f"--{option} {text} would be in no case of the suites asked for ({shown}): {why}")
    if arguments.peers is not None and not suites.keys() & set(WITH_PEERS):
        raise ValueError(f"--peers goes with the suites {', '.join(WITH_PEERS)}, got {shown}; leave it out")
    if arguments.plots is not None and not any(case.tokens for case in cases):
        raise ValueError(f"--plots draws what has tokens, got the suites {shown}; leave it out")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """What would only be found out after all the work."""
    if arguments.json is not None:
        if arguments.json.is_dir():
            raise IsADirectoryError(f"--json expected a file to write, got the folder {arguments.json}")
        check_folder(arguments.json.parent, "--json")
    if arguments.plots is not None:
        check_folder(arguments.plots, "--plots")
        if importlib.util.find_spec("matplotlib") is None:
            raise RuntimeError("--plots needs matplotlib; pip install 'sparseprune[plot]'")


def _run(arguments: argparse.Namespace, cases: list[Case], peers: list[str]) -> int:
    print(machine.one_line(), flush=True)
    peaks = None if machine.tier() == "reference" else measure_peaks()
    if peaks is not None:
        limits = peaks.to_dict()
        read = ", ".join(f"{rate} at {size}" for size, rate in limits["read_gbs"].items())
        print(
            f"limits: {limits['fma_gflops']} GFLOP/s, {limits['l1_fma_gflops']} with one L1 load a multiply-add; "
            f"GB/s read: {read}; updated in place: {limits['update_gbs']}\n",
            flush=True,
        )

    def show(record: dict[str, Any]) -> None:
        if arguments.details or record["case"]["suite"] not in WITH_PEERS:
            print(tables.record_table(record) + "\n", flush=True)

    records = run_cases(
        cases,
        peers,
        peaks,
        rounds=arguments.rounds,
        min_time=arguments.min_time,
        evict_bytes=_EVICT if arguments.cold else 0,
        allow_reference=arguments.allow_reference,
        each=show,
    )
    linear = [record for record in records if record["case"]["tokens"]]
    if linear:
        operands = "cold" if arguments.cold else "warm"
        print(f"speed-up over {BASELINE} (medians of {arguments.rounds}; {operands} operands)\n")
        print(tables.summary(linear))
    for name, reason in {n: r for record in records for n, r in record["absent"].items()}.items():
        print(f"not run: {name}: {reason}")
    wrong = [(record, name, reason) for record in records for name, reason in record["wrong"].items()]
    for record, name, reason in wrong:
        print(f"WRONG, not timed: {tables.case_of(record).label}: {name}: {reason}", file=sys.stderr)
    print(f"load at the end: {machine.load()}")
    if arguments.json is not None:
        save_results(arguments.json, records, peaks)
        print(f"wrote {arguments.json}")
    if arguments.plots is not None and linear:
        about = f"{machine.cpu_model()}, {torch.get_num_threads()} threads, {machine.tier()}"
        plots.speedup(linear, arguments.plots / "speedup.png", about)
        if peaks is not None:
            plots.roofline(linear, peaks.to_dict(), arguments.plots / "roofline.png", about)
        print(f"drew {arguments.plots}/speedup.png" + (" and roofline.png" if peaks is not None else ""))
    return 1 if wrong else 0


def select_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The cases that the options ask for; ValueError where they ask for none or for what cannot be."""
    names = list(SUITES) if arguments.suite == "all" else _list(arguments.suite)
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        raise ValueError(f"--suite expected some of {', '.join(SUITES)} or all, got {', '.join(unknown) or 'nothing'}")
    count = 0
    for name in names:
        seen = set()
        for case in SUITES[name].cases():
            for new in _replaced(case, arguments):
                if new not in seen:
                    seen.add(new)
                    count += 1
                    yield new
    if not count:
        raise ValueError("no case is left: every structure given fixes another sparsity, or the suite has no tokens")


def _replaced(case: Case, arguments: argparse.Namespace) -> Iterator[Case]:
    """The suite's case with the values given in place of its own; structures are crossed with sparsities."""
    flat = len(case.shape) == 1
    shapes = arguments.shapes if arguments.shapes and not flat else [case.shape]
    for shape in shapes:
        for tokens in arguments.tokens if arguments.tokens and not flat else [case.tokens]:
            for structure in arguments.structures if arguments.structures and not flat else [case.structure]:
                for sparsity in arguments.sparsities or [case.sparsity]:
                    if ":" in structure:
                        n, m = _pair(structure, ":")
                        if not math.isclose(sparsity, 1 - n / m):
                            continue
                    elif structure != "element":
                        r, c = _pair(structure, "x")
                        if (shape[0] % r or shape[1] % c) and not arguments.structures:
                            continue
                        if shape[0] % r or shape[1] % c:
                            raise ValueError(f"--structures {structure} must divide the shape {shape[0]}x{shape[1]}")
                    yield Case(case.suite, tuple(shape), sparsity, structure, tokens)


def select_peers(asked: Sequence[str]) -> list[str]:
    """Names of peers; ``all`` and ``none`` understood; the baseline always among them."""
    if list(asked) == ["all"]:
        return list(PEERS)
    if list(asked) == ["none"]:
        return [BASELINE]
    unknown = [name for name in asked if name not in PEERS]
    if unknown:
        raise ValueError(f"--peers expected all, none or some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    return list(dict.fromkeys([BASELINE, *asked]))


def _pair(text: str, sign: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(sign))
    except ValueError:
        raise ValueError(f"structure expected element, RxC or N:M, got {text!r}") from None
    if first < 1 or second < 1 or (sign == ":" and first > second):
        raise ValueError(f"structure expected element, RxC or N:M with N <= M, got {text!r}")
    return first, second


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        return [_pair(part, "x") for part in _list(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected OUTxIN,..., got {text!r}") from error


def _numbers(kind: type, low: float, high: float) -> Any:
    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in _list(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers, got {text!r}") from None
        if not values or not all(low <= value <= high for value in values):
            raise argparse.ArgumentTypeError(f"expected numbers from {low} to {high}, got {text!r}")
        return values

    return parse
