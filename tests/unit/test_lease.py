"""What a model was given, as the file that outlives all processes of gpusvc."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.errors import GpusvcError
from gpusvc.linux.processes import Process
from gpusvc.paths import Paths
from gpusvc.record import replace
from gpusvc.state import lease as leases
from gpusvc.state.lease import BrokenLeaseError, Lease, LeasedGpu

GPU = LeasedGpu(index=1, uuid="GPU-1", reserved_bytes=9 << 30, baseline_bytes=300 << 20, used_bytes=8 << 30)
LEASE = Lease(
    model="qwen",
    port=20123,
    gpus=(GPU, replace(GPU, index=2, uuid="GPU-2", reserved_bytes=None, baseline_bytes=None, used_bytes=None)),
    created=1785571200.25,
    config_digest="0badcafe",
    release_timeout_seconds=5.5,
    stop_timeout_seconds=2.5,
    evicting=("other",),
    ready=True,
    pid=4711,
    address="127.0.0.1",
    cgroup="/gpusvc.slice/gpusvc-models.slice/model-qwen.scope",
    processes=frozenset({Process(4711, 1234), Process(4712, 5678)}),
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "lib")


def spoil(paths: Paths, content: str | bytes) -> None:
    file = paths.lease_file("qwen")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def spoilt(change: Callable[[dict[str, Any]], object]) -> str:
    value = LEASE.to_json()
    change(value)
    return json.dumps(value)


# ---- round trip ----


@pytest.mark.parametrize("lease", [LEASE, Lease(model="qwen", port=0, gpus=(), created=0.0)])
def test_what_is_written_is_read(paths: Paths, lease: Lease) -> None:
    leases.write(paths, lease)
    assert leases.read(paths, "qwen") == lease


_BYTES = st.none() | st.integers(0, 2**60)


@given(
    st.builds(
        Lease,
        model=st.text(),
        port=st.integers(0, 65535),
        gpus=st.lists(st.builds(LeasedGpu, st.integers(0, 99), st.text(), _BYTES, _BYTES, _BYTES)).map(tuple),
        created=st.floats(0, 2.0**40),
        ready=st.booleans(),
        pid=st.none() | st.integers(1, 2**22),
        processes=st.frozensets(st.builds(Process, st.integers(1, 2**22), st.integers(0, 2**63))),
    )
)
def test_every_lease_survives_the_way_through_json(lease: Lease) -> None:
    assert Lease.from_json(json.loads(json.dumps(lease.to_json()))) == lease


def test_a_model_that_holds_nothing_has_no_lease(paths: Paths) -> None:
    assert leases.read(paths, "qwen") is None
    assert leases.holders(paths) == []


def test_a_lease_that_is_removed_is_gone_and_may_be_removed_again(paths: Paths) -> None:
    leases.write(paths, LEASE)
    leases.remove(paths, "qwen")
    leases.remove(paths, "qwen")
    assert leases.read(paths, "qwen") is None


def test_holders_are_those_with_a_lease_whether_it_can_be_read_or_not(paths: Paths) -> None:
    leases.write(paths, replace(LEASE, model="b"))
    leases.write(paths, replace(LEASE, model="a"))
    spoil(paths, "garbage")
    paths.lease_directory("empty").mkdir()
    assert leases.holders(paths) == ["a", "b", "qwen"]


def test_processes_that_were_seen_are_remembered() -> None:
    grown = LEASE.seen([Process(4713, 1)])
    assert grown.processes == LEASE.processes | {Process(4713, 1)}
    assert LEASE.seen([Process(4711, 1234)]) is LEASE


# ---- whole or not at all ----


def test_a_draft_that_was_never_finished_does_not_count(paths: Paths) -> None:
    leases.write(paths, LEASE)
    paths.lease_file("qwen").with_suffix(".new").write_text('{"version": 1, "mod')
    assert leases.read(paths, "qwen") == LEASE
    leases.write(paths, replace(LEASE, ready=False))
    assert leases.read(paths, "qwen") == replace(LEASE, ready=False)
    assert leases.holders(paths) == ["qwen"]


def test_a_reader_of_the_old_lease_reads_it_to_its_end(paths: Paths) -> None:
    leases.write(paths, LEASE)
    with paths.lease_file("qwen").open() as old:
        leases.write(paths, replace(LEASE, port=1))
        assert json.load(old)["port"] == LEASE.port


def test_a_file_system_that_does_not_take_it_is_an_error_in_a_sentence(paths: Paths) -> None:
    paths.runtime.mkdir()
    paths.leases_directory.write_text("in the way")
    with pytest.raises(GpusvcError, match=r"lease\.json cannot be written: .+\.$"):
        leases.write(paths, LEASE)


# ---- what cannot be read ----

_WHOLE = json.dumps(LEASE.to_json())


@pytest.mark.parametrize(
    "content",
    [
        "",
        " ",
        "garbage",
        _WHOLE[: len(_WHOLE) // 2],
        _WHOLE + "}",
        b"\xff\xfe\0\0",
        b"\0" * 4096,
        "null",
        "[]",
        "17",
        '"version"',
        "{}",
        "[" * 100_000,
        pytest.param(spoilt(lambda value: value.update(version=2)), id="newer"),
        pytest.param(spoilt(lambda value: value.update(version="1")), id="version of another type"),
        pytest.param(spoilt(lambda value: value.pop("gpus")), id="without GPUs"),
        pytest.param(spoilt(lambda value: value.update(gpus={"0": "GPU-1"})), id="GPUs of another type"),
        pytest.param(spoilt(lambda value: value["gpus"][0].pop("uuid")), id="GPU without UUID"),
        pytest.param(spoilt(lambda value: value.update(port=None)), id="no port"),
        pytest.param(spoilt(lambda value: value.update(port=float("inf"))), id="infinite port"),
        pytest.param(spoilt(lambda value: value.update(created=10**400)), id="created beyond all floats"),
        pytest.param(spoilt(lambda value: value.update(processes=[[1, 2, 3]])), id="a process of three numbers"),
        pytest.param(spoilt(lambda value: value.update(processes=7)), id="processes of another type"),
        pytest.param(spoilt(lambda value: value.update(model="other")), id="of another model"),
        pytest.param(spoilt(lambda value: value.update(cgroup="/")), id="the group of everything"),
        pytest.param(spoilt(lambda value: value.update(cgroup="/system.slice/dbus.service")), id="group of another"),
        pytest.param(spoilt(lambda value: value.update(cgroup="/../model-qwen.scope")), id="outside of the hierarchy"),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_file_that_does_not_say_what_it_should_is_broken(paths: Paths, content: str | bytes) -> None:
    spoil(paths, content)
    with pytest.raises(BrokenLeaseError) as caught:
        leases.read(paths, "qwen")
    assert str(paths.lease_file("qwen")) in caught.value.message
    assert "gpusvc release qwen" in (caught.value.hint or "")


def test_a_directory_in_its_place_is_a_broken_lease(paths: Paths) -> None:
    paths.lease_file("qwen").mkdir(parents=True)
    with pytest.raises(BrokenLeaseError):
        leases.read(paths, "qwen")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_the_errors_that_are_handled(content: bytes) -> None:
    try:
        Lease.from_json(json.loads(content))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return


def test_a_lease_of_an_older_release_without_the_newest_field_can_be_read(paths: Paths) -> None:
    spoil(paths, spoilt(lambda value: value.pop("evicting")))
    assert leases.read(paths, "qwen") == replace(LEASE, evicting=())


def test_a_pid_is_the_models_until_another_process_has_it() -> None:
    lease = replace(LEASE, processes=frozenset({Process(10, 1), Process(11, 1)}))
    now = {10: Process(10, 1), 11: Process(11, 2)}
    assert lease.owned(10, now.get) == Process(10, 1)
    assert lease.owned(11, now.get) is None
    assert lease.owned(11, lambda _: None) == Process(11, 1), "a ghost in the driver"
    assert lease.owned(12, lambda _: None) is None
