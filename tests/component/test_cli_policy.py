"""The commands that pin, use, evict and show the policy, without systemd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpusvc import names
from gpusvc.state import use
from gpusvc.state.drain import Drain
from gpusvc.state.lease import Lease, LeasedGpu, write
from tests.component.conftest import Machine, eventually
from tests.component.test_cli import Host
from tests.fakegpu import GIB, uuid_of

_MODEL = 'command = ["/bin/true"]\nuser = "root"\n'

# Whatever is in the control group of a model is what this directory says.
_RUN = """
import sys
from pathlib import Path
from gpusvc.linux import cgroup
from gpusvc.cli import run
from gpusvc.paths import Paths
root = Path(sys.argv[1])
cgroup.ROOT = root / "cgroup"
status = run(Paths(config=root / "etc", runtime=root / "run", state=root / "var"), sys.argv[2:])
sys.stdout.flush()
sys.exit(status)
"""


def _group(name: str) -> str:
    return f"/gpusvc.slice/gpusvc-models.slice/{names.scope(name)}"


class UsableHost(Host):
    """A host on which models are made to look ready."""

    def make_ready(self, name: str) -> None:
        self.add_model(name, _MODEL)
        use.prepare(self.paths, name, os.getegid())
        self.processes_of(name).parent.mkdir(parents=True)
        self.processes_of(name).write_text(f"{os.getpid()}\n")
        gpu = LeasedGpu(0, uuid_of(0), GIB, 0)
        write(self.paths, Lease(name, 20001, (gpu,), 1.0, ready=True, address="127.0.0.1", cgroup=_group(name), pid=1))

    def processes_of(self, name: str) -> Path:
        """What stands for its cgroup.procs."""
        return self.root / "cgroup" / _group(name).lstrip("/") / "cgroup.procs"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, running; it ends with the test."""
        return self.machine.start(sys.executable, "-c", _RUN, str(self.root), *arguments)

    def use(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``gpusvc use`` and what came of it."""
        process = self.start("use", *arguments)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def begin_use(self, name: str, *command: str) -> subprocess.Popen[str]:
        """A use whose command waits for its input, and has begun."""
        process = self.start("use", name, "--", *(command or ("cat",)))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("begun\n")
        process.stdin.flush()
        assert process.stdout.readline() == "begun\n"
        return process

    def is_idle(self, name: str) -> bool:
        with Drain(self.paths, name) as drain:
            return drain.wait_idle()


@pytest.fixture
def host(machine: Machine, tmp_path: Path) -> UsableHost:
    return UsableHost(tmp_path / "host", machine)


# ---- pin, unpin ----


def test_a_pin_is_a_file_until_it_is_unpinned(host: UsableHost) -> None:
    host.add_model("qwen")
    done = host.gpusvc("pin", "qwen")
    assert (done.returncode, done.stdout) == (0, "qwen is pinned until the next boot.\n")
    assert host.paths.pin_file("qwen").exists()
    assert host.gpusvc("pin", "qwen").returncode == 0
    done = host.gpusvc("unpin", "qwen")
    assert (done.returncode, done.stdout) == (0, "qwen is pinned no more.\n")
    assert not host.paths.pin_file("qwen").exists()
    assert host.gpusvc("unpin", "qwen").stdout == "qwen is not pinned.\n"


def test_everybody_may_see_a_pin(host: UsableHost) -> None:
    host.add_model("qwen")
    before = os.umask(0o077)
    try:
        host.gpusvc("pin", "qwen")
    finally:
        os.umask(before)
    assert host.paths.pin_file("qwen").parent.stat().st_mode & 0o777 == 0o755


def test_what_its_file_pins_stays_pinned_and_unpin_fails_and_says_so(host: UsableHost) -> None:
    host.add_model("qwen", "pinned = true\n" + _MODEL)
    host.gpusvc("pin", "qwen")
    done = host.gpusvc("unpin", "qwen")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpusvc: qwen stays pinned: its file says so.\n")
    assert str(host.paths.model_file("qwen")) in done.stderr
    assert not host.paths.pin_file("qwen").exists()


# ---- config ----


def test_config_shows_values_with_their_sources(host: UsableHost) -> None:
    host.paths.host_file.write_text('[watchdog]\nidle_timeout = "20min"\n')
    file = host.add_model("qwen", "priority = 5\naliases = ['Qwen/Qwen3']\n" + _MODEL)
    rows = {row["key"]: (row["value"], row["source"]) for row in host.json("config", "Qwen/Qwen3")}
    assert rows["priority"] == ("5", str(file))
    assert rows["idle_timeout"] == ('"20min"', str(host.paths.host_file))
    assert rows["busy_timeout"] == ('"5min"', "default")
    lines = host.gpusvc("config").stdout.splitlines()
    assert lines[0].split() == ["KEY", "SOURCE", "VALUE"]
    assert ["watchdog.idle_timeout", str(host.paths.host_file), '"20min"'] in [line.split() for line in lines]


def test_config_of_a_file_that_is_wrong_fails(host: UsableHost) -> None:
    host.add_model("qwen", "prot = 1\n" + _MODEL)
    done = host.gpusvc("config", "qwen")
    assert (done.returncode, done.stdout) == (1, "")
    assert "prot" in done.stderr


# ---- evict ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Name models"),
        (["qwen", "--gpu", "0"], "Name models"),
        (["qwen", "--vram", "1G"], "Name models"),
        (["--vram", "much"], "'much' is not a size."),
        (["--wait", "long", "qwen"], "'long' is not a duration."),
        (["--gpu", "-1"], "'-1' is not a GPU"),
    ],
)
def test_an_eviction_that_makes_no_sense_exits_2(host: UsableHost, arguments: list[str], sentence: str) -> None:
    host.add_model("qwen")
    done = host.gpusvc("evict", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gpusvc: {sentence}")


def test_without_systemd_nothing_is_evicted(host: UsableHost) -> None:
    host.make_ready("qwen")
    done = host.gpusvc("evict", "qwen")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpusvc: Could not reach the service manager")
    assert host.use("qwen", "--", "true").returncode == 0


# ---- use ----


def test_a_used_model_tells_its_command_where_it_answers(host: UsableHost) -> None:
    host.make_ready("qwen")
    done = host.use("qwen", "--", "sh", "-c", "echo $GPUSVC_MODEL $GPUSVC_PORT $GPUSVC_URL")
    assert (done.returncode, done.stdout, done.stderr) == (0, "qwen 20001 http://127.0.0.1:20001\n", "")


@pytest.mark.parametrize("dashes", [["--"], []])
def test_the_options_of_the_command_are_its_own(host: UsableHost, dashes: list[str]) -> None:
    host.make_ready("qwen")
    assert host.use("qwen", *dashes, "echo", "--help", "--", "-x").stdout == "--help -- -x\n"


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM)])
def test_the_command_ends_gpusvc_as_itself(host: UsableHost, script: str, status: int) -> None:
    host.make_ready("qwen")
    assert host.use("qwen", "--", "sh", "-c", script).returncode == status


def test_the_command_gets_the_signals_that_are_sent_to_gpusvc(host: UsableHost) -> None:
    host.make_ready("qwen")
    script = 'trap "echo caught; exit 3" USR1; read line; echo $line; while :; do read line; done'
    process = host.begin_use("qwen", "sh", "-c", script)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=30)[0] == "caught\n"
    assert process.returncode == 3


def test_signals_that_python_ignores_are_not_ignored_by_the_command(host: UsableHost) -> None:
    host.make_ready("qwen")
    ignored = host.use("qwen", "--", "grep", "SigIgn", "/proc/self/status").stdout.split()[1]
    assert int(ignored, 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_a_model_is_in_use_until_the_command_ends(host: UsableHost) -> None:
    host.make_ready("qwen")
    process = host.begin_use("qwen")
    assert use.is_used(host.paths, "qwen")
    process.communicate(timeout=30)
    assert eventually(lambda: host.is_idle("qwen"))


def test_a_use_ends_with_a_sigkill(host: UsableHost) -> None:
    host.make_ready("qwen")
    process = host.begin_use("qwen")
    assert not host.is_idle("qwen")
    process.kill()
    assert eventually(lambda: host.is_idle("qwen"))


def test_children_that_the_command_leaves_behind_do_not_use_the_model(host: UsableHost) -> None:
    host.make_ready("qwen")
    done = host.use("qwen", "--", "sh", "-c", "sleep 60 > /dev/null 2>&1 & echo $!")
    try:
        assert eventually(lambda: host.is_idle("qwen"))
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_progress_is_told_as_long_as_the_command_runs(host: UsableHost) -> None:
    host.make_ready("qwen")
    process = host.begin_use("qwen")
    os.utime(host.paths.lease_directory("qwen") / "use", (1.0, 1.0))
    assert eventually(lambda: (use.last_progress(host.paths, "qwen") or 0) > time.time() - 60)
    process.communicate(timeout=30)
    assert eventually(lambda: host.is_idle("qwen"))


def test_the_command_has_no_child_of_gpusvcs_and_its_pipes_for_itself(host: UsableHost) -> None:
    host.make_ready("qwen")
    process = host.begin_use("qwen")
    assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() == ""
    process.kill()
    assert process.communicate(timeout=30) == ("", "")


def test_a_use_waits_at_a_closed_door_and_says_so(host: UsableHost) -> None:
    host.make_ready("qwen")
    with Drain(host.paths, "qwen") as drain:
        assert drain.wait_idle()
        process = host.start("use", "qwen", "--", "echo", "in")
        assert process.stderr is not None
        assert process.stderr.readline() == "qwen: Waiting until its eviction is over, or given up.\n"
        assert process.poll() is None
    assert process.communicate(timeout=30)[0] == "in\n"


def _stop(host: UsableHost) -> None:
    host.processes_of("qwen").write_text("")


def _unlearn(host: UsableHost) -> None:
    for file in ("door", "use"):
        (host.paths.lease_directory("qwen") / file).unlink()


@pytest.mark.parametrize("state", [_stop, _unlearn], ids=["it ended", "it was never started"])
def test_a_model_that_is_not_ready_is_started(host: UsableHost, state: Callable[[UsableHost], None]) -> None:
    host.make_ready("qwen")
    state(host)
    host.machine.environment["DBUS_SYSTEM_BUS_ADDRESS"] = "unix:path=/nonexistent/bus"
    done = host.use("qwen", "--", "echo", "never")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpusvc: Could not reach the service manager")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["qwen"], 2), (["qwen", "--"], 2), (["qwne", "true"], 3), (["qwen", "--", "no-such-command"], 127)],
)
def test_what_cannot_be_run_is_told_before_anything_is_started(
    host: UsableHost, arguments: list[str], status: int
) -> None:
    host.add_model("qwen")
    done = host.use(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert "systemd" not in done.stderr


def test_a_pin_follows_no_link(host: Host) -> None:
    host.add_model("qwen", _MODEL)
    file = host.paths.pin_file("qwen")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(host.paths.runtime / "nologin")
    assert host.gpusvc("pin", "qwen").returncode != 0
    assert not (host.paths.runtime / "nologin").exists()
