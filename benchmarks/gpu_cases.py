"""What ``benchmarks/gpu.py`` measures: groups of cases in the order of their worth.

A case makes its tensors where it is asked to, and returns contestants by name, the first of them the dense baseline. In
the tiny form everything is small and lives on the CPU, where the emulator stands for the card: times then say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Contestants = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Place:
    """Where the cases run. tiny: small shapes, for the test of this code itself."""

    device: str
    tiny: bool = False

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Case:
    """One row. prepare: contestants, expected result (None: unchecked; a dict: of each contestant its own), tolerance.
    bytes and operations: what the best contestant has to move and do, for its roofline, in which numbers. unchecked:
    contestants that do not promise the same result.
    """

    op: str
    setting: str
    prepare: Callable[[], tuple[Contestants, Any, float]]
    bytes: float = 0.0
    operations: float = 0.0
    unchecked: tuple[str, ...] = ()
    numbers: str = "float16"


def ours(place: Place, op: str, *args: Any) -> Contestants:
    """Every CUDA and Triton kernel of this op that can run on these arguments; in the tiny form the emulated ones."""
    import sparseprune.backends  # noqa: F401  (registers the kernels)
    from sparseprune._registry import kernels_of

    found: Contestants = {}
    for kernel in kernels_of(op):
        if kernel.backend == "cuda" and (place.tiny or not kernel.why_not(*args)):
            found["cuda"] = lambda run=kernel.run: run(*args)
        if kernel.backend == "triton" and not place.tiny and not kernel.why_not(*args):
            found["triton"] = lambda run=kernel.run: run(*args)
    return found


def pruned(place: Place, rows: int, columns: int, sparsity: float, dtype: torch.dtype, block: int = 1) -> torch.Tensor:
    kept = torch.rand(rows // block, columns // block, device=place.device) >= sparsity
    kept = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (torch.randn(rows, columns, device=place.device) * kept / (columns * (1 - sparsity)) ** 0.5).to(dtype)


def exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), w.float())


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest expected magnitude: sums of thousands of products, in another order."""
    return 1e-4 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 4e-3


def numbers_of(dtype: torch.dtype) -> str:
    """Whose dense product bounds this dtype's: bfloat16 has the tensor cores' speed of float16."""
    return "float32" if dtype == torch.float32 else "float16"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Whole models, from random weights: nothing is downloaded.


def encoder(
    place: Place, name: str, width: int, layers: int, heads: int, batch: int, length: int, compiled: bool = False
) -> Case:
    """The dense model beside pruned ones, each checked against the same pruned weights in dense layers; or, with
    ``compiled``, beside torch.compile's.
    """

    def prepare() -> tuple[Contestants, Any, float]:
        import transformers

        import sparseprune as sp

        config = transformers.BertConfig(
            vocab_size=place.size(30522, 100), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width,
        )  # fmt: skip
        half = torch.float32 if place.tiny else torch.float16
        ids = torch.randint(0, config.vocab_size, (batch, length), device=place.device)

        def model() -> torch.nn.Module:
            torch.manual_seed(0)
            return transformers.BertModel(config).eval().requires_grad_(False).to(place.device, half)

        def result(made: torch.nn.Module) -> Callable[[], torch.Tensor]:
            return lambda: made(ids).last_hidden_state

        dense = model()
        if compiled:
            return {"dense": result(dense), "compiled": result(torch.compile(dense))}, result(dense)().float(), 5e-2
        side = place.size(32, 16)
        ways: dict[str, tuple[float, Any, str, dict[str, Any]]] = {
            "2:4": (0.5, sp.NM(2, 4), "nm", {}),
            "blocks 90%": (0.9, sp.Block(side, side), "bsr", {"blocksize": (side, side)}),
            "unstructured 90%": (0.9, "element", "csr", {}),
        }
        found, expected = {"dense": result(dense)}, {}
        for key, (sparsity, granularity, layout, options) in ways.items():
            made = model()
            sp.prune_(made, sparsity=sparsity, granularity=granularity)
            with torch.no_grad():
                expected[key] = result(made)().float()
            sp.sparsify_(made, layout=layout, tokens=batch * length, fuse=False, engine="layers", **options)
            found[key] = result(made)
        return found, expected, 5e-2

    parameters = layers * 12 * width * width
    tokens, kind = batch * length, "float32" if place.tiny else "float16"
    setting = f"{name} {batch}x{length} {kind}"
    return Case("model", setting, prepare, 2 * parameters, 2 * parameters * tokens, numbers=kind)


def decoding(place: Place, sparsity: float) -> Case:
    """One token through a Llama of 1.1 billion parameters: its layers alone, as a step of generation reads them."""
    width, inner, layers = place.size(2048, 64), place.size(5632, 128), place.size(22, 2)

    def prepare() -> tuple[Contestants, Any, float]:
        import transformers

        import sparseprune as sp

        config = transformers.LlamaConfig(
            vocab_size=place.size(32000, 100), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 64,
        )  # fmt: skip
        half = torch.float32 if place.tiny else torch.float16
        ids = torch.randint(0, config.vocab_size, (1, 1), device=place.device)

        def model() -> torch.nn.Module:
            torch.manual_seed(0)
            return transformers.LlamaModel(config).eval().requires_grad_(False).to(place.device, half)

        dense, sparse = model(), model()
        for made in (dense, sparse):
            sp.prune_(made, sparsity=sparsity, scope="layer")
        sp.sparsify_(sparse, layout="csr", tokens=1, fuse=False, engine="layers")
        with torch.no_grad():
            expected = dense(ids, use_cache=False).last_hidden_state.float()
        found = {"dense": dense, "ours": sparse}
        runs = {key: lambda made=made: made(ids, use_cache=False).last_hidden_state for key, made in found.items()}
        return runs, expected, 5e-2

    weights = layers * (3 * width * width + 3 * width * inner)
    moved = weights * (2 * (1 - sparsity) + 0.13)
    return Case("decode", f"Llama 1.1B layers, one token, {sparsity:.0%}", prepare, moved)


# Layers.


def unstructured(place: Place, rows: int, columns: int, tokens: int, sparsity: float, dtype: torch.dtype) -> Case:
    def prepare() -> tuple[Contestants, Any, float]:
        from sparseprune.cuda import deltas, linear
        from sparseprune.cuda.structures import Csr
        from sparseprune.layouts import CSR

        w = pruned(place, rows, columns, sparsity, dtype)
        x = torch.randn(tokens, columns, device=place.device, dtype=dtype)
        csr = CSR.from_dense(w)
        parts = csr.crow_indices, csr.col_indices, csr.values
        library = torch.sparse_csr_tensor(*parts, size=(rows, columns))
        found: Contestants = {
            "dense": lambda: F.linear(x, w),
            "cuda csr": lambda: linear.csr_as_it_is(x, *parts, None, "none"),
        }
        if not place.tiny or dtype == torch.float32:  # on a CPU torch has no such product in 16 bits
            found["cusparse"] = lambda: (library @ x.t()).t()
        if dtype != torch.float32:
            strips = linear.pack_strips((rows, columns), *parts)
            found["cuda strips"] = lambda: linear.strips_linear(x, strips)
        if tokens <= deltas.DELTA_TOKENS:
            packed = deltas.pack_deltas(Csr(csr.crow_indices, csr.col_indices), columns)
            values = packed.filled(csr.values, dtype)
            found["cuda deltas"] = lambda: deltas.deltas_linear(x, packed, values)
        found |= ours(place, "csr_linear", x, *parts, None, "none")  # the one of these that it chooses
        return found, exact(x, w), tolerance(dtype)

    size = dtype.itemsize
    density = 1 - sparsity
    moved = rows * columns * min(density * size + 0.13, density * (size + 4)) + size * tokens * (rows + columns)
    setting = f"{rows}x{columns} N={tokens} {sparsity:.0%} {name_of(dtype)}"
    operations = 2 * tokens * rows * columns * density
    return Case("csr_linear", setting, prepare, moved, operations, numbers=numbers_of(dtype))


def backward(place: Place, rows: int, columns: int, tokens: int, sparsity: float, dtype: torch.dtype) -> Case:
    """dX and dW of an unstructured weight, beside the two dense products."""

    def prepare() -> tuple[Contestants, Any, float]:
        from sparseprune.cuda import linear, sddmm
        from sparseprune.layouts import CSR

        w = pruned(place, rows, columns, sparsity, dtype)
        x = torch.randn(tokens, columns, device=place.device, dtype=dtype)
        dy = torch.randn(tokens, rows, device=place.device, dtype=dtype)
        csr = CSR.from_dense(w)
        indices = csr.crow_indices, csr.col_indices
        places = csr.rows() * columns + csr.col_indices.long()

        def plain() -> torch.Tensor:
            dw = (dy.t() @ x).flatten()[places].float()
            return torch.cat([(dy @ w).flatten().float(), dw])

        def sparse() -> torch.Tensor:
            dw = sddmm.sddmm(x, dy, *indices, 1, 1).flatten()
            return torch.cat([linear.csr_linear_dx(dy, *indices, csr.values, columns).flatten().float(), dw])

        expected = torch.cat([(dy.float() @ w.float()).flatten(), (dy.float().t() @ x.float()).flatten()[places]])
        return {"dense": plain, "cuda": sparse}, expected, tolerance(dtype)

    kept = rows * columns * (1 - sparsity)
    moved = 2 * dtype.itemsize * tokens * (rows + columns) + kept * (2 * dtype.itemsize + 12)
    setting = f"{rows}x{columns} N={tokens} {sparsity:.0%} {name_of(dtype)}"
    return Case("backward", setting, prepare, moved, 4 * tokens * kept, numbers=numbers_of(dtype))


def two_of_four(place: Place, rows: int, columns: int, tokens: int) -> Case:
    def prepare() -> tuple[Contestants, Any, float]:
        from sparseprune.layouts import NM
        from sparseprune.reference import nm_mask

        w = torch.randn(rows, columns, device=place.device) / columns**0.5
        w = (w * nm_mask(w.abs(), 2, 4)).half()
        x = torch.randn(tokens, columns, device=place.device).half()
        nm = NM.from_dense(w, 2, 4)
        found = ours(place, "nm_linear", x, nm.values, nm.indices, 2, 4, None, "none")
        return {"dense": lambda: F.linear(x, w), **found}, exact(x, w), tolerance(torch.float16)

    moved = 1.125 * rows * columns + 2 * tokens * (rows + columns)
    return Case("nm_linear", f"{rows}x{columns} N={tokens} 2:4 float16", prepare, moved, tokens * rows * columns)


def blocks(place: Place, rows: int, columns: int, tokens: int, sparsity: float, side: int) -> Case:
    def prepare() -> tuple[Contestants, Any, float]:
        from sparseprune.layouts import BSR

        w = pruned(place, rows, columns, sparsity, torch.float16, side)
        x = torch.randn(tokens, columns, device=place.device).half()
        bsr = BSR.from_dense(w, (side, side))
        parts = bsr.crow_indices, bsr.col_indices, bsr.values
        found: Contestants = {"dense": lambda: F.linear(x, w)}
        if not place.tiny:
            library = torch.sparse_bsr_tensor(*parts, size=(rows, columns))
            found["torch bsr"] = lambda: F.linear(x, library)
        found |= ours(place, "bsr_linear", x, *parts, None, "none")
        return found, exact(x, w), tolerance(torch.float16)

    kept = rows * columns * (1 - sparsity)
    setting = f"{rows}x{columns} N={tokens} {sparsity:.0%} {side}x{side} float16"
    return Case("bsr_linear", setting, prepare, 2 * (kept + tokens * (rows + columns)), 2 * tokens * kept)


def masked(place: Place, rows: int, columns: int, tokens: int) -> Case:
    def prepare() -> tuple[Contestants, Any, float]:
        w = pruned(place, rows, columns, 0.0, torch.float16)
        x = torch.randn(tokens, columns, device=place.device).half()
        mask = torch.rand(rows, columns, device=place.device) < 0.1
        found = {"dense": lambda: F.linear(x, w * mask), **ours(place, "masked_linear", x, w, mask, None)}
        if "triton" in found:
            from sparseprune.triton.linear import masked_forward

            found["triton fused"] = lambda: masked_forward(x, w, mask)  # for any number of tokens
        return found, exact(x, w * mask), tolerance(torch.float16)

    moved = 3 * rows * columns + 2 * tokens * (rows + columns)
    return Case("masked_linear", f"{rows}x{columns} N={tokens} float16", prepare, moved, 2 * tokens * rows * columns)


# Selection and masking.


def selection(place: Place, n: int, dtype: torch.dtype, tensors: int = 1) -> Iterator[Case]:
    k, digits = n // 10, 3 if dtype == torch.float32 else 2

    def values() -> list[torch.Tensor]:
        return list(torch.randn(n, device=place.device).to(dtype).chunk(tensors))

    def prepare_kth() -> tuple[Contestants, Any, float]:
        x = values()
        sort = lambda: torch.sort(torch.cat(x).abs(), descending=True).values[k - 1]  # noqa: E731
        return {"dense": sort, **ours(place, "kth_magnitude", x, k)}, sort(), 0.0

    def prepare_mask() -> tuple[Contestants, Any, float]:
        x = values()

        def topk() -> torch.Tensor:
            chosen = torch.topk(torch.cat(x), k).indices
            return torch.zeros(n, dtype=torch.bool, device=place.device).scatter_(0, chosen, True)

        stable = torch.sort(torch.cat(x), descending=True, stable=True).indices[:k]
        expected = torch.zeros(n, dtype=torch.bool, device=place.device).scatter_(0, stable, True)
        mine = ours(place, "topk_mask", x, k)
        return {"dense": topk, **{m: lambda run=run: torch.cat(run()) for m, run in mine.items()}}, expected, 0.0

    setting = f"n={n:,} in {tensors} {name_of(dtype)}"
    moved = digits * n * dtype.itemsize
    yield Case("kth_magnitude", f"{setting} (against torch.sort)", prepare_kth, moved)
    moved += n * (2 * dtype.itemsize + 1)
    yield Case("topk_mask", f"{setting} (against torch.topk)", prepare_mask, moved, unchecked=("dense",))


def one_pass(place: Place, n: int) -> Iterator[Case]:
    def noise(seed: int) -> torch.Tensor:
        return torch.randn(n, device=place.device, generator=torch.Generator(place.device).manual_seed(seed))

    def prepare_mask() -> tuple[Contestants, Any, float]:
        w, mask = noise(0), noise(1) > 1
        expected = w * mask

        def after(run: Callable[[], Any]) -> Callable[[], torch.Tensor]:
            return lambda: (run(), w)[1]

        mine = ours(place, "apply_mask_", w, mask)
        return {"dense": lambda: w.mul_(mask), **{k: after(r) for k, r in mine.items()}}, expected, 0.0

    def prepare_threshold() -> tuple[Contestants, Any, float]:
        w, threshold = noise(0), torch.tensor(1.6, device=place.device)

        def plain() -> torch.Tensor:
            mask = w.abs() >= threshold
            return (w * mask, mask.sum().float())[1]  # the masked copy is made, as ours makes it

        fused = ours(place, "threshold_mask", w, threshold)
        found = {"dense": plain, **{name: lambda run=run: run()[2].float() for name, run in fused.items()}}
        return found, plain(), 0.0

    def prepare_adamw() -> tuple[Contestants, Any, float]:
        grad, mask = noise(0), noise(1) > 1
        p, first, second = (torch.zeros(n, device=place.device) for _ in range(3))
        weight = torch.nn.Parameter(torch.zeros(n, device=place.device))
        weight.grad = grad.clone()
        adamw = torch.optim.AdamW([weight], lr=1e-3, fused=not place.tiny, capturable=not place.tiny)

        def plain() -> None:
            weight.grad.mul_(mask)
            adamw.step()
            weight.data.mul_(mask)

        step = ours(place, "masked_adamw_", p, grad, first, second, mask, 1, 1e-3, 0.9, 0.999, 1e-8, 0.01)
        return {"dense": plain, **step}, None, 0.0

    yield Case("apply_mask_", f"n={n:,} float32", prepare_mask, 9 * n)
    yield Case("threshold_mask", f"n={n:,} float32", prepare_threshold, 9 * n)
    yield Case("masked_adamw_", f"n={n:,} float32 (right by the gpu tests)", prepare_adamw, 29 * n)


BERT = [(768, 768), (3072, 768), (768, 3072)]
LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008)]
FLASH_LLM = [(36864, 9216), (9216, 36864)]  # the feed-forward of OPT-66B
SPINFER = [(20480, 5120), (5120, 20480)]  # that of OPT-13B


def groups(place: Place) -> dict[str, list[Case]]:
    """Group -> cases, the most telling group first: what the time does not reach is left out."""
    half, single = torch.float16, torch.float32
    if place.tiny:
        return {
            "models": [encoder(place, "encoder", 64, 2, 4, 2, 3), decoding(place, 0.5)],
            "layers": [
                *(unstructured(place, 32, 128, tokens, 0.5, half) for tokens in (1, 20)),
                unstructured(place, 32, 128, 9, 0.9, single), backward(place, 32, 72, 5, 0.5, half),
                two_of_four(place, 64, 64, 4), blocks(place, 32, 64, 3, 0.5, 16),
            ],
            "selection": list(selection(place, 5000, single, 3)),
            "masking": list(one_pass(place, 1000)),
        }  # fmt: skip

    def layers(shapes: list[tuple[int, int]], sparsities: tuple[float, ...], tokens: tuple[int, ...]) -> list[Case]:
        return [unstructured(place, *shape, n, s, half) for shape in shapes for s in sparsities for n in tokens]

    return {
        "models": [
            encoder(place, "MiniLM-L6", 384, 6, 12, 32, 128), encoder(place, "BERT-base", 768, 12, 12, 32, 128),
            encoder(place, "BERT-base", 768, 12, 12, 1, 16),
        ],
        "decoding": [decoding(place, sparsity) for sparsity in (0.5, 0.7, 0.9)],
        "layers": layers([LLAMA[1], LLAMA[0], BERT[1]], (0.5, 0.7, 0.9, 0.95), (1, 16, 64)),
        "published shapes": layers([*SPINFER, *FLASH_LLM], (0.5, 0.7), (8, 32)),
        "2:4 and blocks": [
            case
            for shape in (LLAMA[1], BERT[1])
            for case in (
                *(two_of_four(place, *shape, tokens) for tokens in (16, 512, 4096)),
                *(
                    blocks(place, *shape, tokens, sparsity, side)
                    for side, sparsity in ((64, 0.5), (64, 0.75), (32, 0.75), (32, 0.9), (16, 0.9))
                    for tokens in (16, 512, 4096)
                ),
                *(masked(place, *shape, tokens) for tokens in (16, 512, 2048, 8192)),
            )
        ],
        "selection": [
            *selection(place, 85_000_000, single, 72), *selection(place, 100_000_000, single),
            *selection(place, 10_000_000, half),
        ],
        "masking": list(one_pass(place, 50_000_000)),
        "backward": [backward(place, *LLAMA[0], 512, sparsity, t) for t in (half, single) for sparsity in (0.5, 0.9)],
        "more layers": [
            unstructured(place, *shape, tokens, sparsity, dtype)
            for shape in (LLAMA[0], BERT[1])
            for dtype in (single, half, torch.bfloat16)
            for tokens, sparsity in ((1, 0.9), (8, 0.95), (128, 0.95), (128, 0.99))
        ],
        "compiled": [encoder(place, "BERT-base", 768, 12, 12, 32, 128, compiled=True)],
    }  # fmt: skip
