"""The way into the models for the requests of one worker: at once where a model is ready, else after a wait.

Every request that is relayed has a Passage: for as long as it is open the model is in use, and not evicted. One
Activation belongs to one event loop; workers share nothing but the kernel's locks.
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
    """All models, by name."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        paths: Paths,
        api: Path,
        settings: Callable[[], HostGateway],
    ) -> None:
        """
        Args:
            loop: whose thread alone may use this.
            paths: where leases, locks and slots are.
            api: the API's socket, where models are started.
            settings: ``max_waiting`` and ``activation_timeout`` as they are now; ``workers`` counts when a model's
                first slot is taken.
        """
        self._loop = loop
        self._paths = paths
        self._settings = settings
        self._starter = Starter(api)
        self._line = Line(paths)
        self._entrances: dict[str, Entrance] = {}

    def try_enter(self, serving: Serving) -> Passage | None:
        """Come in without waiting; None: that is not possible now, and enter() is to be awaited.

        The model is ready, its door open, a slot of its ``concurrency`` free, and nobody waits who came before.
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
        """Come in, and wait for that where need be: at the door, for the start, for a slot, behind whoever came before.

        Cancelling it takes this request out of the line; with the last one out, a start is abandoned.

        Args:
            serving: the model.
            on_wait: told in a sentence what is being waited for: at the beginning, when that changes, and every few
                seconds. Called from the loop, never after this has returned.
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
        """A way to the engine that does not use the model; None: the model is not ready."""
        engine = self._entrance(serving.name).find()
        return None if engine is None else Onlooker(serving, engine)

    def suspect(self, serving: Serving) -> None:
        """Its port refused, or the connection to it died: ask anew before anybody is sent there.

        Where it turns out that it answers after all, this costs the next request one connection to it.
        """
        self._entrance(serving.name).suspect()

    def close(self) -> None:
        """Have nobody wait any more (HttpError 503), and nobody inside."""
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
