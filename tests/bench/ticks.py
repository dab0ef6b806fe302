"""``tests/bench/watchdog``: what a tick costs with 64 models on 8 simulated GPUs, each a real process with VRAM."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpusvc.config.watched import Watched
from gpusvc.gpu.meter import Meter
from gpusvc.gpu.nvml import Nvml
from gpusvc.gpu.reading import Gpu, ProcessSample
from gpusvc.linux import cgroup
from gpusvc.systemd.notify import Notifier
from gpusvc.watchdog.daemon import Watchdog, boottime
from gpusvc.watchdog.observer import Observer
from tests.component.conftest import Machine
from tests.component.fleet import Fleet
from tests.fakegpu import FakeGpu, Sample, build

MODELS = 64
GPUS = 8

# As after a second of doing other things: nothing is in the caches of the CPU any more.
PAUSE_SECONDS = 0.2


class TimedNvml(Nvml):
    """Knows what it cost."""

    cpu_seconds = 0.0

    def snapshot(self, **options: bool) -> tuple[Gpu, ...]:
        with self._timed():
            return super().snapshot(**options)

    def process_utilisation(self, gpu_uuid: str, since_us: int) -> tuple[tuple[ProcessSample, ...] | None, int]:
        with self._timed():
            return super().process_utilisation(gpu_uuid, since_us)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.process_time()
        yield
        TimedNvml.cpu_seconds += time.process_time() - began


def main() -> None:
    ticks = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        machine = Machine(build(directory / "library"), directory / "gpus")
        machine.gpus.configure([FakeGpu(total=80 << 30) for _ in range(GPUS)])
        os.environ["FAKEGPU_DIR"] = str(directory / "gpus")
        ctypes.CDLL(str(machine.libraries.nvml))  # pynvml finds it by its name from now on
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


def measure(fleet: Fleet, ticks: int) -> None:
    watched = Watched(fleet.paths, print)
    observer = Observer(fleet.paths, watched, Meter(TimedNvml), now=boottime, wall=time.time, group_of=fleet.group_of)
    watchdog = Watchdog(fleet.paths, watched, observer, fleet.systemd.connect, Notifier(), now=boottime)
    costs, waits, driver = [], [], []
    for _ in range(ticks + 3):
        cpu, wall, TimedNvml.cpu_seconds = time.process_time(), time.monotonic(), 0.0
        judgement = watchdog.tick()
        costs.append(time.process_time() - cpu)
        driver.append(TimedNvml.cpu_seconds)
        waits.append(time.monotonic() - wall)
        time.sleep(PAUSE_SECONDS)
    assert len(judgement.verdicts) == MODELS
    assert all("was not used" in verdict.reason for verdict in judgement.verdicts), judgement.verdicts[0]
    watchdog.close()
    cost = statistics.median(costs[3:])
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    print(f"{MODELS} models on {GPUS} simulated GPUs, {ticks} ticks")
    print(f"CPU of a tick          {cost * 1000:6.2f} ms (median), {max(costs[3:]) * 1000:.2f} ms (most)")
    print(f"  of it in NVML        {statistics.median(driver[3:]) * 1000:6.2f} ms, simulated by reading /proc/locks")
    print(f"at one tick a second   {cost * 100:6.2f} % of a core")
    print(f"a tick takes           {statistics.median(waits[3:]) * 1000:6.2f} ms")
    print(f"resident memory        {int(resident.split()[1]) / 1000:6.1f} MB, of this process with its tests")
