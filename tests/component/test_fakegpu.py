"""The simulated GPUs obey the physics that the other tests rely on."""

from __future__ import annotations

import signal
import sys
import time
from typing import cast

import pytest

from gpusvc.gpu.reading import Gpu
from tests.component.conftest import Machine, eventually, say
from tests.fakegpu import GIB, NEVER, FakeGpu, uuid_of

# Takes VRAM in steps, and does other things on command.
_ENGINE = """
import ctypes, os, sys
cuda = ctypes.CDLL(sys.argv[1], use_errno=True)
def take(gpu, size):
    return cuda.fake_alloc(gpu, ctypes.c_ulonglong(size)) and ctypes.get_errno()
def give(gpu, size):
    return cuda.fake_free(gpu, ctypes.c_ulonglong(size))
def fork_and_take(gpu, size):
    taken, taking = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(taking, b"%d" % take(gpu, size))
        sys.stdin.read()  # for as long as the parent lives
        os._exit(0)
    assert os.read(taken, 9) == b"0"
    return child
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Watcher:
    """An NVML client that stays."""

    def __init__(self, machine: Machine) -> None:
        self._client = machine.client()
        self._client.ask("connect()")

    def held(self, index: int = 0) -> dict[int, int | None]:
        gpus = cast("tuple[Gpu, ...]", self._client.ask("client.snapshot()"))
        processes = gpus[index].processes
        assert processes is not None
        return {process.pid: process.used_bytes for process in processes}


def finished(machine: Machine, vram: str, **environment: str) -> tuple[int, str]:
    process = machine.start("true", LD_PRELOAD=str(machine.libraries.cuda), FAKE_VRAM=vram, **environment)
    _, errors = process.communicate()
    return process.returncode, errors


def test_memory_is_free_as_soon_as_its_process_was_killed(machine: Machine) -> None:
    holder, watcher = machine.holder("9GiB"), Watcher(machine)
    assert watcher.held() == {holder.pid: 9 * GIB}
    holder.kill()
    holder.wait()
    assert watcher.held() == {}
    assert finished(machine, "20GiB") == (0, "")


def test_a_stopped_process_keeps_its_memory(machine: Machine) -> None:
    holder = machine.holder("9GiB")
    holder.send_signal(signal.SIGSTOP)
    assert Watcher(machine).held() == {holder.pid: 9 * GIB}


def test_more_than_there_is_fails_as_cuda_does(machine: Machine) -> None:
    machine.holder("20GiB")
    assert finished(machine, "4GiB") == (1, "CUDA error: out of memory\n")


def test_of_many_that_want_memory_at_once_only_those_get_it_that_it_suffices_for(machine: Machine) -> None:
    preload = {"LD_PRELOAD": str(machine.libraries.cuda), "FAKE_VRAM": "7GiB"}
    crowd = [machine.start("sh", "-c", "echo ready; read line", **preload) for _ in range(12)]
    lucky = [process.pid for process in crowd if process.stdout and process.stdout.readline()]
    assert Watcher(machine).held() == dict.fromkeys(lucky, 7 * GIB)
    assert len(lucky) == 3


def test_memory_is_had_in_steps_and_given_back(machine: Machine) -> None:
    engine, watcher = machine.start(sys.executable, "-c", _ENGINE, str(machine.libraries.cuda)), Watcher(machine)
    gpu = uuid_of(0).encode()
    assert say(engine, f"[take({gpu!r}, {GIB}) for _ in range(3)]") == "[0, 0, 0]"
    assert watcher.held() == {engine.pid: 3 * GIB}
    other = machine.holder("1GiB")
    assert say(engine, f"give({gpu!r}, {GIB + 5})") == "0"
    assert watcher.held() == {engine.pid: 2 * GIB - 5, other.pid: GIB}
    assert say(engine, f"take({gpu!r}, {21 * GIB})") == "12"  # ENOMEM
    assert say(engine, f"take({gpu!r}, {20 * GIB})") == "0"  # around what the other holds
    assert say(engine, "take(b'GPU-none', 1)") == "19"  # ENODEV
    assert say(engine, f"give({gpu!r}, {(1 << 64) - 1})") == "0"
    assert watcher.held() == {other.pid: GIB}


def test_a_forked_child_inherits_nothing_and_takes_its_own(machine: Machine) -> None:
    engine, watcher = machine.start(sys.executable, "-c", _ENGINE, str(machine.libraries.cuda)), Watcher(machine)
    gpu = uuid_of(0).encode()
    assert say(engine, f"take({gpu!r}, {GIB})") == "0"
    child = int(say(engine, f"fork_and_take({gpu!r}, {2 * GIB})"))
    assert watcher.held() == {engine.pid: GIB, child: 2 * GIB}
    engine.kill()
    engine.wait()
    assert watcher.held() == {child: 2 * GIB}


def test_visible_gpus_are_those_that_the_variable_names(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(), FakeGpu(), FakeGpu()])
    everywhere = machine.holder("1GiB")
    second = machine.holder("2GiB", CUDA_VISIBLE_DEVICES=uuid_of(1))
    both = machine.holder("3GiB,4GiB", CUDA_VISIBLE_DEVICES=f"{uuid_of(2)},{uuid_of(0)}")
    watcher = Watcher(machine)
    assert watcher.held(0) == {everywhere.pid: GIB, both.pid: 4 * GIB}
    assert watcher.held(1) == {everywhere.pid: GIB, second.pid: 2 * GIB}
    assert watcher.held(2) == {everywhere.pid: GIB, both.pid: 3 * GIB}


@pytest.mark.parametrize("visible", ["", "GPU-none", f"{uuid_of(0)},GPU-none"])
def test_who_sees_no_gpu_or_too_few_fails_as_cuda_does(machine: Machine, visible: str) -> None:
    status, errors = finished(machine, "1GiB", CUDA_VISIBLE_DEVICES=visible)
    assert (status, errors) == (1, "CUDA error: no CUDA-capable device is detected\n")


def test_a_denied_node_hides_its_gpu(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(node="/sys/kernel/uevent_seqnum"), FakeGpu()])
    status, errors = finished(machine, "1GiB", CUDA_VISIBLE_DEVICES=uuid_of(0))
    assert (status, errors) == (1, "CUDA error: no CUDA-capable device is detected\n")
    holder = machine.holder("1GiB")
    assert machine.gpus.holders(0) == {}
    assert machine.gpus.holders(1) == {holder.pid: GIB}


@pytest.mark.parametrize(("variable", "takers"), [("0", 1), ("1", 2)])
def test_children_take_memory_only_if_told_to(machine: Machine, variable: str, takers: int) -> None:
    preload = {"LD_PRELOAD": str(machine.libraries.cuda), "FAKE_VRAM": "1GiB", "FAKE_VRAM_CHILDREN": variable}
    shell = machine.start("sh", "-c", "cat; true", **preload)
    assert say(shell, "ready") == "ready"
    assert len(machine.gpus.holders(0)) == takers


def test_memory_and_pid_stay_for_as_long_as_the_release_is_delayed(machine: Machine) -> None:
    machine.gpus.configure(release_delay_ms=300)
    holder, watcher = machine.holder("9GiB"), Watcher(machine)
    holder.kill()
    holder.wait()
    assert watcher.held() == {holder.pid: 9 * GIB}
    assert finished(machine, "20GiB") == (1, "CUDA error: out of memory\n")
    assert eventually(lambda: watcher.held() == {})
    assert finished(machine, "20GiB") == (0, "")


def test_all_clients_agree_on_when_a_delayed_release_is_over(machine: Machine) -> None:
    machine.gpus.configure(release_delay_ms=300)
    holder, first = machine.holder("9GiB"), Watcher(machine)
    holder.kill()
    holder.wait()
    first.held()
    assert eventually(lambda: first.held() == {})
    assert Watcher(machine).held() == {}


def test_a_stuck_release_ends_when_it_is_told_to(machine: Machine) -> None:
    machine.gpus.configure(release_delay_ms=NEVER)
    holder, watcher = machine.holder("9GiB"), Watcher(machine)
    holder.kill()
    holder.wait()
    assert watcher.held() == {holder.pid: 9 * GIB}
    machine.gpus.configure(release_delay_ms=0)
    assert watcher.held() == {}


def test_a_slow_driver_takes_its_time(machine: Machine) -> None:
    watcher = Watcher(machine)
    machine.gpus.configure(slow_ms=20)
    began = time.monotonic()
    assert watcher.held() == {}
    assert time.monotonic() - began > 0.1
