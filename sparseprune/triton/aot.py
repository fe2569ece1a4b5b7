"""Compiles every kernel ahead of time, without a GPU, and reads what the compiler made of it.

``python -m sparseprune.triton.aot --target sm_90`` prints a row a kernel and configuration: registers, spills, shared
memory, matrix instructions. ``--all`` takes every dtype with every variant instead of the representative rows;
``--json`` is for the tests. It must run in a process of its own without TRITON_INTERPRET, which would put the
interpreter in the compiler's place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import configs, selection
from ._environment import kernels
from ._tuning import Config
from .masking import ROUNDS, WARPS, block_of

__all__ = ["TARGETS", "Built", "Spec", "build", "specs"]

#: target -> (Triton's backend, architecture, lanes a warp)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NUMBERS = (  # (dtype, precision)
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
)
MATRIX = {
    "cuda": r"\b((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*)",
    "hip": r"\b(v_mfma_\w+)",
}


@dataclass(frozen=True)
class Spec:
    """One kernel with the types of its run-time arguments, its constants and its configuration.

    types: argument -> "*fp16", "i32", "i64", "fp32" ...; ``matrix``: whether a matrix instruction must appear.
    """

    kernel: str
    module: str
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    matrix: bool = False

    @property
    def name(self) -> str:
        """A readable name, unique in :func:`specs`."""
        return f"{self.kernel}[{self.label}]" if self.label else self.kernel


@dataclass(frozen=True)
class Built:
    """What the compiler made of one spec: registers and spilled bytes a thread, bytes of shared memory a program."""

    name: str
    target: str
    registers: int
    spilled: int
    shared: int
    warps: int
    matrix: list[str]


def _configured(config: Config, constants: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    return {**constants, **dict(config.blocks)}, config.warps, config.stages


def _label(*parts: str, config: Config | None = None) -> str:
    if config is not None:
        sizes = "x".join(str(size) for name, size in config.blocks if name != "GROUP")
        parts = (*parts, sizes, f"{config.warps} warps {config.stages} stages")
    return " ".join(part for part in parts if part)


def _elementwise(everything: bool) -> Iterator[Spec]:
    dtypes = ("fp32", "bf16", "fp16") if everything else ("fp32", "bf16")
    for name in dtypes:
        w, mask = f"*{name}", "*u8"
        base = {"BLOCK": block_of(4 if name == "fp32" else 2)}
        yield Spec("apply_mask_kernel", "masking", name, {"w": w, "mask": mask, "n": "i32"}, base, WARPS, 3)
        types = {"w": w, "mask": mask, "out": w, "n": "i32"}
        yield Spec("masked_copy_kernel", "masking", name, types, base, WARPS, 3)
        types = {"w": w, "threshold": w, "mask": mask, "out": w, "counts": "*i64", "n": "i32"}
        yield Spec("threshold_mask_kernel", "masking", name, types, {"BLOCK": block_of(4), "ROUNDS": ROUNDS}, WARPS, 3)
        base = {"BLOCK": block_of(4)}
        types = {"grad": w, "w": w, "mask": mask, "score_grad": "*fp32", "n": "i32"}
        yield Spec("mask_gradient_kernel", "masking", name, types, {**base, "SCORES": True}, WARPS, 3)
        scalars = ("decay", "beta1", "rest1", "beta2", "rest2", "eps", "step_size", "root_correction")
        types = {"p": w, "grad": w, "exp_avg": "*fp32", "exp_avg_sq": "*fp32", "mask": mask, "n": "i32"}
        types |= dict.fromkeys(scalars, "fp32")
        yield Spec("masked_adamw_kernel", "masking", name, types, {**base, "MASKED": True}, WARPS, 3)


def _selecting(everything: bool) -> Iterator[Spec]:
    dtypes = ("fp32", "bf16", "fp16") if everything else ("fp32", "bf16")
    for name in dtypes:
        x = f"*{name}"
        for level, (shift, width) in enumerate(selection.DIGITS):
            for magnitude in (True, False) if everything else (level != 1,):
                constants = {"SHIFT": shift, "WIDTH": width, "MAGNITUDE": magnitude, "BINS": selection.BINS}
                constants["BLOCK"] = selection.HISTOGRAM["BLOCK"]
                types = {"x": x, "counts": "*i64", "prefix": "*i64", "n": "i32", "chunks": "i32"}
                label = _label(name, f"level {level}", "magnitude" if magnitude else "signed")
                warps = selection.HISTOGRAM["num_warps"]
                yield Spec("radix_histogram_kernel", "selection", label, types, constants, warps, 3)
        constants = {"MAGNITUDE": True, "BLOCK": selection.CUT_BLOCK}
        types = {"x": x, "threshold": x, "ties": "*i32", "bad": "*i64", "n": "i32"}
        yield Spec("count_ties_kernel", "selection", name, types, constants, selection.CUT_WARPS, 3)
        types = {"x": x, "threshold": x, "upto": "*i64", "allowed": "*i64", "mask": "*u8", "n": "i32"}
        yield Spec("cut_mask_kernel", "selection", name, types, constants, selection.CUT_WARPS, 3)
        for of, groups in selection.GROUPED.items() if everything else ((4, selection.GROUPED[4]),):
            constants = {"KEPT": of // 2, "OF": of, "BLOCK": groups}
            types = {"scores": x, "mask": "*u8", "bad": "*i64", "groups": "i32"}
            yield Spec("nm_mask_kernel", "selection", _label(name, f"{of // 2}:{of}"), types, constants, 4, 3)
        for cols in (1, 16):
            types = {"scores": x, "out": "*fp32", "width": "i32", "blocks": "i32", "rows": "i32", "cols": "i32"}
            constants = {"COLS": cols, "BLOCK": 1024 // cols}
            yield Spec("block_scores_kernel", "selection", _label(name, f"{cols} columns"), types, constants, 4, 3)
    constants = {"WIDTH": 11, "BINS": selection.BINS}
    yield Spec("radix_select_kernel", "selection", "", {"counts": "*i64", "state": "*i64"}, constants, 4, 3)
    constants = {"SHIFT": 10, "MAGNITUDE": False}
    yield Spec("key_value_kernel", "selection", "", {"state": "*i64", "value": "*fp16"}, constants, 1, 3)


def _products(everything: bool) -> Iterator[Spec]:
    for dtype, precision in NUMBERS:
        name = NAMES[dtype]
        number = f"{name} {precision}" if dtype == torch.float32 else name
        pointer, matrix = f"*{name}", dtype != torch.float32 or precision == "tf32"
        common: dict[str, Any] = {"PRECISION": precision, "UPCAST": False}
        several = dict.fromkeys(c for tokens in (16, 512) for c in configs.masked_linear_configs(dtype, tokens))
        for config in several:
            for transposed, bits in ((False, False), (True, False), (False, True), (True, True)):
                if not everything and (transposed or bits) and config != configs.masked_linear_configs(dtype, 512)[-1]:
                    continue
                types = {"x": pointer, "w": pointer, "mask": "*u8", "bias": pointer, "out": pointer}
                types |= dict.fromkeys(("M", "OUT", "RED", "stride_xm", "stride_wn", "stride_mn"), "i32")
                variant: dict[str, Any] = {"TRANSPOSED": transposed, "BITS": bits, "BIAS": not transposed}
                variant |= {"ACTIVATION": "none" if transposed else "gelu", "stride_xr": 1}
                constants, warps, stages = _configured(config, {**common, **variant})
                label = _label(number, "dx" if transposed else "", "bits" if bits else "", config=config)
                yield Spec("masked_linear_kernel", "linear", label, types, constants, warps, stages, matrix)
        for config in configs.masked_gradient_configs(dtype):
            for bits in (False, True) if everything else (False,):
                types = {"dy": pointer, "x": pointer, "mask": "*u8", "out": pointer}
                types |= dict.fromkeys(("M", "N", "K", "stride_dm", "stride_xm", "stride_mn"), "i32")
                variant = {**common, "BITS": bits, "stride_dn": 1, "stride_xk": 1}
                constants, warps, stages = _configured(config, variant)
                label = _label(number, "bits" if bits else "", config=config)
                yield Spec("masked_weight_gradient_kernel", "linear", label, types, constants, warps, stages, matrix)
        for side in (16, 32, 64, 128) if everything or dtype == torch.float16 else (32, 128):
            # Under autocast values come in float32, and lie in shared memory so.
            for values in (dtype, torch.float32) if side == 128 and dtype == torch.float16 else (dtype,):
                held = torch.promote_types(dtype, values)
                several = dict.fromkeys(c for tokens in (16, 512) for c in configs.bsr_configs(held, side, tokens))
                if not everything:
                    several = dict.fromkeys(configs.bsr_configs(held, side, tokens)[0] for tokens in (16, 512))
                for config in several:
                    for transposed in (False, True):
                        types = {"x": pointer, "crow": "*i32", "index": "*i32", "order": "*i32"}
                        types |= {"values": f"*{NAMES[values]}", "bias": pointer, "out": pointer}
                        types |= {"M": "i32", "OUT": "i32", "stride_xm": "i32"}
                        variant = {"ROWS": side, "COLS": side, "TRANSPOSED": transposed, "BIAS": not transposed}
                        variant |= {"ACTIVATION": "none" if transposed else "gelu_tanh", "stride_xr": 1}
                        constants, warps, stages = _configured(config, {**common, **variant})
                        kind = f"{side}x{side}" + ("" if values == dtype else f" of {NAMES[values]}")
                        label = _label(number, kind, "dx" if transposed else "", config=config)
                        yield Spec("bsr_linear_kernel", "linear", label, types, constants, warps, stages, matrix)
            config = configs.sddmm_config(dtype, side, side)
            types = {"dy": pointer, "x": pointer, "crow": "*i32", "index": "*i32", "out": pointer, "M": "i32"}
            types |= {"bands": "i32", "stride_dm": "i32", "stride_xm": "i32"}
            variant = {**common, "ROWS": side, "COLS": side, "stride_dn": 1, "stride_xk": 1}
            constants, warps, stages = _configured(config, variant)
            label = _label(number, f"{side}x{side}", config=config)
            yield Spec("bsr_sddmm_kernel", "sddmm", label, types, constants, warps, stages, matrix)


def specs(everything: bool = False) -> list[Spec]:
    """Every kernel in its shipped configurations; ``everything``: in every dtype and variant as well."""
    return [*_elementwise(everything), *_selecting(everything), *_products(everything)]


def build(spec: Spec, target: str) -> Built:
    """Compiles one spec for one of :data:`TARGETS`. RuntimeError under TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET")
    backend, architecture, lanes = TARGETS[target]
    function = getattr(kernels(spec.module), spec.kernel)
    names = list(function.arg_names)
    unknown = set(names) ^ (set(spec.types) | set(spec.constants))
    if unknown:
        raise RuntimeError(f"{spec.name}: the spec and the kernel differ in the arguments {sorted(unknown)}")
    # Pointers and the sizes of usual models are multiples of 16, as the launcher finds and specialises; tokens are not.
    odd = ("M", "chunks", "bands", "rows", "cols")
    even = [i for i, n in enumerate(names) if spec.types.get(n, "").startswith(("*", "i")) and n not in odd]
    source = ASTSource(
        fn=function,
        signature={n: spec.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in spec.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in even},
    )
    stages = spec.stages if backend == "cuda" else min(spec.stages, 2)
    options = {"num_warps": spec.warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget(backend, architecture, lanes), options=options)
    text = made.asm["ptx" if backend == "cuda" else "amdgcn"]
    if backend == "cuda":
        registers, spilled = _cubin_usage(made.asm["cubin"])
    else:
        registers = _count(text, r"\.vgpr_count:\s+(\d+)")
        spilled = 4 * (_count(text, r"\.vgpr_spill_count:\s+(\d+)") + _count(text, r"\.sgpr_spill_count:\s+(\d+)"))
    matrix = sorted(set(re.findall(MATRIX[backend], text)))
    return Built(spec.name, target, registers, spilled, int(made.metadata.shared), spec.warps, matrix)


def _count(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has nothing that matches {pattern}")
    return int(found.group(1))


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) a thread, by the cuobjdump that comes with Triton."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _count(text, r"REG:(\d+)"), _count(text, r"STACK:(\d+)") + _count(text, r"LOCAL:(\d+)")


def main() -> None:
    """Prints one row, or one line of JSON, a spec."""
    title = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m sparseprune.triton.aot", description=title)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--all", action="store_true", help="every dtype and variant, not only the representative rows")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    arguments = parser.parse_args()
    for target in TARGETS if arguments.target == "all" else [arguments.target]:
        for spec in specs(arguments.all):
            if arguments.only not in spec.name:
                continue
            built = build(spec, target)
            if arguments.json:
                print(json.dumps(asdict(built)), flush=True)
            else:
                matrix = ",".join(built.matrix) or "-"
                row = f"{built.target:7} {built.registers:4} registers {built.spilled:3} B spilled"
                print(f"{row} {built.shared:7} B shared  {built.name}  {matrix}", flush=True)


if __name__ == "__main__":
    main()
