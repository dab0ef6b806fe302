"""Ollama's API on the data path: keys, waits, limits, cancellation, back-pressure, keep_alive."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpusvc.config import keys
from gpusvc.config.keys import Keys
from tests.component.ollama_engine import WORDS, broken, endless, engine, stream_chat
from tests.component.rig import QUICK, Client, Rig, Run, make_keys, run
from tests.component.test_ollama_clients import api
from tests.component.upstream import STREAM, Connection, Request, Script, chunk, event, raw, silence, until_gone, whole

__all__ = ["run"]

MESSAGES = [{"role": "user", "content": "Well?"}]
FAILURE = b'{"error": {"message": "away did not start.", "code": "start", "log": ["CUDA error: out of memory"]}}'


def chat(model: str = "qwen", **more: object) -> bytes:
    return json.dumps({"model": model, "messages": MESSAGES, **more}).encode()


async def ask(client: Client, body: bytes, target: str = "/api/chat", more: str = "") -> tuple[int, Any]:
    """The status, and the last line of the answer."""
    answer = await client.ask(body, target, more)
    return answer.status, json.loads(answer.body.splitlines()[-1])


async def acts(rig: Rig) -> list[str]:
    """What the management API was asked to do."""
    return [request.target for request in rig.api.requests if request.method == "POST"]


def ready(rig: Rig, name: str) -> Script:
    """The API's answer to a start, which has made the model ready."""

    async def script(request: Request, connection: Connection) -> None:
        if request.target.endswith("/start?wait=request"):
            rig.mark_ready(name, rig.engine.port)
        await api(request, connection)

    return script


def test_nothing_of_ollama_is_imported_for_other_requests(run: Run) -> None:
    for name in [name for name in sys.modules if name.startswith("gpusvc.gateway.ollama")]:
        del sys.modules[name]

    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.ask()
        await client.get("/v1/models")
        assert not [name for name in sys.modules if name.startswith("gpusvc.gateway.ollama")]
        await client.get("/api/version")
        assert "gpusvc.gateway.ollama.exchange" in sys.modules

    run(scenario)


def test_other_paths_below_api_are_the_engines_as_before(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        assert (await client.ask(target="/api/v1/generate")).body == b'{"ok": true}'
        assert (await client.ask(target="/upstream/qwen/api/chat")).body == b'{"ok": true}'
        assert [request.target for request in rig.engine.requests] == ["/api/v1/generate", "/api/chat"]

    run(scenario)


def test_the_root_says_at_its_own_port_alone_that_it_runs(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(rig.gateway.ollama_protocol, "127.0.0.1", 0)
        usual, rig.port = rig.port, server.sockets[0].getsockname()[1]
        client = await rig.client()
        answer = await client.get("/")
        assert (answer.status, answer.body) == (200, b"Ollama is running")
        assert (await client.get("/", method="HEAD")).status == 200
        assert (await client.ask()).body == b'{"ok": true}'
        rig.engine.answer = engine
        assert (await ask(client, chat(stream=False)))[1]["message"]["content"] == "To Well?"
        rig.port = usual
        rig.api.answer = whole(b"page")
        assert (await (await rig.client()).get("/")).body == b"page"
        server.close()

    run(scenario)


def test_a_body_in_pieces_is_read_to_its_end(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = engine
        client = await rig.client()
        body = chat(stream=False, images="x" * 1_000_000)
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        await client.say(head.encode(), *(body[at : at + 100_000] for at in range(0, len(body), 100_000)))
        assert json.loads((await client.answer()).body)["message"]["content"] == "To Well?"
        await client.say(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        body = chat(stream=False)
        await client.say(chunk(body[:9]), chunk(body[9:]), b"0\r\n\r\n")
        assert (await client.answer()).status == 200
        # On the same connection, one after the other, and two at once.
        await client.post(chat(stream=False), "/api/chat")
        await client.post(chat(stream=False), "/api/chat")
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]

    run(scenario)


def test_large_images_count_in_the_memory_of_all_bodies_until_they_are_sent(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = silence
        rig.run_model("full", rig.engine.port, "concurrency = 1\n")
        budget = rig.gateway._shared.budget
        clients = [await rig.client() for _ in range(3)]
        image = "iVBORw0KGgo" + "A" * 3_000_000
        body = json.dumps({"model": "full", "prompt": "What?", "images": [image]}).encode()
        for client in clients:
            await client.post(body, "/api/generate")
        await rig.eventually(lambda: len(rig.engine.requests) == 1 and rig.totals("full").waiting == 2)
        assert budget.held_bytes <= 1_000_000
        (request,) = rig.engine.requests
        assert request.json()["messages"][0]["content"][1]["image_url"]["url"].endswith(image)  # type: ignore[index]
        for client in clients:
            client.close()
        await rig.eventually(lambda: budget.held_bytes == 0)

    run(scenario, limits=replace(QUICK, held_bytes=1_000_000))


def test_a_type_that_curl_sends_by_itself_is_json_all_the_same(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = engine
        client = await rig.client()
        body = chat(stream=False)
        head = "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        await client.say(f"{head}Accept-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert (await client.answer()).status == 200
        (request,) = rig.engine.requests
        assert request.headers["content-type"] == "application/json"
        assert "accept-encoding" not in request.headers

    run(scenario)


def test_a_body_that_is_too_long_is_refused_in_ollamas_form(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4096\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, "larger than" in json.loads(answer.body)["error"]) == (413, True)
        assert await client.hangs_up()

    run(scenario, max_body_bytes=2048)


def test_a_malformed_head_is_refused_in_ollamas_form(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        await client.say(b"POST /api/chat HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, type(json.loads(answer.body)["error"])) == (400, str)

    run(scenario)


def test_pages_of_other_sites_may_not_use_it(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        client = await rig.client()
        assert (await client.get("/api/tags", "Origin: https://evil.example\r\n")).status == 403
        granted = await client.get("/api/tags", "Origin: https://chat.example\r\n")
        assert granted.headers["access-control-allow-origin"] == "https://chat.example"
        asked = "Origin: https://chat.example\r\nAccess-Control-Request-Method: POST\r\n"
        assert (await client.get("/api/chat", asked, "OPTIONS")).status == 204
        rig.engine.answer = engine
        answer = await client.ask(chat(), "/api/chat", "Origin: https://chat.example\r\n")
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"

    run(scenario, cors_origins=("https://chat.example",))


def test_a_key_sees_and_uses_its_models_alone(run: Run, tmp_path: Path) -> None:
    known, secrets = make_keys(tmp_path, ours=("qwen",))

    async def scenario(rig: Rig) -> None:
        rig.engine.answer, rig.api.answer = engine, api
        rig.run_model("other", rig.engine.port)
        client = await rig.client()
        more = f"Authorization: Bearer {secrets['ours']}\r\n"
        listed = json.loads((await client.get("/api/tags", more)).body)["models"]
        assert [one["name"] for one in listed] == ["qwen:latest"]
        assert (await ask(client, chat("other"), more=more))[0] == 404
        assert (await ask(client, b'{"model": "other"}', "/api/show", more))[0] == 404
        assert (await ask(client, b'{"model": "other"}', "/api/generate", more))[0] == 404
        assert (await ask(client, chat(), more=more))[0] == 200
        # Without a key not even its body is read.
        await client.say(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4096\r\n\r\n")
        assert (await client.answer()).status == 401

    run(scenario, known=known)


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("/api/generate", {"model": "qwen", "prompt": "x" * (1 << 20), "suffix": "y", "stream": False}),
        ("/api/show", {"model": "qwen", "more": "x" * (1 << 20)}),
    ],
)
def test_a_body_that_is_held_for_the_whole_request_may_be_a_mebibyte(
    run: Run, target: str, asked: dict[str, object]
) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer, rig.api.answer = engine, api
        client = await rig.client()
        assert (await ask(client, json.dumps(asked).encode(), target))[0] == 413
        assert not rig.engine.requests

    run(scenario)


# --- keep_alive.


@pytest.mark.parametrize(
    ("value", "done"),
    [
        (-1, ["/gpusvc/models/qwen/keep?idle=never"]),
        ("10m", ["/gpusvc/models/qwen/keep?idle=600s"]),
        (1.2, ["/gpusvc/models/qwen/keep?idle=2s"]),
        (0, ["/gpusvc/models/qwen/evict?wait=0s"]),
        (None, []),
    ],
)
def test_keep_alive_is_done_after_the_answer(run: Run, value: object, done: list[str]) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer, rig.api.answer = engine, api
        client = await rig.client()
        assert (await ask(client, chat("qwen:latest", keep_alive=value)))[0] == 200
        await rig.eventually(lambda: len(rig.api.requests) == len(done))
        assert await acts(rig) == done

    run(scenario)


def test_a_model_in_use_is_unloaded_when_it_is_idle(run: Run) -> None:
    async def in_use(request: Request, connection: Connection) -> None:
        if "/evict" in request.target:
            answer = b'{"error": {"message": "qwen is in use.", "code": "in_use"}}'
            await whole(answer, status="409 Conflict")(request, connection)
            connection.writer.close()
            raise ConnectionAbortedError
        await api(request, connection)

    async def scenario(rig: Rig) -> None:
        rig.api.answer = in_use
        status, answer = await ask(await rig.client(), b'{"model": "qwen", "keep_alive": 0}', "/api/generate")
        assert (status, answer["done_reason"]) == (200, "unload")
        assert await acts(rig) == ["/gpusvc/models/qwen/evict?wait=0s", "/gpusvc/models/qwen/keep?idle=0s"]

    run(scenario)


def test_a_model_that_is_pinned_or_kept_is_not_unloaded(run: Run) -> None:
    async def pinned(request: Request, connection: Connection) -> None:
        answer = b'{"error": {"message": "qwen is pinned.", "code": "pinned"}}'
        await whole(answer, status="409 Conflict")(request, connection)
        connection.writer.close()
        raise ConnectionAbortedError

    async def scenario(rig: Rig) -> None:
        rig.api.answer = pinned
        rig.run_model("kept", rig.engine.port, "keep = true\n")
        client = await rig.client()
        assert await ask(client, b'{"model": "qwen", "keep_alive": 0}', "/api/generate") == (
            409,
            {"error": "qwen is pinned."},
        )
        assert (await ask(client, b'{"model": "kept", "keep_alive": 0}', "/api/chat"))[0] == 409
        assert len(rig.api.requests) == 1

    run(scenario)


def test_without_the_right_keep_alive_has_no_effect_and_an_unload_is_refused(run: Run, tmp_path: Path) -> None:
    user, secret = keys.make("user")
    admin, of_admin = keys.make("admin", rights=tuple(keys.Right))
    file = tmp_path / "keys.toml"
    file.write_text(keys.text([user, admin]))

    async def scenario(rig: Rig) -> None:
        rig.engine.answer, rig.api.answer = engine, api
        client = await rig.client()
        more = f"Authorization: Bearer {secret}\r\n"
        answer = await client.ask(chat(keep_alive=-1, options={"num_ctx": 1}), "/api/chat", more)
        assert (answer.status, answer.headers["x-gpusvc-ignored"]) == (200, "num_ctx, keep_alive")
        assert (await ask(client, b'{"model": "qwen", "keep_alive": 0}', "/api/chat", more))[0] == 403
        assert rig.api.requests == []
        more = f"Authorization: Bearer {of_admin}\r\n"
        assert (await ask(client, b'{"model": "qwen", "keep_alive": 0}', "/api/chat", more))[0] == 200
        assert rig.api.requests[0].headers["x-gpusvc-key"] == "admin"

    run(scenario, known=Keys.read([file]))


# --- Models that have to be loaded.


def test_a_request_without_a_prompt_loads_its_model(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = ready(rig, "cold")
        client = await rig.client()
        status, answer = await ask(client, b'{"model": "cold", "keep_alive": "1h"}', "/api/generate")
        assert (status, answer["done_reason"], answer["response"]) == (200, "load", "")
        assert await acts(rig) == ["/gpusvc/models/cold/start?wait=request", "/gpusvc/models/cold/keep?idle=3600s"]
        assert rig.engine.requests == []
        assert rig.is_used("cold") is False

    run(scenario)


def test_the_wait_for_a_model_is_its_load_duration(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.engine.answer = engine
        gate = asyncio.Event()

        async def slow(request: Request, connection: Connection) -> None:
            await gate.wait()
            await ready(rig, "cold")(request, connection)

        rig.api.answer = slow
        client = await rig.client()
        await client.post(chat("cold"), "/api/chat")
        await rig.eventually(lambda: bool(rig.api.requests))
        before = asyncio.get_running_loop().time()
        await rig.eventually(lambda: asyncio.get_running_loop().time() > before + 0.05)
        gate.set()
        last = json.loads((await client.answer()).body.splitlines()[-1])
        assert 50_000_000 < last["load_duration"] < last["total_duration"]

    run(scenario)


@pytest.mark.parametrize("loading_events", [False, True])
def test_a_start_that_fails_is_told_in_words(run: Run, loading_events: bool) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("away")
        head = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 20\r\n\r\n"
        rig.api.answer = raw(head + FAILURE, then="close")
        answer = await (await rig.client()).ask(chat("away"), "/api/chat")
        assert "away did not start" in json.loads(answer.body)["error"]
        assert answer.headers["content-type"] == "application/json"
        assert answer.status == (502 if loading_events else 503)
        assert loading_events or answer.headers["retry-after"] == "20"

    run(scenario, loading_events=loading_events)


def test_a_client_that_leaves_takes_its_request_along(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.add_model("cold")
        rig.api.answer = rig.engine.answer = silence
        waiting, loading, served = await rig.client(), await rig.client(), await rig.client()
        await waiting.post(chat("cold"), "/api/chat")
        await loading.post(b'{"model": "cold"}', "/api/generate")
        await served.post(chat(), "/api/chat")
        await rig.eventually(lambda: len(rig.engine.requests) == 1 and rig.totals("cold").waiting == 2)
        for client in (waiting, loading, served):
            client.close()
        await rig.eventually(lambda: rig.engine.cancelled == 1 and rig.api.cancelled == 1)
        await rig.eventually(lambda: not rig.is_used() and rig.totals("cold").waiting == 0)

    run(scenario)


def test_a_client_that_leaves_in_the_middle_of_a_stream_is_noticed(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = until_gone
        client = await rig.client()
        await client.post(chat(), "/api/chat")
        await client.head()
        assert json.loads(await client.chunk())["message"]["content"] == "one"
        client.close()
        await rig.eventually(lambda: rig.engine.cancelled == 1 and rig.is_used() is False)

    run(scenario)


def test_an_engine_is_read_no_faster_than_its_client_reads(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        sent = 0

        async def counting(request: Request, connection: Connection) -> None:
            nonlocal sent
            await connection.say(STREAM)
            data = chunk(event("word " * 10_000))
            while True:
                await connection.say(data)
                sent += len(data)

        rig.engine.answer = counting
        client = await rig.client()
        client.stop_reading()
        await client.post(chat(), "/api/chat")
        seen = -1

        def stands() -> bool:
            nonlocal seen
            before, seen = seen, sent
            return before == sent > 0

        for _ in range(5):
            await rig.eventually(stands)
        assert sent < 60_000_000
        client.go_on_reading()
        held = sent
        await client.head()
        for _ in range(40):
            await client.chunk()
        await rig.eventually(lambda: sent > held)
        client.reset()
        await rig.eventually(lambda: rig.engine.cancelled == 1)

    run(scenario)


def test_a_full_model_turns_away_in_ollamas_form(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.run_model("full", rig.engine.port, "concurrency = 1\n")
        rig.engine.answer = silence
        for _ in range(2):
            await (await rig.client()).post(chat("full"), "/api/chat")
        await rig.eventually(lambda: len(rig.engine.requests) == 1 and rig.totals("full").waiting == 1)
        second = await rig.client()
        answer = await second.ask(chat("full"), "/api/chat")
        assert (answer.status, "retry-after" in answer.headers) == (429, True)
        # What is loaded needs no slot to be loaded.
        assert (await ask(second, b'{"model": "full"}', "/api/generate"))[1]["done_reason"] == "load"

    run(scenario, max_waiting=1)


def test_the_models_own_changes_of_requests_apply(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.run_model("named", rig.engine.port, 'served_name = "inner"\n[filter]\nset = { temperature = 0.5 }\n')
        rig.engine.answer = engine
        assert (await ask(await rig.client(), chat("named:latest", options={"temperature": 1})))[0] == 200
        sent: Any = rig.engine.requests[0].json()
        assert (sent["model"], sent["temperature"]) == ("inner", 0.5)

    run(scenario)


# --- Engines that do not as they should.


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (raw(STREAM + chunk(b'data: {"error": {"message": "it broke"}}\n\n') + b"0\r\n\r\n"), "it broke"),
        (raw(STREAM + chunk(b"data: nonsense\n\n") + b"0\r\n\r\n"), "not a JSON object"),
        (whole(b"[]"), "not a JSON object"),
        (whole(b"<html>", status="500 Internal Server Error"), "status 500"),
        (whole(b"", status="302 Found", more="Location: /\r\n"), "status 302"),
        (
            raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nContent-Type: application/json\r\n\r\n{", then="close"),
            "answer of qwen ends",
        ),
    ],
)
def test_an_engine_that_fails_before_the_first_word_is_a_status(run: Run, script: Script, said: str) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = script
        status, answer = await ask(await rig.client(), chat())
        assert (status >= 500, said in answer["error"]) == (True, True), answer

    run(scenario)


def test_an_engine_that_fails_after_it_ends_the_stream_with_an_error_and_no_clean_end(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = broken
        client = await rig.client()
        await client.post(chat(), "/api/chat")
        await client.head()
        assert json.loads(await client.chunk())["done"] is False
        assert "in the middle of its response" in json.loads(await client.chunk())["error"]
        assert await client.rest() == b""

    run(scenario)


def test_an_engine_that_does_not_stream_is_one_line(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = whole(b'{"choices": [{"message": {"content": "All"}, "finish_reason": "stop"}]}')
        answer = await (await rig.client()).ask(chat(), "/api/chat")
        (line,) = answer.body.splitlines()
        assert (json.loads(line)["message"]["content"], json.loads(line)["done"]) == ("All", True)

    run(scenario)


def test_an_answer_without_an_end_is_given_up(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        async def huge(request: Request, connection: Connection) -> None:
            await connection.say(STREAM)
            while True:
                await connection.say(chunk(b"data: " + b"x" * 100_000 + b"\n"))

        rig.engine.answer = huge
        status, answer = await ask(await rig.client(), chat())
        assert (status, "event without an end" in answer["error"]) == (502, True)
        await rig.eventually(lambda: rig.engine.cancelled == 1)

    run(scenario)


def test_http_1_0_gets_its_stream_until_the_end_of_the_connection(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = stream_chat
        client = await rig.client()
        await client.post(chat(), "/api/chat", version="1.0")
        await client.head()
        lines = [json.loads(line) for line in (await client.rest()).splitlines()]
        assert [line["message"]["content"] for line in lines] == [*WORDS, ""]

    run(scenario)


def test_a_silent_engine_is_given_up_after_the_upstream_timeout(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = silence
        status, answer = await ask(await rig.client(), chat())
        assert (status, "sent nothing" in answer["error"]) == (504, True)

    run(scenario, limits=replace(QUICK, sweep_seconds=0.02), upstream_timeout_seconds=0.1)


def test_many_clients_stream_at_once(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer = endless
        clients = [await rig.client() for _ in range(20)]
        for client in clients:
            await client.post(chat(), "/api/chat")
        for client in clients:
            await client.head()
            assert json.loads(await client.chunk())["done"] is False
            client.reset()
        await rig.eventually(lambda: rig.engine.cancelled == 20 and rig.is_used() is False)

    run(scenario)
