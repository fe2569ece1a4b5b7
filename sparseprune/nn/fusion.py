"""Fusion in eager mode: what follows a SparseLinear moves into its epilogue, where the result is still in registers.

Three patterns, found by structure and checked by running both forms on the same random input before one replaces the
other:

- *activation*: a Linear followed by its activation module, in an ``nn.Sequential`` or in a feed-forward block that
holds just the two (BERT's ``intermediate``);
- *output*: Linear, dropout, residual, LayerNorm (BERT's ``output`` blocks);
- *RMSNorm*: any module that holds one gain and an eps and computes x / sqrt(mean(x^2) + eps) * gain, in one pass
instead of six ops.

Names of parameters and modules stay; :func:`unfuse_` puts the original modules back, untouched.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import native, ops
from .linear import SparseLinear, runs_direct

__all__ = ["FUSED", "FusedActivation", "FusedOutput", "FusedRMSNorm", "Fusion", "fuse_", "unfuse_"]

# Class name of an activation module -> the epilogue that computes the same function.
_EPILOGUES = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}


@dataclass(frozen=True)
class Fusion:
    """One fusion: ``name`` of the module that changed, ``what`` was fused, and ``reason`` where it was left alone
    (else empty).
    """

    name: str
    what: str
    reason: str = ""


class FusedActivation(nn.Module):
    """Stands where an activation stood that the SparseLinear before it took into its epilogue; hands its input on."""

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual), all of it by ``dense`` where there is no dropout to apply.

    x: `[..., K]`; residual: `[..., N]`; returns `[..., N]`. Holds the children of the block it replaces under their
    own names.
    """

    dense: SparseLinear
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout
    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.train(original.training)
        for name, child in original.named_children():
            setattr(self, name, child)
        self.__dict__["original"] = original  # not a submodule: its children are ours already

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense, norm = self.dense, self.LayerNorm
        if self.training and self.dropout.p > 0:
            return norm(self.dropout(dense(hidden_states)) + input_tensor)
        return dense(hidden_states, input_tensor, norm)


class FusedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in one pass. x: `[..., D]`; returns `[..., D]` in the wider dtype of the two.

    Holds the weight `[D]` of the module it replaces under its own name.
    """

    weight: nn.Parameter
    original: nn.Module

    def __init__(self, original: nn.Module, eps: float) -> None:
        super().__init__()
        self.train(original.training)
        self.weight = original.weight  # type: ignore[assignment]
        self.eps = eps
        self.__dict__["original"] = original  # not a submodule: its weight is ours already

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if (
            runs_direct(x, weight)
            and x.dtype in native.matmul.DTYPES
            and weight.dtype in native.matmul.DTYPES
            and x.shape[-1:] == weight.shape
        ):
            return native.decode.rms_norm(x, weight, self.eps)
        return ops.rms_norm(x, weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


#: What :func:`fuse_` puts into a model and :func:`unfuse_` takes out.
FUSED = (FusedActivation, FusedOutput, FusedRMSNorm)


def _epilogue_of(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _EPILOGUES.get(type(module).__name__)


def hooked(*modules: nn.Module) -> bool:
    """Whether something watches these modules, or has replaced the forward of one."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


def _probe(linear: SparseLinear, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, features, generator=generator).to(linear.values)


def _same(left: Tensor, right: Tensor) -> bool:
    tolerance = 1e-4 if left.dtype == torch.float32 else 5e-2
    return bool(torch.allclose(left.float(), right.float(), rtol=tolerance, atol=tolerance))


@torch.no_grad()
def _fuse_activation(name: str, parent: nn.Module, linear: SparseLinear, child: str) -> Fusion | None:
    """Fuses ``linear`` with its activation, parent's ``child``, and keeps that where the result stays what it was;
    None where not.

    In an ``nn.Sequential`` the two are neighbours. Any other parent is run on random input `[3, K]`, before and after:
    the same result shows that the activation follows this very Linear and that nothing else passes through it.
    """
    activation = getattr(parent, child)
    what = _epilogue_of(activation)
    assert what is not None
    if hooked(linear, activation):
        return Fusion(name, what, "a hook observes the modules")
    x = _probe(linear, linear.in_features)

    def run() -> Tensor | None:
        return getattr(parent, child)(linear(x)) if isinstance(parent, nn.Sequential) else _try(parent, x)

    expected = run()
    if expected is None:
        return None
    linear.activation = what
    setattr(parent, child, FusedActivation(activation))
    result = run()
    if result is not None and _same(result, expected):
        return Fusion(name, what)
    linear.activation = "none"
    setattr(parent, child, activation)
    return None


def _try(module: nn.Module, *inputs: Tensor) -> Tensor | None:
    """module(*inputs) in eval; None where it does not take these inputs or return a tensor: then it is not one of our
    patterns.
    """
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        result = module(*inputs)
    except Exception:
        return None
    finally:
        for m, training in modes.items():
            m.training = training
    return result if isinstance(result, Tensor) else None


def _is_output_block(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return (
        set(children) == {"dense", "LayerNorm", "dropout"}
        and isinstance(children["dense"], SparseLinear)
        and type(children["LayerNorm"]) is nn.LayerNorm
        and isinstance(children["dropout"], nn.Dropout)
        and type(module) is not FusedOutput
    )


@torch.no_grad()
def _fuse_output(name: str, module: nn.Module) -> tuple[Fusion, FusedOutput | None]:
    what = "residual + LayerNorm"
    if hooked(module, *module.children()):
        return Fusion(name, what, "a hook observes the modules"), None
    fused = FusedOutput(module)
    dense = fused.dense
    if fused.LayerNorm.weight is None or fused.LayerNorm.bias is None:
        return Fusion(name, what, "its LayerNorm has no weight or bias"), None
    x, residual = _probe(dense, dense.in_features), _probe(dense, dense.out_features)
    expected, result = _try(module, x, residual), _try(fused, x, residual)
    if expected is None or result is None or not _same(result, expected):
        return Fusion(name, what, "its forward is not LayerNorm(dropout(dense(x)) + residual)"), None
    return Fusion(name, what), fused


def _eps_of(module: nn.Module) -> float | None:
    """The eps of a module that may be an RMSNorm: no children, one parameter, the gain, and an eps; else None."""
    weight = module._parameters.get("weight")
    if list(module._parameters) != ["weight"] or weight is None or weight.dim() != 1 or weight.is_meta:
        return None
    if module._buffers or module._modules or isinstance(module, FUSED) or not weight.is_floating_point():
        return None
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(eps := getattr(module, name, None), float):
            return eps
    if not isinstance(module, nn.RMSNorm):
        return None
    return torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps  # what torch takes where none is given


@torch.no_grad()
def _fuse_rms_norm(name: str, module: nn.Module, eps: float) -> tuple[Fusion, FusedRMSNorm | None]:
    what = "RMSNorm"
    if hooked(module):
        return Fusion(name, what, "a hook observes the module"), None
    fused = FusedRMSNorm(module, eps)
    scale = torch.tensor([[1e-4], [1e-2], [1.0], [1e2]])  # small inputs show the eps
    x = torch.randn(4, fused.weight.numel(), generator=torch.Generator().manual_seed(0)) * scale
    x = x.to(fused.weight)
    expected, result = _try(module, x), _try(fused, x)
    if expected is None or result is None or expected.dtype != result.dtype or not _same(result, expected):
        return Fusion(name, what, "its forward is not x / sqrt(mean(x^2) + eps) * weight"), None
    return Fusion(name, what), fused


def fuse_(model: nn.Module) -> list[Fusion]:
    """Fuses in place what follows the SparseLinears of ``model``, and its RMSNorms; returns what was done and what was
    left alone, with reasons.
    """
    fusions: list[Fusion | None] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, FUSED):
            continue
        for first, second in _neighbours(module):
            linear = module._modules[first]
            if (
                isinstance(linear, SparseLinear)
                and linear.activation == "none"
                and _epilogue_of(getattr(module, second))
            ):
                fusions.append(_fuse_activation(f"{name}.{first}".lstrip("."), module, linear, second))
        for child_name, child in list(module.named_children()):
            if _is_output_block(child):
                fusion, fused = _fuse_output(f"{name}.{child_name}".lstrip("."), child)
                fusions.append(fusion)
                if fused is not None:
                    setattr(module, child_name, fused)
            elif (eps := _eps_of(child)) is not None:
                fusion, norm = _fuse_rms_norm(f"{name}.{child_name}".lstrip("."), child, eps)
                fusions.append(fusion)
                if norm is not None:
                    setattr(module, child_name, norm)
    return [fusion for fusion in fusions if fusion is not None]


def _neighbours(module: nn.Module) -> list[tuple[str, str]]:
    """(name of a Linear, name of the activation that may follow it): next to each other, or with the module's only
    activation.
    """
    names = [name for name, child in module._modules.items() if child is not None]
    if isinstance(module, nn.Sequential):
        return list(itertools.pairwise(names))
    activations = [name for name in names if _epilogue_of(getattr(module, name)) is not None]
    return [(name, activations[0]) for name in names] if len(activations) == 1 else []


def unfuse_(model: nn.Module) -> None:
    """Puts every original module back in place."""
    for _, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, FusedActivation):
                setattr(module, child_name, child.original)
            elif isinstance(child, FusedOutput):
                original = child.original
                for grandchild_name, grandchild in child.named_children():
                    setattr(original, grandchild_name, grandchild)
                original.train(child.training)
                setattr(module, child_name, original)
            elif isinstance(child, FusedRMSNorm):
                original = child.original
                original.weight = child.weight  # loading may have assigned another
                original.train(child.training)
                setattr(module, child_name, original)
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.activation = "none"
