"""The way of an engine's output into the journal, with a journald of the test's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusvc.journal import relay
from tests.component.conftest import ROOT, eventually

# Stands for the launcher: forks a relay, and does what it is told.
_LAUNCHER = """
import os, sys
from gpusvc.journal import relay
relay._SOCKET = sys.argv[1]
reading, writing = os.pipe()
os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
one = relay.Relay.fork(reading)
print(one.pid, writing, flush=True)
for line in sys.stdin:
    match line.split():
        case ["start", identifier]:
            one.start(identifier)
        case ["write", text]:
            os.write(writing, text.encode() + b"\\n")
        case ["flood", number]:
            os.write(writing, b"flood\\n" * int(number))
        case ["close"]:
            os.close(writing)
        case ["abandon"]:
            one.abandon()
    print("done", flush=True)
"""


class Launcher:
    def __init__(self, journal: Path) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, str(journal)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True
        )
        self.relay, self.writing = map(int, self._hear().split())

    def say(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        assert self._hear() == "done"

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


class Journal:
    """Accepts one stream."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(30)

    def accept(self) -> socket.socket:
        stream, _ = self._listener.accept()
        stream.settimeout(30)
        return stream

    def close(self) -> None:
        self._listener.close()
        self.path.unlink()


def read(stream: socket.socket) -> str:
    with stream, stream.makefile("rb") as file:
        return file.read().decode()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(tmp_path / "stdout")
    yield found
    found.close()


@pytest.fixture
def launcher(journal: Journal) -> Iterator[Launcher]:
    found = Launcher(journal.path)
    yield found
    found.process.kill()
    found.process.communicate()


def test_lines_reach_the_journal_with_the_engines_name(launcher: Launcher, journal: Journal) -> None:
    launcher.say("start llama-server")
    launcher.say("write hello")
    launcher.say("close")
    assert read(journal.accept()) == "llama-server\n\n6\n1\n0\n0\n0\nhello\n"


def test_the_relay_goes_on_when_the_launcher_is_killed_and_ends_with_the_engine(
    launcher: Launcher, journal: Journal
) -> None:
    launcher.say("start engine")
    launcher.say("write before")
    stream = journal.accept()
    engine = os.open(f"/proc/{launcher.process.pid}/fd/{launcher.writing}", os.O_WRONLY)
    launcher.process.send_signal(signal.SIGKILL)
    launcher.process.wait()
    assert not relay.has_ended(launcher.relay, 0.01)
    os.write(engine, b"after\n")
    os.close(engine)
    assert read(stream).endswith("before\nafter\n")
    assert relay.has_ended(launcher.relay, 30)


def test_it_holds_no_file_but_its_own_and_has_a_name(launcher: Launcher, journal: Journal) -> None:
    launcher.say("start engine")
    launcher.say("write hello")
    with journal.accept():
        descriptors = Path(f"/proc/{launcher.relay}/fd")
        eventually(lambda: len([*descriptors.iterdir()]) == 5)  # three streams, the pipe and the journal
        assert Path(f"/proc/{launcher.relay}/comm").read_text() == "gpusvc-relay\n"


def test_a_journal_that_restarts_gets_what_follows(launcher: Launcher, journal: Journal) -> None:
    launcher.say("start engine")
    launcher.say("write first")
    stream = journal.accept()
    assert b"first\n" in stream.recv(4096)
    stream.close()
    launcher.say("write second")
    launcher.say("close")
    assert read(journal.accept()).endswith("second\n")


def test_of_a_flood_the_end_comes_when_the_engine_falls_silent(launcher: Launcher, journal: Journal) -> None:
    launcher.say("start engine")
    for _ in range(10):
        launcher.say("flood 1000")
    launcher.say("write last")
    with journal.accept() as accepted, accepted.makefile("rb") as file:
        seen = [file.readline()]
        while seen[-1] != b"last\n":
            seen.append(file.readline())
    assert len(seen) < 9000
    assert any(b"gpusvc left out" in line for line in seen)


def test_a_relay_that_is_abandoned_or_forsaken_ends(launcher: Launcher) -> None:
    launcher.say("abandon")
    assert relay.has_ended(launcher.relay, 30)


def test_a_relay_without_orders_ends_with_the_launcher(launcher: Launcher) -> None:
    launcher.process.kill()
    assert relay.has_ended(launcher.relay, 30)


def test_a_relay_that_runs_on_is_waited_for_no_longer_than_was_said() -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(["cat"], stdin=reading, stdout=subprocess.DEVNULL) as cat:
        assert not relay.has_ended(cat.pid, 0.01)
        os.close(writing)
        os.close(reading)
        assert relay.has_ended(cat.pid, 30)


def test_a_relay_that_is_long_gone_has_ended() -> None:
    with subprocess.Popen(["true"]) as done:
        done.wait()
    assert relay.has_ended(done.pid, 0)
