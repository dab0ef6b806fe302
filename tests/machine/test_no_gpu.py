"""A machine without a GPU, or without a driver that works, is a normal machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.fakegpu import Return
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM)

LIBRARY = "/usr/local/lib/libnvidia-ml.so.1"
NO_LIBRARY = "There is no NVIDIA driver library (libnvidia-ml.so.1) on this machine."


@pytest.fixture
def plain(machine: Host) -> Iterator[Host]:
    """A machine that never had an NVIDIA driver: no library, no device nodes."""
    machine.run("sh", "-c", f"mkdir /root/driver && mv {LIBRARY} /root/driver && cp -a /dev/nvidia* /root/driver")
    machine.run("sh", "-c", "rm /dev/nvidia* && ldconfig")
    yield machine
    machine.run("sh", "-c", f"mv /root/driver/libnvidia-ml.so.1 {LIBRARY} && mv /root/driver/nvidia* /dev && ldconfig")
    machine.run("rmdir", "/root/driver")


def test_without_a_driver_a_model_that_needs_no_gpu_starts_answers_and_stops(plain: Host) -> None:
    plain.write_model("modest")
    plain.start("modest")
    assert json.loads(plain.curl(plain.url("modest", "/v1/models")))["data"][0]["id"] == "modest"
    plain.stop("modest")
    assert "modest is released" in plain.messages("modest")
    assert plain.ps("modest") is None


def test_without_a_driver_ps_list_status_and_check_say_nothing_of_it(plain: Host) -> None:
    plain.write_model("quiet")
    plain.start("quiet")
    for command in (("ps",), ("list",), ("status", "quiet"), ("check",)):
        result = plain.run("gpusvc", *command)
        assert "quiet" in result.stdout or "1 model is fine" in result.stdout
        assert result.stderr == ""


def test_without_a_driver_gpusvc_gpus_shows_none_and_says_why(plain: Host) -> None:
    result = plain.run("gpusvc", "gpus", "--json")
    assert json.loads(result.stdout) == []
    assert NO_LIBRARY in result.stderr


def test_without_a_driver_a_model_that_needs_a_gpu_says_why_it_cannot_start(plain: Host) -> None:
    plain.write_model("demanding", gpu="count = 1")
    result = plain.run("gpusvc", "start", "demanding", check=False)
    assert result.returncode == 1
    assert NO_LIBRARY in result.stderr
    assert "a model that needs no GPU says count = 0" in result.stderr
    assert NO_LIBRARY in plain.messages("demanding")
    assert "test-engine:" not in plain.messages("demanding")


@pytest.mark.parametrize(
    ("case", "error", "sentence", "hint"),
    [
        ("unloaded", Return.DRIVER_NOT_LOADED, "The NVIDIA driver is not loaded.", "modprobe nvidia"),
        ("upgraded", Return.LIBRARY_MISMATCH, "of different versions.", "reboot"),
        ("closed", Return.UNKNOWN, "/dev/nvidiactl may not be opened.", "mode of /dev/nvidiactl"),
        ("forbidden", Return.NO_PERMISSION, "NVML may not be used by this user.", "mode of /dev/nvidiactl"),
    ],
)
def test_a_driver_that_does_not_work_is_told_from_one_that_is_missing(
    machine: Host, case: str, error: Return, sentence: str, hint: str
) -> None:
    machine.gpus.configure(init_error=error)
    machine.write_model(f"on-{case}", gpu="count = 1")
    said = machine.fail_to_start(f"on-{case}")
    assert sentence in said
    assert hint in said


def test_with_a_broken_driver_a_model_that_needs_no_gpu_runs(machine: Host) -> None:
    machine.gpus.remove_driver()
    machine.write_model("indifferent")
    machine.start("indifferent")
    machine.stop("indifferent")
    assert "indifferent is released" in machine.messages("indifferent")


def test_a_driver_without_gpus_is_no_reason_to_wait(machine: Host) -> None:
    machine.gpus.configure([])
    machine.write_model("lonely", gpu="count = 1")
    assert "NVML shows none" in machine.fail_to_start("lonely")
    assert machine.property("model@lonely.service", "NRestarts") == "0"


def test_a_model_starts_by_itself_once_the_driver_is_loaded(machine: Host) -> None:
    machine.gpus.configure(init_error=Return.DRIVER_NOT_LOADED)
    machine.write_model("patient", gpu="count = 1")
    machine.fail_to_start("patient")
    machine.gpus.configure(init_error=None)
    machine.wait_for_state("model@patient.service", "active")
