"""The admission of a start: it gets a plan, and room is made for it.

Decisions are taken one at a time, under a lock, and written down as a lease at once. Evictions and waits happen outside
of the lock, and so does the search for the need, which may read files of other users on slow disks. A start that
has to wait holds a ticket, so that later starts do not take what it waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from gpusvc.errors import UnreleasedError
from gpusvc.linux import memory, processes
from gpusvc.log import log
from gpusvc.placement import eviction, need, occupancy, ports, waitlist
from gpusvc.placement.eviction import Doors
from gpusvc.placement.patience import LastRun, Patience
from gpusvc.placement.plan import NoPlan, memory_as_gpu, plan
from gpusvc.placement.request import HOST_MEMORY, Request, Wish
from gpusvc.placement.search import Plan
from gpusvc.placement.waitlist import Ticket
from gpusvc.record import Record
from gpusvc.release import proof
from gpusvc.state import lease as leases
from gpusvc.state.lease import Lease, LeasedGpu
from gpusvc.state.line import Blocker

if TYPE_CHECKING:
    from gpusvc.config.files import HostConfig, ModelConfig
    from gpusvc.gpu.driver import Driver
    from gpusvc.gpu.reading import Gpu
    from gpusvc.linux.users import User
    from gpusvc.paths import Paths
    from gpusvc.placement.need import Need
    from gpusvc.placement.occupancy import Scene

_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 0.2

# By the GPU's UUID: its type and its bytes, which decide about the need.
_Types = dict[str, tuple[str, "int | None"]]


class Admitted(Record):
    """The lease as it was written, its GPUs as NVML showed them, and whether the need was not declared."""

    lease: Lease
    gpus: tuple[Gpu, ...]
    is_guess: bool


class Admission:
    """The admission of one start."""

    def __init__(
        self,
        paths: Paths,
        host: HostConfig,
        config: ModelConfig,
        driver: Driver | None,
        *,
        user: User,
        on_wait: Callable[[str], None],
        clears: bool = False,
        is_restart: Callable[[], bool] = lambda: False,
        last_run: LastRun | None = None,
        on_victims: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            paths: where leases are.
            host: the policy.
            config: the model.
            driver: the driver; None for a model that needs no GPU.
            user: the engine's user, who may read its files.
            on_wait: called at least once a second with a sentence that says what the start waits for.
            clears: the model ran out of memory before: all idle models have to leave its GPUs.
            is_restart: whether systemd starts the model by itself after a failure.
            last_run: the model's run before this start.
            on_victims: called, maybe again, when models have to leave for this start, which takes some time.
        """
        self._paths = paths
        self._host = host
        self._config = config
        self._driver = driver
        self._user = user
        self._on_wait = on_wait
        self._clears = clears
        self._on_victims = on_victims
        self._digest = config.digest()
        self._doors = Doors(paths)
        self._ticket: Ticket | None = None
        self._patience = Patience(
            paths,
            config.name,
            host.eviction,
            is_restart=is_restart,
            last_run=last_run,
            deadline=time.monotonic() + config.start_timeout_seconds,
        )
        self._scene: Scene | None = None
        self._next_try = 0.0
        self._pause_seconds = _PAUSE_SECONDS
        self._needs: tuple[_Types, Need] | None = None

    def run(self) -> Admitted:
        """Wait until there is room, and make it where policy allows.

        Raises:
            NeverFitsError: this machine never has that much room.
            PlacementError: there is no room, and waiting would not help, or did not.
            BusyError: there would be room if other models were not in use.
            EngineError: the model's port is taken.
            NvmlError: the GPUs cannot be seen.
        """
        with ExitStack() as stack:
            stack.enter_context(self._doors)
            while True:
                self._find_need()
                with waitlist.placement_lock(self._paths):
                    outcome, admitted = self._decide(stack)
                if admitted is not None and isinstance(outcome, Plan):
                    if self._make_room(outcome):
                        return admitted
                    leases.remove(self._paths, self._config.name)
                elif isinstance(outcome, NoPlan):
                    self._wait(outcome)

    def _decide(self, stack: ExitStack) -> tuple[Plan | NoPlan | None, Admitted | None]:
        """Plan by what is true now, and write the plan down as a lease. None: the need was found for other GPUs."""
        occupants, gpus = occupancy.look(self._paths, self._read_gpus, but=self._config.name)
        if self._needs is None or self._needs[0] != _types(gpus):
            self._needs = None
            return None, None
        needs = self._needs[1]
        line = waitlist.ahead(self._paths, self._ticket, self._config.priority)
        scene = occupancy.scene(self._paths, self._host, occupants, gpus, line, drained=self._doors.drained)
        self._scene = scene
        request = _request(self._config, needs, clears=self._clears)
        outcome = self._plan(request, gpus, scene)
        if isinstance(outcome, NoPlan):
            outcome = self._wait_or_refuse(stack, request, outcome, scene, gpus)
        if isinstance(outcome, NoPlan):
            return outcome, None
        lease = self._lease(outcome, request, scene)
        leases.write(self._paths, lease)
        return outcome, Admitted(lease, outcome.gpus, not needs.is_declared)

    def _plan(self, request: Request, gpus: Sequence[Gpu], scene: Scene) -> Plan | NoPlan:
        found = memory.read()
        ram = None if found is None else memory_as_gpu(found)
        chosen = plan(request, gpus, scene.claims, scene.residents, self._host, scene.line, ram)
        if isinstance(chosen, Plan) and not chosen.victims:
            return chosen
        if self._patience.is_modest:
            spared = self._patience.spared(scene.residents)
            return plan(request, gpus, scene.claims, spared, self._host, scene.line, ram)
        return chosen

    def _wait_or_refuse(
        self, stack: ExitStack, request: Request, no_plan: NoPlan, scene: Scene, gpus: Sequence[Gpu]
    ) -> Plan | NoPlan:
        """Return what to wait for, or the plan that evicts busy models by force.

        Raises:
            PlacementError, BusyError: as run().
        """
        from gpusvc.placement import refusal  # noqa: PLC0415  most starts find room

        after_drain = no_plan.after_drain
        if after_drain is not None and self._patience.is_forced:
            return after_drain
        if not no_plan.can_wait:
            raise refusal.refuse(request, no_plan, self._host, scene.holders(gpus, time.time()))
        if self._patience.is_over(for_busy=after_drain is not None or bool(scene.line)):
            if after_drain is not None:
                raise refusal.in_use(request.model, self._users(after_drain.victims))
            if scene.line:
                raise refusal.in_line(request.model, no_plan.behind)
            raise refusal.refuse(request, no_plan, self._host, scene.holders(gpus, time.time()))
        self._queue(stack, request, no_plan)
        return no_plan

    def _read_gpus(self) -> Sequence[Gpu]:
        return self._driver.snapshot() if self._driver is not None else ()

    def _queue(self, stack: ExitStack, request: Request, no_plan: NoPlan) -> None:
        """Take a ticket if there is none yet, and write on it what this start waits for."""
        if self._ticket is None:
            self._ticket = stack.enter_context(Ticket(self._paths, request.model, self._config.priority))
        hoped = no_plan.after_drain or no_plan.in_line
        assert hoped is not None  # noqa: S101  it can wait
        self._ticket.wish(
            Wish(
                request.model,
                {gpu.uuid: request.needs.get(gpu.uuid, 0) for gpu in hoped.gpus}
                | {uuid: size for uuid, size in request.needs.items() if uuid == HOST_MEMORY},
                hoped.victims,
                self._config.priority,
                request.exclusive,
            )
        )

    def _wait(self, no_plan: NoPlan) -> None:
        """Wait for a change. While busy models are in the way, their doors are closed."""
        if no_plan.after_drain is None:
            self._wait_in_line(no_plan.behind)
        else:
            self._wait_for_users(no_plan.after_drain.victims)

    def _wait_in_line(self, behind: Sequence[str]) -> None:
        self._doors.open_all_but(())
        self._tell([] if self._scene is None else self._scene.changing(behind))
        now = time.monotonic()
        if self._scene is not None and self._scene.line and now >= self._next_try:
            self._patience.tries += self._next_try > 0
            self._next_try = now + self._host.eviction.interval_seconds
        time.sleep(self._pause_seconds)
        self._pause_seconds = min(self._pause_seconds * 1.2, _LONGEST_PAUSE_SECONDS)

    def _wait_for_users(self, victims: Sequence[str]) -> None:
        self._on_victims()
        self._pause_seconds = _PAUSE_SECONDS
        self._patience.tries += 1
        self._doors.open_all_but(victims)
        until = time.monotonic() + self._host.eviction.interval_seconds
        is_wanted, tries = self._patience.is_wanted, self._patience.tries
        limit = "" if is_wanted else f"This is try {tries} of {self._host.eviction.retries}."
        # A start that is not wanted may fail. Nobody must have waited for more than one interval for it.
        tell = lambda busy: self._tell([Blocker(name, "in use") for name in sorted(busy)], limit)  # noqa: E731
        self._doors.drain(victims, until, tell, holds=is_wanted or tries % 2 == 1)

    def _tell(self, blockers: Sequence[Blocker], limit: str = "") -> None:
        """Say what the start waits for, to systemd and to everybody who looks at the line."""
        if self._ticket is not None and self._scene is not None:
            waiting = self._ticket.tell(blockers, [wish.model for wish in self._scene.line])
            self._on_wait(f"{waiting.gist()} {limit}".rstrip())

    def _make_room(self, chosen: Plan) -> bool:
        """Evict the victims. Return False if one of them came into use or stayed: then the plan is void."""
        if not chosen.victims:
            return True
        from gpusvc.systemd.manager import Manager  # noqa: PLC0415  most starts evict nobody

        try:
            with Manager() as manager:
                went = eviction.make_room(
                    self._paths,
                    self._host,
                    manager,
                    self._doors,
                    chosen.victims,
                    reason=f"room for {self._config.name}",
                    force=self._patience.is_forced,
                    on_going=self._on_victims,
                    on_wait=self._on_wait,
                )
        except (UnreleasedError, eviction.PinnedError) as error:
            log(4, str(error))
            return False
        self._patience.tries += not went
        return went

    def _users(self, names: Sequence[str]) -> list[str]:
        return sorted(set(names) - self._doors.drained) or list(names)

    def _find_need(self) -> None:
        """Find the need, once for the same GPUs."""
        if self._needs is None:
            # Types and sizes are enough: the lists of processes cost milliseconds, and the driver's lock.
            gpus = self._driver.snapshot(processes=False) if self._driver is not None else ()
            host = memory.read()
            most = None if host is None else max(0, host.total_bytes - self._host.reserve_ram_bytes)
            self._needs = (_types(gpus), need.of(self._paths, self._config, self._digest, self._user, gpus, most))

    def _lease(self, chosen: Plan, request: Request, scene: Scene) -> Lease:
        config = self._config
        leased = {holding.lease.model: holding.lease.port for holding in scene.held}
        leaving = {leased[name] for name in chosen.victims if name in leased}
        return Lease(
            model=config.name,
            port=ports.choose(config.name, config.port, leased=set(leased.values()), leaving=leaving),
            gpus=tuple(
                LeasedGpu(
                    index=gpu.index,
                    uuid=gpu.uuid,
                    reserved_bytes=request.needs.get(gpu.uuid),
                    baseline_bytes=proof.baseline_bytes(gpu, processes.identify),
                )
                for gpu in chosen.gpus
            ),
            created=time.time(),
            config_digest=self._digest,
            stop_timeout_seconds=config.stop_timeout_seconds,
            release_timeout_seconds=config.release_timeout_seconds,
            ram_bytes=request.needs.get(HOST_MEMORY),
            evicting=chosen.victims,
        )


def _request(config: ModelConfig, needs: Need, *, clears: bool) -> Request:
    return Request(
        model=config.name,
        count=config.gpu.count,
        devices=config.gpu.devices,
        needs=needs.bytes,
        declared_ram_bytes=needs.declared_ram_bytes,
        exclusive=frozenset(config.exclusive),
        clears=clears,
    )


def _types(gpus: Sequence[Gpu]) -> _Types:
    return {gpu.uuid: (gpu.name, gpu.total_bytes) for gpu in gpus}
