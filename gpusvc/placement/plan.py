"""Which GPUs a model gets and who makes room for it: numbers in, a plan or the reasons against it out.

No clock, no driver, no lock. free(gpu) = what NVML calls free − the host's reserve − what other models were promised
there and have not taken yet. Victims are idle, never pinned; of all sets that make enough room, the one that hurts
least: its most valuable member is the least valuable possible, by priority first, then by last use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from gpusvc.errors import PlacementError
from gpusvc.gpu.selector import DeviceSelector
from gpusvc.quantity import format_amount, format_duration, format_size
from gpusvc.record import Record

if TYPE_CHECKING:
    from gpusvc.config.files import HostConfig
    from gpusvc.gpu.reading import Gpu


def exclude_each_other(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two models may not run together, by the entries of their ``exclusive``.

    ``GROUP`` excludes everything else in the group; ``GROUP/SIDE`` everything but the same side of the group.
    """
    if not one or not other:
        return False
    sides = dict(_group_and_side(entry) for entry in other)
    return any(group in sides and not (side and side == sides[group]) for group, side in map(_group_and_side, one))


def _group_and_side(entry: str) -> tuple[str, str]:
    group, _, side = entry.partition("/")
    return group, side


class Request(Record):
    """What a model asks for. ``needs`` are bytes by the GPU's UUID; where one is missing, the need is unknown."""

    model: str
    count: int
    devices: tuple[str, ...] = ()
    needs: Mapping[str, int] = MappingProxyType({})
    exclusive: frozenset[str] = frozenset()
    clears: bool = False
    """Whether all that is idle has to leave its GPUs: it did not say what it needs, and ran out of memory."""


class Claim(Record):
    """Bytes of one GPU that a model was promised and has not taken yet: it is loading, or its end is not proven."""

    model: str
    gpu_uuid: str
    bytes: int
    loading: bool
    is_open: bool = False
    """It did not say what it takes: until it is loaded, whatever is free there, or becomes so, may be its."""


class Resident(Record):
    """Another model that counts as active. ``gives`` is what its end gives back, in bytes by the GPU's UUID."""

    model: str
    gives: Mapping[str, int]
    priority: int
    last_use: float
    """When it was used last; any clock, as long as it is one for all."""
    busy: bool
    pinned: bool = False
    loading: bool = False
    leaving: bool = False
    """On its way out already, or not to be moved at all."""
    exclusive: frozenset[str] = frozenset()

    @property
    def worth(self) -> tuple[int, float, str]:
        return (self.priority, self.last_use, self.model)


class Plan(Record):
    """Where the model goes, by index, and which models go first."""

    gpus: tuple[Gpu, ...]
    victims: tuple[str, ...] = ()


class Offer(Record):
    """One GPU as a model sees it. ``free_bytes`` None: NVML does not say; ``obstacle``: why it is out of question."""

    gpu: Gpu
    free_bytes: int | None
    claims: tuple[Claim, ...]
    obstacle: str | None


class Refusal(Record):
    """Why there is no plan now, and what would make one."""

    offers: tuple[Offer, ...]
    rule: str | None = None
    """The rule that is in the way, if it is one, rather than memory."""
    after_drain: Plan | None = None
    """The plan if these victims, some of which are in use, came free."""
    loading: tuple[str, ...] = ()
    """Models that are loading: once they are, there may be room."""


def plan(
    request: Request, gpus: Sequence[Gpu], claims: Sequence[Claim], residents: Sequence[Resident], host: HostConfig
) -> Plan | Refusal:
    """Where ``request`` goes, at the least cost to ``residents``."""
    offers = tuple(_offer(gpu, claims, request, host) for gpu in gpus)
    settled = [resident for resident in residents if not (resident.loading or resident.leaving or resident.pinned)]
    found = _Search(request, offers, residents, [r for r in settled if not r.busy], host).run()
    if found is not None:
        return found
    after_drain = _Search(request, offers, residents, settled, host).run()
    loading = tuple(sorted({r.model for r in residents if r.loading} | {c.model for c in claims if c.loading}))
    if after_drain is None and loading:
        patient = tuple(_without_loading(offer) for offer in offers)
        movable = [*settled, *(r for r in residents if r.loading and not r.pinned)]
        if _Search(request, patient, residents, movable, host).run() is None:
            loading = ()
    return Refusal(offers, _rule(request, residents, host), after_drain, loading if after_drain is None else ())


class _Search:
    """The cheapest plan in which only ``movable`` residents go."""

    def __init__(
        self,
        request: Request,
        offers: Sequence[Offer],
        residents: Sequence[Resident],
        movable: Sequence[Resident],
        host: HostConfig,
    ) -> None:
        self._request = request
        self._offers = [offer for offer in offers if offer.obstacle is None]
        self._residents = residents
        self._movable = sorted(movable, key=lambda resident: resident.worth)
        self._host = host
        self._gone: dict[str, Resident] = {}
        # By GPU: what is free there, how many models are, and who of them may go, all as if ``_gone`` were.
        self._free = {offer.gpu.uuid: offer.free_bytes for offer in self._offers}
        self._there = dict.fromkeys(self._free, 0)
        self._on: dict[str, list[Resident]] = {uuid: [] for uuid in self._free}
        for resident in residents:
            for uuid in resident.gives.keys() & self._there.keys():
                self._there[uuid] += 1
        for resident in self._movable:
            for uuid in resident.gives.keys() & self._on.keys():
                self._on[uuid].append(resident)

    def run(self) -> Plan | None:
        request = self._request
        rivals = {r.model for r in self._residents if exclude_each_other(request.exclusive, r.exclusive)}
        for resident in self._movable:
            if resident.model in rivals:
                self._send_off(resident)
        if len(self._gone) < len(rivals):
            return None
        chosen: list[Offer] = []
        while len(chosen) < request.count:
            best = self._cheapest([offer for offer in self._offers if offer not in chosen])
            if best is None:
                return None
            chosen.append(best[0])
            for victim in best[1]:
                self._send_off(victim)
        for resident in self._movable:
            if self._surplus() > 0 and resident.model not in self._gone:
                self._send_off(resident)
        if self._surplus() > 0:
            return None
        if not request.clears:
            self._spare_the_needless(rivals, chosen)
        return Plan(
            gpus=tuple(sorted((offer.gpu for offer in chosen), key=lambda gpu: gpu.index)),
            victims=tuple(r.model for r in sorted(self._gone.values(), key=lambda resident: resident.worth)),
        )

    def _send_off(self, resident: Resident) -> None:
        self._gone[resident.model] = resident
        self._move(resident, -1)

    def _move(self, resident: Resident, heads: int) -> None:
        for uuid, size in resident.gives.items():
            if uuid in self._there:
                self._there[uuid] += heads
                free = self._free[uuid]
                self._free[uuid] = None if free is None else free - heads * size

    def _cheapest(self, offers: Sequence[Offer]) -> tuple[Offer, list[Resident]] | None:
        """The GPU that is had at the least cost, and who else has to go for it."""
        best: tuple[tuple[object, ...], Offer, list[Resident]] | None = None
        for offer in offers:
            victims = self._victims_on(offer)
            if victims is None:
                continue
            if self._request.clears:
                # It takes more than anybody knew: most room once all that is idle has left, whoever that is.
                room = _plus(self._free[offer.gpu.uuid], sum(victim.gives[offer.gpu.uuid] for victim in victims))
                cost: tuple[object, ...] = (room is None, -(room or 0), offer.gpu.index)
            else:
                hurt = sorted((victim.worth for victim in victims), reverse=True)
                cost = (hurt, self._rank(offer), offer.gpu.index)
            if best is None or cost < best[0]:
                best = (cost, offer, victims)
        return None if best is None else (best[1], best[2])

    def _victims_on(self, offer: Offer) -> list[Resident] | None:
        """Who else has to leave this GPU so that the model fits; None if it never does."""
        uuid = offer.gpu.uuid
        candidates = [resident for resident in self._on[uuid] if resident.model not in self._gone]
        free, there = self._free[uuid], self._there[uuid]
        victims: list[Resident] = []
        for candidate in candidates:
            if not self._request.clears and self._fits(offer, free, there):
                break
            victims.append(candidate)
            free, there = _plus(free, candidate.gives[uuid]), there - 1
        if not self._fits(offer, free, there):
            return None
        if self._request.clears:
            return victims
        # The last one was needed. Of the others, those who turn out not to be stay, the dearest first.
        for victim in reversed(victims[:-1]):
            if self._fits(offer, _plus(free, -victim.gives[uuid]), there + 1):
                free, there = _plus(free, -victim.gives[uuid]), there + 1
                victims.remove(victim)
        return victims

    def _fits(self, offer: Offer, free: int | None, there: int) -> bool:
        limit = self._host.gpu.max_active
        if limit and there + 1 > limit:
            return False
        if any(claim.is_open for claim in offer.claims):
            return False  # what victims leave would be its as well
        if free is None:
            # Unified memory: NVML has no number to compare. Whoever is promised room there first, has it to himself.
            return not offer.claims
        need = self._request.needs.get(offer.gpu.uuid)
        if need is None:
            # What is promised to others that load there could be what this one takes.
            return free > 0 and not any(claim.loading for claim in offer.claims)
        return free >= need

    def _surplus(self) -> int:
        """How many models there would be too many."""
        limit = self._host.max_active
        return len(self._residents) - len(self._gone) + 1 - limit if limit else 0

    def _spare_the_needless(self, rivals: Collection[str], chosen: Sequence[Offer]) -> None:
        """Room for one GPU or rule may have been made by a victim of another."""
        for victim in sorted(self._gone.values(), key=lambda resident: resident.worth, reverse=True):
            if victim.model in rivals:
                continue
            del self._gone[victim.model]
            self._move(victim, +1)
            touched = [offer for offer in chosen if offer.gpu.uuid in victim.gives]
            fits = all(self._fits(o, self._free[o.gpu.uuid], self._there[o.gpu.uuid]) for o in touched)
            if self._surplus() > 0 or not fits:
                self._send_off(victim)

    def _rank(self, offer: Offer) -> tuple[bool, int, int]:
        free, untold = offer.free_bytes or 0, offer.free_bytes is None
        if offer.gpu.uuid not in self._request.needs:
            return (untold, 0, -free)  # what it takes is not known yet: most room, least risk
        if self._host.gpu.placement == "spread":
            return (untold, self._there[offer.gpu.uuid], -free)
        return (untold, 0, free)  # the tightest fit keeps the large gaps whole


def _plus(free: int | None, size: int) -> int | None:
    return None if free is None else free + size


def refusal(request: Request, refused: Refusal, holders: Mapping[str, Sequence[str]]) -> PlacementError:
    """Why nothing fits, GPU by GPU.

    Args:
        request: what was asked.
        refused: why not.
        holders: by the GPU's UUID, who holds how much of it, in words.
    """
    known = sorted(set(request.needs.values()))
    need = " or ".join(format_size(size) for size in known) if known else "room"
    hint = "`gpusvc gpus` shows who holds what; `gpusvc stop NAME` frees it."
    if refused.rule is not None:
        lines = [f"{request.model} may not start now: {refused.rule}."]
    elif not refused.offers:
        lines = [f"{request.model} needs {_gpus(request.count)}, and NVML shows none."]
    elif _too_large(request, refused.offers):
        lines = [f"{request.model} needs {need} on {_gpus(request.count)}, and none that it may have is that large."]
        hint = "`gpusvc gpus` shows how large each is."
    else:
        lines = [
            f"{request.model} needs {need} on {_gpus(request.count)}, and this machine does not have that free now."
        ]
    lines += [_describe(offer, holders.get(offer.gpu.uuid, ())) for offer in refused.offers]
    return PlacementError("\n".join(lines), hint=hint)


def _too_large(request: Request, offers: Sequence[Offer]) -> bool:
    """Whether no GPU would do even if it were empty."""
    usable = [offer.gpu for offer in offers if offer.obstacle is None]
    totals = [(gpu.total_bytes, request.needs.get(gpu.uuid)) for gpu in usable]
    return bool(totals) and all(total is not None and need is not None and need > total for total, need in totals)


def _gpus(count: int) -> str:
    return "a GPU" if count == 1 else f"each of {count} GPUs"


def _offer(gpu: Gpu, claims: Sequence[Claim], request: Request, host: HostConfig) -> Offer:
    def matches(selectors: Iterable[str]) -> bool:
        parsed = map(DeviceSelector.parse, selectors)
        return any(selector.matches(index=gpu.index, uuid=gpu.uuid, name=gpu.name) for selector in parsed)

    obstacle = gpu.problem
    if obstacle is None and gpu.mig:
        obstacle = "is in MIG mode; gpusvc places models on whole GPUs"
    if obstacle is None and matches(host.gpu.exclude):
        obstacle = "is excluded by gpusvc.toml"
    if obstacle is None and request.devices and not matches(request.devices):
        obstacle = "is not among the model's devices"
    here = tuple(claim for claim in claims if claim.gpu_uuid == gpu.uuid)
    free = gpu.free_bytes
    if free is not None:
        free -= host.gpu.reserve_bytes + sum(claim.bytes for claim in here)
    return Offer(gpu=gpu, free_bytes=free, claims=here, obstacle=obstacle)


def _without_loading(offer: Offer) -> Offer:
    promised = sum(claim.bytes for claim in offer.claims if claim.loading)
    settled = tuple(claim for claim in offer.claims if not claim.loading)
    free = None if offer.free_bytes is None else offer.free_bytes + promised
    return Offer(offer.gpu, free, settled, offer.obstacle)


def _rule(request: Request, residents: Sequence[Resident], host: HostConfig) -> str | None:
    rivals = [
        r
        for r in residents
        if exclude_each_other(request.exclusive, r.exclusive) and (r.busy or r.pinned or r.loading or r.leaving)
    ]
    if rivals:
        return f"it is exclusive with {_listed(rivals)}"
    fixed = [r for r in residents if r.busy or r.pinned or r.loading or r.leaving]
    if host.max_active and len(fixed) >= host.max_active:
        return f"max_active = {host.max_active} is reached by {_listed(fixed)}"
    return None


def standing(resident: Resident, now_seconds: float | None = None) -> str:
    """What a person wants to know of who is in the way; ``now_seconds`` by the clock of ``last_use``."""
    if resident.leaving:
        return "stopping"
    if resident.loading:
        return "loading"
    busy = "in use" if resident.busy else "idle"
    if not resident.busy and now_seconds is not None:
        busy = f"idle for {format_duration(max(0, round(now_seconds - resident.last_use)))}"
    return f"pinned, {busy}" if resident.pinned else busy


def _listed(residents: Sequence[Resident]) -> str:
    return ", ".join(f"{resident.model} ({standing(resident)})" for resident in residents)


def _describe(offer: Offer, holders: Sequence[str]) -> str:
    gpu = offer.gpu
    if gpu.problem is not None:
        return f"GPU {gpu.index}{f' ({gpu.name})' if gpu.name else ''} cannot be read: {gpu.problem.rstrip('.')}."
    free = format_amount(gpu.free_bytes)
    total = "an unknown total" if gpu.total_bytes is None else format_size(gpu.total_bytes)
    parts = [f"GPU {gpu.index} ({gpu.name}): {free} free of {total}"]
    if offer.obstacle is not None:
        parts.append(offer.obstacle)
    parts += [f"{format_size(claim.bytes)} promised to {claim.model}" for claim in offer.claims]
    nobody = "held by nobody" if gpu.processes is not None else "by whom the rest is held is unknown"
    parts.append("held by " + ", ".join(holders) if holders else nobody)
    return "; ".join(parts) + "."
