"""A file is either whole or not there."""

from __future__ import annotations

import os
import stat

import pytest

from sparseprune._files import remove_unfinished, replacing, write_text


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
