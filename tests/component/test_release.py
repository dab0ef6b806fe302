"""The release of a model, with the real pynvml on a simulated driver."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpusvc.errors import UnreleasedError
from gpusvc.linux import processes
from gpusvc.linux.processes import Process
from gpusvc.paths import Paths
from gpusvc.record import replace
from gpusvc.release.procedure import Release
from gpusvc.state import lease as leases
from gpusvc.state.lease import Lease, LeasedGpu
from tests.component.conftest import Machine, eventually
from tests.fakegpu import GIB, NEVER, FakeGpu, Return, uuid_of

# Releases a model; says what it waits for, and in its last line what came of it.
_RELEASE = """
import base64, pickle, sys
from pathlib import Path
from gpusvc.linux import cgroup
from gpusvc.release import procedure as release
from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths
directory = Path(sys.argv[1])
cgroup.ROOT = Path(sys.argv[2])
release._KILL_GRACE_SECONDS = 0
def tell(sentence):
    print("waits:", sentence, flush=True)
try:
    outcome = release.release(Paths(directory, directory, directory), "qwen", on_wait=tell)
except GpusvcError as error:
    outcome = error
print(base64.b64encode(pickle.dumps(outcome)).decode(), flush=True)
"""

GHOST = Process(2**22 + 1, 1)  # beyond the largest PID that a kernel hands out


class Ending:
    """A release that goes on; ``waits`` are the sentences that it said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.waits: list[str] = []

    def hear(self) -> str:
        """The next line; what it waits for is among them."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().rstrip("\n")
        if line.startswith("waits: "):
            self.waits.append(line.removeprefix("waits: "))
        return line

    def outcome(self) -> Release | None:
        line = self.hear()
        while line.startswith("waits: "):
            line = self.hear()
        answer: Release | Exception | None = pickle.loads(base64.b64decode(line))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def refusal(self) -> UnreleasedError:
        with pytest.raises(UnreleasedError) as caught:
            self.outcome()
        return caught.value


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path, runtime=tmp_path, state=tmp_path)


Begin = Callable[..., Ending]


@pytest.fixture
def begin(machine: Machine, paths: Paths, cgroup2: Path) -> Begin:
    def start() -> Ending:
        return Ending(machine.start(sys.executable, "-c", _RELEASE, str(paths.runtime), str(cgroup2)))

    return start


@pytest.fixture
def cgroup2(tmp_path: Path) -> Path:
    """Where no group is, so that all are empty."""
    return tmp_path / "no-groups"


def lease(*seen: Process, timeout: float = 10.0, baseline: int | None = 0, used: int | None = None) -> Lease:
    gpu = LeasedGpu(index=0, uuid=uuid_of(0), reserved_bytes=None, baseline_bytes=baseline, used_bytes=used)
    return Lease(
        model="qwen",
        port=20000,
        gpus=(gpu,),
        created=0.0,
        release_timeout_seconds=timeout,
        stop_timeout_seconds=0.0,
        processes=frozenset(seen),
    )


def identity(pid: int) -> Process:
    process = processes.identify(pid)
    assert process is not None
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


# ---- proven ----


def test_a_model_that_holds_nothing_has_nothing_to_release(begin: Begin) -> None:
    assert begin().outcome() is None


def test_an_empty_gpu_is_released_at_once_and_the_lease_is_gone(begin: Begin, paths: Paths) -> None:
    leases.write(paths, lease(GHOST, used=9 * GIB))
    released = begin().outcome()
    assert released is not None
    assert (released.model, released.bytes, released.gpus) == ("qwen", 9 * GIB, (0,))
    assert "no process of it is left, 9.0 GiB of VRAM on GPU 0 came back." in str(released)
    assert leases.read(paths, "qwen") is None


def test_a_model_without_gpus_is_released_on_a_machine_without_a_driver(
    machine: Machine, begin: Begin, paths: Paths
) -> None:
    machine.gpus.remove_driver()
    leases.write(paths, replace(lease(), gpus=()))
    released = begin().outcome()
    assert released is not None
    assert "VRAM" not in str(released)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "never seen alive"])
def test_a_driver_that_takes_its_time_is_waited_for(
    machine: Machine, begin: Begin, paths: Paths, *, recorded: bool
) -> None:
    machine.gpus.configure(release_delay_ms=1200)
    engine = machine.holder("9GiB")
    leases.write(paths, lease(*([identity(engine.pid)] if recorded else [])))
    end(engine)
    ending = begin()
    released = ending.outcome()
    assert released is not None
    assert released.seconds > 1.0
    assert ending.waits
    assert all(sentence.startswith("Stopping: ") and not sentence.endswith("..") for sentence in ending.waits)


def test_a_foreign_process_may_come_and_grow_meanwhile(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.configure(release_delay_ms=NEVER)
    engine = machine.holder("9GiB")
    leases.write(paths, lease(identity(engine.pid)))
    end(engine)
    ending = begin()
    ending.hear()
    foreign = machine.holder("8GiB")
    machine.gpus.configure(release_delay_ms=0)
    assert ending.outcome() is not None
    assert machine.gpus.holders() == {foreign.pid: 8 * GIB}


def test_a_foreign_process_that_has_the_pid_of_a_dead_one_is_left_alone(
    machine: Machine, begin: Begin, paths: Paths
) -> None:
    foreign = machine.holder("8GiB")
    leases.write(paths, lease(identity(foreign.pid)._replace(start_ticks=1)))
    assert begin().outcome() is not None
    assert foreign.poll() is None


def test_where_memory_tells_nothing_the_absence_of_processes_is_the_proof(
    machine: Machine, begin: Begin, paths: Paths
) -> None:
    machine.gpus.change(0, memory_unsupported=True)
    engine = machine.holder("9GiB")
    leases.write(paths, lease(identity(engine.pid), baseline=None, timeout=0.1))
    begin().refusal()
    end(engine)
    assert begin().outcome() is not None


def test_a_foreign_process_whose_bytes_are_unknown_is_no_obstacle(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.change(0, process_bytes_unknown=True)
    machine.holder("8GiB")
    leases.write(paths, lease(GHOST))
    assert begin().outcome() is not None


# ---- not proven ----


def test_a_process_that_lives_is_named_with_its_command_and_state(machine: Machine, begin: Begin, paths: Paths) -> None:
    engine = machine.holder("9GiB")
    leases.write(paths, lease(identity(engine.pid), timeout=0.3))
    error = begin().refusal()
    assert "qwen is stuck: its release is not proven after" in error.message
    assert f"NVML lists PID {engine.pid} on GPU 0 with 9.0 GiB." in error.message
    assert f"PID {engine.pid}: cat, state S; kernel stack: " in error.message
    assert "gpusvc release qwen" in (error.hint or "")
    assert leases.read(paths, "qwen") is not None


def test_a_ghost_is_named_and_cleared_by_a_later_proof(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.change(0, ghosts={GHOST.pid: 6 * GIB})
    leases.write(paths, lease(GHOST, timeout=0.3))
    error = begin().refusal()
    assert f"NVML lists PID {GHOST.pid} on GPU 0 with 6.0 GiB." in error.message
    assert f"PID {GHOST.pid}: [gone], no such process; kernel stack: not readable" in error.message
    assert leases.read(paths, "qwen") is not None
    machine.gpus.change(0, ghosts={})
    assert begin().outcome() is not None
    assert leases.read(paths, "qwen") is None


def test_memory_that_never_comes_back_is_not_released(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.configure(release_delay_ms=NEVER)
    engine = machine.holder("9GiB")
    seen = identity(engine.pid)
    leases.write(paths, lease(seen, timeout=0.3))
    end(engine)
    assert f"NVML lists PID {seen.pid} on GPU 0 with 9.0 GiB." in begin().refusal().message


def test_from_the_first_moment_of_the_end_no_lease_says_where_the_engine_listens(
    machine: Machine, begin: Begin, paths: Paths
) -> None:
    machine.gpus.change(0, ghosts={GHOST.pid: GIB})
    leases.write(paths, replace(lease(GHOST), address="127.0.0.1", ready=True))
    ending = begin()
    ending.hear()  # it waits for the driver
    left = leases.read(paths, "qwen")
    assert left is not None
    assert (left.address, left.ready) == (None, True)
    machine.gpus.change(0, ghosts={})
    assert ending.outcome() is not None


def test_memory_that_belongs_to_nobody_is_not_released(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.change(0, uncounted=3 * GIB)
    leases.write(paths, lease(timeout=0.3))
    message = begin().refusal().message
    assert "3.0 GiB of GPU 0 are in use and belong to no living process." in message


def test_bytes_beside_a_program_with_managed_memory_do_not_keep_a_model(
    machine: Machine, begin: Begin, paths: Paths
) -> None:
    leases.write(paths, lease(timeout=0.5))
    machine.gpus.change(0, hidden_percent=100)
    machine.holder("4GiB")
    assert begin().outcome() is not None
    assert leases.read(paths, "qwen") is None


def test_memory_that_belonged_to_nobody_before_is_not_asked_for(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.change(0, uncounted=3 * GIB)
    leases.write(paths, lease(baseline=3 * GIB))
    assert begin().outcome() is not None


@pytest.mark.parametrize("fault", [Return.UNKNOWN, Return.DRIVER_NOT_LOADED, Return.LIBRARY_MISMATCH])
def test_a_driver_that_does_not_answer_proves_nothing(
    machine: Machine, begin: Begin, paths: Paths, fault: Return
) -> None:
    machine.gpus.configure(init_error=fault)
    leases.write(paths, lease(timeout=0.3))
    message = begin().refusal().message
    assert ".." not in message
    assert leases.read(paths, "qwen") is not None


@pytest.mark.parametrize("values", [{"processes_error": Return.UNKNOWN}, {"handle_error": Return.UNKNOWN}], ids=str)
def test_a_gpu_that_does_not_answer_proves_nothing(
    machine: Machine, begin: Begin, paths: Paths, values: dict[str, Return]
) -> None:
    machine.gpus.change(0, **values)
    leases.write(paths, lease(timeout=0.3))
    assert "GPU 0" in begin().refusal().message
    assert leases.read(paths, "qwen") is not None


def test_a_gpu_that_is_lost_for_good_proves_nothing(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.change(0, lost=True)
    leases.write(paths, lease(timeout=0.3))
    message = begin().refusal().message
    assert "GPU 0" in message
    assert "lost" in message


def test_another_gpu_that_is_lost_is_no_obstacle(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.configure([FakeGpu(), FakeGpu(lost=True)])
    leases.write(paths, lease())
    assert begin().outcome() is not None


# ---- what changes on the way ----


def test_a_driver_that_comes_back_in_time_can_prove_it_still(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.configure(init_error=Return.UNKNOWN)
    leases.write(paths, lease())
    ending = begin()
    ending.hear()
    assert ending.waits
    machine.gpus.configure(init_error=None)
    assert ending.outcome() is not None


def test_a_gpu_that_is_reset_meanwhile_is_asked_again(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.change(0, ghosts={GHOST.pid: GIB})
    leases.write(paths, lease(GHOST))
    ending = begin()
    ending.hear()
    machine.gpus.change(0, ghosts={})
    machine.gpus.lose(0)
    assert ending.outcome() is not None


def test_a_release_that_is_killed_leaves_the_lease(machine: Machine, begin: Begin, paths: Paths) -> None:
    machine.gpus.change(0, ghosts={GHOST.pid: GIB})
    leases.write(paths, lease(GHOST))
    ending = begin()
    ending.hear()
    end(ending.process)
    assert leases.read(paths, "qwen") == lease(GHOST)


# ---- a lease that cannot be read ----


@pytest.mark.parametrize("content", ["", '{"version": 1', "garbage", '{"version": 99}'])
def test_a_broken_lease_is_dropped_once_nothing_of_the_model_is_left(begin: Begin, paths: Paths, content: str) -> None:
    paths.lease_directory("qwen").mkdir(parents=True)
    paths.lease_file("qwen").write_text(content)
    released = begin().outcome()
    assert released is not None
    assert released.gpus == ()
    assert "came back" not in str(released)
    assert leases.holders(paths) == []


# ---- with a control group of the kernel's ----


@pytest.fixture
def group() -> Iterator[Path]:
    """One that the kernel made, where gpusvc makes those of a model named qwen; under a root of its own."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("there is no unified control group hierarchy that may be written to")
    top = root / f"gpusvc-test-{os.getpid()}"
    made = top / "gpusvc.slice" / "gpusvc-models.slice" / "model-qwen.scope"
    made.mkdir(parents=True)
    yield made
    (made / "cgroup.kill").write_text("1")
    assert eventually(lambda: "populated 0" in (top / "cgroup.events").read_text())
    for directory in (made, *made.parents[:3]):
        directory.rmdir()


@pytest.fixture
def in_group(group: Path, machine: Machine) -> Callable[[], subprocess.Popen[str]]:
    """Start an engine in it that holds VRAM and ignores SIGTERM, with a child that does as well."""

    def start() -> subprocess.Popen[str]:
        script = f'echo $$ > "{group}/cgroup.procs"; trap "" TERM; sleep inf & exec cat'
        process = machine.start(
            "sh", "-c", script, LD_PRELOAD=str(machine.libraries.cuda), FAKE_VRAM="1GiB", FAKE_VRAM_CHILDREN="1"
        )
        assert eventually(lambda: processes.command(process.pid) == "cat")
        return process

    return start


def test_who_is_left_in_the_group_is_killed_by_the_kernel_where_systemd_does_not(
    machine: Machine,
    paths: Paths,
    group: Path,
    in_group: Callable[[], subprocess.Popen[str]],
) -> None:
    engine = in_group()
    assert len((group / "cgroup.procs").read_text().split()) == 2
    root = group.parents[2]
    leases.write(paths, replace(lease(identity(engine.pid)), cgroup="/" + str(group.relative_to(root))))
    ending = Ending(machine.start(sys.executable, "-c", _RELEASE, str(paths.runtime), str(root)))
    assert ending.outcome() is not None
    assert (group / "cgroup.procs").read_text() == ""
    assert engine.wait() == -9
    assert any("still there" in sentence for sentence in ending.waits)


def test_who_is_left_behind_by_a_lost_lease_is_found_and_killed(
    machine: Machine,
    paths: Paths,
    group: Path,
    in_group: Callable[[], subprocess.Popen[str]],
) -> None:
    engine = in_group()
    ending = Ending(machine.start(sys.executable, "-c", _RELEASE, str(paths.runtime), str(group.parents[2])))
    began = time.monotonic()
    assert ending.outcome() is not None
    assert time.monotonic() - began < 30
    assert engine.wait() == -9
