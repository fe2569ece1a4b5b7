"""What setup.py builds for which cards: asked with cards that are not here and an nvcc that only says what it knows."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
CUDA_12_4 = "sm_50 sm_52 sm_60 sm_61 sm_70 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a"


@pytest.fixture
def built(monkeypatch, tmp_path):
    """``built(cards, **environment)``: the extension that setup.py would build with CUDA 12.4, or None."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib64").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in CUDA_12_4.split()))
    nvcc.chmod(0o755)
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)

    def build(cards, **environment):
        for name in ("SPARSEPRUNE_CUDA", "SPARSEPRUNE_CUDA_ARCH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made = runpy.run_path(str(ROOT / "setup.py"))
        made["cuda_extension"].__globals__["cards"] = lambda: cards
        found = made["cuda_extension"]()
        return found[0] if found else None

    return build


@pytest.mark.parametrize(
    "cards, architectures",
    [
        ([(8, 0)], "80;80+PTX"),
        ([(9, 0), (8, 9), (9, 0)], "89;90;90+PTX"),
        ([(7, 5), (8, 6)], "86;86+PTX"),
        ([(12, 0)], "90+PTX"),  # newer than this nvcc knows
        ([(8, 9), (10, 0)], "89;90+PTX"),
    ],
)
def test_every_card_gets_code_or_what_its_driver_can_translate(built, cards, architectures):
    assert built(cards).architectures == architectures


def test_an_install_survives_a_card_that_is_too_old(built, capsys):
    assert built([(7, 5)]) is None
    assert "needs compute capability 8.0 or newer, got 7.5" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"SPARSEPRUNE_CUDA=1 but a card needs compute capability 8.0 .* got 7.5"):
        built([(7, 5)], SPARSEPRUNE_CUDA="1")


def test_an_install_survives_a_cuda_without_its_development_files(built, capsys, tmp_path):
    (tmp_path / "lib64" / "libcudart_static.a").unlink()
    assert built([(8, 0)]) is None
    assert "no libcudart_static.a" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no libcudart_static"):
        built([(8, 0)], SPARSEPRUNE_CUDA="1")


def test_what_is_asked_for_is_built(built):
    assert built([]) is None
    assert built([(8, 0)], SPARSEPRUNE_CUDA="0") is None
    assert built([], SPARSEPRUNE_CUDA="1").architectures == "80;90a;100a;120;90+PTX"
    assert built([(7, 5)], SPARSEPRUNE_CUDA_ARCH="90a").architectures == "90a"
    made = runpy.run_path(str(ROOT / "setup.py"))
    assert made["code_for"]("90a;90+PTX") == [
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="expected 80 or newer, which the kernels need, got 75"):
        made["code_for"]("80;75")
