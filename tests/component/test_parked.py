"""The process that is parked until its scope holds it, and then becomes the engine: forked, ordered and executed."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pwd
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpusvc.linux import processes
from tests.component.conftest import ROOT, eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")

# Stands for the launcher, with all that it might leave to the engine and must not.
_LAUNCHER = """
import ctypes, json, os, signal, sys
from gpusvc.launcher.parked import Orders, ParkedEngine
from gpusvc.linux.users import User
from gpusvc.errors import GpusvcError

def tell(**what):
    print(json.dumps(what), flush=True)

os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
for number in (signal.SIGHUP, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
parked = ParkedEngine.fork()
tell(pid=parked.pid)
for line in sys.stdin:
    orders = json.loads(line)
    if orders is None:
        parked.abandon()
        tell(abandoned=True)
        continue
    if "read_ahead" in orders:
        parked.read_ahead(orders["read_ahead"], User.named(orders["user"]))
        tell(asked=True)
        continue
    user = User.named(orders.pop("user"))
    command = tuple(orders.pop("command"))
    try:
        tell(warnings=parked.release(Orders(command=command, user=user, **orders)))
    except GpusvcError as error:
        tell(error=type(error).__name__, message=error.message, hint=error.hint)
    with os.fdopen(parked.output_fd) as output:
        text = output.read()
    tell(output=text, status=os.waitstatus_to_exitcode(os.waitpid(parked.pid, 0)[1]))
"""

NOBODY = pwd.getpwnam("nobody")

Answer = dict[str, Any]


class Launcher:
    """A process with an engine parked; each order is answered in lines of JSON."""

    def __init__(self, *wrapped_in: str) -> None:
        pipe = subprocess.PIPE
        command = [*wrapped_in, sys.executable, "-c", _LAUNCHER]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        self.pid: int = self.hear()["pid"]

    def hear(self) -> Answer:
        assert self.process.stdout is not None
        answer: Answer = json.loads(self.process.stdout.readline())
        return answer

    def say(self, orders: Answer | None) -> Answer:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def release(
        self,
        *command: str,
        user: str = "nobody",
        directory: Path | str = "/",
        environment: dict[str, str] | None = None,
        closed: tuple[str, ...] = (),
        required: bool = True,
    ) -> Answer:
        """What release() came to, and ``output`` and ``status`` of the engine after that."""
        orders = {
            "command": command,
            "environment": {"PATH": "/usr/bin:/bin"} if environment is None else environment,
            "working_directory": str(directory),
            "user": user,
            "closed_nodes": closed,
            "require_isolation": required,
            "unfenced_devices": "GPU-1",
        }
        return self.say(orders) | self.hear()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Start = Callable[..., Launcher]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Launcher] = []

    def make(*wrapped_in: str) -> Launcher:
        made.append(Launcher(*wrapped_in))
        return made[-1]

    yield make
    for launcher in made:
        launcher.close()
        # Whoever is parked ends by himself, as his launcher is gone.
        assert eventually(lambda pid=launcher.pid: is_over(pid))  # type: ignore[misc]


@pytest.fixture
def launcher(start: Start) -> Launcher:
    return start()


def is_over(pid: int) -> bool:
    return processes.trace(pid).state in {None, "Z", "X"}


def status_of(launcher: Launcher, user: str = "nobody") -> dict[str, list[str]]:
    """The engine's proc_pid_status(5): the engine is the cat(1) that prints it."""
    lines = launcher.release("cat", "/proc/self/status", user=user)["output"].splitlines()
    return {key: values.split() for key, _, values in (line.partition(":") for line in lines)}


# ---- parked ----


def test_it_waits_in_the_code_of_the_launcher_until_it_is_released(launcher: Launcher) -> None:
    assert eventually(lambda: processes.trace(launcher.pid).state == "S")
    assert processes.command(launcher.pid) == processes.command(launcher.process.pid)


def test_it_ends_when_it_is_abandoned(launcher: Launcher) -> None:
    assert launcher.say(None) == {"abandoned": True}
    assert processes.identify(launcher.pid) is None


def test_it_ends_when_its_launcher_is_killed(launcher: Launcher) -> None:
    launcher.process.kill()
    assert eventually(lambda: is_over(launcher.pid))


def test_an_engine_is_not_ended_by_abandoning_what_it_was_made_of(launcher: Launcher) -> None:
    assert launcher.release("true")["status"] == 0
    assert launcher.say(None) == {"abandoned": True}


def test_it_is_told_when_it_was_killed_before_it_was_released(launcher: Launcher) -> None:
    os.kill(launcher.pid, signal.SIGKILL)
    assert eventually(lambda: is_over(launcher.pid))
    answer = launcher.release("true")
    assert answer["error"] == "EngineError"
    assert "was killed" in answer["message"]


# ---- what the engine is ----


def test_it_is_the_same_process_and_its_status_is_the_engines(launcher: Launcher) -> None:
    answer = launcher.release("sh", "-c", "echo $$; echo on stderr >&2; exit 42")
    assert answer == {"warnings": [], "output": f"{launcher.pid}\non stderr\n", "status": 42}


def test_its_signal_is_the_engines(launcher: Launcher) -> None:
    assert launcher.release("sh", "-c", "kill -SEGV $$")["status"] == -signal.SIGSEGV


def test_it_is_its_user_and_nobody_else(launcher: Launcher) -> None:
    status = status_of(launcher)
    assert status["Uid"] == [str(NOBODY.pw_uid)] * 4
    assert status["Gid"] == [str(NOBODY.pw_gid)] * 4
    assert set(map(int, status["Groups"])) == set(os.getgrouplist("nobody", NOBODY.pw_gid))


@pytest.mark.parametrize("user", ["nobody", "root"])
def test_it_has_no_capability_and_can_gain_none_whoever_it_is(launcher: Launcher, user: str) -> None:
    status = status_of(launcher, user)
    sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    assert {name: int(status[name][0], 16) for name in sets} == dict.fromkeys(sets, 0)
    assert status["NoNewPrivs"] == ["1"]


def test_roots_engine_has_none_where_the_launchers_are_inheritable(start: Start) -> None:
    status = status_of(start("setpriv", "--inh-caps", "+setuid,+setgid,+setpcap"), "root")
    assert int(status["CapPrm"][0], 16) == int(status["CapInh"][0], 16) == 0


def test_it_needs_no_more_capabilities_than_the_launcher_has(start: Start) -> None:
    kept = "-all,+setuid,+setgid,+setpcap"
    status = status_of(start("setpriv", "--bounding-set", kept, "--no-new-privs"))
    assert status["Uid"] == [str(NOBODY.pw_uid)] * 4
    assert int(status["CapBnd"][0], 16) == 0


def test_no_signal_is_ignored_or_blocked(launcher: Launcher) -> None:
    status = status_of(launcher)
    assert {name: int(status[name][0], 16) for name in ("SigIgn", "SigBlk")} == {"SigIgn": 0, "SigBlk": 0}


def test_nothing_is_open_in_it_but_its_input_and_output(launcher: Launcher) -> None:
    # The fourth is what ls(1) lists.
    assert launcher.release("ls", "/proc/self/fd")["output"].split() == ["0", "1", "2", "3"]


def test_it_leads_a_session_of_its_own(launcher: Launcher) -> None:
    status = status_of(launcher)
    assert status["NSsid"][-1:] == status["NSpid"][-1:]


def test_its_environment_is_the_ordered_one_and_nothing_else(launcher: Launcher) -> None:
    ordered = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PORT": "20000", "WORD": 'ä = b \\ "c"\t\''}
    output = launcher.release("env", "-0", environment=ordered)["output"]
    assert dict(line.split("=", 1) for line in output.rstrip("\0").split("\0")) == ordered


def test_it_is_where_it_was_sent(launcher: Launcher, public: Path) -> None:
    assert launcher.release("pwd", directory=public)["output"] == f"{public}\n"


def test_its_arguments_arrive_as_they_are(launcher: Launcher) -> None:
    arguments = ["", " ", "{port}", "$HOME", "ä\n", "x" * 100_000]
    output = launcher.release("printf", "%s|", *arguments)["output"]
    assert output == "".join(f"{argument}|" for argument in arguments)


def test_its_program_is_looked_for_in_the_path_of_the_model(launcher: Launcher, public: Path) -> None:
    script = public / "my-engine"
    script.write_text("#!/bin/sh\necho found\n")
    script.chmod(0o755)
    assert launcher.release("my-engine", environment={"PATH": str(public)})["output"] == "found\n"


# ---- what keeps it from being one ----


@pytest.mark.parametrize("command", ["/nonexistent/llama-server", "llama-server-that-nobody-installed"])
def test_a_command_that_is_not_there_is_named(launcher: Launcher, command: str) -> None:
    answer = launcher.release(command)
    assert answer["error"] == "EngineError"
    assert answer["message"] == f"nobody cannot execute {command}: No such file or directory."
    assert answer["status"] == 127


def test_a_file_that_is_not_executable_is_named(launcher: Launcher) -> None:
    assert launcher.release("/etc/passwd")["message"] == "nobody cannot execute /etc/passwd: Permission denied."


def test_a_file_that_is_no_program_is_named(launcher: Launcher, public: Path) -> None:
    file = public / "weights.gguf"
    file.write_bytes(b"GGUF\0\0\0\3")
    file.chmod(0o755)
    assert launcher.release(str(file))["message"] == f"nobody cannot execute {file}: Exec format error."


def test_a_directory_that_its_user_may_not_enter_is_named(launcher: Launcher, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    answer = launcher.release("true", directory=tmp_path)
    assert answer["error"] == "EngineError"
    assert answer["message"] == f"nobody cannot enter {tmp_path}: Permission denied."


def test_a_directory_that_is_not_there_is_named(launcher: Launcher) -> None:
    answer = launcher.release("true", directory="/nonexistent")
    assert answer["message"] == "nobody cannot enter /nonexistent: No such file or directory."


def test_what_nobody_thought_of_is_an_error_of_the_engine_too(launcher: Launcher) -> None:
    answer = launcher.release("true", environment={"PATH": "/bin", "A=B": "C"})
    assert answer["error"] == "EngineError"
    assert answer["message"].startswith("The engine could not be prepared: ")
    assert answer["status"] == 127


# ---- isolation ----


def test_a_foreign_gpu_that_opens_is_not_tolerated(launcher: Launcher) -> None:
    answer = launcher.release("echo", "ran", closed=("/dev/null",))
    assert answer["error"] == "IsolationError"
    assert answer["message"] == "The engine could reach /dev/null, which is not its GPU (open: it opened, not EPERM)."
    assert answer["hint"] is not None
    assert (answer["output"], answer["status"]) == ("", 127)


def test_best_effort_goes_on_with_a_warning_for_each(launcher: Launcher) -> None:
    answer = launcher.release("echo", "ran", closed=("/dev/null", "/dev/zero"), required=False)
    assert [warning.split()[4] for warning in answer["warnings"]] == ["/dev/null,", "/dev/zero,"]
    assert (answer["output"], answer["status"]) == ("ran\n", 0)


def test_an_engine_that_other_gpus_are_open_to_is_told_its_own_in_another_way(launcher: Launcher) -> None:
    variables = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0"}
    command = ("printenv", "CUDA_VISIBLE_DEVICES")
    answer = launcher.release(*command, environment=variables, closed=("/dev/null",), required=False)
    assert answer["output"] == "GPU-1\n"


def test_an_engine_that_other_gpus_are_closed_to_is_told_its_own_as_it_was_planned(launcher: Launcher) -> None:
    variables = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0"}
    assert launcher.release("printenv", "CUDA_VISIBLE_DEVICES", environment=variables)["output"] == "0\n"


def test_a_node_without_a_driver_behind_it_is_not_closed(launcher: Launcher, tmp_path: Path) -> None:
    node = a_node(tmp_path / "nvidia1", 195, 1)
    answer = launcher.release("true", closed=(node,))
    assert answer["error"] == "IsolationError"
    assert node in answer["message"]


def test_a_node_that_is_gone_proves_nothing_of_the_filter(launcher: Launcher) -> None:
    assert launcher.release("true", closed=("/dev/nvidia-gone",))["error"] == "IsolationError"


def test_a_node_that_the_kernel_refuses_is_closed(launcher: Launcher, refused: str) -> None:
    answer = launcher.release("echo", "ran", closed=(refused,))
    assert answer == {"warnings": [], "output": "ran\n", "status": 0}


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[str]:
    """What even root may not open, with the errno of a device filter: here a file that must not change."""
    file = tmp_path / "closed"
    file.touch()
    try:
        subprocess.run(["chattr", "+i", file], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the file system of the tests has no immutable files")
    yield str(file)
    subprocess.run(["chattr", "-i", file], check=True)


def a_node(path: Path, major: int, minor: int) -> str:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(major, minor))
    except PermissionError:
        pytest.skip("device nodes cannot be made here: that takes CAP_MKNOD")
    return str(path)


# ---- reading ahead ----


def cached_bytes(file: Path) -> int:
    """The bytes of ``file`` in the page cache: mincore(2), which reads nothing."""
    size = file.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), size) as mapped:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        start = ctypes.c_char.from_buffer(mapped)
        try:
            assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), pages) == 0
        finally:
            del start
        return sum(byte & 1 for byte in pages.raw) * mmap.PAGESIZE


@pytest.fixture
def cold() -> Iterator[Path]:
    """A file that everybody may read, and that is on the disk only."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        file = Path(name, "weights")
        with file.open("wb") as stream:
            stream.write(bytes(range(256)) * (32 << 12))  # 32 MiB
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_bytes(file):
            pytest.skip("this file system keeps its files in memory")
        yield file


def test_the_parked_process_reads_ahead_and_becomes_the_engine_all_the_same(launcher: Launcher, cold: Path) -> None:
    launcher.say({"read_ahead": [str(cold), "/nonexistent"], "user": "nobody"})
    assert eventually(lambda: cached_bytes(cold) == cold.stat().st_size)
    done = launcher.release("cat", "/proc/self/comm")
    assert (done["output"], done["status"]) == ("cat\n", 0)


def test_orders_end_the_reading_at_once(launcher: Launcher, cold: Path) -> None:
    launcher.say({"read_ahead": [str(cold)] * 1000, "user": "nobody"})
    assert launcher.release("ionice", "-p", "0")["status"] == 0


def test_the_engine_does_not_inherit_the_idle_priority(launcher: Launcher, cold: Path) -> None:
    launcher.say({"read_ahead": [str(cold)], "user": "nobody"})
    assert "idle" not in launcher.release("ionice")["output"]


def test_what_the_user_may_not_read_is_not_read_for_him(launcher: Launcher, cold: Path) -> None:
    cold.chmod(0o600)
    launcher.say({"read_ahead": [str(cold)], "user": "nobody"})
    assert launcher.release("true")["status"] == 0
    assert cached_bytes(cold) == 0


def test_a_fifo_among_the_files_holds_nobody_up(launcher: Launcher, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    launcher.say({"read_ahead": [str(tmp_path / "fifo")], "user": "nobody"})
    assert launcher.release("true")["status"] == 0


def test_a_launcher_that_ends_takes_the_reader_along(start: Start, cold: Path) -> None:
    launcher = start()
    launcher.say({"read_ahead": [str(cold)] * 1000, "user": "nobody"})
    launcher.process.kill()
    assert eventually(lambda: is_over(launcher.pid))
