"""What a placement knows of the models that hold a lease, and of the room that each of them takes or gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.config.files import load_sound_model
from gpusvc.linux import memory, processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.placement.request import HOST_MEMORY, Claim, Resident, Wish
from gpusvc.quantity import format_amount
from gpusvc.record import Record
from gpusvc.state import holdings, readiness, use
from gpusvc.state import lease as leases
from gpusvc.state.holdings import Holding
from gpusvc.state.lease import BrokenLeaseError, Lease
from gpusvc.state.line import Blocker

if TYPE_CHECKING:
    from gpusvc.config.files import HostConfig, ModelConfig
    from gpusvc.gpu.reading import Gpu
    from gpusvc.paths import Paths

# If models come and go all the time, the last reading is used.
_LOOKS = 10


class Occupant(Record):
    """A lease, and the state of its model as the kernel tells it."""

    lease: Lease
    populated: bool
    """Whether any process is in its control group."""
    attended: bool
    """Whether a launcher or a release holds its lock."""
    ending: bool = False
    """Whether its engine has ended and its service has not: the release proof follows soon."""

    def ram_bytes(self, gpus: Sequence[Gpu], pids: Collection[int]) -> int:
        """Return the host memory that its end gives back, with VRAM of GPUs that have no memory of their own.

        Args:
            gpus: a reading of NVML.
            pids: the model's processes in it.
        """
        if self.lease.cgroup is None:
            return 0
        group, own = Cgroup(self.lease.cgroup), {leased.uuid for leased in self.lease.gpus}
        # The driver takes such VRAM for itself: the kernel counts it for no process.
        vram = sum(gpu.used_by(pids) or 0 for gpu in gpus if gpu.is_unified and gpu.uuid in own)
        return vram + memory.used_by(str(group.directory), group.pids())

    @property
    def loading(self) -> bool:
        return self.attended and not self.lease.ready

    def claims(self, gpus: Sequence[Gpu], pids: Collection[int]) -> list[Claim]:
        """Return what the model was promised and has not taken; a ready model has taken all.

        A model that ends keeps its promise of VRAM until its release is proven, and other starts wait for that.

        Args:
            gpus: a reading of NVML.
            pids: the model's processes in it.
        """
        if self.lease.ready and self.populated and not self.ending:
            return []
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        found = []
        # Unlike VRAM, host memory is back with the last process, so that a release that is not proven keeps none.
        if self.lease.ram_bytes is not None and (self.loading or self.populated):
            missing = max(0, self.lease.ram_bytes - self.ram_bytes(gpus, pids))
            if missing:
                found.append(Claim(self.lease.model, HOST_MEMORY, missing, loading=self.loading or self.ending))
        for leased in self.lease.gpus:
            gpu = by_uuid.get(leased.uuid)
            if gpu is None:
                continue
            promised = leased.reserved_bytes
            if promised is None and self.lease.ready:
                promised = leased.used_bytes  # its need was unknown, and this is what it was seen to hold
            if promised is not None:
                outstanding = max(0, promised - (gpu.used_by(pids) or 0))
            else:
                # Its need is unknown: until it is loaded, it may take all that is free.
                outstanding = (gpu.free_bytes or 0) if self.loading else 0
            if outstanding or self.loading:
                waits = self.loading or self.ending
                is_open = promised is None and self.loading
                found.append(Claim(self.lease.model, leased.uuid, outstanding, loading=waits, is_open=is_open))
        return found


def occupants(paths: Paths, *, but: str | None = None) -> list[Occupant]:
    """Return the models whose leases can be read, without the model ``but``."""
    found = []
    for name in leases.holders(paths):
        try:
            lease = leases.read(paths, name) if name != but else None
        except BrokenLeaseError:
            continue  # its processes count as foreign, and its promise is lost
        if lease is None:
            continue
        inside = Cgroup(lease.cgroup).pids() if lease.cgroup is not None else ()
        service = Cgroup(f"{paths.control_group}/{names.service(name)}")
        found.append(
            Occupant(
                lease=lease,
                populated=bool(inside),
                attended=leases.is_held(paths, name),
                ending=lease.ready and lease.pid not in inside and service.populated(),
            )
        )
    return found


def look(
    paths: Paths, read_gpus: Callable[[], Sequence[Gpu]], *, but: str | None = None
) -> tuple[list[Occupant], Sequence[Gpu]]:
    """Return the models that hold a lease and a reading of NVML, both of the same moment.

    Both are read again if a model became ready or died in between: its claim and NVML's bytes would not fit together.

    Args:
        paths: where the leases are.
        read_gpus: reads NVML.
        but: the model that is not counted.
    """
    before = occupants(paths, but=but)
    for _ in range(_LOOKS):
        gpus = read_gpus()
        found = occupants(paths, but=but)
        if _states(found) == _states(before):
            break
        before = found
    return found, gpus


def _states(found: Sequence[Occupant]) -> list[object]:
    return [(o.lease.model, o.lease.created, o.lease.ready, o.populated, o.attended, o.ending) for o in found]


class Scene(Record):
    """What a placement knows of the other models and starts."""

    held: tuple[Holding, ...]
    claims: tuple[Claim, ...]
    residents: tuple[Resident, ...]
    line: tuple[Wish, ...] = ()

    def changing(self, names: Iterable[str]) -> list[Blocker]:
        """Return those of the models ``names`` that do not wait in the line, with what they are doing."""
        waiting = {wish.model for wish in self.line}
        by_model = {holding.lease.model: holding for holding in self.held}
        leaving = {resident.model for resident in self.residents if resident.leaving}
        found = []
        for name in names:
            if name not in waiting:
                loads = name not in by_model or not by_model[name].lease.ready
                found.append(Blocker(name, "stopping" if name in leaving else "loading" if loads else "just loaded"))
        return found

    def holders(self, gpus: Sequence[Gpu], now_seconds: float) -> dict[str, list[str]]:
        """Return in_words(), with each model's state at ``now_seconds`` since the epoch."""
        from gpusvc.placement.refusal import state_in_words  # noqa: PLC0415  for a refusal only

        states = {r.model: state_in_words(r, now_seconds) for r in self.residents}
        largest = sorted(self.residents, key=lambda r: -r.gives.get(HOST_MEMORY, 0))
        held = [
            f"{r.model} {format_amount(r.gives[HOST_MEMORY])} ({states[r.model]})"
            for r in largest
            if r.gives.get(HOST_MEMORY)
        ]
        return in_words(gpus, self.held, states) | ({HOST_MEMORY: held} if held else {})


def scene(
    paths: Paths,
    host: HostConfig,
    found: Sequence[Occupant],
    gpus: Sequence[Gpu],
    ahead: Sequence[Wish],
    *,
    drained: Collection[str] = (),
) -> Scene:
    """Return what a placement knows of the others. The caller holds the placement lock.

    Args:
        paths: where their files are.
        host: the policy.
        found: the models that hold a lease.
        gpus: a reading of NVML, of the same moment; see look().
        ahead: the wishes of the starts that come first in the line.
        drained: the models whose doors the caller holds closed, and that nobody uses.
    """
    held = holdings.join((occupant.lease for occupant in found), gpus)
    claims = tuple(claim for each in found for claim in each.claims(gpus, held[each.lease.model].pids))
    leaving = frozenset(name for occupant in found if occupant.loading for name in occupant.lease.evicting)
    others = residents(paths, host, found, held, gpus, drained=drained, leaving=leaving)
    # A start keeps its ticket until its victims are gone. From its lease on, the lease counts, and the ticket no more.
    line = tuple(wish for wish in ahead if not (wish.is_model and wish.model in held))
    return Scene(tuple(held.values()), claims, tuple(others), line)


def residents(
    paths: Paths,
    host: HostConfig,
    occupants: Sequence[Occupant],
    held: Mapping[str, Holding],
    gpus: Sequence[Gpu],
    *,
    drained: Collection[str],
    leaving: Collection[str],
) -> list[Resident]:
    """Return the models that hold a lease, as a placement sees them.

    Args:
        paths: where their files are.
        host: the policy.
        occupants: they.
        held: what each of them holds.
        gpus: a reading of NVML.
        drained: the models whose doors the caller holds closed, and that nobody uses.
        leaving: the models that another start evicts already.
    """
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    found = []
    for occupant in occupants:
        lease = occupant.lease
        pids = held[lease.model].pids
        stays = occupant.populated and _must_stay(paths, lease.model, host.eviction.min_stay_seconds)
        config = load_sound_model(paths, lease.model, host)
        given = {leased.uuid: by_uuid[leased.uuid] for leased in lease.gpus if leased.uuid in by_uuid}
        found.append(
            Resident(
                model=lease.model,
                gives={uuid: gpu.used_by(pids) or 0 for uuid, gpu in given.items()}
                | {HOST_MEMORY: occupant.ram_bytes(gpus, pids)},
                priority=config.priority if config is not None else 0,
                last_use=use.last_use(paths, lease.model) or lease.created,
                # A model whose lock cannot be tried counts as in use.
                busy=lease.model not in drained and use.is_used(paths, lease.model) is not False,
                pinned=is_pinned(paths, lease.model, config),
                # A start waits for the end of min_stay as it waits for a load: the door stays open.
                loading=occupant.loading or occupant.ending or stays,
                leaving=lease.model in leaving or occupant.ending,
                stuck=not (occupant.populated or occupant.loading or occupant.ending),
                exclusive=frozenset(config.exclusive) if config is not None else frozenset(),
            )
        )
    return found


def _must_stay(paths: Paths, name: str, min_stay_seconds: float) -> bool:
    since = readiness.since(paths, name) if min_stay_seconds else None
    return since is not None and 0 <= time.time() - since < min_stay_seconds


def is_pinned(paths: Paths, name: str, config: ModelConfig | None) -> bool:
    """Whether the model is never evicted: by its file, or by `gpusvc pin` until the next boot."""
    return (config is not None and config.pinned) or paths.pin_file(name).exists()


def in_words(
    gpus: Sequence[Gpu], held: Sequence[Holding], states: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Return who holds what, by the GPU's UUID: models and foreign processes, with the bytes that NVML reports.

    Args:
        gpus: a reading of NVML.
        held: what models hold.
        states: by model, whether it is in use, and since when it is not.
    """
    found: dict[str, list[str]] = {}
    for gpu in gpus:
        models, foreign = holdings.shares(gpu, held)
        words = []
        for share in models:
            name = share.holding.lease.model
            if share.is_listed:
                state = f" ({states[name]})" if states and name in states else ""
                words.append(f"{name} {format_amount(share.used_bytes)}{state}")
        for process in foreign:
            command = processes.command(process.pid) or "gone"
            words.append(f"PID {process.pid} ({command}) {format_amount(process.used_bytes)}")
        found[gpu.uuid] = words
    return found
