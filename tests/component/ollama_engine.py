"""An engine that speaks OpenAI's chat, completions and embeddings as llama-server does, and llama-server's infill."""

from __future__ import annotations

import json
from typing import Any

from tests.component.upstream import STREAM, Connection, Request, chunk, whole

WORDS = ["All", " is", " well."]
USAGE = {"prompt_tokens": 26, "completion_tokens": 3, "total_tokens": 29}
TIMINGS = {"prompt_n": 26, "prompt_ms": 130.0, "predicted_n": 3, "predicted_ms": 4232.0}
VECTOR = [0.5, -2.0, 0.25]


async def engine(request: Request, connection: Connection) -> None:
    """Answer as engines do; what it was asked is in the answer, where that is of interest."""
    asked: dict[str, Any] = request.json() if request.body else {}
    match request.target:
        case "/v1/chat/completions":
            await (stream_chat if asked.get("stream") else _whole_chat)(request, connection)
        case "/v1/completions":
            said: dict[str, Any] = {
                "choices": [{"text": f"After {asked['prompt']}.", "finish_reason": "length"}],
                "usage": USAGE,
            }
            await say(request, connection, said)
        case "/infill":
            text = f"{asked['input_prefix']}|{asked['input_suffix']}"
            said = {"content": text, "stop": True, "stop_type": "eos", "tokens_predicted": 3, "tokens_evaluated": 9}
            await say(request, connection, said)
        case "/v1/embeddings":
            data: list[dict[str, Any]] = [
                {"index": index, "embedding": VECTOR} for index, _ in enumerate(asked["input"])
            ]
            await say(request, connection, {"data": data, "usage": {"prompt_tokens": 8, "total_tokens": 8}})
        case _:
            await whole(b'{"error": {"message": "no such path"}}', status="404 Not Found")(request, connection)


async def stream_chat(request: Request, connection: Connection) -> None:
    asked: Any = request.json()
    kwargs = asked.get("chat_template_kwargs", {})
    parts: list[dict[str, object]] = [{"role": "assistant", "content": None}]
    if kwargs.get("enable_thinking"):
        parts.append({"reasoning_content": "Hm."})
    if "tools" in asked and asked["messages"][-1]["role"] == "user":
        call = {"index": 0, "id": "c1", "type": "function", "function": {"name": name_of_tool(asked), "arguments": ""}}
        rest = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city"', ':"Ulm"}')]
        parts += [{"tool_calls": [one]} for one in (call, *rest)]
    else:
        parts += [{"content": word} for word in WORDS]
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": part, "finish_reason": None}]} for part in parts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if asked.get("stream_options", {}).get("include_usage"):
        chunks.append({"choices": [], "usage": USAGE, "timings": TIMINGS})
    data = [b"data: " + json.dumps(one).encode() + b"\n\n" for one in chunks]
    await connection.say(STREAM, *map(chunk, [*data, b"data: [DONE]\n\n"]), b"0\r\n\r\n")


async def _whole_chat(request: Request, connection: Connection) -> None:
    asked: Any = request.json()
    content = asked["messages"][-1]["content"]
    if isinstance(content, list):
        content = content[-1]["image_url"]["url"][:22]
    message: dict[str, object] = {"role": "assistant", "content": f"To {content}"}
    if "tools" in asked:
        function = {"name": name_of_tool(asked), "arguments": '{"city":"Ulm"}'}
        message |= {"content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    if "response_format" in asked:
        message["content"] = json.dumps(asked["response_format"])
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    await say(request, connection, {"choices": [choice], "usage": USAGE, "timings": TIMINGS})


def name_of_tool(asked: Any) -> str:
    return str(asked["tools"][0]["function"]["name"])


async def say(request: Request, connection: Connection, value: object) -> None:
    await whole(json.dumps(value).encode())(request, connection)


async def broken(_: Request, connection: Connection) -> None:
    """Die in the middle of a stream, when the client has read what there was of it."""
    choice = {"index": 0, "delta": {"content": "All"}, "finish_reason": None}
    await connection.say(STREAM, chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"))
    connection.writer.close()
    raise ConnectionAbortedError


async def endless(_: Request, connection: Connection) -> None:
    """Say a word again and again until the connection is closed."""
    choice = {"index": 0, "delta": {"content": "word " * 500}, "finish_reason": None}
    await connection.say(STREAM)
    while True:
        await connection.say(chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"))
