"""gpusvc.gpu.driver: NVML behind a reader process with a deadline, with the real pynvml on a simulated driver."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from gpusvc.errors import NvmlError, NvmlSilentError, NvmlUnavailableError
from gpusvc.gpu.reading import Gpu, GpuProcess, ProcessSample
from tests.component.conftest import Client, Machine, eventually
from tests.fakegpu import GIB, FakeGpu, Return, Sample, uuid_of

FREEZER = Path("/sys/fs/cgroup/freezer")


def drive(machine: Machine, start: str = "fork", *, patience: float = 10.0, step: float = 5.0) -> Client:
    client = machine.client()
    client.ask(f"drive({start!r}, patience_seconds={patience}, step_seconds={step})")
    return client


def snapshot(client: Client, options: str = "") -> tuple[Gpu, ...]:
    return cast("tuple[Gpu, ...]", client.ask(f"client.snapshot({options})"))


def reader(client: Client) -> int:
    return cast("int", client.ask("client._reader.pid"))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(params=["fork", "execute"])
def client(request: pytest.FixtureRequest, machine: Machine) -> Client:
    """A driver with two GPUs, whose reader is started in one of the two ways."""
    machine.gpus.configure([FakeGpu(), FakeGpu()])
    return drive(machine, request.param)


# ---- it answers as NVML does ----


def test_the_reading_is_that_of_nvml(machine: Machine, client: Client) -> None:
    holder = machine.holder("3GiB")
    direct = machine.client()
    direct.ask("connect()")
    assert snapshot(client, "utilisation=True") == snapshot(direct, "utilisation=True")
    assert snapshot(client)[0].processes == (GpuProcess(holder.pid, 3 * GIB),)


def test_the_errors_are_those_of_nvml(machine: Machine, client: Client) -> None:
    machine.gpus.configure(init_error=Return.DRIVER_NOT_LOADED)
    with pytest.raises(NvmlUnavailableError) as caught:
        snapshot(client)
    assert caught.value.hint is not None
    machine.gpus.configure(init_error=None)
    assert len(snapshot(client)) == 2


def test_work_is_measured_with_the_snapshot(machine: Machine, client: Client) -> None:
    machine.gpus.change(1, samples=[Sample(11, 80, 1000)], utilisation_error=None)
    machine.gpus.change(0, utilisation_error=Return.UNKNOWN)
    gpus, works = cast(
        "tuple[tuple[Gpu, ...], object]", client.ask(f"client.measure({{{uuid_of(0)!r}: 0, {uuid_of(1)!r}: 5}})")
    )
    assert [gpu.index for gpu in gpus] == [0, 1]
    assert works == {uuid_of(0): "NVML failed: Unknown Error.", uuid_of(1): ((ProcessSample(11, 80, 1000),), 1000)}


def test_only_the_gpus_that_are_wanted_are_read(client: Client) -> None:
    assert [gpu.index for gpu in snapshot(client, "only=[1]")] == [1]


# ---- a GPU that hangs ----


def test_a_gpu_that_hangs_is_unknown_and_the_others_are_read(machine: Machine, client: Client) -> None:
    snapshot(client)
    machine.gpus.change(0, hangs=True)
    client.ask("setattr(client, '_longest_step_seconds', 0.5)")
    hung, other = snapshot(client)
    assert (hung.uuid, hung.name) == (uuid_of(0), "NVIDIA Simulated GPU")
    assert (hung.total_bytes, hung.free_bytes, hung.processes) == (None, None, None)
    assert hung.problem is not None
    assert hung.problem.startswith("The GPU hangs: the driver has not answered for ")
    assert (other.problem, other.used_bytes) == (None, 0)


def test_a_gpu_that_hangs_is_not_asked_when_others_are_wanted(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(hangs=True), FakeGpu()])
    client = drive(machine)
    (gpu,) = snapshot(client, "only=[1]")
    assert gpu.problem is None
    before = reader(client)
    snapshot(client, "only=[1]")
    assert reader(client) == before


def test_a_gpu_that_answers_again_is_read_again(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(), FakeGpu(hangs=True)])
    client = drive(machine, step=0.5)
    assert snapshot(client)[1].problem is not None
    machine.gpus.change(1, hangs=False)
    assert snapshot(client)[1].problem is not None  # it is left alone for a while
    client.ask("client._hung[1].retry.reset()")
    assert snapshot(client)[1].problem is None


def test_a_driver_that_hangs_altogether_is_an_error_in_time_and_forgiven_later(machine: Machine) -> None:
    machine.gpus.configure(hangs=True)
    client = drive(machine, patience=0.5, step=0.3)
    with pytest.raises(NvmlSilentError, match="NVIDIA's driver has not answered for"):
        snapshot(client)
    machine.gpus.configure(hangs=False)
    client.ask("client._hung.clear()")
    assert snapshot(client)[0].problem is None


def test_a_call_that_is_given_up_early_is_answered_later(machine: Machine) -> None:
    client = drive(machine)
    snapshot(client)
    machine.gpus.configure(hangs=True)
    with pytest.raises(NvmlSilentError):
        snapshot(client, "patience_seconds=0.2")
    before = reader(client)
    machine.gpus.configure(hangs=False)
    assert eventually(lambda: snapshot(client, "fresh=False")[0].problem is None)
    assert reader(client) == before


def test_a_fresh_reading_is_none_that_began_before_it_was_asked_for(machine: Machine) -> None:
    client = drive(machine)
    snapshot(client)
    machine.gpus.change(0, hangs=True)
    with pytest.raises(NvmlSilentError):
        snapshot(client, "patience_seconds=0.2")
    machine.gpus.change(0, hangs=False)
    holder = machine.holder("1GiB")
    assert snapshot(client)[0].processes == (GpuProcess(holder.pid, GIB),)


# ---- the reader process ----


def test_the_reader_holds_no_file_of_its_caller(client: Client) -> None:
    client.ask("globals().update(kept=open('/proc/self/status'))")
    snapshot(client)
    pid = reader(client)
    files = {int(fd.name): str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert [files.pop(fd) for fd in (0, 1, 2)] == ["/dev/null"] * 3
    assert [files.pop(fd).partition(":")[0] for fd in (3, 4, 5)] == ["pipe"] * 3
    assert not [name for name in files.values() if name.startswith(("pipe", "socket", "/proc"))]
    assert Path(f"/proc/{pid}/comm").read_text() == "gpusvc-nvml\n"


@pytest.mark.parametrize("hangs", [False, True])
def test_the_reader_ends_with_its_caller(machine: Machine, client: Client, hangs: bool) -> None:
    snapshot(client)
    pid = reader(client)
    if hangs:
        machine.gpus.configure(hangs=True)
        with pytest.raises(NvmlSilentError):
            snapshot(client, "patience_seconds=0.2")
    client.process.send_signal(signal.SIGKILL)
    assert eventually(lambda: not is_alive(pid))


def test_a_reader_that_is_killed_is_replaced(client: Client) -> None:
    snapshot(client)
    os.kill(reader(client), signal.SIGKILL)
    with pytest.raises(NvmlError, match="was killed"):
        snapshot(client)
    assert len(snapshot(client)) == 2


def test_a_closed_driver_may_be_used_again(client: Client) -> None:
    snapshot(client)
    pid = reader(client)
    client.ask("(client.close(), client.close())")
    assert eventually(lambda: not is_alive(pid))
    assert len(snapshot(client)) == 2


@pytest.fixture
def frozen() -> Iterator[Path]:
    """A control group of the old freezer: SIGKILL does not end its processes, as if they hung in the kernel."""
    if not FREEZER.is_dir() or os.geteuid():
        pytest.skip("the old freezer is not mounted, or not ours")
    group = FREEZER / f"gpusvc-test-{os.getpid()}"
    group.mkdir()
    (group / "freezer.state").write_text("FROZEN")
    yield group
    (group / "freezer.state").write_text("THAWED")
    assert eventually(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_gpu_whose_reader_cannot_be_killed_is_asked_no_more(machine: Machine, client: Client, frozen: Path) -> None:
    snapshot(client)
    stuck = reader(client)
    machine.gpus.change(0, hangs=True)
    client.ask("setattr(client, '_longest_step_seconds', 0.5)")
    with pytest.raises(NvmlSilentError):
        snapshot(client, "patience_seconds=0.2")
    (frozen / "cgroup.procs").write_text(str(stuck))
    hung, other = snapshot(client)
    assert (hung.problem is None, other.problem) == (False, None)
    after = reader(client)
    client.ask("client._hung[0].retry.reset()")
    assert snapshot(client)[0].problem is not None
    assert is_alive(stuck)
    assert reader(client) == after
    (frozen / "freezer.state").write_text("THAWED")
    machine.gpus.change(0, hangs=False)
    assert eventually(lambda: snapshot(client)[0].problem is None)
