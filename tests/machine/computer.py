"""A whole computer for tests, played by QEMU: a kernel of its own, a memory controller, a reboot that is one.

Without KVM, so that it works wherever QEMU does, and takes minutes where a container takes seconds. It has one
processor, one gigabyte of memory, no network, and two serial lines: the kernel's console, and one on which a small
agent takes commands. Its disk is a machine of ``tests.machine.host`` with a kernel, written into a file system.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.machine.container import MachineError, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

EMULATOR = "qemu-system-x86_64"

MEMORY_MIB = 1024
BOOT_TIMEOUT_SECONDS = 600.0
COMMAND_TIMEOUT_SECONDS = 120.0
IMAGE_TIMEOUT_SECONDS = 120.0
_IMAGE_SIZE = "3G"

# Drivers of what is there and not used cost seconds each.
_QUIET = "systemd.show_status=no modprobe.blacklist=ahci,i2c_i801,lpc_ich,powernow_k8,acpi_cpufreq,psmouse"

# How often what waits for an answer asks again: the agent hears nothing before its line is raw.
_HELLO_SECONDS = 2.0

# A command of its own for each line, an answer of its own for each command.
AGENT = r"""
import json, os, subprocess, sys, tty
port = os.open("/dev/ttyS1", os.O_RDWR | os.O_NOCTTY)
tty.setraw(port)
for line in os.fdopen(os.dup(port), "rb"):
    try:
        order = json.loads(line)
    except ValueError:
        continue  # the end of what was said before this was heard
    given = order.get("input")
    try:
        done = subprocess.run(
            order["command"],
            **({"stdin": subprocess.DEVNULL} if given is None else {"input": given.encode()}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=order["timeout"],
        )
        answer = {"status": done.returncode, "stdout": done.stdout.decode(errors="replace"),
                  "stderr": done.stderr.decode(errors="replace")}
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = {"status": 127, "stdout": "", "stderr": str(error)}
    data = json.dumps({"number": order["number"], **answer}).encode() + b"\n"
    while data:
        data = data[os.write(port, data):]
"""

AGENT_UNIT = """
[Unit]
Description=Commands of the tests
DefaultDependencies=no
After=systemd-remount-fs.service
# It is part of how this machine is switched off.
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/test-agent
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root
OOMScoreAdjust=-1000

[Install]
WantedBy=multi-user.target
"""


class Computer:
    """One computer, from being switched on to being switched off; use it as a context manager."""

    def __init__(self, root: Path, directory: Path) -> None:
        """Makes its disk of the tree ``root``, whose kernel it boots. ``directory`` is its own."""
        self._directory = directory
        self._disk = directory / "disk"
        self._kernel, self._initrd = (_only(root / "boot", pattern) for pattern in ("vmlinuz-*", "initrd.img-*"))
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._heard = b""
        self._numbers = itertools.count(1)
        subprocess.run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", root, self._disk, _IMAGE_SIZE],
            check=True,
            capture_output=True,
            timeout=IMAGE_TIMEOUT_SECONDS,
        )
        for name, file in (("kernel", self._kernel), ("initrd", self._initrd)):
            shutil.copyfile(file, directory / name)

    @staticmethod
    def can_be_played() -> bool:
        return shutil.which(EMULATOR) is not None

    # Life

    def switch_on(self) -> Self:
        """Starts it, and waits until systemd has nothing left to do."""
        assert self._process is None, "already on"
        # Sockets have short names only.
        with tempfile.TemporaryDirectory() as place:
            path = f"{place}/line"
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path)
                listening.listen(1)
                listening.settimeout(COMMAND_TIMEOUT_SECONDS)
                with (self._directory / "emulator").open("wb") as said:
                    self._process = subprocess.Popen(
                        self._command(path), stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
                    )
                self._line, _ = listening.accept()
        self._await_boot()
        return self

    def reboot(self) -> None:
        """A reboot as an administrator asks for it, by the kernel and through the firmware."""
        before = self._boot()
        # What answers may be stopped before it does.
        self._ask(("systemctl", "--no-block", "reboot"), _HELLO_SECONDS, None)
        self._await_boot(after=before)

    def close(self) -> None:
        """Pulls the plug."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._line is not None:
            self._line.close()
        for name in ("disk", "kernel", "initrd"):
            (self._directory / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Commands

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout: float = COMMAND_TIMEOUT_SECONDS,
        input: str | None = None,  # noqa: A002  (as subprocess calls it)
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as root; it is killed if it takes longer than ``timeout`` seconds.

        Raises:
            MachineError: it failed and ``check`` is set, or nobody answered. The message has what it wrote.
        """
        answer = self._ask(command, timeout, input)
        if answer is None:
            raise self._error(f"{' '.join(command)}: no answer")
        if check and answer["status"] != 0:
            raise MachineError(f"{' '.join(command)} → exit {answer['status']}\n{answer['stdout']}{answer['stderr']}")
        return subprocess.CompletedProcess(command, answer["status"], answer["stdout"], answer["stderr"])

    def write(self, path: str, content: str, *, mode: int = 0o644) -> None:
        self.run("install", "-D", "-m", f"{mode:o}", "/dev/stdin", path, input=content)

    def property(self, unit: str, name: str) -> str:
        """One property of a unit as ``systemctl show`` writes it."""
        return self.run("systemctl", "show", "--value", "-p", name, "--", unit).stdout.strip()

    def journal(self, unit: str) -> str:
        """The messages of a unit since boot, without times and names."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "-q", "-b", "-o", "cat", "-u", unit).stdout

    def wait_until(self, condition: Callable[[], bool], what: str, *, unit: str) -> None:
        """Polls until ``condition`` is true; a failure shows the journal of ``unit``."""
        try:
            wait_until(condition, what, timeout=COMMAND_TIMEOUT_SECONDS)
        except MachineError as error:
            raise MachineError(f"{error}\n{self.journal(unit)}") from None

    # Parts

    def _command(self, line: str) -> list[str]:
        disk = f"file={self._disk},format=raw,if=none,id=disk,cache=unsafe"
        return [
            # It ends with this process, however that ends.
            *("setpriv", "--pdeathsig", "KILL", EMULATOR),
            *("-accel", "tcg,tb-size=128", "-machine", "q35", "-cpu", "qemu64,-svm"),
            *("-smp", "1", "-m", str(MEMORY_MIB)),
            *("-nodefaults", "-no-user-config", "-nographic", "-nic", "none"),
            *("-drive", disk, "-device", "virtio-blk-pci,drive=disk", "-device", "virtio-rng-pci"),
            *("-serial", f"file:{self._directory / 'console'}"),
            *("-chardev", f"socket,id=line,path={line}", "-serial", "chardev:line"),
            *("-kernel", str(self._directory / "kernel"), "-initrd", str(self._directory / "initrd")),
            *("-append", f"root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off {_QUIET}"),
        ]

    def _await_boot(self, after: str | None = None) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT_SECONDS
        state = "silent"
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                raise self._error(f"{EMULATOR} ended with exit status {self._process.returncode}")
            if self._boot() in (None, after):
                continue  # that took its time
            answer = self._ask(("systemctl", "is-system-running", "--wait"), BOOT_TIMEOUT_SECONDS, None)
            if answer is not None and (state := answer["stdout"].strip()) in ("running", "degraded"):
                return
        raise self._error(f"It was not up within {BOOT_TIMEOUT_SECONDS:.0f} s (state: {state})")

    def _boot(self) -> str | None:
        """What tells one boot from the next; None if nobody answers."""
        answer = self._ask(("cat", "/proc/sys/kernel/random/boot_id"), _HELLO_SECONDS, None)
        return None if answer is None else answer["stdout"].strip() or None

    def _ask(self, command: tuple[str, ...], timeout: float, given: str | None) -> dict[str, Any] | None:
        """What the agent answers; None if it does not in time."""
        assert self._line is not None, "not switched on"
        number = next(self._numbers)
        order = {"number": number, "command": command, "timeout": timeout, "input": given}
        deadline = time.monotonic() + timeout + _HELLO_SECONDS
        self._line.settimeout(COMMAND_TIMEOUT_SECONDS)
        with contextlib.suppress(TimeoutError):
            self._line.sendall(b"\n" + json.dumps(order).encode() + b"\n")
            while True:
                *lines, self._heard = self._heard.split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError):  # half a line, of a machine that was going down
                        answer = json.loads(line)
                        if isinstance(answer, dict) and answer.get("number") == number:
                            return answer
                self._line.settimeout(max(deadline - time.monotonic(), 0.001))
                data = self._line.recv(1 << 16)
                if not data:
                    raise self._error("The machine is gone")
                self._heard += data
        return None

    def _error(self, sentence: str) -> MachineError:
        said = "".join(
            (self._directory / name).read_text(errors="replace")[-4000:]
            for name in ("emulator", "console")
            if (self._directory / name).exists()
        )
        return MachineError(f"{sentence}; the console's last lines:\n{said}")


def _only(directory: Path, pattern: str) -> Path:
    """The one file of this name, which need not be readable by a link that leads out of the tree."""
    [found] = directory.glob(pattern)
    return found
