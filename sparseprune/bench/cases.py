"""The registry of what is benchmarked.

A suite is a list of :class:`~.contest.Case`; ``SUITES[name].build(case)`` makes the operands (seeded by the case, so
two runs see the same numbers) and returns a :class:`~.contest.Contest`. The builders lie in the file of their family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .contest import Case, Suite
from .decoding import build_decoding
from .linear import build_linear, build_training
from .masking import build_adamw, build_mask, build_threshold
from .selection import build_selection, build_topk

__all__ = ["SUITES", "WITH_PEERS"]

#: (out_features, in_features): attention and feed-forward of a BERT base, and a square layer of a larger
#: model.
SHAPES = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
#: Attention of a BERT base, the feed-forward of SmolLM2-135M, and a square layer of a larger model.
DECODING_SHAPES = ((768, 768), (1536, 576), (4096, 4096))
#: The Linears of MiniLM-L6.
MINILM_SHAPES = ((384, 384), (1536, 384), (384, 1536))


def _grid(
    suite: str,
    shapes: Sequence[tuple[int, ...]],
    tokens: Sequence[int],
    structures: Mapping[str, Sequence[float]],
) -> Iterator[Case]:
    for shape in shapes:
        for count in tokens:
            for structure, sparsities in structures.items():
                for sparsity in sparsities:
                    yield Case(suite, shape, sparsity, structure, count)


_LAYER = {
    "element": (0.5, 0.7, 0.8, 0.9, 0.95),
    "16x1": (0.5, 0.8, 0.9, 0.95),
    "8x1": (0.8, 0.9, 0.95),
    "4x4": (0.8, 0.9, 0.95),
    "2:4": (0.5,),
}
_FLAT = ((1_000_000,), (10_000_000,))

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "linear",
            "y = x W^T + b at N = 1, 8 and 128 tokens",
            build_linear,
            lambda: _grid("linear", SHAPES, (1, 8, 128), _LAYER),
        ),
        Suite(
            "minilm",
            "the Linears of MiniLM-L6 at N = 1024 tokens",
            build_linear,
            lambda: _grid("minilm", MINILM_SHAPES, (1024,), {"element": (0.9,), "16x1": (0.9,)}),
        ),
        Suite(
            "decoding",
            "y = x W^T at one token, every weight from memory, each value type",
            build_decoding,
            lambda: _grid("decoding", DECODING_SHAPES, (1,), {"element": (0.5, 0.7, 0.9)}),
        ),
        Suite(
            "curve",
            "speed-up over sparsity, 3072x768 and 4096x4096 at N = 1, 8 and 128",
            build_linear,
            lambda: _grid(
                "curve",
                ((3072, 768), (4096, 4096)),
                (1, 8, 128),
                dict.fromkeys(("element", "16x1"), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)),
            ),
        ),
        Suite(
            "tokens",
            "cost a token from N = 16 to 4096, 3072x768 at 90 %",
            build_linear,
            lambda: _grid(
                "tokens",
                ((3072, 768),),
                (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
                {"element": (0.9,), "16x1": (0.9,)},
            ),
        ),
        Suite(
            "training",
            "forward and backward under a fixed mask at N = 512",
            build_training,
            lambda: _grid("training", SHAPES[:3], (512,), {"element": (0.8, 0.9, 0.95), "16x1": (0.9,)}),
        ),
        Suite("kth", "k-th largest magnitude", build_selection, lambda: _grid("kth", _FLAT, (0,), {"element": (0.9,)})),
        Suite("topk", "exact top-k mask", build_topk, lambda: _grid("topk", _FLAT, (0,), {"element": (0.9,)})),
        Suite("mask", "mask in place", build_mask, lambda: _grid("mask", _FLAT, (0,), {"element": (0.9,)})),
        Suite(
            "threshold",
            "threshold, mask, masked copy and count",
            build_threshold,
            lambda: _grid("threshold", _FLAT, (0,), {"element": (0.9,)}),
        ),
        Suite("adamw", "masked AdamW step", build_adamw, lambda: _grid("adamw", _FLAT, (0,), {"element": (0.9,)})),
    )
}

#: The suites whose contestants are the peers asked for; those of the others are fixed.
WITH_PEERS = tuple(name for name, suite in SUITES.items() if suite.build is build_linear)
