"""How the requests of one worker get into the models: at once if the model is ready, else after a wait.

Every request that is relayed has a Passage. While it is open the model is in use, and is not evicted. An Activation
belongs to one event loop; workers share only the kernel's locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from gpusvc.config.host import HostGateway
from gpusvc.config.serving import Serving
from gpusvc.errors import GpusvcError
from gpusvc.gateway.activation.engine import EngineFinder
from gpusvc.gateway.activation.entrance import Entrance
from gpusvc.gateway.activation.fair_slots import FairSlots
from gpusvc.gateway.activation.line import Line
from gpusvc.gateway.activation.passage import Onlooker, Passage
from gpusvc.gateway.activation.slots import OwnSlots, SharedSlots, Slots
from gpusvc.gateway.activation.starter import Starter
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.state.line import Shown
from gpusvc.state.turnstile import Turnstile

__all__ = ["Activation", "Passage"]


class Activation:
    """The entrances of all models."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        paths: Paths,
        api: Path,
        settings: Callable[[], HostGateway],
    ) -> None:
        """
        Args:
            loop: only its thread may use this object.
            paths: of leases, locks and slots.
            api: the socket of the API, which starts models.
            settings: returns the current settings. ``workers`` is read when a model's first slot is taken.
        """
        self._loop = loop
        self._paths = paths
        self._settings = settings
        self._starter = Starter(api)
        self._line = Line(paths)
        self._entrances: dict[str, Entrance] = {}

    def try_enter(self, serving: Serving) -> Passage | None:
        """Get into the model without waiting; None: await enter().

        It succeeds if the model is ready, its door is open, one of its slots is free, and no request waits.
        """
        entrance = self._entrances.get(serving.name) or self._entrance(serving.name)
        return entrance.try_enter(serving)

    async def enter(
        self,
        serving: Serving,
        *,
        on_wait: Callable[[str], None] | None = None,
        knows: Shown = lambda _: True,
    ) -> Passage:
        """Get into the model; wait at the door, for the start, for a slot, and behind earlier requests.

        Cancelling removes this request from the queue. When the last one is removed, the start is abandoned.

        Args:
            serving: the model.
            on_wait: called with a sentence that says what the request waits for: at the beginning, when that changes,
                and every few seconds. Called from the loop, and never after this method has returned.
            knows: the models that the client may know of. A sentence only counts the others.

        Raises:
            HttpError: 503, too many wait for the model, it did not start (with the reason and the engine's last
                lines), or its cooldown after that is not over; 404, its file is gone; 409, its start was called off;
                429, too many wait for a slot; 504, ``activation_timeout`` is over.
        """
        settings = self._settings()
        return await self._entrance(serving.name).enter(
            serving,
            on_wait,
            knows=knows,
            max_waiting=settings.max_waiting,
            timeout_seconds=settings.activation_timeout_seconds,
        )

    def look_at(self, serving: Serving) -> Onlooker | None:
        """Return access to the engine without using the model; None: the model is not ready."""
        engine = self._entrance(serving.name).find()
        return None if engine is None else Onlooker(serving, engine)

    def suspect(self, serving: Serving) -> None:
        """Note that the engine refused or lost a connection: check it before the next request is sent there.

        If it does answer, that costs the next request one connection to it.
        """
        self._entrance(serving.name).suspect()

    def close(self) -> None:
        """Fail all waiting requests (HttpError 503), and end all uses of models."""
        for entrance in self._entrances.values():
            entrance.close()

    def _entrance(self, name: str) -> Entrance:
        entrance = self._entrances.get(name)
        if entrance is None:
            entrance = self._entrances[name] = Entrance(
                self._loop,
                name,
                turnstile=Turnstile(self._paths, name),
                finder=EngineFinder(self._paths, name),
                starter=self._starter,
                slots=FairSlots(lambda: self._make_slots(name)),
                line=self._line,
            )
        return entrance

    def _make_slots(self, name: str) -> Slots:
        if self._settings().workers == 1:
            return OwnSlots()
        try:
            return SharedSlots(self._paths, name)
        except GpusvcError as error:
            log(4, f"The concurrency of {name} is counted by each worker for itself: {error}")
            return OwnSlots()
