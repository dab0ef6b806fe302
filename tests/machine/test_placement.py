"""Which GPU a model gets, when it gets none, and what it is told then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests import fakegpu
from tests.fakegpu import GIB
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.TRIXIE)

# What nobody may evict is in the way for good.
PINNED = "pinned = true\n"

RESULT = ("ExecMainStatus", "Result", "SubState", "NRestarts")
REFUSED = {"ExecMainStatus": "75", "Result": "exit-code", "SubState": "failed", "NRestarts": "0"}


def write(machine: Host, name: str, vram: str, gpu: str = "", *, keys: str = "", arguments: str = "") -> None:
    """A model that says what it takes, and takes what it says."""
    machine.write_model(name, arguments=f"--vram {vram} {arguments}", keys=PINNED + keys, gpu=f'vram = "{vram}"\n{gpu}')


def start_stranger(machine: Host, vram: str, gpu: int = 0) -> None:
    """A program that is no model of gpusvc and holds VRAM."""
    visible = f"--setenv=CUDA_VISIBLE_DEVICES={fakegpu.uuid_of(gpu)}"
    command = ("test-engine", "--model", "somebody-elses", "--port", "8099", "--vram", vram)
    machine.run("systemd-run", "--quiet", "--collect", "--unit=stranger", visible, *command)
    machine.wait_until(lambda: machine.gpu_holders(gpu), "the other program holds VRAM", unit="stranger.service")
    machine.wait_until(
        lambda: machine.run("curl", "-sf", "http://127.0.0.1:8099/health", check=False).returncode == 0,
        "the other program has all of its VRAM",
        unit="stranger.service",
    )


def stop_stranger(machine: Host) -> None:
    machine.run("systemctl", "stop", "stranger.service")


def gpus_of(machine: Host, name: str) -> list[int]:
    row = machine.ps(name)
    assert row is not None
    return [gpu["index"] for gpu in row["gpus"]]


def await_engine(machine: Host, name: str) -> None:
    """Until the engine runs in its scope, which is after its placement."""
    machine.wait_until(lambda: machine.pids(f"model-{name}.scope"), f"{name} loads", unit=f"model@{name}.service")


@pytest.mark.parametrize("load_seconds", ["0", "0.5"])
def test_of_two_models_started_at_once_on_one_gpu_only_one_gets_it(machine: Host, load_seconds: str) -> None:
    names = [f"{one}-{load_seconds}" for one in ("first", "second")]
    for name in names:
        write(machine, name, "14GiB", "devices = [0]", arguments=f"--load-seconds {load_seconds}")
    units = [f"model@{name}.service" for name in names]
    machine.run("systemctl", "start", *units, check=False, timeout=60)
    results = [machine.properties(unit, *RESULT) for unit in units]
    assert REFUSED in results
    assert "running" in [result["SubState"] for result in results]
    assert list(machine.gpu_holders(0).values()) == [14 * GIB]


def test_five_models_started_at_once_never_overfill_two_gpus(machine: Host) -> None:
    names = [f"many-{number}" for number in range(5)]
    for name in names:
        write(machine, name, "10GiB", arguments="--load-seconds 0.3")
    machine.run("systemctl", "start", *(f"model@{name}.service" for name in names), check=False, timeout=60)
    states = [machine.property(f"model@{name}.service", "ActiveState") for name in names]
    assert sorted(states) == ["active"] * 4 + ["failed"]
    assert [sorted(machine.gpu_holders(index).values()) for index in (0, 1)] == [[10 * GIB] * 2] * 2
    # Whoever was let in over its promise would have run out of memory.
    assert not [name for name in names if "out of memory" in machine.messages(name)]


def test_a_refusal_names_every_gpu_its_free_bytes_and_who_holds_the_rest(machine: Host) -> None:
    write(machine, "tenant", "14GiB", "devices = [1]")
    machine.start("tenant")
    start_stranger(machine, "20GiB")
    write(machine, "homeless", "12GiB")
    said = machine.fail_to_start("homeless")
    stop_stranger(machine)
    assert "homeless needs 12.0 GiB on a GPU" in said
    first, second = (line for line in said.splitlines() if line.startswith("GPU "))
    assert first.startswith("GPU 0 (NVIDIA GeForce RTX 4090 (simulated)): 3.8 GiB free of 24.0 GiB")
    assert "/usr/local/bin/test-engine --model somebody-elses" in first
    assert first.endswith("20.0 GiB.")
    assert second.startswith("GPU 1 (NVIDIA GeForce RTX 4090 (simulated)): 9.8 GiB free of 24.0 GiB")
    assert "held by tenant 14.0 GiB" in second


def test_a_refusal_is_what_gpusvc_start_says(machine: Host) -> None:
    write(machine, "too-large", "100GiB")
    result = machine.run("gpusvc", "start", "too-large", check=False)
    assert result.returncode == 1
    assert "too-large needs 100.0 GiB on a GPU" in result.stderr
    for index in (0, 1):
        assert f"GPU {index} (NVIDIA GeForce RTX 4090 (simulated)): 23.8 GiB free of 24.0 GiB" in result.stderr


def test_a_model_that_never_fits_is_not_retried_by_systemd(machine: Host) -> None:
    write(machine, "refused", "100GiB")
    machine.fail_to_start("refused")
    assert machine.properties("model@refused.service", *RESULT) == REFUSED | {"ExecMainStatus": "78"}


def test_a_refused_model_holds_nothing(machine: Host) -> None:
    write(machine, "empty-handed", "100GiB")
    machine.fail_to_start("empty-handed")
    assert machine.run("test", "-e", "/run/gpusvc/models/empty-handed/lease.json", check=False).returncode == 1
    row = machine.ps("empty-handed")
    assert row is not None
    assert (row["state"], row["gpus"], row["reserved_bytes"]) == ("failed", [], 0)


def test_what_a_loading_model_was_promised_is_not_given_to_another(machine: Host) -> None:
    write(machine, "slow", "14GiB", "devices = [0]", arguments="--load-seconds 3")
    machine.run("systemctl", "start", "--no-block", "model@slow.service")
    await_engine(machine, "slow")
    write(machine, "quick", "12GiB")
    machine.start("quick")
    assert gpus_of(machine, "quick") == [1]


def test_a_promise_that_blocks_a_start_is_named(machine: Host) -> None:
    write(machine, "eternal", "14GiB", "devices = [0]", keys='start_timeout = "1min"', arguments="--load-seconds 50")
    machine.run("systemctl", "start", "--no-block", "model@eternal.service")
    await_engine(machine, "eternal")
    write(machine, "impatient", "12GiB", "devices = [0]", keys='start_timeout = "500ms"')
    said = machine.fail_to_start("impatient")
    assert "promised to eternal" in said
    assert machine.properties("model@impatient.service", *RESULT) == REFUSED


def test_a_model_of_unknown_need_waits_for_one_that_loads(machine: Host) -> None:
    for name in ("loader", "waiter"):
        machine.write_model(name, arguments="--vram 4GiB --load-seconds 1", keys=PINNED, gpu="devices = [0]")
    machine.run("systemctl", "start", "--no-block", "model@loader.service")
    await_engine(machine, "loader")
    machine.run("systemctl", "start", "--no-block", "model@waiter.service")
    machine.wait_until(
        lambda: "loader" in machine.property("model@waiter.service", "StatusText"), "waiter says for whom it waits"
    )
    assert machine.pids("model-waiter.scope") == []
    machine.wait_for_state("model@waiter.service", "active")
    assert machine.is_active("model@loader.service")


@pytest.mark.parametrize(
    ("case", "device"),
    [("index", "1"), ("uuid", f'"{fakegpu.uuid_of(1)}"'), ("uuid-start", '"GPU-beef"'), ("name", '"*A100*"')],
)
def test_devices_chooses_by_index_uuid_and_name(machine: Host, case: str, device: str) -> None:
    other = {"uuid": "GPU-beef0000-0000-4000-8000-000000000001"} if case == "uuid-start" else {}
    machine.gpus.change(1, name="NVIDIA A100 (simulated)", **other)
    write(machine, f"by-{case}", "4GiB", f"devices = [{device}]")
    machine.start(f"by-{case}")
    assert gpus_of(machine, f"by-{case}") == [1]
    machine.stop(f"by-{case}")  # while its GPU has the name by which it was found


def test_an_excluded_gpu_is_never_used(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", "[gpu]\nexclude = [0]\n")
    for name in ("inside", "outside"):
        write(machine, name, "14GiB")
    machine.start("inside")
    assert gpus_of(machine, "inside") == [1]
    assert "GPU 0 (NVIDIA GeForce RTX 4090 (simulated)): 23.8 GiB free of 24.0 GiB; is excluded" in (
        machine.fail_to_start("outside")
    )


def test_the_hosts_reserve_is_left_free(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", '[gpu]\nreserve = "20GiB"\n')
    write(machine, "fits", "3GiB", "devices = [0]")
    write(machine, "does-not-fit", "4GiB", "devices = [0]")
    machine.start("fits")
    machine.stop("fits")
    machine.fail_to_start("does-not-fit")


def test_a_model_of_two_gpus_gets_and_sees_two(machine: Host) -> None:
    write(machine, "wide", "4GiB", "count = 2")
    machine.start("wide")
    assert gpus_of(machine, "wide") == [0, 1]
    assert [list(machine.gpu_holders(index).values()) for index in (0, 1)] == [[4 * GIB]] * 2
    row = machine.ps("wide")
    assert row is not None
    assert (row["vram_bytes"], row["reserved_bytes"]) == (8 * GIB, 8 * GIB)


def test_a_model_of_two_gpus_is_refused_if_only_one_fits(machine: Host) -> None:
    write(machine, "narrow", "20GiB")
    machine.start("narrow")
    write(machine, "wide-again", "8GiB", "count = 2")
    assert "wide-again needs 8.0 GiB on each of 2 GPUs" in machine.fail_to_start("wide-again")


def test_a_small_model_goes_where_it_leaves_the_large_gap_alone(machine: Host) -> None:
    write(machine, "present", "10GiB", "devices = [1]")
    machine.start("present")
    write(machine, "small", "2GiB")
    machine.start("small")
    assert gpus_of(machine, "small") == [1]


@pytest.mark.parametrize(
    ("case", "values"),
    [("lost", {"lost": True}), ("mig", {"mig": True}), ("denied", {"handle_error": fakegpu.Return.NO_PERMISSION})],
)
def test_a_gpu_that_cannot_be_used_as_a_whole_is_passed_over(
    machine: Host, case: str, values: dict[str, object]
) -> None:
    machine.gpus.change(0, **values)
    write(machine, f"despite-{case}", "4GiB")
    machine.start(f"despite-{case}")
    assert gpus_of(machine, f"despite-{case}") == [1]


def test_a_gpu_whose_free_memory_is_unknown_is_used(machine: Host) -> None:
    machine.gpus.change(0, memory_unsupported=True)
    write(machine, "unified", "4GiB", "devices = [0]")
    machine.start("unified")
    assert gpus_of(machine, "unified") == [0]


def test_host_memory_is_placed(machine: Host) -> None:
    machine.write_model("huge", keys='ram = "900TiB"')
    said = machine.fail_to_start("huge")
    assert "huge needs 900.0 TiB of host memory, and this machine has less." in said
    assert "Host memory: " in said
    machine.write_model("small", keys='ram = "64MiB"')
    machine.start("small")
    lease = json.loads(machine.read("/run/gpusvc/models/small/lease.json"))
    assert lease["ram_bytes"] == 64 << 20
