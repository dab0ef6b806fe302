"""The search for the cheapest set of victims that makes enough room for a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpusvc.placement.request import HOST_MEMORY, Claim, Request, Resident, exclude_each_other
from gpusvc.record import Record

if TYPE_CHECKING:
    from gpusvc.config.host import HostConfig
    from gpusvc.gpu.reading import Gpu


class Plan(Record):
    """The GPUs of a start, sorted by index, and the models that it evicts, the least valuable first."""

    gpus: tuple[Gpu, ...]
    victims: tuple[str, ...] = ()


class Offer(Record):
    """One GPU as a request sees it. ``free_bytes`` None: NVML does not know. ``obstacle``: why it cannot be used."""

    gpu: Gpu
    free_bytes: int | None
    claims: tuple[Claim, ...]
    obstacle: str | None

    @property
    def is_memory(self) -> bool:
        """Whether this is host memory and not a GPU."""
        return self.gpu.uuid == HOST_MEMORY


class Room(Record):
    """What a request has to fit in: the offers, the models that are there, and the models that may be evicted."""

    offers: Sequence[Offer]
    residents: Sequence[Resident]
    movable: Sequence[Resident]
    active: int
    """The number of models that count for ``max_active``."""
    on_gpu: Mapping[str, int]
    """The number of models that count for ``[gpu] max_active``, by the GPU's UUID."""


class Search:
    """The cheapest plan in which only the movable residents of ``room`` are evicted."""

    def __init__(self, request: Request, room: Room, host: HostConfig) -> None:
        self._request = request
        usable = [offer for offer in room.offers if offer.obstacle is None]
        self._offers = [offer for offer in usable if not offer.is_memory]
        # None: the request needs no host memory, or nobody knows how much.
        self._memory = next((offer for offer in usable if offer.is_memory and HOST_MEMORY in request.needs), None)
        self._residents = room.residents
        self._movable = sorted(room.movable, key=lambda resident: resident.worth)
        self._host = host
        self._gone: dict[str, Resident] = {}
        self._active = room.active
        # By GPU: free bytes, number of models and movable models, as if the models of ``_gone`` were gone.
        self._free = {offer.gpu.uuid: offer.free_bytes for offer in usable}
        self._there = {uuid: room.on_gpu.get(uuid, 0) for uuid in self._free}
        self._on: dict[str, list[Resident]] = {uuid: [] for uuid in self._free}
        for resident in self._movable:
            for uuid in resident.gives.keys() & self._on.keys():
                self._on[uuid].append(resident)

    def run(self) -> Plan | None:
        """Return the plan; None: there is none."""
        request = self._request
        rivals = {r.model for r in self._residents if exclude_each_other(request.exclusive, r.exclusive)}
        for resident in self._movable:
            if resident.model in rivals:
                self._evict(resident)
        if len(self._gone) < len(rivals):
            return None
        chosen: list[Offer] = []
        while len(chosen) < request.count:
            best = self._cheapest([offer for offer in self._offers if offer not in chosen])
            if best is None:
                return None
            chosen.append(best[0])
            for victim in best[1]:
                self._evict(victim)
        if self._memory is not None:
            more = self._victims_on(self._memory, clears=False)
            if more is None:
                return None
            for victim in more:
                self._evict(victim)
        for resident in self._movable:
            if self._surplus() > 0 and resident.model not in self._gone:
                self._evict(resident)
        if self._surplus() > 0:
            return None
        if not request.clears:
            self._spare_needless_victims(rivals, chosen)
        return Plan(
            gpus=tuple(sorted((offer.gpu for offer in chosen), key=lambda gpu: gpu.index)),
            victims=tuple(r.model for r in sorted(self._gone.values(), key=lambda resident: resident.worth)),
        )

    def _evict(self, resident: Resident) -> None:
        self._gone[resident.model] = resident
        self._move(resident, -1)

    def _move(self, resident: Resident, models: int) -> None:
        for uuid, size in resident.gives.items():
            if uuid in self._there:
                self._there[uuid] += models
                free = self._free[uuid]
                self._free[uuid] = None if free is None else free - models * size

    def _cheapest(self, offers: Sequence[Offer]) -> tuple[Offer, list[Resident]] | None:
        """Return the GPU with the cheapest victims, and these victims."""
        best: tuple[tuple[object, ...], Offer, list[Resident]] | None = None
        for offer in offers:
            victims = self._victims_on(offer, clears=self._request.clears)
            if victims is None:
                continue
            if self._request.clears:
                # The need is larger than anybody knew: take the GPU with most room once all idle models are gone.
                room = plus(self._free[offer.gpu.uuid], sum(victim.gives[offer.gpu.uuid] for victim in victims))
                cost: tuple[object, ...] = (room is None, -(room or 0), offer.gpu.index)
            else:
                hurt = sorted((victim.worth for victim in victims), reverse=True)
                cost = (hurt, self._rank(offer), offer.gpu.index)
            if best is None or cost < best[0]:
                best = (cost, offer, victims)
        return None if best is None else (best[1], best[2])

    def _victims_on(self, offer: Offer, *, clears: bool) -> list[Resident] | None:
        """Return the further models that have to leave this GPU; None: the request does not fit there.

        ``clears``: all models that can have to.
        """
        uuid = offer.gpu.uuid
        candidates = [resident for resident in self._on[uuid] if resident.model not in self._gone]
        free, there = self._free[uuid], self._there[uuid]
        victims: list[Resident] = []
        for candidate in candidates:
            if not clears and self._fits(offer, free, there):
                break
            victims.append(candidate)
            free, there = plus(free, candidate.gives[uuid]), there - 1
        if not self._fits(offer, free, there):
            return None
        if clears:
            return victims
        # The last victim was needed. Of the others, those that turn out to be needless stay, the most valuable first.
        for victim in reversed(victims[:-1]):
            if self._fits(offer, plus(free, -victim.gives[uuid]), there + 1):
                free, there = plus(free, -victim.gives[uuid]), there + 1
                victims.remove(victim)
        return victims

    def _fits(self, offer: Offer, free: int | None, there: int) -> bool:
        if offer.is_memory:
            return free is None or free >= self._request.needs[HOST_MEMORY]
        limit = 1 if offer.gpu.exclusive else self._host.gpu.max_active
        if limit and there + 1 > limit:
            return False
        if any(claim.is_open for claim in offer.claims):
            return False  # that model may also take what victims give back
        if free is None:
            # Unified memory: NVML has no number to compare. A model that loads there must be alone in that.
            return not offer.claims
        need = self._request.needs.get(offer.gpu.uuid)
        if need is None:
            # A model of unknown need could take what is promised to others that load there.
            return free > 0 and not any(claim.loading for claim in offer.claims)
        return free >= need

    def _surplus(self) -> int:
        """Return by how many models ``max_active`` would be exceeded."""
        limit = self._host.max_active
        return self._active - len(self._gone) + 1 - limit if limit else 0

    def _spare_needless_victims(self, rivals: set[str], chosen: Sequence[Offer]) -> None:
        """Drop victims whose room is not needed any more because of a victim of another GPU or rule."""
        for victim in sorted(self._gone.values(), key=lambda resident: resident.worth, reverse=True):
            if victim.model in rivals:
                continue
            del self._gone[victim.model]
            self._move(victim, +1)
            needed = [*chosen, *([self._memory] if self._memory is not None else [])]
            touched = [offer for offer in needed if offer.gpu.uuid in victim.gives]
            fits = all(self._fits(o, self._free[o.gpu.uuid], self._there[o.gpu.uuid]) for o in touched)
            if self._surplus() > 0 or not fits:
                self._evict(victim)

    def _rank(self, offer: Offer) -> tuple[bool, int, int]:
        free, untold = offer.free_bytes or 0, offer.free_bytes is None
        if offer.gpu.uuid not in self._request.needs:
            return (untold, 0, -free)  # unknown need: the most room is the least risk
        if self._host.gpu.placement == "spread":
            return (untold, self._there[offer.gpu.uuid], -free)
        return (untold, 0, free)  # the tightest fit keeps the large gaps whole


def plus(free: int | None, size: int) -> int | None:
    """Return ``free`` and ``size`` together; None stays unknown."""
    return None if free is None else free + size
