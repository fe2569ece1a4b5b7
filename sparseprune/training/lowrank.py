"""A Linear with a low-rank term beside its masked weight, for the time it heals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.filters import take_slow_path_
from ..nn.linear import SparseLinear
from ..nn.replace import replace_
from ..pruning.granularity import Block, Element

__all__ = ["LowRankLinear", "execute_", "with_low_rank_"]


class LowRankLinear(nn.Linear):
    """y = x W^T + bias + (x A^T) B^T with dense W `[N, K]` under a mask, ``low_rank_a`` `[r, K]` and ``low_rank_b``
    `[N, r]`. Shares weight and bias with the Linear it is made of, so that an optimiser's masks stay valid. The factors
    are copied, row-major and in memory of their own, as a resumed run has them: how a BLAS rounds may hang on strides
    and alignment.
    """

    def __init__(self, linear: nn.Linear, low_rank_a: Tensor, low_rank_b: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.low_rank_a = nn.Parameter(_own(low_rank_a, linear.weight))
        self.low_rank_b = nn.Parameter(_own(low_rank_b, linear.weight))
        self.train(linear.training)

    @property
    def factors(self) -> int:
        """r (N + K), what the term costs."""
        return self.low_rank_a.numel() + self.low_rank_b.numel()

    def forward(self, input: Tensor) -> Tensor:
        """input: `[..., K]`; returns `[..., N]`."""
        plain = F.linear(input, self.weight, self.bias)
        return plain + F.linear(F.linear(input, self.low_rank_a), self.low_rank_b)


def _own(factor: Tensor, like: Tensor) -> Tensor:
    return factor.detach().to(like, copy=True, memory_format=torch.contiguous_format)


def with_low_rank_(model: nn.Module, name: str, low_rank_a: Tensor, low_rank_b: Tensor) -> LowRankLinear:
    """Puts a :class:`LowRankLinear` in the place of the Linear ``name``, wherever it stands, and returns it."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    layer = LowRankLinear(linear, low_rank_a, low_rank_b)
    replace_(model, {id(linear): layer})
    return layer


def execute_(model: nn.Module, kinds: dict[str, Element | Block | None]) -> list[str]:
    """Makes every LowRankLinear a SparseLinear, which saves, loads and runs the factors beside its sparse kernel;
    returns their names. kinds: name -> its granularity; blocks are stored as blocks.
    """
    made = []
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        kind = kinds[name]
        blocks = (kind.r, kind.c) if isinstance(kind, Block) and kind.r * kind.c > 1 else None
        sparse = SparseLinear.from_linear(layer, "bsr" if blocks else "csr", blocks)
        sparse.set_low_rank_(layer.low_rank_a.detach(), layer.low_rank_b.detach())
        replace_(model, {id(layer): sparse})
        made.append(name)
    if made:
        take_slow_path_(model)
    return made
