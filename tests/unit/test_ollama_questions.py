"""Requests of Ollama's API, as engines are asked."""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gateway.entry import routes
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.ollama import context, endpoints, keepalive, members, messages, options, questions
from gpusvc.gateway.ollama.endpoints import Endpoint
from gpusvc.gateway.ollama.questions import Form, Question

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
JPEG = "/9j/4AAQSkZJRgABAQ"
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def chat(**asked: Any) -> Question:
    return questions.read(Form.CHAT, {"model": "qwen", "messages": [{"role": "user", "content": "Well?"}], **asked})


def generate(**asked: Any) -> Question:
    return questions.read(Form.GENERATE, {"model": "qwen", **asked})


def body(question: Question) -> dict[str, Any]:
    (attempt,) = question.attempts
    return attempt.body


def refusal(form: Form, asked: dict[str, object]) -> str:
    with pytest.raises(HttpError) as caught:
        questions.read(form, asked)
    assert caught.value.status == 400
    return caught.value.message


# --- Chat.


def test_a_chat_is_streamed_with_its_usage_unless_the_client_says_otherwise() -> None:
    question = chat()
    assert question.attempts[0].path == b"/v1/chat/completions"
    assert question.is_streamed
    assert body(question) == {
        "model": "qwen",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Well?"}],
    }
    assert body(chat(stream=False)) == {
        "model": "qwen",
        "stream": False,
        "messages": [{"role": "user", "content": "Well?"}],
    }


def test_nulls_are_as_if_they_were_absent() -> None:
    nothing = dict.fromkeys(("stream", "options", "format", "tools", "think", "keep_alive", "logprobs", "template"))
    assert chat(**nothing) == chat()


def test_options_become_members_and_those_of_the_start_are_named() -> None:
    question = chat(
        options={
            "num_keep": 5, "seed": 42, "num_predict": 100, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "typical_p": 0.7,
            "repeat_last_n": 33, "temperature": 0.8, "repeat_penalty": 1.2, "presence_penalty": 1.5,
            "frequency_penalty": 1.0, "penalize_newline": True, "stop": ["\n", "user:"], "numa": False,
            "num_ctx": 1024, "num_batch": 2, "num_gpu": 1, "main_gpu": 0, "use_mmap": True, "num_thread": 8,
        }
    )  # fmt: skip
    sent = body(question)
    del sent["model"], sent["stream"], sent["stream_options"], sent["messages"]
    assert sent == {
        "n_keep": 5, "seed": 42, "max_tokens": 100, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "typical_p": 0.7,
        "repeat_last_n": 33, "temperature": 0.8, "repeat_penalty": 1.2, "repetition_penalty": 1.2,
        "presence_penalty": 1.5, "frequency_penalty": 1.0, "stop": ["\n", "user:"],
    }  # fmt: skip
    assert question.ignored == (
        "penalize_newline", "numa", "num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread",
    )  # fmt: skip


@pytest.mark.parametrize("unlimited", [-1, -2])
def test_no_limit_of_tokens_is_none(unlimited: int) -> None:
    assert "max_tokens" not in body(chat(options={"num_predict": unlimited}))


def test_one_text_stops_as_a_list_of_one_does() -> None:
    assert body(chat(options={"stop": "user:"}))["stop"] == ["user:"]


def test_a_whole_number_may_have_a_zero_fraction() -> None:
    assert options.translate({"seed": 42.0}) == ({"seed": 42}, ())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": "hot"}, "'options.temperature' must be a number."),
        ({"temperature": True}, "'options.temperature' must be a number."),
        ({"seed": 1.5}, "'options.seed' must be a whole number."),
        ({"stop": [1]}, "'options.stop' must be a list of texts."),
        ({"top_p": math.inf}, "'options.top_p' must be a number."),
    ],
)
def test_an_option_of_a_wrong_type_is_refused_in_words(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(HttpError, match="must be") as caught:
        options.translate(wrong)
    assert caught.value.message == said


def test_what_a_client_makes_up_does_not_come_back_in_a_header() -> None:
    assert options.translate({"x\r\nSet-Cookie: a=b": 1, "num_ctx": 1})[1] == ("options", "num_ctx")


def test_a_format_is_json_or_a_schema() -> None:
    assert body(chat(format="json"))["response_format"] == {"type": "json_object"}
    made = body(chat(format=SCHEMA))["response_format"]
    assert (made["type"], made["json_schema"]["schema"]) == ("json_schema", SCHEMA)
    assert "response_format" not in body(chat(format=""))
    assert 'must be "json"' in refusal(Form.CHAT, {"model": "a", "messages": [{"role": "user"}], "format": "yaml"})


@pytest.mark.parametrize(
    ("think", "sent"),
    [
        (False, {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        (True, {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}),
        (
            "high",
            {
                "reasoning_effort": "high",
                "chat_template_kwargs": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
            },
        ),
    ],
)
def test_thinking_is_switched_as_templates_know_it(think: object, sent: dict[str, object]) -> None:
    asked = body(chat(think=think))
    assert {key: asked[key] for key in asked if key in ("reasoning_effort", "chat_template_kwargs")} == sent


def test_tools_and_logprobs_go_across() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    sent = body(chat(tools=tools, logprobs=True, top_logprobs=3))
    assert (sent["tools"], sent["logprobs"], sent["top_logprobs"]) == (tools, True, 3)


# --- Messages.


def test_images_become_data_urls_of_their_kind() -> None:
    made = messages.translate([{"role": "user", "content": "What?", "images": [PNG, JPEG, "data:image/gif;base64,R0"]}])
    assert made == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{JPEG}"}},
                {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0"}},
            ],
        }
    ]


def call(name: str, **more: object) -> dict[str, object]:
    return {"function": {"name": name, "arguments": {"city": "Ulm"}}, **more}


def test_answers_of_tools_find_their_calls_by_name_and_else_in_order() -> None:
    made = messages.translate(
        [
            {"role": "assistant", "content": "", "tool_calls": [call("rain"), call("wind"), call("rain")]},
            {"role": "tool", "content": "3 m/s", "tool_name": "wind"},
            {"role": "tool", "content": "none"},
            {"role": "tool", "content": "some", "tool_name": "rain"},
            {"role": "tool", "content": "one too many"},
        ]
    )
    calls: Any = made[0]["tool_calls"]
    assert [one["id"] for one in calls] == ["call_0_0", "call_0_1", "call_0_2"]
    assert calls[0]["function"] == {"name": "rain", "arguments": '{"city":"Ulm"}'}
    assert [one["tool_call_id"] for one in made[1:]] == ["call_0_1", "call_0_0", "call_0_2", "call"]


def test_ids_of_clients_that_have_some_are_kept() -> None:
    made = messages.translate(
        [
            {"role": "assistant", "thinking": "Hm.", "tool_calls": [call("rain", id="abc")]},
            {"role": "tool", "content": "none", "tool_call_id": "abc"},
        ]
    )
    calls: Any = made[0]["tool_calls"]
    assert (calls[0]["id"], made[1]["tool_call_id"], made[0]["reasoning_content"]) == ("abc", "abc", "Hm.")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "robot"}, "messages[0].role must be system, user, assistant or tool."),
        ({"role": "user", "content": ["a"]}, "'messages[0].content' must be a text."),
        ({"role": "user", "images": "a.png"}, "'messages[0].images' must be a list of texts."),
        ({"role": "user", "images": [""]}, "messages[0].images[0] is empty; an image is sent in base64."),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].function.name is missing."),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 1}}]},
            "'messages[0].tool_calls[0].function.arguments' must be an object.",
        ),
    ],
)
def test_a_wrong_message_is_refused_with_its_place(message: dict[str, object], said: str) -> None:
    assert refusal(Form.CHAT, {"model": "qwen", "messages": [message]}) == said


# --- Generate.


def test_a_prompt_is_a_chat_with_one_message() -> None:
    question = generate(prompt="Why?", system="Be brief.", images=[PNG])
    assert question.attempts[0].path == b"/v1/chat/completions"
    sent = body(question)["messages"]
    assert sent[0] == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in sent[1]["content"]] == ["text", "image_url"]
    assert question.said == (("system", "Be brief."), ("user", "Why?"))


def test_a_raw_prompt_is_a_completion_without_context() -> None:
    question = generate(prompt="[INST] why? [/INST]", raw=True, system="x", context=[1, 2], stream=False)
    assert question.attempts[0].path == b"/v1/completions"
    assert body(question) == {"model": "qwen", "stream": False, "prompt": "[INST] why? [/INST]"}
    assert (question.said, question.ignored) == (None, ("system", "context"))


def test_a_suffix_is_asked_of_infill_and_then_of_completions() -> None:
    question = generate(prompt="def f(", suffix="return a", options={"num_predict": 9}, stream=False)
    infill, completion = question.attempts
    assert infill.path == b"/infill"
    assert infill.body == {
        "model": "qwen", "stream": False, "input_prefix": "def f(", "input_suffix": "return a", "prompt": "",
        "n_predict": 9,
    }  # fmt: skip
    assert completion.path == b"/v1/completions"
    assert completion.body["suffix"] == "return a"
    assert completion.body["max_tokens"] == 9


def test_a_template_is_named_as_ignored() -> None:
    assert generate(prompt="Why?", template="{{ .Prompt }}").ignored == ("template",)


def test_images_in_a_raw_prompt_are_refused() -> None:
    assert "raw" in refusal(Form.GENERATE, {"model": "qwen", "prompt": "a", "raw": True, "images": [PNG]})


def test_a_context_continues_its_conversation() -> None:
    numbers = context.encode([("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")])
    question = generate(prompt="And?", context=numbers)
    sent = [(one["role"], one["content"]) for one in body(question)["messages"]]
    assert sent == [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."), ("user", "And?")]
    again = body(generate(prompt="And?", context=numbers, system="Shout."))["messages"]
    assert again[0] == {"role": "system", "content": "Shout."}
    assert len(again) == 4


@pytest.mark.parametrize("long", [{"prompt": "x" * (1 << 20)}, {"prompt": "x", "system": "y" * (1 << 20)}])
def test_what_is_too_long_for_a_context_is_not_kept_for_it(long: dict[str, str]) -> None:
    assert generate(**long).said is None
    assert context.encode([("user", "x" * (1 << 20))]) is None


def test_a_context_of_ollama_is_named_as_ignored() -> None:
    question = generate(prompt="And?", context=[128006, 882, 128007])
    assert question.ignored == ("context",)
    assert len(body(question)["messages"]) == 1


@pytest.mark.parametrize("form", list(Form))
def test_a_request_without_a_prompt_only_loads(form: Form) -> None:
    question = questions.read(form, {"model": "qwen", "keep_alive": 0})
    assert (question.attempts, question.keep_alive_seconds) == ((), 0.0)


# --- Embeddings.


def test_texts_are_embedded_together() -> None:
    question = questions.read(Form.EMBED, {"model": "e", "input": ["a", "b"], "dimensions": 64, "truncate": True})
    assert question.attempts[0].path == b"/v1/embeddings"
    assert body(question) == {"model": "e", "input": ["a", "b"], "encoding_format": "float", "dimensions": 64}
    assert (question.is_streamed, question.ignored) == (False, ("truncate",))
    assert body(questions.read(Form.EMBED, {"model": "e", "input": "a"}))["input"] == ["a"]
    assert body(questions.read(Form.EMBEDDINGS, {"model": "e", "prompt": "a"}))["input"] == ["a"]


# --- keep_alive.


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None), (0, 0.0), ("0", 0.0), ("0s", 0.0), (-1, math.inf), ("-1", math.inf), ("-1m", math.inf),
        (300, 300.0), (1.5, 1.5), ("5m", 300.0), ("1h30m", 5400.0), ("1.5h", 5400.0), ("500ms", 0.5),
        ("100000h", math.inf), ("300", 300.0), ("+2s", 2.0),
    ],
)  # fmt: skip
def test_a_keep_alive_is_seconds_or_a_duration_of_go(value: object, seconds: float | None) -> None:
    assert keepalive.parse(value) == seconds


@pytest.mark.parametrize("value", ["", "soon", "5 m", "5x", "m", "1h-", [], True, math.nan, "9" * 99])
def test_any_other_keep_alive_is_refused(value: object) -> None:
    with pytest.raises(HttpError, match="keep_alive"):
        keepalive.parse(value)


# --- Names and bodies.


def test_older_clients_name_a_model_by_name() -> None:
    assert members.model({"name": "qwen"}) == "qwen"
    assert "names no model" in refusal(Form.CHAT, {"messages": []})


def test_a_body_of_very_many_values_is_refused_before_they_take_memory() -> None:
    with pytest.raises(HttpError, match="too many values") as caught:
        members.read(b'{"model": "qwen", "a": [' + b"[]," * (1 << 20) + b"[]]}")
    assert caught.value.status == 413
    assert len(members.read(json.dumps({"a": "words" * (1 << 20), "b": list(range(100_000))}).encode())) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_body_that_is_no_object_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(HttpError, match=said):
        members.read(text)


# --- Endpoints.


def test_the_gateway_answers_malformed_requests_to_the_same_paths_in_ollamas_form() -> None:
    assert routes.OLLAMA == endpoints.PATHS


@pytest.mark.parametrize(
    ("method", "target", "found"),
    [
        (b"GET", b"/api/tags", Endpoint.TAGS),
        (b"GET", b"//api/tags?x=1", Endpoint.TAGS),
        (b"HEAD", b"/api/version", Endpoint.VERSION),
        (b"POST", b"/api/chat", Endpoint.CHAT),
        (b"GET", b"/api/models/unload", None),
        (b"POST", b"/api/v1/generate", None),
        (b"GET", b"/", None),
    ],
)
def test_an_endpoint_is_found_by_its_path(method: bytes, target: bytes, found: Endpoint | None) -> None:
    assert endpoints.find(method, target, is_own_port=False) is found


def test_the_root_is_ollamas_at_its_own_port_alone() -> None:
    assert endpoints.find(b"HEAD", b"/", is_own_port=True) is Endpoint.ROOT
    assert endpoints.find(b"POST", b"/v1/chat/completions", is_own_port=True) is None


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        (b"GET", b"/api/chat", 405),
        (b"DELETE", b"/api/tags", 405),
        (b"POST", b"/api/create", 501),
        (b"POST", b"/api/copy", 501),
        (b"DELETE", b"/api/delete", 501),
        (b"POST", b"/api/push", 501),
        (b"HEAD", b"/api/blobs/sha256:29fd", 404),
        (b"POST", b"/api/blobs/sha256:29fd", 501),
    ],
)
def test_what_gpusvc_does_not_do_is_refused_in_words(method: bytes, target: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        endpoints.find(method, target, is_own_port=False)
    assert caught.value.status == status
    assert caught.value.message.endswith(".")


# --- Whatever comes.

WORDS = st.text(max_size=20)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["model", "name", "messages", "prompt", "input", "options", "format", "think", "tools", "images", "keep_alive",
     "context", "stream", "raw", "suffix", "system", "role", "content", "tool_calls", "function", "arguments", "stop",
     "temperature", "num_ctx", "num_predict", "dimensions", "truncate", "logprobs", "top_logprobs", "tool_name"]
)  # fmt: skip
NEARLY = st.recursive(
    JSON_VALUES, lambda inner: st.dictionaries(KEYS, inner, max_size=6) | st.lists(inner, max_size=3), max_leaves=20
)


@given(form=st.sampled_from(list(Form)), asked=st.dictionaries(KEYS, NEARLY, max_size=8))
def test_whatever_is_asked_is_a_question_or_a_refusal(form: Form, asked: dict[str, object]) -> None:
    try:
        question = questions.read(form, {"model": "qwen", **asked})
    except HttpError as error:
        question, status = None, error.status
    if question is None:
        assert status == 400
        return
    for attempt in question.attempts:
        json.dumps(attempt.body)
        assert attempt.body["model"] == question.model
    ", ".join(question.ignored).encode("ascii")
    assert question.keep_alive_seconds is None or question.keep_alive_seconds >= 0


@given(said=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=6))
def test_a_context_comes_back_as_it_was(said: list[tuple[str, str]]) -> None:
    numbers = context.encode(said)
    assert numbers is not None
    assert all(0 <= number < 1 << 24 for number in numbers)
    if not any(0xD800 <= ord(letter) < 0xE000 for _, words in said for letter in words):
        assert context.decode(numbers) == said


@given(numbers=st.lists(st.integers(0, 1 << 24), max_size=30) | JSON_VALUES)
def test_any_other_context_is_none(numbers: object) -> None:
    assert context.decode(numbers) is None
    if isinstance(numbers, list):
        marked = [0x675653, max(0, len(numbers) * 3 - 3), *numbers]
        context.decode(marked)


def test_a_context_that_unpacks_without_an_end_is_none() -> None:
    packed = zlib.compress(b"[" * 10_000_000)
    packed += b"\0" * (-len(packed) % 3)
    numbers = [int.from_bytes(packed[at : at + 3]) for at in range(0, len(packed), 3)]
    assert context.decode([0x675653, len(packed), *numbers]) is None


def test_a_conversation_that_is_too_long_has_no_context() -> None:
    assert context.encode([("user", "a" * 300_000)]) is None


@given(text=st.text(alphabet="0123456789.-+hmsnuµ e", max_size=12))
def test_any_duration_is_one_or_refused(text: str) -> None:
    try:
        seconds = keepalive.parse(text)
    except HttpError:
        return
    assert seconds is not None
    assert seconds >= 0
