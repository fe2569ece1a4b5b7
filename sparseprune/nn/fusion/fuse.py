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

import inspect
import itertools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..instance_forward import is_replaced
from ..linear import SparseLinear
from ..modes import evaluating
from .activations import FusedActivations, fused_activations
from .hooks import hooked
from .modules import FUSED, FusedOutput, FusedRMSNorm
from .patterns import epilogue_of, eps_of, is_output_block, neighbours

__all__ = ["Fusion", "fuse_", "is_fused", "unfuse_"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in which a norm that was fused in one is tried too


@dataclass(frozen=True)
class Fusion:
    """One fusion: ``name`` of the module that changed, ``what`` was fused, and ``reason`` where it was left alone
    (else empty).
    """

    name: str
    what: str
    reason: str = ""


def _probe(linear: SparseLinear, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, features, generator=generator).to(linear.like)


def _same(left: Tensor, right: Tensor) -> bool:
    tolerance = 1e-4 if left.dtype == torch.float32 else 5e-2
    return bool(torch.allclose(left.float(), right.float(), rtol=tolerance, atol=tolerance))


@torch.no_grad()
def _fuse_activation(name: str, parent: nn.Module, linear: SparseLinear, child: str) -> Fusion | None:
    """Fuses ``linear`` with its activation, parent's ``child``, and keeps that where the result stays what it was;
    None where not.

    In an ``nn.Sequential`` that holds each of the two once they are neighbours. Any other parent is run on random input
    `[3, K]`, before and after: the same result shows that within its forward the activation follows this very Linear
    and that nothing else passes through it.
    """
    activation = getattr(parent, child)
    what = epilogue_of(activation)
    assert what is not None
    if hooked(linear, activation):
        return Fusion(name, what, "a hook observes the modules")
    own = fused_activations(parent)
    if is_replaced(parent, FusedActivations):
        return Fusion(name, what, "the forward of the module that holds them was replaced")
    if own is not None and any(second == child for second, _ in own.fused.values()):
        return None  # it follows another Linear already; twice handed on, either would seem right while the other is
    first = next(key for key, module in parent._modules.items() if module is linear)
    if type(parent).forward is nn.Sequential.forward:
        (own or _give_forward(parent)).fused[first] = child, what
        return Fusion(name, what)
    x = _probe(linear, linear.in_features)
    expected = _try(parent, x)
    if expected is None:
        return None
    fused = own or _give_forward(parent)
    fused.fused[first] = child, what
    result = _try(parent, x)
    if result is not None and _same(result, expected) and not fused.read:
        return Fusion(name, what)
    fused.read.clear()
    del fused.fused[first]
    if not fused.fused:
        del parent.__dict__["forward"]
    return None


def _give_forward(parent: nn.Module) -> FusedActivations:
    fused = FusedActivations(parent)
    parent.__dict__["forward"] = fused
    return fused


def _try(module: nn.Module, *inputs: Tensor, training: bool = False) -> Tensor | None:
    """module(*inputs) in eval, or with ``training`` as it trains, without dropout; None where it does not take these
    inputs or return a tensor: then it is not one of our patterns.
    """
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout)] if training else []
    rates = [dropout.p for dropout in dropouts]
    try:
        with evaluating(module):
            for dropout in dropouts:
                dropout.p = 0.0
            module.train(training)
            result = module(*inputs)
    except Exception:
        return None
    finally:
        for dropout, rate in zip(dropouts, rates):
            dropout.p = rate
    return result if isinstance(result, Tensor) else None


def _alike(module: nn.Module, fused: nn.Module, *inputs: Tensor) -> bool:
    """Whether both give the same, in eval and in training, for inputs of two dimensions and of three."""
    for training in (False, True):
        for given in (inputs, tuple(x[None] for x in inputs)):
            expected, result = (_try(m, *given, training=training) for m in (module, fused))
            if expected is None or result is None or expected.dtype != result.dtype or not _same(result, expected):
                return False
    return True


@torch.no_grad()
def _fuse_output(name: str, module: nn.Module) -> tuple[Fusion, FusedOutput | None]:
    what = "residual + LayerNorm"
    if hooked(module, *module.children()):
        return Fusion(name, what, "a hook observes the modules"), None
    if module._parameters or module._buffers:
        return Fusion(name, what, "it has parameters or buffers of its own"), None
    numbers = [n for n, v in vars(module).items() if isinstance(v, int | float | Tensor) and not n.startswith("_")]
    if numbers != ["training"]:  # which its forward may read, and which may change
        return Fusion(name, what, f"it has {', '.join(n for n in numbers if n != 'training')} of its own"), None
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if names != ["hidden_states", "input_tensor"]:
        return Fusion(name, what, f"its forward takes {', '.join(names)}, not hidden_states and input_tensor"), None
    fused = FusedOutput(module)
    dense = fused.dense
    if fused.LayerNorm.weight is None or fused.LayerNorm.bias is None:
        return Fusion(name, what, "its LayerNorm has no weight or bias"), None
    x, residual = _probe(dense, dense.in_features), _probe(dense, dense.out_features)
    if not _alike(module, fused, x, residual):
        return Fusion(name, what, "its forward is not LayerNorm(dropout(dense(x)) + residual)"), None
    return Fusion(name, what), fused


@torch.no_grad()
def _fuse_rms_norm(name: str, module: nn.Module, eps: float) -> tuple[Fusion, FusedRMSNorm | None]:
    what = "RMSNorm"
    if hooked(module):
        return Fusion(name, what, "a hook observes the module"), None
    if held := [n for n, v in vars(module).items() if isinstance(v, Tensor)]:  # which may change in place
        return Fusion(name, what, f"it has {', '.join(held)} of its own"), None
    fused = FusedRMSNorm(module, eps)
    scale = torch.tensor([[1e-4], [1e-2], [1.0], [1e2]])  # small inputs show the eps
    x = torch.randn(4, fused.weight.numel(), generator=torch.Generator().manual_seed(0)) * scale
    weight = fused.weight
    x = x.to(weight.device)
    if not _alike(module, fused, x.to(weight.dtype)):
        return Fusion(name, what, "its forward is not x / sqrt(mean(x^2) + eps) * weight"), None
    more = [pair for pair in itertools.product(_DTYPES, _DTYPES) if _alike_in(pair, fused, x)]
    fused.dtypes |= frozenset(more)
    return Fusion(name, what), fused


def _alike_in(dtypes: tuple[torch.dtype, torch.dtype], fused: FusedRMSNorm, x: Tensor) -> bool:
    """Whether module and fused form give the same for x and a weight in these dtypes, of the same dtype."""
    original = fused.unfused(fused.weight.detach().to(dtypes[1]))
    trial = FusedRMSNorm(original, fused.eps)
    trial.dtypes = frozenset({dtypes})
    with warnings.catch_warnings():  # torch's own norm has one about two dtypes
        warnings.simplefilter("ignore")
        expected, found = (_try(module, x.to(dtypes[0])) for module in (original, trial))
    return expected is not None and found is not None and expected.dtype == found.dtype and _same(found, expected)


def fuse_(model: nn.Module) -> list[Fusion]:
    """Fuses in place what follows the SparseLinears of ``model``, and its RMSNorms; returns what was done and what was
    left alone, with reasons.
    """
    fusions: list[Fusion | None] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, FUSED):
            continue
        for first, second in neighbours(module):
            linear = module._modules[first]
            if (
                isinstance(linear, SparseLinear)
                and linear.activation == "none"
                and epilogue_of(getattr(module, second))
            ):
                fusions.append(_fuse_activation(f"{name}.{first}".lstrip("."), module, linear, second))
        for child_name, child in list(module.named_children()):
            if is_output_block(child):
                fusion, fused = _fuse_output(f"{name}.{child_name}".lstrip("."), child)
                fusions.append(fusion)
                if fused is not None:
                    setattr(module, child_name, fused)
            elif (eps := eps_of(child)) is not None:
                fusion, norm = _fuse_rms_norm(f"{name}.{child_name}".lstrip("."), child, eps)
                fusions.append(fusion)
                if norm is not None:
                    setattr(module, child_name, norm)
    return [fusion for fusion in fusions if fusion is not None]


def is_fused(model: nn.Module) -> bool:
    """Whether :func:`fuse_` changed something in this model that :func:`unfuse_` would undo."""
    return any(isinstance(m, FUSED) or fused_activations(m) is not None for m in model.modules())


def unfuse_(model: nn.Module) -> None:
    """Puts every original module back in place."""
    for _, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, FusedOutput):
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
        if fused_activations(module) is not None:
            del module.__dict__["forward"]
