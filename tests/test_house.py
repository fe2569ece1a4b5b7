"""The house keeps its floors: imports go downwards only, the core is the installed one, and importing stays light."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseprune
from sparseprune import _native
from sparseprune.activations import ACTIVATION_CODES
from sparseprune.decoder_program import MOST_ROWS, RowStepKind
from sparseprune.encoder_program import COMBINE, StepKind
from sparseprune.nn.direct import is_transformed
from sparseprune.packing import Kind

PACKAGE = Path(sparseprune.__file__).parent

# The first entry that is a prefix of a module's dotted name gives its floor.
FLOORS = {
    "_companions": 0, "_native": 0, "_registry": 0, "_config": 0, "_digest": 0, "_files": 0, "_arguments": 0,
    "activations": 0, "packing": 0, "encoder_program": 0, "decoder_program": 0, "tensor_state": 0,
    "device_memory": 0,
    "reference": 1, "native": 1, "triton": 1, "cuda": 1,
    "backends": 2, "layouts": 2,
    "ops": 3, "encodings": 3,
    "bench": 4,
    "nn": 5, "optim": 5,
    "structured": 6,
    "pruning": 7,
    "training": 8,
    "gan": 9,
    "data": 10, "checkpoint": 10, "report": 10, "language": 10, "integrations": 10,
    "runner": 11, "doctor": 11,
    "cli": 12,
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


HEADER = Path(__file__).parent.parent / "csrc" / "cpu" / "kernels.h"


def codes(name: str) -> dict[str, int]:
    """The enum of this name in csrc/cpu/kernels.h, kGeluTanh as gelu_tanh."""
    found = re.search(rf"enum {name} : int {{([^}}]*)}}", HEADER.read_text(encoding="utf-8"))
    assert found, f"no enum {name} in {HEADER}"
    pairs = re.findall(r"k(\w+) = (\d+)", found[1])
    return {re.sub(r"(?<=.)([A-Z])", r"_\1", key).lower(): int(value) for key, value in pairs}


def test_python_and_the_kernels_use_the_same_codes():
    assert codes("Activation") == ACTIVATION_CODES
    assert codes("StepKind") == {kind.name.lower(): kind for kind in StepKind}
    assert codes("RowStepKind") == {f"row_{kind.name.lower()}": kind for kind in RowStepKind}
    assert codes("Combine") == {name: code for code, name in enumerate(COMBINE)}
    text = HEADER.read_text(encoding="utf-8")
    assert f"constexpr int kMostRows = {MOST_ROWS};" in text
    assert f"constexpr int kActivations = {len(ACTIVATION_CODES)};" in text
    kinds = ", ".join(f"k{kind.name.capitalize()} = {kind.value}" for kind in Kind)
    assert f"constexpr int {kinds};" in text


ROOT = Path(__file__).resolve().parents[1]


def missing(text: str) -> list[str]:
    """The files and folders that a text names in backticks, by the end of their path, and that are not there; <family>
    stands for any name.
    """
    folders = [ROOT / name for name in ("sparseprune", "csrc", "tests", "benchmarks", "docs", "examples")]
    there = ["/" + str(p.relative_to(ROOT)) for folder in folders for p in [folder, *folder.rglob("*")]]
    there += ["/" + p.name for p in ROOT.iterdir() if p.is_file()]
    named = set(re.findall(r"`([\w<*][\w./<>*-]*(?:/|\.(?:py|h|cpp|inl|cuh|cu|md|txt)))`", text))
    patterns = {name: "*/" + re.sub(r"<\w+>", "*", name).rstrip("/") for name in named}
    return sorted(name for name, pattern in patterns.items() if not fnmatch.filter(there, pattern))


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "csrc/README.md", "docs/kernels.md", "docs/research.md"])
def test_every_place_that_a_recipe_names_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    elsewhere = {"cuda_fp16.h"}
    assert set(missing(text)) <= elsewhere
    wrong = {"packing/nowhere.py", "cpu/nowhere_<kind>.inl"}
    assert set(missing(text + "".join(f"`{name}`" for name in wrong))) - elsewhere == wrong


def test_the_walk_sees_an_upward_import():
    tree = ast.parse("from ..nn import SparseLinear\nimport sparseprune.gan\nfrom . import csr")
    assert imported(tree, "ops.linear", False) == {"nn", "gan", "ops"}


def circle_among(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, in order, or none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(imports.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := walk(module, []))), [])


def needed(path: Path, module: str, is_package: bool) -> set[str]:
    """The modules that this one imports to run, wherever in its text: not what types alone ask for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    parts = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:  # a module, or what a module gives
                found.add(".".join([*base, alias.name]))
                found.add(".".join(base))
    return found - {module}


def test_no_import_goes_in_a_circle():
    known = {}
    for path in MODULES:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        known[module.removesuffix(".__init__")] = path
    imports = {}
    for module, path in known.items():
        found = needed(path, module, path.name == "__init__.py") & set(known)
        # "from .a import b" names package and module; a package is what its own modules are found through
        imports[module] = {m for m in found if not module.startswith(f"{m}.")}
    assert circle_among(imports) == []


def test_the_circle_is_seen():
    assert circle_among({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle_among({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# A module above this has its reason in its first comment or docstring.
LONGEST = 450


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_too_long_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST or f"longer than {LONGEST} lines because" in text[:2000]


@pytest.mark.skipif(
    os.environ.get("SPARSEPRUNE_NATIVE") == "0", reason="installed without the compiled core on purpose"
)
def test_the_compiled_core_is_loaded_from_the_installed_package():
    assert _native.C is not None, _native.why_no_c()
    assert Path(_native.C.__file__).parent == PACKAGE


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_a_child_process_imports_the_installed_package(path):
    """Without -P, ``-c`` and ``-m`` look in the working directory first, in the checkout without a compiled core."""
    assert not re.search(r'sys\.executable, "-(c|m", "sparseprune)', path.read_text())


def test_import_is_light():
    code = (
        "import sys, sparseprune; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'triton', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=PACKAGE.parent.anchor)


def test_layers_are_light_too():
    """Neither their import nor a model that is pruned, made sparse and run asks for the compiler or another library."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import sparseprune as sp, sparseprune.nn\n"
        "model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))\n"
        "sp.prune_(model, 0.9)\n"
        "sp.sparsify_(model.requires_grad_(False), layout='csr')\n"
        "model(torch.ones(2, 32))\n"
        "new = set(sys.modules) - before\n"
        "assert not new & {'torch._dynamo', 'torch._inductor', 'sympy', 'triton', 'transformers'}"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=PACKAGE.parent.anchor)


def test_the_compilers_mark_is_the_one_that_torch_sets():
    def marked():
        pass

    torch.compiler.assume_constant_result(marked)
    assert vars(is_transformed) == vars(marked) != {}


@pytest.mark.parametrize("name", sparseprune.__all__)
def test_every_public_name_exists(name):
    assert getattr(sparseprune, name) is not None
