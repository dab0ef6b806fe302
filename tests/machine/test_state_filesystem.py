"""The file system of /run/gpusvc: mounted from the installation on, bounded, and never over state that is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.conftest import Layers
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM)

MOUNT = "run-gpusvc.mount"
STATE = "/run/gpusvc"


def is_mounted(machine: Host) -> bool:
    return machine.run("mountpoint", "-q", STATE, check=False).returncode == 0


def free_bytes(machine: Host, path: str) -> int:
    return int(machine.run("stat", "-f", "-c", "%a", path).stdout) * int(
        machine.run("stat", "-f", "-c", "%S", path).stdout
    )


def test_it_is_mounted_at_the_installation_and_at_each_boot(bare_machine: Host, layers: Layers) -> None:
    machine = bare_machine
    machine.install(layers.package())
    for boot in ("installed", "booted"):
        if boot == "booted":
            machine.reboot()
        assert is_mounted(machine), boot
        options = machine.run("findmnt", "-no", "OPTIONS", STATE).stdout
        for option in ("nosuid", "nodev", "noexec", "size=131072k", "nr_inodes=102400"):
            assert option in options, boot
        assert {"models", "pins", "wanted", "api.sock"} <= set(machine.run("ls", STATE).stdout.split()), boot
        assert machine.run("systemctl", "is-system-running").stdout == "running\n", boot
        machine.write_model("qwen")
        machine.start("qwen")
        machine.stop("qwen")


def test_a_member_of_the_group_fills_it_and_not_run(machine: Host) -> None:
    machine.write_model("qwen")
    machine.write_model("llama")
    machine.start("qwen")
    machine.run("useradd", "--create-home", "--groups", "gpusvc", "member", check=False)
    before = free_bytes(machine, "/run")
    fill = f"dd if=/dev/zero of={STATE}/models/qwen/use bs=1M count=1000"
    assert "No space left" in machine.run("sh", "-c", fill, check=False, user="member").stderr
    assert free_bytes(machine, STATE) == 0
    assert free_bytes(machine, "/run") > before - 2**20

    # The rest of the machine goes on, and so does the model. A start says what is the matter.
    machine.run("systemctl", "daemon-reload")
    assert machine.is_active("model@qwen.service")
    assert "No space left on device" in machine.fail_to_start("llama")
    # The next start of the model takes the space back.
    machine.run("systemctl", "restart", "model@qwen.service")
    machine.start("llama")
    assert free_bytes(machine, STATE) > 100 * 2**20


def test_it_is_not_mounted_over_state_that_is_in_use(fresh_machine: Host) -> None:
    machine = fresh_machine
    # As after an upgrade from a version without it.
    machine.run("systemctl", "stop", MOUNT, "gpusvc-watchdog.service")
    machine.run("systemd-tmpfiles", "--create")
    machine.write_model("qwen")
    machine.start("qwen")
    machine.run("systemctl", "start", MOUNT, "gpusvc-api.socket", "gpusvc-gateway.socket")
    assert not is_mounted(machine)
    assert machine.property(MOUNT, "ConditionResult") == "no"
    machine.run("systemctl", "restart", "gpusvc-api.socket", "gpusvc-gateway.service", "gpusvc-watchdog.service")
    machine.run("systemctl", "restart", "model@qwen.service")
    assert not is_mounted(machine)
    row = machine.ps("qwen")
    assert row is not None
    assert row["state"] == "ready"
