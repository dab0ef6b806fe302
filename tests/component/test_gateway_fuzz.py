"""Whatever a client or an engine sends: the gateway answers or hangs up, lets go of the model, and serves the next."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from gpusvc.gateway.limits import Limits
from tests.component.rig import Client, Rig, Run, run
from tests.component.upstream import Connection, Request, chunk, chunked, whole

__all__ = ["run"]

SEEDS = range(4)
TURNS = 60

BODY = b'{"model": "qwen", "stream": true, "messages": [{"role": "user", "content": "Hi"}]}'

FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nqwen\r\n--b--\r\n'

REQUESTS = [
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /v1/messages HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n%b%b0\r\nX-A: 1\r\n\r\n"
    % (chunk(BODY[:20]), chunk(BODY[20:])),
    b"GET /upstream/qwen/ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /v1/models HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data;boundary=b\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(FORM), FORM)
    ),
]

ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    chunked([b"data: one\n\n", b"data: [DONE]\n\n"], trailers=b"X-Sum: 1\r\n"),
    b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nall",
]

SPECIALS = [b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b" ", b":", b"0\r\n\r\n", b"\r\n\r\n", b"Content-Length: 5\r\n"]


def mangled(dice: random.Random, data: bytes) -> bytes:
    """With some bytes changed, gone, doubled or put in."""
    for _ in range(dice.choice([0, 1, 1, 2, 5])):
        at = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0:
            data = data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + dice.randrange(1, 20) :]
        elif kind == 2:
            data = data[:at] + dice.choice(SPECIALS) + data[at:]
        else:
            end = at + dice.randrange(1, 30)
            data = data[:at] + data[at:end] * 2 + data[end:]
    return data


def pieces(dice: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice([0, 0, 1, 3])))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if begin < end]


async def play(client: Client, dice: random.Random, data: bytes) -> None:
    """Send it, and take what comes, until that ends or nothing more comes."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
        for piece in pieces(dice, data):
            await client.say(piece)
            await asyncio.sleep(0)
        ending = dice.randrange(4)
        if ending == 0:
            client.reset()
        elif ending == 1:
            client.writer.write_eof()
        await asyncio.wait_for(client.rest(), 0.05)
    client.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_of_any_kind_leave_nothing_behind(run: Run, seed: int) -> None:
    dice = random.Random(seed)

    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(b"{}")
        for _ in range(TURNS // 6):
            texts = [
                b"".join(mangled(dice, dice.choice(REQUESTS)) for _ in range(dice.choice([1, 1, 2]))) for _ in range(6)
            ]
            await asyncio.gather(*[play(await rig.client(), dice, text) for text in texts])
        await rig.eventually(lambda: not rig.is_used())
        await rig.eventually(lambda: rig.totals().in_flight == 0)
        assert (await (await rig.client()).ask()).status == 200

    run(scenario, limits=Limits(sweep_seconds=0.02, linger_seconds=0.1))


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_of_any_kind_leave_nothing_behind(run: Run, seed: int) -> None:
    dice = random.Random(seed)

    async def scenario(rig: Rig) -> None:
        async def script(_: Request, connection: Connection) -> None:
            for piece in pieces(dice, mangled(dice, dice.choice(ANSWERS))):
                await connection.say(piece)
                await asyncio.sleep(0)
            if dice.randrange(2):
                connection.writer.close()
                raise ConnectionAbortedError

        rig.engine.answer = script
        for _ in range(TURNS // 6):
            await asyncio.gather(*[play(await rig.client(), dice, dice.choice(REQUESTS[:2])) for _ in range(6)])
        await rig.eventually(lambda: not rig.is_used())
        await rig.eventually(lambda: rig.totals().in_flight == 0)
        rig.engine.answer = whole(b"{}")
        assert (await (await rig.client()).ask()).status == 200

    run(scenario, limits=Limits(sweep_seconds=0.02, linger_seconds=0.1))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_arrives_does_not_depend_on_how_it_was_cut(run: Run, seed: int) -> None:
    dice = random.Random(seed)

    async def scenario(rig: Rig) -> None:
        text = chunked([b"data: %d\n\n" % number for number in range(20)])

        async def script(_: Request, connection: Connection) -> None:
            for piece in pieces(dice, text):
                await connection.say(piece)
                await asyncio.sleep(0)

        rig.engine.answer = script
        client = await rig.client()
        for _ in range(20):
            for piece in pieces(dice, dice.choice(REQUESTS[:2])):
                await client.say(piece)
                await asyncio.sleep(0)
            assert (await client.answer()).body == b"".join(b"data: %d\n\n" % number for number in range(20))
            assert rig.engine.requests[-1].body == BODY

    run(scenario)
