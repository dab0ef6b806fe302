"""A daemon's line to systemd: there when it is needed, and there again after D-Bus was restarted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from gpusvc.errors import GpusvcError, PermissionDeniedError, SystemdError
from gpusvc.log import log

if TYPE_CHECKING:
    from gpusvc.systemd.manager import Unit

# How long the same complaint is not repeated.
_SILENCE_SECONDS = 300.0

_T = TypeVar("_T")


class ServiceManager(Protocol):
    """What of systemd.Manager is used here."""

    def enqueue(self, verb: str, unit: str) -> str: ...

    def units(self, *patterns: str) -> list[Unit]: ...

    def close(self) -> None: ...


class Connection:
    """At most one connection at a time. What fails is complained of in the journal, and has no answer."""

    def __init__(
        self,
        connect: Callable[[], ServiceManager],
        *,
        now: Callable[[], float],
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_answer`` is called after each question, any of which may take as long as D-Bus lets it (25 s)."""
        self._connect = connect
        self._now = now
        self._on_answer = on_answer
        self._manager: ServiceManager | None = None
        self._complaints: dict[str, float] = {}

    def ask(self, question: Callable[[ServiceManager], _T]) -> _T | None:
        """None: there is no answer. One that fails on an old connection is asked again on a new one."""
        for is_last in (self._manager is None, True):
            try:
                if self._manager is None:
                    self._manager = self._connect()
                return question(self._manager)
            except PermissionDeniedError as error:
                self.complain(error)
                return None
            except SystemdError as error:
                self.close()
                if is_last:
                    self.complain(error)
                    return None
            finally:
                self._on_answer()
        return None

    def states(self, units: Sequence[str]) -> dict[str, str] | None:
        """The ActiveState of each of ``units``, ``inactive`` if it is not loaded; None: there is no answer."""
        found = self.ask(lambda manager: manager.units(*units))
        if found is None:
            return None
        return dict.fromkeys(units, "inactive") | {unit.name: str(unit.active) for unit in found}

    def complain(self, error: GpusvcError) -> None:
        """Tell the journal, but not the same thing all the time."""
        now = self._now()
        self._complaints = {text: until for text, until in self._complaints.items() if until > now}
        if str(error) not in self._complaints:
            self._complaints[str(error)] = now + _SILENCE_SECONDS
            log(4, str(error))

    def close(self) -> None:
        """Until the next question."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None
