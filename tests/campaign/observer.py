"""Looks at a machine from outside: /proc, cgroupfs, the kernel's locks and the files in its /run. It asks no gpusvc.

Only systemd is asked for what it says of the units, as that is what is compared with the rest.
"""

from __future__ import annotations

import json
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.campaign.snapshot import Given, Held, Late, Process, Snapshot, Unit
from tests.machine.container import MachineError

if TYPE_CHECKING:
    from tests.campaign.stage import Stage

_MODEL = re.compile(r"\x00--model\x00([^\x00]+)\x00")
_SLOT = struct.Struct("=QQQQ")
_PROPERTIES = "Id,ActiveState,SubState,Result,Job"

# A boot or a re-executed systemd may keep systemctl waiting for a moment.
_SYSTEMD_SECONDS = 15.0


class Observer:
    """One machine, over its reboots."""

    def __init__(self, host: Stage) -> None:
        self._host = host
        self.owners: dict[int, str] = {}
        """By inner PID, the model whose process that was last; of this boot."""
        self._held: dict[tuple[str, float, int], int] = {}

    def rebooted(self) -> None:
        self.owners.clear()
        self._held.clear()

    def look(self, *, units: bool = True) -> Snapshot:
        """One look, of some milliseconds, or what systemd takes to answer."""
        began = time.monotonic()
        run = self._host.inside("/run/gpusvc")
        late_before = self._late()
        vram_before = self._vram()
        before = {(process.pid, process.ticks): process for process in self._processes()}
        leases_before = self._leases(run)
        said = self._units() if units else None
        leases_after = self._leases(run)
        alive = {(process.pid, process.ticks) for process in self._processes()}
        vram_after = self._vram()
        late_after = self._late()
        # The first reading: what a process is may change by exec, and then it is another's to judge at the next look.
        processes = tuple(process for key, process in before.items() if key in alive)
        self.owners.update((process.inner, process.model) for process in processes if process.model is not None)
        names = {*leases_before, *leases_after}
        same = {name for name in names if _same(leases_before.get(name), leases_after.get(name))}
        leases = {name: held for name in same if isinstance(held := leases_after[name], Held)}
        self._remember(leases, processes, vram_after)
        doors, tickets = self._locks(run)
        return Snapshot(
            began=began,
            ended=time.monotonic(),
            processes=processes,
            leases=leases,
            changing=frozenset(names - same),
            broken=frozenset(name for name in same if leases_after[name] is None),
            units=said,
            vram={
                gpu: {pid: min(held, vram_after[gpu][pid]) for pid, held in holders.items() if pid in vram_after[gpu]}
                for gpu, holders in vram_before.items()
                if gpu in vram_after
            },
            late=tuple(sorted(set(late_before) & set(late_after), key=lambda late: (late.gpu, late.inner))),
            held_before=dict(self._held),
            capacity={index: gpu.total - gpu.reserved for index, gpu in enumerate(self._host.gpus.gpus)},
            closed_doors=doors,
            tickets=tickets,
        )

    def _remember(
        self, leases: Mapping[str, Held], processes: Iterable[Process], vram: Mapping[int, Mapping[int, int]]
    ) -> None:
        """Note what the living hold, for the looks after their end."""
        pids: dict[str, list[int]] = {}
        for process in processes:
            if process.model is not None:
                pids.setdefault(process.model, []).append(process.pid)
        for name in leases.keys() & pids.keys():
            for gpu, holders in vram.items():
                self._held[name, leases[name].created, gpu] = sum(holders.get(pid, 0) for pid in pids[name])

    # Processes

    def _processes(self) -> Iterator[Process]:
        root = self._host.cgroup
        for directory, _, files in os.walk(root):
            if "cgroup.procs" not in files:
                continue
            with suppress(OSError):
                for pid in Path(directory, "cgroup.procs").read_text().split():
                    process = _process(int(pid), f"/{root.parent.name}/{root.name}")
                    if process is not None:
                        yield process

    # Leases

    def _leases(self, run: Path) -> dict[str, Held | None]:
        """By model; None: there is one that cannot be read."""
        found: dict[str, Held | None] = {}
        with suppress(OSError):
            for name in os.listdir(run / "models"):  # noqa: PTH208
                try:
                    text = (run / "models" / name / "lease.json").read_bytes()
                except OSError:
                    continue
                try:
                    found[name] = _held(json.loads(text))
                except (ValueError, KeyError, TypeError):
                    found[name] = None
        return found

    # Bytes

    def _vram(self) -> dict[int, Mapping[int, int]]:
        found: dict[int, Mapping[int, int]] = {}
        for index in range(len(self._host.gpus.gpus)):
            with suppress(OSError):
                found[index] = self._host.gpus.holders(index)
        return found

    def _late(self) -> Iterator[Late]:
        """What a driver that lets go late, or never, still counts: see tests/fakegpu/vram.c."""
        delay_ms = self._host.gpus.faults.release_delay_ms
        if not delay_ms:
            return
        now_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
        for index in range(len(self._host.gpus.gpus)):
            try:
                table = (self._host.gpus.directory / f"gpu{index}.slots").read_bytes()
            except OSError:
                continue
            for owner, _, length, dead_ms in _SLOT.iter_unpack(table[: len(table) // _SLOT.size * _SLOT.size]):
                # Only what somebody has seen dead, so that it is the driver's word.
                if owner and length and dead_ms and (delay_ms < 0 or now_ms - dead_ms < delay_ms):
                    yield Late(index, owner >> 40, length)

    # Units

    def _units(self) -> dict[str, Unit] | None:
        command = ("systemctl", "show", "-p", _PROPERTIES, "--", "model@*.service", "model-*.scope")
        try:
            result = self._host.run(*command, check=False, timeout=_SYSTEMD_SECONDS)
        except MachineError:
            return None
        if result.returncode != 0:
            return None
        found: dict[str, Unit] = {}
        for paragraph in result.stdout.split("\n\n"):
            said = dict(line.split("=", 1) for line in paragraph.splitlines() if "=" in line)
            if "Id" in said:
                found[said["Id"]] = Unit(
                    said.get("ActiveState", ""),
                    said.get("SubState", ""),
                    said.get("Result", ""),
                    job=said.get("Job", "0") not in {"", "0"},
                )
        return found

    # Locks

    def _locks(self, run: Path) -> tuple[frozenset[str], int]:
        """The models whose door is locked exclusively, and how many tickets are held."""
        locked = set()
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) >= 8 and words[1] == "FLOCK" and words[3] == "WRITE":
                locked.add(words[5])

        def is_locked(file: Path) -> bool:
            try:
                status = file.stat()
            except OSError:
                return False
            return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}" in locked

        with suppress(OSError):
            doors = frozenset(door.parent.name for door in (run / "models").glob("*/door") if is_locked(door))
            waiting = run / "waiting"
            return doors, sum(map(is_locked, waiting.iterdir())) if waiting.is_dir() else 0
        return frozenset(), 0


def _same(before: Held | None, after: Held | None) -> bool:
    """Also where neither can be read, and where there was none: the caller knows that there is one of them."""
    if before is None or after is None:
        return before is after
    return before.created == after.created


def _held(value: dict[str, Any]) -> Held:
    return Held(
        model=value["model"],
        created=value["created"],
        ready=value["ready"],
        pid=value["pid"],
        cgroup=value["cgroup"],
        gpus=tuple(Given(gpu["index"], gpu["reserved_bytes"], gpu["used_bytes"]) for gpu in value["gpus"]),
        evicting=tuple(value["evicting"]),
        pids=frozenset(pid for pid, _ in value["processes"]),
    )


def _process(pid: int, root: str) -> Process | None:
    """None: it is gone, or dead and not buried. ``root`` is how the path of the machine's root control group ends."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        comm, _, rest = stat.partition("(")[2].rpartition(")")
        fields = rest.split()
        if fields[0] in "ZX":
            return None
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        status = Path(f"/proc/{pid}/status").read_text()
        # After its command: what is to be an engine is moved to its scope first, and executes that then.
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except (OSError, IndexError):
        return None
    whole = re.search(r"^0::(.*)$", groups, re.MULTILINE)
    cgroup = whole[1].partition(root)[2] or "/" if whole else "/"
    inner = re.search(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)
    found = _MODEL.search(command) if comm == "test-engine" or comm.startswith("engine-") else None
    return Process(
        pid=pid,
        inner=int(inner[1]) if inner else 0,
        ticks=int(fields[19]),
        cgroup=cgroup,
        command=command.replace("\0", " ").strip() or f"[{comm}]",
        model=found[1] if found else None,
    )
