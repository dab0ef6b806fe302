"""The hooks' daemon with real hooks, on a journalctl that follows a file."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.component.conftest import eventually

ROOT = Path(__file__).parents[2]

_RUN = """
import sys
from pathlib import Path
from gpusvc.hooks import daemon as hooks
from gpusvc.errors import GpusvcError
from tests.component.children import ChildRunner
from gpusvc.systemd.notify import Notifier
from gpusvc.paths import Paths
root = Path(sys.argv[1])
paths = Paths(config=root / "etc", runtime=root / "run", state=root / "var")
try:
    sys.exit(hooks.HookDaemon(paths, Notifier(), ChildRunner(), queue_length=3).run())
except GpusvcError as error:
    sys.exit(str(error))
"""

# From the entry with the cursor on, that entry included, as journalctl does it.
_JOURNALCTL = r"""#!/bin/sh
cursor=$(printf '%s\n' "$@" | sed -n 's/^--cursor=//p')
case "$*" in
*--follow*)
    first=$(grep -n -F "\"$cursor\"" JOURNAL | cut -d: -f1)
    exec tail -n "+${first:-1}" -f JOURNAL ;;
*)
    exec tail -n 1 JOURNAL ;;
esac
"""


class Host:
    """A machine with a directory of hooks and a journal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hooks = root / "etc/hooks.d"
        self.hooks.mkdir(parents=True)
        self.hooks.chmod(0o755)
        self.journal = root / "journal"
        self.journal.touch()
        self.log = root / "log"
        self.log.touch()
        self.cursor = root / "var/hooks/cursor"
        self.programs = root / "bin"
        self.programs.mkdir()
        journalctl = self.programs / "journalctl"
        journalctl.write_text(_JOURNALCTL.replace("JOURNAL", str(self.journal)))
        journalctl.chmod(0o755)
        self._number = 0
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(root / "notify"))
        self._notified.settimeout(30)

    def add_hook(self, name: str, script: str) -> Path:
        file = self.hooks / name
        file.write_text(f"#!/bin/sh\ncd {self.root}\n{script}\n")
        file.chmod(0o755)
        return file

    def happens(self, *models: str, **fields: str) -> None:
        """One event for each of ``models``."""
        lines = []
        for model in models:
            self._number += 1
            entry = {
                "__CURSOR": f"s=1;i={self._number:x}",
                "__REALTIME_TIMESTAMP": "1795225900066668",
                "GPUSVC_EVENT": "ready",
                "GPUSVC_MODEL": model,
                "MESSAGE": "Ready.",
            }
            lines.append(json.dumps(entry | fields) + "\n")
        with self.journal.open("a") as journal:
            journal.write("".join(lines))

    def spawn(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-c", _RUN, str(self.root)],
                env={
                    **os.environ,
                    "PATH": f"{self.programs}:/usr/bin:/bin",
                    "PYTHONPATH": str(ROOT),
                    "NOTIFY_SOCKET": str(self.root / "notify"),
                },
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def start(self) -> subprocess.Popen[bytes]:
        """A daemon that is ready."""
        daemon = self.spawn()
        while not self._notified.recv(4096).startswith(b"READY=1"):
            pass
        return daemon

    def stop(self, daemon: subprocess.Popen[bytes]) -> int:
        daemon.terminate()
        return daemon.wait(30)

    def read(self, name: str) -> list[str]:
        """The lines that hooks wrote to a file."""
        file = self.root / name
        return file.read_text().splitlines() if file.exists() else []

    def warnings(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("<")]

    @contextmanager
    def hooks_held(self) -> Iterator[None]:
        """Hooks that call ``flock --shared gate true`` wait until the end of this."""
        with (self.root / "gate").open("a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        for daemon in self._daemons:
            if daemon.poll() is None:
                self.stop(daemon)
        self._notified.close()
        # A daemon that does what it should leaves none.
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "cwd").readlink().is_relative_to(self.root):
                    os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.close()


def lives(pid: str) -> bool:
    """Whether that process is there, and no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_each_hook_is_told_of_each_event_in_order(host: Host) -> None:
    host.add_hook("one", 'echo "$GPUSVC_EVENT $GPUSVC_MODEL $GPUSVC_GPU" >> one')
    host.add_hook("two", 'echo "$GPUSVC_MESSAGE $# $(pwd)" >> two')
    host.start()
    host.happens("a", GPUSVC_GPU="1")
    host.happens("b", MESSAGE="Two\nlines.")
    assert eventually(lambda: len(host.read("two")) == 3)
    assert host.read("one") == ["ready a 1", "ready b "]
    assert host.read("two") == [f"Ready. 0 {host.root}", "Two", f"lines. 0 {host.root}"]
    assert host.warnings() == []


def test_the_next_event_waits_for_the_hooks_of_the_last(host: Host) -> None:
    host.add_hook("slow", "echo $GPUSVC_MODEL >> slow; flock --shared gate true; echo done >> slow")
    host.start()
    with host.hooks_held():
        host.happens("a", "b")
        assert eventually(lambda: host.read("slow") == ["a"])
    assert eventually(lambda: host.read("slow") == ["a", "done", "b", "done"])


def test_four_hooks_of_an_event_run_side_by_side(host: Host) -> None:
    for number in range(6):
        host.add_hook(f"hook{number}", f"echo {number} >> began; flock --shared gate true; echo {number} >> ended")
    host.start()
    with host.hooks_held():
        host.happens("a")
        assert eventually(lambda: len(host.read("began")) == 4)
        assert sorted(host.read("began")) == ["0", "1", "2", "3"]
    assert eventually(lambda: len(host.read("ended")) == 6)


def test_a_hook_that_fails_is_a_warning_and_the_others_run(host: Host) -> None:
    host.add_hook("exits", "exit 3")
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.start()
    host.happens("a", "b")
    assert eventually(lambda: len(host.warnings()) == 2 and host.read("told") == ["a", "b"])
    assert host.warnings() == [f"<4>exits failed for ready of {model}: exit status 3." for model in "ab"]


def test_a_flood_drops_the_oldest(host: Host) -> None:
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.happens("before")
    host.stop(host.start())
    host.happens("a", "b", "c", "d", "e", "f", "g")
    host.start()
    assert eventually(lambda: host.read("told")[-1:] == ["g"])
    assert host.read("told") == ["e", "f", "g"]
    assert host.warnings() == ["<4>Hooks are too slow: the oldest 4 of the events that waited were dropped."]


def test_sigterm_ends_the_hooks_that_run(host: Host) -> None:
    host.add_hook("hangs", "echo $$ >> pids; exec sleep 1000")
    daemon = host.start()
    host.happens("a")
    assert eventually(lambda: len(host.read("pids")) == 1)
    assert host.stop(daemon) == 0
    assert not any(map(lives, host.read("pids")))
    assert host.warnings() == ["<5>hangs was ended while it ran for ready of a: the service stops."]


def test_sigterm_ends_a_daemon_that_waits(host: Host) -> None:
    assert host.stop(host.start()) == 0


def test_no_event_is_lost_or_seen_twice_over_a_restart(host: Host) -> None:
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.happens("before")
    daemon = host.start()
    host.happens("a")
    assert eventually(lambda: host.read("told") == ["a"])
    host.stop(daemon)
    host.happens("b")
    host.start()
    host.happens("c")
    assert eventually(lambda: len(host.read("told")) == 3)
    assert host.read("told") == ["a", "b", "c"]


def test_nothing_that_happened_before_the_first_start_is_seen_not_even_after_a_restart(host: Host) -> None:
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.happens("long", "ago")
    host.stop(host.start())
    host.happens("between")
    host.start()
    assert eventually(lambda: host.read("told") == ["between"])


def test_after_sigkill_what_ran_does_not_run_again_and_what_waited_runs(host: Host) -> None:
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told; flock --shared gate true")
    daemon = host.start()
    with host.hooks_held():
        host.happens("a", "b")
        assert eventually(lambda: host.read("told") == ["a"])
        os.killpg(daemon.pid, signal.SIGKILL)  # with its journalctl, as its control group would be
        daemon.wait(30)
    host.start()
    assert eventually(lambda: host.read("told") == ["a", "b"])


def test_a_broken_cursor_means_only_new_events(host: Host) -> None:
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.happens("before")
    host.cursor.parent.mkdir(parents=True)
    host.cursor.write_text("--file=/dev/zero\n")
    host.start()
    host.happens("a")
    assert eventually(lambda: host.read("told") == ["a"])
    assert host.warnings() == [f"<4>{host.cursor} holds no cursor: hooks run for new events only."]


def test_hooks_may_come_and_go_while_it_runs(host: Host) -> None:
    first = host.add_hook("first", "echo first $GPUSVC_MODEL >> told")
    host.start()
    host.happens("a")
    assert eventually(lambda: host.read("told") == ["first a"])
    host.add_hook("second", "echo second $GPUSVC_MODEL >> told")
    first.unlink()
    host.happens("b")
    assert eventually(lambda: host.read("told") == ["first a", "second b"])


def test_what_others_may_write_to_is_passed_over_with_one_warning(host: Host) -> None:
    host.add_hook("open", "echo open >> told").chmod(0o775)
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.start()
    host.happens("a", "b")
    assert eventually(lambda: host.read("told") == ["a", "b"])
    path = host.hooks / "open"
    assert host.warnings() == [f"<4>{path} is not run: it must belong to root, and no other user may write to it."]


def test_a_directory_that_others_may_write_to_holds_no_hooks(host: Host) -> None:
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.hooks.chmod(0o777)
    host.start()
    host.happens("a")
    assert eventually(lambda: bool(host.warnings()))
    host.hooks.chmod(0o755)
    host.happens("b")
    assert eventually(lambda: host.read("told") == ["b"])


def test_what_is_no_program_is_no_hook(host: Host) -> None:
    (host.hooks / "README").write_text("Hooks go here.")
    (host.hooks / "directory").mkdir()
    (host.hooks / "dangling").symlink_to("nowhere")
    host.add_hook("tell.bak", "echo backup >> told")
    host.add_hook("tell", "echo $GPUSVC_MODEL >> told")
    host.start()
    host.happens("a", "b")
    assert eventually(lambda: host.read("told") == ["a", "b"])
    assert host.warnings() == []


def test_without_journalctl_it_ends_and_says_so(host: Host) -> None:
    daemon = host.start()
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    assert daemon.wait(30) == 1
    assert re.match("<3>journalctl ended with exit status -9", host.warnings()[0])
    (host.programs / "journalctl").write_text("#!/bin/sh\nexit 1\n")
    assert host.spawn().wait(30) == 1
