"""The pages of README and docs/, and the programs on them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Every page that a reader may open; docs/generated is made of the notebooks.
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")),
        *(page for page in (ROOT / "docs").rglob("*.md") if "generated" not in page.parts),
    )
)
_BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.M | re.S)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The blocks in this language, in order."""
    return [body for _, name, body in _BLOCK.findall(text(page)) if name == language]


def program(page: str) -> str:
    """All Python of a page in one, each line where it stands on the page, so that a traceback points at it."""
    lines = [""] * (text(page).count("\n") + 1)
    for found in _BLOCK.finditer(text(page)):
        if found[2] == "python":
            first = text(page).count("\n", 0, found.start(3))
            body = found[3].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines)
