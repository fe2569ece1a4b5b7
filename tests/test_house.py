"""The house keeps its floors: imports go downwards only, the core is the installed one, and importing stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparseprune
from sparseprune import _native

PACKAGE = Path(sparseprune.__file__).parent

# The first entry that is a prefix of a module's dotted name gives its floor.
FLOORS = {
    "_native": 0, "_registry": 0, "_config": 0, "_files": 0,
    "reference": 1, "native": 1, "triton": 1, "cuda": 1,
    "backends": 2, "layouts": 2,
    "ops": 3, "encodings": 3,
    "bench": 4,
    "nn": 5, "optim": 5,
    "pruning": 6,
    "gan": 7,
    "encoder": 8, "data": 8, "display": 8, "plots": 8, "checkpoint": 8, "report": 8, "evaluate": 8, "integrations": 8,
    "runner": 9, "doctor": 9,
    "cli": 10,
}  # fmt: skip


def floor_of(module: str) -> int | None:
    return FLOORS.get(module.split(".")[0]) if module else None


def imported(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Dotted names inside the package that this module imports, anywhere in its text."""
    parts = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("sparseprune.") for a in node.names if a.name.startswith("sparseprune.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = parts[: len(parts) - node.level + 1]
                base += node.module.split(".") if node.module else []
            elif node.module and node.module.split(".")[0] == "sparseprune":
                base = node.module.split(".")[1:]
            else:
                continue
            found |= {".".join([*base, a.name]) if not base else ".".join(base) for a in node.names}
    return found


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    is_package = module.endswith("__init__")
    module = module.removesuffix(".__init__")
    floor = floor_of(module)
    assert floor is not None, f"{module} has no floor: give it one in FLOORS"
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), module, is_package):
        below = floor_of(name)
        if below is not None:
            assert below <= floor, f"{module} (floor {floor}) imports {name} (floor {below})"


def test_the_walk_sees_an_upward_import():
    tree = ast.parse("from ..nn import SparseLinear\nimport sparseprune.gan\nfrom . import csr")
    assert imported(tree, "ops.linear", False) == {"nn", "gan", "ops"}


@pytest.mark.skipif(
    os.environ.get("SPARSEPRUNE_NATIVE") == "0", reason="installed without the compiled core on purpose"
)
def test_the_compiled_core_is_loaded_from_the_installed_package():
    assert _native.C is not None, _native.why_no_c()
    assert Path(_native.C.__file__).parent == PACKAGE


def test_import_is_light():
    code = (
        "import sys, sparseprune; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'triton', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent.anchor)


@pytest.mark.parametrize("name", sparseprune.__all__)
def test_every_public_name_exists(name):
    assert getattr(sparseprune, name) is not None
