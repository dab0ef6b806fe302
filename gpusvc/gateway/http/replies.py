"""The gateway's own responses, and its errors in the form of each API.

The forms are those of the OpenAI, Anthropic and Ollama API. Their clients show the message to a person, and decide by
status, ``Retry-After`` and code whether to try again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

from gpusvc.errors import GpusvcError

Headers = tuple[tuple[bytes, bytes], ...]


class Dialect(StrEnum):
    """The API of a request."""

    OPENAI = "openai"  # also for paths of APIs without an error form of their own, such as llama.cpp's
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


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
            status: the HTTP status.
            message: a sentence for a person.
            hint: a sentence that says what to do about it.
            kind: OpenAI's ``type``; None: the usual one of the status. Anthropic's always follows from the status.
            code: OpenAI's ``code``, for programs.
            param: OpenAI's ``param``, the member of the request that is wrong.
            retry_after_seconds: when to try again; None: the client decides.
            close: whether the connection must close, because nothing more can be read from it.
            headers: further response headers, with names in lower case.
            brief: replaces message and hint for a client that may not know of all models; None: message and hint
                name no other models.
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
        """Return the error for a client that may not know of all models."""
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
    """A whole response. The sender adds ``Content-Length``, ``Date`` and ``Connection``."""

    status: int
    headers: Headers  # names in lower case
    body: bytes
    close: bool = False
    """Whether the connection closes after it."""


def reply_json(status: int, value: object, headers: Headers = ()) -> Reply:
    return Reply(status, ((b"content-type", b"application/json"), *headers), _encode(value))


def error_reply(dialect: Dialect, error: HttpError) -> Reply:
    """Return an error as a whole response."""
    headers = error.headers
    if error.retry_after_seconds is not None:
        headers += ((b"retry-after", b"%d" % error.retry_after_seconds),)
    if error.status == 401:
        headers += ((b"www-authenticate", b"Bearer"),)  # RFC 9110 wants a challenge with each 401
    answer = reply_json(error.status, _error(dialect, error), headers)
    return Reply(answer.status, answer.headers, answer.body, close=error.close)


def error_event(dialect: Dialect, error: HttpError) -> bytes:
    """Return an error as an event for a stream that has begun. Send it only between two events."""
    data = b"data: " + _encode(_error(dialect, error)) + b"\n\n"
    # Clients of OpenAI recognise an error by its member ``error``, and some of them accept no named events.
    return b"event: error\n" + data if dialect is Dialect.ANTHROPIC else data


def loading_comment(text: str) -> bytes:
    """Return a comment for a stream of events. Clients ignore it, and it keeps their timeouts from running out."""
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
    if dialect is Dialect.OLLAMA:
        return {"error": str(error)}
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, _general(error.status, "api_error"))
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    kind = error.kind or _OPENAI_TYPES.get(error.status, _general(error.status, "server_error"))
    # All four members are always there: typed clients of OpenAI need them.
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _general(status: int, of_server: str) -> str:
    return "invalid_request_error" if status < 500 else of_server


def _encode(value: object) -> bytes:
    # ASCII, so that nothing depends on a charset, and a lone surrogate from a path cannot make the encoding fail.
    return json.dumps(value, separators=(",", ":")).encode()
