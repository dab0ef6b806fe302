"""The supervisor of workers and real processes; what they work on is a script of the test's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.component.conftest import ROOT, eventually

# Each worker tells its number and PID, and then does what the test says until SIGTERM.
_PROGRAM = """
import os, signal, sys, time
from gpusvc.gateway.process.supervisor import Supervisor
from gpusvc.systemd.notify import Notifier

count, drain_seconds = int(sys.argv[1]), float(sys.argv[2])
signal.pthread_sigmask(signal.SIG_UNBLOCK, set(signal.Signals))

def tell(line):
    os.write(1, line.encode() + b"\\n")  # at once, so that lines of several processes are not mixed

def work(number, superior):
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    signal.signal(signal.SIGHUP, lambda *_: tell(f"reload {number}"))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    tell(f"worker {number} {os.getpid()}")
    BEGIN
    superior.ready()
    while not ended:
        superior.alive()
        time.sleep(0.01)
    END
    return 0

sys.exit(Supervisor(count, work, Notifier(), "here", drain_seconds=lambda: drain_seconds).run())
"""


class Supervised:
    """A supervisor and its workers, and what systemd would hear of them."""

    def __init__(self, directory: Path, count: int, begin: str, end: str, drain_seconds: float) -> None:
        self.bad = directory / "notify.bad"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / "notify"))
        # A thread, as systemd lets nobody wait who tells it something.
        self._heard: SimpleQueue[str] = SimpleQueue()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        program = _PROGRAM.replace("BEGIN", begin).replace("END", end)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(count), str(drain_seconds)],
            env={**os.environ, "NOTIFY_SOCKET": str(directory / "notify"), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def workers(self, count: int) -> dict[str, int]:
        """Number → PID of as many workers as tell next."""
        told = [self.line() for _ in range(count)]
        return {number: int(pid) for _, number, pid in told}

    def hear(self, wanted: str) -> str:
        """The next message to systemd that has it."""
        deadline = time.monotonic() + 20
        while True:
            message = self._heard.get(timeout=max(0.0, deadline - time.monotonic()))
            if wanted in message:
                return message

    def _listen(self) -> None:
        while message := self._socket.recv(4096).decode():
            self._heard.put(message)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Its exit status, and all that it said to the journal."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, said

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._socket.close()


Supervise = Callable[..., Supervised]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    made: list[Supervised] = []

    def make(count: int, *, begin: str = "pass", end: str = "pass", drain_seconds: float = 5) -> Supervised:
        made.append(Supervised(tmp_path, count, begin, end, drain_seconds))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_ready_is_said_when_all_workers_are(supervise: Supervise) -> None:
    supervised = supervise(3)
    assert sorted(supervised.workers(3)) == ["0", "1", "2"]
    assert "STATUS=Serving at here with 3 workers." in supervised.hear("READY=1")
    supervised.hear("WATCHDOG=1")


def test_a_worker_that_was_killed_is_replaced_in_its_place(supervise: Supervise) -> None:
    supervised = supervise(2)
    before = supervised.workers(2)
    supervised.hear("READY=1")
    os.kill(before["1"], signal.SIGKILL)
    after = supervised.workers(1)
    assert list(after) == ["1"]
    assert after["1"] != before["1"]
    assert "Not there: 2." in supervised.hear("STATUS=")
    assert supervised.hear("STATUS=").endswith("with 2 workers.")
    status, said = supervised.end()
    assert status == 0
    assert "Worker 2 ended with signal 9, and is started again." in said


def test_no_worker_outlives_the_supervisor(supervise: Supervise) -> None:
    supervised = supervise(2)
    workers = supervised.workers(2)
    supervised.hear("READY=1")
    supervised.process.kill()
    assert eventually(lambda: not any(_runs(pid) for pid in workers.values()))


def test_sigterm_ends_all_of_them_in_peace(supervise: Supervise) -> None:
    supervised = supervise(2, end="tell(f'peace {number}')")
    workers = supervised.workers(2)
    supervised.hear("READY=1")
    supervised.process.terminate()
    assert sorted(supervised.line() for _ in workers) == [["peace", "0"], ["peace", "1"]]
    supervised.hear("STOPPING=1")
    assert supervised.process.wait(10) == 0


def test_who_does_not_end_in_time_is_killed(supervise: Supervise) -> None:
    supervised = supervise(1, end="time.sleep(1000)", drain_seconds=-5)
    [pid] = supervised.workers(1).values()
    supervised.hear("READY=1")
    assert supervised.end()[0] == 0
    assert not _runs(pid)


def test_sighup_reaches_all_workers(supervise: Supervise) -> None:
    supervised = supervise(2)
    supervised.workers(2)
    supervised.hear("READY=1")
    supervised.process.send_signal(signal.SIGHUP)
    assert sorted(supervised.line() for _ in range(2)) == [["reload", "0"], ["reload", "1"]]
    supervised.hear("RELOADING=1")
    supervised.hear("READY=1")


def test_if_no_worker_can_begin_the_service_fails_as_the_worker_did(supervise: Supervise) -> None:
    supervised = supervise(2, begin="os._exit(78) if number else None")
    supervised.workers(2)
    _, said = supervised.process.communicate(timeout=20)
    assert supervised.process.returncode == 78
    assert "could not begin" in said


def test_a_worker_that_cannot_begin_any_more_is_tried_until_it_can(supervise: Supervise) -> None:
    supervised = supervise(2, begin="os._exit(1) if os.path.exists(os.environ['NOTIFY_SOCKET'] + '.bad') else None")
    before = supervised.workers(2)
    supervised.hear("READY=1")
    supervised.bad.touch()
    os.kill(before["0"], signal.SIGKILL)
    for _ in range(3):
        assert list(supervised.workers(1)) == ["0"]
    supervised.bad.unlink()
    supervised.hear("STATUS=Serving at here with 2 workers.")
    assert supervised.end()[0] == 0


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False
