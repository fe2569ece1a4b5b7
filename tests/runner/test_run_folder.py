"""A run that is killed, starved of disk or met by another one: it goes on, or says in one line why not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from sparseprune.cli import main
from sparseprune.runner import RunConfig, run
from sparseprune.runner.folder import check_place, enter, occupied
from sparseprune.training import DistillConfig, DistillPruner, evaluate

TINY = {
    "hidden": 32, "ffn": 64, "layers": 1, "heads": 2, "dense_epochs": 2, "train_limit": 320, "other_limit": 60,
    "latency_batch": 8, "batch_size": 32, "layout": "dense",
}  # fmt: skip
ENDLESS = 100_000


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")


def tiny(**settings):
    return RunConfig(pruning=DistillConfig(epochs=2.0), **{**TINY, **settings})


def killed_at(patch, step, every=ENDLESS):
    """The pruning is stopped at this step; checkpoints are written every so many steps."""
    fit = DistillPruner.fit

    def killed(self, *args, **kwargs):
        def stop(record):
            if record["step"] == step:
                raise KeyboardInterrupt

        return fit(self, *args, **{**kwargs, "callback": stop, "checkpoint_every": every})

    patch.setattr(DistillPruner, "fit", killed)


def test_killed_before_the_first_checkpoint_of_the_pruning_it_ends_at_the_same_masks(tmp_path, monkeypatch, capsys):
    whole = run(tiny(), out=tmp_path, name="whole", quiet=True).record
    with monkeypatch.context() as patch:
        killed_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), out=tmp_path, name="cut", quiet=True)
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {"data.digest", "dense.ckpt", "settings.json"}
    resumed = run(tiny(), out=tmp_path, name="cut").record
    assert "resuming: 2 of 2 dense epochs are done" in capsys.readouterr().out
    assert resumed["mask_hash"] == whole["mask_hash"] and resumed["pruned"]["test"] == whole["pruned"]["test"]


def test_a_resumed_pruning_says_at_which_step_and_a_replaced_one_what_differs(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        killed_at(patch, 12, every=5)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), out=tmp_path, name="cut", quiet=True)
    run(tiny(), out=tmp_path, name="cut")
    out = capsys.readouterr().out
    assert "resuming: 10 of 20 pruning steps are done, epoch 2" in out
    (tmp_path / "cut" / "robustness.png").touch()  # which the next run may have no reason to draw
    enter(tmp_path / "cut", tiny(), "data", print)
    assert "the finished run here is replaced" in capsys.readouterr().out
    assert not list((tmp_path / "cut").glob("*.png"))
    (tmp_path / "cut" / "training.ckpt").write_text("")
    enter(tmp_path / "cut", tiny(seed=3), "data", print)
    assert "had other settings and is replaced (seed: 0 -> 3)" in capsys.readouterr().out
    assert not (tmp_path / "cut" / "training.ckpt").exists()


def three_files(folder, turn=False):
    """train, valid and test of two classes that a word decides, or with ``turn`` the other way round."""
    names = {}
    for split, count in (("train", 64), ("valid", 16), ("test", 16)):
        rows = [(f"word{i} {'up' if i % 2 else 'down'}", ("a", "b")[(i + turn) % 2]) for i in range(count)]
        names[split] = folder / f"{split}.tsv"
        names[split].write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    return {split: str(path) for split, path in names.items()}


def test_a_run_whose_data_changed_meanwhile_begins_again(tmp_path, monkeypatch, capsys):
    settings = {"data": None, **three_files(tmp_path), "dense_epochs": 8}
    with monkeypatch.context() as patch:
        killed_at(patch, 3, every=1)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(**settings), out=tmp_path, name="cut", quiet=True)
    three_files(tmp_path, turn=True)
    again = run(tiny(**settings), out=tmp_path, name="cut").record
    out = capsys.readouterr().out
    assert "the unfinished run here had other data and is replaced\n" in out and "resuming" not in out
    assert again["dense"]["test"]["accuracy"] > 0.9
    fresh = run(tiny(**settings), out=tmp_path, name="fresh", quiet=True).record
    assert again["mask_hash"] == fresh["mask_hash"]


def test_a_run_whose_model_changed_meanwhile_begins_again(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "up", "down"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    def write(seed):
        torch.manual_seed(seed)
        made = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=len(words), **size))
        made.save_pretrained(folder)

    settings = {"data": None, **three_files(tmp_path), "model": str(folder), "robustness": 0}
    write(0)
    for name in ("cut", "same"):
        with monkeypatch.context() as patch:
            killed_at(patch, 3, every=1)
            with pytest.raises(KeyboardInterrupt):
                run(tiny(**settings), out=tmp_path, name=name, quiet=True)
    run(tiny(**settings), out=tmp_path, name="same")
    assert "resuming: 2 of 2 dense epochs" in capsys.readouterr().out
    write(1)
    again = run(tiny(**settings), out=tmp_path, name="cut").record
    out = capsys.readouterr().out
    assert "the unfinished run here had another model and is replaced\n" in out and "resuming" not in out
    fresh = run(tiny(**settings), out=tmp_path, name="fresh", quiet=True).record
    assert again["mask_hash"] == fresh["mask_hash"] and again["dense"]["test"] == fresh["dense"]["test"]


def test_a_dense_model_with_nothing_right_is_told_and_loses_no_run(tmp_path, monkeypatch, capsys):
    def none_right(*args):
        return {**evaluate(*args), "accuracy": 0.0}

    monkeypatch.setattr("sparseprune.runner.measuring.evaluate", none_right)
    found = run(tiny(), out=tmp_path, name="none")
    assert found.record["accuracy_kept"] is None and "kept (the dense model has none right)" in found.table
    assert main(["report", str(tmp_path / "none")]) == 0
    assert "kept (the dense model has none right)" in capsys.readouterr().out


def test_no_two_snapshots_and_no_copy_of_the_teacher_are_held(tmp_path, monkeypatch):
    held, tensors, models = [], DistillPruner._tensors, []

    def counted(self):
        held.append(self._guard.snapshot)
        models.append((self.model, self.teacher))
        return tensors(self)

    monkeypatch.setattr(DistillPruner, "_tensors", counted)
    from sparseprune.runner import measure

    def seen(config, source, dense, *more):
        assert models[0][1] is dense is not models[0][0]
        return measure(config, source, dense, *more)

    monkeypatch.setattr("sparseprune.runner.measure", seen)
    run(tiny(), out=tmp_path, name="one", quiet=True)
    assert len(held) >= 2 and held == [None] * len(held)


def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, 7, every=5)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), out=tmp_path, name="cut", quiet=True)
    folder = tmp_path / "cut"
    for name, content in (("dense.ckpt", b""), ("dense.ckpt", None), ("training.ckpt", None)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(ValueError, match=rf"{name}: not a readable .*delete it") as caught:
            run(tiny(), out=tmp_path, name="cut", quiet=True)
        assert len(str(caught.value).splitlines()) == 1
        (folder / name).write_bytes(whole)
    torch.save({"model": {}}, folder / "dense.ckpt")
    with pytest.raises(ValueError, match=r"dense.ckpt: not a readable .*delete it"):
        run(tiny(), out=tmp_path, name="cut", quiet=True)
    (folder / "dense.ckpt").unlink()
    (folder / "training.ckpt").unlink()
    run(tiny(), out=tmp_path, name="cut", quiet=True)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """A limit on the size of files stands in for a full disk."""
    resource = pytest.importorskip("resource")
    with monkeypatch.context() as patch:
        killed_at(patch, 7, every=5)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), out=tmp_path, name="cut", quiet=True)
    folder = tmp_path / "cut"
    before = {name: (folder / name).read_bytes() for name in ("dense.ckpt", "training.ckpt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # or half of a module's would stay
    with monkeypatch.context() as patch:
        killed_at(patch, ENDLESS, every=5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"training.ckpt: the checkpoint cannot be written .*before it is kept"):
                run(tiny(), out=tmp_path, name="cut", quiet=True)
            with pytest.raises(OSError, match=r"dense.ckpt: the checkpoint cannot be written .*none before it"):
                run(tiny(), out=tmp_path, name="new", quiet=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            sys.dont_write_bytecode = bytecode
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {path.name for path in folder.iterdir()} == {*before, "data.digest", "settings.json"}


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    folder = tmp_path / "one"
    with occupied(folder, print):
        said = rf"in use by process {os.getpid()} on .*--name"
        with pytest.raises(BlockingIOError, match=said), occupied(folder, print):
            pass
        with pytest.raises(BlockingIOError):
            run(tiny(), out=tmp_path, name="one", quiet=True)
    with occupied(folder, print):
        pass
    assert list(folder.iterdir()) == []


_HOLD = """
import sys, time
from sparseprune.runner.folder import occupied
with occupied(__import__("pathlib").Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    command = [sys.executable, "-P", "-c", _HOLD, str(tmp_path / "one")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {holder.pid}"), occupied(tmp_path / "one", print):
            pass
        os.kill(holder.pid, signal.SIGKILL)
    assert (tmp_path / "one" / "run.lock").exists()
    with occupied(tmp_path / "one", print):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a/", "a\0b"])
def test_a_name_that_leads_elsewhere(name, tmp_path):
    with pytest.raises(ValueError, match="plain folder name"):
        check_place(tmp_path, name)


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; expected a folder"):
        check_place(tmp_path / "file" / "deeper", "run")
    with pytest.raises(OSError, match="cannot write in"):
        check_place("/proc/self", "run")


_KILLED = """
import sys
from sparseprune.runner import RunConfig, run
from sparseprune.training import DistillConfig
out, name = sys.argv[1:]
print("ready", flush=True)
settings = {settings!r}
run(RunConfig(pruning=DistillConfig(epochs=8.0), **settings), out=out, name=name, quiet=True)
"""


@pytest.mark.slow
def test_killed_at_random_again_and_again_it_ends_as_if_it_never_was(tmp_path):
    seed = int(os.environ.get("SPARSEPRUNE_KILL_SEED", str(time.time_ns() % 2**32)))
    print(f"SPARSEPRUNE_KILL_SEED={seed}")
    moments = random.Random(seed)
    code = _KILLED.format(settings=TINY)
    environment = {**os.environ, "SPARSEPRUNE_CACHE": "0"}

    def life(name, seconds):
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(tmp_path), name], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    assert life("whole", 120) == 0
    for _ in range(6):
        if life("cut", moments.uniform(0, 4)) is not None:
            break
    if not (tmp_path / "cut" / "run.json").exists():
        assert life("cut", 120) == 0
    whole, cut = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
    assert cut["mask_hash"] == whole["mask_hash"] and cut["pruned"]["test"] == whole["pruned"]["test"]
    assert not [path.name for path in (tmp_path / "cut").iterdir() if path.name.startswith(".") or "ckpt" in path.name]
