"""The gateway's own answers, as the clients of the two APIs read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gateway.http.replies import Dialect, HttpError, Reply, error_event, error_reply, loading_comment, reply_json

FULL = HttpError(
    503,
    "The queue is full.",
    hint="Try later.",
    kind="overloaded",
    code="queue_full",
    retry_after_seconds=7,
    close=True,
)


def test_openai_gets_all_four_members_and_the_hint_in_the_message() -> None:
    reply = error_reply(Dialect.OPENAI, FULL)
    assert (reply.status, reply.close) == (503, True)
    assert reply.headers == ((b"content-type", b"application/json"), (b"retry-after", b"7"))
    assert json.loads(reply.body) == {
        "error": {
            "message": "The queue is full. Try later.",
            "type": "overloaded",
            "param": None,
            "code": "queue_full",
        }
    }


def test_anthropic_gets_its_own_form_and_its_own_types() -> None:
    reply = error_reply(Dialect.ANTHROPIC, FULL)
    assert json.loads(reply.body) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "The queue is full. Try later."},
    }


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "permission_error", "permission_error"),
        (404, "invalid_request_error", "not_found_error"),
        (405, "invalid_request_error", "invalid_request_error"),
        (408, "timeout_error", "timeout_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "server_error", "api_error"),
        (502, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
        (504, "timeout_error", "timeout_error"),
        (507, "server_error", "api_error"),
    ],
)
def test_the_type_follows_from_the_status(status: int, openai: str, anthropic: str) -> None:
    types = [
        json.loads(error_reply(dialect, HttpError(status, "No.")).body)["error"]["type"]
        for dialect in (Dialect.OPENAI, Dialect.ANTHROPIC)
    ]
    assert types == [openai, anthropic]


def test_a_401_has_a_challenge_and_other_headers_are_kept() -> None:
    assert error_reply(Dialect.OPENAI, HttpError(401, "Who?")).headers[1:] == ((b"www-authenticate", b"Bearer"),)
    allow = ((b"allow", b"GET"),)
    assert error_reply(Dialect.OPENAI, HttpError(405, "No.", headers=allow)).headers[1:] == allow


def test_an_error_within_a_stream_is_one_event_of_the_dialect() -> None:
    error = HttpError(502, "It died.\nLast line:\n\x1b[0m ü", code="upstream_died")
    head, _, data = error_event(Dialect.OPENAI, error).partition(b" ")
    assert head == b"data:"
    assert json.loads(data)["error"]["message"] == error.message
    assert data.endswith(b"}\n\n")
    assert data.count(b"\n") == 2
    name, _, data = error_event(Dialect.ANTHROPIC, error).partition(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["type"] == "error"


@given(st.text())
def test_a_comment_is_one_line_whatever_it_says(text: str) -> None:
    comment = loading_comment(text)
    assert comment.startswith(b": ")
    assert comment.endswith(b"\n\n")
    assert not set(b"\r\n") & set(comment[:-2])


def test_json_is_ascii_and_takes_any_text() -> None:
    assert reply_json(200, {"a": "ü\ud800"}) == Reply(
        200, ((b"content-type", b"application/json"),), rb'{"a":"\u00fc\ud800"}'
    )
