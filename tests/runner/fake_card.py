"""A GPU that is none: tensors in the CPU's memory that say they are on ``cuda:0``, and refuse to meet others.

While :func:`a_card` is open, whatever is made on or moved to a GPU becomes an :class:`OnCard`. Every function of torch
that is called with tensors of both sides raises as a real card does, but for what a real one allows: copies, indices
from the CPU, single numbers. ``.numpy()`` raises. It computes what the CPU computes.
"""

from __future__ import annotations

import contextlib
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda", 0)
_T = torch.Tensor
_COPIES = {
    _T.copy_, _T.__getitem__, _T.__setitem__, _T.data.__set__, torch._foreach_copy_, _T.set_,
    torch._has_compatible_shallow_copy_type,
}  # fmt: skip
_TO_NUMPY = {_T.numpy, _T.__array__}
_FACTORIES = {getattr(torch, name) for name in (
    "empty", "zeros", "ones", "full", "arange", "linspace", "rand", "randn", "randint", "randperm", "eye", "tensor",
    "as_tensor", "empty_strided", "scalar_tensor",
)}  # fmt: skip


class OnCard(torch.Tensor):
    """A tensor of the card."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _plain(value):
    """The same memory as an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor) if isinstance(value, OnCard) else value


def _on_card(value):
    if not isinstance(value, torch.Tensor) or isinstance(value, OnCard):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(OnCard)


def _names_card(value):
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )


def _is_device(value):
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"))


def _moved(args, kwargs):
    """``Tensor.to``: (the tensor, where it goes, what else is asked for)."""
    tensor, *rest = args
    rest = [kwargs.pop("device"), *rest] if kwargs.get("device") is not None else rest
    rest = [kwargs.pop("other"), *rest] if "other" in kwargs else rest
    target = isinstance(tensor, OnCard)
    more = []
    for value in rest:
        if isinstance(value, torch.Tensor):
            target = isinstance(value, OnCard)
            more.append(value.dtype)
        elif _is_device(value):
            target = _names_card(value)
        elif value is not None and not isinstance(value, bool):
            more.append(value)
    return tensor, target, more


class Count:
    calls = backward = 0


def _call(func, args, kwargs):
    name = getattr(func, "__name__", "")
    if func == _T.device.__get__:
        return CARD if isinstance(args[0], OnCard) else torch.device("cpu")
    if func == _T.is_cuda.__get__:
        return isinstance(args[0], OnCard)
    given = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
    ours = [v for v in given if isinstance(v, OnCard)]
    Count.calls += bool(ours)
    if func in _TO_NUMPY and ours:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
    with torch._C.DisableTorchFunctionSubclass():
        if func is _T.__deepcopy__ and ours:
            return _deepcopy(*args)
        if func is _T.__reduce_ex__ and ours:
            return _plain(args[0]).__reduce_ex__(args[1])
        if func in (_T.to, _T.cuda, _T.cpu):
            kwargs = dict(kwargs)
            tensor, target, more = _moved(args, kwargs) if func is _T.to else (args[0], func is _T.cuda, [])
            kwargs.pop("non_blocking", None)
            if target == isinstance(tensor, OnCard) and not more and not kwargs:
                return tensor
            found = _plain(tensor).to(*more, **kwargs) if more or kwargs else _plain(tensor)
            if target != isinstance(tensor, OnCard) and found.data_ptr() == tensor.data_ptr():
                found = found.clone()
            if found is tensor:
                return tensor
            return _on_card(found) if target else _plain(found)
        target = bool(ours)
        if "device" in kwargs and kwargs["device"] is not None:
            target = _names_card(kwargs["device"])
            kwargs = {**kwargs, "device": "cpu"}
        elif func in _FACTORIES:
            target = target and name in ("tensor", "as_tensor")
        others = [v for v in given if not isinstance(v, OnCard) and v.dim() > 0]
        if ours and others and func not in _COPIES and not Count.backward:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu! ({name}, "
                f"cpu: {[list(v.shape) for v in others]})"
            )
        found = func(*args, **kwargs)
    others = isinstance(found, torch.Size) or name in ("__set__", "requires_grad_") or func == _T.grad_fn.__get__
    if not target or others:
        return found
    same = {id(v) for v in given}
    return tree_map(lambda v: v if id(v) in same else _on_card(v), found)


def _deepcopy(tensor, memo):
    if id(tensor) not in memo:
        made = _on_card(_plain(tensor).detach().clone()).requires_grad_(tensor.requires_grad)
        if getattr(tensor, "_is_param", False):
            made._is_param = True
        memo[id(tensor)] = made
    return memo[id(tensor)]


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _counting(backward):
    def run(*args, **kwargs):
        Count.backward += 1  # formulas of ops see what autograd kept, which is not marked
        try:
            return backward(*args, **kwargs)
        finally:
            Count.backward -= 1

    return run


@contextmanager
def a_card(patch):
    """patch: pytest's monkeypatch. Yields the count of waits for the card, a list."""
    waits = []
    state = torch.get_rng_state()
    there = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device=None: "Fake card", "get_device_capability": lambda device=None: (8, 0),
        "synchronize": lambda device=None: waits.append(device), "get_rng_state": lambda device=None: state.clone(),
        "set_rng_state": lambda new, device=None: None, "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: False,
        "device": lambda device: contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in there.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.autograd, "backward", _counting(torch.autograd.backward))
    patch.setattr(torch.Tensor, "backward", _counting(torch.Tensor.backward))
    patch.setattr(torch.autograd, "grad", _counting(torch.autograd.grad))
    patch.setenv("SPARSEPRUNE_BACKEND", "reference")
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Mode():
            yield waits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
