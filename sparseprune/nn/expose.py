"""Weights that hide from ``nn.Linear``, given Linears of their own: Conv1D and the packed nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .saving import is_taught, mark_unlike_, unmark_unlike_

__all__ = ["Attention", "expose_linears_", "exposing_linears", "is_conv1d", "refuse_save_pretrained_"]


class Attention(nn.Module):
    """``nn.MultiheadAttention`` with its four projections as Linears: same call, same result, same shapes.

    query `[B, L, E]` (`[L, B, E]` unless ``batch_first``, `[L, E]` unbatched); returns (output like the query, weights
    `[B, L, S]`, or `[B, H, L, S]` with ``average_attn_weights=False``, or None). Heads may be cut out: the weights are
    then those of the heads left, and an ``attn_mask`` of three dimensions has ``B * num_heads`` rows of what is left.
    """

    #: What nn.TransformerEncoderLayer asks for before it hands packed weights to a kernel of its own: there are none.
    in_proj_bias = in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, packed: nn.MultiheadAttention, shared: bool = False) -> None:
        """shared: the Linears lie over the memory of the packed weights, instead of copies."""
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
        self.q_proj, self.k_proj, self.v_proj = (
            linear_over(w, b, grad, shared) for w, b in zip(weights, biases)
        )
        self.out_proj = linear_over(packed.out_proj.weight, packed.out_proj.bias, grad, shared)
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


def linear_over(weight: Tensor, bias: Tensor | None, learns: bool, shared: bool = False) -> nn.Linear:
    """weight `[N, K]`, bias `[N]`: a Linear over their memory where it is ``shared``, else over copies. learns: what
    both get as ``requires_grad``.
    """

    def parameter(tensor: Tensor) -> nn.Parameter:
        tensor = tensor.detach()
        return nn.Parameter(tensor if shared else tensor.clone(memory_format=torch.contiguous_format), learns)

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = parameter(weight)
    if bias is not None:
        linear.bias = parameter(bias)
    return linear


def conv1d_linear(module: nn.Module, shared: bool = False) -> nn.Linear:
    """A Conv1D, weight `[K, N]`, as the Linear that it is."""
    weight = module.get_parameter("weight")
    linear = linear_over(weight.detach().T, module.get_parameter("bias"), weight.requires_grad, shared)
    return linear.train(module.training)


def is_conv1d(module: Any) -> bool:
    """Whether this is transformers' Conv1D, a Linear with its weight `[K, N]` transposed."""
    return isinstance(module, nn.Module) and type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def expose_linears_(model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Gives Linears of their own, in place, to weights that hide from ``nn.Linear``, so that they can be pruned, cut
    by heads and neurons, and run sparse; returns the names of the modules changed. The model computes the same.

    Conv1D (GPT-2) becomes an ``nn.Linear`` of the same name, its weight transposed; ``nn.MultiheadAttention`` becomes
    an :class:`Attention` with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``. Make the optimiser afterwards.
    names: the modules to change, by default all. :func:`sparseprune.load` does it by itself where a checkpoint asks for
    it, and ``save_pretrained`` of transformers writes down that its models are to be changed so when they are loaded.

    Raises ValueError, nothing changed, on an attention with ``bias_k`` or ``add_zero_attn``, and on a model that is
    itself one of these modules.
    """
    found = {
        fqn: module
        for fqn, module in named_as(model, names)
        if is_conv1d(module) or isinstance(module, nn.MultiheadAttention)
    }
    for fqn, module in found.items():
        if not fqn:
            raise ValueError(f"expose_linears_: expected a model that holds a {type(module).__name__}, got one itself")
        if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
            raise ValueError(f"expose_linears_: {fqn} expected no bias_k and no add_zero_attn; leave it out of names")
    made: dict[int, nn.Module] = {}  # a module that has several names stays one
    for fqn, module in found.items():
        if id(module) not in made:
            made[id(module)] = Attention(module) if isinstance(module, nn.MultiheadAttention) else conv1d_linear(module)
        model.set_submodule(fqn, made[id(module)])
    for fqn, module in model.named_modules():
        # It would hand packed weights, which are no longer there, to a kernel of its own.
        inside = any(name.startswith(f"{fqn}." if fqn else "") for name in found)
        if isinstance(module, nn.TransformerEncoder) and inside:
            module.use_nested_tensor = False
    if found:
        refuse_save_pretrained_(model, "expose_linears_ changed the names of its weights, or which way round they lie")
    return list(found)


def named_as(model: nn.Module, names: Collection[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules of these names (None: all), each under every name that it has."""
    held = list(model.named_modules(remove_duplicate=False))
    wanted = {id(module) for fqn, module in held if names is None or fqn in names}
    return [(fqn, module) for fqn, module in held if id(module) in wanted]


@contextmanager
def exposing_linears(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """:func:`expose_linears_`, undone where what runs inside fails."""
    with put_back_on_failure(model, names):
        expose_linears_(model, names)
        yield


@contextmanager
def put_back_on_failure(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Puts back the modules of these names, and what was noted of saving them, where what runs inside fails."""
    refused = [module for module in model.modules() if "save_pretrained" in module.__dict__]
    nested = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    before = dict(named_as(model, names))
    try:
        yield
    except Exception:
        for fqn, module in before.items():
            model.set_submodule(fqn, module)
        for module in model.modules() if before else ():
            if module not in refused:
                module.__dict__.pop("save_pretrained", None)
                unmark_unlike_(module)
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
    """Makes ``save_pretrained`` of this model, and of the models in it, write a form that says what their configuration
    cannot, or, in a library that was not taught it, raise RuntimeError with the remedy.
    """
    for module in model.modules():
        if is_taught(module):
            mark_unlike_(module, why)
        elif callable(getattr(module, "save_pretrained", None)):
            module.__dict__["save_pretrained"] = _Refusal(why)
