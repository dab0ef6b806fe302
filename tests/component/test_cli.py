"""The command as its users run it, on a machine with simulated GPUs and without systemd."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpusvc import cli
from gpusvc.cli.commands.lifecycle import StillGoingError, going_on
from gpusvc.cli.progress import Progress
from gpusvc.cli.table import age, shortened, table
from gpusvc.errors import GpusvcError, UnknownModelError
from gpusvc.linux.processes import Process
from gpusvc.paths import Paths
from gpusvc.printable import printable
from gpusvc.state import lease
from gpusvc.state.lease import Lease, LeasedGpu
from tests.component.conftest import Machine
from tests.fakegpu import GIB, FakeGpu, Return, uuid_of

# No bus is there: whatever needs systemd has to say so.
_NO_BUS = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus"}

_RUN = """
import sys
from pathlib import Path
from gpusvc.cli import run
from gpusvc.paths import Paths
root = Path(sys.argv[1])
status = run(Paths(config=root / "etc", runtime=root / "run", state=root / "var"), sys.argv[2:])
sys.stdout.flush()
sys.stderr.write(sys.modules.get("rich") and "rich was loaded" or "")
sys.exit(status)
"""

# A PID that no process can have (proc_sys_kernel(5): pid_max is 2^22 at most).
_DEAD = 1 << 22

_MODEL = 'command = ["/bin/sh", "-c", "exit 1"]\nuser = "root"\n[gpu]\ncount = 0\n'


class Host:
    """Directories like those of an installed gpusvc, and the command that looks there."""

    def __init__(self, root: Path, machine: Machine) -> None:
        self.root = root
        self.machine = machine
        self.paths = Paths(config=root / "etc", runtime=root / "run", state=root / "var")
        self.paths.models_directory.mkdir(parents=True)

    def gpusvc(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _RUN, str(self.root), *arguments],
            env={**self.machine.environment, **_NO_BUS, **environment},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def json(self, *arguments: str) -> Any:
        done = self.gpusvc(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def add_model(self, name: str, text: str = _MODEL) -> Path:
        file = self.paths.model_file(name)
        file.write_text(text)
        return file

    def add_lease(self, name: str, *pids: int, index: int = 0, reserved: int | None = None) -> None:
        held = LeasedGpu(index, uuid_of(index), reserved, 0)
        processes = frozenset(Process(pid, 1) for pid in pids)
        lease.write(self.paths, Lease(name, 20001, (held,), 1.0, pid=pids[0], processes=processes))


@pytest.fixture
def host(machine: Machine, tmp_path: Path) -> Host:
    return Host(tmp_path / "host", machine)


# ---- usage ----


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version_is_printed(host: Host, option: str) -> None:
    done = host.gpusvc(option)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gpusvc 0.")


def test_help_names_every_command_and_loads_no_rich(host: Host) -> None:
    done = host.gpusvc("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lifecycle = ("start", "stop", "restart", "evict", "pin", "unpin", "use", "release")
    views = ("ps", "list", "status", "logs", "events", "gpus", "config", "check")
    assert [name for name in (*lifecycle, *views) if f"\n  {name} " not in done.stdout] == []


@pytest.mark.parametrize("words", [[], ["start"], ["key", "add"]])
def test_help_is_a_command_too(host: Host, words: list[str]) -> None:
    asked, optioned = host.gpusvc("help", *words), host.gpusvc(*words, "--help")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, optioned.stdout, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["start", "--nonsense"],
        ["start"],
        ["start", "--all", "qwen"],
        ["status"],
        ["release"],
        ["start", "../qwen"],
        ["stop", "-x"],
    ],
)
def test_wrong_usage_exits_2_and_says_why(host: Host, arguments: list[str]) -> None:
    host.add_model("qwen")
    done = host.gpusvc(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_modules_that_a_command_needs_are_loaded() -> None:
    code = "import sys, gpusvc.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unwanted = {
        "rich",
        "pystemd",
        "psutil",
        "pynvml",
        "tomllib",
        "gpusvc.systemd.manager",
        "gpusvc.gpu.nvml",
        "gpusvc.config.files",
    }
    loaded = set(done.stdout.split()) - {"rich"}  # it stands there as None: not to be loaded
    assert loaded & unwanted == set()


def test_a_command_between_two_versions_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gpusvc.status.inventory", None)
    monkeypatch.delattr("gpusvc.status.inventory", raising=False)
    assert cli.run(Paths.system(), ["ps"]) == 1
    assert capsys.readouterr().err == (
        "gpusvc: Its files are being replaced by another version.\nRun the command again.\n"
    )


# ---- which model ----


@pytest.mark.parametrize("command", ["start", "logs", "release"])
def test_an_unknown_model_exits_3_and_the_nearest_is_suggested(host: Host, command: str) -> None:
    host.add_model("qwen")
    done = host.gpusvc(command, "qwne")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "gpusvc: There is no model 'qwne'.\n  Did you mean 'qwen'?\n"


@pytest.mark.parametrize("text", ["qwen", "model@qwen", "model@qwen.service", "Qwen/Qwen3-8B"])
def test_a_model_goes_by_its_name_its_unit_and_its_aliases(host: Host, text: str) -> None:
    host.add_model("qwen", 'aliases = ["Qwen/Qwen3-8B"]\n' + _MODEL)
    host.add_model("broken", "aliases = 3")
    done = host.gpusvc("release", text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "qwen holds nothing.\n", "")


def test_a_model_without_a_file_is_known_as_long_as_it_holds_something(host: Host) -> None:
    host.add_lease("gone", _DEAD)
    done = host.gpusvc("release", "gone")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gone is released after ")
    assert host.gpusvc("release", "gone").returncode == 3


def test_the_shell_completes_names_of_models(host: Host) -> None:
    host.add_model("qwen")
    host.add_model("llama")
    host.add_lease("quince", _DEAD)
    words = {"COMP_WORDS": "gpusvc stop q", "COMP_CWORD": "2", "_GPUSVC_COMPLETE": "complete_bash"}
    assert host.gpusvc(**words).stdout.split() == ["quince", "qwen"]


# ---- systemd is not there ----


@pytest.mark.parametrize("arguments", [["start", "qwen"], ["stop", "qwen"], ["restart", "qwen"], ["ps"], ["list"]])
def test_without_systemd_one_sentence_and_a_hint_say_so(host: Host, arguments: list[str]) -> None:
    host.add_model("qwen")
    done = host.gpusvc(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    sentence, hint = done.stderr.splitlines()
    assert sentence.startswith("gpusvc: Could not reach the service manager")
    assert hint.startswith("  gpusvc needs systemd")


def test_without_journalctl_logs_say_so(host: Host, tmp_path: Path) -> None:
    host.add_model("qwen")
    done = host.gpusvc("logs", "qwen", PATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "gpusvc: journalctl cannot be run: No such file or directory.\n")


def test_logs_hand_their_options_to_journalctl(host: Host, tmp_path: Path) -> None:
    host.add_model("qwen")
    stub = tmp_path / "journalctl"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = host.gpusvc("logs", "qwen", "-f", "-n", "5", PATH=path)
    assert done.stdout.split("\n") == ["--unit=model@qwen.service", "--follow", "--lines=5", ""]
    # With both, and an answer to where that begins.
    answer = """case "$*" in *--reverse*) echo '{"__CURSOR": "s=1"}'; exit;; esac"""
    stub.write_text(f'#!/bin/sh\n{answer}\nprintf "%s\\n" "$@"\n')
    done = host.gpusvc("logs", "qwen", "-n", "5", "--since", "today", PATH=path)
    assert done.stdout.split("\n") == ["--unit=model@qwen.service", "--cursor=s=1", ""]
    # And without one, which is for journalctl to explain.
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    done = host.gpusvc("logs", "qwen", "-n", "5", "--since", "today", PATH=path)
    assert done.stdout.split("\n") == ["--unit=model@qwen.service", "--lines=5", "--since=today", ""]


# ---- configuration ----


def test_check_counts_what_is_fine(host: Host) -> None:
    host.add_model("qwen")
    host.add_model("llama")
    done = host.gpusvc("check")
    assert (done.returncode, done.stdout) == (0, "2 models are fine.\n")
    assert host.gpusvc("check", str(host.paths.model_file("qwen"))).stdout == "1 file is fine.\n"


def test_check_gives_advice_on_files_that_are_right(host: Host) -> None:
    file = host.add_model("qwen", "port = 8080\n" + _MODEL)
    file.chmod(0o600)
    done = host.gpusvc("check")
    assert (done.returncode, done.stdout) == (0, "1 model is fine.\n")
    (line,) = (line for line in done.stderr.splitlines() if "as root" not in line)
    assert line.startswith(f"Note: {file}: Its mode is 0600: the gateway, the API and the watchdog cannot read it")


def test_check_finds_everything_in_one_go_a_line_each(host: Host) -> None:
    one = host.add_model("one", "prot = 1\n" + _MODEL)
    two = host.add_model("two", "port = 70000\n" + _MODEL)
    done = host.gpusvc("check")
    assert (done.returncode, done.stderr) == (1, "")
    assert [line.split(" ")[:2] for line in done.stdout.splitlines()] == [
        [f"{one}:", "prot:"],
        [f"{two}:", "port:"],
    ]
    found = host.gpusvc("check", "--json")
    assert found.returncode == 1
    assert [(problem["file"], problem["key"]) for problem in json.loads(found.stdout)] == [
        (str(one), "prot"),
        (str(two), "port"),
    ]


# ---- GPUs ----


def test_gpus_are_shown_with_models_and_strangers_and_what_each_holds(host: Host) -> None:
    stranger = host.machine.holder("1GiB")
    host.machine.gpus.change(0, ghosts={_DEAD: 3 * GIB, _DEAD + 1: 2 * GIB}, utilisation=37)
    host.add_lease("qwen", _DEAD, _DEAD + 1, reserved=9 * GIB)
    (gpu,) = host.json("gpus")
    assert (gpu["index"], gpu["uuid"], gpu["total_bytes"]) == (0, uuid_of(0), 24 * GIB)
    assert (gpu["used_bytes"], gpu["reserved_bytes"], gpu["utilisation_percent"]) == (6 * GIB, 9 * GIB, 37)
    assert gpu["holders"] == [
        {"model": "qwen", "pid": _DEAD, "command": None, "vram_bytes": 5 * GIB, "reserved_bytes": 9 * GIB},
        {"model": None, "pid": stranger.pid, "command": "cat", "vram_bytes": GIB, "reserved_bytes": None},
    ]
    lines = host.gpusvc("gpus").stdout.splitlines()
    assert lines[0].split() == ["GPU", "NAME", "TOTAL", "USED", "FREE", "RESERVED", "LOAD", "HELD", "BY"]
    assert lines[1].endswith("37 %  qwen: 5.0 GiB")
    assert lines[2].strip() == f"PID {stranger.pid} (cat): 1.0 GiB"


def test_a_process_that_got_the_pid_of_a_dead_one_is_a_stranger(host: Host) -> None:
    stranger = host.machine.holder("1GiB")
    host.add_lease("qwen", stranger.pid)  # which started at another time
    (gpu,) = host.json("gpus")
    assert [(holder["model"], holder["vram_bytes"]) for holder in gpu["holders"]] == [("qwen", 0), (None, GIB)]


def test_a_gpu_that_cannot_be_read_says_why_and_shows_no_zero(host: Host) -> None:
    host.machine.gpus.configure([FakeGpu(), FakeGpu(lost=True)])
    _, lost = host.json("gpus")
    assert "lost" in lost["problem"]
    assert (lost["used_bytes"], lost["holders"]) == (None, [])
    assert "lost" in host.gpusvc("gpus").stdout.splitlines()[2]


def test_a_machine_without_a_driver_is_a_normal_machine(host: Host) -> None:
    host.machine.gpus.remove_driver()
    done = host.gpusvc("gpus", "--json")
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert done.stderr.startswith("Note: The NVIDIA driver is not loaded.")


def test_a_driver_that_fails_is_a_failure_where_gpus_are_asked_for(host: Host) -> None:
    host.machine.gpus.configure(init_error=Return.GPU_IS_LOST)
    done = host.gpusvc("gpus", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpusvc: ")


# ---- release ----


def test_a_release_that_is_not_proven_names_the_culprit_and_keeps_the_lease(host: Host) -> None:
    host.machine.gpus.change(0, ghosts={_DEAD: GIB})
    held = LeasedGpu(0, uuid_of(0), None, 0)
    processes = frozenset({Process(_DEAD, 1)})
    lease.write(host.paths, Lease("qwen", 1, (held,), 1.0, release_timeout_seconds=0.1, processes=processes))
    done = host.gpusvc("release", "qwen")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"PID {_DEAD}" in done.stderr
    assert lease.holders(host.paths) == ["qwen"]
    host.machine.gpus.change(0, ghosts={})
    assert host.gpusvc("release", "qwen").returncode == 0
    assert lease.holders(host.paths) == []


def test_an_operator_may_take_it_upon_himself_that_the_vram_is_free(host: Host) -> None:
    host.machine.gpus.change(0, ghosts={_DEAD: GIB})
    held = LeasedGpu(0, uuid_of(0), None, 0)
    processes = frozenset({Process(_DEAD, 1)})
    lease.write(host.paths, Lease("qwen", 1, (held,), 1.0, release_timeout_seconds=0.1, processes=processes))
    done = host.gpusvc("release", "--forget", "qwen")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"PID {_DEAD}" in done.stderr
    assert "qwen is forgotten. Nothing says that its VRAM is free." in done.stderr
    assert lease.holders(host.paths) == []


def test_of_several_models_each_failure_is_told(host: Host) -> None:
    for name in ("one", "two"):
        host.add_model(name)
        host.paths.lease_directory(name).mkdir(parents=True)
    with lease.hold(host.paths, "one"), lease.hold(host.paths, "two"):
        done = host.gpusvc("release", "one", "two")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("gpusvc: ")] == [
        "gpusvc: one is running, starting or stopping.",
        "gpusvc: two is running, starting or stopping.",
    ]


# ---- how it ends ----


def test_a_reader_that_goes_away_is_no_error(host: Host) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        command = [sys.executable, "-c", _RUN, str(host.root), "--help"]
        done = subprocess.run(command, check=False, stdout=nobody, stderr=subprocess.PIPE, env=host.machine.environment)
    assert done.stderr == b""


def test_a_bug_is_one_sentence_and_a_traceback_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUSVC_DEBUG", raising=False)
    assert cli._report(ZeroDivisionError("division by zero")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("gpusvc: ZeroDivisionError: division by zero\n")
    assert "GPUSVC_DEBUG=1" in shown
    monkeypatch.setenv("GPUSVC_DEBUG", "1")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        cli._report(error)
    assert "Traceback" in capsys.readouterr().err


def test_of_several_errors_each_is_told_and_the_highest_status_counts(capsys: pytest.CaptureFixture[str]) -> None:
    errors = ExceptionGroup("", [UnknownModelError("No.", hint="Look."), GpusvcError("One\nline more.")])
    assert cli._report(errors) == 3
    assert capsys.readouterr().err == "gpusvc: No.\n  Look.\ngpusvc: One\n  line more.\n"


def test_ctrl_c_says_what_systemd_goes_on_with() -> None:
    with pytest.raises(StillGoingError) as caught, going_on({"qwen": "/job/1"}, "starting", "`stop {names}` ends it."):
        raise KeyboardInterrupt
    assert (caught.value.exit_code, str(caught.value)) == (130, "qwen goes on starting. `stop qwen` ends it.")


# ---- progress, tables ----


def test_in_a_log_progress_is_a_line_when_something_else_goes_on() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for sentence in ("Placing.", "Loading, 512.0 MiB, 1 s.", "Loading, 1.5 GiB, 2 s.", "Loading, 1.5 GiB, 2 s."):
            progress.show({"qwen": sentence})
    assert stream.getvalue().splitlines() == ["qwen: Placing.", "qwen: Loading, 512.0 MiB, 1 s."]


@pytest.fixture
def terminal() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """Both ends of a terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        yield ours, stream
    os.close(ours)


def test_on_a_terminal_progress_is_redrawn_and_leaves_nothing(terminal: tuple[int, io.TextIOWrapper]) -> None:
    ours, stream = terminal
    with Progress(stream) as progress:
        progress.show({"qwen": "Placing.", "llama": "Placing."})
        progress.show({"qwen": "Loading \x1b[31m."})
    shown = ""
    while not shown.endswith("\x1b[1F\x1b[J") and select.select([ours], [], [], 10)[0]:
        shown += os.read(ours, 4096).decode()
    assert shown == (
        "qwen  0:00  Placing.\r\nllama  0:00  Placing.\r\n\x1b[2F\x1b[Jqwen  0:00  Loading �[31m.\r\n\x1b[1F\x1b[J"
    )


def test_columns_are_aligned_and_lines_end_without_spaces() -> None:
    assert table(("NAME", "VRAM", "GPU"), [("qwen-long", "9 B", "0"), ("a", "10 B", "")], right=("VRAM",)) == [
        "NAME       VRAM  GPU",
        "qwen-long   9 B  0",
        "a          10 B",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3.0, "0 s"), (59.9, "59 s"), (60.0, "1 min"), (7200.0, "2 h"), (86400.0 * 400, "400 d")],
)
def test_an_age_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_what_others_named_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\n") == "a�[2Jb�"
    assert shortened("abcdef", 4) == "abc…"
