"""How long a start waits for room, and which models it may evict for that.

There are three kinds of starts. A start on request waits as long as requests wait. A start by an operator waits for
busy models ``retries`` times ``interval``. A restart by systemd that no request waits for evicts no model that is in
use or was used later than its own, and none at all if its last run was never ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gpusvc.placement.request import Resident
from gpusvc.record import Record, replace
from gpusvc.state import demand

if TYPE_CHECKING:
    from gpusvc.config.host import HostEviction
    from gpusvc.paths import Paths

# An API that is being replaced is back within this time, and requests then wait on.
_ABSENT_SECONDS = 15.0


class LastRun(Record):
    """The run of the model before this start. Times are in seconds since the epoch; None: unknown."""

    was_ready: bool = False
    last_use: float | None = None


class Patience:
    """The patience of one start."""

    def __init__(
        self,
        paths: Paths,
        name: str,
        policy: HostEviction,
        *,
        is_restart: Callable[[], bool] = lambda: False,
        last_run: LastRun | None = None,
        deadline: float,
    ) -> None:
        """
        Args:
            paths: where the demand of requests is.
            name: the model.
            policy: the host's ``[eviction]``.
            is_restart: whether systemd starts the model by itself after a failure; asked once, when it matters.
            last_run: the run before.
            deadline: until when, by time.monotonic(), a start that no request waits for waits for models that load.
        """
        self._paths = paths
        self._name = name
        self._policy = policy
        self._ask_is_restart = is_restart
        self._is_restart: bool | None = None
        self._last_run = last_run or LastRun()
        self._deadline = deadline
        self._wanted_at: float | None = None
        self.tries = 0
        """How many times busy models were waited for, ``interval`` each."""

    @property
    def is_wanted(self) -> bool:
        """Whether requests wait for this start."""
        now = time.monotonic()
        if demand.is_there(self._paths, self._name):
            self._wanted_at = now
        return self._wanted_at is not None and now - self._wanted_at < _ABSENT_SECONDS

    @property
    def is_forced(self) -> bool:
        """Whether busy models are evicted now, although they are in use."""
        return self.tries > self._policy.retries and self._policy.force_when_busy

    @property
    def is_modest(self) -> bool:
        """Whether this is a restart by systemd that no request waits for."""
        if self.is_wanted:
            return False
        if self._is_restart is None:
            self._is_restart = self._ask_is_restart()
        return self._is_restart

    def is_over(self, *, for_busy: bool) -> bool:
        """Return whether the start gives up; ``for_busy``: it waits for busy models, or in line behind such starts."""
        if self.is_wanted:
            return False
        if for_busy:
            return self.tries > self._policy.retries or self.is_modest
        return time.monotonic() > self._deadline

    def spared(self, residents: Sequence[Resident]) -> list[Resident]:
        """Return ``residents`` as a restart sees them: the models that it may not evict are spared."""
        run = self._last_run
        return [
            resident
            if run.was_ready and run.last_use is not None and not resident.busy and resident.last_use <= run.last_use
            else replace(resident, spared=True)
            for resident in residents
        ]
