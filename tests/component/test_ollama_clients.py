"""Ollama's API at the gateway as its clients use it: its own packages of Python and npm, Home Assistant, Open WebUI."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import ollama
import pytest

from tests.component import node
from tests.component.ollama_engine import USAGE, VECTOR, WORDS, broken, endless, engine
from tests.component.rig import Rig, Run, make_keys, run
from tests.component.upstream import Connection, Request, whole

__all__ = ["run"]

# The gateway is the same on both loops; what these clients need to know of it does not depend on that.
pytestmark = pytest.mark.parametrize("run", ["uvloop"], indirect=True)

MESSAGES = [{"role": "user", "content": "Well?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "It.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PNG = b"\x89PNG\r\n\x1a\n"
WEIGHTS = [
    {"name": "qwen", "format": "gguf", "architecture": "qwen3", "size_bytes": 5_000_000_000, "parameters": "8B",
     "quantisation": "Q4_K_M", "context": 32768, "capabilities": ["completion", "tools"]},
]  # fmt: skip
MODELS = [{"name": "qwen", "in_use": False, "last_use": "2023-11-14T22:13:20+00:00", "idle_timeout_seconds": 300.0}]


async def api(request: Request, connection: Connection) -> None:
    """The management API, as far as it is asked."""
    found: Any = {"/gpusvc/weights": WEIGHTS, "/gpusvc/models": MODELS}.get(request.target, {})
    await whole(json.dumps(found).encode(), more="Connection: close\r\n")(request, connection)
    connection.writer.close()
    raise ConnectionAbortedError


Scenario = Callable[[Rig, ollama.AsyncClient], Coroutine[Any, Any, None]]


def of_python(rig: Rig, key: str | None = None) -> ollama.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"} if key else None
    return ollama.AsyncClient(host=f"http://127.0.0.1:{rig.port}", headers=headers)


def with_python(scenario: Scenario) -> Callable[[Rig], Coroutine[Any, Any, None]]:
    async def played(rig: Rig) -> None:
        rig.engine.answer, rig.api.answer = engine, api
        async with of_python(rig) as client:
            await scenario(rig, client)

    return played


def asked(rig: Rig, position: int = -1) -> dict[str, Any]:
    """What the engine was asked."""
    return rig.engine.requests[position].json()


# --- The package of Python.


def test_a_chat_streams_word_by_word_with_counts_and_durations(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        parts = [part async for part in await client.chat("qwen", MESSAGES, stream=True)]
        assert [part.message.content for part in parts] == [*WORDS, ""]
        last = parts[-1]
        assert (last.done, last.done_reason, last.model) == (True, "stop", "qwen")
        assert (last.prompt_eval_count, last.eval_count) == (USAGE["prompt_tokens"], USAGE["completion_tokens"])
        assert (last.prompt_eval_duration, last.eval_duration) == (130_000_000, 4_232_000_000)
        assert last.total_duration is not None
        assert last.load_duration is not None
        assert 0 < last.load_duration <= last.total_duration
        assert rig.totals("qwen").prompt_tokens == USAGE["prompt_tokens"]
        assert rig.is_used() is False

    run(with_python(scenario))


def test_a_chat_comes_whole_under_either_name(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        for name in ("qwen", "qwen:latest", "Qwen"):
            answer = await client.chat(name, MESSAGES, options={"temperature": 0, "num_ctx": 4096, "num_predict": 5})
            assert (answer.message.content, answer.model) == ("To Well?", name)
            assert asked(rig)["model"] == "qwen"
        assert asked(rig)["max_tokens"] == 5

    run(with_python(scenario))


def test_tools_are_called_and_answered(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        messages: list[Any] = list(MESSAGES)
        parts = [part async for part in await client.chat("qwen", messages, tools=[TOOL], stream=True)]
        (call,) = [call for part in parts for call in part.message.tool_calls or ()]
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Ulm"})
        messages += [parts[0].message, {"role": "tool", "tool_name": "weather", "content": "11 degrees"}]
        answer = [part async for part in await client.chat("qwen", messages, tools=[TOOL], stream=True)]
        assert "".join(part.message.content or "" for part in answer) == "".join(WORDS)
        sent = asked(rig)["messages"]
        assert sent[1]["tool_calls"][0]["function"]["arguments"] == '{"city":"Ulm"}'
        assert sent[2]["tool_call_id"] == sent[1]["tool_calls"][0]["id"]

    run(with_python(scenario))


def test_thinking_comes_apart_from_the_answer(run: Run) -> None:
    async def scenario(_: Rig, client: ollama.AsyncClient) -> None:
        parts = [part async for part in await client.chat("qwen", MESSAGES, think=True, stream=True)]
        assert "".join(part.message.thinking or "" for part in parts) == "Hm."

    run(with_python(scenario))


def test_images_and_schemas_reach_the_engine(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        answer = await client.chat("qwen", [{"role": "user", "content": "What?", "images": [PNG]}])
        assert answer.message.content == "To data:image/png;base64,"
        schema: Any = {"type": "object", "properties": {"age": {"type": "integer"}}}
        answer = await client.chat("qwen", MESSAGES, format=schema)
        assert json.loads(answer.message.content or "")["json_schema"]["schema"] == schema

    run(with_python(scenario))


def test_a_prompt_is_generated_and_its_context_goes_on(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        first = await client.generate("qwen", "Why?", system="Be brief.")
        assert (first.response, first.done_reason) == ("To Why?", "stop")
        await client.generate("qwen", "And?", context=first.context)
        said = [(one["role"], one["content"]) for one in asked(rig)["messages"]]
        assert said == [("system", "Be brief."), ("user", "Why?"), ("assistant", "To Why?"), ("user", "And?")]
        words = [part.response async for part in await client.generate("qwen", "Why?", stream=True)]
        assert words == [*WORDS, ""]

    run(with_python(scenario))


def test_raw_prompts_and_suffixes_are_completed(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        answer = await client.generate("qwen", "[INST]", raw=True)
        assert (answer.response, answer.done_reason, answer.context) == ("After [INST].", "length", None)
        assert (await client.generate("qwen", "def f(", suffix="return")).response == "def f(|return"

        async def without_infill(request: Request, connection: Connection) -> None:
            if request.target == "/infill":
                await whole(b'{"detail": "Not Found"}', status="404 Not Found")(request, connection)
            else:
                await engine(request, connection)

        rig.engine.answer = without_infill
        assert (await client.generate("qwen", "def f(", suffix="return")).response == "After def f(."
        assert asked(rig)["suffix"] == "return"

    run(with_python(scenario))


def test_texts_are_embedded(run: Run) -> None:
    async def scenario(_: Rig, client: ollama.AsyncClient) -> None:
        answer = await client.embed("qwen", ["a", "b"])
        assert (list(answer.embeddings), answer.prompt_eval_count) == ([VECTOR, VECTOR], 8)
        assert (await client.embeddings("qwen", "a")).embedding == VECTOR

    run(with_python(scenario))


def test_models_are_listed_shown_and_seen_running(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        rig.add_model("cold", 'aliases = ["cold:latest", "colder"]\n')
        listed = (await client.list()).models
        assert [one.model for one in listed] == ["cold:latest", "colder:latest", "qwen:latest"]
        assert listed[2].details is not None
        assert (listed[2].size, listed[2].details.parameter_size) == (5_000_000_000, "8B")
        (running,) = (await client.ps()).models
        assert (running.model, running.context_length) == ("qwen:latest", 32768)
        assert running.expires_at is not None
        assert running.expires_at.timestamp() == 1_700_000_300
        shown = await client.show("qwen")
        assert shown.capabilities == ["completion", "tools"]
        assert shown.modelinfo == {"general.architecture": "qwen3", "qwen3.context_length": 32768}
        rig.api.answer = whole(b"busy", status="503 Service Unavailable")
        assert len((await client.list()).models) == 3

    run(with_python(scenario))


def test_errors_come_in_ollamas_form(run: Run, tmp_path: Path) -> None:
    known, secrets = make_keys(tmp_path, ours=("qwen",))

    async def scenario(rig: Rig) -> None:
        rig.engine.answer, rig.api.answer = engine, api

        async def fails(work: Coroutine[Any, Any, Any]) -> tuple[int, str]:
            with pytest.raises(ollama.ResponseError) as caught:
                await work
            assert isinstance(caught.value.error, str)
            return caught.value.status_code, caught.value.error

        async with of_python(rig, secrets["ours"]) as client, of_python(rig, "no") as stranger:
            assert await fails(client.chat("qwem", MESSAGES)) == (
                404,
                "There is no model 'qwem'. Did you mean 'qwen'?",
            )
            assert (await fails(stranger.list()))[0] == 401
            assert (await fails(stranger.pull("qwen")))[0] == 401
            status, said = await fails(client.pull("llama3.2"))
            assert (status, "gpusvc add" in said) == (501, True)
            assert (await client.pull("qwen")).status == "success"
            for work in (client.delete("qwen"), client.copy("qwen", "q"), client.push("qwen")):
                assert (await fails(work))[0] == 501
            assert (await fails(client.create("mario", from_="qwen")))[0] == 501
            options: Any = {"temperature": "hot"}
            assert await fails(client.chat("qwen", MESSAGES, options=options)) == (
                400,
                "'options.temperature' must be a number.",
            )
            rig.engine.answer = whole(b'{"error": {"message": "too long"}}', status="400 Bad Request")
            assert await fails(client.chat("qwen", MESSAGES)) == (400, "too long")
            rig.engine.answer = broken
            stream = await client.chat("qwen", MESSAGES, stream=True)
            assert (await anext(stream)).message.content == "All"
            with pytest.raises(ollama.ResponseError, match="in the middle of its response"):
                await anext(stream)

    run(scenario, known=known)


# --- Home Assistant (homeassistant/components/ollama): what it calls, with what it sends.


def test_home_assistant_talks_with_tools(run: Run) -> None:
    async def scenario(rig: Rig, client: ollama.AsyncClient) -> None:
        # The configuration: the models, and a pull of one that is not among them.
        assert "qwen:latest" in {model["model"] for model in (await client.list()).get("models", [])}
        await client.pull("qwen:latest")
        history: list[Any] = [
            ollama.Message(role="system", content="You are a voice assistant."),
            ollama.Message(role="user", content="Turn on the light."),
        ]
        more: dict[str, Any] = {"keep_alive": -1, "options": {"num_ctx": 8192}, "think": False, "format": None}
        for _ in range(2):
            stream = await client.chat("qwen:latest", messages=list(history), tools=[TOOL], stream=True, **more)
            content = ""
            calls: list[Any] = []
            async for response in stream:
                message = response["message"]
                assert message["role"] == "assistant"
                content += message.get("content") or ""
                calls += message.get("tool_calls") or ()
            if not calls:
                break
            made = [
                ollama.Message.ToolCall(
                    function=ollama.Message.ToolCall.Function(
                        name=call["function"]["name"], arguments=call["function"]["arguments"]
                    )
                )
                for call in calls
            ]
            history.append(ollama.Message(role="assistant", content=content, tool_calls=made))
            # Its results have no name.
            history.append(ollama.Message(role="tool", content='{"data": "done", "error": null}'))
        assert content == "".join(WORDS)
        sent = asked(rig)
        assert sent["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
        assert sent["messages"][3]["tool_call_id"] == sent["messages"][2]["tool_calls"][0]["id"]
        kept = [request.target for request in rig.api.requests if "/keep" in request.target]
        assert kept[0] == "/gpusvc/models/qwen/keep?idle=never"

    run(with_python(scenario))


# --- Open WebUI (backend/open_webui/routers/ollama.py): paths, bodies, and what it takes out of the answers.


def test_open_webui_connects_lists_chats_embeds_and_unloads(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.engine.answer, rig.api.answer = engine, api
        client = await rig.client()
        more = "Authorization: Bearer key\r\nContent-Type: application/json\r\nX-OpenWebUI-User-Name: Ada\r\n"
        assert "version" in json.loads((await client.get("/api/version", more)).body)
        models = json.loads((await client.get("/api/tags", more)).body)["models"]
        assert {"name", "model", "modified_at", "size", "digest", "details"} <= models[0].keys()
        loaded = json.loads((await client.get("/api/ps", more)).body)["models"]
        assert {one["name"]: one["expires_at"] for one in loaded}.keys() == {"qwen:latest"}
        chat = {
            "model": "qwen:latest",
            "messages": [{"role": "user", "content": "Well?", "images": ["iVBORw0KGgo="]}],
            "options": {"temperature": 0.7, "num_ctx": 2048, "stop": ["###"]},
            "stream": True,
            "format": "",
            "keep_alive": "5m",
            "template": None,
        }
        answer = await client.ask(json.dumps(chat).encode(), "/api/chat")
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert answer.headers["x-gpusvc-ignored"] == "num_ctx"
        lines = [json.loads(line) for line in answer.body.splitlines()]
        assert [line["message"]["content"] for line in lines] == [*WORDS, ""]
        # Its usage is read out of the last line.
        counted = {"prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration", "total_duration"}
        assert counted | {"load_duration", "done_reason"} <= lines[-1].keys()
        title = {"model": "qwen:latest", "messages": [{"role": "user", "content": "A title."}], "stream": False}
        answer = await client.ask(json.dumps(title).encode(), "/api/chat")
        assert json.loads(answer.body)["message"]["content"] == "To A title."
        embed = {"input": ["a", "b"], "model": "qwen:latest", "truncate": True}
        assert len(json.loads((await client.ask(json.dumps(embed).encode(), "/api/embed")).body)["embeddings"]) == 2
        # Its button that unloads a model.
        unload = {"model": "qwen:latest", "keep_alive": 0, "prompt": ""}
        answer = await client.ask(json.dumps(unload).encode(), "/api/generate")
        assert json.loads(answer.body)["done_reason"] == "unload"
        assert rig.api.requests[-1].target == "/gpusvc/models/qwen/evict?wait=0s"

    run(scenario)


# --- The package of npm.


def test_the_package_of_npm_finds_all_as_it_expects(run: Run, tmp_path: Path) -> None:
    program, packages = node.ensure_ollama()
    known, secrets = make_keys(tmp_path, ours=())
    # Packages are looked for beside the script, and above.
    script = tmp_path / "ollama.mjs"
    shutil.copy(Path(__file__).with_name("ollama.mjs"), script)
    (tmp_path / "node_modules").symlink_to(packages / "node_modules")

    async def scenario(rig: Rig) -> None:
        for name in ("broken", "endless"):
            rig.run_model(name, rig.engine.port)
        rig.api.answer = api

        async def answer(request: Request, connection: Connection) -> None:
            scripts = {b'"broken"': broken, b'"endless"': endless}
            found = next((played for name, played in scripts.items() if name in request.body[:40]), engine)
            await found(request, connection)

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
        assert json.loads(said) == {
            "version": True,
            "list": ["broken:latest", "endless:latest", "qwen:latest"],
            "show": ["completion", "tools"],
            "ps": ["broken:latest", "endless:latest", "qwen:latest"],
            "chat": "To Well?",
            "stream": ["", *WORDS, ""],
            "done": ["stop", 26, 3, True],
            "tool": {"index": 0, "name": "weather", "arguments": {"city": "Ulm"}},
            "image": "To data:image/png;base64,",
            "embed": 2,
            "embeddings": VECTOR,
            "unknown": ["ResponseError", 404, "There is no model 'qwem'"],
            "stranger": ["ResponseError", 401, "The request has no valid API key"],
            "pull": [
                "ResponseError",
                501,
                "This server downloads no models for its clients, and has none of this name",
            ],
            "there": "success",
            "remove": ["ResponseError", 501, "This server deletes no models"],
            "broken": ["Error", None, "The engine of broken closed the connection in the middle of its response"],
            "aborted": ["AbortError", None, "This operation was aborted"],
        }
        await rig.eventually(lambda: rig.engine.cancelled > 0)

    run(scenario, known=known)
