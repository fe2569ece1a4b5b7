"""A dense language model in other runtimes: torch's own bfloat16 and int8, and llama.cpp's quantised files.

Each is called as a causal language model of ``transformers`` is, so that one loop judges and times all of them.
llama.cpp is optional (``pip install --no-deps llama-cpp-python diskcache jinja2 markupsafe``, which builds it with
cmake for this CPU).
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseprune._files import replacing

__all__ = ["LLAMA_TYPES", "LlamaCpp", "llama_file", "torch_bfloat16", "torch_int8", "why_no_llama"]


#: llama.cpp's names of what a file may be rounded to -> (its constant, bits a weight with their scales).
LLAMA_TYPES = {"Q8_0": ("LLAMA_FTYPE_MOSTLY_Q8_0", 8.5), "Q4_0": ("LLAMA_FTYPE_MOSTLY_Q4_0", 4.5)}


def torch_bfloat16(dense: nn.Module) -> nn.Module:
    return copy.deepcopy(dense).to(torch.bfloat16)


def torch_int8(dense: nn.Module) -> nn.Module:
    """torch's dynamic int8 of every Linear, the head too."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear})


def llama_file(source: Path, kind: str, folder: Path) -> Path:
    """``source``, a GGUF file, as ``kind`` of LLAMA_TYPES, kept in ``folder``."""
    import llama_cpp

    if not _KEPT:
        _quiet(llama_cpp)
    target = folder / f"{source.stem}-{kind}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype = getattr(llama_cpp, LLAMA_TYPES[kind][0])
        how.allow_requantize = True
        with replacing(target) as unfinished:
            failed = llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(how))
            if failed:
                raise RuntimeError(f"llama.cpp did not quantise {source} to {kind}: error {failed}")
    return target


@dataclass(frozen=True)
class Answer:
    """What a call returns: logits `[1, T or 1, V]` float32, and the model, which keeps its cache itself."""

    logits: Tensor
    past_key_values: LlamaCpp


def _quiet(lib: Any) -> None:
    """llama.cpp tells every tensor on stderr; only errors are let through."""

    @lib.llama_log_callback
    def say(level: int, text: bytes, _: Any) -> None:
        if level == 4:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    lib.llama_log_set(say, None)
    _KEPT.append(say)


_KEPT: list[Any] = []  # a callback that C holds


class LlamaCpp(nn.Module):
    """A GGUF file in llama.cpp on torch's number of threads. Takes one sequence of up to ``room`` tokens, ids `[1, T]`;
    a call without past_key_values starts a new one. Without ``use_cache`` several sequences `[N, T]` each start anew.
    """

    def __init__(self, path: Path, room: int = 1024) -> None:
        super().__init__()
        import llama_cpp

        self._lib = lib = llama_cpp
        if not _KEPT:
            _quiet(lib)
        lib.llama_backend_init()
        how = lib.llama_model_default_params()
        how.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(path).encode(), how)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not read {path}")
        run = lib.llama_context_default_params()
        run.n_ctx = run.n_batch = run.n_ubatch = room
        run.n_threads = run.n_threads_batch = torch.get_num_threads()
        self._context = lib.llama_init_from_model(self._model, run)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(room, 0, 1)
        self._room, self._past = room, 0

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, logits_to_keep: int = 0
    ) -> Answer:
        if len(input_ids) > 1:
            if past_key_values is not None or use_cache:
                raise ValueError(f"llama.cpp holds one sequence here, got {len(input_ids)}")
            return Answer(torch.cat([self(row[None]).logits for row in input_ids]), self)
        lib, batch, ids = self._lib, self._batch, input_ids[0].tolist()
        if past_key_values is None:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
            self._past = 0
        if self._past + len(ids) > self._room:
            raise ValueError(f"llama.cpp was given room for {self._room} tokens, got {self._past + len(ids)}")
        kept = logits_to_keep or len(ids)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self._past + i, 1, 0
            batch.logits[i] = i >= len(ids) - kept
        failed = lib.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama.cpp did not take {len(ids)} tokens after {self._past}: error {failed}")
        self._past += len(ids)
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, i), (self._vocabulary,)).copy()
            for i in range(len(ids) - kept, len(ids))
        ]
        return Answer(torch.from_numpy(np.stack(rows))[None], self)


def why_no_llama() -> str | None:
    return None if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed"
