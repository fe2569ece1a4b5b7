"""Runs notebooks from top to bottom and keeps what their cells print and draw, without Jupyter.

python examples/notebooks/run.py examples/notebooks/*.ipynb
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run_cell(source: str, names: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The outputs of a cell: what it prints, with the value of a last expression, and the figures left open."""
    from matplotlib import pyplot

    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
            if value is not None:
                print(repr(value))
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, dpi=100, bbox_inches="tight", format="png")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    return outputs


def run_notebook(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """The notebook with its outputs made anew; an exception in a cell is the caller's."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    pyplot.close("all")  # figures of whoever called belong to no cell
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["outputs"] = run_cell("".join(cell["source"]), names, f"{name}, cell {count}")
            cell["execution_count"] = count
    return notebook


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        notebook = run_notebook(json.loads(path.read_text(encoding="utf-8")), path.name)
        unfinished = path.with_name(path.name + ".partial")
        unfinished.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
        print(f"{path}: {sum(cell['cell_type'] == 'code' for cell in notebook['cells'])} cells")


if __name__ == "__main__":
    main(sys.argv[1:])
