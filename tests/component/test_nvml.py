"""gpusvc.gpu.nvml with the real pynvml, on a simulated driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from gpusvc.errors import NvmlError, NvmlUnavailableError
from gpusvc.gpu.reading import Gpu, GpuProcess, ProcessSample
from tests.component.conftest import ROOT, Client, Machine
from tests.fakegpu import GIB, MIB, FakeGpu, Return, Sample, uuid_of

# An open for writing is refused here even to root.
UNOPENABLE = "/sys/kernel/uevent_seqnum"


def connect(machine: Machine, **environment: str) -> Client:
    client = machine.client(**environment)
    client.ask("connect()")
    return client


def snapshot(client: Client, options: str = "") -> tuple[Gpu, ...]:
    return cast("tuple[Gpu, ...]", client.ask(f"client.snapshot({options})"))


def only_gpu(machine: Machine, options: str = "", **environment: str) -> Gpu:
    (gpu,) = snapshot(connect(machine, **environment), options)
    return gpu


def unavailable(machine: Machine, **environment: str) -> NvmlUnavailableError:
    with pytest.raises(NvmlUnavailableError) as caught:
        connect(machine, **environment)
    return caught.value


# ---- what the GPUs are ----


def test_an_idle_gpu_is_named_and_measured(machine: Machine) -> None:
    assert only_gpu(machine) == Gpu(
        index=0,
        uuid=uuid_of(0),
        name="NVIDIA Simulated GPU",
        minor=0,
        pci_bus_id="00000000:01:00.0",
        total_bytes=24 * GIB,
        used_bytes=0,
        free_bytes=24 * GIB - 256 * MIB,
        processes=(),
    )


def test_the_node_is_that_of_the_minor_number_and_not_of_the_index(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(minor=1), FakeGpu(minor=0)])
    assert [gpu.node for gpu in snapshot(connect(machine))] == ["/dev/nvidia1", "/dev/nvidia0"]


def test_a_machine_may_have_a_driver_and_no_gpu(machine: Machine) -> None:
    machine.gpus.configure([])
    assert snapshot(connect(machine)) == ()


def test_the_drivers_version_is_told(machine: Machine) -> None:
    machine.gpus.configure(driver_version="550.127.05")
    assert connect(machine).ask("client.driver_version()") == "550.127.05"


@pytest.mark.parametrize(("mode", "mig"), [(None, False), (False, False), (True, True)])
def test_mig_mode_is_told(machine: Machine, mode: bool | None, mig: bool) -> None:
    machine.gpus.change(0, mig=mode)
    assert only_gpu(machine).mig is mig


# ---- memory and processes ----


def test_processes_are_listed_with_what_they_hold(machine: Machine) -> None:
    first, second = machine.holder("9GiB"), machine.holder("512M")
    gpu = only_gpu(machine)
    assert gpu.processes is not None
    assert set(gpu.processes) == {GpuProcess(first.pid, 9 * GIB), GpuProcess(second.pid, 512 * MIB)}
    assert gpu.used_bytes == 9 * GIB + 512 * MIB
    assert gpu.used_by({first.pid, 1}) == 9 * GIB
    assert gpu.used_by(()) == 0


def test_without_processes_they_are_unknown_and_not_absent(machine: Machine) -> None:
    machine.holder("1GiB")
    gpu = only_gpu(machine, "processes=False")
    assert gpu.processes is None
    assert gpu.used_by({1}) is None
    assert gpu.used_bytes == GIB


def test_bytes_that_no_process_accounts_for_are_used_all_the_same(machine: Machine) -> None:
    machine.gpus.change(0, uncounted=3 * GIB)
    gpu = only_gpu(machine)
    assert (gpu.used_bytes, gpu.processes) == (3 * GIB, ())


def test_a_process_that_computes_and_draws_is_counted_once(machine: Machine) -> None:
    machine.gpus.change(0, graphics=True)
    holder = machine.holder("2GiB")
    assert only_gpu(machine).processes == (GpuProcess(holder.pid, 2 * GIB),)


def test_a_process_whose_bytes_are_not_told_is_listed_still(machine: Machine) -> None:
    machine.gpus.change(0, process_bytes_unknown=True)
    holder = machine.holder("2GiB")
    gpu = only_gpu(machine)
    assert gpu.processes == (GpuProcess(holder.pid, None),)
    assert gpu.used_by({holder.pid}) is None
    assert gpu.used_by({1}) == 0


def test_unified_memory_has_processes_but_no_bytes(machine: Machine) -> None:
    machine.gpus.change(0, memory_unsupported=True)
    holder = machine.holder("2GiB")
    gpu = only_gpu(machine)
    assert (gpu.total_bytes, gpu.used_bytes, gpu.free_bytes, gpu.problem) == (None, None, None, None)
    assert gpu.processes == (GpuProcess(holder.pid, 2 * GIB),)


def test_a_list_that_grew_while_it_was_asked_for_is_asked_for_again(machine: Machine) -> None:
    machine.gpus.configure(insufficient_times=3)
    holder = machine.holder("1GiB")
    assert only_gpu(machine).processes == (GpuProcess(holder.pid, GIB),)


def test_a_list_that_always_grows_is_unknown(machine: Machine) -> None:
    machine.gpus.configure(insufficient_times=1000)
    machine.holder("1GiB")
    assert only_gpu(machine).processes is None


@pytest.mark.parametrize("error", [Return.NOT_SUPPORTED, Return.NO_PERMISSION, Return.UNKNOWN])
def test_a_list_that_cannot_be_had_is_unknown_and_not_empty(machine: Machine, error: Return) -> None:
    machine.gpus.change(0, processes_error=error)
    gpu = only_gpu(machine)
    assert gpu.processes is None
    assert gpu.used_bytes == 0


def test_a_ghost_is_a_process_as_any_other(machine: Machine) -> None:
    machine.gpus.change(0, ghosts={4_000_000: GIB})
    gpu = only_gpu(machine)
    assert gpu.processes == (GpuProcess(4_000_000, GIB),)
    assert gpu.used_bytes == GIB


def test_an_old_drivers_memory_is_told_and_its_processes_are_unknown(machine: Machine) -> None:
    machine.holder("1GiB")
    gpu = only_gpu(machine, LD_LIBRARY_PATH=str(machine.libraries.old_directory))
    assert (gpu.used_bytes, gpu.free_bytes) == (GIB + 256 * MIB, 23 * GIB - 256 * MIB)
    assert gpu.processes is None


# ---- utilisation ----


def test_utilisation_is_told_when_asked_for(machine: Machine) -> None:
    machine.gpus.change(0, utilisation=37)
    assert only_gpu(machine).utilisation_percent is None
    assert only_gpu(machine, "utilisation=True").utilisation_percent == 37


@pytest.mark.parametrize("fault", [{"utilisation": None}, {"utilisation_error": Return.UNKNOWN}, {"mig": True}])
def test_utilisation_that_cannot_be_had_is_unknown(machine: Machine, fault: dict[str, object]) -> None:
    machine.gpus.change(0, **fault)
    gpu = only_gpu(machine, "utilisation=True")
    assert (gpu.utilisation_percent, gpu.problem) == (None, None)


def test_process_samples_are_those_since_the_last_question(machine: Machine) -> None:
    machine.gpus.change(
        0, samples=[Sample(11, 80, 1000), Sample(12, 5, 2000), Sample(0, 9, 3000), Sample(13, 101, 4000)]
    )
    client = connect(machine)

    def ask(since: int) -> object:
        return client.ask(f"client.process_utilisation({uuid_of(0)!r}, {since})")

    assert ask(0) == ((ProcessSample(11, 80, 1000), ProcessSample(12, 5, 2000)), 2000)
    assert ask(1000) == ((ProcessSample(12, 5, 2000),), 2000)
    assert ask(2000) == ((), 2000)
    assert ask(9000) == ((), 9000)


def test_process_samples_of_a_gpu_that_has_none_are_unknown(machine: Machine) -> None:
    machine.gpus.change(0, utilisation=None)
    assert connect(machine).ask(f"client.process_utilisation({uuid_of(0)!r}, 7)") == (None, 7)


def test_process_samples_of_no_gpu_are_an_error(machine: Machine) -> None:
    with pytest.raises(NvmlError, match="Not Found"):
        connect(machine).ask("client.process_utilisation('GPU-none', 0)")


# ---- GPUs that can't be read ----


def test_a_gpu_that_may_not_be_opened_has_a_problem_and_the_others_have_none(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(node=UNOPENABLE), FakeGpu()])
    denied, other = snapshot(connect(machine))
    assert denied.problem == "The GPU's device node may not be opened."
    assert (denied.index, denied.uuid, denied.free_bytes, denied.processes) == (0, "", None, None)
    assert (other.index, other.problem, other.used_bytes) == (1, None, 0)


def test_a_gpu_that_fails_in_an_unknown_way_has_a_problem(machine: Machine) -> None:
    machine.gpus.change(0, handle_error=Return.UNKNOWN)
    assert only_gpu(machine).problem == "NVML cannot read the GPU: Unknown Error."


def test_a_gpu_that_was_reset_is_read_by_a_new_client(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(), FakeGpu()])
    client = connect(machine)
    before = snapshot(client)
    machine.gpus.lose(1)
    assert snapshot(client) == before


def test_process_samples_survive_a_reset(machine: Machine) -> None:
    machine.gpus.change(0, samples=[Sample(11, 80, 1000)])
    client = connect(machine)
    machine.gpus.lose(0)
    answer = client.ask(f"client.process_utilisation({uuid_of(0)!r}, 0)")
    assert answer == ((ProcessSample(11, 80, 1000),), 1000)


def test_a_lost_gpu_keeps_its_name_and_comes_back(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(), FakeGpu()])
    client = connect(machine)
    before = snapshot(client)
    machine.gpus.change(0, lost=True)
    lost, other = snapshot(client)
    assert (lost.uuid, lost.name, lost.used_bytes, lost.processes) == (uuid_of(0), before[0].name, None, None)
    assert lost.problem is not None
    assert "lost" in lost.problem
    assert other == before[1]
    machine.gpus.change(0, lost=False)
    assert snapshot(client) == before


def test_a_gpu_that_is_counted_no_more_is_lost(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(), FakeGpu()])
    client = connect(machine)
    snapshot(client)
    machine.gpus.configure([FakeGpu(uuid=uuid_of(1))])
    left, gone = snapshot(client)
    assert (left.index, left.uuid, left.problem) == (0, uuid_of(1), None)
    assert (gone.uuid, gone.free_bytes) == (uuid_of(0), None)
    assert gone.problem is not None


def test_a_driver_that_comes_back_is_used_again(machine: Machine) -> None:
    client = connect(machine)
    before = snapshot(client)
    machine.gpus.configure(init_error=Return.DRIVER_NOT_LOADED)
    machine.gpus.lose(0)
    with pytest.raises(NvmlUnavailableError):
        snapshot(client)
    machine.gpus.configure(init_error=None)
    assert snapshot(client) == before


# ---- no NVML ----


def test_without_the_library_the_hint_is_to_install_it(machine: Machine) -> None:
    error = unavailable(machine, LD_LIBRARY_PATH="")
    assert error.hint is not None
    if "driver library" not in error.message:
        pytest.skip("this machine has a libnvidia-ml.so.1 of its own")
    assert "Install" in error.hint


def test_without_a_driver_the_hint_is_to_load_it(machine: Machine) -> None:
    machine.gpus.remove_driver()
    assert "modprobe" in (unavailable(machine).hint or "")


def test_after_an_upgrade_of_the_driver_the_hint_is_to_reboot(machine: Machine) -> None:
    machine.gpus.configure(init_error=Return.LIBRARY_MISMATCH)
    assert "reboot" in (unavailable(machine).hint or "")


def test_where_the_control_node_is_denied_the_hint_names_it(machine: Machine) -> None:
    machine.gpus.configure(control_node=UNOPENABLE)
    assert "/dev/nvidiactl" in (unavailable(machine).hint or "")


def test_another_failure_to_initialise_is_an_error_with_nvmls_own_words(machine: Machine) -> None:
    machine.gpus.configure(init_error=Return.GPU_IS_LOST)
    with pytest.raises(NvmlError, match="GPU is lost"):
        connect(machine)


# ---- what it costs ----


def test_who_needs_no_gpu_does_not_load_pynvml() -> None:
    code = "import sys, gpusvc.gpu.nvml; sys.exit(any('pynvml' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_client_may_be_closed_twice(machine: Machine) -> None:
    client = connect(machine)
    assert client.ask("(client.close(), client.close())") == (None, None)


# ---- what some GPUs and drivers do otherwise ----


def test_work_is_read_by_the_newer_call_where_the_older_one_is_not_supported(machine: Machine) -> None:
    machine.gpus.change(0, samples=[Sample(11, 80, 1000)], samples_by=1)
    answer = connect(machine).ask(f"client.process_utilisation({uuid_of(0)!r}, 7)")
    assert answer == ((ProcessSample(11, 80, 1000),), 1000)


def test_no_work_by_the_newer_call_is_no_work(machine: Machine) -> None:
    machine.gpus.change(0, samples_by=1)
    assert connect(machine).ask(f"client.process_utilisation({uuid_of(0)!r}, 7)") == ((), 7)


def test_where_neither_call_is_supported_the_gpus_own_work_is_told(machine: Machine) -> None:
    machine.gpus.configure([FakeGpu(samples_by=2, utilisation=35), FakeGpu(utilisation=35)])
    (first, second), works = cast(
        "tuple[tuple[Gpu, ...], object]",
        connect(machine).ask(f"client.measure({{{uuid_of(0)!r}: 7, {uuid_of(1)!r}: 7}})"),
    )
    assert works == {uuid_of(0): (None, 7), uuid_of(1): ((), 7)}
    assert (first.utilisation_percent, second.utilisation_percent) == (35, None)


@pytest.mark.parametrize("version", ["535.43.02", "535.129.03"])
def test_the_drivers_with_larger_entries_are_asked_for_the_older_list(machine: Machine, version: str) -> None:
    machine.gpus.configure(larger_entries=True, driver_version=version)
    holders = [machine.holder("1GiB"), machine.holder("2GiB"), machine.holder("3GiB")]
    processes = only_gpu(machine).processes
    assert processes is not None
    assert {process.pid for process in processes} == {holder.pid for holder in holders}


def test_a_list_that_cannot_be_true_is_no_list(machine: Machine) -> None:
    machine.gpus.configure(larger_entries=True, driver_version="580.65.06")
    for _ in range(3):
        machine.holder("1GiB")
    assert only_gpu(machine).processes is None


def test_managed_memory_is_used_and_belongs_to_no_process(machine: Machine) -> None:
    machine.gpus.change(0, hidden_percent=100)
    holder = machine.holder("3GiB")
    gpu = only_gpu(machine)
    assert (gpu.used_bytes, gpu.processes) == (3 * GIB, (GpuProcess(holder.pid, 0),))


def test_the_page_cache_in_coherent_memory_is_free(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "numa_status").write_text("Node: 1\nStatus: online\n")
    client = machine.client()
    client.ask("exec('from pathlib import Path; from gpusvc.gpu import device', globals())")
    client.ask(f"setattr(device, 'DRIVER_GPUS', Path({str(tmp_path)!r}))")
    client.ask("connect()")
    machine.gpus.change(0, uncounted=9 * GIB)
    machine.holder("2GiB")
    (gpu,) = snapshot(client)
    assert (gpu.used_bytes, gpu.free_bytes) == (None, 22 * GIB)


@pytest.mark.parametrize(("mode", "exclusive", "prohibited"), [(0, False, False), (2, False, True), (3, True, False)])
def test_the_compute_mode_is_told(machine: Machine, mode: int, exclusive: bool, prohibited: bool) -> None:
    machine.gpus.change(0, compute_mode=mode)
    gpu = only_gpu(machine)
    assert (gpu.exclusive, gpu.prohibited) == (exclusive, prohibited)
