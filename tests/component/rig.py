"""A gateway in this process, between raw clients and scripted engines; its locks, leases and files are real."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gpusvc.config import keys
from gpusvc.config.host import HostGateway
from gpusvc.config.keys import Keys
from gpusvc.gateway.activation.activation import Activation
from gpusvc.gateway.entry.catalog import Catalog
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.process.gateway import Gateway
from gpusvc.gateway.relay.client import Client as Connected
from gpusvc.gateway.relay.shared import Shared
from gpusvc.paths import Paths
from gpusvc.record import replace
from gpusvc.state import counters, use
from gpusvc.state import lease as leases
from gpusvc.state.counters import Answers, Counters, Totals
from gpusvc.state.lease import Lease
from tests.component.upstream import Upstream

DEADLINE_SECONDS = 10.0

# Who has not taken anything for so long is waiting for something else.
_STUCK_SECONDS = 0.3

# What the sockets between two ends hold at most, with some room.
IN_SOCKETS_BYTES = 60_000_000

# What takes minutes otherwise.
QUICK = Limits(sweep_seconds=0.02)

Scenario = Callable[["Rig"], Coroutine[Any, Any, None]]


@dataclass
class Answer:
    """What a client got. Names of ``fields`` are in lower case."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes = b""
    trailers: list[tuple[str, str]] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.fields)


class Client:
    """A connection to the gateway, on which anything can be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, *data: bytes) -> None:
        """Send each piece by itself."""
        for piece in data:
            self.writer.write(piece)
            await self.writer.drain()

    async def say_until_stuck(self, data: bytes) -> int:
        """Send it again and again, until nobody takes it any more; how many bytes were taken."""
        sent = 0
        while True:
            try:
                async with asyncio.timeout(_STUCK_SECONDS):
                    await self.say(data)
            except TimeoutError:
                return sent
            sent += len(data)

    async def post(
        self, body: bytes, target: str = "/v1/chat/completions", more: str = "", version: str = "1.1"
    ) -> None:
        """Ask without waiting for the answer."""
        head = f"POST {target} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        await self.say(f"{head}Content-Length: {len(body)}\r\n{more}\r\n".encode() + body)

    async def ask(
        self, body: bytes = b'{"model": "qwen"}', target: str = "/v1/chat/completions", more: str = ""
    ) -> Answer:
        await self.post(body, target, more)
        return await self.answer()

    async def get(self, target: str, more: str = "", method: str = "GET") -> Answer:
        await self.say(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode())
        return await self.answer(is_head=method == "HEAD")

    async def head(self) -> Answer:
        """The head of an answer; its body is still to be read."""
        block = (await self._in_time(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1")
        first, *lines = block.rstrip("\r\n").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        return Answer(int(first.split(" ")[1]), _fields(lines))

    async def answer(self, *, is_head: bool = False) -> Answer:
        """A whole answer that is not an interim one; raises IncompleteReadError if it is not whole."""
        answer = await self.head()
        while answer.status in (100, 102, 103):
            answer = await self.head()
        if is_head or answer.status in (204, 304):
            return answer
        if "transfer-encoding" in answer.headers:
            assert answer.headers["transfer-encoding"] == "chunked"
            assert "content-length" not in answer.headers
            while piece := await self.chunk():
                answer.body += piece
            while line := (await self._in_time(self.reader.readuntil(b"\r\n")))[:-2]:
                answer.trailers += _fields([line.decode()])
        elif "content-length" in answer.headers:
            answer.body = await self._in_time(self.reader.readexactly(int(answer.headers["content-length"])))
        else:
            answer.body = await self._in_time(self.reader.read())
        return answer

    async def chunk(self) -> bytes:
        """The payload of the next chunk; empty: it was the last one, and what follows are trailers."""
        size = int(await self._in_time(self.reader.readuntil(b"\r\n")), 16)
        if not size:
            return b""
        data = await self._in_time(self.reader.readexactly(size + 2))
        return data[:-2]

    async def read(self, size: int) -> bytes:
        return await self._in_time(self.reader.readexactly(size))

    async def rest(self) -> bytes:
        """All until the connection ends; raises ConnectionResetError if it is broken off."""
        return await self._in_time(self.reader.read())

    async def hangs_up(self) -> bool:
        """Whether the connection ends, one way or the other, and nothing more comes."""
        try:
            return await self.rest() == b""
        except ConnectionResetError:
            return True

    def stop_reading(self) -> None:
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]

    def go_on_reading(self) -> None:
        self.writer.transport.resume_reading()  # type: ignore[attr-defined]

    def reset(self) -> None:
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()

    async def _in_time(self, step: Coroutine[Any, Any, bytes]) -> bytes:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await step


class Rig:
    """Everything of one test. The model qwen runs on ``engine``; ``api`` listens on the API's socket once started."""

    def __init__(self, directory: Path, settings: HostGateway, limits: Limits) -> None:
        self.paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "state")
        self.paths.models_directory.mkdir(parents=True)
        counters.directory(self.paths).mkdir(parents=True)
        self.settings = settings
        self.limits = limits
        self.engine = Upstream()
        self.api = Upstream()
        self.port = 0
        self._clients: list[Client] = []

    def add_model(self, name: str, text: str = "") -> None:
        """One that does not run."""
        self.paths.model_file(name).write_text(f'command = ["/bin/true"]\n{text}')
        use.prepare(self.paths, name, os.getegid())

    def run_model(self, name: str, port: int, text: str = "") -> None:
        self.add_model(name, text)
        self.mark_ready(name, port)

    def mark_ready(self, name: str, port: int, *, cgroup_id: int | None = None) -> None:
        lease = Lease(name, port, (), time.time(), ready=True, address="127.0.0.1", pid=os.getpid())
        leases.write(self.paths, replace(lease, socket_cgroup_id=cgroup_id))

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    def clients(self) -> list[Connected]:
        """The gateway's side of the connections that it serves."""
        return [connection for connection in self.gateway._connections if isinstance(connection, Connected)]

    def is_used(self, name: str = "qwen") -> bool | None:
        return use.is_used(self.paths, name)

    def totals(self, name: str = "qwen") -> Totals:
        """What was counted so far of a model that somebody asked for."""
        return counters.read(counters.directory(self.paths))[name]

    def answers(self, name: str = "qwen") -> Answers:
        """How the engine of the model answered so far."""
        return counters.answers(counters.directory(self.paths))[name]

    async def eventually(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                await asyncio.sleep(0.002)

    @asynccontextmanager
    async def running(self, known: Keys) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        problems: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: problems.append(context))
        await self.engine.start()
        self.run_model("qwen", self.engine.port)
        api = self.paths.runtime / "api.sock"
        await self.api.start(api)
        activation = Activation(loop, self.paths, api, lambda: self.settings)
        counted = Counters(counters.file_of(counters.directory(self.paths), 0))
        self.gateway = Gateway(
            Shared(
                loop,
                settings=lambda: self.settings,
                keys=known,
                catalog=Catalog(self.paths),
                activation=activation,
                counters=counted,
                api=api,
                limits=self.limits,
            )
        )
        self.server = await loop.create_server(self.gateway.protocol, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            self.server.close()
            for client in self._clients:
                client.writer.transport.abort()
            self.gateway.close()
            await self.engine.stop()
            await self.api.stop()
            activation.close()
            counted.close()
            await asyncio.sleep(0)
        assert not problems, problems


Run = Callable[..., None]


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Play a scenario with a gateway; further arguments are settings of [gateway], ``limits`` and ``keys``."""

    def play(scenario: Scenario, *, limits: Limits = QUICK, known: Keys | None = None, **settings: Any) -> None:
        rig = Rig(tmp_path, HostGateway().replace(**settings), limits)

        async def whole() -> None:
            async with rig.running(known or Keys.read([])), asyncio.timeout(4 * DEADLINE_SECONDS):
                await scenario(rig)

        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(whole())

    return play


def make_keys(directory: Path, **models: tuple[str, ...]) -> tuple[Keys, dict[str, str]]:
    """A file of keys by their names, each for some models or for all; and their secrets."""
    made = {name: keys.make(name, models=names) for name, names in models.items()}
    file = directory / "keys.toml"
    file.write_text(keys.text([key for key, _ in made.values()]))
    return Keys.read([file]), {name: secret for name, (_, secret) in made.items()}


def _fields(lines: list[str]) -> list[tuple[str, str]]:
    return [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
