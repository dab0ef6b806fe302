"""Locks that gpusvc waits for: nobody else can open them, no wait is endless, and a holder is named."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpusvc.config import keys
from gpusvc.paths import Paths
from gpusvc.placement import waitlist
from gpusvc.state import lease as leases
from gpusvc.state import locks
from gpusvc.state.locks import LockTimeoutError

HOLD = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "lib")


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@contextmanager
def locked_by_another(file: Path) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", HOLD, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        try:
            yield child.pid
        finally:
            child.communicate()


def modes(directory: Path) -> dict[str, int]:
    found = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file.relative_to(directory)): stat.S_IMODE(file.stat().st_mode) for file in found}


@pytest.mark.usefixtures("umask")
def test_only_its_owner_can_open_a_lock(paths: Paths) -> None:
    with waitlist.placement_lock(paths), waitlist.Ticket(paths, "qwen"), leases.hold(paths, "qwen"):
        made = modes(paths.runtime)
    assert len(made) == 3
    assert set(made.values()) == {0o600}
    assert stat.S_IMODE(paths.waitlist_directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(paths.lease_directory("qwen").stat().st_mode) == 0o755
    with keys.editing(keys.file_of(paths), os.getgid()):
        pass
    assert modes(paths.config) == {".keys.toml.lock": 0o600, "keys.toml": 0o640}


@pytest.mark.usefixtures("umask")
def test_a_lock_of_an_older_version_gets_the_right_mode(paths: Paths) -> None:
    paths.runtime.mkdir()
    paths.placement_lock.touch(mode=0o644)
    with waitlist.placement_lock(paths):
        assert modes(paths.runtime) == {"placement.lock": 0o600}


def test_a_lock_that_stays_held_is_a_sentence_with_its_holder(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    file.touch()
    with locked_by_another(file) as pid, pytest.raises(LockTimeoutError) as caught, locks.held(file, timeout_seconds=0):
        pytest.fail("it is held")
    assert f"{file} has been locked for 0 s by " in str(caught.value)
    assert f"(PID {pid})." in str(caught.value)


def test_a_held_lock_keeps_others_out_until_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locks.held(file, timeout_seconds=0) as handle, file.open() as other:
        os.set_inheritable(handle, True)
        assert not locks.try_lock(other.fileno(), locks.SHARED)
        with locked_child(handle):
            pass
    with locks.held(file, timeout_seconds=0):
        assert locks.holders(file) == [os.getpid()]


@contextmanager
def locked_child(handle: int) -> Iterator[None]:
    """A child that inherits the lock and ends."""
    subprocess.run([sys.executable, "-c", "pass"], pass_fds=[handle], check=True)
    yield


def test_the_directory_of_the_keys_is_no_lock(paths: Paths) -> None:
    paths.config.mkdir()
    with paths_opened(paths.config) as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        with keys.editing(keys.file_of(paths), os.getgid()) as known:
            known["alice"], _ = keys.make("alice")
    assert [key.name for key in keys.read(keys.file_of(paths))] == ["alice"]


@contextmanager
def paths_opened(directory: Path) -> Iterator[int]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/null")])
def test_what_is_no_file_is_refused_as_a_lock(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "lock")
    with pytest.raises(OSError, match=r"regular|link"):
        locks.open_private(tmp_path / "lock")
