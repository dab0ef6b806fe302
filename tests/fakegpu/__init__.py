"""Simulated GPUs: builds the C libraries beside this file, and says what the GPUs are and which faults they play.

The machine under test loads ``libnvidia-ml.so.1`` as if it were the driver's; its engines take VRAM through
``libfakecuda.so``. Both read the directory that ``FakeGpus`` writes (``$FAKEGPU_DIR``, ``/run/fakegpu`` if unset) at
every call, so that a change shows at once in processes that are running.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from pathlib import Path

SOURCES = Path(__file__).parent
# Plain C11 keeps glibc 2.38 and newer from binding to functions that Debian 12 does not have.
FLAGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
GIB = 1 << 30
MIB = 1 << 20
NEVER = -1  # as a release delay


class Return(IntEnum):
    """The nvmlReturn_t codes that a fault can answer with."""

    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    DRIVER_NOT_LOADED = 9
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIBRARY_MISMATCH = 18
    UNKNOWN = 999


@dataclass(frozen=True, slots=True)
class Libraries:
    """What was built; ``LD_LIBRARY_PATH`` is ``directory``, or ``old_directory`` for a driver without newer symbols."""

    directory: Path

    @property
    def nvml(self) -> Path:
        return self.directory / "libnvidia-ml.so.1"

    @property
    def old_directory(self) -> Path:
        return self.directory / "old"

    @property
    def cuda(self) -> Path:
        return self.directory / "libfakecuda.so"


def build(directory: Path) -> Libraries:
    """Compile the libraries into ``directory``, unless they are there and made from the same sources."""
    libraries = Libraries(directory)
    digest = hashlib.sha256(repr(FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    stamp = directory / "sources.sha256"
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return libraries
    libraries.old_directory.mkdir(parents=True, exist_ok=True)
    soname = "-Wl,-soname,libnvidia-ml.so.1"
    _compile(libraries.nvml, "nvml.c", soname)
    _compile(libraries.old_directory / "libnvidia-ml.so.1", "nvml.c", soname, "-DOLD_DRIVER")
    _compile(libraries.cuda, "cuda.c", "-Wl,-soname,libfakecuda.so")
    _write(stamp, digest.hexdigest())
    return libraries


def _compile(target: Path, source: str, *options: str) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        sources = (str(SOURCES / source), str(SOURCES / "vram.c"))
        subprocess.run([os.environ.get("CC", "cc"), *FLAGS, *options, "-o", str(made), *sources], check=True)
        made.replace(target)


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


@dataclass(frozen=True, slots=True)
class Sample:
    """One process's share of the GPU's time; without a timestamp it is always of the moment it is asked for."""

    pid: int
    sm_percent: int
    timestamp_us: int | None = None


@dataclass(frozen=True, slots=True)
class FakeGpu:
    """One GPU and the faults that are its own. ``uuid``, ``minor`` and ``node`` follow its index if not given."""

    uuid: str | None = None
    name: str = "NVIDIA Simulated GPU"
    minor: int | None = None
    node: str | None = None
    total: int = 24 * GIB  # bytes, as all sizes here
    reserved: int = 256 * MIB
    uncounted: int = 0  # used, but by no process that is listed
    utilisation: int | None = 0  # None: not supported, nor per process
    samples: Sequence[Sample] = ()
    mig: bool | None = None  # None: a GPU that has no such mode
    ghosts: Mapping[int, int] = field(default_factory=dict)  # pid → bytes of processes that do not exist
    graphics: bool = False  # processes are in the graphics list as well
    memory_unsupported: bool = False
    process_bytes_unknown: bool = False
    processes_error: Return | None = None
    handle_error: Return | None = None
    utilisation_error: Return | None = None
    compute_mode: int = 0  # nvmlComputeMode_t: 2 prohibited, 3 exclusive to one process
    samples_by: int = 0  # which call knows the work of processes: 0 the old and the new one, 1 the new one, 2 none
    hidden_percent: int = 0  # of each process's bytes: managed memory, which is attributed to nobody
    lost: bool = False  # until this is reset, whatever its users do; FakeGpus.lose() is until they initialise again
    lost_serial: int = 0
    hangs: bool = False  # no call on it returns, until this is unset

    def lines(self, index: int) -> list[str]:
        values: dict[str, object] = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("ghosts", "samples")
        }
        values["uuid"] = self.uuid or uuid_of(index)
        values["minor"] = index if self.minor is None else self.minor
        values["utilisation"] = -1 if self.utilisation is None else self.utilisation
        values["mig"] = -1 if self.mig is None else int(self.mig)
        lines = [
            f"{index}.{key} {int(value) if isinstance(value, int) else value}"
            for key, value in values.items()
            if value is not None
        ]
        lines += [f"{index}.ghost {pid} {size}" for pid, size in self.ghosts.items()]
        lines += [f"{index}.sample {s.pid} {s.sm_percent} {s.timestamp_us or 0}" for s in self.samples]
        return lines


def uuid_of(index: int) -> str:
    """The UUID that GPU ``index`` has unless it was given one."""
    return f"GPU-fa4e0000-0000-4000-8000-{index:012d}"


@dataclass(frozen=True, slots=True)
class Faults:
    """What the driver as a whole does."""

    init_error: Return | None = None
    release_delay_ms: int = 0  # from when somebody first looks after a process died; NEVER: until this is changed
    slow_ms: int = 0  # each call
    hangs: bool = False  # no call returns, until this is unset
    insufficient_times: int = 0  # so many process lists are said to have grown between the two questions, per client
    need_nodes: bool = False  # an absent node is as bad as a denied one
    larger_entries: bool = False  # the process lists of branch 535, whose entries are larger than the header says
    denied_vanish: bool = False  # NVML does not count GPUs whose node is denied, and numbers the others anew
    driver_version: str = "580.65.06"
    control_node: str = "/dev/nvidiactl"
    uvm_node: str = "/dev/nvidia-uvm"

    def lines(self) -> list[str]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return [f"{k} {int(v) if isinstance(v, int) else v}" for k, v in values.items() if v is not None]


class FakeGpus:
    """The GPUs of one simulated machine; ``directory`` may be seen through ``/proc/PID/root`` of a container.

    Nothing is configured to begin with: then there is no driver. What is not said stays as it was.
    """

    _serials = itertools.count(time.time_ns())

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.gpus: tuple[FakeGpu, ...] = ()
        self.faults = Faults()

    def configure(self, gpus: Sequence[FakeGpu] | None = None, **faults: object) -> None:
        """Have these GPUs, and these ``Faults``; others stay as they are."""
        if gpus is not None:
            self.gpus = tuple(gpus)
        self.faults = replace(self.faults, **faults)  # type: ignore[arg-type]  # checked by the dataclass itself
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        for index in range(len(self.gpus)):
            for suffix in ("vram", "slots"):  # written by engines, whoever they run as
                path = self.directory / f"gpu{index}.{suffix}"
                path.touch()
                path.chmod(0o666)
        lines = [f"serial {next(self._serials)}", f"gpus {len(self.gpus)}", *self.faults.lines()]
        for index, gpu in enumerate(self.gpus):
            lines += gpu.lines(index)
        _write(self.directory / "config", "".join(f"{line}\n" for line in lines))

    def change(self, index: int, **values: object) -> None:
        """Change one GPU."""
        changed = replace(self.gpus[index], **values)  # type: ignore[arg-type]  # as above
        self.configure([*self.gpus[:index], changed, *self.gpus[index + 1 :]])

    def lose(self, index: int) -> None:
        """GPU ``index`` falls off the bus for every client until that one initialises anew."""
        self.change(index, lost_serial=next(self._serials))

    def remove_driver(self) -> None:
        """As on a machine without one."""
        (self.directory / "config").unlink(missing_ok=True)

    def holders(self, index: int = 0) -> dict[int, int]:
        """pid → bytes of the living that hold memory of GPU ``index``, as pids of the reader's own namespace."""
        status = (self.directory / f"gpu{index}.vram").stat()
        wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
        held: dict[int, int] = {}
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: POSIX  ADVISORY  WRITE 20953 fe:00:2204163 5 14
            words = line.split()
            if len(words) != 8 or words[1] != "POSIX":
                continue
            major, minor, inode = words[5].split(":")
            if (int(major, 16), int(minor, 16), int(inode)) == wanted:
                held[int(words[4])] = held.get(int(words[4]), 0) + int(words[7]) - int(words[6]) + 1
        return held
