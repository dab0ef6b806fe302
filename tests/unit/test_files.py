"""Files that are written whole, directories that are right from the first moment, and files of strangers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpusvc import files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> object:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_the_mode_is_right_whatever_the_umask(tmp_path: Path) -> None:
    files.make_directory(tmp_path / "a" / "b")
    files.make_directory(tmp_path / "private", mode=0o700)
    files.write(tmp_path / "a" / "file", "text", mode=0o640)
    assert [mode(tmp_path / each) for each in ("a", "a/b", "private", "a/file")] == [0o755, 0o755, 0o700, 0o640]


def test_a_directory_is_never_seen_with_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "chmod", lambda *_: pytest.fail("it had another mode before"))
    before = os.umask(0o077)
    try:
        files.make_directory(tmp_path / "a" / "b")
        assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o755
        assert os.umask(0o077) == 0o077, "the umask is as before"
    finally:
        os.umask(before)


def test_a_directory_with_the_wrong_mode_is_set_right(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    files.make_directory(tmp_path / "a")
    assert mode(tmp_path / "a") == 0o755


def test_a_link_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError):
        files.make_directory(tmp_path / "link")


def test_a_write_replaces_a_link_and_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write(tmp_path / "link", "new", durable=True)
    assert (tmp_path / "target").read_text() == "old"
    assert files.read(tmp_path / "link") == b"new"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "target"]


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    files.write(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), files.written_beside(tmp_path / "file", "new", mode=0o644, durable=False):
        _ = 1 // 0
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "old")]


def test_create_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nologin")
    with pytest.raises(OSError, match="link"):
        files.create(tmp_path / "link", 0o644)
    assert not (tmp_path / "nologin").exists()


def test_strangers_files_are_regular_and_bounded_or_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"0" * 11)
    for name, links in (("fifo", False), ("link", True)):
        with pytest.raises(ValueError, match="no regular file"):
            files.read(tmp_path / name, follow_links=links)
    with pytest.raises(ValueError, match="no regular file"):
        files.read(Path("/dev/zero"))
    with pytest.raises(ValueError, match="too large"):
        files.read(tmp_path / "large", limit_bytes=10)
    with pytest.raises(OSError, match="link"):
        files.read(tmp_path / "link")
    with pytest.raises(IsADirectoryError):
        files.read(tmp_path)


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    files.write(tmp_path / "file", "a")
    before = files.stamp(tmp_path / "file")
    assert files.stamp(tmp_path / "file") == before
    files.write(tmp_path / "file", "b")
    assert files.stamp(tmp_path / "file") != before
