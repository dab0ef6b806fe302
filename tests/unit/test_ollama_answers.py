"""Engines' answers in the form of Ollama's API."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gateway.ollama import answers, context, listing, pieces
from gpusvc.gateway.ollama.answers import Answer, Times
from gpusvc.gateway.ollama.events import Events, TooLongError
from gpusvc.gateway.ollama.pieces import EngineError
from gpusvc.gateway.ollama.questions import Attempt, Form, Question
from tests.unit.test_ollama_questions import JSON_VALUES

SECOND = 1_000_000_000
CREATED = 1_700_000_000.25
AT = "2023-11-14T22:13:20.250000Z"
LONG_AGO = "1970-01-01T00:00:00+00:00"


def question(form: Form = Form.CHAT, *, said: tuple[tuple[str, str], ...] | None = None) -> Question:
    return Question(form, "qwen:latest", (Attempt(b"/", {}),), form.is_streamed, None, (), said)


def times(**more: int) -> Times:
    return Times(**{"began": 0, "sent": SECOND, "ended": 10 * SECOND, **more})


def played(asked: Question, when: Times, *chunks: Mapping[str, Any]) -> list[dict[str, Any]]:
    answer = Answer(asked, when)
    lines = [value for one in chunks if (value := answer.part(one, CREATED)) is not None]
    return [*lines, *answer.end(CREATED)]


def delta(finish: str | None = None, **said: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": said, "finish_reason": finish}]}


# --- Streams.


def test_a_chat_comes_in_lines_and_the_last_has_reason_counts_and_durations() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 26, "completion_tokens": 2, "total_tokens": 28}}
    lines = played(question(), times(first=3 * SECOND), delta(role="assistant", content=None), delta(content="The"),
                   delta(content=" sky"), delta(finish="stop"), usage)  # fmt: skip
    head = {"model": "qwen:latest", "created_at": AT}
    assert lines == [
        {**head, "message": {"role": "assistant", "content": "The"}, "done": False},
        {**head, "message": {"role": "assistant", "content": " sky"}, "done": False},
        {
            **head,
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "stop",
            "total_duration": 10 * SECOND,
            "load_duration": SECOND,
            "prompt_eval_count": 26,
            "prompt_eval_duration": 2 * SECOND,
            "eval_count": 2,
            "eval_duration": 7 * SECOND,
        },
    ]


def test_durations_of_the_engine_count_where_it_tells_them() -> None:
    timings = {"prompt_n": 5, "prompt_ms": 130.5, "predicted_n": 8, "predicted_ms": 4232.25}
    last = played(question(), times(first=3 * SECOND), delta(content="a"), {"choices": [], "timings": timings})[-1]
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (130_500_000, 4_232_250_000)
    assert "eval_count" not in last


def test_a_prompt_is_generated_with_its_context() -> None:
    said = (("user", "Why?"),)
    lines = played(question(Form.GENERATE, said=said), times(), delta(content="Be"), delta(content="cause."),
                   delta(finish="length"))  # fmt: skip
    assert [line["response"] for line in lines] == ["Be", "cause.", ""]
    assert (lines[-1]["done_reason"], "message" in lines[-1]) == ("length", False)
    assert context.decode(lines[-1]["context"]) == [("user", "Why?"), ("assistant", "Because.")]


def test_an_answer_that_is_too_long_for_a_context_has_none() -> None:
    parts = [delta(content="x" * 100_000)] * 5
    lines = played(question(Form.GENERATE, said=(("user", "Why?"),)), times(), *parts, delta(finish="stop"))
    assert (sum(len(line["response"]) for line in lines), "context" in lines[-1]) == (500_000, False)


def test_thinking_has_a_member_of_its_own_whatever_the_engine_calls_it() -> None:
    lines = played(question(), times(), delta(reasoning_content="Hm."), delta(reasoning="So."), delta(content="Yes."))
    messages = [line["message"] for line in lines[:-1]]
    assert [one.get("thinking") for one in messages] == ["Hm.", "So.", None]
    assert played(question(Form.GENERATE), times(), delta(reasoning="So."))[0]["thinking"] == "So."


def part(index: int, name: str | None = None, arguments: str = "", call: str | None = None) -> dict[str, Any]:
    return {"index": index, "id": call, "function": {"name": name, "arguments": arguments}}


def test_calls_of_tools_come_whole_with_objects() -> None:
    lines = played(
        question(), times(),
        delta(tool_calls=[part(0, "rain", "", "abc")]), delta(tool_calls=[part(0, None, '{"city":')]),
        delta(tool_calls=[part(0, None, '"Ulm"}')]), delta(tool_calls=[part(1, "wind", "")]),
        delta(finish="tool_calls"),
    )  # fmt: skip
    calls = [line["message"].get("tool_calls") for line in lines]
    assert calls == [
        [{"id": "abc", "function": {"index": 0, "name": "rain", "arguments": {"city": "Ulm"}}}],
        [{"function": {"index": 1, "name": "wind", "arguments": {}}}],
        None,
    ]
    assert lines[-1]["done_reason"] == "stop"


def test_a_call_that_does_not_end_is_an_error() -> None:
    more = delta(tool_calls=[part(0, None, "x" * (3 << 20))])
    with pytest.raises(EngineError, match="does not end"):
        played(question(), times(), delta(tool_calls=[part(0, "rain")]), more, more, more)


def test_a_call_that_the_limit_of_tokens_cut_off_is_left_out() -> None:
    lines = played(question(), times(), delta(tool_calls=[part(0, "rain", '{"ci')]), delta(finish="length"))
    assert len(lines) == 1
    assert lines[0]["done_reason"] == "length"


@pytest.mark.parametrize("arguments", ["{", "[]", '"a"', "[" * 100_000])
def test_a_call_with_other_arguments_is_an_error_in_words(arguments: str) -> None:
    with pytest.raises(EngineError, match="'rain' with arguments that are not a JSON object"):
        played(question(), times(), delta(tool_calls=[part(0, "rain", arguments)]), delta(finish="tool_calls"))


def test_llama_servers_infill_is_understood() -> None:
    lines = played(
        question(Form.GENERATE), times(), {"content": "a", "stop": False},
        {"content": "", "stop": True, "stop_type": "limit", "tokens_predicted": 1, "tokens_evaluated": 7},
    )  # fmt: skip
    assert [line["response"] for line in lines] == ["a", ""]
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"], lines[-1]["prompt_eval_count"]) == ("length", 1, 7)


def test_completions_are_understood() -> None:
    lines = played(question(Form.GENERATE), times(), {"choices": [{"text": "a", "finish_reason": "stop"}]})
    assert [line["response"] for line in lines] == ["a", ""]


def test_logprobs_go_with_their_part() -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}
    chunk = {"choices": [{"delta": {"content": "a"}, "logprobs": logprobs}]}
    assert played(question(), times(), chunk)[0]["logprobs"] == logprobs["content"]


# --- Whole answers.


def whole(form: Form, said: Mapping[str, Any], **more: int) -> dict[str, Any]:
    return Answer(question(form), times(**more)).whole(said, CREATED)


def test_a_whole_chat_has_everything_in_one_object() -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"city":"Ulm"}'}}]}  # fmt: skip
    said = {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": {"prompt_tokens": 3}}
    value = whole(Form.CHAT, said)
    assert value["message"] == {
        "role": "assistant",
        "content": "",
        "thinking": "Hm.",
        "tool_calls": [{"id": "1", "function": {"index": 0, "name": "rain", "arguments": {"city": "Ulm"}}}],
    }
    assert (value["done"], value["prompt_eval_count"], value["eval_duration"]) == (True, 3, 9 * SECOND)
    assert "prompt_eval_duration" not in value


def test_embeddings_keep_the_order_of_their_texts() -> None:
    data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [[1.0]]}]
    value = whole(Form.EMBED, {"data": data, "usage": {"prompt_tokens": 8}})
    assert value == {
        "model": "qwen:latest",
        "embeddings": [[1.0], [2.0]],
        "total_duration": 10 * SECOND,
        "load_duration": SECOND,
        "prompt_eval_count": 8,
    }
    assert whole(Form.EMBEDDINGS, {"data": data}) == {"embedding": [1.0]}


def test_an_answer_without_an_embedding_is_an_error() -> None:
    with pytest.raises(EngineError, match="no embedding"):
        whole(Form.EMBEDDINGS, {"data": []})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"error": {"message": "Too long."}}, "Too long."),
        ({"error": "Too long."}, "Too long."),
        ({"object": "error", "message": "Too long."}, "Too long."),
        ({"detail": "Too long."}, "Too long."),
        ({"detail": [{"loc": []}]}, None),
    ],
)
def test_an_error_is_found_in_the_forms_of_all_engines(error: dict[str, object], said: str | None) -> None:
    assert pieces.error_in(error) == said


def test_a_load_is_said_in_the_form_of_its_endpoint() -> None:
    assert answers.loaded(question(), "load", CREATED) == {
        "model": "qwen:latest",
        "created_at": AT,
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "load",
    }
    assert answers.loaded(question(Form.EMBED), "load", CREATED)["embeddings"] == []


# --- Whatever an engine says.


@given(form=st.sampled_from(list(Form)), chunks=st.lists(st.dictionaries(st.sampled_from(
    ["choices", "usage", "timings", "content", "stop", "data", "stop_type"]), JSON_VALUES | st.lists(st.dictionaries(
        st.sampled_from(["delta", "message", "text", "finish_reason", "logprobs", "index", "embedding"]),
        JSON_VALUES | st.dictionaries(st.sampled_from(["content", "reasoning", "tool_calls"]), JSON_VALUES | st.lists(
            st.dictionaries(st.sampled_from(["index", "id", "function"]), JSON_VALUES), max_size=3)))), max_size=3),
        max_size=5))  # fmt: skip
def test_whatever_an_engine_says_is_lines_or_one_error(form: Form, chunks: list[dict[str, Any]]) -> None:
    with contextlib.suppress(EngineError):
        for value in played(question(form), times(), *chunks):
            answers.line(value)
    for chunk in chunks:
        with contextlib.suppress(EngineError):
            answers.line(whole(form, chunk))


# --- Events.


def test_events_are_found_however_the_stream_is_cut() -> None:
    stream = b': wait\r\n\r\ndata: {"a":1}\r\n\r\nevent: x\ndata: b\ndata:c\n\ndata: [DONE]\n\n'
    for size in range(1, len(stream)):
        events = Events()
        found = [one for at in range(0, len(stream), size) for one in events.feed(stream[at : at + size])]
        assert found == [b'{"a":1}', b"b\nc", b"[DONE]"]
        assert events.end() == []


def test_a_last_event_without_its_empty_line_counts() -> None:
    events = Events()
    assert events.feed(b"data: a") == []
    assert events.end() == [b"a"]


def test_an_event_without_an_end_is_given_up() -> None:
    events = Events()
    events.feed(b"data: " + b"x" * 7_000_000 + b"\n")
    with pytest.raises(TooLongError):
        events.feed(b"data: " + b"x" * 7_000_000)


# --- Lists.


def card(name: str, own: str = "", **more: object) -> dict[str, object]:
    return {"id": name, "created": 1_700_000_000, "gpusvc": {"name": own or name, "state": "stopped", **more}}


WEIGHTS = {"qwen": {"name": "qwen", "format": "gguf", "architecture": "qwen3", "size_bytes": 5, "parameters": "8B",
                    "quantisation": "Q4_K_M", "context": 32768, "capabilities": ["completion", "tools"]}}  # fmt: skip


def test_models_are_listed_with_a_tag_and_once() -> None:
    listed = [card("qwen"), card("qwen:latest", "qwen"), card("llama3.2:1b"), card("hf.co/a:8080/b", "x")]
    models: Any = listing.tags(listed, WEIGHTS)["models"]
    assert [one["name"] for one in models] == ["qwen:latest", "llama3.2:1b", "hf.co/a:8080/b:latest"]
    assert models[0]["details"]["quantization_level"] == "Q4_K_M"
    assert (models[0]["size"], models[1]["size"], models[1]["details"]["family"]) == (5, 0, "")
    assert models[0]["modified_at"] == "2023-11-14T22:13:20.000000Z"
    assert len(models[0]["digest"]) == 64


def test_loaded_models_are_listed_with_their_vram_and_their_end() -> None:
    listed = [card("qwen", state="ready", used_bytes=7), card("q", "qwen", state="ready"), card("cold")]
    use: dict[str, object] = {"in_use": False, "last_use": "2023-11-14T23:13:20+01:00", "idle_timeout_seconds": 300.0}
    models: Any = listing.running(listed, WEIGHTS, {"qwen": use}, 1_700_000_100.0)["models"]
    (one,) = models
    assert (one["name"], one["size_vram"], one["size"], one["context_length"]) == ("qwen:latest", 7, 7, 32768)
    assert one["expires_at"] == "2023-11-14T22:18:20.000000Z"
    assert "modified_at" not in one


@pytest.mark.parametrize(
    ("use", "expires"),
    [
        (
            {"in_use": True, "last_use": LONG_AGO, "idle_timeout_seconds": 60.0},
            "2023-11-14T22:16:00.000000Z",
        ),
        (
            {"pinned": True, "last_use": LONG_AGO, "idle_timeout_seconds": 60.0},
            "2286-11-20T17:46:39.000000Z",
        ),
        ({"last_use": LONG_AGO, "idle_timeout_seconds": 0.0}, "2286-11-20T17:46:39.000000Z"),
        ({}, "2286-11-20T17:46:39.000000Z"),
    ],
)
def test_a_model_in_use_or_without_an_end_stays(use: dict[str, object], expires: str) -> None:
    models: Any = listing.running([card("qwen", state="loading")], {}, {"qwen": use}, 1_700_000_100.0)["models"]
    assert models[0]["expires_at"] == expires


def test_a_model_is_shown_with_what_its_files_say() -> None:
    shown = listing.shown(card("qwen"), WEIGHTS["qwen"])
    assert shown["model_info"] == {"general.architecture": "qwen3", "qwen3.context_length": 32768}
    assert shown["capabilities"] == ["completion", "tools"]
    assert listing.shown(card("qwen"), {})["capabilities"] == ["completion"]


@given(
    listed=st.lists(st.dictionaries(st.sampled_from(["id", "created", "gpusvc"]), JSON_VALUES), max_size=4),
    facts=st.dictionaries(st.text(max_size=3), st.dictionaries(st.sampled_from(list(WEIGHTS["qwen"])), JSON_VALUES)),
)
def test_lists_never_fail(listed: list[dict[str, Any]], facts: dict[str, dict[str, Any]]) -> None:
    json.dumps(listing.tags(listed, facts))
    json.dumps(listing.running(listed, facts, facts, 1.0))
