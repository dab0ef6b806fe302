"""Which GPUs a model gets and which models make room for it: numbers in, a plan or the reasons against it out.

No clock, no driver, no lock. Free is what NVML calls free, less the host's reserve, less what others were promised
and have not taken yet. Victims are idle and not pinned; of all sets that make enough room, plan() takes the one whose
most valuable member is worth least: by priority first, then by last use.

A start that waits in line counts before it runs: the room that it will take, the models that leave for it, its
exclusive groups and its place in max_active. A request gets a place only where it fits now and after each change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gpusvc.gpu.reading import Gpu
from gpusvc.gpu.selector import DeviceSelector
from gpusvc.placement.request import HOST_MEMORY, Claim, Request, Resident, Wish, exclude_each_other
from gpusvc.placement.search import Offer, Plan, Room, Search, plus
from gpusvc.record import Record, replace

if TYPE_CHECKING:
    from gpusvc.config.host import HostConfig
    from gpusvc.linux.memory import Memory


# The host itself needs some memory, so that a guess of more than this part of it may be met by what there is.
_CREDIBLE_SHARE = 0.75


class NoPlan(Record):
    """Why there is no plan now, and what would make one."""

    offers: tuple[Offer, ...]
    rule_breakers: tuple[Resident, ...] = ()
    """The models that keep a rule (``max_active`` or an exclusive group) from being met; they are not idle."""
    is_exclusive: bool = False
    """The rule is an exclusive group."""
    after_drain: Plan | None = None
    """The plan that holds as soon as nobody uses these victims."""
    in_line: Plan | None = None
    """The plan that may hold once the models of ``behind`` are loaded, or gone."""
    behind: tuple[str, ...] = ()
    """The models that load, leave, or wait in line before this request, whose change may make room."""
    is_never: bool = False
    """No state of this machine can meet the need."""

    @property
    def can_wait(self) -> bool:
        """Whether waiting may lead to a plan."""
        return self.after_drain is not None or self.in_line is not None


def plan(
    request: Request,
    gpus: Sequence[Gpu],
    claims: Sequence[Claim],
    residents: Sequence[Resident],
    host: HostConfig,
    line: Sequence[Wish] = (),
    memory: Gpu | None = None,
) -> Plan | NoPlan:
    """Return where ``request`` is placed at the least cost to ``residents``.

    Args:
        request: the need.
        gpus: a reading of NVML.
        claims: the promises that are not taken yet.
        residents: all other active models.
        host: the policy.
        line: the starts that wait and come first, the first of them first.
        memory: the host's, as memory_as_gpu() gives it; None: it does not count. Of a need for it that is a guess, the
            room that is there without the other models is enough, if that is most of the memory.
    """
    offers = tuple(_offer(gpu, claims, request, host) for gpu in gpus)
    if memory is not None:
        offers = (*offers, _memory_offer(memory, claims, host))
        request = _with_credible_guess(request, offers[-1], residents, host)
    line = [wish for wish in line if wish.model != request.model]
    coming = _Coming(offers, claims, residents, line)
    settled = [r for r in residents if r.is_settled and r.model not in coming.leaving]
    tightest = coming.tightest()
    found = Search(request, replace(tightest, movable=[r for r in settled if not r.busy]), host).run()
    if found is not None:
        return found
    after_drain = Search(request, replace(tightest, movable=settled), host).run()
    in_line: Plan | None = None
    behind: tuple[str, ...] = ()
    if after_drain is None:
        behind = coming.behind()
        in_line = Search(request, coming.last(), host).run() if behind else None
    breakers, is_exclusive = _rule_breakers(request, residents, host)
    return NoPlan(
        offers,
        breakers,
        is_exclusive,
        after_drain,
        in_line,
        behind if in_line is not None else (),
        is_never=after_drain is None and in_line is None and _is_never(request, offers, host),
    )


class _Coming:
    """The changes that the starts before this request will bring, followed one by one."""

    def __init__(
        self, offers: Sequence[Offer], claims: Sequence[Claim], residents: Sequence[Resident], line: Sequence[Wish]
    ) -> None:
        self._offers = offers
        self._residents = residents
        self._line = line
        self.leaving = {name for wish in line for name in wish.victims}
        self._promised: dict[str, dict[str, int]] = {}
        # Of an open claim it is not known how much will be taken, so that all of it may be free in the end.
        self._open = [(claim.gpu_uuid, claim.bytes) for claim in claims if claim.is_open]
        for claim in claims:
            if claim.loading and not claim.is_open:
                promised = self._promised.setdefault(claim.model, {})
                promised[claim.gpu_uuid] = promised.get(claim.gpu_uuid, 0) + claim.bytes
        loading = {claim.model for claim in claims if claim.loading}
        unknown = sorted(loading - {resident.model for resident in residents})
        strangers = [Resident(model, {}, 0, 0.0, busy=False, loading=True) for model in unknown]
        self._present = [*residents, *strangers]
        self._waiting = [_as_resident(wish) for wish in line]

    def behind(self) -> tuple[str, ...]:
        """Return the models whose change is worth waiting for."""
        changing = {r.model for r in self._present if r.loading or r.leaving}
        return tuple(sorted(changing | {wish.model for wish in self._line}))

    def tightest(self) -> Room:
        """For each GPU and each limit return the least room that there is now and after each start of the line."""
        walk = _Walk(self._offers, self._residents)
        free, on_gpu, active = dict(walk.free), dict(walk.on_gpu), walk.active
        whole = {r.model: self._whole(r) for r in self._present} if self._line else {}
        for wish, waiting in zip(self._line, self._waiting, strict=True):
            for victim in wish.victims:
                if victim in whole:
                    walk.remove(whole.pop(victim))
            if wish.is_model:
                walk.add(waiting.gives)
            else:
                walk.take(waiting.gives)
            whole[wish.model] = waiting.gives
            free = {uuid: _least(size, walk.free[uuid]) for uuid, size in free.items()}
            on_gpu = {uuid: max(number, walk.on_gpu[uuid]) for uuid, number in on_gpu.items()}
            active = max(active, walk.active)
        offers = [replace(offer, free_bytes=free[offer.gpu.uuid]) for offer in self._offers] if self._line else None
        return Room(offers or self._offers, [*self._residents, *self._waiting], (), active, on_gpu)

    def last(self) -> Room:
        """Return the room after all these changes, in which every model may be evicted that is not pinned or stuck."""
        walk = _Walk(self._offers, self._residents)
        for uuid, size in self._open:
            if uuid in walk.free:
                walk.free[uuid] = plus(walk.free[uuid], size)
        staying = []
        for resident in self._present:
            whole = self._whole(resident)
            if resident.leaving or resident.model in self.leaving:
                walk.remove(whole)
            else:
                staying.append(replace(resident, gives=whole))
        for wish, waiting in zip(self._line, self._waiting, strict=True):
            if wish.is_model:
                walk.add(waiting.gives)
            else:
                walk.take(waiting.gives)
            if wish.model not in self.leaving:
                staying.append(waiting)
            else:
                walk.remove(waiting.gives)
        offers = [
            Offer(
                offer.gpu,
                walk.free[offer.gpu.uuid],
                tuple(claim for claim in offer.claims if not claim.loading),
                offer.obstacle,
            )
            for offer in self._offers
        ]
        movable = [resident for resident in staying if not (resident.pinned or resident.stuck or resident.spared)]
        return Room(offers, staying, movable, walk.active, walk.on_gpu)

    def _whole(self, resident: Resident) -> Mapping[str, int]:
        """Return what the end of ``resident`` gives back once it has taken all that it was promised."""
        promised = self._promised.get(resident.model)
        if promised is None:
            return resident.gives
        uuids = resident.gives.keys() | promised.keys()
        return {uuid: resident.gives.get(uuid, 0) + promised.get(uuid, 0) for uuid in uuids}


class _Walk:
    """What is free and how many models there are, on the way from one change to the next."""

    def __init__(self, offers: Sequence[Offer], residents: Sequence[Resident]) -> None:
        self.free = {offer.gpu.uuid: offer.free_bytes for offer in offers}
        self.on_gpu = dict.fromkeys(self.free, 0)
        self.active = len(residents)
        for resident in residents:
            for uuid in resident.gives.keys() & self.on_gpu.keys():
                self.on_gpu[uuid] += 1

    def add(self, gives: Mapping[str, int]) -> None:
        self.take(gives)
        self.active += 1
        for uuid in gives.keys() & self.on_gpu.keys():
            self.on_gpu[uuid] += 1

    def take(self, gives: Mapping[str, int]) -> None:
        for uuid in gives.keys() & self.free.keys():
            self.free[uuid] = plus(self.free[uuid], -gives[uuid])

    def remove(self, gives: Mapping[str, int]) -> None:
        self.active -= 1
        for uuid in gives.keys() & self.free.keys():
            self.free[uuid] = plus(self.free[uuid], gives[uuid])
            self.on_gpu[uuid] -= 1


def _as_resident(wish: Wish) -> Resident:
    # It has not been used yet, so that no other model of its priority is worth more.
    return Resident(
        wish.model,
        wish.bytes,
        wish.priority,
        last_use=math.inf,
        busy=False,
        pinned=not wish.is_model,
        loading=True,
        exclusive=wish.exclusive,
    )


def _least(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else min(one, other)


def _offer(gpu: Gpu, claims: Sequence[Claim], request: Request, host: HostConfig) -> Offer:
    def matches(selectors: Iterable[str]) -> bool:
        parsed = map(DeviceSelector.parse, selectors)
        return any(selector.matches(index=gpu.index, uuid=gpu.uuid, name=gpu.name) for selector in parsed)

    obstacle = gpu.problem
    if obstacle is None and gpu.mig:
        obstacle = "is in MIG mode; gpusvc places models on whole GPUs"
    if obstacle is None and gpu.prohibited:
        obstacle = "lets no program in, as its compute mode is PROHIBITED"
    if obstacle is None and matches(host.gpu.exclude):
        obstacle = "is excluded by gpusvc.toml"
    if obstacle is None and request.devices and not matches(request.devices):
        obstacle = "is not among the model's devices"
    here = tuple(claim for claim in claims if claim.gpu_uuid == gpu.uuid)
    free = gpu.free_bytes
    if free is not None:
        free -= host.gpu.reserve_bytes + sum(claim.bytes for claim in here)
    return Offer(gpu=gpu, free_bytes=free, claims=here, obstacle=obstacle)


def _memory_offer(memory: Gpu, claims: Sequence[Claim], host: HostConfig) -> Offer:
    here = tuple(claim for claim in claims if claim.gpu_uuid == HOST_MEMORY)
    free = (memory.free_bytes or 0) - host.reserve_ram_bytes - sum(claim.bytes for claim in here)
    return Offer(gpu=memory, free_bytes=free, claims=here, obstacle=None)


def _with_credible_guess(request: Request, memory: Offer, residents: Sequence[Resident], host: HostConfig) -> Request:
    """Return ``request`` with a need for host memory that the machine can meet, unless a larger one is declared.

    A model may have taken what is not free again, and an estimate may be too high. Alone, such a model may start.
    """
    need = request.needs.get(HOST_MEMORY)
    if need is None or need <= request.declared_ram_bytes:
        return request
    given = sum(resident.gives.get(HOST_MEMORY, 0) for resident in residents)
    room = (memory.gpu.free_bytes or 0) - host.reserve_ram_bytes + given
    most = int(((memory.gpu.total_bytes or 0) - host.reserve_ram_bytes) * _CREDIBLE_SHARE)
    need = max(request.declared_ram_bytes, min(need, max(room, most, 0)))
    return replace(request, needs={**request.needs, HOST_MEMORY: need})


def memory_as_gpu(found: Memory) -> Gpu:
    """Return the host's memory in the form of a GPU. What running programs have mapped is not free."""
    free = max(0, found.available_bytes - found.mapped_bytes)
    return Gpu(-1, HOST_MEMORY, HOST_MEMORY, None, "", found.total_bytes, found.total_bytes - free, free)


def _rule_breakers(
    request: Request, residents: Sequence[Resident], host: HostConfig
) -> tuple[tuple[Resident, ...], bool]:
    """Return the models because of which a rule cannot be met now, and whether the rule is an exclusive group."""
    fixed = tuple(r for r in residents if r.busy or not r.is_settled)
    rivals = tuple(r for r in fixed if exclude_each_other(request.exclusive, r.exclusive))
    if rivals:
        return rivals, True
    if host.max_active and len(fixed) >= host.max_active:
        return fixed, False
    return (), False


def _is_never(request: Request, offers: Sequence[Offer], host: HostConfig) -> bool:
    """Whether the request does not fit on this machine even if nothing else runs; lost GPUs may come back."""
    need = request.needs.get(HOST_MEMORY, 0)
    if any(o.is_memory and need > (o.gpu.total_bytes or 0) - host.reserve_ram_bytes for o in offers):
        return True
    offers = [offer for offer in offers if not offer.is_memory]
    if not offers:
        return False  # the driver may not be loaded yet

    def could_do(offer: Offer) -> bool:
        gpu, need = offer.gpu, request.needs.get(offer.gpu.uuid)
        if gpu.problem is not None:
            return True
        if offer.obstacle is not None:
            return False
        return gpu.total_bytes is None or need is None or need <= gpu.total_bytes - host.gpu.reserve_bytes

    return sum(map(could_do, offers)) < request.count
