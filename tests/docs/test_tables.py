"""Measured tables on pages are those of the result files, and plots speak to a reader who knows no code name."""

from __future__ import annotations

import pytest
from pages import ROOT, text

pytestmark = pytest.mark.usefixtures("benchmarks")

PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs" / "lab").glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table:" in text(page)])
def test_the_tables_of_a_page_are_those_of_the_result_files(page):
    from benchmarks.render import render

    content = text(page)
    assert render(content) == content, "python -m benchmarks.render puts the tables in"
    before, mark, after = content.partition(" -->\n")
    assert render(f"{before}{mark}| wrong |\n{after}") == content


def test_a_page_without_a_table_stays():
    from benchmarks.render import render

    assert render("# A page\n\nno table\n") == "# A page\n\nno table\n"
    with pytest.raises((OSError, ValueError)):
        render("<!-- table: nothing whole 2 avx512 -->\n<!-- end -->\n")


def test_plots_say_arms_and_contestants_in_words():
    from benchmarks.ablation import ARMS, spoken
    from sparseprune.bench import plots

    assert spoken("gmp_kd+low_rank") == "magnitude + low-rank term"
    assert not [arm for arm in ARMS if "_" in spoken(arm) or "gmp" in spoken(arm)]
    assert plots.spoken("ours bsr 16x1") == "ours, 16x1 blocks" and plots.spoken("ours csr") == "ours, single weights"
    assert plots.spoken("program, 4x4") == "ours, one call, 4x4 blocks" and plots.spoken("ours nm 2:4") == "ours, 2:4"


def test_names_in_a_picture_of_trade_offs_cover_neither_points_nor_each_other(tmp_path, monkeypatch):
    from sparseprune.bench import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    makers = ("ours", "torch", "openvino") * 3
    found = {f"{maker} number {i}": (10 + i % 3, 27 + i // 3 / 40) for i, maker in enumerate(makers)}
    plots.trade_off({"ms": found, "MB": found}, tmp_path / "a.svg", "accuracy")
    drawn[0].canvas.draw()
    for axis in drawn[0].axes:
        assert sorted(text.get_text() for text in axis.texts) == sorted(found)
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        points = [axis.transData.transform(point) for point in found.values()]
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_bars_start_at_zero(tmp_path, monkeypatch):
    from sparseprune.bench import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    times = {"torch dense": (20.0, 1.0), "program, 16x1": (4.0, 5.0)}
    plots.bars({"a batch": times, "a sentence": times}, tmp_path / "bars.png")
    for axis in drawn[0].axes:
        assert axis.get_xlim()[0] == 0 and [bar.get_width() for bar in axis.patches] == [20.0, 4.0]
        assert [label.get_text() for label in axis.texts] == ["20 ms", "4 ms, 5.0 times"]


def test_the_page_of_commands_names_all_of_them_and_no_other():
    from sparseprune.cli import commands

    named = {path.stem for path in (ROOT / "sparseprune" / "cli" / "commands").glob("[a-z]*.py")}
    rows = [line for line in text("docs/commands.md").splitlines() if line.startswith("| `") and "sparseprune " in line]
    assert {row.split("`")[1].split()[0] for row in rows} == named and commands.__doc__
