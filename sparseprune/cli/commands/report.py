"""``sparseprune report``."""

from __future__ import annotations

import argparse
import json

from ..._arguments import path_of

ABOUT = "Show what a run or a checkpoint holds: tables, how each layer runs and why; or density and bytes per layer."
EXAMPLE = "sparseprune report runs/demo"
PLACE = 4


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=path_of, help="a run's folder, its run.json, or a .safetensors file")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    path = arguments.path
    if path.is_dir():
        path = path / "run.json"
        if not path.exists():
            state = "a run that is not finished" if (arguments.path / "settings.json").exists() else "no run.json"
            raise FileNotFoundError(f"{arguments.path}: expected the folder of a finished run, got one with {state}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a run's folder, its run.json or a .safetensors file")
    if path.suffix == ".safetensors":
        from ...checkpoint import describe

        found = describe(path)
        print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
        return 0
    from ...runner import check_record, language, layouts_of, summary

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the run.json of a run, got no JSON: {error}") from None
    if isinstance(record, dict) and record.get("kind") == "article":
        from ...runner.article import article_table

        print(json.dumps(record, indent=2) if arguments.json else article_table(record))
        return 0
    if isinstance(record, dict) and record.get("kind") == language.KIND:
        language.check_record(record, path)
        print(json.dumps(record, indent=2) if arguments.json else language.summary(record))
        return 0
    check_record(record, str(path))
    layouts = layouts_of(record)
    print(json.dumps(record, indent=2) if arguments.json else summary(record))
    if layouts is not None and not arguments.json:
        print(f"\n{layouts}")
    if record.get("robustness") and not arguments.json:
        from ...runner.robustness import robustness_table

        print(f"\n{robustness_table(record['robustness'])}")
    return 0
