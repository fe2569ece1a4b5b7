"""The examples run."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_article_learns_and_is_pruned_exactly(capsys):
    main = runpy.run_path(str(EXAMPLES / "article.py"))["main"]
    figures = main(retention=0.25, epochs=1)
    assert figures["pruned"]["density"] == 0.25
    assert figures["dense"]["accuracy"] > 0.25 and figures["pruned"]["accuracy"] > 0.25  # ten classes
    out = capsys.readouterr().out
    assert "Epoch 1  Loss" in out and "U 0.2500" in out and "Pruning is finished" in out
    assert figures == main(retention=0.25, epochs=1)
