"""The machine of a campaign: two GPUs, six models that do not all fit on them, and small file systems to fill."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.machine.container import MachineError
from tests.machine.host import GPU_COUNT, Host, default_gpus

PACKAGE = "/root/gpusvc-campaign.deb"
FULL_RUN, FULL_VAR = "/run/gpusvc/filler", "/var/lib/gpusvc/filler"

# Room for all that belongs there, and little enough to be filled in no time.
_RUN_SIZE, _STATE_SIZE, _VAR_SIZE = "24M", "8M", "2M"

_HOST_FILE = """
release_timeout = "1500ms"
{rules}
[gpu]
reserve = "{reserve}"
[eviction]
retries = 8
interval = "250ms"
[watchdog]
interval = "500ms"
idle_timeout = "20s"
[gateway]
activation_timeout = "25s"
drain_timeout = "2s"
"""

# systemd's limit on starts is a policy of its own, which a campaign would do nothing but run into.
_MODEL_UNIT = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestartSec=200ms\n"

# What is bounded, so that the machine that runs the campaign is not filled.
_MOUNTS = f"""
mount -o remount,size={_RUN_SIZE} /run
if mountpoint -q /run/gpusvc; then mount -o remount,size={_STATE_SIZE} /run/gpusvc; fi
mkdir -p /run/fakegpu && cp -a /run/fakegpu /tmp/fakegpu
mount -t tmpfs -o size=2M,mode=0755 campaign /run/fakegpu && cp -a /tmp/fakegpu/. /run/fakegpu/
mkdir -p /var/lib/gpusvc && mount -t tmpfs -o size={_VAR_SIZE},mode=0755 campaign /var/lib/gpusvc
"""


@dataclass(frozen=True, slots=True)
class Model:
    """What a model of the campaign is like. ``vram`` is of the engine, on each of its GPUs, and a child has 1 GiB."""

    name: str
    vram_gib: int
    gpus: int = 1
    children: str = ""
    is_declared: bool = True
    load_seconds: float = 0.1

    @property
    def need_gib(self) -> int:
        return self.vram_gib + len(self.children.split(",")) if self.children else self.vram_gib

    def file(self, *, priority: int = 0, idle: str = "20s", description: str = "") -> str:
        children = f', "--children", "{self.children}", "--child-vram", "1GiB"' if self.children else ""
        command = f'"test-engine", "--model", "{self.name}", "--port", "{{port}}", "--vram", "{self.vram_gib}GiB"'
        declared = f'vram = "{self.need_gib}GiB"' if self.is_declared else ""
        return f"""
description = "{description or self.name}"
command = [{command}, "--load-seconds", "{self.load_seconds}", "--load-steps", "4"{children}]
start_timeout = "8s"
stop_timeout = "300ms"
health_timeout = "8s"
idle_timeout = "{idle}"
busy_timeout = "14s"
failing_time = "2s"
probe = {{path = "/v1/chat/completions", body = {{messages = [{{role = "user", content = "Hi"}}]}}}}
priority = {priority}
[gpu]
count = {self.gpus}
{declared}
"""


MODELS = {
    model.name: model
    for model in (
        Model("chat", 8),
        Model("code", 8, children="setsid"),
        Model("draw", 14, children="ignore-term,daemonise", load_seconds=0.3),
        Model("hear", 15, children="sigstop"),
        Model("wide", 6, gpus=2, children="double-fork", load_seconds=0.2),
        Model("vague", 10, is_declared=False, load_seconds=0.2),
    )
}

PROBED = Model("unasked", 4)
"""It has a file, and is only ever asked how it is: nothing may load it."""


class Stage(Host):
    """The machine, ready for a campaign after each boot."""

    def __init__(self, *layers: Path, name: str = "gpusvc-campaign") -> None:
        super().__init__(*layers, name=name)
        self._pids_group: Path | None = None

    def boot(self) -> Self:
        super().boot()
        self.run("sh", "-ec", _MOUNTS)
        self.gpus.configure(default_gpus(GPU_COUNT))
        self._join_pids_group()
        return self

    def cut_power(self) -> None:
        super().cut_power()
        self._leave_pids_group()

    def shut_down(self) -> None:
        super().shut_down()
        self._leave_pids_group()

    def close(self) -> None:
        super().close()
        self._leave_pids_group()

    def furnish(self, package: Path) -> None:
        """What stays over reboots. Once, before the first step."""
        self.write(PACKAGE, package.read_bytes())
        self.write("/etc/systemd/system/model@.service.d/campaign.conf", _MODEL_UNIT)
        self.write("/etc/systemd/journald.conf.d/campaign.conf", "[Journal]\nSystemMaxUse=48M\nRateLimitBurst=0\n")
        self.write_policy()
        for model in (*MODELS.values(), PROBED):
            self.write_file(model.name, model.file())
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "restart", "systemd-journald.service", "gpusvc-watchdog.service")

    def write_policy(self, *, rules: str = "", reserve: str = "512MiB") -> None:
        self.write("/etc/gpusvc/gpusvc.toml", _HOST_FILE.format(rules=rules, reserve=reserve))

    def write_file(self, model: str, text: str) -> None:
        """Quicker than ``write``: /etc is no mount of the machine's."""
        file = self.inside(f"/etc/gpusvc/models/{model}.toml")
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").replace(file)

    @property
    def cgroup(self) -> Path:
        """The control group that is the root of the machine's."""
        payload = self._cgroups[0] / "payload"
        return payload if payload.is_dir() else self._cgroups[0]

    # Processes, counted

    def _join_pids_group(self) -> None:
        """Where the pids controller is of cgroup v1, the machine has none of its own: it gets a group there."""
        root = Path("/sys/fs/cgroup/pids")
        if not root.is_dir():
            return
        with suppress(OSError):
            group = root / self._cgroups[0].name
            group.mkdir()
            self._pids_group = group
            for directory, _, _ in os.walk(self.cgroup):
                for pid in Path(directory, "cgroup.procs").read_text().split():
                    with suppress(OSError):
                        (group / "cgroup.procs").write_text(pid)

    def _leave_pids_group(self) -> None:
        if self._pids_group is not None:
            with suppress(OSError):
                self._pids_group.rmdir()
            self._pids_group = None

    def limit_processes(self, *, spare: int) -> bool:
        """Let the machine have no more than ``spare`` more processes than now. False: that cannot be done here."""
        group = self._pids_group or self.cgroup
        try:
            now = int((group / "pids.current").read_text())
            (group / "pids.max").write_text(str(now + spare))
        except OSError:
            return False
        return True

    def unlimit_processes(self) -> None:
        """Any number again."""
        ((self._pids_group or self.cgroup) / "pids.max").write_text("max")

    # Commands

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """A command that nobody waits for; see ``reap``."""
        process = subprocess.Popen(
            self.entry(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def reap(self) -> list[tuple[tuple[str, ...], int, str]]:
        """The commands that ended meanwhile: what they were, their status, and what they said."""
        ended = [process for process in self._started if process.poll() is not None]
        self._started = [process for process in self._started if process not in ended]
        return [(_words(process), process.returncode, process.communicate()[0]) for process in ended]

    @property
    def unfinished(self) -> int:
        """How many commands still run."""
        return sum(process.poll() is None for process in self._started)

    def running(self) -> list[str]:
        """Those commands."""
        return [" ".join(_words(process)[-4:]) for process in self._started if process.poll() is None]

    def fill(self, file: str) -> None:
        """Take what is free of a small file system."""
        path = self.inside(file)
        if path.parent.stat().st_dev in {Path("/").stat().st_dev, self.inside("/").stat().st_dev}:
            raise MachineError(f"{file} is on no file system of the machine's own")
        with path.open("wb", buffering=0) as handle, suppress(OSError):
            while True:
                handle.write(bytes(1 << 16))
        with path.open("ab", buffering=0) as handle, suppress(OSError):
            while True:
                handle.write(bytes(64))

    def empty(self, file: str) -> None:
        self.inside(file).unlink(missing_ok=True)


def _words(process: subprocess.Popen[str]) -> tuple[str, ...]:
    assert isinstance(process.args, list)
    return tuple(map(str, process.args))
