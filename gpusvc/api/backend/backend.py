"""What all handlers of the API share.

A module of routes has one function: ``endpoints(backend) -> list[Endpoint]``, or ``routes(backend) ->
list[web.RouteDef]``. Either way the first line of a handler's docstring is its summary in the OpenAPI document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.state import lease as leases
from gpusvc.status import inventory

if TYPE_CHECKING:
    from gpusvc.api.backend.bus import Bus
    from gpusvc.api.backend.journal import Events
    from gpusvc.api.backend.snapshots import Snapshots
    from gpusvc.api.backend.starts import Starts
    from gpusvc.api.backend.stops import Stops
    from gpusvc.api.backend.streams import Streams
    from gpusvc.paths import Paths


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts of one running API. Use them only in the loop's thread.

    - ``await snapshots.models()``: list[ModelStatus] with standing, of all models, sorted by name.
    - ``await snapshots.gpus()``: list[GpuStatus]; empty on a machine without GPUs. ``snapshots.problem``: why
      NVML did not answer last, as an error, or None. All requests within a second share one reading.
    - ``events.seen``: Counter of (kind, reason, model) since the API was started; reasons are a few fixed words.
    - ``events.loads``: model → Loads(count, total_seconds, last_seconds), from start to ready.
    - ``await events.last(20)``: list[eventlog.Event], the newest last.
    - ``starts``: starts and restarts. ``stops``: stops, evictions and release proofs.
    """

    paths: Paths
    bus: Bus
    snapshots: Snapshots
    events: Events
    starts: Starts
    stops: Stops
    streams: Streams

    def resolve(self, text: str, *, configured: bool = False) -> str:
        """Return the model that ``text`` names, by name or alias. ``configured``: only a model with a file.

        Raises:
            UnknownModelError, UsageError: there is no such model.
            SystemdError: systemd does not answer.
        """
        also = () if configured else [*leases.holders(self.paths), *self._running()]
        return inventory.resolve(self.paths, text, also=also)

    def _running(self) -> list[str]:
        units = self.bus.ask(lambda manager: manager.units("model@*.service"))
        return [name for name in (names.of_service(unit.name) for unit in units) if name is not None]
