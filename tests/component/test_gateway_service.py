"""A gateway's process from its start to its end, with sockets that somebody else holds, as systemd does."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpusvc.config import keys
from tests.component.conftest import ROOT, eventually

# Its paths are the test's, and its socket is put where systemd would put it.
_PROGRAM = """
import os, sys
from pathlib import Path
from gpusvc.gateway import __main__
from gpusvc.paths import Paths
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
root = Path(sys.argv[2])
paths = Paths(config=root / "etc", runtime=root / "run", state=root / "state")
Paths.system = classmethod(lambda _: paths)
sys.exit(__main__.main())
"""

Start = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener


@pytest.fixture
def start(listener: socket.socket, tmp_path: Path) -> Iterator[Start]:
    for directory in ("etc/models", "run/gateway", "run/models"):
        (tmp_path / directory).mkdir(parents=True)
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(listener.fileno()), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


Connect = Callable[[], http.client.HTTPConnection]


@pytest.fixture
def connect(listener: socket.socket) -> Iterator[Connect]:
    """A new connection, whether anybody takes it or not."""
    with ExitStack() as stack:

        def connect() -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=30)
            stack.callback(connection.close)
            connection.connect()
            return connection

        yield connect


def get(connection: http.client.HTTPConnection, path: str = "/v1/models") -> int:
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def configure(tmp_path: Path, *lines: str) -> None:
    (tmp_path / "etc/gpusvc.toml").write_text("\n".join(("[gateway]", *lines, "")))


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


@pytest.mark.parametrize("workers", [1, 2])
def test_connections_that_nobody_took_are_for_the_next_one(
    start: Start, connect: Connect, tmp_path: Path, workers: int
) -> None:
    configure(tmp_path, f"workers = {workers}")
    early = connect()
    first = start()
    assert get(early) == 200
    assert end(first) == (0, "")
    waiting = [connect() for _ in range(8)]
    for connection in waiting:
        connection.request("GET", "/v1/models")
    start()
    for connection in waiting:
        assert connection.getresponse().status == 200


def test_a_client_that_just_came_is_answered_before_the_end(start: Start, connect: Connect) -> None:
    process = start()
    assert get(connect()) == 200  # it runs
    late = connect()
    process.terminate()
    assert get(late) == 200
    assert process.wait(30) == 0


def test_keys_and_settings_are_read_again_while_it_runs(start: Start, connect: Connect, tmp_path: Path) -> None:
    process = start()
    client = connect()
    assert get(client) == 200
    with keys.editing(tmp_path / "etc/keys.toml", os.getgid()) as known:
        known["alice"], _ = keys.make("alice")
    assert eventually(lambda: get(client) == 401)
    assert process.stderr is not None
    configure(tmp_path, "workers = 2", 'cors_origins = "*"')
    said = process.stderr.readline()
    assert "cors_origins" in said
    assert said.endswith("It stays as it was.\n")
    configure(tmp_path, "workers = 2")
    assert "count from the next start" in process.stderr.readline()
    process.send_signal(signal.SIGHUP)
    assert get(client, "/health") == 200
    assert end(process) == (0, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gateway]\nworkers = 0\n", "gateway.workers"),
        ('[gateway]\ntls_certificate = "/none"\ntls_key = "/none"\n', "tls_certificate /none cannot be read"),
    ],
)
def test_what_is_wrong_with_the_configuration_ends_it_for_good(
    start: Start, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "etc").mkdir(exist_ok=True)
    (tmp_path / "etc/gpusvc.toml").write_text(text)
    process = start()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 78
    assert told.startswith("<3>")
    assert said in told
