"""``tests/bench/watchdog``: what a tick costs with 64 models on 8 simulated GPUs, each a real process with VRAM."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gpusvc.config.watched import Watched
from gpusvc.gpu import reader_process
from gpusvc.gpu.driver import Driver
from gpusvc.gpu.meter import Meter
from gpusvc.gpu.nvml import Nvml
from gpusvc.linux import cgroup
from gpusvc.systemd.notify import Notifier
from gpusvc.watchdog.daemon import Watchdog, boottime
from gpusvc.watchdog.observer import Observer
from tests.component.conftest import Machine
from tests.component.fleet import Fleet
from tests.fakegpu import FakeGpu, Sample, build

ROOT = Path(__file__).parents[2]
MODELS = 64
GPUS = 8

# As after a second of doing other things: nothing is in the caches of the CPU any more.
PAUSE_SECONDS = 0.2


def cpu_seconds(pid: int) -> float:
    """What a process has used, by the scheduler's own count."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    ticks = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        machine = Machine(build(directory / "library"), directory / "gpus")
        machine.gpus.configure([FakeGpu(total=80 << 30) for _ in range(GPUS)])
        os.environ["FAKEGPU_DIR"] = str(directory / "gpus")
        os.environ["LD_LIBRARY_PATH"] = str(machine.libraries.directory)
        os.environ["PYTHONPATH"] = str(ROOT)
        cgroup.ROOT = directory / "cgroup"
        fleet = Fleet(machine, directory, cgroup.ROOT)
        try:
            for number in range(MODELS):
                fleet.add(f"model{number}", gpus=[number % GPUS])
            for gpu in range(GPUS):
                pids = [fleet.holders[f"model{number}"].pid for number in range(gpu, MODELS, GPUS)]
                machine.gpus.change(gpu, samples=[Sample(pid, 0) for pid in pids])
            measure(fleet, ticks)
        finally:
            machine.close()


def over_nvml(driver: Driver, nvml: Nvml) -> float:
    """What the way to the reader and back adds: a snapshot there, less the time of the same one here."""
    began = time.perf_counter()
    driver.snapshot()
    there = time.perf_counter()
    nvml.snapshot()
    return (there - began) - (time.perf_counter() - there)


def measure(fleet: Fleet, ticks: int) -> None:
    watched = Watched(fleet.paths, print)
    driver = Driver(patience_seconds=10, begin=reader_process.execute)
    meter = Meter(lambda: driver)
    observer = Observer(fleet.paths, watched, meter, now=boottime, wall=time.time, group_of=fleet.group_of)
    watchdog = Watchdog(fleet.paths, watched, observer, fleet.systemd.connect, Notifier(), now=boottime)
    costs, waits, readings = [], [], []
    watchdog.tick()
    reader = driver._reader
    assert reader is not None
    for _ in range(ticks + 3):
        cpu, wall, reading = time.process_time(), time.monotonic(), cpu_seconds(reader.pid)
        judgement = watchdog.tick()
        costs.append(time.process_time() - cpu)
        readings.append(cpu_seconds(reader.pid) - reading)
        waits.append(time.monotonic() - wall)
        time.sleep(PAUSE_SECONDS)
    ctypes.CDLL(str(fleet.machine.libraries.nvml))  # pynvml finds it by its name from now on
    with Nvml() as nvml:
        calls = [over_nvml(driver, nvml) for _ in range(ticks)]
    assert len(judgement.verdicts) == MODELS
    assert all("was not used" in verdict.reason for verdict in judgement.verdicts), judgement.verdicts[0]
    watchdog.close()
    cost = statistics.median(costs[3:])
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    print(f"{MODELS} models on {GPUS} simulated GPUs, {ticks} ticks")
    print(f"CPU of a tick          {cost * 1000:6.2f} ms (median), {max(costs[3:]) * 1000:.2f} ms (most)")
    print(f"CPU of its reader      {statistics.median(readings[3:]) * 1000:6.2f} ms, mostly the simulated driver's")
    print(f"a call behind it costs {statistics.median(calls) * 1000:6.2f} ms more than NVML itself")
    print(f"at one tick a second   {cost * 100:6.2f} % of a core")
    print(f"a tick takes           {statistics.median(waits[3:]) * 1000:6.2f} ms")
    print(f"resident memory        {int(resident.split()[1]) / 1000:6.1f} MB, of this process with its tests")
