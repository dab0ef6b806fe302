"""The line to the service manager while nobody is at its other end. The bus is played: that moment cannot be kept."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gpusvc.errors import SystemdError, UnansweredError
from gpusvc.systemd import jobs
from gpusvc.systemd import manager as systemd
from gpusvc.systemd.bus import DBusBaseError
from gpusvc.systemd.jobs import EndedJob, JobResult
from gpusvc.systemd.manager import Manager

SERVICE = "model@qwen.service"
JOB = "/org/freedesktop/systemd1/job/7"

AWAY = errno.ETIMEDOUT  # what libsystemd makes of "Message recipient disconnected from message bus without replying"


class Bus:
    """What of pystemd's DBus is used; ``fails`` are the errors of the next calls, one after the other."""

    def __init__(self) -> None:
        self.fails: list[int | None] = []
        self.is_subscribed = False
        self.called: list[str] = []
        self.active = b"active"
        self.has_job = True
        self.news: list[tuple[bytes, ...] | None] = []
        self.during_callback: Callable[[bool], object] = lambda _: None
        self._fd = os.eventfd(0)
        self._on_signal: Callable[..., None] | None = None

    def open(self) -> None:
        pass

    def close(self) -> None:
        os.close(self._fd)

    def get_fd(self) -> int:
        return self._fd

    def match_signal(
        self, sender: bytes, path: bytes, interface: bytes, member: bytes, heard: Callable[..., None]
    ) -> None:
        self._on_signal = heard

    def process(self) -> Any:
        """As libsystemd: one message a call. None of it: there is one that it keeps to itself."""
        body = self.news.pop(0) if self.news else None
        if body is not None:
            assert self._on_signal is not None
            try:
                self._on_signal(SimpleNamespace(body=body, process_reply=self.during_callback))
            except BaseException as error:
                raise SystemError("returned a result with an exception set") from error
        return SimpleNamespace(is_empty=lambda: body is None)

    def call_method(self, name: bytes, path: bytes, interface: bytes, method: bytes, arguments: object) -> Any:
        if method == b"Subscribe":
            self._subscribe()
        else:
            self._called(method.decode())
        unit = (SERVICE.encode(), b"", b"loaded", self.active, b"", b"", b"/unit", 0, b"", b"/")
        return SimpleNamespace(
            body={"ListUnitsByPatterns": [unit], "Subscribe": None}.get(method.decode(), JOB.encode())
        )

    def get_property(self, name: bytes, path: bytes, interface: bytes, member: bytes, signature: bytes) -> bytes:
        self._called(member.decode())
        if not self.has_job:
            raise error(errno.EBADR)
        return b"running"

    def _subscribe(self) -> None:
        """As systemd does: once for each connection. The answer may be lost all the same."""
        if self.is_subscribed:
            self.called.append("Subscribe")
            raise already_subscribed()
        self.is_subscribed = True
        self._called("Subscribe")

    def _called(self, what: str) -> None:
        self.called.append(what)
        if self.fails:
            raise error(self.fails.pop(0))


def already_subscribed() -> Exception:
    raised: Exception = DBusBaseError(
        -errno.EIO, b"org.freedesktop.systemd1.AlreadySubscribed", b"Client is already subscribed."
    )
    return raised


def error(code: int | None) -> Exception:
    raised: Exception = DBusBaseError(
        code and -code, b"", b"Message recipient disconnected from message bus without replying"
    )
    return raised


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    played = Bus()
    monkeypatch.setattr(systemd, "DBus", lambda: played)
    monkeypatch.setattr(systemd, "is_user_instance", lambda: False)
    monkeypatch.setattr(jobs, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.01)
    yield played
    played.close()


def manager(*, patience_seconds: float = 60.0) -> Manager:
    return Manager(patience_seconds=patience_seconds)


def test_a_manager_that_is_away_is_asked_again(bus: Bus) -> None:
    bus.fails = [AWAY] * 3
    assert [unit.name for unit in manager().units(SERVICE)] == [SERVICE]
    assert bus.called == ["ListUnitsByPatterns"] * 4


def test_one_that_stays_away_is_not_asked_for_ever(bus: Bus) -> None:
    bus.fails = [AWAY] * 9
    with pytest.raises(UnansweredError, match=r"^Could not list units: Message recipient disconnected"):
        manager(patience_seconds=0).units(SERVICE)
    assert len(bus.called) == 1


@pytest.mark.parametrize("code", [errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE])
def test_a_connection_that_is_gone_does_not_come_back(bus: Bus, code: int) -> None:
    bus.fails = [code]
    with pytest.raises(UnansweredError):
        manager().units(SERVICE)


def test_a_subscription_whose_answer_was_lost_holds(bus: Bus) -> None:
    bus.fails = [AWAY]
    one = manager()
    assert one.enqueue("Start", SERVICE) == JOB
    assert one.enqueue("Stop", SERVICE) == JOB
    assert bus.called == ["Subscribe", "Subscribe", "StartUnit", "StopUnit"]


def test_a_subscription_that_failed_is_made_again(bus: Bus) -> None:
    bus.fails = [AWAY]
    one = manager(patience_seconds=0)
    with pytest.raises(UnansweredError):
        one.enqueue("Start", SERVICE)
    assert one.enqueue("Start", SERVICE) == JOB
    assert bus.called == ["Subscribe", "Subscribe", "StartUnit"]


def test_a_refusal_is_an_answer(bus: Bus) -> None:
    bus.fails = [errno.ERFKILL]
    with pytest.raises(SystemdError) as raised:
        manager().units(SERVICE)
    assert not isinstance(raised.value, UnansweredError)


def test_what_does_harm_when_it_is_heard_twice_is_said_once(bus: Bus) -> None:
    bus.fails = [AWAY]
    with pytest.raises(UnansweredError):
        manager().kill(SERVICE, 2)
    assert bus.called == ["KillUnit"]


@pytest.mark.parametrize(
    ("verb", "active", "result"),
    [
        ("Start", b"active", JobResult.DONE),
        ("Start", b"failed", JobResult.FAILED),
        ("Start", b"activating", JobResult.FAILED),
        ("Start", b"inactive", JobResult.CANCELED),
        ("Restart", b"active", JobResult.DONE),
        ("Stop", b"inactive", JobResult.DONE),
        ("Stop", b"active", JobResult.FAILED),
    ],
)
def test_a_job_that_ended_unheard_is_known_by_what_came_of_it(
    bus: Bus, verb: str, active: bytes, result: JobResult
) -> None:
    asked = manager()
    job = asked.enqueue(verb, SERVICE)
    bus.has_job, bus.active = False, active
    assert asked.wait(job, 60) is result


def test_a_job_whose_connection_was_lost_is_followed_by_the_next(bus: Bus) -> None:
    job = manager().enqueue("Start", SERVICE)
    asked = manager()
    asked.follow(job, "Start", SERVICE)
    while "State" not in bus.called:
        assert asked.unheard() == []  # it goes on
    bus.has_job = False
    while not (ended := asked.unheard()):
        pass
    assert ended == [EndedJob(JOB, SERVICE, JobResult.DONE)]


def test_a_job_that_is_there_goes_on_and_is_heard_of(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = manager()
    job = asked.enqueue("Start", SERVICE)
    assert asked.wait(job, 0.1) is None
    assert "State" in bus.called
    bus.news = [(b"7", JOB.encode(), SERVICE.encode(), b"canceled")]
    monkeypatch.setattr(bus, "has_job", False)
    assert asked.wait(job, 60) is JobResult.CANCELED


def test_news_that_come_with_the_answer_count(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = manager()
    job = asked.enqueue("Start", SERVICE)
    bus.has_job = False
    list_units = bus.call_method

    def answer(*arguments: Any) -> Any:
        bus.news = [(b"7", JOB.encode(), SERVICE.encode(), b"timeout")]
        return list_units(*arguments)

    monkeypatch.setattr(bus, "call_method", answer)
    assert asked.wait(job, 60) is JobResult.TIMEOUT


@pytest.mark.parametrize("code", [errno.EINTR, None], ids=["EINTR", "as pystemd 0.11 has it"])
def test_a_call_that_a_signal_cut_off_is_made_again(bus: Bus, code: int | None) -> None:
    bus.fails = [code]
    assert [unit.name for unit in manager(patience_seconds=0).units(SERVICE)] == [SERVICE]


def test_news_behind_what_libsystemd_keeps_to_itself_are_heard(bus: Bus) -> None:
    asked = manager()
    asked.listen()
    ended = (b"7", JOB.encode(), SERVICE.encode(), b"done")
    bus.news = [None, ended]
    assert [(job.path, job.result) for job in asked.drain()] == [(JOB, JobResult.DONE)]


class _ArrivedError(BaseException):
    pass


def test_a_signal_whose_handler_raises_waits_until_the_callback_is_over(bus: Bus) -> None:
    def raises(*_: object) -> None:
        raise _ArrivedError

    asked = manager()
    job = asked.enqueue("Start", SERVICE)
    bus.news = [(b"7", JOB.encode(), SERVICE.encode(), b"done")]
    bus.during_callback = lambda _: signal.raise_signal(signal.SIGUSR1)  # to this thread
    before = signal.signal(signal.SIGUSR1, raises)
    try:
        with pytest.raises(_ArrivedError):
            asked.wait(job, 60)
        assert asked.wait(job, 60) is JobResult.DONE
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_while_the_manager_is_away_a_job_is_neither_done_nor_failed(bus: Bus) -> None:
    asked = manager()
    job = asked.enqueue("Start", SERVICE)
    bus.fails = [AWAY] * 1000
    assert asked.wait(job, 0.05) is None
