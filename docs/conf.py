"""The site: ``sphinx-build -W docs build/site``, after ``pip install -c constraints.txt ".[docs]"``.

The notebooks of examples/notebooks become pages with what they printed and drew, in docs/generated/.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import sparseprune

DOCS = Path(__file__).resolve().parent

project = "sparseprune"
author = copyright = "The sparseprune developers"
release = version = sparseprune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write shapes as `[N, K]`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "exclude-members": "train, extra_repr"}
python_maximum_signature_line_length = 80

highlight_language = "text"
html_theme = "furo"
html_title = f"sparseprune {release}"
html_static_path = ["styles"]
html_css_files = ["site.css"]
html_copy_source = False
templates_path: list[str] = []
exclude_patterns = ["styles"]


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """(the notebook as Markdown, name -> picture): code, what it printed and what it drew, cell by cell."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            drawn = output.get("data", {}).get("image/png")
            if drawn is None:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
                continue
            name = f"{path.stem}-{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode("".join(drawn))
            parts.append(f"![picture {len(pictures)} of this notebook]({name})")
    parts.append(f"*This page is `examples/notebooks/{path.name}`, run from top to bottom.*")
    return "\n\n".join(parts) + "\n", pictures


def write_notebook_pages(app: object) -> None:
    folder = DOCS / "generated"
    folder.mkdir(exist_ok=True)
    for path in sorted((DOCS.parent / "examples" / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        for name, content in {f"{path.stem}.md": text.encode(), **pictures}.items():
            place = folder / name
            if not place.is_file() or place.read_bytes() != content:  # an unchanged page is not built again
                place.write_bytes(content)


def setup(app: object) -> None:
    app.connect("builder-inited", write_notebook_pages)  # type: ignore[attr-defined]
