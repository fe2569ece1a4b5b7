"""Weights that hide from ``nn.Linear``, given Linears of their own: Conv1D and the packed nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "is_conv1d", "refuse_save_pretrained_", "use_linears_", "using_linears"]


class Attention(nn.Module):
    """``nn.MultiheadAttention`` with its four projections as Linears: same call, same result, same shapes.

    query `[B, L, E]` (`[L, B, E]` unless ``batch_first``, `[L, E]` unbatched); returns (output like the query, weights
    `[B, L, S]`, or `[B, H, L, S]` with ``average_attn_weights=False``, or None). Heads may be cut out: the weights are
    then those of the heads left, and an ``attn_mask`` of three dimensions has ``B * num_heads`` rows of what is left.
    """

    #: What nn.TransformerEncoderLayer asks for before it hands packed weights to a kernel of its own: there are none.
    in_proj_bias = in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = packed.embed_dim, packed.num_heads, packed.head_dim
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        weights = (
            packed.in_proj_weight.detach().chunk(3)
            if packed._qkv_same_embed_dim
            else [getattr(packed, f"{name}_proj_weight").detach() for name in "qkv"]
        )
        biases: Sequence[Tensor | None]
        biases = [None] * 3 if packed.in_proj_bias is None else packed.in_proj_bias.detach().chunk(3)
        grad = packed.out_proj.weight.requires_grad
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b, grad) for w, b in zip(weights, biases))
        out = packed.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach(), grad)
        self.train(packed.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Masks as nn.MultiheadAttention takes them: True, or minus infinity, where nothing is to be read."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Attention: is_causal is a hint about attn_mask; expected the mask too, got none")
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, len(q), q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one to add, broadcast to `[B, H, L, S]`."""
        if attn_mask is not None:
            attn_mask = _added(attn_mask, dtype)
            if attn_mask.dim() == 3:
                if len(attn_mask) != batch * self.num_heads:
                    raise RuntimeError(
                        f"Attention: attn_mask expected {batch * self.num_heads} x L x S, batch times heads left, got "
                        f"{list(attn_mask.shape)}"
                    )
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        if padding is None:
            return attn_mask
        padding = _added(padding, dtype)[:, None, None, :]
        return padding if attn_mask is None else attn_mask + padding


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


def _linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    """weight `[N, K]`, bias `[N]`: copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=requires_grad)
    return linear


def is_conv1d(module: Any) -> bool:
    """Whether this is transformers' Conv1D, a Linear with its weight `[K, N]` transposed."""
    return isinstance(module, nn.Module) and type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def use_linears_(model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Gives Linears of their own, in place, to weights that hide from ``nn.Linear``, so that they can be pruned, cut
    by heads and neurons, and run sparse; returns the names of the modules changed. The model computes the same.

    Conv1D (GPT-2) becomes an ``nn.Linear`` of the same name, its weight transposed; ``nn.MultiheadAttention`` becomes
    an :class:`Attention` with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``. Make the optimiser afterwards.
    names: the modules to change, by default all. :func:`sparseprune.load` does it by itself where a checkpoint asks for
    it; ``save_pretrained`` raises afterwards, because ``from_pretrained`` would read the weights the wrong way round.

    Raises ValueError, nothing changed, on an attention with ``bias_k`` or ``add_zero_attn``, and on a model that is
    itself one of these modules.
    """
    found = {
        fqn: module
        for fqn, module in model.named_modules()
        if (is_conv1d(module) or isinstance(module, nn.MultiheadAttention)) and (names is None or fqn in names)
    }
    for fqn, module in found.items():
        if not fqn:
            raise ValueError(f"use_linears_: expected a model that holds a {type(module).__name__}, got one itself")
        if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
            raise ValueError(f"use_linears_: {fqn} expected no bias_k and no add_zero_attn; leave it out of names")
    for fqn, module in found.items():
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(fqn, Attention(module))
        else:
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            linear = _linear(weight.detach().T, bias.detach(), weight.requires_grad)
            model.set_submodule(fqn, linear.train(module.training))
    for fqn, module in model.named_modules():
        # It would hand packed weights, which are no longer there, to a kernel of its own.
        inside = any(name.startswith(f"{fqn}." if fqn else "") for name in found)
        if isinstance(module, nn.TransformerEncoder) and inside:
            module.use_nested_tensor = False
    if found:
        refuse_save_pretrained_(model, "use_linears_ changed the names of its weights, or which way round they lie")
    return list(found)


@contextmanager
def using_linears(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """:func:`use_linears_`, undone where what runs inside fails."""
    refused = [module for module in model.modules() if "save_pretrained" in module.__dict__]
    nested = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    before = {fqn: model.get_submodule(fqn) for fqn in names}
    use_linears_(model, names)
    try:
        yield
    except Exception:
        for fqn, module in before.items():
            model.set_submodule(fqn, module)
        for module in model.modules() if before else ():
            if module not in refused:
                module.__dict__.pop("save_pretrained", None)
        for encoder in nested:
            encoder.use_nested_tensor = True
        raise


class _Refusal:
    """Stands in for ``save_pretrained``; picklable."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"save_pretrained: from_pretrained could not read this model back: {self.why}; use sparseprune.save(model, "
            "path), and sparseprune.load(model, path) on the original architecture"
        )


def refuse_save_pretrained_(model: nn.Module, why: str) -> None:
    """Makes ``save_pretrained`` of this model, and of the models in it, raise RuntimeError with the remedy."""
    for module in model.modules():
        if callable(getattr(module, "save_pretrained", None)):
            module.__dict__["save_pretrained"] = _Refusal(why)
