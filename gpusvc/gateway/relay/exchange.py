"""One request and its answer: let in, led to its model, relayed, counted.

What needs no waiting happens in one go, without a task, a future or a timer: origin, key, route, model, locks, and an
idle connection to the engine. Whatever has to be waited for comes back as a call of one of the methods here.

    begin → admitted → (the name is in the body: feed …) → chosen → entered → connected → relayed → over

It is over in one of four ways: the end of the answer, a refusal, an engine that is lost, or a client that is gone.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from gpusvc.config import keys
from gpusvc.config.serving import Serving
from gpusvc.errors import GpusvcError
from gpusvc.gateway.activation.activation import Passage
from gpusvc.gateway.entry import routes
from gpusvc.gateway.entry.routes import Right, Route, Target
from gpusvc.gateway.http import replies
from gpusvc.gateway.http.head import RequestHead, ResponseHead
from gpusvc.gateway.http.replies import Dialect, Refusal, Reply
from gpusvc.gateway.process.shared import Downstream, Shared
from gpusvc.gateway.relay.answer import Answer
from gpusvc.gateway.relay.delivery import Delivery
from gpusvc.gateway.relay.tunnel import Tunnel
from gpusvc.gateway.relay.upstream import Address, Upstream
from gpusvc.gateway.relay.usage import Tail, is_counted
from gpusvc.log import log
from gpusvc.quantity import format_duration
from gpusvc.state.counters import ModelCounters

_RIGHTS = {Right.USE: keys.Right.USE, Right.METRICS: keys.Right.METRICS, Right.ADMIN: keys.Right.ADMIN}

# What there may be more of in a moment.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EAGAIN})

# What may be done twice (RFC 9110, 9.2.2).
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"})

# A browser asks for a name and a password then; pages and their scripts are of the same origin.
_FOR_BROWSERS = ((b"www-authenticate", b'Basic realm="gpusvc"'),)

_JSON = ((b"content-type", b"application/json"),)

# Of an error that an engine sends where its client was promised a stream.
_LONGEST_ERROR_BYTES = 65536


class Exchange:
    """The request whose turn it is on a client's connection."""

    __slots__ = (
        "_answer",
        "_began_seconds",
        "_client",
        "_counters",
        "_delivery",
        "_dialect",
        "_error",
        "_head",
        "_is_counted",
        "_is_over",
        "_is_promised",
        "_is_retried",
        "_is_stream",
        "_key",
        "_passage",
        "_path",
        "_route",
        "_serving",
        "_shared",
        "_tail",
        "_task",
        "_upstream",
        "_waiting",
    )

    def __init__(self, shared: Shared, client: Downstream, head: RequestHead) -> None:
        self._shared = shared
        self._client = client
        self._head = head
        self._answer = Answer(shared, client, head)
        self._began_seconds = time.monotonic()
        self._dialect = Dialect.OPENAI
        self._route: Route | None = None
        self._path = b""
        self._key: keys.Key | None = None
        self._delivery: Delivery | None = None
        self._serving: Serving | None = None  # the model; None also where the API is asked
        self._counters: ModelCounters | None = None  # of the model
        self._waiting: ModelCounters | None = None  # in which this request counts as waiting
        self._passage: Passage | None = None
        self._task: asyncio.Task[None] | None = None
        self._upstream: Upstream | None = None
        self._tail: Tail | None = None
        self._error: bytearray | None = None  # what an engine sends instead of a promised stream
        self._is_retried = False
        self._is_promised = False  # the client was told that events follow, before the engine said so
        self._is_stream = False
        self._is_counted = False
        self._is_over = False

    # The request, as it comes in.

    def begin(self, whole: bytes | None) -> None:
        """The head is there.

        Args:
            whole: the body, if all of it is there too; None: feed() and end() follow.
        """
        self._attempt(self._admit, whole)

    def feed(self, data: bytes) -> None:
        """More of the body."""
        self._attempt(self._feed, data)

    def end(self) -> None:
        """The body is complete."""
        self._attempt(self._end)

    def refuse(self, refusal: Refusal) -> None:
        """Say no; or, where an answer has begun, break it off."""
        if self._is_over:
            return
        self._leave_engine()
        if self._key is not None and self._key.is_limited:
            refusal = refusal.in_brief()
        if self._answer.status:
            self._break_off(refusal)
            return
        if self._route is None:
            self._dialect = routes.dialect_of(self._head.target)
        self._reply(replies.refusal(self._dialect, refusal))

    def cancel(self) -> None:
        """The client is gone."""
        if not self._is_over:
            self._leave_engine()
            self._close()

    # Back-pressure, and time.

    def pause(self) -> None:
        """The client does not take the answer as fast as it comes."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """It takes more."""
        if self._upstream is not None:
            self._upstream.resume()

    def check(self, now: float) -> None:
        """Give up an engine that has been silent for ``upstream_timeout``; ``now`` is by the clock of the sweeps."""
        limit = self._shared.settings().upstream_timeout_seconds
        upstream = self._upstream
        if limit and upstream is not None and upstream.is_awaited and now - upstream.heard > limit:
            text = f"Nothing came from {self._engine} for {format_duration(limit)}."
            self.refuse(Refusal(504, text, code="upstream_timeout"))

    # What comes from the engine (upstream.Consumer).

    def on_head(self, head: ResponseHead, *, has_body: bool) -> None:
        answer = self._answer
        if head.status < 200:
            answer.interim(head)
            return
        if self._counters is not None:
            self._counters.first_byte(time.monotonic() - self._began_seconds)
            self._is_counted = is_counted(head.content_type)
        if not self._is_promised:
            self._is_stream = head.is_stream
            answer.begin(head, has_body=has_body)
        elif head.status != 200 or not head.is_stream:
            answer.status = head.status
            self._error = bytearray()

    def on_upgrade(self, upstream: Upstream, head: ResponseHead, rest: bytes) -> None:
        self._upstream = None
        self._answer.switch(head)
        if rest:
            self._client.write(rest)
        engine = upstream.detach()
        client, early = self._client.detach()
        if early:
            engine.write(early)
        Tunnel(
            client,
            engine,
            loop=self._shared.loop,
            patience_seconds=self._shared.limits.stall_seconds,
            on_progress=self._progress,
            on_end=self._finish,
        )

    def on_body(self, data: bytes) -> None:
        if self._passage is not None:
            self._passage.touch()
        if self._error is not None:
            self._error += data[: _LONGEST_ERROR_BYTES - len(self._error)]
            return
        self._answer.add(data)
        if self._is_counted:
            if self._tail is None:
                self._tail = Tail(data)
            else:
                self._tail.add(data)

    def on_pause(self) -> None:
        self._answer.flush()

    def on_end(self, trailers: list[bytes]) -> None:
        self._upstream = None
        if self._error is not None:
            self.refuse(self._broken_promise(bytes(self._error)))
            return
        self._answer.end(trailers)
        self._finish()

    def on_lost(self, upstream: Upstream, reason: str) -> None:
        self._upstream = None
        self._attempt(self._lose, upstream, reason)

    def on_writable(self) -> None:
        self._attempt(self._pump)

    # Who may, and whom it is for.

    def _admit(self, whole: bytes | None) -> None:
        head, shared = self._head, self._shared
        granted = shared.guard.judge(
            head.method,
            head.target,
            host=head.host,
            origin=head.origin,
            fetch_site=head.fetch_site,
            fetch_mode=head.fetch_mode,
            request_method=head.request_method,
            request_headers=head.request_headers,
            private_network=head.private_network,
        )
        if isinstance(granted, Reply):
            self._reply(granted)
            return
        self._answer.granted = granted
        route = self._route = routes.route(head.method, head.target)
        self._dialect, self._path = route.dialect, route.path
        if route.right is not Right.NONE and shared.keys.configured:
            self._key = self._authorise(route.right)
        target = route.target
        if target is Target.MODEL or target is Target.NAMED or target is Target.MANAGEMENT:
            limit = shared.settings().max_body_bytes
            self._delivery = Delivery(head, whole, limit_bytes=limit, names_model=target is Target.MODEL)
            self._lead(route, self._delivery)
        else:
            self._reply(self._own_answer(route))

    def _authorise(self, right: Right) -> keys.Key:
        key = self._shared.keys.authenticate(self._head.authorization, self._head.x_api_key)
        if key is None:
            raise Refusal(
                401,
                "No valid API key came with the request.",
                hint="It belongs in the header Authorization, behind Bearer, or in X-Api-Key.",
                code="invalid_api_key",
                headers=_FOR_BROWSERS if right is Right.ADMIN else (),
            )
        if not key.may(_RIGHTS[right]):
            raise Refusal(403, f"The key {key.name} is not for this.", code="right_missing")
        return key

    def _own_answer(self, route: Route) -> Reply:
        if route.target is Target.MODELS:
            return Reply(200, _JSON, self._shared.catalog.listing(self._may_use))
        if route.target is Target.MODEL_CARD:
            return Reply(200, _JSON, self._shared.catalog.card(route.name or "", allowed=self._may_use))
        return replies.reply_json(200, {"status": "ok"})

    def _may_use(self, model: str) -> bool:
        return self._key is None or self._key.may_use(model)

    def _lead(self, route: Route, delivery: Delivery) -> None:
        """Find out where it goes, as soon as that is known."""
        if route.target is Target.MODEL:
            if delivery.is_settled:
                self._choose(self._resolve(route, delivery), delivery)
        elif route.target is Target.NAMED:
            serving, self._path = self._shared.catalog.locate(route, allowed=self._may_use)
            self._choose(serving, delivery, is_edited=False)
        else:
            delivery.choose(None)
            self._connect(delivery)

    def _resolve(self, route: Route, delivery: Delivery) -> Serving:
        name = delivery.model
        if name is None:
            name = route.name
        if name is None and self._head.model is not None:
            name = self._head.model.decode(errors="replace")
        # A page that somebody only looks at loads nothing.
        guess = self._head.method == b"POST"
        if name is None and self._head.method in {b"GET", b"HEAD"}:
            raise Refusal(
                404,
                "There is nothing here that belongs to no model.",
                hint="/ is the status page, /v1/models lists the models; ?model= or the header X-Model names one.",
                code="not_found",
            )
        try:
            return self._shared.catalog.resolve(name, allowed=self._may_use, guess=guess)
        except Refusal as refusal:
            raise (delivery.missing_model if name is None else None) or refusal from None

    def _choose(self, serving: Serving, delivery: Delivery, *, is_edited: bool = True) -> None:
        if not self._may_use(serving.name):
            raise Refusal(403, "The API key is not for this model.", code="model_not_allowed")  # an alias tells no name
        delivery.choose(serving if is_edited else None)
        self._serving = serving
        self._counters = self._shared.counters.of(serving.name)
        self._counters.began()
        passage = self._shared.activation.try_enter(serving)
        if passage is None:
            self._wait(serving)
        else:
            self._passage = passage
            self._connect(delivery)

    # More of the body.

    def _feed(self, data: bytes) -> None:
        if self._delivery is not None and not self._is_over:
            self._delivery.feed(data)
            self._advance(self._delivery)

    def _end(self) -> None:
        if self._delivery is not None and not self._is_over:
            self._delivery.end()
            self._advance(self._delivery)

    def _advance(self, delivery: Delivery) -> None:
        if self._upstream is not None:
            self._pump()
        elif self._route is not None and self._serving is None and self._route.target is Target.MODEL:
            self._lead(self._route, delivery)
        elif self._task is None:
            self._connect(delivery)
        if delivery.is_full and not self._is_over:
            self._client.pause()

    def _pump(self) -> None:
        if self._delivery is None or self._upstream is None:
            return
        self._delivery.pump(self._upstream)
        if self._passage is not None:
            self._passage.touch()
        if not self._delivery.is_full:
            self._client.resume()

    # The way in, if it is not open.

    def _wait(self, serving: Serving) -> None:
        self._waiting = self._shared.counters.of(serving.name)
        self._waiting.waiting(1)
        tell = self._tell if self._shared.settings().loading_events else None
        self._start(self._wait_inside, serving, tell)

    async def _wait_inside(self, serving: Serving, tell: Callable[[str], None] | None) -> None:
        self._passage = await self._shared.activation.enter(serving, on_wait=tell)
        self._task = None
        self._stop_waiting()
        if self._delivery is not None:
            self._connect(self._delivery)

    def _stop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.waiting(-1)

    def _tell(self, sentence: str) -> None:
        """Have a client that wants events see that something happens."""
        if self._is_over or self._delivery is None or not self._delivery.wants_stream:
            return
        if not self._is_promised:
            self._is_promised = self._is_stream = True
            self._answer.begin_stream()
            self._head.refuse_coding()  # what the head of the answer did not say
        self._answer.add(replies.loading_comment(sentence))
        self._answer.flush()

    # To the engine.

    def _connect(self, delivery: Delivery) -> None:
        """Find a connection for the request, and send what there is of it."""
        if not delivery.is_ready:
            return  # until more of the body is there
        passage, pool = self._passage, self._shared.pool
        address: Address = self._shared.api if passage is None else (passage.address, passage.port)
        # One that idles may just be closed by the engine: it is for requests that could be sent again. Nobody can tell
        # then whether the API has done what it was told.
        may_repeat = passage is not None or self._head.method in _IDEMPOTENT
        upstream = pool.take(address) if delivery.is_complete and may_repeat else None
        if upstream is not None:
            self._transmit(upstream, delivery)
            return
        if not delivery.is_complete:
            pool.make_room(address)
        self._start(self._connect_anew, address, delivery)

    async def _connect_anew(self, address: Address, delivery: Delivery) -> None:
        try:
            upstream = await self._shared.pool.connect(address)
        except (OSError, TimeoutError) as error:
            self._task = None
            self._be_rejected(error)
        else:
            self._task = None
            self._transmit(upstream, delivery)

    def _be_rejected(self, error: OSError | TimeoutError) -> None:
        """There is nobody; nothing was sent yet."""
        if error.errno in _EXHAUSTED:
            raise error  # that is not the engine's fault
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "it takes too long"
        serving, passage = self._serving, self._passage
        if serving is not None:
            self._shared.activation.suspect(serving)
        if serving is None or passage is None or self._is_retried:
            raise Refusal(
                502, f"{self._engine} takes no connections ({reason}).", hint=self._hint, code="engine_unreachable"
            )
        # It has gone, or is just going: the request waits until the model is back.
        self._is_retried = True
        self._passage = None
        passage.close()
        self._wait(serving)

    def _transmit(self, upstream: Upstream, delivery: Delivery) -> None:
        self._upstream = upstream
        head, client = self._head, self._client
        lines = client.forwarded
        if head.forwarded_for is not None or head.forwarded_proto is not None or self._key is not None:
            lines = self._forwarded()
        delivery.send(upstream, self, self._path, lines)
        if not delivery.is_full:
            self._client.resume()

    def _forwarded(self) -> list[bytes]:
        """Who the client is, if there is more to say than what its connection shows."""
        head, client = self._head, self._client
        sources = client.address if head.forwarded_for is None else head.forwarded_for + b", " + client.address
        lines = [
            b"X-Forwarded-For: " + sources,
            b"X-Forwarded-Proto: " + (head.forwarded_proto or client.scheme),  # a proxy in front knows better
        ]
        if self._key is not None and self._serving is None:
            lines.append(b"X-Gpusvc-Key: " + self._key.name.encode())
        return lines

    # The end.

    @property
    def _engine(self) -> str:
        return "The management API" if self._serving is None else f"The engine of {self._serving.name}"

    @property
    def _hint(self) -> str:
        if self._serving is None:
            return "`systemctl status gpusvc-api.service` shows why."
        return f"`gpusvc logs {self._serving.name}` may show why."

    def _lose(self, upstream: Upstream, reason: str) -> None:
        """The connection broke."""
        delivery = self._delivery
        is_stale = upstream.is_used and not upstream.was_heard
        is_harmless = is_stale and (self._head.method in _IDEMPOTENT or upstream.is_untaken())
        if delivery is not None and is_harmless and delivery.rewind():
            self._start(self._connect_anew, upstream.address, delivery)
            return
        if self._serving is not None:
            self._shared.activation.suspect(self._serving)
        when = "in the middle of its answer" if upstream.was_heard else "before it answered"
        raise Refusal(502, f"{self._engine} {reason} {when}.", hint=self._hint, code="engine_lost")

    def _broken_promise(self, error: bytes) -> Refusal:
        """Instead of a stream the engine sent ``error``."""
        status = self._answer.status
        return Refusal(
            status if status >= 400 else 502,
            _message_in(error) or f"{self._engine} answered with status {status}, and without a stream.",
        )

    def _break_off(self, refusal: Refusal) -> None:
        """The answer cannot become whole; nobody shall take it for that."""
        self._answer.status = refusal.status
        last_words = None
        if self._is_stream:
            last_words = replies.stream_refusal(self._dialect, refusal)
            if self._tail is not None and not self._tail.is_between_events:
                last_words = b"\n\n" + last_words
        self._close()
        self._answer.break_off(last_words)

    def _reply(self, reply: Reply) -> None:
        self._answer.reply(reply)
        self._finish()

    def _progress(self, sent_bytes: int) -> None:
        self._answer.sent_bytes += sent_bytes
        if self._passage is not None:
            self._passage.touch()

    def _finish(self) -> None:
        self._close()
        self._client.finish(is_kept=self._answer.is_kept)

    def _close(self) -> None:
        self._is_over = True
        if self._passage is not None:
            self._passage.close()
        counters = self._counters
        if counters is None:
            counters = self._shared.counters.of("")
            counters.began()
        counters.ended(self._answer.status, time.monotonic() - self._began_seconds)
        counters.sent(self._answer.sent_bytes)
        if self._delivery is not None:
            counters.received(self._delivery.received_bytes)
            self._delivery.close()
        tokens = None if self._tail is None else self._tail.tokens()
        if tokens is not None:
            counters.tokens(*tokens)

    def _leave_engine(self) -> None:
        """Nothing more is wanted of it, nor of anything else that takes time."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        self._stop_waiting()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()

    # What may fail, at once or later.

    def _attempt(self, step: Callable[..., None], *arguments: object) -> None:
        try:
            step(*arguments)
        except Exception as error:
            self.refuse(_refusal_for(error))

    def _start(self, step: Callable[..., Coroutine[Any, Any, None]], *arguments: object) -> None:
        self._task = self._shared.loop.create_task(self._attempt_later(step, arguments))

    async def _attempt_later(
        self, step: Callable[..., Coroutine[Any, Any, None]], arguments: tuple[object, ...]
    ) -> None:
        try:
            await step(*arguments)
        except Exception as error:
            self._task = None
            self.refuse(_refusal_for(error))


def _refusal_for(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, GpusvcError):
        return Refusal(error.http_status, error.message, hint=error.hint)
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        why = os.strerror(error.errno)
        log(4, f"A request is turned away: {why}.")
        return Refusal(
            503,
            f"The gateway cannot take this request now: {why}.",
            code="exhausted",
            retry_after_seconds=1,
            close=True,
        )
    log(3, "".join(traceback.format_exception(error)))
    return Refusal(500, "The gateway failed.", hint="Its journal says how.", code="internal_error", close=True)


def _message_in(error: bytes) -> str | None:
    """The message of an error in the form of either API."""
    try:
        message = json.loads(error)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return message if isinstance(message, str) else None
