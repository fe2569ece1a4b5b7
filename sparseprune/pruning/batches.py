"""A batch, whatever its form: what a model is called with, where its input is real, and its targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .rows import IGNORED

__all__ = [
    "LABELS",
    "TARGETS",
    "Batch",
    "LabelledBatch",
    "as_tensors",
    "check_no_mask",
    "check_no_text",
    "device_of",
    "inputs_of",
    "logits_of",
    "makes_inputs_of_labels",
    "moved",
    "real_rows_of",
    "split_batch",
    "token_embedding",
    "unlabelled",
]

#: Keys that are targets. They never reach a model: a loss inside its forward pass would only cost time.
TARGETS = ("labels", "label", "label_ids", "start_positions", "end_positions")
#: Those of them that hold the label of a row or of its tokens.
LABELS = ("labels", "label", "label_ids")
#: Keys of which a decoder reads one, beside what its encoder reads.
_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
#: Models that write a text for another, by the names of their class or bases.
_GENERATES = ("ForConditionalGeneration", "ForTextToText", "ForSpeechToText")


@dataclass(frozen=True)
class Batch:
    """``inputs``: a tensor, a tuple or list of positional arguments, or a mapping of keywords."""

    inputs: Any

    @property
    def args(self) -> tuple[Any, ...]:
        if isinstance(self.inputs, Mapping):
            return ()
        return tuple(self.inputs) if isinstance(self.inputs, tuple | list) else (self.inputs,)

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {}

    def call(self, model: nn.Module) -> Any:
        """What the model returns."""
        return model(*self.args, **self.kwargs)

    def run(self, model: nn.Module) -> Tensor:
        """The model's output tensor, or its ``.logits``."""
        return logits_of(self.call(model))

    @property
    def mask(self) -> Tensor | None:
        """bool `[B, T]`, True = real token, where the batch says so."""
        found = self.inputs.get("attention_mask") if isinstance(self.inputs, Mapping) else None
        return None if found is None else found.bool()

    @cached_property
    def positions(self) -> Tensor | None:
        """The mask where it is `[B, T]` and leaves anything out, else None: all of the input is real."""
        mask = self.inputs.get("attention_mask") if isinstance(self.inputs, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.bool().all()):
            return None
        return mask.bool()

    @property
    def first_float(self) -> Tensor | None:
        """The first floating-point input tensor: the condition of models without an embedding."""
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else self.inputs
        candidates = [values] if isinstance(values, Tensor) else list(values)
        return next((v for v in candidates if isinstance(v, Tensor) and v.is_floating_point()), None)

    def to(self, device: torch.device) -> Batch:
        """The same on a device; what is there already is not copied."""
        return Batch(moved(self.inputs, lambda value: value.to(device)))


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """A batch with its targets."""

    targets: Tensor

    @property
    def output_mask(self) -> Tensor | None:
        """:attr:`mask` of the places of the outputs: those of the decoder, where one reads inputs of its own."""
        if not isinstance(self.inputs, Mapping) or not any(name in self.inputs for name in _OF_DECODER):
            return self.mask
        found = self.inputs.get("decoder_attention_mask")
        return None if found is None else found.bool()


def as_tensors(value: Any) -> Any:
    """The value with a tensor for each array of numbers in its lists and mappings: float32 for float64, which is what
    numpy makes of numbers by itself.
    """
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        own = numpy.require(value, value.dtype.newbyteorder("="), ["C", "W"])  # as torch takes them
        made = torch.as_tensor(own)
        return made.float() if made.dtype == torch.float64 else made
    if isinstance(value, Mapping):
        return {key: as_tensors(item) for key, item in value.items()}
    if type(value) in (tuple, list) and any(isinstance(part, numpy.ndarray | Mapping | tuple | list) for part in value):
        return type(value)(as_tensors(part) for part in value)
    return value


def split_batch(batch: Any, device: torch.device, model: nn.Module | None = None) -> LabelledBatch:
    """The batch in memory of its own, arrays as tensors; for a ``model`` of transformers with encoder and decoder with
    what its decoder is to read before each label. TypeError on anything but ``(inputs, targets)`` or a mapping with
    ``labels`` (or ``label``), and on text; ValueError where the decoder's inputs are not in it and the model does not
    make them.
    """
    found = _split(batch, device)
    if model is None:
        return found
    return replace(found, inputs=_with_decoder_inputs(found.inputs, found.targets, model))


def _split(batch: Any, device: torch.device) -> LabelledBatch:

    def own(value: Tensor) -> Tensor:
        # A copy: a BLAS may round by where a tensor begins, which must not hang on what the loader cut it from, and
        # what a checkpoint holds of a view is the whole of that.
        return value.to(device, non_blocking=True, copy=True)

    batch = as_tensors(batch)
    if isinstance(batch, Mapping):
        key = [name for name in LABELS if name in batch]
        if len(key) != 1:
            raise TypeError(f"a batch that is a dict expected one key 'labels' or 'label', got {sorted(batch)}")
        inputs = {name: moved(value, own) for name, value in batch.items() if name != key[0]}
        check_no_text(inputs)
        return LabelledBatch(inputs, _labels(batch[key[0]], own))
    if isinstance(batch, tuple | list) and len(batch) == 2:
        check_no_text(batch[0])
        return LabelledBatch(moved(batch[0], own), _labels(batch[1], own))
    raise TypeError(f"a batch expected (inputs, targets) or a dict with 'labels', got {type(batch).__name__}")


def makes_inputs_of_labels(model: nn.Module) -> bool:
    """Whether this is a model of transformers whose forward makes its decoder's inputs of labels."""
    model = _uncompiled(model)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    generates = any(kind.__name__.endswith(_GENERATES) for kind in type(model).__mro__)
    return generates or hasattr(model, "prepare_decoder_input_ids_from_labels")


def _with_decoder_inputs(inputs: Any, targets: Any, model: nn.Module) -> Any:
    """``inputs`` with what the decoder is to read before each label. Labels never reach the model, which would make its
    decoder's inputs of them.
    """
    if targets is None or not makes_inputs_of_labels(model):
        return inputs
    model = _uncompiled(model)
    make: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    named = isinstance(inputs, Mapping)
    if named and any(inputs.get(name) is not None for name in _OF_DECODER):
        return inputs
    of_labels = isinstance(targets, Tensor) and not targets.is_floating_point()
    if make is None or not named or not of_labels:
        got = ", ".join(inputs) if named else type(inputs).__name__
        if make is not None:
            labels = "" if of_labels else f" and labels that are {type(targets).__name__} and no tensor of token ids"
            got += f"{labels}; give a dict such as {{'input_ids': ..., 'labels': ...}}"
        raise ValueError(
            f"a batch for {type(model).__name__} expected a dict with decoder_input_ids, the labels moved on by one "
            f"place, got {got}; its forward makes them of labels alone, which never reach it here"
        )
    return {**inputs, "decoder_input_ids": make(labels=targets)}


def _uncompiled(model: nn.Module) -> nn.Module:
    return model._modules.get("_orig_mod") or model


def unlabelled(batch: Any, who: str, model: nn.Module) -> Any:
    """What the model is called with for a batch of a dict (keywords, targets left out), ``(inputs, targets)`` or a
    tensor; where its forward would make its decoder's inputs of the labels, with those, and a mask of the padding that
    ends rows of labels.
    """
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    targets = as_tensors(batch[1]) if pair else None
    batch = inputs_of(batch, who)
    if isinstance(batch, Mapping):
        targets = next((batch[key] for key in LABELS if key in batch), targets)
        batch = {key: value for key, value in batch.items() if key not in TARGETS}
    made = _with_decoder_inputs(batch, targets, model)
    if made is batch or targets is None or made.get("decoder_attention_mask") is not None:
        return made
    real: Tensor = targets.ne(IGNORED)
    ends = real.dim() == 2 and not bool(real.all()) and bool((real[:, 1:] <= real[:, :-1]).all())
    return {**made, "decoder_attention_mask": real.long()} if ends else made  # what is real reads nothing behind it


def inputs_of(batch: Any, who: str) -> Any:
    """``inputs`` of a batch ``(inputs, targets)`` or ``(inputs,)``, any other as it is; arrays as tensors. ValueError
    on more entries, and on a mask in the place of the targets: neither would reach the model.
    """
    batch = as_tensors(batch)
    if not isinstance(batch, tuple | list) or not batch:
        return batch
    if len(batch) > 2 and isinstance(batch[0], Tensor | Mapping):
        raise ValueError(
            f"{who}: a batch expected a tensor, a dict of tensors or (inputs, targets), got {len(batch)} entries; "
            f"{_AS_DICT}"
        )
    check_no_mask(batch, who)
    return batch[0]


_AS_DICT = 'of token ids and their mask pass dicts, {"input_ids": ids, "attention_mask": mask}'


def check_no_mask(parts: tuple[Any, ...] | list[Any], who: str) -> None:
    """ValueError where a part after the first, of token ids, can only be their mask: as large, of zeros and ones."""
    ids, *rest = parts
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        return
    for part in rest:
        whole = isinstance(part, Tensor) and not part.is_floating_point() and not part.is_complex()
        if whole and part.shape == ids.shape and part.numel() and bool(((part == 0) | (part == 1)).all()):
            raise ValueError(
                f"{who}: beside token ids expected targets, got zeros and ones {list(part.shape)}, as an attention "
                f"mask has, which would not reach the model; {_AS_DICT}"
            )


def _labels(value: Any, own: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"labels of a batch expected a tensor, got {type(value).__name__}; torch.tensor makes one")
    return own(value if value.is_floating_point() or value.is_complex() else value.long())


def check_no_text(inputs: Any) -> None:
    """TypeError where what a model is to be called with is text."""
    parts = inputs.items() if isinstance(inputs, Mapping) else [("the inputs", inputs)]
    for name, value in parts:
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, str):
            raise TypeError(f"a batch expected tensors, got text in {name}; pass tokenizer=, or tokenise it first")


def logits_of(out: Any) -> Tensor:
    """A model's output where it is a tensor, else its ``.logits``; TypeError on anything else."""
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model's output expected a tensor or an object with .logits, got {type(out).__name__}")
    return logits


def token_embedding(model: nn.Module) -> nn.Embedding | None:
    """The model's embedding of token ids, where it names one (``get_input_embeddings``)."""
    get = getattr(model, "get_input_embeddings", None)
    if not callable(get):
        return None
    try:
        found = get()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Embedding) else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU where it has none."""
    found = next((t for t in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if found is None else found.device


def real_rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """x: `[B, T, K]` or, as some models flatten it, `[B * T, K]`, with mask `[B, T]`: the real positions `[M, K]`; any
    other shape: all rows `[M, K]`.
    """
    if mask is not None and x.dim() > 2 and x.shape[:-1] == mask.shape:
        return x[mask]
    if mask is not None and mask.dim() == 2 and x.dim() == 2 and len(x) == mask.numel():
        return x[mask.reshape(-1)]
    return x.reshape(-1, x.shape[-1])


def moved(value: Any, move: Any) -> Any:
    """The value with ``move`` of each tensor in its lists and mappings."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Mapping):
        return {key: moved(item, move) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(item, move) for item in value)
    return value
