"""What the gateway says itself: whole answers, and the errors of each API in the form that its clients read.

It knows no request and no connection. The forms are those of the OpenAI and the Anthropic API, whose clients show the
message to a person, and decide by status, ``Retry-After`` and code whether they try again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

from gpusvc.errors import GpusvcError

Headers = tuple[tuple[bytes, bytes], ...]


class Dialect(StrEnum):
    """Whose API a request speaks."""

    OPENAI = "openai"  # also what has no form of its own, as the paths of llama.cpp
    ANTHROPIC = "anthropic"


class HttpError(GpusvcError):
    """A request that the gateway answers with an error itself."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        hint: str | None = None,
        kind: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        close: bool = False,
        headers: Headers = (),
        brief: str | None = None,
    ) -> None:
        """
        Args:
            status: of HTTP.
            message: a sentence for a person.
            hint: another, on what to do about it.
            kind: OpenAI's ``type``; None is the usual one of the status. Anthropic's always follows from the status.
            code: OpenAI's ``code``, for programs.
            param: OpenAI's ``param``, the member of the request that is wrong.
            retry_after_seconds: when to try again; None: that is left to the client.
            close: nothing more can be read from this connection.
            headers: more for the answer, with names in lower case.
            brief: a sentence for whoever may not know of all models, instead of message and hint; None: they say
                nothing of others.
        """
        super().__init__(message, hint=hint)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.close = close
        self.headers = headers
        self.brief = brief

    def in_brief(self) -> HttpError:
        """The same for whoever may not know of all models."""
        if self.brief is None:
            return self
        return HttpError(
            self.status,
            self.brief,
            kind=self.kind,
            code=self.code,
            retry_after_seconds=self.retry_after_seconds,
            close=self.close,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, without what frames it: ``Content-Length``, ``Date`` and ``Connection`` are for who sends it."""

    status: int
    headers: Headers  # names in lower case
    body: bytes
    close: bool = False
    """The connection ends with it."""


def reply_json(status: int, value: object, headers: Headers = ()) -> Reply:
    return Reply(status, ((b"content-type", b"application/json"), *headers), _encode(value))


def error_reply(dialect: Dialect, error: HttpError) -> Reply:
    """An error as the whole answer."""
    headers = error.headers
    if error.retry_after_seconds is not None:
        headers += ((b"retry-after", b"%d" % error.retry_after_seconds),)
    if error.status == 401:
        headers += ((b"www-authenticate", b"Bearer"),)  # RFC 9110 wants a challenge with each 401
    answer = reply_json(error.status, _error(dialect, error), headers)
    return Reply(answer.status, answer.headers, answer.body, close=error.close)


def error_event(dialect: Dialect, error: HttpError) -> bytes:
    """An error as an event of a stream that has begun: where no other event is half sent."""
    data = b"data: " + _encode(_error(dialect, error)) + b"\n\n"
    # Clients of OpenAI tell an error by its member ``error``, and some of them take no event with a name.
    return b"event: error\n" + data if dialect is Dialect.ANTHROPIC else data


def loading_comment(text: str) -> bytes:
    """A comment of a stream of events: every client reads over it, and it keeps timeouts from running out."""
    return b": " + " ".join(text.split()).encode(errors="replace") + b"\n\n"


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _error(dialect: Dialect, error: HttpError) -> dict[str, object]:
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, _general(error.status, "api_error"))
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    kind = error.kind or _OPENAI_TYPES.get(error.status, _general(error.status, "server_error"))
    # All four members are always there: the typed clients of OpenAI want them.
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _general(status: int, of_server: str) -> str:
    return "invalid_request_error" if status < 500 else of_server


def _encode(value: object) -> bytes:
    # ASCII, so that nothing depends on a charset; a lone surrogate out of a path cannot fail it either.
    return json.dumps(value, separators=(",", ":")).encode()
