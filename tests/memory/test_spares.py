"""Spare files: written over only after the directory on disk has been told, few of them, and never in the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from headway.memory.spares import SPARE_ENDING, SpareFiles


def replaced(directory: Path, name: str, size: int) -> Path:
    path = directory / f"{name}.tensor"
    path.write_bytes(bytes(size))
    return path


def left(directory: Path) -> int:
    return len(list(directory.glob(f"*{SPARE_ENDING}")))


def test_a_spare_file_is_given_away_once_and_only_after_an_fsync_that_began_when_it_was_there(tmp_path, monkeypatch):
    spares = SpareFiles(tmp_path)
    assert spares.keep(replaced(tmp_path, "a", 10), 10)
    assert not spares.take(10, tmp_path / "new")
    real = os.fsync

    def late(descriptor: int) -> None:
        real(descriptor)
        assert spares.keep(replaced(tmp_path, "b", 10), 10)  # while the disk was writing

    monkeypatch.setattr(os, "fsync", late)
    spares.secure()
    assert spares.take(10, tmp_path / "new")
    assert (tmp_path / "new").stat().st_size == 10
    assert not spares.take(10, tmp_path / "newer")
    monkeypatch.undo()
    spares.secure()
    assert spares.take(10, tmp_path / "newer")
    assert left(tmp_path) == 0


def test_one_fsync_does_for_all_and_is_wanted_only_while_few_are_ready(tmp_path, monkeypatch):
    spares, made = SpareFiles(tmp_path), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (made.append(file), real(file))[1])
    assert not spares.is_short  # nothing to gain
    for i in range(5):
        assert spares.keep(replaced(tmp_path, f"{i}", 10), 10)
        assert spares.is_short
    spares.secure()
    assert len(made) == 1
    assert spares.keep(replaced(tmp_path, "later", 10), 10)
    assert not spares.is_short
    assert all(spares.take(10, tmp_path / f"new{i}") for i in range(5))
    assert not spares.take(10, tmp_path / "new")
    assert spares.is_short


def test_files_of_another_length_and_more_than_a_few_are_left_to_the_caller(tmp_path):
    spares = SpareFiles(tmp_path)
    other = replaced(tmp_path, "other", 11)
    assert not spares.keep(other, 10)
    assert other.exists()
    kept = [spares.keep(replaced(tmp_path, f"{i}", 10), 10) for i in range(12)]
    assert kept == [True] * 8 + [False] * 4
    spares.secure()
    assert not spares.take(11, tmp_path / "new")
    assert spares.drop()
    assert not spares.drop()
    assert left(tmp_path) == 0
    assert not spares.take(10, tmp_path / "new")


def test_where_the_directory_cannot_be_told_what_waited_for_it_goes(tmp_path, monkeypatch):
    spares = SpareFiles(tmp_path)
    assert spares.keep(replaced(tmp_path, "a", 10), 10)

    def failing(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        spares.secure()
    monkeypatch.undo()
    spares.secure()
    assert not spares.take(10, tmp_path / "new")
    assert left(tmp_path) == 0


def test_a_file_of_a_name_that_came_before_is_another_spare(tmp_path):
    spares = SpareFiles(tmp_path)
    assert spares.keep(replaced(tmp_path, "x.1", 12), 12)
    spares.secure()
    assert spares.keep(replaced(tmp_path, "x.1", 8), 8)  # removed and made anew, generations begin again
    assert left(tmp_path) == 2
    assert not spares.take(8, tmp_path / "early")  # nobody has told the disk of its new name yet
    assert spares.take(12, tmp_path / "new")
    assert (tmp_path / "new").stat().st_size == 12
