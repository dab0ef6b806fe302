"""A machine with models as the watchdog sees one: leases, locks, control groups and VRAM, without systemd.

What holds the VRAM are real processes on simulated GPUs, and the locks are the kernel's. Control groups are a directory
of files, and systemd is an object that notes what it is asked for.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

from gpusvc import names
from gpusvc.errors import GpusvcError
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.paths import Paths
from gpusvc.record import replace
from gpusvc.state import lease as leases
from gpusvc.state import use
from gpusvc.state.lease import Lease, LeasedGpu
from gpusvc.systemd.notify import Notifier
from gpusvc.systemd.units import ActiveState, Unit
from tests.component.conftest import Machine
from tests.fakegpu import GIB, uuid_of


class Clock:
    """Both clocks of a machine; time goes by when it is told to."""

    def __init__(self) -> None:
        self.boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.wall = time.time()

    def advance(self, seconds: float) -> None:
        self.boot += seconds
        self.wall += seconds

    def now(self) -> float:
        return self.boot

    def time(self) -> float:
        return self.wall


class Systemd:
    """The service manager: what it was asked for, and the states that it tells."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, str]] = []
        self.states: dict[str, str] = {}
        self.errors: list[GpusvcError] = []
        """Raised by the next questions, one each."""
        self.connections = 0

    def connect(self) -> Systemd:
        self.connections += 1
        return self

    def enqueue(self, verb: str, unit: str) -> str:
        self._fail()
        self.jobs.append((verb, unit))
        if verb == "Stop":
            self.states[unit] = "deactivating"
        return f"/job/{len(self.jobs)}"

    def unit(self, name: str) -> Unit | None:
        return next(iter(self.units(name)), None)

    def units(self, *patterns: str) -> list[Unit]:
        self._fail()
        return [Unit(name, ActiveState(state), "", "/unit") for name, state in self.states.items() if name in patterns]

    def close(self) -> None:
        pass

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


class Heard(Notifier):
    """What systemd would hear."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def _send(self, state: str) -> None:
        self.said.append(state)


class Fleet:
    """The models of one machine. ``cgroups`` stands for /sys/fs/cgroup."""

    def __init__(self, machine: Machine, directory: Path, cgroups: Path) -> None:
        self.machine = machine
        self.paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "state")
        self.paths.models_directory.mkdir(parents=True)
        (self.paths.runtime / "watchdog").mkdir(parents=True)
        (self.paths.runtime / "pins").mkdir()
        self.systemd = Systemd()
        self.holders: dict[str, subprocess.Popen[str]] = {}
        self._cgroups = cgroups
        self._groups: dict[int, Cgroup] = {}

    def host(self, text: str) -> None:
        """The host's file, written long enough ago to be complete."""
        _write(self.paths.host_file, text)

    def model(self, name: str, text: str = "") -> None:
        _write(self.paths.model_file(name), f'command = ["/bin/true"]\nuser = "root"\n{text}')

    def add(
        self,
        name: str,
        *,
        gpus: Collection[int] = (0,),
        vram: str = "1GiB",
        ready: bool = True,
        evicting: tuple[str, ...] = (),
        text: str = "",
    ) -> Lease:
        """A model that runs, with a lease, a file, a scope and a process."""
        self.model(name, text)
        visible = ",".join(map(uuid_of, gpus))
        holder = self.machine.holder(vram, CUDA_VISIBLE_DEVICES=visible) if gpus else self.machine.start("cat")
        self.holders[name] = holder
        cgroup = f"/gpusvc.slice/{names.SLICE}/{names.scope(name)}"
        lease = Lease(
            model=name,
            port=0,
            gpus=tuple(LeasedGpu(index, uuid_of(index), GIB, 0) for index in gpus),
            created=time.time(),
            ready=ready,
            pid=holder.pid,
            cgroup=cgroup,
            processes=processes.identify_all([holder.pid]),
            evicting=evicting,
        )
        self._groups[holder.pid] = Cgroup(cgroup)
        self._group(cgroup).mkdir(parents=True)
        self.burn(name, 0.0)
        (self._group(cgroup) / "cgroup.events").write_text("populated 1\n")
        self._group(f"/gpusvc.slice/{names.service(name)}").mkdir()
        use.prepare(self.paths, name, os.getegid())
        leases.write(self.paths, lease)
        self.systemd.states[names.service(name)] = "active"
        return lease

    def burn(self, name: str, cpu_seconds: float) -> None:
        """What its control group has used of the CPU so far."""
        stat = self._group(f"/gpusvc.slice/{names.SLICE}/{names.scope(name)}") / "cpu.stat"
        stat.write_text(f"usage_usec {int(cpu_seconds * 1_000_000)}\nuser_usec 0\n")

    def escape(self, name: str) -> None:
        """Its process leaves its scope."""
        self._groups[self.holders[name].pid] = Cgroup("/away")

    def end(self, name: str, *, state: str = "inactive", release: bool = True) -> None:
        """It is over, proven or not."""
        self.holders[name].kill()
        self.holders[name].wait()
        (self._group(f"/gpusvc.slice/{names.service(name)}")).rmdir()
        for file in ("cpu.stat", "cgroup.events"):
            (self._group(f"/gpusvc.slice/{names.SLICE}/{names.scope(name)}") / file).unlink()
        self._group(f"/gpusvc.slice/{names.SLICE}/{names.scope(name)}").rmdir()
        self.systemd.states[names.service(name)] = state
        if release:
            leases.remove(self.paths, name)

    def change(self, lease: Lease, **values: object) -> Lease:
        changed = replace(lease, **values)
        leases.write(self.paths, changed)
        return changed

    def group_of(self, pid: int) -> Cgroup | None:
        # That of the kernel is read all the same: its cost is part of what the benchmark measures.
        found = Cgroup.of_process(pid)
        return None if found is None else self._groups.get(pid, found)

    def _group(self, path: str) -> Path:
        return self._cgroups / path.lstrip("/")


def _write(file: Path, text: str) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)
