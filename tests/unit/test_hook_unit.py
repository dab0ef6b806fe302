"""The transient unit of a run of a hook."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpusvc.hooks.unit import HookUnit
from gpusvc.journal.eventlog import Event
from gpusvc.systemd.bus import apply_signature, encode

EVENT = Event("ready", 1.5, "Ready.", "s=1;i=1", model="qwen")
UNIT = HookUnit(Path("/etc/gpusvc/hooks.d/tell.sh"), EVENT, 255, 10.0, {"PATH": "/bin", "NOTIFY_SOCKET": "/run/x"})


def properties(unit: HookUnit) -> dict[str, object]:
    return {name: value for name, _, value in unit.properties()}


def test_its_name_says_which_hook_it_is_and_fits_systemds_limit() -> None:
    assert UNIT.name == "gpusvc-hook-tell.sh-ff.service"
    assert len(replace(UNIT, path=Path("/x") / ("y" * 255), number=2**63).name) <= 255


def test_systemd_ends_it_after_its_time_with_its_whole_control_group_and_with_the_daemon() -> None:
    given = properties(UNIT)
    assert (given["Type"], given["KillMode"], given["BindsTo"]) == (
        "oneshot",
        "control-group",
        ["gpusvc-hooks.service"],
    )
    assert (given["TimeoutStartUSec"], given["TimeoutStopUSec"]) == (10_000_000, 2_000_000)


def test_it_gets_what_the_event_says_and_nothing_that_was_for_the_daemon() -> None:
    environment = properties(UNIT)["Environment"]
    assert isinstance(environment, list)
    assert "PATH=/bin" in environment
    assert "GPUSVC_MODEL=qwen" in environment
    assert not any(variable.startswith("NOTIFY_SOCKET=") for variable in environment)


def test_what_no_message_of_dbus_can_carry_is_replaced() -> None:
    environment = properties(replace(UNIT, event=replace(EVENT, message="a\0b\udcffc")))["Environment"]
    assert isinstance(environment, list)
    assert "GPUSVC_MESSAGE=a�b?c" in environment


def test_every_property_can_be_said_over_dbus() -> None:
    for _, signature, value in UNIT.properties():
        assert apply_signature(signature.encode(), [encode(value)])
