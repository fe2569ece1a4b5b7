"""The setting in which CI runs the tests once more: that it is hostile, and that its allocator moves what it should."""

from __future__ import annotations

import locale
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
HOSTILE = os.environ.get("SPARSEPRUNE_TEST_HOSTILE") == "1"  # set by .ci/run beside what it claims

PROGRAM = """
import collections, copy, torch
begins = collections.Counter(torch.empty(n + 1).data_ptr() % 64 for n in range(300))
x, weight = torch.randn(65, 127), torch.randn(33, 127)
near = (x @ weight.T - (x.double() @ weight.T.double())).abs().max() < 1e-3
grown = torch.empty(3)
grown.resize_(100_000).fill_(2)
text = "".join(chr(ord(c)) for c in "heap") * 1000
model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
loss = model(torch.randn(2, 9, 64)).square().mean()
loss.backward()
del x, weight, model
print(sorted(begins), bool(near), float(grown.sum()), len(text), bool(loss.isfinite()))
"""


@pytest.mark.parametrize(("moved", "begins"), [(None, [16, 32, 48]), ("32", [32])])
def test_the_allocator_moves_tensors_and_nothing_breaks(tmp_path, need_tool, moved, begins):
    shim = tmp_path / "odd_malloc.so"
    command = [need_tool("cc"), "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(shim)]
    subprocess.run([*command, str(HERE / "odd_malloc.c")], check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    environment.pop("ODD_MALLOC", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], env={**environment, **({"ODD_MALLOC": moved} if moved else {})},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == f"{begins} True 200000.0 4000 True"


@pytest.mark.skipif(not HOSTILE, reason="asks for the setting that .ci/run makes")
def test_the_setting_is_hostile():
    from sparseprune import _native

    assert all(torch.empty(n + 1).data_ptr() % 64 for n in range(9))
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    assert _native.require_c().tier() == "generic"
    assert torch.get_num_threads() == 1
    assert locale.setlocale(locale.LC_ALL) == "C" or os.environ["LC_ALL"] == "C"
    assert time.timezone % 3600  # no whole hours from UTC
