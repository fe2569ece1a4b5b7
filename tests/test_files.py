"""A file is either whole or not there."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseprune as sp
from sparseprune._arguments import path_of
from sparseprune._files import holding, read_checkpoint, remove_unfinished, replacing, save_checkpoint, write_text
from sparseprune.data import load_files
from sparseprune.data.loading import read_examples
from sparseprune.pruning.masks import MaskSet
from sparseprune.pruning.processes import Processes
from sparseprune.runner.folder import check_place
from sparseprune.training.checkpoint import held


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(path) as temporary:
        temporary.write_text("new, but")
        raise RuntimeError("half-way")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    others = [".run.abcd_123", ".run.ckpt.abcd_1234.ckpt", ".run.ckpt.notes.ckpt", "run.ckpt"]
    for name in (".run.ckpt.abcd_123.ckpt", *others):
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path / "run.ckpt")
    assert sorted(os.listdir(tmp_path)) == others
    remove_unfinished(tmp_path / "nowhere" / "run.ckpt")


def test_a_link_is_followed_and_stays_one(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "blob", tmp_path / "here" / "a.txt"
    target.write_text("old")
    link.symlink_to(os.path.relpath(target, link.parent))
    with replacing(link) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".txt"
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    target.unlink()
    write_text(link, "made through a link to nothing")
    assert link.is_symlink() and target.read_text().startswith("made")
    (tmp_path / "there" / ".blob.abcd_123.txt").touch()
    remove_unfinished(link)
    assert os.listdir(tmp_path / "there") == ["blob"]


def test_what_is_no_regular_file_stays(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    before = sorted(os.listdir(tmp_path))
    for path, message in (
        ("/dev/null", "got a device"),
        (tmp_path / "null", "got a device"),
        (tmp_path / "fifo", "got a FIFO"),
        (tmp_path / "folder", "got a folder"),
        (str(tmp_path / "folder") + "/", "got a folder"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "nowhere" / "a", "make it first"),
        (tmp_path / "file" / "a", "Not a directory"),
        ("~nobody-at-all/a", "home"),
    ):
        with pytest.raises(OSError, match=message):
            write_text(path, "x")
    assert sorted(os.listdir(tmp_path)) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_permissions_of_a_file_stay(tmp_path):
    path = tmp_path / "a"
    for mode in (0o600, 0o755, 0o660):
        write_text(path, "old")
        path.chmod(mode)
        write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "new"


def test_a_read_only_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_text(path, "old")
    path.chmod(0o444)
    if os.geteuid() == 0:  # whom permissions do not bind
        monkeypatch.setattr(os, "access", lambda found, mode: not (mode & os.W_OK and os.fspath(found) == str(path)))
    with pytest.raises(PermissionError, match="read-only"):
        write_text(path, "x")
    assert path.read_text() == "old"


def test_home_and_long_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text("~/a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"
    for name in ("n" * 251 + ".txt", "ü" * 127, "n" * 54 + "." + "s" * 200):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("x")
        left = temporary.with_name(temporary.name)
        left.touch()
        remove_unfinished(tmp_path / name)
        assert not left.exists() and (tmp_path / name).read_text() == "x"


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    code = (
        "import sys\nfrom sparseprune._files import write_text\n"
        "for _ in range(50): write_text(sys.argv[1], sys.argv[2] * 100_000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-P", "-c", code, str(path), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 100_000, "b" * 100_000) and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "made" / "here"
    with holding(folder, "wait", pytest.fail):
        said = rf"here: in use by process {os.getpid()} on .*; wait"
        with pytest.raises(BlockingIOError, match=said), holding(folder, "wait", pytest.fail):
            pass
    with pytest.raises(RuntimeError, match="half-way"), holding(folder, "wait", pytest.fail):
        raise RuntimeError("half-way")
    assert list(folder.iterdir()) == []


def test_a_file_is_held_alone(tmp_path):
    with holding(tmp_path, "wait", pytest.fail, "a.pt"), holding(tmp_path, "wait", pytest.fail, "b.pt"):
        with holding(tmp_path, "wait", pytest.fail):
            pass
        said = rf"a.pt: in use by process {os.getpid()} on .*; wait"
        with pytest.raises(BlockingIOError, match=said), holding(tmp_path, "wait", pytest.fail, "a.pt"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_begins_with_a_tilde_is_one_place_for_who_writes_and_who_reads(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    masks = MaskSet({"a": torch.rand(4, 4) < 0.5})
    masks.save("~/masks.safetensors")
    assert torch.equal(MaskSet.load("~/masks.safetensors")["a"], masks["a"])
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    data, options = [torch.randn(8, 4)], {"state": "~/state", "spill": "~/spill"}
    sp.prune_(model, 0.5, criterion="wanda", data=data, criterion_options=options)
    assert (home / "state" / "run.json").is_file()
    assert check_place("~/runs", "own") == home / "runs" / "own"
    assert path_of("~/a") == home / "a" and path_of("b~") == Path("b~")
    with pytest.raises(argparse.ArgumentTypeError, match="~nobody-here"):
        path_of("~nobody-here/a")
    with pytest.raises(FileNotFoundError, match=r"write \./ before it: '~nobody-here"):
        check_place("~nobody-here", "own")
    for split in ("train", "valid", "test"):
        (home / f"{split}.tsv").write_text("one\ta\ntwo\tb\n")
    (home / "labels.txt").write_text("a\nb\n")
    assert load_files("~/train.tsv", "~/valid.tsv", "~/test.tsv").label_names == ["a", "b"]
    assert read_examples("~/test.tsv", ["a", "b"]).labels == [0, 1]
    rows = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long)) for _ in range(2)]
    for step in (1, 3):  # the second goes on from the file of the first

        def stop(record, step=step):
            if record["step"] == step:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        pruner = sp.DistillPruner(torch.nn.Sequential(torch.nn.Linear(4, 3)), sp.DistillConfig(steps=6, density=0.5))
        with pytest.raises(KeyboardInterrupt):
            pruner.fit(rows, checkpoint="~/run.pt", checkpoint_every=1, callback=stop)
    assert [record["step"] for record in pruner.history.steps] == [0, 1, 2, 3]
    assert not list(here.iterdir()) and (home / "run.pt").is_file() and not (home / "run.pt.lock").exists()


def test_a_training_checkpoint_is_one_run_s(tmp_path):
    rows = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long)) for _ in range(2)]

    def another(record):
        pruner = sp.DistillPruner(torch.nn.Sequential(torch.nn.Linear(4, 3)), sp.DistillConfig(steps=6, density=0.5))
        with pytest.raises(BlockingIOError, match=r"run.pt: in use by process .*another checkpoint"):
            pruner.fit(rows, checkpoint=tmp_path / "run.pt")

    pruner = sp.DistillPruner(torch.nn.Sequential(torch.nn.Linear(4, 3)), sp.DistillConfig(steps=6, density=0.5))
    pruner.fit(rows, checkpoint=tmp_path / "run.pt", callback=another)
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_training_checkpoint_is_held_by_whatever_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.pt").symlink_to(tmp_path / "a" / "c.pt")
    alone = Processes(active=False)
    with held(tmp_path / "a" / "c.pt", alone):
        with pytest.raises(BlockingIOError, match="another checkpoint"), held(tmp_path / "b" / "c.pt", alone):
            pass
        with held(tmp_path / ("n" * 255), alone), held(None, alone):
            pass
    assert os.listdir(tmp_path / "a") == []


def test_every_process_is_told_that_a_training_checkpoint_is_held(tmp_path):
    class Second:
        index = 1

        def gather(self, own):
            assert own is None  # it has tried nothing itself
            return ["run.pt: in use by process 7 on there; wait for it", own]

    with pytest.raises(BlockingIOError, match="in use by process 7"), held(tmp_path / "run.pt", Second()):
        pytest.fail("went on")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_locks_is_used_and_it_is_said(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with holding(tmp_path, "wait", said.append):
        pass
    assert len(said) == 1 and said[0].startswith(f"{tmp_path}: no locks here (No locks available); take care that")


def test_a_system_without_locks_is_used_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    said = []
    with holding(tmp_path, "wait", said.append):
        assert len(said) == 1 and "no locks here" in said[0]
    with pytest.raises(RuntimeWarning), holding(tmp_path, "wait", lambda text: warning(text)):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def warning(text):
    raise RuntimeWarning(text)


def test_a_checkpoint_is_read_or_its_damage_named_and_memory_that_ran_out_is_none(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    with pytest.raises(FileNotFoundError):
        read_checkpoint(path, "state", "delete it")
    save_checkpoint(path, {"step": 3})
    assert read_checkpoint(path, "state", "delete it") == {"step": 3}
    whole = path.read_bytes()
    assert read_checkpoint(path, "state", "delete it", whole) == {"step": 3}
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"a\.ckpt: not a readable state \(.*; delete it"):
        read_checkpoint(path, "state", "delete it")

    def load(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("torch.load", load)
    with pytest.raises(MemoryError):
        read_checkpoint(path, "state", "delete it")
