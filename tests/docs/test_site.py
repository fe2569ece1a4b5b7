"""The site builds without a warning, and a warning fails the build."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from pages import ROOT


def build(docs, site) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(docs), str(site)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package)
    sources = (f"sparseprune/{floor}" for floor in ("reference", "ops", "native"))  # shown on pages
    for name in ("docs", "examples/notebooks", "csrc", "benchmarks/results", *sources):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("generated", "__pycache__"))
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path)
    built = build(tmp_path / "docs", tmp_path / "site")
    assert built.returncode == 0, built.stderr[-4000:]
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "api/prune.html", "generated/classifier.html", "contributing.html"} <= pages
    reference = (tmp_path / "site" / "api" / "prune.html").read_text(encoding="utf-8")
    assert 'id="sparseprune.prune_"' in reference and "Zeroes weights of the model" in reference

    page = tmp_path / "docs" / "quickstart.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[nowhere](nowhere.md)\n", encoding="utf-8")
    assert "nowhere" in build(tmp_path / "docs", tmp_path / "site").stderr
