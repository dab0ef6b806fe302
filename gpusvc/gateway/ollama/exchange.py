"""One request of Ollama's API: admitted, read as a whole, and answered by the gateway itself or by an engine.

To the client's connection it is what relay's Exchange is:

    begin()     the gate (origin, key) and the endpoint
    feed()      the body, until all of it is there
    _ask()      what is asked: of the gateway, in a task, or of an engine, by an Asking
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import replace

from gpusvc.config.keys import Key
from gpusvc.gateway.body.reading import JSON, too_large
from gpusvc.gateway.body.streamed import StreamedBody
from gpusvc.gateway.entry.destination import allowed_by
from gpusvc.gateway.http import replies
from gpusvc.gateway.http.replies import Dialect, Headers, HttpError, Reply
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.ollama import answers, keeping, members, questions
from gpusvc.gateway.ollama.answers import Times
from gpusvc.gateway.ollama.asking import Asking
from gpusvc.gateway.ollama.endpoints import Endpoint
from gpusvc.gateway.ollama.management import Management
from gpusvc.gateway.ollama.questions import Question
from gpusvc.gateway.ollama.shows import Shows
from gpusvc.gateway.relay import faults
from gpusvc.gateway.relay.account import Account
from gpusvc.gateway.relay.response import Response
from gpusvc.gateway.relay.shared import Downstream, Shared

# The body is needed as a whole, and its translation takes a multiple of it.
LONGEST_BYTES = 64 << 20

# Of a body that stays in memory as long as its request takes: one that the gateway answers, or that may be sent twice.
_LONGEST_HELD_BYTES = 1 << 20

IGNORED = b"x-gpusvc-ignored"
"""The header that names what had no effect in a request."""

# After an answer nobody waits for what its keep_alive does. The loop holds tasks weakly.
_keeping: set[asyncio.Task[None]] = set()


class OllamaExchange:
    """The request whose turn it is on a client's connection. It is the Owner of its Asking."""

    def __init__(self, shared: Shared, client: Downstream, head: RequestHead, endpoint: Endpoint | HttpError) -> None:
        """
        Args:
            shared: by all connections.
            client: whose request it is.
            head: of the request.
            endpoint: what it asks for; or the error that answers it, once the client has proven to be one.
        """
        self._shared = shared
        self._client = client
        self._head = head
        self._endpoint = endpoint
        self._response = Response(shared, client, head)
        self._account: Account | None = Account(shared.counters)
        self._times = Times(time.monotonic_ns())
        self._key: Key | None = None
        self._body: StreamedBody | None = None
        self._received_bytes = 0
        self._question: Question | None = None  # that an engine is asked
        self._asking: Asking | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_over = False

    # The request, as the connection sees it (relay.Exchange).

    def begin(self, whole: bytes | None) -> None:
        """The head is there. ``whole``: the body, if all of it is there too; None: feed() and end() follow."""
        try:
            self._admit(whole)
        except Exception as error:
            self.fail(faults.to_http_error(error))

    def feed(self, data: bytes) -> None:
        """More of the body."""
        if self._body is None or self._is_over:
            return
        try:
            self._body.feed(data)
        except Exception as error:
            self.fail(faults.to_http_error(error))

    def end(self) -> None:
        """The body is complete."""
        if self._body is None or self._is_over:
            return
        try:
            self._body.end()
            self._body.begin(None)
            pieces = []
            while piece := self._body.take():
                pieces.append(piece)
            self._drop_body()
            self._ask(b"".join(pieces))
        except Exception as error:
            self.fail(faults.to_http_error(error))

    def cancel(self) -> None:
        """The client is gone."""
        if not self._is_over:
            self._leave()
            self._close()

    def pause(self) -> None:
        """The client does not take the response as fast as it comes."""
        if self._asking is not None:
            self._asking.pause()

    def resume(self) -> None:
        if self._asking is not None:
            self._asking.resume()

    def check(self, now: float) -> None:
        """Look whether the engine takes too long; ``now`` is by the clock of the sweeps."""
        if self._asking is not None:
            self._asking.check(now)

    # What is asked.

    def _admit(self, whole: bytes | None) -> None:
        granted = self._shared.gate.check_origin(self._head)
        if isinstance(granted, Reply):
            self.answer(granted)
            return
        self._response.granted = granted
        endpoint = self._endpoint
        if isinstance(endpoint, HttpError):
            self._key = self._shared.gate.authorise(self._head, Endpoint.TAGS.right)
            raise endpoint
        self._key = self._shared.gate.authorise(self._head, endpoint.right)
        longest = LONGEST_BYTES if endpoint.form else _LONGEST_HELD_BYTES
        limit_bytes = min(self._shared.settings().max_body_bytes, longest)
        if whole is None:
            length = self._head.content_length
            self._body = StreamedBody(JSON, length, limit_bytes=limit_bytes, budget=self._shared.budget)
        elif len(whole) > limit_bytes:
            raise too_large(limit_bytes)
        else:
            self._received_bytes = len(whole)
            self._ask(whole)

    def _ask(self, body: bytes) -> None:
        endpoint = self._endpoint
        if isinstance(endpoint, HttpError):
            raise endpoint
        shows = Shows(self._shared, self._management(), allowed_by(self._key))
        if endpoint.form is None:
            reply = shows.at_once(endpoint)
            if reply is None:
                self._begin_task(shows.later(endpoint, body))
            else:
                self.answer(reply)
            return
        question = questions.read(endpoint.form, members.read(body))
        may_keep, headers = keeping.may_keep(self._key), self._headers(question)
        if not question.attempts and self._account is not None:
            self._begin_task(shows.load(question, may_keep, self._account, headers))
            return
        attempts = [(one.path, json.dumps(one.body, separators=(",", ":")).encode()) for one in question.attempts]
        if len(attempts) > 1 and len(attempts[-1][1]) > _LONGEST_HELD_BYTES:
            raise HttpError(413, "A request with a suffix may have 1 MiB.", code="request_too_large", param="suffix")
        # Images are not kept in memory as long as the answer takes.
        question = self._question = replace(question, attempts=())
        self._account = None  # the exchange of the inner request counts it
        self._asking = Asking(
            self._shared, self._client, self._head, self._response, question, attempts, self._times, self, headers
        )
        self._asking.begin()

    def _headers(self, question: Question) -> Headers:
        ignored = list(question.ignored)
        if question.keep_alive_seconds is not None and not keeping.may_keep(self._key):
            ignored.append("keep_alive")
        return ((IGNORED, ", ".join(ignored).encode()),) if ignored else ()

    def _management(self) -> Management:
        lines = list(self._client.forwarded)
        if self._key is not None:
            lines.append(b"X-Gpusvc-Key: " + self._key.name.encode())
        return Management(self._shared.api, lines)

    def _begin_task(self, answering: Coroutine[None, None, Reply]) -> None:
        self._task = self._shared.loop.create_task(self._answer_with(answering))

    async def _answer_with(self, answering: Coroutine[None, None, Reply]) -> None:
        try:
            reply = await answering
        except Exception as error:
            self._task = None
            self.fail(faults.to_http_error(error))
        else:
            self._task = None
            self.answer(reply)

    # The end (asking.Owner).

    def answer(self, reply: Reply) -> None:
        """Write a whole response."""
        if not self._is_over:
            self._response.reply(reply)
            self.finish()

    def finish(self) -> None:
        """The response was written to its end."""
        self._close()
        self._keep()
        self._client.finish(is_kept=self._response.is_kept)

    def fail(self, error: HttpError) -> None:
        """Answer with an error; or end a stream that has begun with a line that says so."""
        if self._is_over:
            return
        self._leave()
        if self._key is not None and self._key.is_limited:
            error = error.in_brief()
        if not self._response.status:
            self._response.reply(replies.error_reply(Dialect.OLLAMA, error))
            self._close()
            self._client.finish(is_kept=self._response.is_kept)
            return
        self._response.add(answers.line({"error": str(error)}))
        self._response.flush()
        self._close()
        self._client.break_off()

    def _keep(self) -> None:
        """Do what keep_alive says, now that an engine has answered."""
        question = self._question
        if question is None or question.keep_alive_seconds is None:
            return
        if keeping.may_keep(self._key):
            allowed = allowed_by(self._key)
            try:
                serving = self._shared.catalog.resolve(question.model, allowed=allowed)
            except HttpError:
                return  # its file is gone by now
            keep = keeping.keep(self._management(), serving, question.keep_alive_seconds)
            task = self._shared.loop.create_task(keep)
            _keeping.add(task)
            task.add_done_callback(_keeping.discard)

    def _leave(self) -> None:
        """Stop everything that takes time."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()

    def _drop_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            self._received_bytes = body.received_bytes
            body.close()

    def _close(self) -> None:
        self._is_over = True
        self._asking = None
        self._drop_body()
        if self._account is not None:
            self._account.close(self._response, self._received_bytes)
