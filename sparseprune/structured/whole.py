"""A model run as it is called, on inputs drawn at random, before and after a cut."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.modes import evaluating

__all__ = ["WholeModel"]

_TOKENS, _MORE_TOKENS, _IMAGES = 8, 64, (32, 64, 224)
_SAME, _SAME_16 = 1e-3, 0.1  # of an output's norm; a model in 16 bits rounds at every layer


class WholeModel:
    """What a model gives for random inputs, and what the Linears ``outputs`` give meanwhile: kept, to be compared with
    what they give later. ``reached``: those that were called; none where no inputs were found that it runs with.
    """

    def __init__(self, model: nn.Module, outputs: Iterable[str]) -> None:
        self._model, self._outputs = model, list(outputs)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
        for args, kwargs in _calls(model):
            try:
                self._before = self._run(args, kwargs)
                again = self._run(args, kwargs)
            except Exception:
                continue
            if not _unlike(self._before, again, _SAME):
                self._call = args, kwargs
                break
        self.reached = {name for name in self._outputs if self._call and self._before[name]}

    def differs(self, values: bool = True) -> str:
        """How the model differs from before; empty where it does not, or where it was not run. Values count or, where
        rounding may hide what they say, failures and shapes alone.
        """
        if self._call is None:
            return ""
        try:
            after = self._run(*self._call)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return _unlike(self._before, after, (_SAME if self.exact else _SAME_16) if values else float("inf"))

    @torch.no_grad()
    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        given: dict[str, list[Tensor]] = {name: [] for name in self._outputs}
        with ExitStack() as stack:
            stack.enter_context(_reproducibly(self._model))
            for module in self._model.modules():
                if type(module).forward is nn.Embedding.forward:
                    stack.callback(module.register_forward_pre_hook(_in_range).remove)
            for name in self._outputs:
                hook = lambda _, __, out, name=name: given[name].append(out.detach().clone())  # noqa: E731
                stack.callback(self._model.get_submodule(name).register_forward_hook(hook).remove)
            given[""] = list(_tensors(self._model(*args, **kwargs)))
        return given


def _in_range(module: Any, args: tuple[Any, ...]) -> None:
    """On a GPU an index out of range ends the process's use of it, not only the call."""
    ids, most = args[0] if args else None, module.num_embeddings
    if isinstance(ids, Tensor) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < most:
        raise IndexError(f"expected indices from 0 to {most - 1}, got {int(ids.min())} to {int(ids.max())}")


@contextmanager
def _reproducibly(model: nn.Module) -> Iterator[None]:
    """No dropout, and the random numbers of whoever calls are untouched; those drawn inside are always the same."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, tuple | list):
        for value in out:
            yield from _tensors(value)


def _unlike(before: Mapping[str, list[Tensor]], after: Mapping[str, list[Tensor]], most: float) -> str:
    for name, tensors in before.items():
        what = f"output of {name}" if name else "output of the model"
        if len(after[name]) != len(tensors):
            return f"an {what} in {len(after[name])} tensors, not {len(tensors)}"
        for a, b in zip(tensors, after[name]):
            if a.shape != b.shape:
                if not name and a.dim() > 3:  # attention weights, of all heads
                    continue
                return f"an {what} of {list(b.shape)}, not {list(a.shape)}"
            if not torch.equal(a.isnan(), b.isnan()):
                return f"an {what} that is not a number elsewhere"
            if not a.numel():
                continue
            a, b = (t.to("cpu", torch.float64).nan_to_num(0, 0, 0) for t in (a, b))
            error = float((a - b).norm() / a.norm().clamp(min=1e-30))
            if error > most and float((a - b).abs().max()) > 1e-12:
                return f"an {what} that differs by {error:.2g} of its size"
    return ""


def _calls(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model may be called with, the likeliest first."""
    first = next(model.parameters(), None)
    if first is None or first.is_meta:
        return
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(first)

    parameters = inspect.signature(model.forward).parameters
    given = {"use_cache": False} if "use_cache" in parameters else {}
    config = getattr(model, "config", None)
    if config is not None:
        for rows, tokens in ((2, _TOKENS), (1, _TOKENS), (2, _MORE_TOKENS)):
            named = _named(model, config, parameters, (rows, tokens), drawn)
            across = {k: v for k, v in named.items() if k != "encoder_hidden_states"}
            for some in (named, across, *({name: across[name]} for name in across)):
                if some:
                    yield (), {**given, **some}
        dummies = getattr(model, "dummy_inputs", None)
        if isinstance(dummies, Mapping):
            moved = {k: v.to(first.device) if isinstance(v, Tensor) else v for k, v in dummies.items()}
            yield (), {**given, **{k: v for k, v in moved.items() if k in parameters}}
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = sum(p.default is p.empty for p in positional)
    for x in _plain(model, drawn):
        yield (x,) * max(1, wanted), given
        if wanted > 1:  # a mask, say
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            yield (x, *[mask] * (wanted - 1)), given


def _ids(most: int, rows: int, tokens: int = _TOKENS, end: Any = None) -> Tensor:
    """Ids without the first few, which stand for padding and the like; the last one of a row ends it."""
    low = 3 if most > _TOKENS else 0
    ids = torch.randint(low, most, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    if isinstance(end, int) and low <= end < most:
        ids[ids == end] = low if end != low else low + 1
    if isinstance(end, int) and 0 <= end < most:
        ids[:, -1] = end
    return ids


def _named(model: nn.Module, config: Any, names: Iterable[str], ids: tuple[int, int], drawn: Any) -> dict[str, Tensor]:
    """The inputs of transformers' models that the forward takes, with sizes from their configuration."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]

    def size(*keys: str, default: Any = None) -> Any:
        found = (getattr(part, key, None) for key in keys for part in parts)
        return next((value for value in found if value is not None and not isinstance(value, bool)), default)

    rows, device = ids[0], next(model.parameters()).device
    vocabularies = [getattr(p, k, None) for p in parts for k in ("vocab_size", "tgt_vocab_size", "decoder_vocab_size")]
    most = min((v for v in vocabularies if isinstance(v, int) and v > 1), default=2)
    side = size("image_size", default=224)
    height, width = side[-2:] if isinstance(side, tuple | list) else (side, side)
    bins, frames = size("num_mel_bins", "feature_size", default=80), size("max_source_positions", default=_TOKENS)
    made = {
        "input_ids": lambda: _ids(most, *ids, size("eos_token_id")).to(device),
        "decoder_input_ids": lambda: _ids(most, *ids, size("eos_token_id")).flip(0).to(device),
        "pixel_values": lambda: drawn(rows, size("num_channels", "in_chans", default=3), height, width),
        "input_values": lambda: drawn(rows, 2000),
        "input_features": lambda: drawn(rows, bins, 2 * frames),
        "encoder_hidden_states": lambda: drawn(
            rows, 5, size("cross_attention_hidden_size", "encoder_hidden_size", "hidden_size", "d_model", default=1)
        ),
    }
    found = {name: make() for name, make in made.items() if name in names}
    if "decoder_input_ids" in found and not getattr(config, "is_encoder_decoder", False):
        del found["decoder_input_ids"]
    if "encoder_hidden_states" in found and "encoder_outputs" in names:
        del found["encoder_hidden_states"]
    return found


def _plain(model: nn.Module, drawn: Any) -> Iterator[Tensor]:
    """Inputs for the first layers of a model of whatever kind."""
    kinds = (nn.Embedding, nn.Linear, nn.Conv1d, nn.Conv2d)
    found = [next((m for m in model.modules() if isinstance(m, kind)), None) for kind in kinds]
    least = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)
    for module in found:
        if isinstance(module, nn.Embedding):
            for most in (module.num_embeddings, least):
                yield _ids(most, 2).to(module.weight.device)
        elif isinstance(module, nn.Linear):
            yield drawn(2, _TOKENS, module.in_features)
            yield drawn(2, module.in_features)
        elif isinstance(module, nn.Conv1d):
            yield drawn(2, module.in_channels, 400)
        elif isinstance(module, nn.Conv2d):
            for side in _sides(model):
                yield drawn(2, module.in_channels, *side)


def _sides(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Sizes of images: what the model or its patches name (timm's do), then usual ones."""
    named = getattr(model, "default_cfg", None)
    sizes = [named.get("input_size")] if isinstance(named, Mapping) else []
    for module in (model, getattr(model, "patch_embed", None)):
        sizes += [getattr(module, key, None) for key in ("img_size", "image_size")]
    for size in (*sizes, *_IMAGES):
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, tuple | list) and len(size) > 1:
            yield int(size[-2]), int(size[-1])
