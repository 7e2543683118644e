"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moesaic.files import write_whole


def test_a_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "new.txt", "grüß\n")
    assert (tmp_path / "new.txt").read_bytes() == "grüß\n".encode()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.txt"
    path.write_text("before\n")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "after\n")
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_modes_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "talk.txt", tmp_path / "link.txt"
    path.write_text("before\n")
    path.chmod(0o600)
    link.symlink_to(path)
    write_whole(link, "after\n")
    assert path.read_text() == "after\n"
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_folder_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "talk.txt", "text")
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_stays_one() -> None:
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), "text")
    assert Path("/dev/full").is_char_device()
