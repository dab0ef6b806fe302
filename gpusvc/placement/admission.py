"""The admission of a start: it is given its place, and room is made for it.

Decisions are taken one at a time, under a lock, and written down as a lease at once; evictions and waiting happen
outside of it. A start that has to wait holds a ticket, so that those who come later do not take what it waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from gpusvc.errors import UnreleasedError
from gpusvc.linux import processes
from gpusvc.log import log
from gpusvc.placement import eviction, ports, survey, waitlist
from gpusvc.placement import plan as placement
from gpusvc.placement.eviction import Doors
from gpusvc.placement.plan import Plan, Refusal, Request
from gpusvc.placement.waitlist import Ticket
from gpusvc.record import Record
from gpusvc.release import proof
from gpusvc.state import footprints as footprint
from gpusvc.state import lease as leases
from gpusvc.state.lease import Lease, LeasedGpu

if TYPE_CHECKING:
    from gpusvc.config.files import HostConfig, ModelConfig
    from gpusvc.gpu.nvml import Nvml
    from gpusvc.gpu.reading import Gpu
    from gpusvc.linux.users import User
    from gpusvc.paths import Paths

_PAUSE_SECONDS = 0.05


class Admitted(Record):
    """A place: the lease as it was written, its GPUs as NVML showed them, and whether their need was only guessed."""

    lease: Lease
    gpus: tuple[Gpu, ...]
    is_guess: bool


class Admission:
    """One start that wants in."""

    def __init__(
        self,
        paths: Paths,
        host: HostConfig,
        config: ModelConfig,
        nvml: Nvml | None,
        *,
        user: User,
        on_wait: Callable[[str], None],
        clears: bool = False,
    ) -> None:
        """
        Args:
            paths: where leases are.
            host: the policy.
            config: the model.
            nvml: an open client; None for a model that needs no GPU.
            user: who the engine runs as, and whose files its weights are.
            on_wait: told in a sentence what is being waited for, at least once a second.
            clears: the model ran out of memory before: whatever is idle has to leave its GPUs.
        """
        self._paths = paths
        self._host = host
        self._config = config
        self._nvml = nvml
        self._user = user
        self._on_wait = on_wait
        self._clears = clears
        self._digest = config.digest()
        self._is_guess = False
        self._doors = Doors(paths)
        self._ticket: Ticket | None = None
        self._tries = 0
        self._deadline = time.monotonic() + config.start_timeout_seconds

    def run(self) -> Admitted:
        """Wait until there is room, and make it where policy allows.

        Raises:
            PlacementError: there is none, and waiting would not help, or did not.
            BusyError: there would be if others were not in use.
            NvmlError: the GPUs cannot be seen.
        """
        with ExitStack() as stack:
            stack.enter_context(self._doors)
            while True:
                with waitlist.placement_lock(self._paths):
                    outcome, admitted = self._decide(stack)
                if admitted is not None and isinstance(outcome, Plan):
                    if self._make_room(outcome):
                        return admitted
                    leases.remove(self._paths, self._config.name)
                elif isinstance(outcome, Refusal):
                    self._wait(outcome)

    def _decide(self, stack: ExitStack) -> tuple[Plan | Refusal, Admitted | None]:
        """Plan with what is true at this moment, and write the plan down."""
        held, gpus = survey.look(self._paths, self._read_gpus, but=self._config.name)
        ahead = waitlist.ahead(self._paths, self._ticket)
        scene = survey.scene(self._paths, self._host, held, gpus, ahead, drained=self._doors.drained)
        request = self._request(gpus)
        outcome = placement.plan(request, gpus, scene.claims, scene.residents, self._host)
        if isinstance(outcome, Refusal):
            if self._tries > self._host.eviction.retries and outcome.after_drain is not None:
                if not self._host.eviction.force_when_busy:
                    raise eviction.in_use(request.model, self._users(outcome.after_drain.victims))
                outcome = outcome.after_drain
            elif (outcome.after_drain is None and not outcome.loading) or time.monotonic() > self._deadline:
                raise placement.refusal(request, outcome, scene.holders(gpus, time.time()))
            else:
                self._queue(stack, request, outcome)
                return outcome, None
        lease = self._lease(outcome, request, {holding.lease.port for holding in scene.held})
        leases.write(self._paths, lease)
        return outcome, Admitted(lease, outcome.gpus, self._is_guess)

    def _read_gpus(self) -> Sequence[Gpu]:
        return self._nvml.snapshot() if self._nvml is not None else ()

    def _queue(self, stack: ExitStack, request: Request, refused: Refusal) -> None:
        """Have a ticket, and say on it what this start waits for."""
        if self._ticket is None:
            self._ticket = stack.enter_context(Ticket(self._paths, request.model))
        plan = refused.after_drain
        if plan is not None:
            self._ticket.wish({gpu.uuid: request.needs.get(gpu.uuid, 0) for gpu in plan.gpus}, plan.victims)

    def _wait(self, refused: Refusal) -> None:
        """Let the others get on; from the first retry on, nobody new comes to those who have to go."""
        plan = refused.after_drain
        if plan is None:
            self._on_wait(f"Waiting for {', '.join(refused.loading)}: what will be free then is not known yet.")
            time.sleep(_PAUSE_SECONDS)
            return
        self._tries += 1
        self._doors.open_all_but(plan.victims)
        until = time.monotonic() + self._host.eviction.interval_seconds
        while time.monotonic() < until:
            closed = [self._doors.close(name) for name in plan.victims]  # all of them, whatever the first one says
            if all(closed):
                return
            self._on_wait(
                f"Waiting for {', '.join(self._users(plan.victims))} to finish "
                f"(try {self._tries} of {self._host.eviction.retries})."
            )
            time.sleep(_PAUSE_SECONDS)

    def _make_room(self, plan: Plan) -> bool:
        """Evict the victims; False: one of them came into use or did not go, and the plan is void."""
        if not plan.victims:
            return True
        from gpusvc.systemd.manager import Manager  # noqa: PLC0415  most starts evict nobody

        forced = self._tries > self._host.eviction.retries and self._host.eviction.force_when_busy
        with Manager() as manager:
            for name in plan.victims:
                idle = self._doors.close(name)
                if not idle and not forced:
                    self._tries += 1
                    return False
                try:
                    eviction.evict(
                        self._paths,
                        manager,
                        name,
                        reason=f"room for {self._config.name}",
                        on_wait=self._on_wait,
                        forced=not idle,
                    )
                except UnreleasedError as error:
                    log(4, str(error))
                    return False
        return True

    def _users(self, names: Sequence[str]) -> list[str]:
        return sorted(set(names) - self._doors.drained) or list(names)

    def _request(self, gpus: Sequence[Gpu]) -> Request:
        config = self._config
        return Request(
            model=config.name,
            count=config.gpu.count,
            devices=config.gpu.devices,
            needs=self._needs(gpus),
            exclusive=frozenset(config.exclusive),
            clears=self._clears,
        )

    def _needs(self, gpus: Sequence[Gpu]) -> Mapping[str, int]:
        """The larger of declared and learned; before anything is learned, what the model's own file suggests."""
        config = self._config
        needs = {}
        self._is_guess = config.gpu.vram_bytes is None
        for gpu in gpus:
            learned = footprint.learned(self._paths, config.name, self._digest, gpu.name)
            known = [size for size in (config.gpu.vram_bytes, learned) if size is not None]
            if known:
                needs[gpu.uuid] = max(known)
        if needs or not gpus or not config.gpu.count:
            return needs
        # Only the first start of a model needs these modules.
        from gpusvc.weights.estimate import estimate  # noqa: PLC0415

        with processes.acting_as(self._user.uid, self._user.gid):
            found = estimate(config.command, config.env)
        if found is None:
            return {}
        return {gpu.uuid: found.bytes_on_gpu(gpu.total_bytes, config.gpu.count) for gpu in gpus}

    def _lease(self, plan: Plan, request: Request, leased_ports: set[int]) -> Lease:
        config = self._config
        return Lease(
            model=config.name,
            port=ports.choose(config.name, config.port, leased_ports),
            gpus=tuple(
                LeasedGpu(
                    index=gpu.index,
                    uuid=gpu.uuid,
                    reserved_bytes=request.needs.get(gpu.uuid),
                    baseline_bytes=proof.baseline_bytes(gpu, processes.identify),
                )
                for gpu in plan.gpus
            ),
            created=time.time(),
            config_digest=self._digest,
            stop_timeout_seconds=config.stop_timeout_seconds,
            release_timeout_seconds=config.release_timeout_seconds,
            evicting=plan.victims,
        )
