"""``python -m benchmarks.accuracy_latency``: test accuracy beside latency of a classifier in every form one could run.

MiniLM-L6 fine-tuned on CLINC150: dense and pruned in blocks of 1x4, in float32 and int8. Ours run as one program;
torch, ONNX Runtime (int8: dynamic and static) and OpenVINO (int8: by NNCF, after training) run the dense model. Static
int8 is calibrated on the validation split. The dense and the healed models are those that
``python -m benchmarks.int8_accuracy`` left under ``--cache``. All contestants of a shape run in turn, in one process; a
peer that is absent is named with the reason. Results are merged into ``benchmarks/results/accuracy-latency.json``, one
record a machine's tier and number of threads; ``--plot`` draws one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparseprune as sp
from benchmarks.ablation import SIZES, Cell
from benchmarks.int8 import INT8, torch_int8
from benchmarks.model_peers import onnxruntime_of, openvino_of
from benchmarks.models import inputs
from benchmarks.run import merged
from sparseprune import bench
from sparseprune.bench import machine, plots
from sparseprune.bench.run import load_results, save_results
from sparseprune.bench.tables import text_table

RESULTS = Path(__file__).parent / "results" / "accuracy-latency.json"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "accuracy-latency.svg"
SHAPES = ((1, 16), (16, 64))
NAMES = ("input_ids", "attention_mask")
_KEY = ("data", "threads", "tier")
#: Calls a batch of NAMES as int64 arrays and returns logits.
Run = Callable[[dict[str, np.ndarray]], Any]


class Logits(nn.Module):
    """The classifier with positional inputs and one output, as an export wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def of_torch(model: nn.Module) -> Run:
    model = model.eval().requires_grad_(False)

    def run(arrays: dict[str, np.ndarray]) -> Any:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits

    return run


def program(model: nn.Module, tokens: int, filter_fn: Any, **how: Any) -> Run:
    """A copy whose encoder is one program; RuntimeError where it is not."""
    made = copy.deepcopy(model).eval().requires_grad_(False)
    report = sp.sparsify_(made, tokens=tokens, engine="program", filter_fn=filter_fn, **how)
    if [stack.engine for stack in report.stacks] != ["program"]:
        raise RuntimeError(f"{report.stacks}; no time is reported")
    return of_torch(made)


def ours(cell: Cell, healed: dict[float, nn.Module], tokens: int) -> dict[str, Run]:
    tall: dict[str, Any] = {"layout": "bsr", "blocksize": (16, 1)}
    quads: dict[str, Any] = {"layout": "bsr", "blocksize": (1, 4)}
    runs = {"torch": of_torch(copy.deepcopy(cell.dense)), "torch int8": of_torch(torch_int8(cell.dense))}
    runs["ours int8"] = program(cell.dense, tokens, cell.filter_fn, **tall, **INT8)
    for sparsity, model in healed.items():
        runs[f"ours {sparsity:.0%} zeros"] = program(model, tokens, cell.filter_fn, layout="csr")
        runs[f"ours {sparsity:.0%} zeros int8"] = program(model, tokens, cell.filter_fn, **quads, **INT8)
    return runs


def export(model: nn.Module, path: Path) -> None:
    """As ONNX with any batch and length; ValueError where it answers otherwise than the model at another shape."""
    example = tuple(inputs(2, 8)[name] for name in NAMES)
    places = {name: {0: "batch", 1: "length"} for name in NAMES}
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(model).eval(),  # the exporter leaves the model in the mode of what holds it
            example,
            str(path),
            input_names=list(NAMES),
            dynamic_axes=places,
            dynamo=False,
            opset_version=17,
        )
    other = {name: inputs(3, 13)[name].numpy() for name in NAMES}
    other["attention_mask"][1, 5:] = 0
    gap = np.abs(np.asarray(onnxruntime_of(path)(other)) - of_torch(model)(other).numpy()).max()
    if not gap < 1e-3:
        raise ValueError(f"the exported model differs by {gap:.3g} at 3 x 13")


def onnx_static(path: Path, target: Path, batches: Sequence[dict[str, np.ndarray]]) -> None:
    """ONNX Runtime's static int8 of the products; 7-bit weights where the CPU lacks VNNI, as its makers advise."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Any:
            return next(self.rest, None)

    quantize_static(
        str(path), str(target), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True, reduce_range="vnni" not in machine.tier(), weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )  # fmt: skip


def peers(
    dense: nn.Module, batches: Sequence[dict[str, np.ndarray]], folder: Path, shape: tuple[int, int]
) -> tuple[dict[str, Run], dict[str, str]]:
    """(name -> run, name -> why it is absent); models are kept in ``folder``."""
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(name: str) -> Any:
        try:
            yield
        except Exception as error:  # a peer's own refusal: it is reported, and nothing is measured of it
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"

    whole, dynamic, static = (folder / name for name in ("whole.onnx", "dynamic.onnx", "static.onnx"))
    with attempt("onnxruntime"):
        if not whole.exists():
            export(dense, whole)
        runs["onnxruntime"] = onnxruntime_of(whole)
    with attempt("onnxruntime int8 dynamic"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        if not dynamic.exists():
            quantize_dynamic(str(whole), str(dynamic), weight_type=QuantType.QInt8, per_channel=True)
        runs["onnxruntime int8 dynamic"] = onnxruntime_of(dynamic)
    with attempt("onnxruntime int8 static"):
        if not static.exists():
            onnx_static(whole, static, batches)
        runs["onnxruntime int8 static"] = onnxruntime_of(static)
    with attempt("openvino"):
        import openvino

        model = openvino.Core().read_model(whole)
        model.reshape({name: list(shape) for name in NAMES})  # a fixed shape is what it runs best
        runs["openvino"] = openvino_of(model)
    with attempt("openvino int8 nncf"):
        import nncf
        import openvino

        narrow = folder / "nncf.xml"
        if not narrow.exists():
            found = nncf.quantize(
                openvino.Core().read_model(whole), nncf.Dataset(list(batches)), model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(batches),
            )  # fmt: skip
            openvino.save_model(found, narrow)
        model = openvino.Core().read_model(narrow)
        model.reshape({name: list(shape) for name in NAMES})
        runs["openvino int8 nncf"] = openvino_of(model)
    return runs, absent


def padded(cell: Cell, split: str, shape: tuple[int, int]) -> list[tuple[dict[str, np.ndarray], Tensor]]:
    """The split as (inputs of exactly this shape, labels of the real rows)."""
    found = []
    for batch in getattr(cell, split):
        labels = batch["labels"]
        for at in range(0, len(labels), shape[0]):
            arrays = {}
            for name in NAMES:
                rows = batch[name][at : at + shape[0]].numpy().astype(np.int64)
                arrays[name] = np.zeros(shape, np.int64)
                arrays[name][: len(rows), : rows.shape[1]] = rows
            arrays["attention_mask"][len(rows) :, 0] = 1  # rows that only fill up the batch
            found.append((arrays, labels[at : at + shape[0]]))
    return found


def accuracy(run: Run, batches: Sequence[tuple[dict[str, np.ndarray], Tensor]]) -> float:
    right = total = 0
    for arrays, labels in batches:
        said = torch.as_tensor(np.asarray(run(arrays)))[: len(labels)].argmax(-1)
        right, total = right + int((said == labels).sum()), total + len(labels)
    return right / total


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cell = Cell(arguments.data, 0, SIZES["minilm"], arguments.data_dir, arguments.cache)
    healed = {}
    for sparsity in arguments.sparsity:
        path = arguments.cache / f"minilm-{sparsity:g}-0-simulated.pt"
        if not path.exists():
            raise SystemExit(f"{path} expected: python -m benchmarks.int8_accuracy --sparsity {sparsity:g} makes it")
        healed[sparsity] = copy.deepcopy(cell.dense)
        healed[sparsity].load_state_dict(torch.load(path, weights_only=True))
    longest = cell.setting.max_length
    calibration = [arrays for arrays, _ in padded(cell, "valid", (8, longest))[:40]]
    folder = arguments.cache / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    judged = (64, longest)
    test = padded(cell, "test", judged)
    contestants, absent = peers(cell.dense, calibration, folder, judged)
    contestants = ours(cell, healed, 64 * longest) | contestants
    scores = {}
    for name, run in contestants.items():
        scores[name] = accuracy(run, test)
        print(f"{name}: {scores[name]:.4f}", flush=True)
    result: dict[str, Any] = {
        "machine": machine.describe(), "threads": torch.get_num_threads(), "tier": machine.tier(),
        "data": arguments.data, "examples": sum(len(labels) for _, labels in test), "accuracy": scores, "shapes": [],
    }  # fmt: skip
    for shape in SHAPES:
        arrays = {name: inputs(*shape)[name].numpy() for name in NAMES}
        foreign, why = peers(cell.dense, calibration, folder, shape)
        absent |= why
        runs = ours(cell, healed, shape[0] * shape[1]) | foreign
        calls = {name: (lambda run=run, arrays=arrays: run(arrays)) for name, run in runs.items()}
        before = machine.load()
        found = bench.interleave(calls, arguments.rounds, min_time=0.03)
        result["shapes"].append({
            "shape": list(shape), "load": [before, machine.load()],
            "ms": {name: 1e3 * found.time(name).median for name in calls},
            "ratio": {name: found.ratio(name, "torch").to_dict() for name in calls},
        })  # fmt: skip
    return result | {"absent": absent}


def table(result: dict[str, Any], markdown: bool = False) -> str:
    rows = []
    for name, score in result["accuracy"].items():
        cells = [f"{r['ms'][name]:.2f} ({r['ratio'][name]['median']:.2f})" for r in result["shapes"]]
        rows.append([name, f"{score:.4f}", f"{score / result['accuracy']['torch']:.2%}", *cells])
    shapes = ["{} x {}, ms (over torch)".format(*r["shape"]) for r in result["shapes"]]
    return text_table(["form", "test accuracy", "of dense", *shapes], rows, markdown)


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy over latency, a panel a shape."""
    panels = {
        "ms a batch of {} x {} tokens".format(*found["shape"]): {
            name: (ms, 100 * result["accuracy"][name]) for name, ms in found["ms"].items()
        }
        for found in result["shapes"]
    }
    about = result["machine"]
    title = f"MiniLM-L6; {about['cpu']}, {result['threads']} threads, {about['tier']}"
    plots.trade_off(panels, path, f"test accuracy, % ({result['data']}, {result['examples']} texts)", title)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy_latency", description=__doc__)
    parser.add_argument("--data", default="clinc150")
    parser.add_argument("--data-dir", type=Path, help="the folder of data sets that do not ship with the package")
    parser.add_argument("--cache", type=Path, default=Path("runs/int8-accuracy"), help="dense and healed models")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only show what is there")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plot", type=Path, nargs="?", const=PICTURE, help="draw it there")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    known = load_results(arguments.output)["records"] if arguments.output.exists() else []
    if not arguments.table:
        record = measure(arguments)
        known = merged(known, record, _KEY)
        save_results(arguments.output, known, None)
    chosen = [r for r in known if (r["threads"], r["tier"]) == (arguments.threads, machine.tier())] or known
    for record in chosen:
        print(f"{record['machine']['cpu']}, {record['threads']} threads, {record['tier']}")
        print(table(record, arguments.markdown))
        print("absent:", record["absent"] or "nothing")
    if arguments.plot and chosen:
        draw(chosen[0], arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
