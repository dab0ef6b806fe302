"""A machine for tests: a Debian tree booted by systemd-nspawn, systemd as its PID 1, and everything gone afterwards.

A machine's own files are an overlay in memory above read-only layers, mounted in a mount namespace of this process's
own. Its processes are in a cgroup of its own, which a guard ends as soon as this process is gone. So nothing stays,
even after SIGKILL of the tests. Needs root, systemd-container and cgroup v2 (alone, or next to v1).
"""

from __future__ import annotations

import atexit
import ctypes
import io
import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from tests.machine import tree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

BOOT_TIMEOUT_SECONDS = 60.0
SHUTDOWN_TIMEOUT_SECONDS = 60.0
COMMAND_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.02

_ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/root")
_CLONE_NEWNS = 0x00020000

# What systemd listens to as PID 1, from SIGRTMIN on: see systemd(1).
_POWER_OFF = signal.SIGRTMIN + 4

T = TypeVar("T")

_workspace: Path | None = None
_open_machines: list[Machine] = []


class MachineError(Exception):
    """A machine did not boot, a command in it failed, or something did not happen in time."""


class Machine:
    """One booted container; use it as a context manager. Not for use by two threads at once.

    ``layers`` are read-only directories, the topmost first and a tree of ``tests.machine.tree`` last.
    """

    def __init__(self, *layers: Path, name: str = "gpusvc-test") -> None:
        self.name = name
        # Without bpf(2) systemd's device filter silently does nothing. The others are Landlock, which nspawn knows not.
        self.system_calls = "bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self"
        self.console = _Console()
        self.pid: int | None = None  # PID 1 of the machine, as this machine counts; None: it is not running
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._cgroups: list[Path] = []
        self._directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_private_workspace()))
        _open_machines.append(self)
        try:
            self._mount(layers)
        except BaseException:
            self.close()
            raise

    # Life

    def boot(self) -> Self:
        """Starts the machine and waits until systemd has nothing left to do (``running`` or ``degraded``)."""
        assert self._nspawn is None, "already booted"
        self._cgroups = [root / f"{_cgroup_prefix()}{self._directory.name}" for root in _cgroup_roots()]
        for cgroup in self._cgroups:
            cgroup.mkdir()
        self.console.clear()
        # The shell joins the machine's own cgroup (all machines would share one otherwise), and gives way.
        join = "".join(f"echo $$ > {cgroup}/cgroup.procs; " for cgroup in self._cgroups)
        self._nspawn = subprocess.Popen(
            [
                *("sh", "-ec", join + 'exec "$@"', "sh"),
                *("systemd-nspawn", "--directory", str(self.root), "--machine", self.name, "--boot"),
                *("--register=no", "--keep-unit", "--private-network", "--console=pipe", "--capability=all"),
                *(f"--system-call-filter={self.system_calls}", "--resolv-conf=off", "--timezone=off"),
                "--link-journal=no",
            ],
            env={**os.environ, "UNIFIED_CGROUP_HIERARCHY": "1", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.console.follow(self._nspawn)
        try:
            self._await_boot(time.monotonic() + BOOT_TIMEOUT_SECONDS)
        except BaseException:
            self._kill()
            raise
        return self

    def shut_down(self) -> None:
        """Powers the machine off in order: units stop as they do at a real shutdown."""
        assert self.pid is not None, "not booted"
        assert self._nspawn is not None
        # systemd-shutdown stops all processes for a moment; nsenter would stop with its own, for ever, and hold it.
        self._end_started()
        os.kill(self.pid, _POWER_OFF)
        try:
            self._nspawn.wait(SHUTDOWN_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._error(f"{self.name} did not shut down within {SHUTDOWN_TIMEOUT_SECONDS:.0f} s") from None
        finally:
            self._kill()

    def cut_power(self) -> None:
        """Ends the machine at once, without a word to anything in it."""
        self._kill()

    def reboot(self) -> None:
        """Shuts down and boots again; what was written outside /run, /tmp and /dev stays."""
        self.shut_down()
        self.boot()

    def close(self) -> None:
        """Ends the machine and removes all of it. May be called at any time and more than once."""
        self._kill()
        for mount in (self.root, self._directory):
            subprocess.run(["umount", "--quiet", "--lazy", str(mount)], check=False, stderr=subprocess.DEVNULL)
        with suppress(FileNotFoundError):
            self._directory.rmdir()
        with suppress(ValueError):
            _open_machines.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Files

    @property
    def root(self) -> Path:
        """The machine's root directory as this process sees it, booted or not; absolute symlinks lead out of it."""
        return self._directory / "root"

    @property
    def layer(self) -> Path:
        """What was written so far, as a layer for other machines: while this one is shut down but not closed."""
        return self._directory / "upper"

    def inside(self, path: str) -> Path:
        """A path of the booted machine, with what is mounted there (/run, …); absolute symlinks lead out of it."""
        return Path(f"/proc/{self._pid_1()}/root") / path.lstrip("/")

    def write(self, path: str, content: str | bytes, *, mode: int = 0o644) -> None:
        """Writes a file, and makes its directories."""
        data = content.encode() if isinstance(content, str) else content
        self._execute(["install", "-D", "-m", f"{mode:o}", "/dev/stdin", path], data, COMMAND_TIMEOUT_SECONDS)

    def read(self, path: str) -> str:
        return self.run("cat", path).stdout

    def remove(self, *paths: str) -> None:
        self.run("rm", "-rf", "--", *paths)

    def make_gpu_nodes(self, count: int) -> None:
        """Nodes as NVIDIA's driver has them, with nothing behind (an allowed open gives ENXIO); also after reboots."""
        nodes = [("nvidiactl", "195:255"), ("nvidia-uvm", "511:0"), ("nvidia-uvm-tools", "511:1")]
        nodes += [(f"nvidia{minor}", f"195:{minor}") for minor in range(count)]
        self.write(
            "/etc/tmpfiles.d/fake-gpu-nodes.conf", "".join(f"c /dev/{name} 0666 - - - {n}\n" for name, n in nodes)
        )
        self.run("sh", "-c", "rm -f /dev/nvidia*")
        self.run("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/fake-gpu-nodes.conf")

    # Commands

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout: float = COMMAND_TIMEOUT_SECONDS,
        user: str | None = None,
        input: str | None = None,  # noqa: A002  (as subprocess calls it)
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the machine, as root or as ``user``; killed if it takes longer than ``timeout`` seconds.

        Raises:
            MachineError: it failed and ``check`` is set, or it took too long. The message has its output.
        """
        prefix = ("runuser", "-u", user, "--") if user else ()
        result = self._execute([*prefix, *command], input.encode() if input is not None else None, timeout)
        stdout, stderr = (stream.decode(errors="replace") for stream in (result.stdout, result.stderr))
        if check and result.returncode != 0:
            raise MachineError(f"{' '.join(command)} → exit {result.returncode}\n{stdout}{stderr}")
        return subprocess.CompletedProcess(command, result.returncode, stdout, stderr)

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """Starts a command as root and returns it running, its streams as text; it ends with the machine."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            self.entry(command), stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self._started.append(process)
        return process

    def curl(self, url: str, *options: str, timeout: float = COMMAND_TIMEOUT_SECONDS) -> str:
        """What a URL answers; fails on an HTTP status of 400 or above."""
        return self.run("curl", "--silent", "--show-error", "--fail-with-body", *options, url, timeout=timeout).stdout

    def wait_until(
        self,
        condition: Callable[[], T],
        what: str,
        *,
        timeout: float = COMMAND_TIMEOUT_SECONDS,
        unit: str | None = None,
    ) -> T:
        """As the function of this name; with ``unit``, a failure shows this unit's status and journal."""
        try:
            return wait_until(condition, what, timeout=timeout)
        except MachineError as error:
            if unit is None:
                raise
            status = self.run("systemctl", "status", "--no-pager", unit, check=False).stdout
            raise MachineError(f"{error}\n{status}{self.journal(unit)}") from None

    # Systemd

    def property(self, unit: str, name: str) -> str:
        """One property of a unit as ``systemctl show`` writes it."""
        return self.run("systemctl", "show", "--value", "-p", name, "--", unit).stdout.strip()

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        lines = self.run("systemctl", "show", "-p", ",".join(names), "--", unit).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def is_active(self, unit: str) -> bool:
        return self.property(unit, "ActiveState") == "active"

    def wait_for_state(self, unit: str, *states: str, timeout: float = COMMAND_TIMEOUT_SECONDS) -> str:
        """Waits for one of some ActiveStates (``active``, ``inactive``, ``failed``, …) and returns it."""
        wanted = " or ".join(states)
        return self.wait_until(
            lambda: state if (state := self.property(unit, "ActiveState")) in states else "",
            f"{unit} is {wanted}",
            timeout=timeout,
            unit=unit,
        )

    def journal(self, unit: str | None = None, *options: str) -> str:
        """The messages of a unit, or of all, since boot."""
        selection = ("-u", unit) if unit else ()
        self.run("journalctl", "--sync", check=False)
        return self.run("journalctl", "--no-pager", "-q", "-b", "-o", "short-monotonic", *selection, *options).stdout

    def pids(self, unit: str) -> list[int]:
        """The processes in a unit's cgroup and below, as the machine counts; none if the unit has no cgroup."""
        group = self.property(unit, "ControlGroup")
        if not group:
            return []
        # cgroup.procs is read by a process of the machine, for it shows PIDs as its reader counts.
        script = 'find "/sys/fs/cgroup$1" -name cgroup.procs -exec cat {} + 2>/dev/null || :'
        return sorted({int(pid) for pid in self.run("sh", "-c", script, "sh", group).stdout.split()})

    def command_lines(self) -> dict[int, str]:
        """Every process of the machine with its command line; threads of the kernel and zombies are left out."""
        lines = self.run("ps", "-e", "-ww", "-o", "pid=,stat=,args=").stdout.splitlines()
        rows = (line.split(None, 2) for line in lines)
        return {int(row[0]): row[2] for row in rows if len(row) == 3 and not row[1].startswith("Z")}

    def set_loopback_up(self) -> None:
        self.run("ip", "link", "set", "lo", "up")

    # Parts

    def _mount(self, layers: Sequence[Path]) -> None:
        _run("mount", "-t", "tmpfs", "-o", "mode=0755", "gpusvc-test", str(self._directory))
        for directory in ("upper", "work", "root"):
            (self._directory / directory).mkdir()
        lower = ":".join(str(layer) for layer in layers)
        options = f"lowerdir={lower},upperdir={self._directory}/upper,workdir={self._directory}/work"
        _run("mount", "-t", "overlay", "-o", options, "gpusvc-test", str(self.root))

    def _await_boot(self, deadline: float) -> None:
        assert self._nspawn is not None
        state = "not started"
        while time.monotonic() < deadline:
            if self._nspawn.poll() is not None:
                raise self._error(f"systemd-nspawn ended with exit status {self._nspawn.returncode}")
            if self.pid is None:
                self.pid = _init_of(self._nspawn.pid)
            if self.pid is not None:
                # Not with --wait: asked while the bus is just being started it may wait for 30 s more (seen on 252).
                result = self._execute(["systemctl", "is-system-running"], None, COMMAND_TIMEOUT_SECONDS)
                state = result.stdout.decode().strip() or state
            if state in ("running", "degraded"):
                self.set_loopback_up()
                return
            time.sleep(POLL_SECONDS)
        raise self._error(f"{self.name} did not boot within {BOOT_TIMEOUT_SECONDS:.0f} s (state: {state})")

    def _kill(self) -> None:
        """Ends every process of the machine and removes its cgroups."""
        self._end_started()
        if self._nspawn is not None:
            # First what runs inside, so that systemd-nspawn can tidy up behind it.
            for cgroup in (self._cgroups[0] / "payload", self._cgroups[0]):
                with suppress(FileNotFoundError):
                    cgroup.joinpath("cgroup.kill").write_text("1")
                with suppress(subprocess.TimeoutExpired):
                    self._nspawn.wait(5)
                    break
            self.console.join()
        self._nspawn = self.pid = None
        for cgroup in self._cgroups:
            _remove_cgroup(cgroup)
        self._cgroups = []

    def _end_started(self) -> None:
        for process in self._started:
            _end(process)
            process.communicate()
        self._started = []

    def _pid_1(self) -> int:
        if self.pid is None:
            raise MachineError(f"{self.name} is not running.")
        return self.pid

    def entry(self, command: Sequence[str]) -> list[str]:
        """What runs ``command`` in the machine, for who runs it himself."""
        return [
            "nsenter",
            "--target",
            str(self._pid_1()),
            "--all",
            "--wdns=/",
            "--",
            "env",
            "-i",
            *_ENVIRONMENT,
            *command,
        ]

    def _execute(
        self, command: Sequence[str], data: bytes | None, timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        entry = self.entry(command)
        with subprocess.Popen(
            entry,
            stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(data, timeout)
            except subprocess.TimeoutExpired:
                _end(process)
                stdout, stderr = process.communicate()
                output = (stdout + stderr).decode(errors="replace")
                raise MachineError(f"{' '.join(command)} took longer than {timeout:g} s\n{output}") from None
            except BaseException:
                _end(process)
                raise
        return subprocess.CompletedProcess(entry, process.returncode, stdout, stderr)

    def _error(self, sentence: str) -> MachineError:
        return MachineError(f"{sentence}; the console's last lines:\n{self.console.tail()}")


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kills a command that was started through nsenter, and what it started in its session.

    The command itself first, for nsenter to reap: an orphan from another PID namespace would go to PID 1 out here, and
    where that one reaps nobody, stay as a zombie that keeps the machine from shutting down.
    """
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], T], what: str, *, timeout: float = COMMAND_TIMEOUT_SECONDS) -> T:
    """Polls until ``condition`` is true and returns its value.

    Raises:
        MachineError: it was not true within ``timeout`` seconds; ``what`` says what did not happen.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise MachineError(f"Not within {timeout:g} s: {what}")
        time.sleep(POLL_SECONDS)
    return value


class _Console:
    """What the machine wrote to its console since it was booted last."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._reader: threading.Thread | None = None

    def clear(self) -> None:
        self._lines.clear()

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        stream = io.TextIOWrapper(process.stdout, errors="replace")
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def join(self) -> None:
        if self._reader is not None:
            self._reader.join(5)

    def tail(self, count: int = 40) -> str:
        return "".join(self._lines[-count:])

    def _read(self, stream: io.TextIOWrapper) -> None:
        with stream:
            self._lines.extend(stream)


def _cgroup_prefix() -> str:
    """What the names of this process's cgroups begin with."""
    return f"gpusvc-test-{os.getpid()}-"


def _cgroup_roots() -> list[Path]:
    """Where a machine's cgroup is made: v2, and with v1 beside it also the one that systemd-nspawn keeps in step."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root]
    if (root / "unified" / "cgroup.controllers").exists():
        return [directory for directory in (root / "unified", root / "systemd") if directory.exists()]
    raise MachineError("This machine has no cgroup v2 at /sys/fs/cgroup or /sys/fs/cgroup/unified.")


def _remove_cgroup(cgroup: Path) -> None:
    """Removes a cgroup and all below; its last processes may be on their way out for a moment."""
    deadline = time.monotonic() + 5
    while cgroup.exists():
        for directory, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):
                Path(directory).rmdir()
        if time.monotonic() > deadline:
            raise MachineError(f"{cgroup} is still in use.")
        time.sleep(0 if not cgroup.exists() else POLL_SECONDS)


# Waits for the end of its input, which is the end of the tests, then ends what is left in the cgroups below its
# arguments whose names begin with $PREFIX.
_GUARD = r"""
cat > /dev/null
for root; do
    for cgroup in "$root/$PREFIX"*; do
        while [ -e "$cgroup" ]; do
            echo 1 > "$cgroup/cgroup.kill"
            find "$cgroup" -depth -type d -exec rmdir {} \; || sleep 0.02
        done
    done
done 2> /dev/null
"""


def _start_guard() -> None:
    """The guard sees the end of this process because only this process holds the other end of its input."""
    guard = subprocess.Popen(
        ["sh", "-c", _GUARD, "sh", *map(str, _cgroup_roots())],
        env={"PATH": "/usr/bin:/bin", "PREFIX": _cgroup_prefix()},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    atexit.register(guard.communicate)


def _private_workspace() -> Path:
    """A directory in memory that only this process and its children see; made once, gone with the process."""
    global _workspace  # noqa: PLW0603
    if _workspace is None:
        if os.geteuid() != 0:
            raise MachineError("Only root can boot the containers of the machine tests.")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) != 0:
            raise MachineError(f"No mount namespace: {os.strerror(ctypes.get_errno())}.")
        _run("mount", "--make-rprivate", "/")
        # systemd-nspawn leaves directories here.
        Path("/run/systemd/nspawn").mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", "mode=0755", "gpusvc-test", "/run/systemd/nspawn")
        workspace = tree.cache_directory() / "machines"
        workspace.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", "mode=0755", "gpusvc-test", str(workspace))
        _start_guard()
        atexit.register(_close_all)
        _workspace = workspace
    return _workspace


def _close_all() -> None:
    for machine in [*_open_machines]:
        machine.close()


def _init_of(nspawn: int) -> int | None:
    """PID 1 of the container: systemd-nspawn's child, once it is alone in a PID namespace and has become systemd."""
    children = Path(f"/proc/{nspawn}/task/{nspawn}/children")
    with suppress(OSError, IndexError):
        for child in children.read_text().split():
            status = Path("/proc", child, "status").read_text()
            spids = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if spids[-1] == "1" and len(spids) > 2 and Path("/proc", child, "comm").read_text().strip() == "systemd":
                return int(child)
    return None


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise MachineError(f"{' '.join(command)}: {result.stderr.strip()}")
