"""One connection to the service manager for a daemon: made when it is needed, and made anew after D-Bus restarted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from gpusvc.errors import GpusvcError, PermissionDeniedError, SystemdError, UnansweredError
from gpusvc.log import log

if TYPE_CHECKING:
    from gpusvc.systemd.units import Unit

# The same complaint is logged once in this time.
_SILENCE_SECONDS = 300.0


class Closable(Protocol):
    """A manager that a connection can close."""

    def close(self) -> None: ...


class ServiceManager(Closable, Protocol):
    """What the watchdog uses of Manager."""

    def enqueue(self, verb: str, unit: str) -> str: ...

    def unit(self, name: str) -> Unit | None: ...

    def units(self, *patterns: str) -> list[Unit]: ...


_M = TypeVar("_M", bound=Closable)
_T = TypeVar("_T")


class Connection(Generic[_M]):
    """At most one connection at a time. A broken connection is replaced by the next question."""

    def __init__(self, connect: Callable[[], _M]) -> None:
        self._connect = connect
        self._manager: _M | None = None

    def ask(self, question: Callable[[_M], _T]) -> _T:
        """Return the answer to ``question``, which is asked again if an existing connection turns out to be broken.

        Raises:
            UnansweredError: nobody answered on a new connection either.
            SystemdError, PermissionDeniedError: the manager refuses.
        """
        for is_last in (self._manager is None, True):
            try:
                return question(self.manager())
            except UnansweredError:
                self.close()
                if is_last:
                    raise
        raise AssertionError

    def manager(self) -> _M:
        """Return the manager at the other end; this connects if there is no connection."""
        if self._manager is None:
            self._manager = self._connect()
            self.connected(self._manager)
        return self._manager

    def connected(self, manager: _M) -> None:
        """Called with each new connection."""

    def close(self) -> None:
        """Close the connection until the next question."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            manager.close()


class LoggingConnection(Connection[ServiceManager]):
    """A connection that logs an error and returns None where Connection raises."""

    def __init__(
        self,
        connect: Callable[[], ServiceManager],
        *,
        now: Callable[[], float],
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_answer`` is called after each question. A question may take as long as D-Bus allows, 25 s."""
        super().__init__(connect)
        self._now = now
        self._on_answer = on_answer
        self._complaints: dict[str, float] = {}

    def try_ask(self, question: Callable[[ServiceManager], _T]) -> _T | None:
        """Return the answer to ``question``; None if there is none, which is logged."""
        try:
            return self.ask(question)
        except (SystemdError, PermissionDeniedError) as error:
            self.complain(error)
            return None
        finally:
            self._on_answer()

    def states(self, units: Sequence[str]) -> dict[str, str] | None:
        """Return the ActiveState of each of ``units``, ``inactive`` for one that is not loaded; None: no answer."""
        found = self.try_ask(lambda manager: manager.units(*units))
        if found is None:
            return None
        return dict.fromkeys(units, "inactive") | {unit.name: str(unit.active) for unit in found}

    def complain(self, error: GpusvcError) -> None:
        """Log ``error``, but not the same sentence again within five minutes."""
        now = self._now()
        self._complaints = {text: until for text, until in self._complaints.items() if until > now}
        if str(error) not in self._complaints:
            self._complaints[str(error)] = now + _SILENCE_SECONDS
            log(4, str(error))
