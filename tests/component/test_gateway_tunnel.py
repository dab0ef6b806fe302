"""Connections that become another protocol's, as WebSocket's."""

from __future__ import annotations

import asyncio

import pytest

from gpusvc.gateway.limits import Limits
from tests.component.rig import IN_SOCKETS_BYTES, Client, Rig, Run, run
from tests.component.upstream import Connection, Request, echo_websocket, whole

__all__ = ["run"]

UPGRADE = (
    "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


async def upgraded(rig: Rig) -> Client:
    client = await rig.client()
    await client.say(f"GET /upstream/qwen/ws HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\n".encode())
    answer = await client.head()
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert (answer.headers["connection"], answer.headers["upgrade"]) == ("Upgrade", "websocket")
    assert await client.read(5) == b"hello"
    return client


def test_bytes_go_both_ways_and_the_model_is_in_use_meanwhile(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = echo_websocket
        client = await upgraded(rig)
        for size in (1, 1000, 3_000_000):
            await asyncio.gather(client.say(b"x" * size), client.read(size))
        assert rig.is_used()
        client.writer.write_eof()
        assert await client.rest() == b""
        await rig.eventually(lambda: not rig.is_used())
        assert rig.totals().requests["1xx"] == 1
        assert rig.totals().in_flight == 0

    run(scenario)


def test_a_quiet_connection_does_not_keep_its_model_and_goes_on(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = echo_websocket
        client = await upgraded(rig)
        for _ in range(2):
            await rig.eventually(lambda: not rig.is_used())
            await rig.eventually(lambda: rig.answers().attached == 1)
            await client.say(b"more")
            assert await client.read(4) == b"more"
            await rig.eventually(lambda: rig.is_used() is True)
        await rig.eventually(lambda: not rig.is_used())
        client.reset()
        await rig.eventually(lambda: rig.totals().in_flight == 0)
        assert rig.answers().attached == 0
        rig.engine.answer = whole(b"{}")
        assert (await (await rig.client()).ask()).status == 200
        await rig.eventually(lambda: not rig.is_used())

    run(scenario, limits=Limits(sweep_seconds=0.02, quiet_seconds=0.2))


def test_an_open_connection_does_not_hide_that_all_other_answers_are_errors(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = echo_websocket
        await upgraded(rig)
        rig.engine.answer = whole(b"{}", status="500 Internal Server Error")
        for _ in range(2):
            assert (await (await rig.client()).ask()).status == 500
        assert rig.answers().failed == 2
        assert (rig.answers().succeeded, rig.answers().succeeding) == (0, 0)

    run(scenario)


def test_what_a_client_says_too_early_is_not_lost(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = echo_websocket
        client = await rig.client()
        await client.say(f"GET /upstream/qwen/ws HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\nearly".encode())
        await client.head()
        assert await client.read(10) == b"helloearly"

    run(scenario)


@pytest.mark.parametrize("who", ["client", "engine"])
def test_who_goes_takes_the_other_with_him(run: Run, who: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = echo_websocket
        client = await upgraded(rig)
        if who == "client":
            client.reset()
            await rig.eventually(lambda: rig.engine.open == 0)
        else:
            rig.engine.connections[0].reset()
            assert await client.hangs_up()
        await rig.eventually(lambda: not rig.is_used())

    run(scenario)


def test_neither_is_read_faster_than_the_other_takes_it(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        sent = 0

        async def flood(request: Request, connection: Connection) -> None:
            nonlocal sent
            await connection.say(b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
            while True:
                await connection.say(b"x" * 1_000_000)
                sent += 1_000_000

        rig.engine.answer = flood
        client = await rig.client()
        await client.say(f"GET /upstream/qwen/ws HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\n".encode())
        await client.head()
        client.stop_reading()
        (connection,) = rig.gateway._connections
        engine = connection._transport.get_protocol()._other  # type: ignore[attr-defined]
        await rig.eventually(lambda: not engine.is_reading())
        assert sent < IN_SOCKETS_BYTES
        client.reset()

    run(scenario)


def test_a_client_that_resets_its_connection_is_gone_although_its_engine_takes_nothing(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        switch = asyncio.Event()

        async def deaf(_: Request, connection: Connection) -> None:
            connection.reader._transport.pause_reading()  # type: ignore[attr-defined]
            await switch.wait()
            await connection.say(b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
            await asyncio.Event().wait()

        rig.engine.answer = deaf
        client = await rig.client()
        await client.say(f"GET /upstream/qwen/ws HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\n".encode())
        await client.say_until_stuck(b"x" * 1_000_000)
        switch.set()
        await client.head()
        client.reset()
        await rig.eventually(lambda: not rig.is_used())
        assert rig.totals().in_flight == 0

    run(scenario, limits=Limits(sweep_seconds=0.02, stall_seconds=0.1))


def test_an_engine_may_decline(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(b"{}", status="426 Upgrade Required")
        client = await rig.client()
        for _ in range(2):
            assert (await client.get("/upstream/qwen/ws", UPGRADE)).status == 426
        assert rig.engine.requests[0].headers["upgrade"] == "websocket"

    run(scenario)


def test_an_upgrade_to_http2_is_not_passed_on(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        more = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        assert (await client.get("/upstream/qwen/", more)).status == 200
        assert not {"upgrade", "http2-settings", "connection"} & set(rig.engine.requests[0].headers)

    run(scenario)


def test_the_end_of_the_gateway_is_the_end_of_tunnels(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = echo_websocket
        client = await upgraded(rig)
        drained = asyncio.ensure_future(rig.gateway.drain())
        await asyncio.wait({drained}, timeout=0.1)
        assert not drained.done()  # it is in use
        rig.gateway.close()
        await asyncio.wait_for(drained, 10)
        assert await client.hangs_up()
        await rig.eventually(lambda: not rig.is_used())

    run(scenario)
