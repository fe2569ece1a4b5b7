"""The bytes that sparse weights take, and what of them may go."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from ... import _native, ops
from ...cuda import why_not_cuda
from ...packing import Packed
from ..linear import SparseLinear
from ..modes import evaluating
from ..packed_only import PackedLinear, give_back, keep_packed_, why_not_keep
from ..stacks import DecoderForward, StackForward, leave_to_layers_, stack_of
from ..stacks.masks import Unsupported
from ..stacks.recognise import Projection
from ..stacks.weights import is_whole
from .reports import MemoryUse

__all__ = ["check_keep", "keep_packed_forms_", "memory_of"]


def check_keep(model: nn.Module) -> None:
    """ValueError where ``keep="packed"`` cannot be, before anything changes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"keep='packed' expected a frozen model, got {name} that wants a gradient; model.requires_grad_(False) "
                "first, or keep='canonical' to train"
            )
        on_gpu = parameter.device.type == "cuda"
        if on_gpu and (reasons := why_not_cuda(parameter)):
            raise ValueError(f"keep='packed': {name}: {'; '.join(reasons)}; keep='canonical' runs it")
        if not on_gpu and (parameter.device.type != "cpu" or parameter.dtype == torch.float64):
            raise ValueError(
                f"keep='packed' expected parameters on the CPU or an NVIDIA GPU up to float32, got {name} in "
                f"{parameter.dtype} on {parameter.device}; keep='canonical' runs them"
            )
        if not on_gpu and _native.C is None:
            raise ValueError(f"keep='packed' expected the compiled core, got none: {_native.why_no_c()}")


def keep_packed_forms_(model: nn.Module) -> dict[str, str]:
    """:func:`keep_packed_` on every SparseLinear of a model. Programs of stacks go on, over the forms that are left;
    returns the names of those that cannot, whose layers run one by one, and why.
    """
    stacks = {fqn: stack for fqn, module in model.named_modules() if (stack := stack_of(module)) is not None}
    # A decoder's program reads the forms that its layers multiply with themselves.
    read = {fqn: _read_by(stack) for fqn, stack in stacks.items() if not isinstance(stack, DecoderForward)}
    left: dict[str, str] = {}
    for fqn, projections in read.items():
        cut = [p.module for p in projections if isinstance(p.module, SparseLinear) and not is_whole(p)]
        if not all(keep_packed_(layer).exact for layer in cut):
            left[fqn] = "keep='packed' rounds a weight that its program needs in parts"
            leave_to_layers_(stacks.pop(fqn).owner, left[fqn])
    whole = {id(p.module) for fqn in read if fqn in stacks for p in read[fqn] if is_whole(p)}
    for module in list(model.modules()):
        if isinstance(module, SparseLinear):
            keep_packed_(module, id(module) in whole)
            give_back()
    for stack in stacks.values():
        with suppress(Unsupported), torch.no_grad(), evaluating(stack.owner):
            stack.ready()  # what it held of the canonical tensors goes
    return left


def _read_by(stack: StackForward) -> list[Projection]:
    """Empty while only its layers can answer, as in bfloat16."""
    with suppress(Unsupported), torch.no_grad(), evaluating(stack.owner):
        return [p for layer in stack.ready().every for p in layer.projections]
    return []


def memory_of(model: nn.Module) -> MemoryUse:
    """What the sparse layers of a model take once inference has packed them; frozen ones are packed by it."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    dense = canonical = 0
    packed: dict[int, int] = {}  # address -> bytes
    all_of_it: dict[int, int] = {}
    for layer in layers:
        dense += layer.out_features * layer.in_features * layer.like.element_size()
        sources = layer.sources()
        canonical += sum(t.nbytes for t in sources)
        forms = _forms_of(layer)
        read = [t for form in forms for name, t in form.tensors().items() if name != "perm"]
        packed |= _bytes(read)
        held = [t for form in forms for t in form.tensors().values()]
        all_of_it |= _bytes([*sources, *held, *layer._forms.tensors()])
    for module in model.modules():
        stack = stack_of(module)
        if stack is not None:
            with torch.no_grad(), evaluating(stack.owner):
                parts = [t for p in stack.ready().built.parts for n, t in p.tensors().items() if n != "perm"]
            packed |= _bytes(parts)
            all_of_it |= _bytes(parts)
    return MemoryUse(dense, canonical, sum(packed.values()), sum(all_of_it.values()))


def _forms_of(layer: SparseLinear) -> list[Packed]:
    if isinstance(layer, PackedLinear):
        return list(layer.packed)
    wanted = [form for form in layer._forms.for_inference if not form.unpacked]
    if layer.like.device.type == "cpu" and why_not_keep(layer) is None:
        return [layer._packed(form) for form in dict.fromkeys(wanted)]
    if layer.like.device.type != "cpu" or layer.like.is_meta or not layer.like.requires_grad:
        return []
    layout = layer.to_layout()  # not kept for a layer that is to learn
    precision = layer.value_dtype, False, layer.activations
    return [ops.pack(layout, form.tokens, *precision) for form in dict.fromkeys(wanted)]


def _bytes(tensors: list[Tensor]) -> dict[int, int]:
    return {t.data_ptr(): t.nbytes for t in tensors if t.numel()}
