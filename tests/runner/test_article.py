"""The article's programme: its schedule, its factors in use, its record and its lines."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sparseprune.cli import main
from sparseprune.data.hashing import RowLoader, hashed_rows
from sparseprune.pruning.factors import Factors
from sparseprune.runner.article import article_schedule, run_article
from sparseprune.training import DistillConfig, DistillPruner


def test_rows_are_counts_of_hashed_words_and_of_characters_where_there_are_no_spaces():
    rows = hashed_rows([("a a b",), ("b a a",), ("",), ("火车",)], 16)
    assert torch.equal(rows[0], rows[1]) and not rows[2].any()
    assert sorted(round(v, 4) for v in rows[0].tolist())[-2:] == [0.4472, 0.8944]
    assert int((rows[3] > 0).sum()) in (2, 3)  # two characters and their pair, which may collide


def test_the_order_of_rows_hangs_on_seed_and_epoch_alone():
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    loader = RowLoader(x, y, 2, shuffle=True, seed=3)
    first, second = [y.tolist() for _, y in loader], [y.tolist() for _, y in loader]
    loader.set_epoch(0)
    assert first != second and [y.tolist() for _, y in loader] == first and len(loader) == 3
    assert sorted(label for labels in first for label in labels) == list(range(5))
    with pytest.raises(ValueError, match="a row for each label"):
        RowLoader(x, y[:4])


@pytest.mark.parametrize("mode", ["bounded", "literal", "consistent"])
@pytest.mark.parametrize(("retention", "convention"), [(0.1, "text"), (0.01, "text"), (0.1, "formula")])
def test_each_reading_of_the_recurrence_ends_at_the_update_parameter(mode, retention, convention):
    update = Factors.from_retention(retention, convention=convention).update
    if (mode, convention) == ("literal", "formula"):  # z falls from .42 to below 0 in one step
        with pytest.raises(ValueError, match="use mode='bounded'"):
            article_schedule(update, mode).final_density  # noqa: B018
        return
    end = article_schedule(update, mode).final_density
    assert end <= update + 1e-12 if mode == "literal" else end == pytest.approx(update, abs=1e-12)


def test_an_update_parameter_that_nothing_converges_to_is_refused():
    with pytest.raises(ValueError, match=r"below 0\.5"):
        article_schedule(0.6, "consistent")
    with pytest.raises(ValueError, match="lower retention"):
        article_schedule(1.0)


def test_survivors_are_rescaled_once_when_the_masks_are_final():
    x, y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    kept = {}
    for rescale in (1.0, 0.5):
        torch.manual_seed(1)
        model = nn.Linear(8, 3)
        config = DistillConfig(method="magnitude", steps=4, lr=0.0, weight_decay=0.0, rescale=rescale)
        pruner = DistillPruner(model, config)
        pruner.fit(RowLoader(x, y, 16))
        kept[rescale] = pruner.finalize().weight.detach()
    assert torch.equal(kept[0.5], 0.5 * kept[1.0]) and kept[1.0].any()
    with pytest.raises(ValueError, match="rescale expected"):
        DistillConfig(rescale=0.0)


def test_the_run_prints_the_articles_lines_and_records_all_three_splits(tmp_path, capsys):
    settings = {"retentions": [0.1], "epochs": 1, "batch_size": 512, "every": 10, "out": tmp_path}
    found = run_article(methods=["gan", "magnitude"], **settings)
    out = capsys.readouterr().out
    assert "update 0.100000  <- used" in out and "trim 0.351364" in out
    assert "Epoch 1 batch   10  Loss" in out and "Epoch 1  Loss" in out and "U 0.1000" in out
    assert "pruning by the GAN" in out and out.count("pruning is finished: density 0.1000") == 2
    record = json.loads((found.folder / "run.json").read_text())
    pruned = record["retentions"][0]["pruned"]
    for entry in (record["dense"], pruned["gan"], pruned["magnitude"]):
        assert all(entry[split]["loss"] > 0 for split in ("train", "valid", "test"))
    assert record["dense"]["density"] == 1 and pruned["gan"]["density"] == 0.1
    history = json.loads((found.folder / "history.json").read_text())
    assert len(history["dense"]) == len(history["gan 0.1"]) == 30
    assert (
        "discriminator_accuracy" in history["gan 0.1"][0]
        and "discriminator_accuracy" not in history["magnitude 0.1"][0]
    )
    assert main(["report", str(found.folder)]) == 0 and "magnitude, retention 0.1" in capsys.readouterr().out


def test_the_formula_keeps_whole_features_and_every_class(tmp_path):
    record = run_article(
        data="crosswoz_zh", retentions=[0.1], convention="formula", methods=["magnitude"], epochs=1, batch_size=512,
        out=tmp_path, quiet=True,
    ).record  # fmt: skip
    found = record["retentions"][0]
    assert found["pruned"]["magnitude"]["density"] == 40 / 128  # round(sqrt(.1) * 128) of the columns
    assert found["formula"]["update"] == pytest.approx(0.316228, abs=1e-6)


def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(ValueError, match="data expected one of clinc10"):
        run_article(data="nothing", out=tmp_path)
    with pytest.raises(ValueError, match="methods expected from"):
        run_article(methods=["movement"], out=tmp_path)
    assert main(["article", "--retention", "0.6", "--mode", "consistent", "--out", str(tmp_path)]) == 2
    assert "below 0.5" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_units_and_axes_keep_the_square_root_and_are_rescaled_from_the_command_line(tmp_path):
    from sparseprune.pruning import make_granularity
    from sparseprune.pruning.granularity import Neurons
    from sparseprune.runner import RunConfig, run
    from sparseprune.runner.config import method_config, schedule
    from sparseprune.runner.robustness import robustness_table

    spec = make_granularity("neurons/axes")
    assert spec == Neurons(per_axis=True, trim_rescale=True)
    assert spec.trim(0.1) == pytest.approx(0.351364, abs=1e-6)
    pruning = method_config("magnitude", schedule=schedule(0.25, spec), granularity=spec, epochs=1.0)
    config = RunConfig(
        pruning=pruning, hidden=32, ffn=64, layers=1, heads=2, dense_epochs=1, train_limit=200, other_limit=60,
        robustness=50, latency_batch=8,
    )  # fmt: skip
    found = run(config, out=tmp_path, quiet=True)
    assert found.record["density"] == pytest.approx(0.25)  # half of the neurons, half of the other axis of each matrix
    assert found.model.layers[0].ffn.expand.out_features == 32
    judged = found.record["robustness"]
    assert set(judged) >= {"as it is", "30 % of the words missing", "the longest quarter"}
    assert judged["as it is"]["examples"] == 50 and judged["the longest quarter"]["examples"] in (12, 13)
    assert all(0 <= entry[which] <= 1 for entry in judged.values() for which in ("dense", "pruned"))
    assert "typos in 10 % of the words" in robustness_table(judged) and "robustness.png" in found.record["plots"]


def test_few_texts_are_read_more_often_and_epochs_that_are_given_hold(tmp_path):
    from dataclasses import replace

    from sparseprune.runner import RunConfig, override
    from sparseprune.runner.sources import default_rate

    x, y = torch.zeros(64, 4), torch.zeros(64, dtype=torch.long)
    loader = RowLoader(x, y, 32)
    pruner = DistillPruner(nn.Linear(4, 2), DistillConfig(epochs=5, min_steps=60))
    assert pruner.total_steps(loader) == 60
    assert (
        DistillPruner(nn.Linear(4, 2), DistillConfig(epochs=5, min_steps=1200)).total_steps(loader) == 80
    )  # 40 epochs
    assert DistillPruner(nn.Linear(4, 2), DistillConfig(epochs=50, min_steps=60)).total_steps(loader) == 100
    config = RunConfig(min_dense_steps=500)
    config = replace(config, pruning=replace(config.pruning, min_steps=1200))
    changed, _ = override(config, {"epochs": 2.0, "dense_epochs": 1})
    assert changed.pruning.min_steps == changed.min_dense_steps == 0
    for size, expected in ((384, 4e-4), (768, 1e-4), (64, 1e-3), (4096, 3e-5)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": size}))
        assert default_rate(str(folder)) == pytest.approx(expected)
    assert default_rate(str(tmp_path / "nothing")) == 3e-5
