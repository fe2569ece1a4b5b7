"""LoRA on sparse layers: peft's own LoRA layer, whose merging becomes the low-rank term of the sparse layer.

peft knows it from its import on (with ``import sparseprune`` before or after): ``get_peft_model``,
``PeftModel.from_pretrained`` and ``model.add_adapter`` take SparseLinears among their targets, ``"all-linear"`` too.
"""

from __future__ import annotations

from typing import Any

import peft.tuners.tuners_utils as tuners_utils
import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import MaskedLinear, SparseLinear
from ..nn.filters import HEAD_NAMES

__all__ = ["MaskedLoraLinear", "SparseLoraLinear", "register"]


class SparseLoraLinear(Linear):
    """LoRA beside a :class:`sparseprune.SparseLinear`, which stays sparse and frozen.

    Merging hands the factors to the layer's low-rank term, which is exact and leaves the mask alone; unmerging takes
    them back. What was fused with the layer runs apart while an adapter is on it. ValueError on merging anything but
    plain LoRA.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self._before: list[tuple[Any, ...]] = []

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs.keys() & {"residual", "norm"}:
            raise ValueError("LoRA: expected a call with x alone, got a residual or a norm; add them to the result")
        return super().forward(x, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            layer: Any = self.get_base_layer()
            if name in self.lora_variant:
                raise ValueError(f"LoRA: merging into a sparse layer expected plain LoRA, got a variant in {name!r}")
            first: Any = self.lora_A[name]
            second: Any = self.lora_B[name]
            a = first.weight.detach().clone()
            b = second.weight.detach() * self.scaling[name]
            bias = second.bias.detach() * self.scaling[name] if self.lora_bias[name] else None
            if safe_merge and not all(bool(t.isfinite().all()) for t in (a, b)):
                raise ValueError(f"LoRA: adapter {name!r} expected finite weights, got others; nothing was merged")
            if bias is not None and layer.bias is None:
                raise ValueError("LoRA: lora_bias=True cannot be merged into a layer without a bias")
            held = (layer.low_rank_a, layer.low_rank_b, layer.bias)
            self._before.append(tuple(None if t is None else t.detach().clone() for t in held))
            dtype, device = layer.values.dtype, layer.values.device
            a, b = a.to(device, dtype), b.to(device, dtype)
            if layer.low_rank_a is not None:
                a, b = torch.cat([layer.low_rank_a, a]), torch.cat([layer.low_rank_b, b], dim=1)
            learns = layer.values.requires_grad
            layer.set_low_rank_(nn.Parameter(a, learns), nn.Parameter(b, learns))
            if bias is not None:
                layer.bias.add_(bias.to(layer.bias))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        layer: Any = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            a, b, bias = self._before.pop()
            learns = layer.values.requires_grad
            layer.set_low_rank_(*(None if t is None else nn.Parameter(t, learns) for t in (a, b)))
            if bias is not None:
                layer.bias.copy_(bias)


class MaskedLoraLinear(Linear):
    """LoRA beside a :class:`sparseprune.MaskedLinear`. Merging is refused: the mask would cut off most of the adapter,
    or the adapter fill the zeros.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if check_adapters_to_merge(self, adapter_names):
            raise ValueError(
                "LoRA: merging expected a layer that can hold the adapter beside its zeros, got a MaskedLinear, whose "
                "mask would cut most of the adapter off; sparseprune.sparsify_(model, layout=...) first, whose layers "
                "take it as their low-rank term, or unload the adapter and keep it apart"
            )


def register() -> None:
    """Makes peft know sparse layers. Called once peft is imported."""
    config: Any = LoraConfig
    if getattr(config, "_sparseprune", False):
        return
    after_init: Any = config.__post_init__
    all_linear: Any = tuners_utils._maybe_include_all_linear_layers

    def post_init(self: Any) -> None:
        after_init(self)
        self._register_custom_module({SparseLinear: SparseLoraLinear, MaskedLinear: MaskedLoraLinear})

    def with_sparse(peft_config: Any, model: nn.Module) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        found = all_linear(peft_config, model)
        if isinstance(wanted, str) and wanted.lower() == tuners_utils.INCLUDE_LINEAR_LAYERS_SHORTHAND:
            inside = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
            found.target_modules = set(found.target_modules) | {
                name
                for name, module in model.named_modules()
                if isinstance(module, SparseLinear)
                and name.rpartition(".")[2] not in HEAD_NAMES
                and not any(name.startswith(f"{wrapper}.") for wrapper in inside)
            }
        return found

    config.__post_init__, config._sparseprune = post_init, True
    tuners_utils._maybe_include_all_linear_layers = with_sparse


register()  # where this module was imported first, and brought the other library in
