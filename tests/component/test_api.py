"""The management API over HTTP on a unix socket: the real application, with a service manager that plays its part."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from aiohttp import web

from gpusvc import names
from gpusvc.api.backend import starts as starts_module
from gpusvc.api.backend import streams as streams_module
from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.bus import Bus
from gpusvc.api.backend.journal import QUEUE_LENGTH, Events, Subscription
from gpusvc.api.backend.snapshots import Snapshots
from gpusvc.api.backend.starts import Starts
from gpusvc.api.backend.stops import Stops
from gpusvc.api.backend.streams import Streams
from gpusvc.api.routes.application import application, endpoints
from gpusvc.api.routes.openapi import document
from gpusvc.errors import JobConflictError, NvmlUnavailableError, PermissionDeniedError, UnansweredError
from gpusvc.gpu.driver import Driver
from gpusvc.journal.eventlog import Event
from gpusvc.paths import Paths
from gpusvc.state import demand, use
from gpusvc.state import lease as leases
from gpusvc.state.lease import Lease
from gpusvc.systemd import jobs as systemd_jobs
from gpusvc.systemd.jobs import EndedJob, JobResult, QueuedJob
from gpusvc.systemd.units import ActiveState, ServiceStatus, Unit
from tests.engines import tinygguf

T = TypeVar("T")

DEADLINE_SECONDS = 10.0

ModelAction = Callable[["Systemd", str], None]


class Systemd:
    """A service manager: jobs end when a test says so, and every connection hears of it."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.states: dict[str, str] = {}
        self.subs: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.exit_statuses: dict[str, int] = {}
        self.jobs: dict[str, tuple[str, str]] = {}
        """Those that are queued: verb and path by unit."""
        self.connections: list[Connection] = []
        self.refuses = False
        self.is_away = False
        self.count = 0

    def connect(self) -> Connection:
        if self.is_away:
            raise UnansweredError("Could not reach the service manager: Connection refused.")
        connection = Connection(self)
        self.connections.append(connection)
        return connection

    def unit(self, name: str) -> Unit | None:
        service = names.service(name)
        state = self.states.get(service)
        return None if state is None else Unit(service, ActiveState(state), self.subs.get(service, ""), "/unit")

    def queue(self, verb: str, unit: str, *, replace: bool) -> str:
        if self.refuses:
            raise PermissionDeniedError(f"You may not {verb.lower()} {unit}.")
        self.asked.append((verb, unit))
        queued = self.jobs.get(unit)
        if queued is not None and queued[0] == verb:
            return queued[1]
        if queued is not None and not replace:
            raise JobConflictError(f"Could not {verb.lower()} {unit}: it is destructive.")
        if queued is not None:
            self.end(unit, JobResult.CANCELED)
        self.count += 1
        path = f"/job/{self.count}"
        self.jobs[unit] = (verb, path)
        self.states[unit] = "deactivating" if verb == "Stop" else "activating"
        return path

    def end(self, unit: str, result: JobResult = JobResult.DONE, state: str | None = None) -> None:
        """The job of a unit is over, and its state is what that means."""
        verb, path = self.jobs.pop(unit)
        if state is not None:
            self.states[unit] = state
        elif result is JobResult.DONE:
            self.states[unit] = "inactive" if verb == "Stop" else "active"
        elif result is JobResult.FAILED:
            self.states[unit] = "failed"
        for connection in self.connections:
            connection.tell(EndedJob(path, unit, result))

    def ready(self, name: str) -> None:
        """A start of a model comes to its good end."""
        leases.write(self.paths, Lease(name, 4711, (), time.time(), ready=True, address="127.0.0.1"))
        self.end(names.service(name))

    def stopped(self, name: str, *, released: bool = True) -> None:
        if released:
            leases.remove(self.paths, name)
        self.end(names.service(name))

    def fail(self, name: str, text: str, *, exit_status: int = 1) -> None:
        self.texts[names.service(name)] = text
        self.exit_statuses[names.service(name)] = exit_status
        self.end(names.service(name), JobResult.FAILED)


class Connection:
    """One connection to it; news of jobs make its file readable."""

    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd
        self._news: list[EndedJob] = []
        self._followed: dict[str, tuple[str, str]] = {}
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.is_broken = False

    def tell(self, job: EndedJob) -> None:
        if self._fd >= 0:
            self._news.append(job)
            os.eventfd_write(self._fd, 1)

    def break_(self) -> None:
        """D-Bus was restarted."""
        self.is_broken = True
        os.eventfd_write(self._fd, 1)

    def enqueue(self, verb: str, unit: str, *, replace: bool = True) -> str:
        self._check()
        return self._systemd.queue(verb, unit, replace=replace)

    def reset_failed(self, unit: str) -> None:
        self._systemd.asked.append(("ResetFailed", unit))

    def unit(self, name: str) -> Unit | None:
        return next(iter(self.units(name)), None)

    def units(self, *patterns: str) -> list[Unit]:
        self._check()
        found = [self._systemd.unit(names.of_service(unit) or "") for unit in self._systemd.states]
        return [unit for unit in found if unit is not None and (unit.name in patterns or "model@*.service" in patterns)]

    def service_status(self, unit: Unit) -> ServiceStatus:
        status = self._systemd.exit_statuses.get(unit.name, 0)
        return ServiceStatus(self._systemd.texts.get(unit.name, ""), "success", status, 0.0)

    def listen(self) -> int:
        self._check()
        return self._fd

    def drain(self) -> list[EndedJob]:
        self._check()
        if self._news:
            os.eventfd_read(self._fd)
        news, self._news = self._news, []
        return news

    def follow(self, job: str, verb: str, unit: str) -> None:
        self._followed[job] = (verb, unit)

    def unheard(self) -> list[EndedJob]:
        self._check()
        queued = {path for _, path in self._systemd.jobs.values()}
        ended = [
            EndedJob(path, unit, QueuedJob(verb, unit, 0.0).result_by_state(ActiveState(self._systemd.states[unit])))
            for path, (verb, unit) in self._followed.items()
            if path not in queued
        ]
        for job in ended:
            del self._followed[job.path]
        return ended

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _check(self) -> None:
        if self.is_broken:
            raise UnansweredError("Could not hear from the service manager: Connection reset by peer.")


class Api:
    """The application on a socket, and a client."""

    def __init__(self, systemd: Systemd, backend: Backend, client: aiohttp.ClientSession) -> None:
        self.systemd = systemd
        self.backend = backend
        self.client = client
        self.paths = backend.paths
        self.words: list[str] = []

    def model(self, name: str, text: str = "", *, runs: bool = False) -> None:
        (self.paths.model_file(name)).write_text(f'command = ["/bin/true"]\nuser = "root"\n{text}')
        if runs:
            leases.write(self.paths, Lease(name, 4711, (), time.time(), ready=True, address="127.0.0.1"))
            use.prepare(self.paths, name, os.getegid())
            self.systemd.states[names.service(name)] = "active"

    async def get(self, path: str) -> Any:
        async with self.client.get(f"http://api{path}") as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def post(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.client.post(f"http://api{path}", **options) as response:
            return response.status, await response.json()

    def begin(self, path: str) -> asyncio.Task[tuple[int, Any]]:
        return asyncio.ensure_future(self.post(path))

    async def asked(self, verb: str, name: str) -> None:
        """Until systemd has such a job."""
        await until(lambda: self.systemd.jobs.get(names.service(name), ("",))[0] == verb)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Api]:
    paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "state")
    for made in (paths.models_directory, paths.leases_directory, paths.pin_file("x").parent):
        made.mkdir(parents=True)
    systemd = Systemd(paths)
    words: list[str] = []

    async def read_log(name: str, lines: int, since: float) -> list[str]:
        return words

    def no_driver(_: Paths) -> Driver:
        raise NvmlUnavailableError("There is no driver.")

    snapshots = Snapshots(paths, connect=systemd.connect, open_driver=no_driver)
    bus = Bus(asyncio.get_running_loop(), systemd.connect)
    events, streams = Events(), Streams()
    starts = Starts(paths, bus, read_log, on_change=snapshots.forget, load_seconds=lambda _: 60.0)
    stops = Stops(paths, bus, on_change=snapshots.forget)
    backend = Backend(paths, bus, snapshots, events, starts, stops, streams)
    runner = web.AppRunner(application(backend), access_log=None)
    await runner.setup()
    await web.UnixSite(runner, str(directory / "api.sock")).start()
    connector = aiohttp.UnixConnector(str(directory / "api.sock"))
    try:
        async with aiohttp.ClientSession(connector=connector) as client:
            api = Api(systemd, backend, client)
            api.words = words
            yield api
    finally:
        streams.close()
        await runner.cleanup()
        bus.close()
        await snapshots.close()


@asynccontextmanager
async def serving(api: Api, values: AsyncIterator[Any]) -> AsyncIterator[str]:
    """A route of its own that sends ``values`` as an array; its URL."""

    async def send(request: web.Request) -> web.StreamResponse:
        return await api.backend.streams.send_array(request, values)

    made = web.Application()
    made.router.add_get("/", send)
    runner = web.AppRunner(made, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/"
    finally:
        await runner.cleanup()


async def array_of(api: Api, number: int) -> tuple[int, Any]:
    async def values() -> AsyncIterator[dict[str, int]]:
        for n in range(number):
            yield {"n": n}

    async with serving(api, values()) as url, aiohttp.ClientSession() as client, client.get(url) as response:
        return response.status, await response.json()


@pytest.fixture
def api(tmp_path: Path) -> Callable[[Callable[[Api], Coroutine[Any, Any, None]]], None]:
    """Runs a coroutine with an API of its own."""

    def run(scenario: Callable[[Api], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with asyncio.timeout(30), running(tmp_path) as made:
                await scenario(made)

        asyncio.run(whole())

    return run


Run = Callable[[Callable[[Api], Coroutine[Any, Any, None]]], None]


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    status, value = answer
    return status, value["error"]["code"]


def is_open(api: Api, name: str) -> bool:
    """Whether somebody new could come in."""
    newcomer = use.try_enter(api.paths, name)
    if newcomer is not None:
        newcomer.close()
    return newcomer is not None


# ---- starts ----


def test_a_start_answers_when_the_model_is_ready_and_says_where(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start")
        await api.asked("Start", "qwen")
        api.systemd.ready("qwen")
        where = {"name": "qwen", "state": "ready", "address": "127.0.0.1", "port": 4711}
        assert await start == (200, where)
        assert await api.post("/gpusvc/models/qwen/start?wait=request") == (200, where)

    api(scenario)


def test_one_start_serves_all_who_wait_for_it(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        starts = [api.begin("/gpusvc/models/qwen/start?wait=request") for _ in range(20)]
        await until(lambda: api.backend.starts.starting == {"qwen": 20})
        await api.asked("Start", "qwen")
        api.systemd.ready("qwen")
        assert {(await start)[0] for start in starts} == {200}
        assert [each for each in api.systemd.asked if each[0] == "Start"] == [("Start", "model@qwen.service")]

    api(scenario)


def test_a_start_by_an_alias_is_one_of_its_model(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", 'aliases = ["Qwen/Qwen3-8B"]')
        assert (await api.post("/gpusvc/models/Qwen%2FQwen3-8B/start?wait=no"))[1]["name"] == "qwen"
        await api.asked("Start", "qwen")

    api(scenario)


def test_nobody_starts_what_is_no_model(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        assert code(await api.post("/gpusvc/models/quen/start")) == (404, "unknown_model")
        assert code(await api.post("/gpusvc/models/..%2Fx/start")) == (400, "usage")
        assert api.systemd.asked == []

    api(scenario)


def test_a_start_of_what_stops_waits_for_the_end_and_cancels_nobodys_stop(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        stop = api.begin("/gpusvc/models/qwen/stop")
        await api.asked("Stop", "qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await until(lambda: ("Start", "model@qwen.service") in api.systemd.asked)
        assert api.systemd.jobs["model@qwen.service"][0] == "Stop"
        api.systemd.stopped("qwen")
        await api.asked("Start", "qwen")
        api.systemd.ready("qwen")
        assert (await start)[0] == 200
        await stop

    api(scenario)


def test_systemds_count_of_starts_is_no_limit_to_what_is_swapped_often(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        api.systemd.states["model@qwen.service"] = "inactive"
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        assert api.systemd.asked[0] == ("ResetFailed", "model@qwen.service")
        api.systemd.ready("qwen")
        await start

    api(scenario)


def test_a_failure_says_why_and_what_the_engine_said_last(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        api.words += ["loading", "CUDA error", "It ended badly."]
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.fail("qwen", "It ended badly.")
        status, value = await start
        assert status == 503
        assert value["error"]["message"] == "qwen did not start. It ended badly."
        assert value["error"]["code"] == "start"
        assert value["error"]["log"] == ["loading", "CUDA error"]

    api(scenario)


def test_clients_are_not_shown_the_log_of_a_model_that_keeps_it_to_itself(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", "show_logs = false")
        api.words.append("secret")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.fail("qwen", "It ended.")
        assert "log" not in (await start)[1]["error"]

    api(scenario)


def test_after_a_failure_requests_are_refused_for_a_while_and_a_person_is_not(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.fail("qwen", "It ended badly.")
        await start
        async with api.client.post("http://api/gpusvc/models/qwen/start?wait=request") as response:
            assert response.status == 503
            assert 1 <= int(response.headers["Retry-After"]) <= 10
            error = (await response.json())["error"]
            assert error["code"] == "cooldown"
            assert "It ended badly." in error["message"]
        by_hand = api.begin("/gpusvc/models/qwen/start")
        await api.asked("Start", "qwen")
        joined = api.begin("/gpusvc/models/qwen/start?wait=request")
        await until(lambda: api.backend.starts.starting == {"qwen": 2})
        api.systemd.ready("qwen")
        assert [(await by_hand)[0], (await joined)[0]] == [200, 200]

    api(scenario)


def test_no_room_now_is_no_reason_to_refuse_the_next_request(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        for _ in range(2):
            start = api.begin("/gpusvc/models/qwen/start?wait=request")
            await api.asked("Start", "qwen")
            api.systemd.fail("qwen", "qwen needs 9.0 GiB.", exit_status=75)
            status, value = await start
            assert (status, value["error"]["code"]) == (503, "no_room")
            assert value["error"]["message"] == "qwen did not start. qwen needs 9.0 GiB."

    api(scenario)


def test_the_launcher_sees_a_demand_as_long_as_requests_wait(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        assert demand.is_there(api.paths, "qwen")
        api.systemd.ready("qwen")
        assert (await start)[0] == 200
        assert not demand.is_there(api.paths, "qwen")

    api(scenario)


def test_a_start_by_a_person_is_no_demand_of_requests(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start")
        await api.asked("Start", "qwen")
        assert not demand.is_there(api.paths, "qwen")
        api.systemd.ready("qwen")
        assert (await start)[0] == 200

    api(scenario)


def test_a_client_that_tries_again_after_its_start_was_given_up_finds_it_going_on(
    api: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts_module, "ABANDONED_SECONDS", 0.01)

    async def scenario(api: Api) -> None:
        api.model("qwen")
        first = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        first.cancel()
        await api.asked("Stop", "qwen")
        api.systemd.stopped("qwen")
        second = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        second.cancel()
        await until(lambda: api.backend.starts.starting == {"qwen": 0})
        assert demand.is_there(api.paths, "qwen")
        third = api.begin("/gpusvc/models/qwen/start?wait=request")
        await until(lambda: api.backend.starts.starting == {"qwen": 1})
        api.systemd.ready("qwen")
        assert (await third)[0] == 200
        assert api.systemd.asked.count(("Start", "model@qwen.service")) == 2

    api(scenario)


def test_a_changed_file_ends_the_refusal(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.fail("qwen", "It ended badly.")
        await start
        os.utime(api.paths.model_file("qwen"), (1, 1))
        again = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.ready("qwen")
        assert (await again)[0] == 200

    api(scenario)


def test_a_model_that_was_stopped_meanwhile_did_not_fail(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.queue("Stop", "model@qwen.service", replace=True)
        assert code(await start) == (503, "stopped")
        api.systemd.stopped("qwen")
        again = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.ready("qwen")
        assert (await again)[0] == 200

    api(scenario)


def test_a_start_that_nobody_waits_for_is_given_up(api: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts_module, "ABANDONED_SECONDS", 0.05)

    async def scenario(api: Api) -> None:
        api.model("qwen")
        starts = [api.begin("/gpusvc/models/qwen/start?wait=request") for _ in range(2)]
        await until(lambda: api.backend.starts.starting == {"qwen": 2})
        await api.asked("Start", "qwen")
        starts[0].cancel()
        await until(lambda: api.backend.starts.starting == {"qwen": 1})
        assert api.systemd.jobs["model@qwen.service"][0] == "Start"
        starts[1].cancel()
        await api.asked("Stop", "qwen")
        # Whoever comes now gets a start of his own.
        later = api.begin("/gpusvc/models/qwen/start?wait=request")
        await until(lambda: api.backend.starts.starting == {"qwen": 1})
        api.systemd.stopped("qwen")
        await api.asked("Start", "qwen")
        api.systemd.ready("qwen")
        assert (await later)[0] == 200

    api(scenario)


@pytest.mark.parametrize("how", ["by a person over HTTP", "by somebody else"])
def test_a_start_that_others_want_goes_on(api: Run, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(starts_module, "ABANDONED_SECONDS", 0.01)

    async def scenario(api: Api) -> None:
        api.model("qwen")
        if how == "by somebody else":
            api.systemd.queue("Start", "model@qwen.service", replace=True)
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await until(lambda: api.backend.starts.starting == {"qwen": 1})
        if how == "by a person over HTTP":
            await api.post("/gpusvc/models/qwen/start?wait=no")
        start.cancel()
        await until(lambda: api.backend.starts.starting in ({"qwen": 0}, {}))
        await asyncio.sleep(0.1)  # ten times what it would take
        assert api.systemd.jobs["model@qwen.service"][0] == "Start"

    api(scenario)


def test_a_connection_that_breaks_loses_no_start(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        for connection in api.systemd.connections:
            connection.break_()
        await until(lambda: sum(not each.is_broken for each in api.systemd.connections) == 1)
        api.systemd.ready("qwen")
        assert (await start)[0] == 200
        assert api.systemd.asked.count(("Start", "model@qwen.service")) == 1

    api(scenario)


def test_a_start_whose_end_nobody_could_hear_is_found_by_the_next_connection(
    api: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd_jobs, "LOOK_SECONDS", 0.01)

    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        broken = list(api.systemd.connections)
        api.systemd.connections.clear()  # so that nobody hears of it
        api.systemd.ready("qwen")
        for connection in broken:
            connection.break_()
        assert (await start)[0] == 200
        assert api.systemd.asked.count(("Start", "model@qwen.service")) == 1

    api(scenario)


def test_a_manager_that_stays_away_fails_a_start(api: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd_jobs.Absence, "bear", gives_up)

    async def scenario(api: Api) -> None:
        api.model("qwen")
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.is_away = True
        for connection in api.systemd.connections:
            connection.break_()
        assert code(await start) == (502, "unanswered")

    api(scenario)


def gives_up(_: object, error: Exception) -> None:
    raise error


def test_what_systemd_refuses_is_no_failure_of_the_model(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        api.systemd.refuses = True
        assert code(await api.post("/gpusvc/models/qwen/start?wait=request")) == (403, "permission_denied")
        api.systemd.refuses = False
        start = api.begin("/gpusvc/models/qwen/start?wait=request")
        await api.asked("Start", "qwen")
        api.systemd.ready("qwen")
        assert (await start)[0] == 200

    api(scenario)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (RuntimeError("can't start new thread"), (503, "exhausted")),
        (OSError(errno.EMFILE, "Too many open files"), (503, "exhausted")),
        (RuntimeError("a bug"), (500, "internal")),
    ],
)
def test_what_a_machine_lacks_for_now_is_no_bug(
    api: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, answer: tuple[int, str]
) -> None:
    async def scenario(api: Api) -> None:
        async def fail(_: str) -> None:
            raise error

        api.model("qwen")
        monkeypatch.setattr(api.backend.starts, "start", fail)
        assert code(await api.post("/gpusvc/models/qwen/start")) == answer

    api(scenario)


def test_a_restart_answers_when_the_model_is_ready_again(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        restart = api.begin("/gpusvc/models/qwen/restart")
        await api.asked("Restart", "qwen")
        api.systemd.ready("qwen")
        assert (await restart)[1]["state"] == "ready"

    api(scenario)


def test_a_form_without_a_script_leads_back_to_the_page(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        headers = {"Accept": "text/html,application/xhtml+xml"}
        url = "http://api/gpusvc/models/qwen/start"
        async with api.client.post(url, headers=headers, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, "/")
        await api.asked("Start", "qwen")

    api(scenario)


# ---- ends ----


def test_a_stop_is_done_when_the_vram_is_proven_free(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        stop = api.begin("/gpusvc/models/qwen/stop")
        await api.asked("Stop", "qwen")
        api.systemd.stopped("qwen")
        assert await stop == (200, {"name": "qwen", "state": "stopped", "was_running": True})
        assert (await api.post("/gpusvc/models/qwen/stop"))[1]["was_running"] is False

    api(scenario)


def test_a_stop_without_the_proof_is_an_error(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        stop = api.begin("/gpusvc/models/qwen/stop")
        await api.asked("Stop", "qwen")
        api.systemd.stopped("qwen", released=False)
        assert code(await stop) == (503, "unreleased")
        release = api.begin("/gpusvc/models/qwen/release")
        await until(lambda: "gpusvc-release@qwen.service" in api.systemd.jobs)
        leases.remove(api.paths, "qwen")
        api.systemd.end("gpusvc-release@qwen.service")
        assert (await release)[0] == 200

    api(scenario)


def test_a_stop_is_told_although_the_manager_is_away_when_it_ends(api: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        stop = api.begin("/gpusvc/models/qwen/stop")
        await api.asked("Stop", "qwen")
        unit, away = api.systemd.unit, [UnansweredError("Could not reach the service manager: Connection refused.")]

        def sometimes(name: str) -> Unit | None:
            if away:
                raise away.pop()
            return unit(name)

        monkeypatch.setattr(api.systemd, "unit", sometimes)
        api.systemd.stopped("qwen")
        assert await stop == (200, {"name": "qwen", "state": "stopped", "was_running": True})
        assert not away

    api(scenario)


def test_a_stop_goes_on_when_its_client_goes_away(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        stop = api.begin("/gpusvc/models/qwen/stop")
        await api.asked("Stop", "qwen")
        stop.cancel()
        api.systemd.stopped("qwen")
        await until(lambda: api.systemd.states["model@qwen.service"] == "inactive")
        assert (await api.post("/gpusvc/models/qwen/stop"))[1]["was_running"] is False

    api(scenario)


def test_an_eviction_waits_for_who_uses_the_model_and_keeps_its_door_closed(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        user = use.enter(api.paths, "qwen", timeout_seconds=0)
        evict = api.begin("/gpusvc/models/qwen/evict?wait=20s")
        await until(lambda: not is_open(api, "qwen"))
        assert api.systemd.jobs == {}
        user.close()
        await api.asked("Stop", "qwen")
        assert not is_open(api, "qwen")
        api.systemd.stopped("qwen")
        assert (await evict)[0] == 200
        assert is_open(api, "qwen")

    api(scenario)


def test_a_door_does_not_stay_closed_for_somebody_who_went_away(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        with use.enter(api.paths, "qwen", timeout_seconds=0):
            evict = api.begin("/gpusvc/models/qwen/evict?wait=1h&force=1")
            await until(lambda: not is_open(api, "qwen"))
            evict.cancel()
            await until(lambda: is_open(api, "qwen"))
            assert api.systemd.asked == []

    api(scenario)


def test_a_model_in_use_is_not_evicted_and_its_users_are_named(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        with use.enter(api.paths, "qwen", timeout_seconds=0):
            status, value = await api.post("/gpusvc/models/qwen/evict?wait=0")
            assert (status, value["error"]["code"]) == (409, "in_use")
            assert f"(PID {os.getpid()})" in value["error"]["message"]
            assert api.systemd.asked == []
            forced = api.begin("/gpusvc/models/qwen/evict?wait=0&force=1")
            await api.asked("Stop", "qwen")
            api.systemd.stopped("qwen")
            assert (await forced)[0] == 200

    api(scenario)


def test_a_pinned_model_is_not_evicted_until_it_is_unpinned(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        assert await api.post("/gpusvc/models/qwen/pin") == (200, {"name": "qwen", "pinned": True})
        assert code(await api.post("/gpusvc/models/qwen/evict?force=1")) == (409, "pinned")
        assert (await api.get("/gpusvc/models/qwen"))["pinned"] is True
        assert (await api.post("/gpusvc/models/qwen/unpin"))[0] == 200
        assert (await api.get("/gpusvc/models/qwen"))["pinned"] is False

    api(scenario)


def test_a_client_says_how_long_a_model_stays(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", 'idle_timeout = "10m"', runs=True)
        for idle, seconds in (("90s", 90), ("never", 0), ("default", 600)):
            assert await api.post(f"/gpusvc/models/qwen/keep?idle={idle}") == (200, {"name": "qwen", "idle": idle})
            assert (await api.get("/gpusvc/models/qwen"))["idle_timeout_seconds"] == seconds
        assert (await api.post("/gpusvc/models/qwen/keep?idle=soon"))[0] == 400
        api.model("cold")
        assert code(await api.post("/gpusvc/models/cold/keep?idle=never")) == (409, "not_running")

    api(scenario)


def test_models_say_what_they_can_do(api: Run, tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        file = tmp_path / "m.gguf"
        tinygguf.write(file)
        api.model("qwen")
        api.paths.model_file("tiny").write_text(f'engine = "llama-server"\nmodel = "{file}"\n')
        (found,) = await api.get("/gpusvc/weights")
        assert (found["name"], found["architecture"], found["capabilities"]) == ("tiny", "llama", ["completion"])
        assert await api.get("/gpusvc/weights") == [found]
        file.write_bytes(b"words")
        assert await api.get("/gpusvc/weights") == []

    api(scenario)


def test_a_pin_of_the_models_file_stays(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", "pinned = true")
        assert code(await api.post("/gpusvc/models/qwen/unpin")) == (409, "pinned_by_file")

    api(scenario)


# ---- what there is ----


def test_all_models_are_listed_those_that_are_stopped_too(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("calm")
        api.model("qwen", runs=True)
        found = await api.get("/gpusvc/models")
        assert [(model["name"], model["state"]) for model in found] == [("calm", "stopped"), ("qwen", "ready")]
        assert found[1]["in_use"] is False

    api(scenario)


def test_a_machine_without_a_driver_has_no_gpus(api: Run) -> None:
    async def scenario(api: Api) -> None:
        assert await api.get("/gpusvc/gpus") == []
        assert isinstance(api.backend.snapshots.problem, NvmlUnavailableError)

    api(scenario)


def test_the_configuration_in_effect_has_its_sources(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", "priority = 3")
        rows = {row["key"]: row for row in await api.get("/gpusvc/config/qwen")}
        assert rows["priority"] == {"key": "priority", "value": "3", "source": str(api.paths.model_file("qwen"))}
        assert await api.get("/gpusvc/config")

    api(scenario)


def test_tools_that_know_llama_swap_find_their_way(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        proxy = "http://127.0.0.1:4711"
        assert await api.get("/running") == {"running": [{"model": "qwen", "state": "ready", "proxy": proxy}]}
        unload = asyncio.ensure_future(api.client.post("http://api/unload"))
        await api.asked("Stop", "qwen")
        api.systemd.stopped("qwen")
        response = await unload
        assert (response.status, await response.text()) == (200, "OK")

    api(scenario)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_any_page_can_send_unloads_nothing(api: Run, method: str) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        async with api.client.request(method, "http://api/unload") as response:
            assert response.status == 405
            if method == "GET":
                assert "POST /unload" in (await response.json())["error"]["hint"]
        assert api.systemd.asked == []

    api(scenario)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_array_is_sent_as_it_is_read(api: Run, number: int) -> None:
    async def scenario(api: Api) -> None:
        assert await array_of(api, number) == (200, [{"n": n} for n in range(number)])

    api(scenario)


def test_a_client_that_does_not_read_an_array_holds_little_of_it(api: Run) -> None:
    async def scenario(api: Api) -> None:
        made = 0

        async def values() -> AsyncIterator[str]:
            nonlocal made
            while made < 10_000:
                made += 1
                yield "x" * 10_000

        async with serving(api, values()) as url, aiohttp.ClientSession() as client, client.get(url) as response:
            assert await response.content.readexactly(2) == b'["'
            # The sockets' buffers are full once no more is made.
            before = -1
            while before != made:
                before = made
                await asyncio.sleep(0.05)
            assert made * 10_000 < 20_000_000

    api(scenario)


def test_an_array_that_breaks_off_has_no_clean_end(api: Run) -> None:
    async def scenario(api: Api) -> None:
        async def values() -> AsyncIterator[int]:
            yield 1
            raise PermissionDeniedError("The journal cannot be read.")

        async with serving(api, values()) as url, aiohttp.ClientSession() as client, client.get(url) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()

    api(scenario)


@pytest.mark.parametrize("body", ["", "[]", '"qwen"', '{"model": 1}', "[" * 10_000])
def test_localais_shutdown_wants_a_name(api: Run, body: str) -> None:
    async def scenario(api: Api) -> None:
        assert code(await api.post("/backend/shutdown", data=body)) == (400, "usage")

    api(scenario)


def test_localais_shutdown_stops_a_model(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen", runs=True)
        done = asyncio.ensure_future(api.post("/backend/shutdown", json={"model": "qwen"}))
        await api.asked("Stop", "qwen")
        api.systemd.stopped("qwen")
        assert await done == (200, {})

    api(scenario)


# ---- errors and limits ----


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("DELETE", "/gpusvc/models", 405), ("POST", "/gpusvc/models/qwen/start?wait=yes", 400)],
)
def test_every_error_has_one_form(api: Run, method: str, path: str, status: int) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        async with api.client.request(method, f"http://api{path}") as response:
            assert response.status == status
            assert set((await response.json())["error"]) == {"message", "hint", "type", "code"}

    api(scenario)


def test_a_long_body_is_not_read(api: Run) -> None:
    async def scenario(api: Api) -> None:
        async with api.client.post("http://api/backend/shutdown", data=b"x" * 70_000) as response:
            assert response.status == 413

    api(scenario)


def test_one_request_that_breaks_takes_no_other_along(
    api: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("gpusvc.api.routes.machine.effective", broken)

    async def scenario(api: Api) -> None:
        async with api.client.get("http://api/gpusvc/config") as response:
            assert response.status == 500
            assert "a bug" not in await response.text()
        assert await api.get("/gpusvc/gpus") == []

    api(scenario)
    assert "a bug" in capsys.readouterr().err


# ---- events ----


def event(cursor: int, kind: str = "ready", model: str = "qwen", **more: Any) -> Event:
    return Event(kind, 1_700_000_000.0 + cursor, "It happened.", f"s=0;i={cursor}", model, **more)


def test_events_are_streamed_to_all_who_follow(api: Run) -> None:
    async def scenario(api: Api) -> None:
        api.model("qwen")
        followers = [await api.client.get("http://api/gpusvc/events?lines=0&model=qwen") for _ in range(2)]
        await until(lambda: len(api.backend.events._subscriptions) == 2)
        api.backend.events._take(event(1, model="other"))
        api.backend.events._take(event(2))
        for follower in followers:
            assert follower.headers["Content-Type"] == "text/event-stream"
            text = b""
            while b"data:" not in text:
                text += await follower.content.readuntil(b"\n\n")
            fields = dict(line.split(": ", 1) for line in text.decode().splitlines() if ": " in line and line[0] != ":")
            assert (fields["event"], fields["id"]) == ("ready", "s=0;i=2")
            assert json.loads(fields["data"])["model"] == "qwen"
            follower.close()

    api(scenario)


def test_only_so_many_follow(api: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "MAX_FOLLOWERS", 1)

    async def scenario(api: Api) -> None:
        first = await api.client.get("http://api/gpusvc/events?lines=0")
        async with api.client.get("http://api/gpusvc/events?lines=0") as second:
            assert second.status == 503
            assert "Retry-After" in second.headers
        first.close()

    api(scenario)


def test_who_does_not_read_is_dropped(api: Run) -> None:
    async def scenario(api: Api) -> None:
        slow = Subscription()
        for number in range(QUEUE_LENGTH + 10):
            slow.put(event(number))
        got = [await slow.next() for _ in range(QUEUE_LENGTH + 1)]
        assert got[-1] is None
        assert all(got[:-1])

    api(scenario)


@pytest.mark.parametrize("lines", ["-1", "x", "1e9", "99999999999", "٣"])
def test_a_number_of_lines_is_a_number(api: Run, lines: str) -> None:
    async def scenario(api: Api) -> None:
        async with api.client.get("http://api/gpusvc/events", params={"lines": lines}) as response:
            assert response.status == 400

    api(scenario)


def test_events_are_counted_by_a_few_reasons() -> None:
    events = Events()
    for each in [
        event(1, "start"),
        event(4, "ready"),
        event(5, "idle", reason="qwen was not used for 15min"),
        event(6, "evict", reason="qwen was not used for 15min"),
        event(7, "evict", reason="room for llama"),
        event(8, "evict", reason="an operator wants it"),
        event(9, "fail", reason="EngineError"),
        event(10, "evict", reason="something that nobody knows"),
    ]:
        events._take(each)
    assert dict(events.seen) == {
        ("start", "", "qwen"): 1,
        ("ready", "", "qwen"): 1,
        ("idle", "", "qwen"): 1,
        ("evict", "idle", "qwen"): 1,
        ("evict", "room", "qwen"): 1,
        ("evict", "operator", "qwen"): 1,
        ("fail", "EngineError", "qwen"): 1,
        ("evict", "", "qwen"): 1,
    }
    assert (events.loads["qwen"].count, events.loads["qwen"].last_seconds) == (1, 3.0)


# ---- the document ----


def test_every_route_is_in_the_openapi_document(api: Run) -> None:
    async def scenario(api: Api) -> None:
        told = await api.get("/gpusvc/openapi.json")
        assert told == document(endpoints(api.backend))
        documented = {(method.upper(), path) for path, item in told["paths"].items() for method in item}
        routes = {
            (route.method, route.resource.canonical)
            for route in application(api.backend).router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
        assert documented == routes
        operations = [operation for item in told["paths"].values() for operation in item.values()]
        assert all(operation["summary"] for operation in operations)
        identifiers = [operation["operationId"] for operation in operations]
        assert len(set(identifiers)) == len(identifiers)

    api(scenario)


def test_every_route_is_in_the_man_page(api: Run) -> None:
    text = (Path(__file__).parents[2] / "docs/man/gpusvc-api.service.8").read_text().replace("\\", "")

    async def scenario(api: Api) -> None:
        for endpoint in endpoints(api.backend):
            path = endpoint.path.replace("{name}", "NAME").replace("{file}", "FILE")
            assert re.search(rf"{endpoint.method} {re.escape(path)}\b" if path != "/" else 'GET /"', text), path

    api(scenario)
