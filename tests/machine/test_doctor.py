"""``gpusvc doctor`` on a machine that is fine, on one that is not, and with somebody's orphans on its GPUs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.TRIXIE)


def doctor(machine: Host) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit status, and the findings by their subject."""
    done = machine.run("gpusvc", "doctor", "--json", check=False)
    findings: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout):
        findings.setdefault(finding["subject"], []).append(finding)
    return done.returncode, findings


def levels(findings: list[dict[str, Any]]) -> set[str]:
    return {finding["level"] for finding in findings}


def test_a_machine_that_is_fine_has_nothing_but_its_controllers_to_mend(machine: Host) -> None:
    _, findings = doctor(machine)
    # The containers of these tests have no controllers of their own.
    wrong = {
        subject for subject, found in findings.items() if levels(found) & {"warning", "error"} and subject != "cgroups"
    }
    assert wrong == set(), {subject: findings[subject] for subject in wrong}
    assert levels(findings["isolation"]) == {"ok"}
    assert "EPERM" in findings["isolation"][0]["evidence"]
    assert not [
        unit
        for unit in machine.run("systemctl", "list-units", "gpusvc-doctor*", "--plain").stdout.split()
        if unit.startswith("gpusvc-doctor")
    ]


@pytest.mark.generations(Generation.TRIXIE)
def test_what_is_wrong_is_named_with_its_evidence_and_its_cure(machine: Host) -> None:
    machine.run("systemctl", "stop", "gpusvc-watchdog.service")
    machine.run("mv", "/usr/share/polkit-1/rules.d/50-gpusvc.rules", "/root/")
    machine.remove("/dev/nvidia1")
    machine.write("/etc/gpusvc/models/broken.toml", 'comand = ["true"]\n')
    machine.run("gpusvc", "key", "add", "somebody")
    machine.run("chmod", "600", "/etc/gpusvc/keys.toml")
    status, findings = doctor(machine)
    assert status == 1
    assert "no idle model is evicted" in findings["units"][0]["sentence"]
    assert "50-gpusvc.rules is missing" in findings["polkit"][0]["evidence"]
    assert "/dev/nvidia1" in next(each["sentence"] for each in findings["nodes"] if each["level"] == "error")
    assert any("command" in (each["fix"] or "") for each in findings["files"])
    assert "cannot read its keys" in findings["keys"][0]["sentence"]
    assert "mode 0600" in findings["keys"][0]["evidence"]
    machine.run("sh", "-c", findings["keys"][0]["fix"].replace("`", "").replace(" and ", " && "))
    assert levels(doctor(machine)[1]["keys"]) == {"ok"}
    machine.remove("/etc/gpusvc/keys.toml")
    machine.run("mv", "/root/50-gpusvc.rules", "/usr/share/polkit-1/rules.d/")
    machine.run("systemctl", "start", "gpusvc-watchdog.service")
    machine.make_gpu_nodes(2)


@pytest.mark.generations(Generation.TRIXIE)
def test_without_a_driver_that_is_a_note(bare_driver: Host) -> None:
    _, findings = doctor(bare_driver)
    assert levels(findings["driver"]) == {"note"}


@pytest.fixture
def bare_driver(fresh_machine: Host) -> Host:
    fresh_machine.run("sh", "-c", "rm -f /usr/local/lib/libnvidia-ml.so* /dev/nvidia*; ldconfig")
    return fresh_machine


@pytest.mark.generations(Generation.TRIXIE)
def test_orphans_are_named_and_ended_on_a_yes_only(machine: Host) -> None:
    script = "import time; time.sleep(1000)"
    orphan = f"env LD_PRELOAD=libfakecuda.so FAKE_VRAM=3GiB python3 -c '{script}' VLLM::EngineCore"
    machine.run("sh", "-c", f"({orphan} >/dev/null 2>&1 &)")
    machine.wait_until(lambda: sum(machine.gpu_holders(0).values()) >= 3 << 30, "the orphan to hold its memory")
    status, findings = doctor(machine)
    assert status == 1
    (finding,) = findings["vram"]
    assert "left over from vLLM" in finding["sentence"]
    assert "systemd (1)" in finding["evidence"]

    assert "left alone" in machine.run("gpusvc", "doctor", "--orphans").stdout
    assert machine.gpu_holders(0)
    ended = machine.run("gpusvc", "doctor", "--orphans", "--yes").stdout
    assert "3.0 GiB of GPU 0 and 3.0 GiB of GPU 1 came back" in ended
    assert not machine.gpu_holders(0)
    assert "Nobody left anything" in machine.run("gpusvc", "doctor", "--orphans").stdout
