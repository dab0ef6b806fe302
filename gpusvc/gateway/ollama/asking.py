"""One question at its engine: asked in the engine's words, and the response translated as it comes."""

from __future__ import annotations

import json
import time
from typing import Protocol

from gpusvc.gateway.http.replies import Headers, HttpError, Reply, reply_json
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.http.response_head import ResponseHead
from gpusvc.gateway.ollama import answers
from gpusvc.gateway.ollama.answers import Answer, Times, Value
from gpusvc.gateway.ollama.events import Events, TooLongError
from gpusvc.gateway.ollama.inner import Inner
from gpusvc.gateway.ollama.pieces import EngineError, error_in, read
from gpusvc.gateway.ollama.questions import Question
from gpusvc.gateway.relay import faults
from gpusvc.gateway.relay.response import Response
from gpusvc.gateway.relay.shared import Downstream, Shared

_LONGEST_ANSWER_BYTES = 64 << 20

# An engine that does not know a path says one of these.
_UNKNOWN_PATH = frozenset({404, 405, 501})

# What the gateway itself answers with 404; another path would not change that.
_UNKNOWN_MODEL = "model_not_found"

_NDJSON = b"Content-Type: application/x-ndjson"


class Owner(Protocol):
    """Whose question it is. After one of these calls the question is over."""

    def answer(self, reply: Reply) -> None:
        """The whole answer."""

    def finish(self) -> None:
        """A stream was written to its end."""

    def fail(self, error: HttpError) -> None:
        """There will be no whole answer."""


class Asking:
    """It is the Taker of its Inner requests."""

    def __init__(
        self,
        shared: Shared,
        client: Downstream,
        head: RequestHead,
        response: Response,
        question: Question,
        attempts: list[tuple[bytes, bytes]],
        times: Times,
        owner: Owner,
        headers: Headers,
    ) -> None:
        """
        Args:
            shared: by all connections.
            client: whose request it is.
            head: as the client sent it.
            response: to the client.
            question: what is asked.
            attempts: path and body of each way to ask it; each is dropped when it was sent.
            times: of the request.
            owner: told of the end.
            headers: more of the response, with names in lower case.
        """
        self._shared = shared
        self._client = client
        self._head = head
        self._response = response
        self._question = question
        self._times = times
        self._owner = owner
        self._headers = headers
        self._attempts = attempts
        self._inner: Inner | None = None
        self._answer = Answer(question, times)
        self._status = 0
        self._retry_after: bytes | None = None
        self._events: Events | None = None  # of a response that is a stream
        self._whole = bytearray()  # of one that is not
        self._error: HttpError | None = None  # that a stream has told

    def begin(self) -> None:
        """Ask the engine, or the next way after one that it does not know."""
        path, body = self._attempts.pop(0)
        self._status, self._events, self._retry_after = 0, None, None
        self._whole.clear()
        inner = self._inner = Inner(self._shared, self._client, self)
        inner.begin(self._head, path, body)

    def cancel(self) -> None:
        """The client is gone, or the question failed."""
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.cancel()

    def pause(self) -> None:
        """Take no more of the response for now."""
        if self._inner is not None:
            self._inner.pause_reading()

    def resume(self) -> None:
        if self._inner is not None:
            self._inner.resume_reading()

    def check(self, now: float) -> None:
        """As relay.Exchange.check()."""
        if self._inner is not None:
            self._inner.check(now)

    # The response (inner.Taker).

    def on_sent(self) -> None:
        self._times.sent = time.monotonic_ns()

    def on_head(self, head: ResponseHead) -> None:
        self._status = head.status
        if head.status == 200 and head.is_stream:
            self._events = Events()
        for line in head.kept:
            name, _, value = line.partition(b":")
            if name.lower() == b"retry-after":
                self._retry_after = value.strip()

    def on_body(self, data: bytes) -> None:
        if self._events is None:
            self._whole += data
            if len(self._whole) > _LONGEST_ANSWER_BYTES:
                self._fail(_broken("is too long"))
            return
        try:
            for event in self._events.feed(data):
                self._take(event)
            self._response.flush()
        except Exception as error:
            self._fail(_to_http_error(error))

    def on_end(self) -> None:
        self._inner = None
        if self._status >= 300:
            self._refuse()
            return
        self._times.ended = time.monotonic_ns()
        try:
            if self._events is None:
                self._end_whole()
            else:
                for event in self._events.end():
                    self._take(event)
                self._end_stream()
        except Exception as error:
            self._owner.fail(_to_http_error(error))

    def on_broken(self) -> None:
        self._inner = None
        lost = HttpError(502, f"The answer of {self._question.model} ends before its end.", code="engine_lost")
        self._owner.fail(self._error or lost)

    def _take(self, event: bytes) -> None:
        """One event of a stream. Raises EngineError."""
        if event == b"[DONE]" or self._error is not None:
            return
        try:
            said = read(event)
        except EngineError as error:
            # The gateway breaks the stream off behind this; an engine may send more, which makes no whole answer.
            self._error = HttpError(502, str(error), code="engine_error")
            return
        if self._times.first is None:
            self._times.first = time.monotonic_ns()
        value = self._answer.part(said, time.time())
        if value is not None and self._question.is_streamed:
            self._say(value)

    def _say(self, value: Value) -> None:
        if not self._response.status:
            head = ResponseHead(200, b"OK", False)
            head.kept = [_NDJSON, *(name + b": " + text for name, text in self._headers)]
            self._response.begin(head, has_body=True, is_engine=False)
        self._response.add(answers.line(value))

    def _end_stream(self) -> None:
        if self._error is not None:
            self._owner.fail(self._error)
            return
        for value in self._answer.end(time.time()):
            self._say(value)
        self._response.end([])
        self._owner.finish()

    def _end_whole(self) -> None:
        said = read(bytes(self._whole))
        value = self._answer.whole(said, time.time())
        if self._question.is_streamed:  # the engine does not stream: then it is one line
            self._say(value)
            self._response.end([])
            self._owner.finish()
        else:
            self._owner.answer(reply_json(200, value, self._headers))

    def _refuse(self) -> None:
        """Pass an error of the gateway or the engine on."""
        try:
            said = json.loads(bytes(self._whole))
        except (ValueError, RecursionError):
            said = {}
        said = said if isinstance(said, dict) else {}
        error = said.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if self._status in _UNKNOWN_PATH and self._attempts and code != _UNKNOWN_MODEL:
            self.begin()
            return
        headers: Headers = () if self._retry_after is None else ((b"retry-after", self._retry_after),)
        message = error_in(said) or f"The engine answered with status {self._status}."
        status = self._status if self._status >= 400 else 502
        self._owner.fail(HttpError(status, message, code=code if isinstance(code, str) else None, headers=headers))

    def _fail(self, error: HttpError) -> None:
        self.cancel()
        self._owner.fail(error)


def _to_http_error(error: Exception) -> HttpError:
    if isinstance(error, TooLongError):
        return _broken("has an event without an end")
    if isinstance(error, EngineError):
        return HttpError(502, str(error), code="engine_error")
    return faults.to_http_error(error)


def _broken(what: str) -> HttpError:
    return HttpError(502, f"The engine's answer {what}.", code="engine_error")
