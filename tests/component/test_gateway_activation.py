"""The way into a model: real locks and lease files, and an API that is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import uvloop

from gpusvc import files as statefile
from gpusvc.config.host import HostGateway
from gpusvc.config.serving import Serving
from gpusvc.gateway.activation import loading, starter
from gpusvc.gateway.activation.activation import Activation, Passage
from gpusvc.gateway.activation.slots import SharedSlots
from gpusvc.gateway.http.replies import HttpError
from gpusvc.paths import Paths
from gpusvc.state import lease as leases
from gpusvc.state import use
from gpusvc.state.drain import Drain
from gpusvc.state.lease import Lease
from gpusvc.state.line import Blocker, Notice
from tests.component.conftest import ROOT

QWEN = Serving("qwen")

READY = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{}"

_TAKE_SLOT = """
import sys
from pathlib import Path
from gpusvc.gateway.activation.slots import SharedSlots
from gpusvc.paths import Paths
slots = SharedSlots(Paths(*map(Path, sys.argv[1:])), "qwen")
print(slots.take(1), flush=True)
sys.stdin.read()
"""


def failed(status: int = 503, retry_after: str = "", **error: object) -> bytes:
    """What the API answers where a start failed."""
    body = json.dumps({"error": {"message": "qwen did not start.", **error}}).encode()
    head = f"HTTP/1.0 {status} Whatever\r\nContent-Length: {len(body)}\r\n"
    return (head + (f"Retry-After: {retry_after}\r\n" if retry_after else "")).encode() + b"\r\n" + body


@dataclass
class Api:
    """Takes starts, and answers each as ``behave`` says; None: the connection ends without an answer."""

    socket: Path
    behave: Callable[[], Awaitable[bytes | None]]
    asked: list[bytes] = field(default_factory=list)
    open: int = 0
    abandoned: int = 0
    _server: asyncio.Server | None = None

    async def serve(self) -> None:
        self._server = await asyncio.start_unix_server(self._take, self.socket)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.partition(b"\r\n")[0])
        answer = asyncio.ensure_future(self.behave())
        gone = asyncio.ensure_future(reader.read())
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        self.abandoned += not answer.done()
        if answer.done():
            writer.write(await answer or b"")
        for task in (answer, gone):
            task.cancel()
        await asyncio.wait([answer, gone])
        self.open -= 1
        writer.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await until(lambda: not self.open)


@dataclass
class World:
    """Models on a machine, and a worker of the gateway on it."""

    paths: Paths
    api: Api
    settings: HostGateway = field(default_factory=HostGateway)

    def __post_init__(self) -> None:
        self.activation = self.worker()

    def worker(self) -> Activation:
        return Activation(asyncio.get_running_loop(), self.paths, self.api.socket, lambda: self.settings)

    def prepare(self, name: str = "qwen") -> None:
        use.prepare(self.paths, name, os.getegid())

    def ready(self, name: str = "qwen", *, port: int = 1234) -> None:
        self.prepare(name)
        leases.write(self.paths, Lease(name, port, (), time.time(), ready=True, address="127.0.0.1"))

    def loading(self, name: str = "qwen") -> None:
        self.prepare(name)
        leases.write(self.paths, Lease(name, 1234, (), time.time()))

    def gone(self, name: str = "qwen") -> None:
        leases.remove(self.paths, name)

    def in_use(self, name: str = "qwen") -> bool | None:
        return use.is_used(self.paths, name)

    def enter(self, serving: Serving = QWEN, *, on_wait: Callable[[str], None] | None = None) -> asyncio.Task[Passage]:
        return asyncio.create_task(self.activation.enter(serving, on_wait=on_wait))

    def is_shut(self, serving: Serving = QWEN) -> bool:
        """Whether nobody comes in at once; what was seen last may be some milliseconds old."""
        passage = self.activation.try_enter(serving)
        if passage is not None:
            passage.close()
        return passage is None

    async def starts(self, port: int = 1234) -> bytes:
        """As an API behaves whose model starts at once."""
        self.ready(port=port)
        return READY


async def until(condition: Callable[[], object], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        await asyncio.sleep(0)


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def refused(waiting: Awaitable[Passage]) -> HttpError:
    with pytest.raises(HttpError) as caught:
        await waiting
    return caught.value


@contextlib.asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[World]:
    paths = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "state")
    api = Api(tmp_path / "api.sock", never)
    await api.serve()
    made = World(paths, api)
    yield made
    made.activation.close()
    await until(lambda: len(asyncio.all_tasks()) == 1 + api.open)
    await api.close()


Scene = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Scene], None]:
    """Runs one scene, which leaves no task and no complaint of the loop."""

    async def played(scene: Scene) -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(60), world(tmp_path) as stage:
            await scene(stage)
        assert complaints == []

    def run(scene: Scene) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(played(scene))

    return run


Play = Callable[[Scene], None]


# --- A model that is ready


def test_a_ready_model_lets_requests_in_at_once_and_is_used_until_the_last_has_left(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready(port=4321)
        first, second = world.activation.try_enter(QWEN), world.activation.try_enter(QWEN)
        assert first is not None
        assert second is not None
        assert (first.address, first.port, first.serving) == ("127.0.0.1", 4321, QWEN)
        first.touch()
        first.close()
        first.close()
        assert world.in_use()
        second.close()
        assert not world.in_use()
        assert world.api.asked == []

    play(scene)


def test_a_model_that_is_not_ready_is_not_used_by_a_glance_at_it(play: Play) -> None:
    async def scene(world: World) -> None:
        assert world.activation.try_enter(QWEN) is None
        world.loading()
        assert world.activation.try_enter(QWEN) is None
        world.gone()
        assert world.activation.try_enter(QWEN) is None
        assert not world.in_use()

    play(scene)


def test_the_next_run_is_found_at_its_own_port(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready(port=1)
        (await world.enter()).close()
        world.gone()
        await until(world.is_shut)
        world.ready(port=2)
        with contextlib.closing(await world.enter()) as passage:
            assert passage.port == 2

    play(scene)


def test_a_lease_that_makes_no_sense_is_nobodys_address(play: Play) -> None:
    async def scene(world: World) -> None:
        world.prepare()
        world.paths.lease_file("qwen").write_text('{"version": 1, "ready": true}')
        assert world.activation.try_enter(QWEN) is None

    play(scene)


def test_a_lease_that_could_not_be_read_for_a_moment_is_read_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_: Path) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def scene(world: World) -> None:
        world.ready()
        with monkeypatch.context() as patch:
            patch.setattr(statefile, "read", exhausted)
            assert world.activation.try_enter(QWEN) is None
        (await world.enter()).close()
        assert world.api.asked == []

    play(scene)


# --- A model that has to start


def test_there_is_one_start_for_all_and_they_go_in_as_they_came(play: Play) -> None:
    async def scene(world: World) -> None:
        order: list[asyncio.Task[Passage]] = []
        answer = asyncio.get_running_loop().create_future()
        world.api.behave = lambda: answer
        waiting = [world.enter() for _ in range(20)]
        for task in waiting:
            task.add_done_callback(order.append)
        await until(lambda: world.api.asked)
        answer.set_result(await world.starts())
        passages = await asyncio.gather(*waiting)
        assert order == waiting
        assert world.api.asked == [b"POST /gpusvc/models/qwen/start?wait=request HTTP/1.0"]
        for passage in passages:
            passage.close()
        assert not world.in_use()

    play(scene)


def test_whoever_waits_for_a_model_is_inside_before_it_is_ready(play: Play) -> None:
    """So that it is not evicted before they were served, though it was never started before."""

    async def scene(world: World) -> None:
        answer = asyncio.get_running_loop().create_future()
        world.api.behave = lambda: answer
        waiting = [world.enter() for _ in range(3)]
        await until(lambda: world.api.asked)
        world.loading()
        await until(world.in_use)
        waiting.append(world.enter())
        await asyncio.sleep(0)  # it joins the queue, and passes the door, before that is closed
        answer.set_result(await world.starts())
        with Drain(world.paths, "qwen") as drain:
            assert not drain.wait_idle()
            for passage in await asyncio.gather(*waiting):
                assert not drain.wait_idle()
                passage.close()
            assert drain.wait_idle()

    play(scene)


def test_a_model_that_somebody_else_has_started_is_entered_too(play: Play) -> None:
    async def scene(world: World) -> None:
        waiting = world.enter()
        await until(lambda: world.api.asked)
        world.ready()
        (await waiting).close()

    play(scene)


def test_a_model_that_is_gone_again_before_anybody_came_in_is_started_again(play: Play) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return READY if len(world.api.asked) < 3 else await world.starts()

        world.api.behave = behave
        (await world.enter()).close()
        assert len(world.api.asked) == 3

    play(scene)


def test_a_model_that_never_stays_is_given_up(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_FIRST_DISAPPOINTMENT_SECONDS", 0.0)

    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return READY

        world.api.behave = behave
        refusal = await refused(world.enter())
        assert refusal.status == 503
        assert "ended at once" in str(refusal)

    play(scene)


# --- Failures


def test_a_failed_start_is_told_to_everybody_with_the_engines_last_lines(play: Play) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return failed(503, "20", hint="Look there.", type="t", code="c", log=["loading", "CUDA error"])

        world.api.behave = behave
        world.prepare()
        for refusal in await asyncio.gather(*(refused(world.enter()) for _ in range(3))):
            assert refusal.status == 503
            assert refusal.message == "qwen did not start. The last lines of its log:\nloading\nCUDA error"
            assert (refusal.hint, refusal.kind, refusal.code) == ("Look there.", "t", "c")
            assert refusal.retry_after_seconds == 20
        assert not world.in_use()

    play(scene)


def test_last_lines_are_not_shown_where_the_model_says_so(play: Play) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return failed(log=["a secret"])

        world.api.behave = behave
        refusal = await refused(world.enter(QWEN.replace(show_logs=False)))
        assert str(refusal) == "qwen did not start."

    play(scene)


def test_a_failure_is_not_asked_for_again_by_each_of_a_crowd(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return failed(retry_after="10")

        world.api.behave = behave
        for _ in range(10):
            assert (await refused(world.enter())).retry_after_seconds == 10
        assert len(world.api.asked) < 10
        world.ready()
        (await world.enter()).close()  # somebody started it by hand

    monkeypatch.setattr(loading, "_FAILURE_SECONDS", 60)
    play(scene)


def test_after_a_failure_the_next_request_tries_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return failed() if len(world.api.asked) < 2 else await world.starts()

        world.api.behave = behave
        await refused(world.enter())
        (await world.enter()).close()

    monkeypatch.setattr(loading, "_FAILURE_SECONDS", 0)
    play(scene)


def test_a_stop_during_a_start_is_no_failure_of_the_next_one(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return failed(code="stopped") if len(world.api.asked) < 2 else await world.starts()

        world.api.behave = behave
        assert (await refused(world.enter())).code == "stopped"
        (await world.enter()).close()

    monkeypatch.setattr(loading, "_FAILURE_SECONDS", 60)
    play(scene)


@pytest.mark.parametrize(("status", "shown"), [(404, 404), (409, 409), (504, 504), (403, 503), (418, 503)])
def test_what_is_the_gateways_own_matter_is_no_answer_to_a_client(play: Play, status: int, shown: int) -> None:
    """404: the model's file is gone; 409: an operator called the start off."""

    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return failed(status)

        world.api.behave = behave
        assert (await refused(world.enter())).status == shown

    play(scene)


def test_an_answer_that_is_no_error_of_ours_is_still_an_error(play: Play) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes:
            return b"HTTP/1.1 500 Internal Server Error\r\nRetry-After: soon\r\n\r\noops"

        world.api.behave = behave
        refusal = await refused(world.enter())
        assert (refusal.status, refusal.message) == (500, "qwen did not start: the API answered 500.")

    play(scene)


def test_an_api_that_is_not_there_is_named(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        await world.api.close()
        world.api.socket.unlink()
        refusal = await refused(world.enter())
        assert refusal.status == 503
        assert "api.sock does not answer (No such file or directory)" in str(refusal)
        assert refusal.retry_after_seconds

    monkeypatch.setattr(starter, "_FIRST_PAUSE_SECONDS", 0.0)
    play(scene)


@pytest.mark.parametrize(
    "torn", [None, b"", b"HTTP/1.0 200", b"HTTP/1.0 503 No\r\nContent-Length: 9\r\n\r\n{", b"\r\n\r\n"]
)
def test_an_api_that_is_restarted_is_asked_again(
    play: Play, monkeypatch: pytest.MonkeyPatch, torn: bytes | None
) -> None:
    async def scene(world: World) -> None:
        async def behave() -> bytes | None:
            return torn if len(world.api.asked) < 3 else await world.starts()

        world.api.behave = behave
        (await world.enter()).close()

    monkeypatch.setattr(starter, "_FIRST_PAUSE_SECONDS", 0.0)
    play(scene)


def test_locks_that_cannot_be_taken_are_named(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready()
        door = world.paths.lease_directory("qwen") / "door"
        door.unlink()
        door.symlink_to("use")
        assert world.activation.try_enter(QWEN) is None
        refusal = await refused(world.enter())
        assert refusal.status == 503
        assert "door cannot be opened" in str(refusal)

    play(scene)


# --- Doors


def test_behind_a_closed_door_requests_wait_in_order_and_start_nothing(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready()
        said: list[str] = []
        order: list[asyncio.Task[Passage]] = []
        with Drain(world.paths, "qwen") as drain:
            assert drain.wait_idle()
            waiting = [world.enter(on_wait=said.append) for _ in range(5)]
            for task in waiting:
                task.add_done_callback(order.append)
            await until(lambda: len(said) == 5)
            assert world.activation.try_enter(QWEN) is None
        for passage in await asyncio.gather(*waiting):
            passage.close()
        assert order == waiting
        assert set(said) == {"Waiting until qwen is evicted, or stays."}
        assert world.api.asked == []

    play(scene)


def test_a_swapped_model_is_started_again_for_whoever_waited_at_its_door(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready(port=1)
        world.api.behave = lambda: world.starts(port=2)
        with Drain(world.paths, "qwen") as drain:
            assert drain.wait_idle()
            said: list[str] = []
            waiting = world.enter(on_wait=said.append)
            await until(lambda: said)
            world.gone()
        with contextlib.closing(await waiting) as passage:
            assert passage.port == 2

    play(scene)


def test_while_an_evictor_waits_those_inside_finish_and_newcomers_do_not_pass(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready()
        inside = await world.enter()
        with Drain(world.paths, "qwen") as drain:
            assert drain.close_door()

            await until(world.is_shut)
            waiting = world.enter()
            assert not drain.wait_idle()
            inside.close()
            await until(drain.wait_idle)
            assert not waiting.done()
        (await waiting).close()

    play(scene)


# --- Those who give up


def test_the_last_one_to_give_up_abandons_the_start(play: Play) -> None:
    async def scene(world: World) -> None:
        world.loading()
        waiting = [world.enter() for _ in range(3)]
        await until(lambda: world.api.open)
        for task in waiting[:2]:
            task.cancel()
        await asyncio.wait(waiting[:2])
        assert world.in_use()
        assert world.api.open == 1
        waiting[2].cancel()
        await asyncio.wait(waiting)
        assert not world.in_use()
        await until(lambda: world.api.abandoned)
        assert len(world.api.asked) == 1

    play(scene)


def test_whoever_comes_after_an_abandoned_start_has_his_own(play: Play) -> None:
    async def scene(world: World) -> None:
        world.loading()
        first = world.enter()
        await until(lambda: world.api.open)
        first.cancel()
        second = world.enter()
        await until(lambda: len(world.api.asked) == 2)
        world.ready()
        (await second).close()

    play(scene)


def test_whoever_goes_in_the_moment_of_being_served_leaves_nothing_behind(play: Play) -> None:
    async def scene(world: World) -> None:
        limited = QWEN.replace(concurrency=1)
        world.ready()
        inside = await world.enter(limited)
        waiting = [world.enter(limited) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        inside.close()  # the first is served now, and does not know it yet
        waiting[0].cancel()
        with contextlib.closing(await waiting[1]):
            assert waiting[0].cancelled()
        assert not world.in_use()

    play(scene)


def test_whoever_went_is_passed_over_when_the_others_are_served(play: Play) -> None:
    async def scene(world: World) -> None:
        limited = QWEN.replace(concurrency=1)
        world.ready()
        inside = await world.enter(limited)
        waiting = [world.enter(limited) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting[0].cancel()
        inside.close()
        (await waiting[1]).close()
        assert not world.in_use()

    play(scene)


def test_a_wait_is_over_with_its_timeout(play: Play) -> None:
    async def scene(world: World) -> None:
        world.settings = world.settings.replace(activation_timeout_seconds=0.05)
        world.loading()
        refusal = await refused(world.enter())
        assert refusal.status == 504
        assert "waited for qwen to load" in str(refusal)
        assert not world.in_use()
        await until(lambda: world.api.abandoned)

    play(scene)


def test_no_more_wait_than_may(play: Play) -> None:
    async def scene(world: World) -> None:
        world.settings = world.settings.replace(max_waiting=2)
        waiting = [world.enter() for _ in range(3)]
        refusal = await refused(waiting[2])
        assert refusal.status == 503
        assert refusal.retry_after_seconds
        assert len(asyncio.all_tasks()) > 2
        world.ready()
        for passage in await asyncio.gather(*waiting[:2]):
            passage.close()

    play(scene)


def test_who_waits_at_a_door_is_told_for_whom_it_is_closed(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready()
        notice = Notice(world.paths, "1-coder", "coder", 1, 0)
        notice.tell([Blocker("qwen", "in use")], [])
        said: list[str] = []
        with Drain(world.paths, "qwen") as drain:
            assert drain.wait_idle()
            waiting = world.enter(on_wait=said.append)
            await until(lambda: said)
        (await waiting).close()
        notice.close()
        assert re.fullmatch(
            r"Waiting until qwen is evicted, or stays\. coder has waited \w+ for qwen \(in use\)\. It is next\.",
            said[0],
        )

    play(scene)


def test_who_waits_is_told_when_that_changes(play: Play) -> None:
    async def scene(world: World) -> None:
        limited = QWEN.replace(concurrency=1)
        said: list[str] = []
        world.loading()
        first, second = world.enter(limited), world.enter(limited, on_wait=said.append)
        await until(lambda: said)
        world.ready()
        with contextlib.closing(await first):
            await until(lambda: len(said) == 2)
        (await second).close()
        assert said == ["Waiting for qwen to load.", "Waiting for one of the other requests of qwen to end."]

    play(scene)


def test_the_end_of_the_gateway_is_told_and_lets_go_of_everything(play: Play) -> None:
    async def scene(world: World) -> None:
        world.ready()
        inside = await world.enter()
        waiting = world.enter(Serving("llama"))
        await until(lambda: world.api.open)
        world.activation.close()
        assert (await refused(waiting)).status == 503
        inside.close()
        assert not world.in_use()
        assert world.activation.try_enter(QWEN) is None
        assert (await refused(world.enter())).status == 503

    play(scene)


# --- Engines that do not answer


def test_a_dead_engine_is_started_again_though_its_lease_is_there(play: Play) -> None:
    async def scene(world: World) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        world.ready(port=port)
        (await world.enter()).close()
        world.activation.suspect(QWEN)
        assert world.activation.try_enter(QWEN) is None

        async def behave() -> bytes:
            return READY if len(world.api.asked) < 2 else await world.starts(port=4321)  # it learns of it with delay

        world.api.behave = behave
        with contextlib.closing(await world.enter()) as passage:
            assert passage.port == 4321

    play(scene)


def test_an_engine_that_answers_is_trusted_again_without_asking(play: Play) -> None:
    async def scene(world: World) -> None:
        with socket.create_server(("127.0.0.1", 0)) as engine:
            world.ready(port=engine.getsockname()[1])
            world.activation.suspect(QWEN)
            (await world.enter()).close()
            with contextlib.closing(await world.enter()):
                assert world.api.asked == []

    play(scene)


# --- Slots


def test_a_model_has_as_many_requests_at_a_time_as_it_may(play: Play) -> None:
    async def scene(world: World) -> None:
        limited = QWEN.replace(concurrency=2)
        world.settings = world.settings.replace(max_waiting=3)
        world.ready()
        first, second = await world.enter(limited), await world.enter(limited)
        assert world.activation.try_enter(limited) is None
        waiting = [world.enter(limited) for _ in range(4)]
        refusal = await refused(waiting[3])
        assert refusal.status == 429
        assert refusal.retry_after_seconds
        second.close()
        third = await waiting[0]
        assert not waiting[1].done()
        first.close()
        third.close()
        for task in waiting[1:3]:
            (await task).close()
        assert world.api.asked == []

    play(scene)


def test_whoever_waits_for_a_slot_is_inside(play: Play) -> None:
    """A model that was loaded for ten requests serves ten requests, one at a time, before it is evicted."""

    async def scene(world: World) -> None:
        limited = QWEN.replace(concurrency=1)
        world.api.behave = world.starts
        waiting = [world.enter(limited) for _ in range(10)]
        served = 0
        passage = await waiting[0]
        with Drain(world.paths, "qwen") as drain:
            assert drain.close_door()
            for task in waiting[1:]:
                assert not drain.wait_idle()
                passage.close()
                passage = await task
                served += 1
            passage.close()
            assert drain.wait_idle()
        assert served == 9

    play(scene)


def test_slots_are_those_of_all_workers_and_each_worker_gets_a_turn(play: Play) -> None:
    async def scene(world: World) -> None:
        limited = QWEN.replace(concurrency=1)
        world.settings = world.settings.replace(workers=2)
        world.ready()
        here, there = world.activation, world.worker()
        inside = await here.enter(limited)
        assert there.try_enter(limited) is None
        greedy = [asyncio.create_task(here.enter(limited)) for _ in range(50)]
        modest = asyncio.create_task(there.enter(limited))
        await until(lambda: SharedSlots(world.paths, "qwen").is_wished())
        served = 0
        inside.close()
        while not modest.done():
            done, _ = await asyncio.wait([modest, *greedy[served:]], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {modest}:
                (await task).close()
                served += 1
        (await modest).close()
        for task in greedy[served:]:
            (await task).close()
        there.close()
        assert served < 50

    play(scene)


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[SharedSlots]:
    slots = SharedSlots(Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "state"), "qwen")
    yield slots
    slots.close()


def test_a_killed_worker_leaves_its_slots_free(slots: SharedSlots, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TAKE_SLOT, *(str(tmp_path / name) for name in ("etc", "run", "state"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "0\n"
        assert slots.take(1) is None
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert slots.take(1) == 0


def test_slots_are_given_once(slots: SharedSlots) -> None:
    taken = [slots.take(3) for _ in range(4)]
    assert taken == [0, 1, 2, None]
    slots.give(1)
    assert slots.take(3) == 1
    assert slots.take(2) is None  # the limit was lowered meanwhile
    assert not slots.is_wished()


def test_nothing_is_left_open_by_requests_that_come_and_go(play: Play) -> None:
    async def scene(world: World) -> None:
        limited = QWEN.replace(concurrency=1)
        world.settings = world.settings.replace(workers=2)

        def files() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        async def behave() -> bytes:
            await until(lambda: getattr(leases.read(world.paths, "qwen"), "ready", False))
            return READY

        async def cycle() -> None:
            world.loading()
            waiting = [world.enter(limited) for _ in range(4)]
            await until(lambda: world.api.open)
            waiting[1].cancel()
            world.ready()
            (await waiting[0]).close()
            waiting[2].cancel()
            (await waiting[3]).close()
            world.gone()
            await until(lambda: world.is_shut(limited))
            await until(lambda: not world.api.open)

        world.api.behave = behave
        await cycle()
        before = files()
        for _ in range(5):
            await cycle()
        await until(lambda: files() <= before)
        assert not world.in_use()

    play(scene)
