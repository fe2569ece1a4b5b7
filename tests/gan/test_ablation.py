"""The ablation program: arms, resuming, and its statistics."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest


@pytest.fixture
def ablation(benchmarks):
    from benchmarks import ablation

    return ablation


def record(arm, data, seed, accuracy):
    figures = {"accuracy": accuracy, "macro_f1": accuracy, "agreement": accuracy, "kl": 1 - accuracy, "ece": 0.1}
    return {
        "setting": "s", "arm": arm, "data": data, "sparsity": 0.95, "seed": seed, "test": figures,
        "dense_accuracy": {"test": 0.9}, "fresh_discriminator": 0.9, "cpu_seconds": 1.0,
    }  # fmt: skip


def test_arms_differ_only_where_they_say(ablation):
    made = {arm: ablation.arm_config(arm, 0.95, 3, ablation.SIZES["small"], 1.5) for arm in ablation.ARMS}
    assert all(c.final_density == pytest.approx(0.05) and c.seed == 3 for c in made.values())
    assert made["gmp"].kd == made["gmp"].hidden == 0 and not made["scores_kd"].adversarial
    assert made["scores_kd_matched"].epochs == 1.5 * made["scores_kd"].epochs
    assert made["gan_frozen_d"].discriminator.mode == "frozen" and made["gan"].discriminator.mode == "trained"


def test_each_remedy_and_compensation_changes_one_thing(ablation):
    plain = {arm: ablation.arm_config(arm, 0.95, 3, ablation.SIZES["small"]) for arm in ablation.RULE_ARMS}
    for arm, (base, what) in ablation.COMPENSATED.items():
        found = ablation.arm_config(arm, 0.95, 3, ablation.SIZES["small"])
        assert found.compensation == what and replace(found, compensation="none") == plain[base]
    for arm, (game, trainer) in ablation.REMEDIES.items():
        found = ablation.arm_config(arm, 0.95, 3, ablation.SIZES["small"])
        assert found != plain["gan"] and found.adversarial
        assert all(getattr(found.discriminator, key) == value for key, value in game.items())
        assert replace(found, discriminator=plain["gan"].discriminator) == replace(plain["gan"], **trainer)


def test_a_setting_is_named_by_what_differs_from_the_default(ablation):
    plain, other = ablation.Setting(), ablation.Setting(dense_lr=2e-3)
    assert plain.key() == ablation.Setting(hidden=128).key() != other.key()
    assert plain.dense_key() == replace(plain, epochs=9.0).dense_key() != other.dense_key()
    assert len({setting.key() for setting in ablation.SIZES.values()}) == len(ablation.SIZES)


def test_what_is_given_stands_instead_of_the_sizes_own(ablation):
    own = ablation.SIZES["minilm"]
    assert ablation.setting_of("minilm") == ablation.setting_of("minilm", None, autocast=None) == own
    assert ablation.setting_of("minilm", own.epochs, autocast="bfloat16", scope="layer") == own
    given = ablation.setting_of("minilm", 10.0, autocast="none", scope="global")
    config = ablation.arm_config("scores_kd", 0.9, 0, given)
    assert (config.epochs, config.autocast, config.scope) == (10.0, "none", "global")
    assert config.lr == dict(own.changes)["lr"]
    assert given.key() != own.key() and given.dense_key() == own.dense_key()


def test_differences_are_paired_by_cell_and_seed(ablation):
    records = [record("gan", d, s, 0.8 + 0.01 * s) for d in "ab" for s in range(3)]
    records += [record("scores_kd", d, s, 0.78 + 0.01 * s) for d in "ab" for s in range(2)]
    cells = ablation.paired(records, "gan", "scores_kd", "accuracy")
    assert {k: len(v) for k, v in cells.items()} == {("a", 0.95, "element", 0): 2, ("b", 0.95, "element", 0): 2}
    mean, low, high, n = ablation.interval(cells, draws=500)
    assert n == 4 and mean == pytest.approx(0.02) and low == pytest.approx(0.02) and high == pytest.approx(0.02)
    assert ablation.interval({})[3] == 0
    wide = ablation.interval({"a": [0.0, 0.1], "b": [-0.1, 0.0]}, draws=2000)
    assert wide[1] < 0 < wide[2]
    assert "`gan` - `scores_kd` | 4 | 2 | +2.000" in ablation.table(records)
    alone = [
        {**record("gan", "b", 0, 0.6), "granularity": "16x1"},
        {**record("scores_kd", "b", 0, 0.5), "granularity": "16x1"},
    ]
    rows = [
        line for line in ablation.table(records + alone, by_cell=True).splitlines() if line.startswith("| `gan` - `s")
    ]
    assert len(rows) == 3
    assert rows[0].startswith("| `gan` - `scores_kd`, a 0.95 | 2 | 1 | +2.000 [range +2.000, +2.000]")
    assert rows[1].startswith("| `gan` - `scores_kd`, b 0.95 16x1 | 1 | 1 | +10.000 [no interval: one seed]")
    few = [{**r, "texts": 100, "fresh_discriminator": None} for r in records if r["data"] == "a"]
    both = ablation.table(records + few, by_cell=True)
    assert "| a | 0.95 100 texts | `gan` | 3 |" in both
    assert both.count("| `gan` - `scores_kd`, a 0.95 100 texts | 2 |") == 1


def test_few_seeds_have_a_range_and_no_interval(ablation, tmp_path):
    pairs = [0.0, 0.01, 0.05, 0.02, 0.02]
    records = [record("gan", "a", s, 0.8 + gain) for s, gain in enumerate(pairs)]
    records += [record("scores_kd", "a", s, 0.8) for s in range(5)]
    assert ablation.spread(ablation.paired(records, "gan", "scores_kd", "accuracy"))[0] == "interval"
    few = [r for r in records if r["seed"] < 3]
    what, mean, low, high, n = ablation.spread(ablation.paired(few, "gan", "scores_kd", "accuracy"))
    assert what == "range" and n == 3 and (mean, low, high) == pytest.approx((0.02, 0.0, 0.05))
    assert "| 3 | 1 | +2.000 [range +0.000, +5.000]" in ablation.table(few)
    assert "range" not in ablation.table(records)
    pytest.importorskip("matplotlib")
    ablation.plot(few, tmp_path / "few.png")
    assert (tmp_path / "few.png").stat().st_size > 1000


def test_an_arm_that_cannot_be_is_refused_before_the_first_run(ablation, tmp_path, monkeypatch):
    monkeypatch.setitem(ablation.CRITERIA, "uncertainty_kd", "never_registered")
    monkeypatch.setattr(ablation, "Cell", lambda *_: pytest.fail("trained before the arms were looked at"))
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="'never_registered'; call register_criterion first"):
        ablation.main(["--arms", "gmp_kd", "uncertainty_kd", "--size", "tiny", "--results", str(path)])
    assert not path.exists()


def test_a_registered_criterion_is_an_arm(ablation):
    made, base = (ablation.arm_config(arm, 0.95, 3, ablation.SIZES["tiny"]) for arm in ("uncertainty_kd", "gmp_kd"))
    assert made.method == "uncertainty" and replace(made, method="magnitude") == base
    for arm in ablation.CRITERIA:
        assert {(arm, "gmp_kd"), (arm, "scores_kd")} <= set(ablation.CONTRASTS)


def test_the_games_on_logits_differ_in_where_they_look_alone(ablation):
    setting = ablation.SIZES["unlabelled"]
    for arm, base in ablation.ON_LOGITS.items():
        made, plain = (ablation.arm_config(a, 0.95, 3, setting, 1.5) for a in (arm, base))
        assert made == replace(plain, features="logits") != plain
    assert ablation.arm_config("scores_kd_matched", 0.95, 3, setting, 1.5).steps == 300
    assert ablation.arm_config("scores_kd", 0.95, 3, setting).ce == 0
    spec = ablation.arm_config("gan", 0.7, 0, ablation.SIZES["structured"], 1.0, "heads+neurons").granularity
    assert spec == {"*ffn*": "neurons", "*": "heads"}
    assert list(ablation.MATCHED) == [arm for arm in ablation.ARMS if "matched" in arm]


def test_a_line_cut_short_is_run_again(ablation, tmp_path):
    path = tmp_path / "r" / "a.jsonl"
    ablation.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    ablation.append(path, {"a": 3})
    assert ablation.read(path) == [{"a": 1}, {"a": 3}]


def test_tuning_never_records_the_test_split(ablation, tmp_path, monkeypatch, capsys):
    setting = ablation.Setting(hidden=32, ffn=64, layers=1, heads=2, dense_epochs=1, epochs=1.0, train_limit=128)
    monkeypatch.setitem(ablation.SIZES, "small", setting)
    path = tmp_path / "t.jsonl"
    common = ["--seeds", "100", "--sparsity", "0.9", "--data", "crosswoz_zh", "--tuning", "--results", str(path)]
    ablation.main(["--arms", "gmp_kd", "--granularity", "4x1", *common])
    (found,) = ablation.read(path)
    assert "test" not in found and set(found["dense_accuracy"]) == {"valid"} and found["granularity"] == "4x1"
    assert "valid accuracy kept" in capsys.readouterr().out


def test_a_set_that_is_not_built_in_comes_from_the_data_folder(ablation, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        folder.joinpath(f"{split}.tsv").write_text("good\t0\nbad\t1\n")
    folder.joinpath("labels.txt").write_text("yes\nno\n")
    assert ablation.load_data("mine", tmp_path).label_names == ["yes", "no"]
    with pytest.raises(SystemExit, match="--data-dir"):
        ablation.load_data("mine", None)


@pytest.mark.slow
def test_a_tiny_experiment_resumes(ablation, tmp_path, monkeypatch, capsys):
    setting = ablation.Setting(hidden=32, ffn=64, layers=1, heads=2, dense_epochs=1, epochs=2.0, train_limit=192)
    monkeypatch.setitem(ablation.SIZES, "small", setting)
    path = tmp_path / "a.jsonl"
    common = ["--seeds", "0", "--sparsity", "0.9", "--data", "crosswoz_zh", "--results", str(path)]
    ablation.main(["--arms", "scores_kd", "gan", *common])
    first = path.read_text()
    ablation.main(["--arms", "scores_kd", "gan", "scores_kd_matched", *common])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().startswith(first) and [r["arm"] for r in records] == [
        "scores_kd",
        "gan",
        "scores_kd_matched",
    ]
    assert records[2]["steps"] >= records[0]["steps"] == records[1]["steps"]
    assert {"accuracy", "kl", "agreement", "ece"} <= set(records[0]["test"])
    assert "`gan` - `scores_kd`" in capsys.readouterr().out
