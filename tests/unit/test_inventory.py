"""What a model is said to be doing, from what systemd, its lease and NVML say."""

from __future__ import annotations

from datetime import datetime
from fnmatch import fnmatch

import pytest

from gpusvc.paths import Paths
from gpusvc.record import replace
from gpusvc.state.lease import BrokenLeaseError, Lease, LeasedGpu
from gpusvc.status.inventory import models
from gpusvc.status.models import HeldGpu, ModelState, ModelStatus, derive_state, describe, status_of
from gpusvc.systemd.units import ActiveState, ServiceStatus, Unit

GIB = 1 << 30

LEASE = Lease(
    model="qwen",
    port=20001,
    gpus=(LeasedGpu(0, "GPU-a", 9 * GIB, 0), LeasedGpu(2, "GPU-c", 9 * GIB, 0)),
    created=1_700_000_000.0,
    pid=4711,
    address="127.0.0.1",
    cgroup="/gpusvc.slice/gpusvc-models.slice/model-qwen.scope",
)
SAID = ServiceStatus(text="", result="success", exit_status=0, since=1_700_000_100.0)


def unit(active: ActiveState, sub: str = "") -> Unit:
    return Unit(name="model@qwen.service", active=active, sub=sub, path="/")


def status(active: ActiveState | None, lease: Lease | BrokenLeaseError | None, text: str = "") -> ModelStatus:
    service = None if active is None else unit(active)
    said = None if active is None else SAID._replace(text=text)
    return status_of("qwen", service, said, lease, vram_bytes=GIB)


@pytest.mark.parametrize(
    ("active", "without_lease", "with_lease"),
    [
        (ActiveState.ACTIVE, ModelState.READY, ModelState.READY),
        (ActiveState.RELOADING, ModelState.READY, ModelState.READY),
        (ActiveState.REFRESHING, ModelState.READY, ModelState.READY),
        (ActiveState.ACTIVATING, ModelState.STARTING, ModelState.STARTING),
        (ActiveState.DEACTIVATING, ModelState.STOPPING, ModelState.STOPPING),
        (ActiveState.FAILED, ModelState.FAILED, ModelState.STUCK),
        (ActiveState.INACTIVE, ModelState.STOPPED, ModelState.STUCK),
        (ActiveState.MAINTENANCE, ModelState.STOPPED, ModelState.STUCK),
        (ActiveState.OTHER, ModelState.STOPPED, ModelState.STUCK),
        (None, ModelState.STOPPED, ModelState.STUCK),
    ],
)
def test_a_lease_that_outlives_its_unit_means_stuck(
    active: ActiveState | None, without_lease: ModelState, with_lease: ModelState
) -> None:
    service = None if active is None else unit(active)
    assert derive_state(service, leased=False) is without_lease
    assert derive_state(service, leased=True) is with_lease


def test_what_the_service_says_of_itself_is_shown() -> None:
    assert status(ActiveState.ACTIVATING, LEASE, "Loading on GPU 0.").text == "Loading on GPU 0."


@pytest.mark.parametrize("state", ModelState)
def test_a_service_that_says_nothing_is_described_in_a_sentence(state: ModelState) -> None:
    assert describe(state, None, None).endswith(".")


def test_a_restart_to_come_is_told_with_its_reason() -> None:
    said = SAID._replace(text="The engine ended by SIGSEGV.", result="signal")
    text = describe(ModelState.STARTING, unit(ActiveState.ACTIVATING, "auto-restart"), said)
    assert text == (
        "It ended badly (signal), and systemd starts it again soon. Last it said: The engine ended by SIGSEGV."
    )


def test_a_ready_model_has_all_that_its_lease_says() -> None:
    assert status(ActiveState.ACTIVE, LEASE) == ModelStatus(
        name="qwen",
        state=ModelState.READY,
        text="It is ready.",
        gpus=(HeldGpu(0, "GPU-a"), HeldGpu(2, "GPU-c")),
        vram_bytes=GIB,
        reserved_bytes=18 * GIB,
        port=20001,
        address="127.0.0.1",
        pid=4711,
        scope="model-qwen.scope",
        since=1_700_000_100.0,
    )


def test_before_its_engine_is_in_a_scope_a_model_has_none() -> None:
    assert status(ActiveState.ACTIVATING, replace(LEASE, cgroup=None)).scope is None


def test_what_was_not_declared_is_not_known_to_be_reserved() -> None:
    gpus = (LEASE.gpus[0], replace(LEASE.gpus[1], reserved_bytes=None))
    assert status(ActiveState.ACTIVE, replace(LEASE, gpus=gpus)).reserved_bytes is None


def test_a_model_that_is_over_and_released_holds_nothing() -> None:
    failed = status(ActiveState.FAILED, None)
    assert (failed.gpus, failed.vram_bytes, failed.reserved_bytes) == ((), 0, 0)


def test_a_ready_model_without_a_lease_holds_nobody_knows_what() -> None:
    assert status(ActiveState.ACTIVE, None).vram_bytes is None


def test_a_broken_lease_of_a_model_that_does_not_run_is_stuck() -> None:
    broken = status(ActiveState.FAILED, BrokenLeaseError("The lease cannot be read."))
    assert (broken.state, broken.text, broken.vram_bytes) == (ModelState.STUCK, "The lease cannot be read.", None)


def test_a_model_that_runs_is_ready_and_its_broken_lease_is_told() -> None:
    broken = status(ActiveState.ACTIVE, BrokenLeaseError("The lease cannot be read."))
    assert (broken.state, broken.text) == (ModelState.READY, "The lease cannot be read.")


def test_a_lease_that_the_caller_may_not_read_says_nothing_about_the_model() -> None:
    error = BrokenLeaseError("The lease cannot be read.")
    error.__cause__ = PermissionError()
    hidden = status(ActiveState.ACTIVE, error)
    assert (hidden.state, hidden.vram_bytes) == (ModelState.READY, None)


def test_a_unit_that_never_ran_since_is_dated_by_the_lease() -> None:
    assert status(None, LEASE).since == LEASE.created


def test_json_has_a_time_zone_and_null_for_the_unknown() -> None:
    value = status(ActiveState.ACTIVE, None).to_json()
    assert datetime.fromisoformat(value["since"]).timestamp() == 1_700_000_100
    assert (value["state"], value["gpus"], value["vram_bytes"], value["port"]) == ("ready", [], None, None)


class Units:
    """The units that systemd has loaded."""

    def __init__(self, **states: ActiveState) -> None:
        self._units = {f"model@{name}.service": state for name, state in states.items()}

    def unit(self, name: str) -> Unit | None:
        return next(iter(self.units(name)), None)

    def units(self, *patterns: str) -> list[Unit]:
        return [
            Unit(name, state, "", "/")
            for name, state in self._units.items()
            if any(fnmatch(name, pattern) for pattern in patterns)
        ]

    def service_status(self, unit: Unit) -> ServiceStatus:
        return SAID


def test_a_failed_model_whose_file_was_removed_is_forgotten(paths: Paths) -> None:
    paths.models_directory.mkdir(parents=True, exist_ok=True)
    paths.model_file("kept").write_text("")
    loaded = Units(kept=ActiveState.FAILED, removed=ActiveState.FAILED, running=ActiveState.ACTIVE)
    assert [model.name for model in models(paths, loaded, lambda: None)] == ["kept", "running"]
    assert [model.name for model in models(paths, loaded, lambda: None, more=["removed"])][1] == "removed"
