"""What a language model is worth after pruning: its perplexity, and how fast it reads and writes.

Works on any causal language model of ``transformers`` (or one that returns ``.logits`` or a tensor), dense or
sparsified.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn.modes import evaluating
from .pruning.batches import device_of, logits_of
from .pruning.intake import positions_of, text_ids

__all__ = ["Perplexity", "Speed", "check_length", "perplexity", "speed_table", "token_windows", "tokens_per_second"]


@dataclass(frozen=True)
class Perplexity:
    """value = exp(loss); loss: mean cross-entropy in nats over `tokens` predicted tokens, in windows of `context`."""

    value: float
    loss: float
    tokens: int
    context: int
    windows: int

    def __str__(self) -> str:
        return f"perplexity {self.value:.2f} ({self.tokens:,} tokens in {self.windows} windows of {self.context})"


def token_windows(tokens: Tensor | Sequence[int], context: int, windows: int | None = None) -> Tensor:
    """tokens: ids `[T]`, or several texts `[N, T]`, read as one; returns `[W, context]`, non-overlapping, the rest
    dropped.

    windows: at most that many, spread evenly over the text. Raises ValueError on a text shorter than one window, and on
    what is no whole numbers `[T]`.
    """
    if context < 2:
        raise ValueError(f"token_windows: context expected at least 2, got {context}")
    if windows is not None and windows < 1:
        raise ValueError(f"token_windows: windows expected at least 1, or None for all, got {windows}")
    given = _ids("token_windows", tokens)
    if given.dim() > 2:
        raise ValueError(f"token_windows: tokens expected [T], the ids of one text, got {list(given.shape)}")
    _check_whole("token_windows", given)
    ids = given.to(torch.int64).flatten()
    count = ids.numel() // context
    if count == 0:
        raise ValueError(
            f"token_windows: {ids.numel()} tokens do not fill one window of {context}; give a longer text or a shorter "
            "context"
        )
    cut = ids[: count * context].view(count, context)
    if windows is not None and windows < count:
        cut = cut[torch.linspace(0, count - 1, windows).long()]
    return cut


@torch.no_grad()
def perplexity(
    model: nn.Module, tokens: Any, context: int = 512, *, batch_tokens: int = 2048, tokenizer: Any = None
) -> Perplexity:
    """tokens: ids `[T]`, cut into windows of context, or `[W, S]` taken as they are; with a ``tokenizer`` a text,
    several, or a data set with a column of text, read as one. Every window's first token is not predicted.

    batch_tokens: tokens in one forward pass. The model is put into eval mode and back. Raises ValueError on ids
    outside the model's vocabulary, on a text shorter than a window, on windows longer than the model has positions, and
    where the loss is not finite.
    """
    if tokenizer is not None:
        tokens = text_ids(tokens, tokenizer, "perplexity")
    given = _ids("perplexity", tokens)
    windows = given if given.dim() == 2 else token_windows(given, context)
    _check_whole("perplexity", windows)
    if windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"perplexity: tokens expected [W, S] with W >= 1 and S >= 2, got {list(windows.shape)}")
    _check_vocabulary("perplexity", model, windows)
    check_length("perplexity", model, windows.shape[1])
    device = device_of(model)
    total = 0.0
    with evaluating(model):
        for chunk in windows.split(max(1, batch_tokens // windows.shape[1])):
            ids = chunk.to(device, torch.int64)
            logits = logits_of(model(ids))[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    count = windows.shape[0] * (windows.shape[1] - 1)
    loss = total / count
    if not math.isfinite(loss):
        raise ValueError(f"perplexity: the loss is {loss}; the model returns NaN or infinite logits")
    return Perplexity(math.exp(min(loss, 700.0)), loss, count, windows.shape[1], windows.shape[0])


def _ids(what: str, tokens: Any) -> Tensor:
    """Ids as a tensor; ValueError on what holds none, and on texts of unlike length, which are no windows."""
    if isinstance(tokens, Tensor):
        return tokens
    first = tokens
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if isinstance(first, str | Mapping):
        remedy = "pass tokenizer=, or its input_ids" if isinstance(first, str) else "pass its input_ids"
        raise ValueError(f"{what}: tokens expected ids, got {type(first).__name__}; {remedy}")
    try:
        return torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what}: tokens expected ids [T], or [N, T] of texts of one length, got {type(tokens).__name__} "
            f"({error}); join the texts into one list of ids"
        ) from None


def _check_whole(what: str, ids: Tensor) -> None:
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool):
        raise ValueError(f"{what}: tokens expected whole numbers, the ids of a tokenizer, got {ids.dtype}")


def _check_vocabulary(what: str, model: nn.Module, ids: Tensor) -> None:
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise ValueError(
            f"{what}: token ids reach from {int(ids.min())} to {int(ids.max())} but the vocabulary has {rows} "
            "entries; tokenise with this model's own tokenizer"
        )


def check_length(what: str, model: nn.Module, tokens: int, new_tokens: int = 0) -> None:
    """ValueError where a model that looks positions up in a table has none for so many tokens and those it writes."""
    positions = positions_of(model)
    if positions is not None and tokens + new_tokens > positions:
        got = f"{tokens} tokens" + (f" and {new_tokens} new ones" if new_tokens else "")
        raise ValueError(f"{what}: expected at most {positions} tokens, the model's positions, got {got}; take fewer")


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model, medians over `repeats`, with the lowest and highest of each.

    prompt: reading prompt_tokens of each of ``sequences`` at once; generation: one token of each at a time after that
    prompt, with the key/value cache. The tokens of all sequences count.
    """

    prompt: float
    prompt_range: tuple[float, float]
    generation: float
    generation_range: tuple[float, float]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    sequences: int = 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and seconds for new_tokens greedy steps after it. A GPU is waited for at both ends of
    each. Of the prompt the last position's logits are asked for, as ``generate`` does, where the model can be asked.
    """
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    _wait(prompt.device)
    begin = time.perf_counter()
    output = model(prompt, use_cache=True, **last)
    token = output.logits[:, -1:].argmax(-1)
    _wait(token.device)
    middle = time.perf_counter()
    cache = getattr(output, "past_key_values", None)
    if cache is None:  # what follows would see one token
        raise ValueError(
            "tokens_per_second: models expected to return past_key_values, their key/value cache, got none in "
            f"{type(output).__name__} of {type(model).__name__}"
        )
    for _ in range(new_tokens):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = output.logits[:, -1:].argmax(-1)
    _wait(token.device)
    return middle - begin, time.perf_counter() - middle


def tokens_per_second(
    models: Mapping[str, nn.Module],
    prompt: Tensor | Sequence[int],
    *,
    new_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, Speed]:
    """models: name -> causal language model with a key/value cache, e.g. {"dense": ..., "sparse": ...}; prompt: ids
    `[P]`, or `[B, P]` of sequences that go together, whose tokens all count.

    The models take turns, so that a slow moment of the machine hits all of them; one untimed round comes first. Every
    model writes new_tokens tokens a sequence, whatever they are. ValueError on a prompt that is no ids of every model's
    vocabulary, and on a model that returns no cache.
    """
    if not models:
        raise ValueError("tokens_per_second: models expected at least one entry, got none")
    if new_tokens < 1 or repeats < 1:
        raise ValueError(f"tokens_per_second: new_tokens and repeats expected at least 1, got {new_tokens}, {repeats}")
    ids = _ids("tokens_per_second", prompt)
    _check_whole("tokens_per_second", ids)
    ids = ids.to(torch.int64)
    if ids.dim() not in (1, 2):
        raise ValueError(f"tokens_per_second: prompt expected ids [P] or [B, P], got shape {list(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError("tokens_per_second: the prompt is empty")
    ids = ids.reshape(-1, ids.shape[-1])
    for model in models.values():
        _check_vocabulary("tokens_per_second", model, ids)
        check_length("tokens_per_second", model, ids.shape[1], new_tokens)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for model in models.values():
            _once(model, ids.to(device_of(model)), min(2, new_tokens))
        for _ in range(repeats):
            for name, model in models.items():
                times[name].append(_once(model, ids.to(device_of(model)), new_tokens))
    found = {}
    for name, pairs in times.items():
        reading = [ids.numel() / seconds for seconds, _ in pairs]
        writing = [len(ids) * new_tokens / seconds for _, seconds in pairs]
        found[name] = Speed(
            statistics.median(reading),
            (min(reading), max(reading)),
            statistics.median(writing),
            (min(writing), max(writing)),
            ids.shape[1],
            new_tokens,
            repeats,
            torch.get_num_threads(),
            len(ids),
        )
    return found


def speed_table(speeds: Mapping[str, Speed]) -> str:
    """One line a model; the ratios are to the first one."""
    names = list(speeds)
    first = speeds[names[0]]
    width = max(5, *(len(name) for name in names))
    lines = [f"{'model':<{width}}  {'prompt tok/s':>24}  {'ratio':>6}  {'generation tok/s':>24}  {'ratio':>6}"]
    for name, s in speeds.items():
        prompt = f"{s.prompt:.1f} ({s.prompt_range[0]:.1f}-{s.prompt_range[1]:.1f})"
        generation = f"{s.generation:.1f} ({s.generation_range[0]:.1f}-{s.generation_range[1]:.1f})"
        lines.append(
            f"{name:<{width}}  {prompt:>24}  {s.prompt / first.prompt:6.2f}  {generation:>24}  "
            f"{s.generation / first.generation:6.2f}"
        )
    each = f"{first.sequences} sequences, each a prompt" if first.sequences > 1 else "prompt"
    lines.append(
        f"medians of {first.repeats} rounds, the models taking turns; {each} of {first.prompt_tokens} tokens, then "
        f"{first.new_tokens} one by one; {first.threads} threads; torch {torch.__version__}"
    )
    return "\n".join(lines)
