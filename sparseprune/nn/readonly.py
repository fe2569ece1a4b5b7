"""A tensor to look at: what it says cannot be changed through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["ReadOnlyTensor", "read_only"]

#: In-place by another name than ``..._``: x += y and its kin, x[i] = y, x.data = y.
_WRITES = frozenset({
    "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__",
    "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__setitem__", "__set__",
})  # fmt: skip

_ARRAYS = frozenset({"numpy", "__array__"})


class ReadOnlyTensor(Tensor):
    """A tensor that takes part in any computation and refuses every write, so that none is lost on a copy that is
    thrown away. What shares its memory is read-only too; everything else computed from it is a plain tensor, with the
    history of gradients that it has itself, but for copies, files and arrays of NumPy.
    """

    refusal: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        written: list[Any] = [options.get("out")]
        if args and (name in _WRITES or (name.endswith("_") and not name.endswith("__"))):
            written.append(args[0])
        for tensor in tree_leaves(written):
            if isinstance(tensor, ReadOnlyTensor):
                raise RuntimeError(f"{tensor.refusal} (tried: {name})")
        if name in _ARRAYS and args:  # which torch refuses where there is a history
            args = (args[0].detach(), *args[1:])
        given = [t for t in tree_leaves((args, options)) if isinstance(t, ReadOnlyTensor)]
        owners = {_memory(t): t.refusal for t in given}
        before = _versions(given)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **options)
            if _versions(given) != before:  # a function in Python that writes: nn.init.normal_, F.relu(inplace=True)
                raise RuntimeError(f"{given[0].refusal} (tried: {name})")

        def plain_or_not(tensor: Tensor) -> Tensor:
            refusal = owners.get(_memory(tensor))
            return tensor.as_subclass(Tensor) if refusal is None else read_only(tensor, refusal)

        return tree_map_only(Tensor, plain_or_not, result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()


def read_only(tensor: Tensor, refusal: str) -> Tensor:
    """The tensor, over the same memory, as a :class:`ReadOnlyTensor` that answers a write by RuntimeError(refusal).

    Within a call that is being compiled, where writes are rewritten, it stays the tensor it is.
    """
    if torch.compiler.is_compiling():
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        found = tensor.as_subclass(ReadOnlyTensor)
    found.__dict__["refusal"] = refusal
    return found


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    with torch._C.DisableTorchFunctionSubclass():
        return [0 if t.is_inference() else t._version for t in tensors]


def _memory(tensor: Tensor) -> object:
    with torch._C.DisableTorchFunctionSubclass():
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # of a transform: it has none of its own
        if wrapped or tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
            return None if not isinstance(tensor, ReadOnlyTensor) else id(tensor)
        return tensor.untyped_storage().data_ptr()
