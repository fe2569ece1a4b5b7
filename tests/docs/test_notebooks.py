"""The notebooks run from top to bottom, and are kept as they ran."""

from __future__ import annotations

import copy
import json
import runpy

import pytest
from pages import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
RUNNER = runpy.run_path(str(FOLDER / "run.py"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def pictures(notebook) -> list[int]:
    """How many pictures each cell shows."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [sum("data" in output for output in cell["outputs"]) for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_is_kept_as_it_ran(path):
    notebook = read(path)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(pictures(notebook)) >= 1 and notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    kept = read(path)
    ran = RUNNER["run_notebook"](copy.deepcopy(kept), path.name)
    assert pictures(ran) == pictures(kept)


def test_the_runner_keeps_what_cells_print_and_draw():
    from matplotlib import pyplot

    pyplot.figure()  # of someone else
    drawn = "from matplotlib import pyplot\npyplot.plot([0, 1])\nprint('a')\n1 + 1"
    cells = [{"cell_type": "code", "source": [line]} for line in ("b = 2", drawn, "b")]
    cells = RUNNER["run_notebook"]({"cells": cells}, "a notebook")["cells"]
    assert cells[0]["outputs"] == [] and cells[2]["outputs"][0]["text"] == ["2\n"]
    text, picture = cells[1]["outputs"]
    assert text["text"] == ["a\n", "2\n"] and picture["data"]["image/png"].startswith("iVBOR")
    with pytest.raises(ZeroDivisionError):
        RUNNER["run_notebook"]({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}, "a notebook")
