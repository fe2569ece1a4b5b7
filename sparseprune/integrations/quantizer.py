"""``save_pretrained`` and ``from_pretrained`` of sparse models, by transformers' registry of quantizers.

A folder holds what transformers writes, ``model.safetensors`` (or shards) and ``config.json``, with every pruned weight
in its smallest encoding (:mod:`sparseprune.encodings`): a tensor NAME as ``NAME::spec`` (JSON in bytes),
``NAME::values``, ``NAME::index`` (and ``::crow``, ``::scale``), where NAME is ``LAYER.values`` of a SparseLinear, else
``LAYER.weight``. ``quantization_config`` in ``config.json`` says which layers run sparse and how. Nothing in it names
code, and everything is checked before a kernel sees it.

A model that was read so is no quantised model to transformers: it trains, moves and saves as any other.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.state import unwrapped
from ..nn import SparseLinear, sparsify_
from ..nn.saving import OWN_FORMS, guard_saving
from ..packing import VALUE_DTYPES
from .conversion import PARTS, Decode, decoded_state, encoded_state
from .description import Description, describe, finish_, prepare_

__all__ = ["METHOD", "SparsePruneConfig", "SparsePruneQuantizer", "in_our_form", "register"]

METHOD, VERSION = "sparseprune", 1
# A model that is being written says so to transformers: one thread at a time.
_WRITING: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_SPARSIFY = tuple(name for name in inspect.signature(sparsify_).parameters if name not in ("model", "filter_fn"))


class SparsePruneConfig(QuantizationConfigMixin):
    """``quantization_config`` of a sparse folder; or, given to ``from_pretrained`` of a dense folder whose weights have
    zeros, the options of :func:`sparseprune.sparsify_`, which is called once they are loaded::

        AutoModel.from_pretrained(folder, quantization_config=SparsePruneConfig(tokens=1024))

    ``stored_value_dtype``: how :func:`save_pretrained` stores kept values. ValueError on an unknown option or version.
    """

    def __init__(
        self, *, quant_method: str = METHOD, version: int = VERSION, layers: Mapping[str, Any] | None = None,
        stored_value_dtype: str = "float32", **options: Any,
    ) -> None:  # fmt: skip
        if quant_method != METHOD or version != VERSION:
            raise ValueError(
                f"quantization_config: expected {METHOD!r} of version {VERSION}, got {quant_method!r} of {version!r}; "
                "use the sparseprune that wrote it"
            )
        unknown = sorted(set(options) - set(_SPARSIFY))
        if unknown or (options and layers is not None):
            raise ValueError(
                f"quantization_config: expected layers, or options of sparsify_ ({', '.join(_SPARSIFY)}), got "
                f"{', '.join(unknown) or 'both'}"
            )
        if stored_value_dtype not in VALUE_DTYPES:
            raise ValueError(
                f"quantization_config: stored_value_dtype expected one of {', '.join(VALUE_DTYPES)}, got "
                f"{stored_value_dtype!r}"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = VERSION
        self.stored_value_dtype = stored_value_dtype
        self.options = options
        self.described = None if layers is None else Description.from_dict(layers)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds; :meth:`from_dict` reads it."""
        found = {"quant_method": METHOD, "version": VERSION, "stored_value_dtype": self.stored_value_dtype}
        found |= self.options
        return found if self.described is None else found | {"layers": self.described.to_dict()}

    def __iter__(self) -> Iterator[Any]:
        yield from self.to_dict().items()


class SparsePruneQuantizer(HfQuantizer):
    """Reads and writes the tensors of sparse layers for transformers."""

    requires_calibration = False
    quantization_config: SparsePruneConfig

    def __init__(self, quantization_config: SparsePruneConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.described: Description | None = None
        self.awaited: set[str] = set()
        self.given: Mapping[str, Tensor] | None = None  # to be written instead of the model's own state

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        told = self.quantization_config.described
        if not self.pre_quantized:
            return
        if told is None:
            raise ValueError("quantization_config: expected layers in config.json, got none; the folder is incomplete")
        with torch.device("meta"):
            self.described = prepare_(model, told, [str(file) for file in kwargs.get("checkpoint_files") or []])
        self.awaited = {f"{fqn}.values" for fqn in self.described.structure.sparse}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Ours come first: another conversion must not take encoded bytes for a weight."""
        from transformers.core_model_loading import WeightConverter

        if not self.pre_quantized:
            return weight_conversions
        return [WeightConverter([f"::{part}$" for part in PARTS], [""], [Decode(self)]), *weight_conversions]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """True for the values of a sparse layer, whose number the files alone know: their shape is not compared."""
        module, _, name = param_name.rpartition(".")
        if name not in ("values", "col_indices") or not self.pre_quantized:
            return False
        return isinstance(model.get_submodule(module), SparseLinear)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        if not self.pre_quantized:
            sparsify_(model, **self.quantization_config.options)
            return
        if self.awaited:
            lacking = sorted(self.awaited)
            raise ValueError(
                f"from_pretrained: expected the values of {len(lacking)} more sparse layers in the files, got none for "
                f"{', '.join(lacking[:3])}; the folder is incomplete"
            )
        used = getattr(model, "_weight_conversions", None)
        if used is not None:  # not to be undone when it is saved
            model._weight_conversions = [c for c in used if not any(isinstance(o, Decode) for o in _operations(c))]
        assert self.described is not None
        finish_(model, self.described)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        return encoded_state(model, self.quantization_config.stored_value_dtype, self.given), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", [])


@contextmanager
def in_our_form(
    model: Any, value_dtype: str | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Any]]:
    """Within it ``save_pretrained`` of this model writes a sparse folder; gives the options to call it with.
    ``value_dtype`` as in :func:`sparseprune.save`; ``state_dict``: what is written instead of the model's own state,
    which transformers asks no quantizer to do. Another thread that saves the model waits.
    """
    with _WRITING.setdefault(model, threading.RLock()), _in_our_form(model, value_dtype, state_dict) as options:
        yield options


@contextmanager
def _in_our_form(
    model: Any, value_dtype: str | None, state_dict: Mapping[str, Tensor] | None
) -> Iterator[dict[str, Any]]:
    inside = getattr(model, "hf_quantizer", None)
    if isinstance(inside, SparsePruneQuantizer):
        yield {"save_original_format": False}
        return
    plain = all(p.is_floating_point() and p.element_size() > 1 for p in model.parameters())
    if inside is not None and not (plain or getattr(inside.quantization_config, "dequantize", False)):
        raise RuntimeError(
            f"save_pretrained: expected layers in floating point beside the sparse ones, got a model quantised by "
            f"{inside.quantization_config.quant_method}; sparseprune.densify_(model) first"
        )
    # One that dequantised its weights as it loaded them (a GGUF file) has nothing to say about them any more.
    notes = [(model, name) for name in ("hf_quantizer", "is_quantized", "quantization_method")]
    notes.append((model.config, "quantization_config"))
    before = [(owner, name, vars(owner)[name]) for owner, name in notes if name in vars(owner)]
    for owner, name, _ in before:
        delattr(owner, name)
    try:
        with unwrapped(model) as whole:
            config = SparsePruneConfig(layers=describe(whole).to_dict(), stored_value_dtype=value_dtype or "float32")
            quantizer = SparsePruneQuantizer(config, pre_quantized=True)
            quantizer.given = state_dict
            model.hf_quantizer, model.config.quantization_config = quantizer, config
            try:
                yield {"save_original_format": False}
            finally:
                quantizer.remove_quantization_config(model)
                model.__dict__.pop("is_quantized", None)
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """``nn.Module.load_state_dict`` that also takes encoded tensors, as a Trainer that resumes hands them over."""
    return nn.Module.load_state_dict(self, decoded_state(self, state_dict), strict, assign)


def _is_encoded(files: Sequence[Any], state: Mapping[str, Any]) -> bool:
    """Whether there are encoded tensors in these files, or in this state dict."""
    if any(name.endswith("::spec") for name in state):
        return True
    for file in map(str, files):
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                if any(name.endswith("::spec") for name in opened.keys()):  # noqa: SIM118 (no mapping)
                    return True
    return False


def _refuse_strangers(found: Any) -> None:
    """ValueError where a layer of the files was not known for one of the model, whose weight is lacking now."""
    missing, passed_over = (set(getattr(found, name, None) or ()) for name in ("missing_keys", "unexpected_keys"))
    ends = {name.removesuffix(".values") for name in passed_over if name.endswith(".values")}
    lost = sorted(name for name in ends if f"{name}.weight" in missing)
    if lost:
        raise ValueError(
            f"from_pretrained: expected to know each sparse layer of the folder by its name, got {len(lost)} that go "
            f"by another one in this model ({', '.join(lost[:3])}), whose weights would be random numbers; load the "
            "model that was saved, and take the part of it"
        )


def _decoding(load: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' reading of weights, which without a quantizer passes over encoded ones and leaves random numbers in
    their places: then an error.
    """

    @functools.wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        told = inspect.signature(load).bind(*args, **kwargs).arguments
        quantizer = getattr(told.get("load_config"), "hf_quantizer", None)
        ours = isinstance(quantizer, SparsePruneQuantizer) and quantizer.pre_quantized
        if not ours and _is_encoded(told.get("checkpoint_files") or (), told.get("state_dict") or {}):
            raise ValueError(
                "from_pretrained: expected the configuration of the folder, whose weights are encoded, got one without "
                "its quantization_config, as that of a model in memory is; leave config out, or set "
                "config.quantization_config = AutoConfig.from_pretrained(folder).quantization_config; of a model of "
                "several parts load the whole, and take the part of it"
            )
        found = load(*args, **kwargs)
        if ours:
            _refuse_strangers(found[0] if isinstance(found, tuple) else found)
        return found

    return checked


def _reading_of(kind: Any) -> Callable[..., Any] | None:
    """The reading of weights of a transformers whose own, private function has the arguments that are looked at; None
    in one that reads otherwise, which is left as it is.
    """
    load = getattr(kind, "_load_pretrained_model", None)
    if load is None or not {"load_config", "checkpoint_files", "state_dict"} <= set(inspect.signature(load).parameters):
        return None
    return load


def register() -> None:
    """Makes transformers know the format. Called once transformers is imported; a transformers whose loading converts
    no weights (before version 5) is left alone, and goes on refusing to save sparse layers.
    """
    if METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING or not hasattr(HfQuantizer, "update_weight_conversions"):
        return
    register_quantization_config(METHOD)(SparsePruneConfig)
    register_quantizer(METHOD)(SparsePruneQuantizer)
    OWN_FORMS["transformers.modeling_utils"] = in_our_form
    kind: Any = modeling_utils.PreTrainedModel
    kind.load_state_dict = _load_state_dict
    if (load := _reading_of(kind)) is not None:
        kind._load_pretrained_model = staticmethod(_decoding(load))
    guard_saving()


register()  # where this module was imported first, and brought the other library in
