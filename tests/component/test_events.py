"""Events on their way: into a socket like journald's, and out of a journalctl that is a stand-in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpusvc.errors import GpusvcError
from gpusvc.journal import events, journalctl
from gpusvc.journal.events import MESSAGE_IDS, EventType, emit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where events go, as datagrams."""
    address = str(tmp_path / "socket")
    monkeypatch.setattr(events, "_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(10)
        yield receiver


# ---- emit ----


def test_an_event_is_one_entry_with_its_fields(journald: socket.socket) -> None:
    emit(EventType.EVICT, "Evicting.", model="qwen", gpu=[0, 2], bytes=1024, reason="room for b", level=4)
    assert journald.recv(65536).decode().splitlines() == [
        "MESSAGE=Evicting.",
        f"MESSAGE_ID={MESSAGE_IDS[EventType.EVICT]}",
        "PRIORITY=4",
        "SYSLOG_FACILITY=3",
        "SYSLOG_IDENTIFIER=gpusvc",
        f"SYSLOG_PID={os.getpid()}",
        "GPUSVC_EVENT=evict",
        "GPUSVC_MODEL=qwen",
        "OBJECT_SYSTEMD_UNIT=model@qwen.service",
        "GPUSVC_GPU=0",
        "GPUSVC_GPU=2",
        "GPUSVC_BYTES=1024",
        "GPUSVC_REASON=room for b",
    ]


def test_what_is_not_known_is_not_said(journald: socket.socket) -> None:
    emit(EventType.PRESSURE, "No room.", model=None)
    assert [line.partition("=")[0] for line in journald.recv(65536).decode().splitlines()] == [
        "MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_FACILITY", "SYSLOG_IDENTIFIER", "SYSLOG_PID", "GPUSVC_EVENT",
    ]  # fmt: skip


def test_several_lines_are_one_entry(journald: socket.socket) -> None:
    emit(EventType.UNRELEASED, "Stuck.\nPID 7.", model="qwen")
    assert journald.recv(65536).startswith(b"MESSAGE\n\x0d\0\0\0\0\0\0\0Stuck.\nPID 7.\nMESSAGE_ID=")


def test_without_a_journal_stderr_gets_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(events, "_SOCKET", str(tmp_path / "none"))
    emit(EventType.STUCK, "Stuck.\nPID 7.", model="qwen", level=3)
    assert capsys.readouterr().err == "<3>Stuck.\n<3>PID 7.\n"


def test_a_journal_that_does_not_read_holds_nobody_up(
    journald: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    # The kernel keeps net.unix.max_dgram_qlen datagrams for it, at least 10; the sender waits for more.
    while not capsys.readouterr().err and time.monotonic() < began + 30:
        emit(EventType.READY, "Ready.", model="qwen")
    last = time.monotonic()
    emit(EventType.READY, "Ready.", model="qwen")
    assert time.monotonic() - last < 2
    assert capsys.readouterr().err == "<6>Ready.\n"


# ---- the command ----

_RUN = """
import sys
from pathlib import Path
from gpusvc.cli import app, events, run
from gpusvc.paths import Paths
app.command("events")(events.events)
root = Path(sys.argv[1])
sys.exit(run(Paths(config=root / "etc", runtime=root / "run", state=root / "var"), sys.argv[2:]))
"""

_MODEL = 'command = ["/bin/true"]\nuser = "root"\naliases = ["Qwen/Qwen3"]\n[gpu]\ncount = 0\n'


class Host:
    """A machine with the model qwen, whose journalctl prints what it is given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "etc/models").mkdir(parents=True)
        (root / "etc/models/qwen.toml").write_text(_MODEL)
        self.journal = root / "journal"
        self.asked = root / "asked"
        self.programs = root / "bin"
        self.programs.mkdir()
        self.install(f'printf "%s\\n" "$@" > {self.asked}\nexec cat {self.journal}\n')

    def install(self, script: str) -> None:
        stub = self.programs / "journalctl"
        stub.write_text("#!/bin/sh\n" + script)
        stub.chmod(0o755)

    def happened(self, **fields: Any) -> None:
        entry = {"__CURSOR": "s=1;i=1", "__REALTIME_TIMESTAMP": "1795225900066668", "GPUSVC_EVENT": "ready"}
        with self.journal.open("a") as journal:
            journal.write(json.dumps(entry | fields) + "\n")

    def gpusvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _RUN, str(self.root), *arguments],
            env={**os.environ, "PATH": f"{self.programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TZ": "UTC"},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_events_are_lines_in_the_order_of_the_journal(host: Host) -> None:
    host.happened(GPUSVC_MODEL="qwen", GPUSVC_GPU=["0", "1"], GPUSVC_BYTES="9663676416", MESSAGE="Ready after 2 s.")
    host.happened(
        GPUSVC_EVENT="evict", GPUSVC_MODEL="qwen", MESSAGE="Evicting.\nFor \x1b[1mb.", GPUSVC_REASON="room for b"
    )
    done = host.gpusvc("events")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "2026-11-21 01:51:40  ready       qwen              0,1      9.0 GiB  Ready after 2 s.",
        "2026-11-21 01:51:40  evict       qwen              -              -  Evicting. (room for b)",
        "    For �[1mb.",
    ]


def test_events_as_json_are_an_array(host: Host) -> None:
    host.happened(GPUSVC_MODEL="qwen", GPUSVC_GPU="0", GPUSVC_BYTES="5", MESSAGE="Ready.", GPUSVC_REASON="why")
    assert json.loads(host.gpusvc("events", "--json").stdout) == [
        {
            "time": "2026-11-21T01:51:40.066+00:00",
            "event": "ready",
            "model": "qwen",
            "gpus": [0],
            "bytes": 5,
            "reason": "why",
            "level": 6,
            "message": "Ready.",
        }
    ]


def test_no_events_are_no_lines(host: Host) -> None:
    host.journal.touch()
    assert host.gpusvc("events").stdout == ""
    assert json.loads(host.gpusvc("events", "--json").stdout) == []


def test_followed_events_as_json_are_an_object_a_line(host: Host) -> None:
    host.happened(MESSAGE="one")
    host.happened(MESSAGE="two")
    done = host.gpusvc("events", "-f", "--json")
    assert [json.loads(line)["message"] for line in done.stdout.splitlines()] == ["one", "two"]
    assert "--follow" in host.asked.read_text().splitlines()


def test_events_of_one_model_are_asked_for_by_its_name_or_alias(host: Host) -> None:
    host.journal.touch()
    host.gpusvc("events", "Qwen/Qwen3", "-n", "5", "--since", "today")
    asked = host.asked.read_text().splitlines()
    assert {"GPUSVC_MODEL=qwen", "--lines=5", "--since=today"} < set(asked)


def test_events_of_an_unknown_model_are_an_error(host: Host) -> None:
    assert host.gpusvc("events", "nobody").returncode == 3


def test_a_journal_that_cannot_be_read_is_an_error(host: Host) -> None:
    host.install("echo no journal >&2; exit 1\n")
    done = host.gpusvc("events")
    assert done.returncode in {1, 4}
    assert done.stderr.startswith("no journal\ngpusvc: The journal cannot be read")


def test_a_reader_who_has_seen_enough_ends_the_command(host: Host) -> None:
    host.happened(MESSAGE="one")
    host.install(f"while cat {host.journal}; do :; done\n")
    command = [sys.executable, "-c", _RUN, str(host.root), "events", "-f"]
    environment = {**os.environ, "PATH": f"{host.programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(b"one\n")
        process.stdout.close()
        assert process.wait(30) == 1


# ---- where the journal ends ----


def test_the_newest_cursor_is_that_of_the_last_entry(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{host.programs}:/usr/bin:/bin")
    host.journal.write_text('{"__CURSOR": "s=1;i=7", "MESSAGE_ID": "x"}\n')
    assert journalctl.newest_cursor(30) == "s=1;i=7"
    host.journal.write_text("")
    assert journalctl.newest_cursor(30) is None
    host.install("exit 1\n")
    with pytest.raises(GpusvcError, match="exit status 1"):
        journalctl.newest_cursor(30)
    monkeypatch.setenv("PATH", str(host.root))
    with pytest.raises(GpusvcError, match="cannot be run: No such file"):
        journalctl.newest_cursor(30)
