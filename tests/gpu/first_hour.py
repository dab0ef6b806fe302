#!/usr/bin/env python3
"""The first minutes on real hardware: what gpusvc has to know of a driver, asked in order of worth, as Markdown.

``python3 tests/gpu/first_hour.py [FILE]`` needs pynvml, and CUDA's driver library for most steps; root and a unified
cgroup hierarchy for one. It needs no PyTorch and no systemd. Each step has a limit, all together take less than ten
minutes, and no process is left. A step that cannot be done says so. docs/hardware.md says what each answer decides.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpusvc.errors import NvmlError  # noqa: E402  # the path is set for runs without a package
from gpusvc.gpu.nvml import Nvml  # noqa: E402
from gpusvc.gpu.reading import Gpu  # noqa: E402

MIB = 1 << 20
STEP_SECONDS = 60
WATCHED_SECONDS = 10.0

# A program that speaks CUDA's driver API. It says what each call returned, holds memory, and ends with its input.
CUDA = """
import ctypes, sys
kind, size = sys.argv[1], int(sys.argv[2])
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    print("skipped:", error, flush=True); sys.exit()
count, device, context, pointer = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
print("cuInit", cuda.cuInit(0), flush=True)
print("cuDeviceGetCount", cuda.cuDeviceGetCount(ctypes.byref(count)), "counted", count.value, flush=True)
if kind == "count" or not count.value: sys.exit()
print("cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(device), 0), flush=True)
print("cuCtxCreate", cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device), flush=True)
if kind == "managed":
    print("cuMemAllocManaged", cuda.cuMemAllocManaged(ctypes.byref(pointer), ctypes.c_size_t(size), 1), flush=True)
else:
    print("cuMemAlloc", cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)), flush=True)
fill = lambda: cuda.cuMemsetD8_v2(pointer, ctypes.c_ubyte(1), ctypes.c_size_t(size)) or cuda.cuCtxSynchronize()
print("cuMemsetD8", fill(), flush=True)
print("ready", flush=True)
for line in sys.stdin:
    import time
    end = time.monotonic() + float(line)
    while time.monotonic() < end: fill()
    print("done", flush=True)
"""

# What NVML says of each index, and what it returns for the calls that differ between GPUs.
LOOK = """
import pynvml as nv
nv.nvmlInit()
def told(call, *arguments):
    try:
        return call(*arguments)
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'value', '')}".strip()
print("nvmlDeviceGetCount", nv.nvmlDeviceGetCount())
for index in range(nv.nvmlDeviceGetCount()):
    handle = told(nv.nvmlDeviceGetHandleByIndex, index)
    print("index", index, handle if isinstance(handle, str) else told(nv.nvmlDeviceGetUUID, handle))
    if isinstance(handle, str): continue
    for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"):
        found = told(getattr(nv, name, lambda _: "absent"), handle)
        print(" ", name, found if isinstance(found, str) else [(p.pid, p.usedGpuMemory) for p in found])
    for name in ("nvmlDeviceGetProcessUtilization", "nvmlDeviceGetProcessesUtilizationInfo"):
        found = told(getattr(nv, name, lambda *_: "absent"), handle, 0)
        print(" ", name, found if isinstance(found, str) else [(s.pid, s.smUtil) for s in found][:8])
    for name in ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetComputeMode", "nvmlDeviceGetMigMode",
                 "nvmlDeviceGetPersistenceMode"):
        print(" ", name, str(told(getattr(nv, name), handle)).replace(chr(10), " "))
"""


class Skipped(Exception):  # noqa: N818  no error: a step says why it is left out
    """Why a step cannot be done here."""


class Report:
    """Markdown, written after each step, so that a step that hangs the machine leaves the others."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines = ["# First hour on hardware", ""]

    def step(self, title: str, work: Callable[[], Iterator[str]]) -> None:
        self._lines += [f"## {title}", ""]
        began = time.monotonic()
        try:
            for line in work():
                self._lines.append(f"    {line}")
        except Skipped as reason:
            self._lines.append(f"Skipped: {reason}")
        except (OSError, subprocess.SubprocessError, NvmlError) as error:
            self._lines.append(f"Failed: {type(error).__name__}: {error}")
        self._lines += ["", f"{time.monotonic() - began:.1f} s", ""]
        self._file.write_text("\n".join(self._lines))
        print(f"{title}: done", flush=True)


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "first-hour.md")
    report = Report(file)
    report.step("The machine", machine)
    report.step("1. A process that may not open a GPU", denied)
    report.step("2. The work of processes, idle and busy", work)
    report.step("3a. The end of a process with plain memory", lambda: killed("plain"))
    report.step("3b. The end of a process with managed memory", lambda: killed("managed"))
    report.step("4. Lists of processes as another user", as_another)
    report.step("5. A second client of NVML: opening and reading", clients)
    print(f"The report is in {file}.")


def run(script: str, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> list[str]:
    """What a program of ours printed; it is ended after STEP_SECONDS."""
    command = [*prefix, sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=STEP_SECONDS, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        lines += [f"exit status {done.returncode}", *done.stderr.splitlines()[-1:]]
    return lines


def free_gpu() -> Gpu:
    with Nvml() as nvml:
        gpus = [gpu for gpu in nvml.snapshot() if gpu.problem is None and gpu.free_bytes]
    if not gpus:
        raise Skipped("no GPU tells its free memory")
    return max(gpus, key=lambda gpu: gpu.free_bytes or 0)


@contextlib.contextmanager
def holder(kind: str, gpu: Gpu, size: int) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that holds ``size`` bytes, and what its calls returned."""
    process = subprocess.Popen(
        [sys.executable, "-c", CUDA, kind, str(size)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            if line == "ready\n":
                break
            said.append(line.rstrip())
        else:
            raise Skipped("; ".join(said) or "CUDA said nothing")
        yield process, said
    finally:
        process.kill()
        process.communicate()


# ---- the steps ----


def machine() -> Iterator[str]:
    yield f"kernel {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    with Nvml() as nvml:
        yield f"driver {nvml.driver_version()}"
        for gpu in nvml.snapshot(utilisation=True):
            yield str(gpu)
    yield from run(LOOK)


def denied() -> Iterator[str]:
    from tests.gpu.test_gpu import attach_device_program  # noqa: PLC0415  needs no GPU

    if os.geteuid():
        raise Skipped("only root attaches a device filter")
    root = next(
        (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if " cgroup2 " in line), ""
    )
    if not root:
        raise Skipped("no unified cgroup hierarchy is mounted")
    with Nvml() as nvml:
        gpus = [gpu for gpu in nvml.snapshot() if gpu.problem is None and gpu.minor is not None]
    group = Path(root, f"gpusvc-first-hour-{os.getpid()}")
    group.mkdir()
    try:
        attach_device_program(group, 195, gpus[0].minor or 0)
        inside = ("sh", "-c", 'echo 0 >"$0"/cgroup.procs && exec "$@"', str(group))
        yield f"{gpus[0].node} of {len(gpus)} GPUs is denied; NVML then:"
        yield from run(LOOK, prefix=inside)
        for visible in (None, "0", gpus[-1].uuid):
            yield f"CUDA with CUDA_VISIBLE_DEVICES={visible}:"
            unset = ("env", "-u", "CUDA_VISIBLE_DEVICES") if visible is None else ()
            yield from run(CUDA, "count", "0", prefix=(*inside, *unset), CUDA_VISIBLE_DEVICES=visible or "")
    finally:
        group.rmdir()


def work() -> Iterator[str]:
    gpu = free_gpu()
    with holder("plain", gpu, 256 * MIB) as (process, said):
        yield from said
        yield f"PID {process.pid}, idle:"
        yield from run(LOOK)
        assert process.stdin is not None
        process.stdin.write("8\n")
        process.stdin.flush()
        yield "busy:"
        yield from run(LOOK)


def killed(kind: str) -> Iterator[str]:
    gpu = free_gpu()
    size = int((gpu.free_bytes or 0) * 0.8) // MIB * MIB
    with Nvml() as nvml:
        before = reading(nvml, gpu)
        with holder(kind, gpu, size) as (process, said):
            yield from said
            yield f"{size // MIB} MiB, before {before}, held {reading(nvml, gpu, process.pid)}"
            began = time.monotonic()
            process.send_signal(signal.SIGKILL)
            last = ""
            while time.monotonic() - began < WATCHED_SECONDS:
                now = reading(nvml, gpu, process.pid)
                if now != last:
                    yield f"after {(time.monotonic() - began) * 1000:.0f} ms: {now}"
                last = now


def reading(nvml: Nvml, gpu: Gpu, pid: int | None = None) -> str:
    (now,) = nvml.snapshot(only=[gpu.index])
    listed = {process.pid: process.used_bytes for process in now.processes or ()}
    of_it = "" if pid is None else f", PID {pid} {listed.get(pid, 'is not listed')}"
    return f"{(now.used_bytes or 0) // MIB} MiB used, {len(listed)} processes{of_it}"


def as_another() -> Iterator[str]:
    if os.geteuid():
        raise Skipped("only root becomes another user")
    gpu = free_gpu()
    with holder("plain", gpu, 256 * MIB) as (process, _):
        yield f"PID {process.pid} of uid {os.geteuid()}; as uid 65534:"
        yield from run(LOOK, prefix=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))


def clients() -> Iterator[str]:
    for _ in range(3):
        began = time.perf_counter()
        with Nvml() as nvml:
            opened = time.perf_counter()
            nvml.snapshot()
            first = time.perf_counter()
            for _ in range(10):
                nvml.snapshot()
            last = time.perf_counter()
        opening, reads, more = opened - began, first - opened, (last - first) / 10
        yield f"open {opening * 1000:.1f} ms, first reading {reads * 1000:.1f} ms, further ones {more * 1000:.1f} ms"


if __name__ == "__main__":
    main()
