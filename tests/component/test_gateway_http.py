"""HTTP to the letter: framing, persistence, interim answers, limits, timeouts, and what must not be smuggled."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gpusvc.gateway.limits import Limits
from gpusvc.gateway.relay.client import Client as GatewayClient
from gpusvc.gateway.relay.exchange import Exchange
from tests.component.rig import IN_SOCKETS_BYTES, QUICK, Answer, Rig, Run, make_keys, run
from tests.component.upstream import Connection, Request, chunk, chunked, raw, silence, whole

__all__ = ["run"]

ASK = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n" + b'{"model":"qwen"}'


def code(answer: Answer) -> object:
    return json.loads(answer.body)["error"]["code"]


def test_requests_that_are_sent_ahead_are_answered_in_order(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        async def script(request: Request, connection: Connection) -> None:
            await whole(json.dumps(request.json()["n"]).encode())(request, connection)

        rig.engine.answer = script
        client = await rig.client()
        bodies = [json.dumps({"model": "qwen", "n": number}).encode() for number in range(20)]
        await client.say(
            b"".join(b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b) for b in bodies)
            + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        assert [json.loads((await client.answer()).body) for _ in range(20)] == list(range(20))
        assert json.loads((await client.answer()).body) == {"status": "ok"}

    run(scenario, hosts=("a",))


def test_what_is_sent_ahead_is_bounded(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = silence
        client = await rig.client()
        await client.say(ASK)
        await rig.eventually(lambda: bool(rig.engine.requests))
        assert await client.say_until_stuck(ASK * 10_000) < IN_SOCKETS_BYTES

    run(scenario)


def test_answers_to_what_is_sent_ahead_wait_for_their_reader(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("large", f"description = {'x' * 500_000!r}\n")
        client = await rig.client()
        client.stop_reading()
        number = 1000
        await client.say(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * number)
        (connection,) = rig.clients()
        await rig.eventually(lambda: connection._is_blocked)
        await rig.eventually(lambda: connection._served + connection._incoming.buffer.count(b"GET") == number)
        assert connection._transport.get_write_buffer_size() < IN_SOCKETS_BYTES
        client.go_on_reading()
        for _ in range(40):
            assert len((await client.answer()).body) > 500_000
        client.reset()
        await rig.eventually(lambda: not rig.gateway._connections)

    run(scenario)


def test_many_requests_that_are_sent_ahead_let_others_have_their_turn(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        greedy, other = await rig.client(), await rig.client()
        number = 2000
        await greedy.say(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * number)
        await other.get("/health")
        assert rig.totals("").requests["2xx"] < number
        for _ in range(number):
            assert (await greedy.answer()).status == 200

    run(scenario)


def test_bytes_may_arrive_one_by_one(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(*(bytes([byte]) for byte in b"\r\n" + ASK))
        assert (await client.answer()).status == 200
        coded = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.say(*(bytes([byte]) for byte in coded + chunk(b'{"model":') + chunk(b'"qwen"}') + b"0\r\n\r\n"))
        assert (await client.answer()).status == 200
        assert rig.engine.requests[1].json() == {"model": "qwen"}

    run(scenario)


def test_an_answer_that_arrives_in_pieces_is_the_same(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        text = chunked([b"one", b"two"], trailers=b"X-Sum: 1\r\n")

        async def script(_: Request, connection: Connection) -> None:
            for byte in text:
                connection.writer.write(bytes([byte]))
                await asyncio.sleep(0)

        rig.engine.answer = script
        client = await rig.client()
        for _ in range(3):
            assert (await client.ask()).body == b"onetwo"
        assert len(rig.engine.connections) == 1

    run(scenario)


@pytest.mark.parametrize(("asked", "trailers"), [("TE: trailers\r\nConnection: TE\r\n", [("x-sum", "1")]), ("", [])])
def test_trailers_are_for_those_who_take_them(run: Run, asked: str, trailers: list[tuple[str, str]]) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(chunked([b"one"], trailers=b"X-Sum: 1\r\nContent-Length: 5\r\n"))
        client = await rig.client()
        assert (await client.ask(more=asked)).trailers == trailers
        assert rig.engine.requests[0].headers.get("te") == ("trailers" if asked else None)

    run(scenario)


def test_http10_gets_no_chunks_and_keeps_its_connection_only_if_asked(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        for _ in range(2):
            await client.post(b'{"model": "qwen"}', more="Connection: keep-alive\r\n", version="1.0")
            answer = await client.answer()
            assert answer.headers["connection"] == "keep-alive"
        await client.post(b'{"model": "qwen"}', version="1.0")
        assert (await client.answer()).headers["connection"] == "close"
        assert await client.rest() == b""

    run(scenario)


def test_a_client_may_end_its_connection_with_a_request(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        answer = await client.ask(more="Connection: close\r\n")
        assert answer.headers["connection"] == "close"
        assert await client.rest() == b""
        assert "connection" not in rig.engine.requests[0].headers

    run(scenario)


def test_head_is_answered_by_a_head(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(b"12345")
        client = await rig.client()
        for target in ("/upstream/qwen/x", "/health", "/v1/models"):
            answer = await client.get(target, method="HEAD")
            assert answer.status == 200
            assert int(answer.headers["content-length"]) > 0
        assert (await client.get("/health")).status == 200  # nothing was left in between

    run(scenario)


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_some_answers_have_no_body(run: Run, status: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(f"HTTP/1.1 {status}\r\nETag: x\r\n\r\n".encode())
        client = await rig.client()
        for _ in range(2):
            answer = await client.ask()
            assert answer.status == int(status[:3])
            assert "transfer-encoding" not in answer.headers
        assert len(rig.engine.connections) == 1

    run(scenario)


def test_interim_answers_pass_but_for_100(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        rig.engine.answer = raw(b"HTTP/1.1 100 Continue\r\n\r\n" + hint, hint + final)
        client = await rig.client()
        await client.post(b'{"model": "qwen"}')
        assert [(await client.head()).status for _ in range(3)] == [103, 103, 200]
        assert await client.read(2) == b"ok"
        await client.post(b'{"model": "qwen"}', version="1.0")
        assert (await client.head()).status == 200

    run(scenario)


def test_who_expects_100_gets_it_before_the_body_and_not_with_a_refusal(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        expecting = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\nExpect: 100-continue\r\n"
        await client.say(expecting + b"\r\n")
        assert (await client.head()).status == 100
        await client.say(b'{"model":"qwen"}')
        assert (await client.answer()).status == 200
        assert "expect" not in rig.engine.requests[0].headers
        await client.say(expecting + b"Origin: http://evil.example\r\n\r\n")
        answer = await client.head()
        assert (answer.status, answer.headers["connection"]) == (403, "close")

    run(scenario)


def test_heads_are_written_anew(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(b"{}", more="Keep-Alive: timeout=5\r\nConnection: x-hop\r\nX-Hop: 1\r\nX-End: 2\r\n")
        client = await rig.client()
        more = (
            "Connection: x-hop\r\nX-Hop: 1\r\nX-End: 2\r\nKeep-Alive: 1\r\nX-Gpusvc-Key: me\r\nCookie: a=b\r\n"
            "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\nX-End: 3\r\n"
        )
        answer = await client.ask(more=more)
        assert answer.headers["x-end"] == "2"
        assert not {"keep-alive", "x-hop", "connection"} & set(answer.headers)
        assert "date" in answer.headers
        (request,) = rig.engine.requests
        assert [value for name, value in request.fields if name == "x-end"] == ["2", "3"]
        assert request.headers["x-forwarded-for"] == "10.0.0.1, 127.0.0.1"
        assert request.headers["x-forwarded-proto"] == "https"
        assert request.headers["cookie"] == "a=b"
        assert not {"connection", "keep-alive", "x-hop", "x-gpusvc-key"} & set(request.headers)
        assert [name for name, _ in request.fields].count("host") == 1

    run(scenario)


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nX-Model: qwen\r\n\r\n"


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 70\r\n",
        b"Content-Length: 4, 70\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: x\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"X: 1\r\n Transfer-Encoding: chunked\r\n",
        b"X: 1\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\x00\r\n",
    ],
)
def test_a_request_of_doubtful_length_is_the_last_one(run: Run, fields: bytes) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n0\r\n\r\n" + SMUGGLED)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert await client.rest() == b""
        assert rig.engine.requests == []

    run(scenario)


@pytest.mark.parametrize(
    "body", [b"1\nx\n0\n\n", b"3\r\nabcd\r\n", b"-1\r\n", b"1;\nx\r\n", b"0\r\nbad trailer\r\n\r\n"]
)
def test_what_are_no_chunks_end_the_connection(run: Run, body: bytes) -> None:
    async def scenario(rig: Rig) -> None:
        for pieces in ([body], [body[:1], body[1:]]):
            client = await rig.client()
            await client.say(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", *pieces)
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert await client.rest() == b""

    run(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nX: 1\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_an_engine_that_speaks_no_http_is_a_502(run: Run, answer: bytes) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(answer)
        client = await rig.client()
        assert (await client.ask()).status == 502
        rig.engine.answer = whole(b"{}")
        assert (await client.ask()).status == 200

    run(scenario)


def test_what_an_engine_says_beyond_its_answer_is_nobodys(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        )
        client = await rig.client()
        for _ in range(3):
            assert (await client.ask()).body == b"ok"
        assert len(rig.engine.connections) == 3

    run(scenario)


def test_heads_have_limits(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        for head, status in (
            (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000, 431),
            (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: 1\r\n" * 200 + b"\r\n", 431),
            (b"GET /" + b"x" * 10_000, 414),
            (b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n", 414),
            (b"\x16\x03\x01\x02\x00\x01", 400),
            (b"GET / HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/3.0\r\n\r\n", 505),
            (b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        ):
            client = await rig.client()
            await client.say(head)
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (status, "close")
            assert await client.rest() == b""

    run(scenario)


def test_methods_that_nobody_knows_are_refused(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        assert (await client.get("/v1/x", method="BREW")).status == 501
        assert (await client.get("/v1/x", method="TRACE")).status == 405
        assert (await client.get("/health", method="DELETE")).status == 405
        assert (await client.get("/health")).status == 200

    run(scenario)


def test_a_body_that_is_too_large_is_refused_by_its_length_or_when_it_gets_there(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        body = b'{"model": "qwen", "text": "' + b"x" * 100_000 + b'"}'
        for head, sent in (
            (b"Content-Length: %d\r\n" % len(body), b""),
            (b"Content-Length: %d\r\n" % len(body), body),
            (b"Transfer-Encoding: chunked\r\n", chunk(body)),
        ):
            client = await rig.client()
            await client.say(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n" + sent)
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (413, "close")
            assert await client.rest() == b""

    run(scenario, max_body_bytes=50_000)


def test_who_sends_on_still_gets_to_read_his_refusal(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(b"POST /v1/x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 900000\r\n\r\n")
        for _ in range(9):
            await client.say(b"x" * 100_000)
        assert (await client.answer()).status == 403

    run(scenario)


SLOW = Limits(sweep_seconds=0.02, head_seconds=0.15, body_seconds=0.15, idle_seconds=0.15)


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf",
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
)
def test_a_request_that_does_not_come_to_its_end_is_a_408(run: Run, beginning: bytes) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(beginning)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")

    run(scenario, limits=SLOW)


def test_a_client_that_trickles_its_head_is_no_exception(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.ask()
        answer = asyncio.ensure_future(client.answer())
        await client.say(b"GET /health HTTP/1.1\r\n")
        while not answer.done():
            await client.say(b"X: 1\r\n")
            await asyncio.wait({answer}, timeout=0.02)
        assert (await answer).status == 408

    run(scenario, limits=SLOW)


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_client_that_trickles_its_body_holds_no_slot_and_is_a_408(run: Run, framing: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.run_model("narrow", rig.engine.port, "concurrency = 1\n")
        slow = await rig.client()
        chunked = framing.startswith("Transfer")
        head = f"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
        begin, more = b'{"model": "narrow", "x": "', b"a"
        wire = (lambda data: b"%x\r\n%b\r\n" % (len(data), data)) if chunked else bytes
        await slow.say(head.encode(), wire(begin))
        answer = asyncio.ensure_future(slow.answer())
        served = 0
        while not answer.done():
            await slow.say(wire(more))
            quick = await rig.client()
            assert (await quick.ask(b'{"model": "narrow"}')).status == 200
            served += 1
            assert not rig.is_used("narrow")
            await asyncio.wait({answer}, timeout=0.02)
        assert ((await answer).status, served > 0) == (408, True)

    run(scenario, limits=SLOW)


def test_a_body_that_comes_at_a_fair_rate_may_take_longer(run: Run) -> None:
    limits = replace(SLOW, body_bytes=1000)

    async def scenario(rig: Rig) -> None:
        client, shared = await rig.client(), rig.gateway._shared
        body = b'{"model": "qwen", "x": "' + b"a" * 8000 + b'"}'
        await client.say(f"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        began = shared.now
        for at in range(0, len(body), 1000):
            await client.say(body[at : at + 1000])
            before = shared.now
            await rig.eventually(lambda before=before: shared.now > before + limits.body_seconds / 3)  # type: ignore[misc]
        assert shared.now > began + limits.body_seconds
        assert (await client.answer()).status == 200

    run(scenario, limits=limits)


def test_bodies_of_all_connections_together_have_a_budget_of_memory(run: Run, tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        size, number = 200_000, 12
        clients = [await rig.client() for _ in range(number)]
        for client in clients:
            await client.say(
                f"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 20}\r\n\r\n".encode(),
                b'{"x": "' + b"a" * (size - 7),
            )
        await rig.eventually(lambda: sum(came(each) for each in rig.clients()) == number * size)
        held = rig.gateway._shared.budget.held_bytes
        assert 0 < held <= 1_000_000
        for client in clients:
            await client.say(b'", "model": "qwen"}'.ljust(20))
            assert (await client.answer()).status == 200
        assert rig.gateway._shared.budget.held_bytes == 0

    def came(connection: GatewayClient) -> int:
        exchange = connection._exchange
        body = exchange._body if isinstance(exchange, Exchange) else None
        return 0 if body is None else body.received_bytes

    run(scenario, limits=replace(QUICK, held_bytes=1_000_000))


def test_slow_heads_share_the_budget_and_others_are_served(run: Run) -> None:
    limit = 400_000

    async def scenario(rig: Rig) -> None:
        budget = rig.gateway._shared.budget
        slow = [await rig.client() for _ in range(40)]
        for client in slow:
            await client.say(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000)
        await rig.eventually(lambda: sum(each._incoming.buffer != b"" for each in rig.clients()) <= limit // 20_000)
        await rig.eventually(lambda: 0 < budget.held_bytes <= limit)
        answers = [await client.answer() for client in slow[:20]]
        assert {(answer.status, str(code(answer))) for answer in answers} == {(503, "exhausted")}
        other = await rig.client()
        assert (await other.ask()).status == 200
        await slow[-1].say(b"\r\n\r\n")
        assert (await slow[-1].answer()).status == 200, "the newest are not given up"
        for client in slow:
            client.close()
        await rig.eventually(lambda: budget.held_bytes == 0)

    run(scenario, limits=replace(QUICK, held_bytes=limit))


def test_whole_bodies_that_wait_for_their_model_share_the_budget(run: Run) -> None:
    size, number, limit = 40_000, 20, 400_000

    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        ready = asyncio.Event()

        async def start(_: Request, connection: Connection) -> None:
            await ready.wait()
            rig.mark_ready("cold", rig.engine.port)
            await connection.say(b"HTTP/1.0 200 OK\r\n\r\n{}")
            connection.writer.close()
            raise ConnectionAbortedError

        rig.api.answer = start
        body = b'{"model": "cold", "x": "' + b"a" * size + b'"}'
        clients = [await rig.client() for _ in range(number)]
        for client in clients:
            await client.post(body)
        await rig.eventually(lambda: bool(rig.api.requests))
        await rig.eventually(lambda: rig.totals("cold").waiting == number)
        assert size < rig.gateway._shared.budget.held_bytes <= limit
        ready.set()
        assert [(await client.answer()).status for client in clients] == [200] * number
        assert {request.body for request in rig.engine.requests} == {body}
        assert rig.gateway._shared.budget.held_bytes == 0

    run(scenario, limits=replace(QUICK, held_bytes=limit))


def test_what_is_sent_ahead_is_dropped_with_its_connection_where_there_is_no_room(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        going = asyncio.Event()

        async def script(request: Request, connection: Connection) -> None:
            await going.wait()
            await whole(b"first")(request, connection)

        rig.engine.answer = script
        budget = rig.gateway._shared.budget
        client = await rig.client()
        await client.say(ASK)
        await rig.eventually(lambda: bool(rig.engine.requests))
        await client.say(ASK * 1000)
        await rig.eventually(lambda: not rig.clients()[0]._keeps_alive)
        assert budget.held_bytes <= 20_000
        going.set()
        answer = await client.answer()
        assert (answer.body, answer.headers["connection"]) == (b"first", "close")
        assert await client.hangs_up()
        assert len(rig.engine.requests) == 1

    run(scenario, limits=replace(QUICK, held_bytes=20_000))


def test_idle_connections_are_closed_without_a_word(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        assert await client.rest() == b""
        client = await rig.client()
        await client.ask()
        assert await client.rest() == b""

    run(scenario, limits=SLOW)


def test_an_answer_may_take_longer_than_any_request(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        async def script(request: Request, connection: Connection) -> None:
            shared, before = rig.gateway._shared, rig.gateway._shared.now
            await rig.eventually(lambda: shared.now > before + 2 * SLOW.idle_seconds)
            await whole(b"{}")(request, connection)

        rig.engine.answer = script
        client = await rig.client()
        assert (await client.ask()).status == 200

    run(scenario, limits=SLOW)


@asynccontextmanager
async def slow_reader(rig: Rig) -> AsyncIterator[tuple[socket.socket, asyncio.Transport]]:
    """A client of whose answer little fits anywhere but into the gateway, and the gateway's side of its connection."""
    loop = asyncio.get_running_loop()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.setblocking(False)
        await loop.sock_connect(reader, ("127.0.0.1", rig.port))
        await rig.eventually(lambda: bool(rig.gateway._connections))
        (connection,) = rig.gateway._connections
        transport = connection._transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield reader, transport


def test_a_last_answer_arrives_however_slowly_it_is_taken(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(b"x" * 30_000)
        async with slow_reader(rig) as (reader, transport):
            # Some clients say more than their request.
            reader.send(ASK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"\r\n")
            await rig.eventually(lambda: transport.get_write_buffer_size() > 0)
            await rig.eventually(transport.is_closing)  # it has lingered for long enough
            text = b""
            while piece := await asyncio.get_running_loop().sock_recv(reader, 65536):
                text += piece
            assert text.endswith(b"x" * 30_000)

    run(scenario, limits=Limits(sweep_seconds=0.02, linger_seconds=0.1))


@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
def test_a_client_that_never_takes_its_last_answer_is_dropped(run: Run, more: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(b"x" * 30_000)
        async with slow_reader(rig) as (deaf, transport):
            deaf.send(ASK.replace(b"\r\n\r\n", f"\r\n{more}\r\n".encode()))
            await rig.eventually(lambda: transport.get_write_buffer_size() > 0)
            await rig.eventually(lambda: not rig.gateway._connections)

    run(scenario, limits=Limits(sweep_seconds=0.02, idle_seconds=0.2, stall_seconds=0.2))


def test_a_client_that_reads_nothing_for_too_long_is_dropped(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        async def script(_: Request, connection: Connection) -> None:
            await connection.say(b"HTTP/1.1 200 OK\r\nContent-Length: 500000000\r\n\r\n")
            for _turn in range(500):
                await connection.say(b"x" * 1_000_000)

        rig.engine.answer = script
        client = await rig.client()
        client.stop_reading()
        await client.post(b'{"model": "qwen"}')
        await rig.eventually(lambda: rig.engine.cancelled == 1)
        await rig.eventually(lambda: not rig.is_used())

    run(scenario, limits=Limits(sweep_seconds=0.02, stall_seconds=0.3))


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /health HT",
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf",
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
)
def test_half_a_request_and_the_end_is_a_400(run: Run, beginning: bytes) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(beginning)
        client.writer.write_eof()
        assert (await client.answer()).status == 400
        assert await client.rest() == b""

    run(scenario)


def test_who_closes_his_side_while_he_waits_is_taken_to_be_gone(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = silence
        client = await rig.client()
        await client.post(b'{"model": "qwen"}')
        await rig.eventually(lambda: bool(rig.engine.requests))
        client.writer.write_eof()
        assert await client.rest() == b""
        await rig.eventually(lambda: rig.engine.cancelled == 1)

    run(scenario)


def test_an_answer_before_the_end_of_the_request_ends_the_connection(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.streams_body = True
        rig.engine.answer = whole(b'{"early": true}', status="413 Content Too Large")
        client = await rig.client()
        await client.say(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n")
        await client.say(b'{"model": "qwen", "text": "' + b"x" * 300_000)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert await client.rest() == b""

    run(scenario)


def test_browsers_of_other_origins_are_kept_out_and_let_in_by_the_setting(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        assert (await client.ask(more="Origin: http://evil.example\r\n")).status == 403
        preflight = "Origin: https://chat.example\r\nAccess-Control-Request-Method: POST\r\n"
        answer = await client.get("/v1/chat/completions", preflight, method="OPTIONS")
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        rig.engine.answer = whole(b"{}", more="Access-Control-Allow-Origin: *\r\n")
        answer = await client.ask(more="Origin: https://chat.example\r\n")
        assert [v for n, v in answer.fields if n == "access-control-allow-origin"] == ["https://chat.example"]
        assert "origin" not in rig.engine.requests[-1].headers
        refused = await client.ask(b'{"model": "nowhere"}', more="Origin: https://chat.example\r\n")
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"  # so that a page may read why

    run(scenario, cors_origins=("https://chat.example",))


def test_strangers_names_for_this_machine_are_refused(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert code(await client.answer()) == "host_not_allowed"
        await client.say(b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert code(await client.answer()) == "host_not_allowed"

    run(scenario)


def test_keys_may_be_for_the_models_that_they_name_only(run: Run, tmp_path: Path) -> None:
    known, secrets = make_keys(tmp_path, one=("qwen",))

    async def scenario(rig: Rig) -> None:
        rig.add_model("hidden")
        client = await rig.client()
        own = f"Authorization: Bearer {secrets['one']}\r\n"
        listed = json.loads((await client.get("/v1/models", own)).body)
        assert [model["id"] for model in listed["data"]] == ["qwen"]
        assert (await client.get("/v1/models/hidden", own)).status == 404
        hidden = await client.ask(b'{"model": "hidden"}', more=own)
        absent = await client.ask(b'{"model": "absent"}', more=own)
        assert (hidden.status, hidden.body.replace(b"hidden", b"absent")) == (404, absent.body)
        assert (await client.get("/upstream/hidden/", own)).status == 404

    run(scenario, known=known)
