"""Host memory as a resource of placement: what a model needs of it, who leaves for it, and what a refusal says."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.config.files import HostConfig, HostGpu, load_model
from gpusvc.errors import NeverFitsError, PlacementError
from gpusvc.gpu.reading import Gpu
from gpusvc.linux import memory
from gpusvc.linux.memory import Memory
from gpusvc.linux.users import User
from gpusvc.paths import Paths
from gpusvc.placement import need
from gpusvc.placement.plan import NoPlan, memory_as_gpu, plan
from gpusvc.placement.refusal import refuse
from gpusvc.placement.request import HOST_MEMORY, Claim, Request, Resident, Wish
from gpusvc.placement.search import Plan
from tests.unit.readings import GIB, a_gpu, a_lost_gpu, uuid_of

HOST = HostConfig(reserve_ram_bytes=GIB, gpu=HostGpu(reserve_bytes=0))


def ram(free: int, total: int = 64) -> Gpu:
    return memory_as_gpu(Memory(total * GIB, free * GIB, 0))


def wants(ram_gib: int | None, *, vram: int = 0, count: int = 0, declared: int | None = None) -> Request:
    """A request for so many GiB, all of which is declared, or as much as ``declared``."""
    needs = {uuid_of(index): vram * GIB for index in range(4)} if count else {}
    if ram_gib is not None:
        needs[HOST_MEMORY] = ram_gib * GIB
    told = ram_gib if declared is None else declared
    return Request("new", count, needs=needs, declared_ram_bytes=(told or 0) * GIB)


def resident(model: str, ram_gib: int, *, last_use: float = 0.0, busy: bool = False, **gpus: int) -> Resident:
    gives = {uuid_of(int(name[3:])): size * GIB for name, size in gpus.items()} | {HOST_MEMORY: ram_gib * GIB}
    return Resident(model, gives, 0, last_use, busy=busy)


def victims(
    request: Request, free: int, residents: Sequence[Resident], gpus: Sequence[Gpu] = (), claims: Sequence[Claim] = ()
) -> tuple[str, ...] | None:
    found = plan(request, gpus, claims, residents, HOST, memory=ram(free))
    return found.victims if isinstance(found, Plan) else None


def test_a_model_without_a_gpu_takes_part() -> None:
    assert victims(wants(8), 10, []) == ()
    assert victims(wants(10), 10, []) is None


def test_the_least_valuable_model_leaves_for_memory() -> None:
    there = [resident("old", 6, last_use=1), resident("older", 6, last_use=0)]
    assert victims(wants(8), 4, there) == ("older",)
    assert victims(wants(14), 4, there) == ("older", "old")


def test_busy_models_make_it_wait() -> None:
    found = plan(wants(8), (), (), [resident("busy", 6, busy=True)], HOST, memory=ram(4))
    assert isinstance(found, NoPlan)
    assert found.after_drain is not None
    assert found.after_drain.victims == ("busy",)


def test_an_unknown_need_does_not_count() -> None:
    assert victims(wants(None), 0, []) == ()


def test_a_victim_that_frees_a_gpu_frees_memory_too() -> None:
    gpus = [a_gpu(0, uncounted=20 * GIB)]
    there = [resident("both", 10, gpu0=20), resident("ram", 10, last_use=-1)]
    # "ram" was used longer ago, but is not needed: "both" has to leave the GPU anyway.
    assert victims(wants(8, vram=20, count=1), 2, there, gpus) == ("both",)


def test_memory_and_gpu_are_met_together() -> None:
    gpus = [a_gpu(0)]
    there = [resident("ram", 10)]
    assert victims(wants(8, vram=20, count=1), 2, there, gpus) == ("ram",)
    assert victims(wants(8, vram=20, count=1), 20, there, gpus) == ()


def test_what_was_promised_and_not_taken_is_not_free() -> None:
    promise = Claim("loading", HOST_MEMORY, 6 * GIB, loading=True)
    assert victims(wants(8), 12, [], claims=[promise]) is None
    found = plan(wants(8), (), [promise], [], HOST, memory=ram(12))
    assert isinstance(found, NoPlan)


def test_a_start_that_waits_first_keeps_its_memory() -> None:
    line = [Wish("first", {HOST_MEMORY: 6 * GIB}, ())]
    assert isinstance(plan(wants(8), (), (), [], HOST, line, ram(20)), Plan)
    assert isinstance(plan(wants(8), (), (), [], HOST, line, ram(12)), NoPlan)


def test_memory_is_no_gpu() -> None:
    assert victims(wants(None, vram=1, count=1), 60, []) is None


def refused(request: Request, free: int, residents: Sequence[Resident] = (), total: int = 64) -> PlacementError:
    found = plan(request, (), (), residents, HOST, memory=ram(free, total))
    assert isinstance(found, NoPlan)
    return refuse(request, found, HOST, {HOST_MEMORY: ["big 40.0 GiB (pinned, idle)"]})


def test_a_refusal_names_who_holds_the_memory() -> None:
    error = refused(wants(8), 4)
    assert not isinstance(error, NeverFitsError)
    assert error.message == (
        "new needs 8.0 GiB of host memory, and this machine does not have that free now.\n"
        "Host memory: 4.0 GiB free of 64.0 GiB, 1.0 GiB of it reserved; held by big 40.0 GiB (pinned, idle)."
    )


def test_a_model_larger_than_the_memory_never_fits() -> None:
    assert isinstance(refused(wants(64), 60), NeverFitsError)
    assert not isinstance(refused(wants(62), 10), NeverFitsError)


def test_a_guess_that_the_machine_never_has_free_starts_alone() -> None:
    there = [resident("idle", 20)]
    for guess in (62, 63, 100):
        assert victims(wants(guess, declared=0), 40, there) == ("idle",)
        assert victims(wants(guess, declared=0), 60, []) == ()
    assert victims(wants(63), 40, there) is None
    # What another program holds is not to be had: most of the memory must be there.
    assert victims(wants(62, declared=0), 40, []) is None
    assert victims(wants(30, declared=0), 20, []) is None
    # A guess takes nothing off what is declared.
    assert victims(wants(100, declared=62), 60, []) is None


def test_a_guess_waits_for_a_load_like_others() -> None:
    promise = Claim("loading", HOST_MEMORY, 30 * GIB, loading=True)
    assert victims(wants(62, declared=0), 60, [], claims=[promise]) is None


def test_what_running_programs_have_mapped_is_not_free() -> None:
    assert memory_as_gpu(Memory(64 * GIB, 40 * GIB, 30 * GIB)).free_bytes == 10 * GIB
    assert memory_as_gpu(Memory(64 * GIB, 10 * GIB, 30 * GIB)).free_bytes == 0


@given(
    st.integers(0, 20),
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3), st.booleans()), max_size=6),
)
def test_a_plan_never_promises_more_than_there_is(need: int, free: int, others: list[tuple[int, int, bool]]) -> None:
    there = [resident(f"m{n}", size, last_use=use, busy=busy) for n, (size, use, busy) in enumerate(others)]
    found = plan(wants(need), (), (), there, HOST, memory=ram(free))
    if isinstance(found, Plan):
        gone = {r.model: r for r in there if r.model in found.victims}
        assert not any(r.busy for r in gone.values())
        given_back = sum(r.gives[HOST_MEMORY] for r in gone.values())
        assert need * GIB <= free * GIB - GIB + given_back
        for victim in gone.values():  # none is needless
            assert need * GIB > free * GIB - GIB + given_back - victim.gives[HOST_MEMORY]
    else:
        idle = sum(r.gives[HOST_MEMORY] for r in there if not r.busy)
        assert need * GIB > free * GIB - GIB + idle


# ---- what processes use ----


def test_a_control_group_tells_what_its_end_gives_back(tmp_path: Path) -> None:
    # The kernel counts mapped shared memory as mapped files too.
    (tmp_path / "memory.stat").write_text("anon 100\nfile 9000\nshmem 10\nfile_mapped 11\nslab 5\n")
    assert memory.used_by(str(tmp_path), ()) == 111
    (tmp_path / "memory.stat").write_text("anon 100\nfile 9000\nshmem 10\nfile_mapped 0\nslab 5\n")
    assert memory.used_by(str(tmp_path), ()) == 110


def test_files_that_another_control_group_read_first_count_where_they_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 100\nshmem 0\nfile_mapped 0\n")
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(32 << 20))
    before = memory.used_by(str(tmp_path), [os.getpid()])
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert not any(mapped[at] for at in range(0, len(mapped), mmap.PAGESIZE))
        assert memory.used_by(str(tmp_path), [os.getpid()]) - before > (32 << 20) * 0.9


def test_without_a_memory_controller_the_processes_are_asked(tmp_path: Path) -> None:
    held = bytearray(os.urandom(1 << 20) * 32)
    used = memory.used_by(str(tmp_path), [os.getpid(), 1 << 22])
    assert used >= len(held)


@pytest.mark.parametrize("group", [None, "/nonexistent"])
def test_processes_that_are_gone_use_nothing(group: str | None) -> None:
    assert memory.used_by(group, [1 << 22]) == 0


@pytest.mark.parametrize(
    ("gpus", "gib"),
    [
        ((a_gpu(0, total=None),), 40),
        ((a_gpu(0), a_gpu(1)), None),
        ((a_gpu(0), a_lost_gpu(1)), None),  # which tells no bytes either
    ],
)
def test_vram_is_host_memory_only_where_a_gpu_has_none_of_its_own(
    tmp_path: Path, gpus: tuple[Gpu, ...], gib: int | None
) -> None:
    paths = Paths(config=tmp_path, runtime=tmp_path / "run", state=tmp_path / "state")
    paths.model_file("new").parent.mkdir(parents=True)
    paths.model_file("new").write_text('command = ["/bin/engine", "{port}"]\n[gpu]\nvram = "40GiB"\n')
    user = User("me", os.getuid(), os.getgid(), (), "/", "/bin/sh")
    found = need.of(paths, load_model(paths, "new", HOST), "digest", user, gpus, 64 * GIB)
    assert found.bytes.get(HOST_MEMORY) == (None if gib is None else gib * GIB)
