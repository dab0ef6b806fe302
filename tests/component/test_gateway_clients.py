"""The gateway as programs see it that were written for others: the packages openai and anthropic, of Python and npm."""

from __future__ import annotations

import array
import asyncio
import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.component import node
from tests.component.rig import Rig, Run, make_keys, run
from tests.component.upstream import STREAM, Connection, Request, Script, chunk, raw, silence, whole

__all__ = ["run"]

# The gateway is the same on both loops; what these clients need to know of it does not depend on that.
pytestmark = pytest.mark.parametrize("run", ["uvloop"], indirect=True)

MEGABYTES = 50_000_000
MESSAGES: list[Any] = [{"role": "user", "content": "Well?"}]
PARAMETERS: dict[str, object] = {"type": "object", "properties": {"city": {"type": "string"}}}
WORDS = ["All", " is", " well."]
VECTOR = [0.5, -2.0, 0.25]

FAILURE = b'{"error": {"message": "away did not start.", "code": "start", "log": ["CUDA error: out of memory"]}}'

# The API's answer to a start is what comes until the connection ends.
not_started = raw(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 20\r\n\r\n" + FAILURE, then="close")


# --- An engine that knows both APIs.


async def engine(request: Request, connection: Connection) -> None:
    """Answers as engines do; what it was asked is in the answer, where that is of interest."""
    match request.target:
        case "/v1/audio/transcriptions":
            await _say(request, connection, {"text": hashlib.sha256(_file_in(request)).hexdigest()})
        case "/v1/embeddings":
            await _say(request, connection, _embedding(request.json()))
        case "/v1/chat/completions":
            await _chat(request, connection, request.json())
        case "/v1/messages":
            await _message(request, connection, request.json())
        case "/v1/messages/count_tokens":
            await _say(request, connection, {"input_tokens": 7})
        case _:
            await whole(b"{}", status="404 Not Found")(request, connection)


async def _chat(request: Request, connection: Connection, asked: dict[str, Any]) -> None:
    base = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
    if asked.get("stream"):
        parts = [{"delta": {"content": word}, "index": 0, "finish_reason": None} for word in WORDS]
        events = [{**base, "object": "chat.completion.chunk", "choices": [part]} for part in parts]
        data = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
        await connection.say(STREAM, *map(chunk, [*data, b"data: [DONE]\n\n"]), b"0\r\n\r\n")
        return
    message: dict[str, Any] = {"role": "assistant", "content": f"{len(asked['messages'][0]['content'])} letters"}
    if "tools" in asked:
        function = {"name": asked["tools"][0]["function"]["name"], "arguments": '{"city":"Ulm"}'}
        message |= {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    await _say(request, connection, {**base, "object": "chat.completion", "choices": [choice], "usage": usage})


async def _message(request: Request, connection: Connection, asked: dict[str, Any]) -> None:
    usage = {"input_tokens": 3, "output_tokens": 4}
    message: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "model": asked["model"]}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": usage, "content": []}
    if not asked.get("stream"):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"{len(asked['messages'][0]['content'])} letters"}]
        if "tools" in asked:
            content = [{"type": "tool_use", "id": "1", "name": asked["tools"][0]["name"], "input": {"city": "Ulm"}}]
        await _say(request, connection, {**message, "stop_reason": "end_turn", "content": content})
        return
    deltas = [{"type": "text_delta", "text": word} for word in WORDS]
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    data = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
    await connection.say(STREAM, *map(chunk, data), b"0\r\n\r\n")


async def broken(_: Request, connection: Connection) -> None:
    """Dies in the middle of a stream, when the client has read what there was of it."""
    event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "broken"}
    choice = {"index": 0, "delta": {"content": "All"}, "finish_reason": None}
    await connection.say(STREAM, chunk(b"data: " + json.dumps({**event, "choices": [choice]}).encode() + b"\n\n"))
    connection.writer.close()
    raise ConnectionAbortedError


async def _say(request: Request, connection: Connection, value: object) -> None:
    await whole(json.dumps(value).encode())(request, connection)


def _embedding(asked: dict[str, Any]) -> object:
    vector = base64.b64encode(array.array("f", VECTOR).tobytes()).decode()
    data = {"object": "embedding", "index": 0, "embedding": vector if asked.get("encoding_format") else VECTOR}
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    return {"object": "list", "data": [data], "model": asked["model"], "usage": usage}


def names_model_last(request: Request) -> bool:
    return request.body.endswith(b'"model":"qwen"}')


def _file_in(request: Request) -> bytes:
    """The field "file" of a form."""
    boundary = request.headers["content-type"].partition("boundary=")[2].strip('"').encode()
    for part in request.body.split(b"--" + boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content.removesuffix(b"\r\n")
    raise AssertionError("There is no file.")


# --- Clients.


def of_openai(rig: Rig, key: str = "none", *, retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{rig.port}/v1", api_key=key, max_retries=retries)


def of_anthropic(rig: Rig, key: str = "none", *, retries: int = 0) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{rig.port}", api_key=key, max_retries=retries)


OpenAIScenario = Callable[[Rig, openai.AsyncOpenAI], Coroutine[Any, Any, None]]
AnthropicScenario = Callable[[Rig, anthropic.AsyncAnthropic], Coroutine[Any, Any, None]]


def as_openai(scenario: OpenAIScenario, script: Script = engine) -> Callable[[Rig], Coroutine[Any, Any, None]]:
    async def played(rig: Rig) -> None:
        rig.engine.answer = script
        async with of_openai(rig) as client:
            await scenario(rig, client)

    return played


def as_anthropic(scenario: AnthropicScenario, script: Script = engine) -> Callable[[Rig], Coroutine[Any, Any, None]]:
    async def played(rig: Rig) -> None:
        rig.engine.answer = script
        async with of_anthropic(rig) as client:
            await scenario(rig, client)

    return played


async def occupied(rig: Rig) -> None:
    """Have the only slot of the model "full" taken, and the only place in line for it."""
    rig.run_model("full", rig.engine.port, "concurrency = 1\n")
    rig.engine.answer = silence
    for _ in range(2):
        client = await rig.client()
        await client.post(b'{"model": "full"}')
    await rig.eventually(lambda: rig.totals("full").waiting == 1 and len(rig.engine.requests) == 1)
    rig.engine.answer = engine


# --- openai


def test_openai_chats(run: Run) -> None:
    async def scenario(rig: Rig, client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model="qwen", messages=MESSAGES)
        assert answer.choices[0].message.content == "5 letters"
        assert answer.usage is not None
        assert answer.usage.total_tokens == 7
        assert (rig.totals().prompt_tokens, rig.totals().completion_tokens) == (3, 4)

    run(as_openai(scenario))


def test_openai_streams(run: Run) -> None:
    async def scenario(_: Rig, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="qwen", messages=MESSAGES, stream=True)
        assert [part.choices[0].delta.content async for part in stream] == WORDS

    run(as_openai(scenario))


def test_openai_has_tools_called(run: Run) -> None:
    async def scenario(rig: Rig, client: openai.AsyncOpenAI) -> None:
        tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
        answer = await client.chat.completions.create(model="qwen", messages=MESSAGES, tools=tools)
        calls: list[Any] = answer.choices[0].message.tool_calls or []
        assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", '{"city":"Ulm"}')]
        assert rig.engine.requests[0].json()["tools"] == tools

    run(as_openai(scenario))


def test_openai_embeds(run: Run) -> None:
    async def scenario(_: Rig, client: openai.AsyncOpenAI) -> None:
        answer = await client.embeddings.create(model="qwen", input="Well?")
        assert answer.data[0].embedding == VECTOR

    run(as_openai(scenario))


def test_openai_transcribes_a_file_of_audio(run: Run) -> None:
    async def scenario(_: Rig, client: openai.AsyncOpenAI) -> None:
        audio = b"sound" * 600_000
        answer = await client.audio.transcriptions.create(model="qwen", file=("a.wav", audio))
        assert answer.text == hashlib.sha256(audio).hexdigest()

    run(as_openai(scenario))


def test_openai_lists_all_models_whether_they_run_or_not(run: Run) -> None:
    async def scenario(rig: Rig, client: openai.AsyncOpenAI) -> None:
        rig.add_model("away", 'aliases = ["org/away"]\n')
        assert [model.id async for model in client.models.list()] == ["away", "org/away", "qwen"]
        assert (await client.models.retrieve("org/away")).owned_by == "gpusvc"

    run(as_openai(scenario))


def test_openai_is_told_of_a_model_that_there_is_not(run: Run) -> None:
    async def scenario(_: Rig, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match=r"qwem.*qwen") as caught:
            await client.chat.completions.create(model="qwem", messages=MESSAGES)
        assert caught.value.code == "model_not_found"

    run(as_openai(scenario))


def test_openai_is_told_of_a_key_that_is_none(run: Run, tmp_path: Path) -> None:
    known, secrets = make_keys(tmp_path, ours=(), other=("other",))

    async def scenario(rig: Rig) -> None:
        rig.engine.answer = engine
        async with of_openai(rig, secrets["ours"]) as client:
            await client.chat.completions.create(model="qwen", messages=MESSAGES)
        async with of_openai(rig, "sk-nothing") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="qwen", messages=MESSAGES)
        async with of_openai(rig, secrets["other"]) as client:
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="qwen", messages=MESSAGES)

    run(scenario, known=known)


def test_openai_is_told_when_to_come_again_to_a_model_with_too_many_requests(run: Run) -> None:
    async def scenario(rig: Rig, client: openai.AsyncOpenAI) -> None:
        await occupied(rig)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="full", messages=MESSAGES)
        assert int(caught.value.response.headers["retry-after"]) >= 1

    run(as_openai(scenario), max_waiting=1)


def test_openai_comes_again_by_itself_when_an_engine_says_so(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        async def busy(request: Request, connection: Connection) -> None:
            rig.engine.answer = engine
            await whole(b"{}", status="429 Too Many Requests", more="Retry-After-Ms: 1\r\n")(request, connection)

        rig.engine.answer = busy
        async with of_openai(rig, retries=1) as client:
            answer = await client.chat.completions.create(model="qwen", messages=MESSAGES)
        assert answer.choices[0].message.content == "5 letters"
        assert len(rig.engine.requests) == 2

    run(scenario)


def test_openai_is_told_why_a_model_did_not_start(run: Run) -> None:
    async def scenario(rig: Rig, client: openai.AsyncOpenAI) -> None:
        rig.add_model("away")
        rig.api.answer = not_started
        with pytest.raises(openai.InternalServerError, match="CUDA error: out of memory") as caught:
            await client.chat.completions.create(model="away", messages=MESSAGES)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "20"

    run(as_openai(scenario))


def test_openai_learns_of_an_engine_that_dies_in_the_middle_of_a_stream(run: Run) -> None:
    async def scenario(_: Rig, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="qwen", messages=MESSAGES, stream=True)
        assert (await anext(stream)).choices[0].delta.content == "All"
        with pytest.raises(openai.APIError, match="in the middle of its response"):
            await anext(stream)

    run(as_openai(scenario, broken))


def test_openai_sends_fifty_megabytes_before_the_models_name(run: Run) -> None:
    async def scenario(rig: Rig, client: openai.AsyncOpenAI) -> None:
        body = {"messages": [{"role": "user", "content": "x" * MEGABYTES}], "model": "qwen"}
        answer = await client.post("/chat/completions", body=body, cast_to=ChatCompletion)
        assert answer.choices[0].message.content == f"{MEGABYTES} letters"
        assert names_model_last(rig.engine.requests[0])

    run(as_openai(scenario))


# --- anthropic


def test_anthropic_talks(run: Run) -> None:
    async def scenario(rig: Rig, client: anthropic.AsyncAnthropic) -> None:
        answer = await client.messages.create(model="qwen", max_tokens=9, messages=MESSAGES)
        assert answer.content[0].type == "text"
        assert answer.content[0].text == "5 letters"
        assert (rig.totals().prompt_tokens, rig.totals().completion_tokens) == (3, 4)

    run(as_anthropic(scenario))


def test_anthropic_streams(run: Run) -> None:
    async def scenario(_: Rig, client: anthropic.AsyncAnthropic) -> None:
        async with client.messages.stream(model="qwen", max_tokens=9, messages=MESSAGES) as stream:
            assert [text async for text in stream.text_stream] == WORDS
            assert (await stream.get_final_message()).stop_reason == "end_turn"

    run(as_anthropic(scenario))


def test_anthropic_has_tools_called_and_tokens_counted(run: Run) -> None:
    async def scenario(_: Rig, client: anthropic.AsyncAnthropic) -> None:
        tools: list[Any] = [{"name": "weather", "input_schema": PARAMETERS}]
        answer = await client.messages.create(model="qwen", max_tokens=9, messages=MESSAGES, tools=tools)
        assert answer.content[0].type == "tool_use"
        assert answer.content[0].input == {"city": "Ulm"}
        assert (await client.messages.count_tokens(model="qwen", messages=MESSAGES)).input_tokens == 7

    run(as_anthropic(scenario))


def test_anthropic_lists_models(run: Run) -> None:
    async def scenario(_: Rig, client: anthropic.AsyncAnthropic) -> None:
        assert [model.id async for model in client.models.list()] == ["qwen"]

    run(as_anthropic(scenario))


def test_anthropic_is_told_what_went_wrong_in_its_own_form(run: Run, tmp_path: Path) -> None:
    known, secrets = make_keys(tmp_path, ours=())

    async def scenario(rig: Rig) -> None:
        async def fails(model: str, key: str = secrets["ours"]) -> anthropic.APIStatusError:
            async with of_anthropic(rig, key) as client:
                with pytest.raises(anthropic.APIStatusError) as caught:
                    await client.messages.create(model=model, max_tokens=9, messages=MESSAGES)
            assert isinstance(caught.value.body, dict)
            assert caught.value.body["type"] == "error"
            return caught.value

        rig.add_model("away")
        rig.api.answer = not_started
        assert isinstance(await fails("qwem"), anthropic.NotFoundError)
        assert isinstance(await fails("qwen", "no"), anthropic.AuthenticationError)
        assert "away did not start" in str(await fails("away"))

    run(scenario, known=known)


def test_anthropic_learns_of_an_engine_that_dies_in_the_middle_of_a_stream(run: Run) -> None:
    async def scenario(_: Rig, client: anthropic.AsyncAnthropic) -> None:
        stream = await client.messages.create(model="qwen", max_tokens=9, messages=MESSAGES, stream=True)
        with pytest.raises(anthropic.APIError, match="in the middle of its response"):
            await anext(stream)

    run(as_anthropic(scenario, broken))


# --- openai of npm


def test_openai_of_npm_finds_all_as_it_expects(run: Run, tmp_path: Path) -> None:
    program, packages = node.ensure()
    known, secrets = make_keys(tmp_path, ours=())
    # Packages are looked for beside the script, and above.
    script = tmp_path / "client.mjs"
    shutil.copy(Path(__file__).with_name("client.mjs"), script)
    (tmp_path / "node_modules").symlink_to(packages / "node_modules")

    async def scenario(rig: Rig) -> None:
        rig.run_model("full", rig.engine.port)
        rig.run_model("broken", rig.engine.port)
        rig.add_model("away")
        rig.api.answer = not_started

        async def answer(request: Request, connection: Connection) -> None:
            if b'"model":"broken"' in request.body[:100]:
                await broken(request, connection)
            elif b'"model":"full"' in request.body[:100]:
                await whole(b"{}", status="429 Too Many Requests", more="Retry-After: 7\r\n")(request, connection)
            else:
                await engine(request, connection)

        rig.engine.answer = answer
        process = await asyncio.create_subprocess_exec(
            program,
            script,
            f"http://127.0.0.1:{rig.port}",
            secrets["ours"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        said, complaints = await process.communicate()
        assert process.returncode == 0, complaints.decode()
        assert any(len(request.body) > MEGABYTES and names_model_last(request) for request in rig.engine.requests)
        assert json.loads(said) == {
            "chat": "5 letters",
            "stream": WORDS,
            "tool": {"name": "weather", "arguments": '{"city":"Ulm"}'},
            "embedding": VECTOR,
            "audio": True,
            "models": ["away", "broken", "full", "qwen"],
            "long": f"{MEGABYTES} letters",
            "unknown": ["NotFoundError", 404, "model_not_found", None],
            "stranger": ["AuthenticationError", 401, "invalid_api_key", None],
            "away": ["InternalServerError", 503, "start", "20"],
            "full": ["RateLimitError", 429, None, "7"],
            "broken": ["APIError", None, "engine_lost", None],
        }

    run(scenario, known=known)
