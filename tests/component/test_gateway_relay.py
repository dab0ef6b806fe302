"""Requests and answers between clients and an engine: what passes, how soon, and what happens if one of them goes."""

from __future__ import annotations

import asyncio
import base64
import errno
import gzip
import json
import os
import re
import socket
from pathlib import Path

import pytest

from gpusvc.config import keys
from gpusvc.config.keys import Keys
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.relay.client import Client as GatewayClient
from gpusvc.gateway.relay.exchange import Exchange
from gpusvc.gateway.relay.upstream import Address, Upstream
from gpusvc.state import upstream_key, use
from gpusvc.state.counters import NO_ANSWERS
from gpusvc.state.line import Blocker, Notice
from tests.component.rig import IN_SOCKETS_BYTES, Rig, Run, make_keys, run
from tests.component.upstream import (
    STREAM,
    Connection,
    Request,
    chunk,
    chunked,
    event,
    raw,
    read_body,
    silence,
    until_gone,
    whole,
)

__all__ = ["run"]

ANSWER = json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}).encode()


def test_a_request_goes_to_its_model_and_the_answer_comes_back(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(ANSWER, more="Server: tester\r\n")
        client = await rig.client()
        answer = await client.ask(b'{"model": "qwen", "n": 1}')
        assert (answer.status, answer.body) == (200, ANSWER)
        assert answer.headers["server"] == "tester"
        (request,) = rig.engine.requests
        assert (request.method, request.target) == ("POST", "/v1/chat/completions")
        assert request.json() == {"model": "qwen", "n": 1}
        assert request.headers["host"] == f"127.0.0.1:{rig.engine.port}"
        assert request.headers["x-forwarded-for"] == "127.0.0.1"

    run(scenario)


def test_connections_are_kept_on_both_sides(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        for _ in range(5):
            assert (await client.ask()).status == 200
        assert len(rig.engine.connections) == 1

    run(scenario)


def test_what_an_engine_took_is_counted(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(ANSWER)
        client = await rig.client()
        await client.ask()
        rig.engine.answer = raw(chunked([event("a"), b"data: " + ANSWER + b"\n\n", b"data: [DONE]\n\n"]))
        await client.ask(b'{"model": "qwen", "stream": true}')
        totals = rig.totals()
        assert (totals.prompt_tokens, totals.completion_tokens) == (10, 14)
        assert totals.requests["2xx"] == 2
        assert (totals.in_flight, totals.waiting) == (0, 0)
        assert totals.received_bytes > 0
        assert totals.sent_bytes > 2 * len(ANSWER)

    run(scenario)


def test_a_model_is_in_use_for_as_long_as_its_answer_takes(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = until_gone
        client = await rig.client()
        await client.post(b'{"model": "qwen", "stream": true}')
        await client.head()
        assert rig.is_used()
        client.close()
        await rig.eventually(lambda: not rig.is_used())

    run(scenario)


def test_each_event_is_passed_on_at_once(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        go_on = asyncio.Event()

        async def script(_: Request, connection: Connection) -> None:
            await connection.say(STREAM + chunk(event("0")))
            for number in range(1, 4):
                await go_on.wait()
                go_on.clear()
                await connection.say(chunk(event(str(number))))
            await connection.say(b"0\r\n\r\n")

        rig.engine.answer = script
        client = await rig.client()
        await client.post(b'{"model": "qwen", "stream": true}')
        assert (await client.head()).headers["transfer-encoding"] == "chunked"
        for number in range(4):
            assert await client.chunk() == event(str(number))  # before the engine is let say the next one
            go_on.set()
        assert await client.chunk() == b""

    run(scenario)


def test_a_large_body_streams_to_the_engine_before_it_is_complete(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        arrived = asyncio.Event()

        async def script(request: Request, connection: Connection) -> None:
            await connection.reader.readexactly(100_000)
            arrived.set()
            await connection.reader.readexactly(int(request.headers["content-length"]) - 100_000)
            await whole(b"{}")(request, connection)

        rig.engine.answer = script
        rig.engine.streams_body = True
        body = json.dumps({"model": "qwen", "text": "x" * 3_000_000}).encode()
        client = await rig.client()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        await client.say(head + body[:1_000_000])
        await asyncio.wait_for(arrived.wait(), 10)
        await client.say(body[1_000_000:])
        assert (await client.answer()).status == 200

    run(scenario)


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_the_name_may_be_the_last_member_of_a_large_body(run: Run, coding: str) -> None:
    async def scenario(rig: Rig) -> None:
        body = json.dumps({"text": "x" * 5_000_000, "model": "qwen"}).encode()
        client = await rig.client()
        if coding == "length":
            await client.post(body)
        else:
            await client.say(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(body), 300_000):
                await client.say(chunk(body[at : at + 300_000]))
            await client.say(b"0\r\n\r\n")
        assert (await client.answer()).status == 200
        assert rig.engine.requests[0].body == body

    run(scenario)


def test_an_engine_that_reads_slowly_holds_up_its_client_and_no_memory(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        go_on = asyncio.Event()

        async def script(request: Request, connection: Connection) -> None:
            await go_on.wait()
            await read_body(request, connection)
            await whole(b"{}")(request, connection)

        rig.engine.answer = script
        rig.engine.streams_body = True
        client = await rig.client()
        length = 200_000_000
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
        await client.say(head + b'{"model": "qwen", "text": "')
        assert await client.say_until_stuck(b"x" * 1_000_000) < IN_SOCKETS_BYTES
        client.reset()

    run(scenario)


def test_a_client_that_reads_slowly_holds_up_its_engine(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        sent = 0

        async def script(_: Request, connection: Connection) -> None:
            nonlocal sent
            await connection.say(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: 200000000\r\n\r\n")
            for _turn in range(200):
                await connection.say(b"x" * 1_000_000)
                sent += 1_000_000

        rig.engine.answer = script
        client = await rig.client()
        client.stop_reading()
        await client.post(b'{"model": "qwen"}')
        (connection,) = rig.clients()
        await rig.eventually(lambda: is_paused(connection))
        assert sent < IN_SOCKETS_BYTES
        client.go_on_reading()
        answer = await client.answer()
        assert len(answer.body) == 200_000_000

    run(scenario)


def is_paused(connection: GatewayClient) -> bool:
    """Whether the gateway reads nothing from the engine that answers this client."""
    exchange = connection._exchange
    forwarding = exchange._forwarding if isinstance(exchange, Exchange) else None
    upstream = None if forwarding is None else forwarding._upstream
    return upstream is not None and not upstream._reading


def test_a_client_that_is_gone_cancels_its_request_at_the_engine(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        for script in (silence, until_gone):
            rig.engine.answer = script
            before = rig.engine.cancelled
            client = await rig.client()
            await client.post(b'{"model": "qwen", "stream": true}')
            await rig.eventually(lambda: bool(rig.is_used()))
            await rig.eventually(lambda: len(rig.engine.requests) > rig.engine.cancelled)
            client.close()
            await rig.eventually(lambda before=before: rig.engine.cancelled == before + 1)  # type: ignore[misc]
            await rig.eventually(lambda: not rig.is_used())
        assert rig.totals().in_flight == 0

    run(scenario)


def test_a_client_that_resets_its_connection_is_gone_too(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = until_gone
        client = await rig.client()
        await client.post(b'{"model": "qwen", "stream": true}')
        await client.head()
        client.reset()
        await rig.eventually(lambda: rig.engine.cancelled == 1)

    run(scenario)


def test_a_client_that_goes_while_its_body_has_to_wait_is_noticed(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = silence
        rig.engine.streams_body = True
        client = await rig.client()
        await client.say(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000000\r\n\r\n")
        await client.say(b'{"model": "qwen", "text": "')
        await client.say_until_stuck(b"x" * 1_000_000)
        assert rig.is_used()
        client.reset()
        await rig.eventually(lambda: not rig.is_used())

    run(scenario)


def test_an_engine_that_dies_before_its_answer_is_a_502_with_the_reason(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        for ending in ("close", "reset"):
            rig.engine.answer = raw(then=ending)
            client = await rig.client()
            answer = await client.ask()
            error = json.loads(answer.body)["error"]
            assert (answer.status, error["code"]) == (502, "engine_lost")
            assert "The engine of qwen" in error["message"]
            rig.engine.answer = whole(b"{}")
            assert (await client.ask()).status == 200  # it is only the engine that went

    run(scenario)


def test_anthropics_clients_get_their_form_of_an_error(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(then="close")
        client = await rig.client()
        answer = await client.ask(target="/v1/messages")
        assert json.loads(answer.body)["type"] == "error"

    run(scenario)


def test_half_an_answer_never_looks_whole(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        beginnings = [
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        ]
        for beginning in beginnings:
            rig.engine.answer = raw(beginning, then="close")
            client = await rig.client()
            await client.post(b'{"model": "qwen"}')
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await client.answer()

    run(scenario)


def test_half_an_answer_never_looks_whole_to_http10(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", then="close")
        client = await rig.client()
        await client.post(b'{"model": "qwen"}', version="1.0")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.answer()

    run(scenario)


@pytest.mark.parametrize("ending", ["close", "reset"])
def test_a_stream_whose_engine_dies_ends_with_an_error_event_and_no_end(run: Run, ending: str) -> None:
    async def scenario(rig: Rig) -> None:
        go_on = asyncio.Event()

        async def script(request: Request, connection: Connection) -> None:
            await connection.say(STREAM + chunk(event("one")))
            await go_on.wait()
            await raw(then=ending)(request, connection)

        rig.engine.answer = script
        for target, begin in (("/v1/chat/completions", b'data: {"error":'), ("/v1/messages", b"event: error\ndata: ")):
            go_on.clear()
            client = await rig.client()
            await client.post(b'{"model": "qwen", "stream": true}', target)
            await client.head()
            assert await client.chunk() == event("one")
            go_on.set()
            last = await client.chunk()
            assert last.startswith(begin)
            assert b"in the middle of its response" in last
            assert await client.rest() == b""  # and no last chunk

    run(scenario)


def test_nothing_follows_a_stream_with_a_length(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        text = event("one")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % (len(text) + 5)
        rig.engine.answer = raw(head + text, then="close")
        client = await rig.client()
        await client.post(b'{"model": "qwen", "stream": true}')
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.answer()

    run(scenario)


def test_half_an_event_is_ended_before_the_error(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(STREAM, chunk(b'data: {"cho'), then="close")
        client = await rig.client()
        await client.post(b'{"model": "qwen", "stream": true}')
        await client.head()
        text = await client.chunk() + await client.chunk()
        assert text.startswith(b'data: {"cho\n\ndata: {"error":')

    run(scenario)


def test_a_stale_connection_costs_no_request(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        for _ in range(3):
            assert (await client.ask()).status == 200
            await rig.eventually(lambda: rig.engine.open == 1)
            (kept,) = [one for one in rig.engine.connections if not one.writer.transport.is_closing()]
            kept.reader.feed_eof()  # it stops reading, and so closes with the next request on its way

        pool = rig.gateway._shared.pool
        take = pool.take

        def too_late(address: Address) -> Upstream | None:
            taken = take(address)
            if taken is not None:
                for connection in rig.engine.connections:
                    if not connection.writer.transport.is_closing():
                        with socket.socket(fileno=os.dup(connection.writer.get_extra_info("socket").fileno())) as own:
                            own.shutdown(socket.SHUT_RDWR)
            return taken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "take", too_late)
            before = len(rig.engine.requests)
            for number in range(1, 4):
                assert (await client.ask()).status == 200
                assert len(rig.engine.requests) == before + number

        async def once(request: Request, connection: Connection) -> None:
            if len(connection.requests) > 1:  # of a connection that was kept
                connection.reset()
                raise ConnectionAbortedError
            await whole(b'{"fresh": true}')(request, connection)

        rig.engine.answer = once
        for _ in range(4):
            assert (await client.get("/upstream/qwen/x")).body == b'{"fresh": true}'

    run(scenario)


def test_a_request_is_sent_again_only_once(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.ask()
        rig.engine.answer = raw(then="reset")
        assert (await client.get("/upstream/qwen/x")).status == 502
        assert len(rig.engine.requests) == 3

    run(scenario)


def test_an_engine_is_not_suspected_for_what_the_gateway_lacks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def exhausted(_: Address, __: int | None) -> Upstream:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        with monkeypatch.context() as patch:
            patch.setattr(rig.gateway._shared.pool, "connect", exhausted)
            answer = await client.ask()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert (await (await rig.client()).ask()).status == 200
        assert rig.engine.open == 1  # it was not asked whether it is there
        assert rig.api.requests == []

    run(scenario)


def test_what_an_engine_took_is_not_sent_again(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.ask()
        rig.engine.answer = raw(then="close")  # as one that a request kills
        assert (await client.ask()).status == 502
        assert len(rig.engine.requests) == 2

    run(scenario)


def test_what_the_api_is_told_to_do_is_told_once(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        assert (await client.get("/gpusvc/models")).status == 200
        rig.api.answer = raw(then="close")
        assert (await client.ask(b"", target="/gpusvc/models/qwen/restart")).status == 502
        assert len(rig.api.requests) == 2

    run(scenario)


def test_a_large_request_goes_on_a_connection_of_its_own(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.ask()
        first = rig.engine.connections[0]
        await client.ask(json.dumps({"model": "qwen", "text": "x" * 2_000_000}).encode())
        assert first.requests == [rig.engine.requests[0]]
        assert (await client.ask()).status == 200
        await rig.eventually(lambda: rig.engine.open == 1)  # and the first one made room for it

    run(scenario)


def test_an_idle_connection_to_an_engine_is_closed_after_a_while(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.ask()
        await rig.eventually(lambda: rig.engine.open == 0)
        assert (await client.ask()).status == 200

    run(scenario, limits=Limits(sweep_seconds=0.02, pooled_seconds=0.05))


def test_an_engine_that_is_silent_for_too_long_is_given_up(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = silence
        client = await rig.client()
        answer = await client.ask()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (504, "upstream_timeout")
        rig.engine.answer = until_gone
        await client.post(b'{"model": "qwen", "stream": true}')
        await client.head()
        await client.chunk()
        assert b"upstream_timeout" in await client.chunk()

    run(scenario, upstream_timeout_seconds=0.2)


def test_answers_may_end_with_their_connection(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = raw(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n", b"one", b"two", then="close")
        client = await rig.client()
        for _ in range(2):
            answer = await client.ask()
            assert (answer.headers["transfer-encoding"], answer.body) == ("chunked", b"onetwo")
        await client.post(b'{"model": "qwen"}', version="1.0")
        answer = await client.answer()
        assert "transfer-encoding" not in answer.headers
        assert answer.body == b"onetwo"

    run(scenario)


def test_compressed_answers_pass_as_they_are(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        packed = gzip.compress(ANSWER)
        rig.engine.answer = whole(packed, more="Content-Encoding: gzip\r\n")
        client = await rig.client()
        answer = await client.ask(more="Accept-Encoding: gzip\r\n")
        assert answer.body == packed
        assert answer.headers["content-encoding"] == "gzip"
        assert rig.engine.requests[0].headers["accept-encoding"] == "gzip"

    run(scenario)


def test_the_body_is_changed_as_the_model_wants_it(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.run_model(
            "edited",
            rig.engine.port,
            'served_name = "Inner"\naliases = ["org/Edited"]\n[filter]\nstrip = ["seed"]\nset = {top_k = 3}\n',
        )
        client = await rig.client()
        await client.ask(b'{"model": "org/Edited", "seed": 1, "n": 1}')
        large = json.dumps({"n": 1, "text": "x" * 1_000_000, "seed": 1, "model": "edited"}).encode()
        await client.ask(large)
        assert rig.engine.requests[0].json() == {"model": "Inner", "n": 1, "top_k": 3}
        changed = rig.engine.requests[1].json()
        assert (changed["model"], changed["top_k"], "seed" in changed) == ("Inner", 3, False)

    run(scenario)


def test_a_model_may_be_named_by_path_query_and_header(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.get("/upstream/qwen/props?a=1")
        await client.get("/props?model=qwen")
        await client.get("/slots", "X-Model: qwen\r\n")
        assert [request.target for request in rig.engine.requests] == ["/props?a=1", "/props?model=qwen", "/slots"]
        assert (await client.get("/slots")).status == 404
        assert (await client.ask(b'{"model": "nowhere"}')).status == 404
        assert (await client.ask(b'{"model": ')).status in (200, 400)

    run(scenario)


def test_management_is_for_keys_with_the_right_and_the_api_hears_whose(run: Run, tmp_path: Path) -> None:
    user, user_secret = keys.make("user")
    boss, boss_secret = keys.make("boss", rights=(keys.Right.ADMIN,))
    file = tmp_path / "keys.toml"
    file.write_text(keys.text([user, boss]))

    async def scenario(rig: Rig) -> None:
        rig.api.answer = whole(b"[]")
        client = await rig.client()
        assert (await client.get("/gpusvc/models", f"X-Api-Key: {user_secret}\r\n")).status == 403
        forged = f"X-Api-Key: {boss_secret}\r\nX-Gpusvc-Key: mallory\r\n"
        assert (await client.get("/gpusvc/models", forged)).body == b"[]"
        (request,) = rig.api.requests
        assert request.headers["x-gpusvc-key"] == "boss"
        assert "x-api-key" not in request.headers

    run(scenario, known=Keys.read([file]))


def test_a_password_that_a_browser_remembers_does_nothing_without_the_pages_origin(run: Run, tmp_path: Path) -> None:
    boss, secret = keys.make("boss", rights=(keys.Right.ADMIN,))
    file = tmp_path / "keys.toml"
    file.write_text(keys.text([boss]))
    basic = f"Authorization: Basic {base64.b64encode(b'me:' + secret.encode()).decode()}\r\n"

    async def scenario(rig: Rig) -> None:
        rig.api.answer = whole(b"done")
        client = await rig.client()
        for method, more, status in (
            ("GET", "", 200),
            ("POST", "", 403),
            ("DELETE", "", 403),
            ("POST", "Origin: http://localhost\r\n", 200),
            ("POST", "Sec-Fetch-Site: same-origin\r\n", 200),
            ("POST", "Origin: http://evil.example\r\n", 403),
            ("POST", "Origin: null\r\n", 403),
            ("POST", "Sec-Fetch-Site: cross-site\r\n", 403),
        ):
            answer = await client.get("/gpusvc/models/qwen/stop", basic + more, method)
            assert (answer.status, more) == (status, more)
        bearer = f"Authorization: Bearer {secret}\r\n"
        assert (await client.get("/gpusvc/models/qwen/stop", bearer, "POST")).status == 200

    run(scenario, known=Keys.read([file]))


def test_without_keys_the_clients_credentials_are_for_the_engine_and_never_for_the_api(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.api.answer = whole(b"[]")
        client = await rig.client()
        sent = "Authorization: Bearer needakey\r\nX-Api-Key: other\r\n"
        assert (await client.ask(more=sent)).status == 200
        headers = rig.engine.requests[0].headers
        assert (headers["authorization"], headers["x-api-key"]) == ("Bearer needakey", "other")
        await client.get("/gpusvc/models", sent)
        assert not {"authorization", "x-api-key"} & set(rig.api.requests[0].headers)

    run(scenario)


@pytest.mark.parametrize("is_keyed", [False, True])
def test_an_engine_that_asks_for_a_key_gets_its_own_and_no_clients(run: Run, tmp_path: Path, is_keyed: bool) -> None:
    boss, secret = keys.make("boss")
    file = tmp_path / "keys.toml"
    file.write_text(keys.text([boss]))

    async def scenario(rig: Rig) -> None:
        rig.add_model("guarded")
        upstream_key.file_of(rig.paths, "guarded", upstream_key.GATEWAY).write_text("of-the-engine")
        rig.mark_ready("guarded", rig.engine.port)
        client = await rig.client()
        sent = f"Authorization: Bearer {secret}\r\nX-Api-Key: {secret}\r\n"
        assert (await client.ask(b'{"model": "guarded"}', more=sent)).status == 200
        assert (await client.get("/upstream/guarded/props", sent)).status == 200  # an onlooker's
        assert (await client.ask(b'{"model": "qwen"}', more=sent)).status == 200
        posted, probed, other = (request.headers for request in rig.engine.requests)
        for headers in (posted, probed):
            assert (headers["authorization"], "x-api-key" in headers) == ("Bearer of-the-engine", False)
        assert ("authorization" in other) is not is_keyed

    run(scenario, **({"known": Keys.read([file])} if is_keyed else {}))


def test_the_key_of_a_new_run_replaces_that_of_the_last(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        for key in ("first", "second", None):
            file = upstream_key.file_of(rig.paths, "qwen", upstream_key.GATEWAY)
            if key is None:
                upstream_key.forget(rig.paths, "qwen")
            else:
                file.write_text(key)
            rig.mark_ready("qwen", rig.engine.port)
            # The gateway believes the last lease for a few milliseconds.
            said: str | None = "none yet"
            while said != (None if key is None else f"Bearer {key}"):
                client = await rig.client()
                assert (await client.ask()).status == 200
                said = rig.engine.requests[-1].headers.get("authorization")

    run(scenario)


def test_a_model_says_itself_which_paths_are_its_state(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold", 'probe_paths = ["/status"]\n')
        rig.api.answer = raw(FAILURE, then="close")
        client = await rig.client()
        answer = await client.get("/upstream/cold/status")
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "model_not_loaded")
        assert rig.api.requests == []
        assert (await client.get("/upstream/cold/metrics")).status == 503
        assert len(rig.api.requests) == 1

    run(scenario)


@pytest.mark.parametrize(
    "target", ["/upstream/{}/metrics", "/upstream/{}/health?x", "/props?model={}", "/x?model={}&autoload=false"]
)
def test_a_probe_neither_loads_a_model_nor_keeps_it(run: Run, target: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        uses: list[bool | None] = []

        async def script(request: Request, connection: Connection) -> None:
            uses.append(rig.is_used())
            await whole(b"state")(request, connection)

        rig.engine.answer = script
        client = await rig.client()
        answer = await client.get(target.format("cold"))
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "model_not_loaded")
        assert rig.api.requests == []
        last = use.last_use(rig.paths, "qwen")
        assert (await client.get(target.format("qwen"))).body == b"state"
        assert (uses, use.last_use(rig.paths, "qwen")) == ([False], last)
        assert rig.answers() == NO_ANSWERS, "it does not say whether the engine does its work"
        assert (await client.ask()).status == 200
        assert uses == [False, True]
        assert rig.answers().succeeded == 1

    run(scenario)


LAN = "192.168.7.7:8484"


@pytest.mark.parametrize(
    ("method", "more", "loads"),
    [
        ("GET", "", False),
        ("HEAD", "", False),
        ("GET", "Sec-Fetch-Site: same-origin\r\n", True),
        ("GET", "Sec-Fetch-Site: none\r\n", True),
        ("GET", f"Origin: http://{LAN}\r\n", True),
        ("GET", "Authorization: Basic bWU6c2VjcmV0\r\n", False),
        ("GET", "Authorization: Bearer secret\r\n", True),
        ("GET", "X-Api-Key: secret\r\n", True),
        ("GET", "X-Forwarded-Proto: https\r\n", True),
        ("GET", "Connection: Upgrade\r\nUpgrade: websocket\r\n", True),
        ("POST", "Content-Length: 0\r\n", True),
    ],
)
def test_a_get_from_another_machine_loads_a_model_only_if_no_foreign_page_can_send_it(
    run: Run, method: str, more: str, loads: bool
) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = raw(FAILURE, then="close")
        client = await rig.client()
        await client.say(f"{method} /upstream/cold/page HTTP/1.1\r\nHost: {LAN}\r\n{more}\r\n".encode())
        answer = await client.answer(is_head=method == "HEAD")
        assert (answer.status, len(rig.api.requests)) == ((503, 1) if loads else (403, 0))
        other = await rig.client()
        await other.say(f"{method} /upstream/qwen/page HTTP/1.1\r\nHost: {LAN}\r\n{more}\r\n".encode())
        assert (await other.answer(is_head=method == "HEAD")).status == 200, "a model that is loaded is served"

    run(scenario)


@pytest.mark.parametrize("host", ["localhost:8484", "127.0.0.1:8484", "[::1]", "cold.localhost:8484"])
def test_a_get_on_this_machine_loads_a_model_as_browsers_say_where_it_comes_from(run: Run, host: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = raw(FAILURE, then="close")
        path = "/page" if host.startswith("cold") else "/upstream/cold/page"
        for more, status in (("Sec-Fetch-Site: cross-site\r\n", 403), ("", 503)):
            client = await rig.client()
            await client.say(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode())
            assert (await client.answer()).status == status
        assert len(rig.api.requests) == 1

    run(scenario)


def test_without_keys_management_is_open_here(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.api.answer = whole(b"[]")
        client = await rig.client()
        assert (await client.get("/gpusvc/models", "X-Gpusvc-Key: mallory\r\n")).body == b"[]"
        assert "x-gpusvc-key" not in rig.api.requests[0].headers
        assert not rig.is_used()

    run(scenario)


def test_a_key_is_asked_for_and_never_passed_on(run: Run, tmp_path: Path) -> None:
    known, secrets = make_keys(tmp_path, all=(), other=("whisper",))

    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        assert (await client.ask()).status == 401
        assert (await client.ask(more="Authorization: Bearer nonsense\r\n")).status == 401
        assert (await client.ask(more=f"X-Api-Key: {secrets['other']}\r\n")).status == 404
        assert (await client.ask(more=f"Authorization: Bearer {secrets['all']}\r\n")).status == 200
        assert (await client.get("/health")).status == 200
        (request,) = rig.engine.requests
        assert not {"authorization", "x-api-key"} & set(request.headers)

    run(scenario, known=known)


def test_a_model_that_is_not_running_is_started_once_for_all(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")

        async def start(_: Request, connection: Connection) -> None:
            rig.mark_ready("cold", rig.engine.port)
            await connection.say(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{}")
            connection.writer.close()
            raise ConnectionAbortedError

        rig.api.answer = start
        clients = [await rig.client() for _ in range(5)]
        answers = await asyncio.gather(*(client.ask(b'{"model": "cold"}') for client in clients))
        assert [answer.status for answer in answers] == [200] * 5
        assert len(rig.api.requests) == 1
        await rig.eventually(lambda: not rig.is_used("cold"))
        assert rig.totals("cold").waiting == 0

    run(scenario)


def test_a_start_that_nobody_waits_for_any_more_is_abandoned(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = silence
        client = await rig.client()
        await client.post(b'{"model": "cold"}')
        await rig.eventually(lambda: len(rig.api.requests) == 1)
        assert rig.totals("cold").waiting == 1
        client.close()
        await rig.eventually(lambda: rig.api.cancelled == 1)
        assert rig.totals("cold").waiting == 0

    run(scenario)


FAILURE = b"""HTTP/1.0 503 No
Retry-After: 7

{"error": {"message": "It did not start.", "log": ["CUDA error"]}}""".replace(b"\n", b"\r\n")


def test_a_start_that_fails_is_told_with_its_reason(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = raw(FAILURE, then="close")
        client = await rig.client()
        answer = await client.ask(b'{"model": "cold"}')
        assert (answer.status, answer.headers["retry-after"]) == (503, "7")
        assert b"CUDA error" in answer.body

    run(scenario)


@pytest.mark.parametrize("who", ["all", "some"])
def test_a_key_for_some_models_is_told_nothing_of_others(run: Run, tmp_path: Path, who: str) -> None:
    known, secrets = make_keys(tmp_path, all=(), some=("cold",))
    own = f"Authorization: Bearer {secrets[who]}\r\n"

    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.add_model("secret", 'aliases = ["gpt"]\n')
        rig.api.answer = raw(FAILURE.replace(b"It did", b"GPU 0 is held by secret. It did"), then="close")
        client = await rig.client()
        answer = await client.ask(b'{"model": "cold"}', more=own)
        assert (answer.status, answer.headers["retry-after"]) == (503, "7")
        assert (b"secret" in answer.body, b"CUDA error" in answer.body) == (who == "all", who == "all")
        if who == "some":
            assert b"cold did not start." in answer.body
            answer = await client.ask(b'{"model": "gpt"}', more=own)
            assert (answer.status, b"secret" in answer.body) == (404, False)

    run(scenario, known=known)


def test_a_browser_is_asked_for_a_key_to_the_page(run: Run, tmp_path: Path) -> None:
    boss, secret = keys.make("boss", rights=(keys.Right.ADMIN,))
    file = tmp_path / "keys.toml"
    file.write_text(keys.text([boss]))

    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        challenges = [value for name, value in (await client.get("/")).fields if name == "www-authenticate"]
        assert 'Basic realm="gpusvc"' in challenges
        assert (await client.ask()).headers["www-authenticate"] == "Bearer"
        basic = base64.b64encode(f":{secret}".encode()).decode()
        assert (await client.get("/", f"Authorization: Basic {basic}\r\n")).status == 200

    run(scenario, known=Keys.read([file]))


def test_loading_events_keep_a_stream_alive_until_the_engine_takes_over(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        go_on = asyncio.Event()

        async def start(_: Request, connection: Connection) -> None:
            await go_on.wait()
            rig.mark_ready("cold", rig.engine.port)
            await connection.say(b"HTTP/1.0 200 OK\r\n\r\n{}")
            connection.writer.close()
            raise ConnectionAbortedError

        rig.api.answer = start
        rig.engine.answer = raw(chunked([event("one"), b"data: [DONE]\n\n"]))
        client = await rig.client()
        await client.post(b'{"model": "cold", "stream": true}', more="Accept-Encoding: gzip\r\n")
        assert (await client.head()).headers["content-type"] == "text/event-stream"
        assert (await client.chunk()).startswith(b": Waiting")
        go_on.set()
        text = b""
        while piece := await client.chunk():
            text += piece
        assert text.endswith(event("one") + b"data: [DONE]\n\n")
        assert "accept-encoding" not in rig.engine.requests[0].headers  # of a stream that has begun in clear

    run(scenario, loading_events=True)


@pytest.mark.parametrize("key", ["all", "cold"])
def test_loading_events_say_behind_whom_a_model_waits_as_far_as_the_client_may_know(
    run: Run, tmp_path: Path, key: str
) -> None:
    known, secrets = make_keys(tmp_path, all=(), cold=("cold",))

    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = silence
        first = Notice(rig.paths, "1-whisper", "whisper", 1, 0)
        own = Notice(rig.paths, "2-cold", "cold", 2, 0)
        first.tell([Blocker("qwen", "in use")], [])
        own.tell([Blocker("qwen", "in use")], [])
        client = await rig.client()
        await client.post(b'{"model": "cold", "stream": true}', more=f"Authorization: Bearer {secrets[key]}\r\n")
        await client.head()
        said = (await client.chunk()).decode()
        if key == "all":
            what = "for qwen (in use), behind whisper. whisper is next."
        else:
            what = "for 1 other model, behind 1 other model. Another model is next."
        assert re.fullmatch(f": Waiting for cold to load\\. cold has waited \\d+(ms|s) {re.escape(what)}\n+", said)
        first.close()
        assert (await client.chunk()).decode().rstrip().endswith("It is next."), "it moves up"
        own.close()

    run(scenario, loading_events=True, known=known)


@pytest.mark.parametrize("failure", ["start", "engine"])
def test_a_failure_after_a_promised_stream_is_an_error_event(run: Run, failure: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        go_on = asyncio.Event()

        async def start(request: Request, connection: Connection) -> None:
            await go_on.wait()
            if failure == "engine":
                rig.mark_ready("cold", rig.engine.port)
                await raw(b"HTTP/1.0 200 OK\r\n\r\n{}", then="close")(request, connection)
            await raw(FAILURE, then="close")(request, connection)

        rig.api.answer = start
        rig.engine.answer = whole(b'{"error": {"message": "too long"}}', status="400 Bad")
        client = await rig.client()
        await client.post(b'{"model": "cold", "stream": true}')
        await client.head()
        await client.chunk()
        go_on.set()
        last = b""
        while not last.startswith(b"data: "):
            last = await client.chunk()
        assert (b"too long" if failure == "engine" else b"CUDA error") in last
        assert await client.rest() == b""

    run(scenario, loading_events=True)


def test_only_clients_that_want_a_stream_are_promised_one(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = raw(FAILURE, then="close")
        client = await rig.client()
        assert (await client.ask(b'{"model": "cold"}')).status == 503

    run(scenario, loading_events=True)


def test_an_engine_that_is_gone_is_waited_for(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        """Its port refuses, and its lease says nothing of it yet."""
        client = await rig.client()
        await client.ask()
        await rig.engine.stop()

        async def start(request: Request, connection: Connection) -> None:
            await rig.engine.start()
            await raw(b"HTTP/1.0 200 OK\r\n\r\n{}", then="close")(request, connection)

        rig.api.answer = start
        assert (await client.ask()).status == 200

    run(scenario)


def test_draining_ends_idle_connections_and_lets_others_finish(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        go_on = asyncio.Event()

        async def script(request: Request, connection: Connection) -> None:
            await go_on.wait()
            await whole(b'{"last": true}')(request, connection)

        idle, busy = await rig.client(), await rig.client()
        assert (await idle.ask()).status == 200
        rig.engine.answer = script
        await busy.post(b'{"model": "qwen"}')
        await rig.eventually(lambda: bool(rig.is_used()))
        drained = asyncio.ensure_future(rig.gateway.drain())
        assert await idle.rest() == b""
        assert not drained.done()
        go_on.set()
        answer = await busy.answer()
        assert (answer.body, answer.headers["connection"]) == (b'{"last": true}', "close")
        await asyncio.wait_for(drained, 10)

    run(scenario)


def test_a_request_that_has_just_connected_is_served_while_draining(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        fresh = await rig.client()
        await rig.eventually(lambda: len(rig.gateway._connections) == 1)
        drained = asyncio.ensure_future(rig.gateway.drain())
        await asyncio.sleep(0)
        assert (await fresh.ask()).status == 200
        await asyncio.wait_for(drained, 10)

    run(scenario)
