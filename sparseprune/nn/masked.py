"""MaskedLinear: a dense Linear that holds its zeros under any optimiser. For training before, or without, sparse
storage.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops

__all__ = ["MaskedLinear"]

# Every MaskedLinear alive in this process: after any optimiser's step those whose weight it moved get their zeros back.
_ALIVE: weakref.WeakSet[MaskedLinear] = weakref.WeakSet()


def _hold_zeros(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _ALIVE:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(_ALIVE):
        if id(layer.weight) in stepped:
            layer.apply_mask_()


register_optimizer_step_post_hook(_hold_zeros)


class MaskedLinear(nn.Linear):
    """A drop-in ``nn.Linear`` whose weight `[N, K]` stays zero wherever its bool ``mask`` `[N, K]` is False.

    The mask is applied in the forward pass, to the gradient, and to the stored weight after every step of any
    ``torch.optim`` optimiser, so that momentum and weight decay cannot bring a pruned weight back. ``weight`` and
    ``bias`` keep their names; ``mask`` is saved beside them, and a state dict without one leaves the mask as it is.

    Raises ValueError where the mask is not bool `[N, K]`.
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool, device=self.weight.device))
        if mask is not None:
            self.set_mask_(mask)
        _ALIVE.add(self)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> MaskedLinear:
        """The same layer with a mask, by default the weight's non-zeros. Shares the parameters: an optimiser keeps
        working.
        """
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=linear.weight.dtype
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.mask = linear.weight.detach() != 0
        if mask is not None:
            layer.set_mask_(mask)
        return layer.train(linear.training)

    def set_mask_(self, mask: Tensor) -> None:
        """Takes a new mask (bool `[N, K]`, True = kept) and zeroes the weight accordingly."""
        expected = (self.out_features, self.in_features)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(f"MaskedLinear: mask expected bool {list(expected)}, got {mask.dtype} {list(mask.shape)}")
        self.mask = mask.to(self.weight.device, copy=True)
        self.apply_mask_()

    @torch.no_grad()
    def apply_mask_(self) -> None:
        """Zeroes the stored weight where the mask is False."""
        if self.weight.device.type != "meta":
            ops.apply_mask_(self.weight, self.mask)

    def forward(self, input: Tensor) -> Tensor:
        """input: `[..., K]`; returns `[..., N]`."""
        return ops.masked_linear(input, self.weight, self.mask, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, density={self.mask.float().mean().item():.4f}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _ALIVE.add(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        state_dict.setdefault(prefix + "mask", self.mask)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers"):  # the caller's own memory, which is not to be pruned
            self.weight = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        self.apply_mask_()
