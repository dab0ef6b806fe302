"""One request at its upstream: a connection is found, the request sent, and the response relayed as it comes."""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from gpusvc.config.serving import Serving
from gpusvc.gateway.activation.passage import Onlooker, Passage
from gpusvc.gateway.body.body import Body
from gpusvc.gateway.http import chunks
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.http.response_head import ResponseHead
from gpusvc.gateway.relay import faults
from gpusvc.gateway.relay.account import Account
from gpusvc.gateway.relay.request import is_idempotent, write_head
from gpusvc.gateway.relay.response import Response
from gpusvc.gateway.relay.shared import Downstream, Shared
from gpusvc.gateway.relay.tunnel import Tunnel
from gpusvc.gateway.relay.upstream import Address, Upstream
from gpusvc.quantity import format_duration


class Owner(Protocol):
    """Who forwards a request. One of these calls is the end of the forwarding."""

    def fail(self, error: HttpError) -> None:
        """The response cannot become whole."""

    def finish(self) -> None:
        """The response was relayed to its end."""

    def on_unreachable(self, error: OSError | TimeoutError) -> None:
        """The upstream takes no connections. Nothing was sent."""


class Forwarding:
    """Sends one request and relays its response, as the Consumer of its Upstream."""

    __slots__ = (
        "_account",
        "_body",
        "_client",
        "_head",
        "_is_chunked",
        "_lines",
        "_owner",
        "_passage",
        "_path",
        "_progressed_seconds",
        "_response",
        "_shared",
        "_task",
        "_upstream",
    )

    def __init__(
        self,
        shared: Shared,
        client: Downstream,
        owner: Owner,
        head: RequestHead,
        body: Body,
        path: bytes,
        lines: list[bytes],
        response: Response,
        account: Account,
        passage: Passage | Onlooker | None,
    ) -> None:
        """
        Args:
            shared: by all connections.
            client: the connection of the request.
            owner: gets the result.
            head: as the client sent it.
            body: for which begin() was called.
            path: path and query of the request to the upstream.
            lines: more for the request's head.
            response: to the client.
            account: of the request.
            passage: into the model; None: the request is for the management API.
        """
        self._shared = shared
        self._client = client
        self._owner = owner
        self._head = head
        self._body = body
        self._path = path
        self._lines = lines
        self._is_chunked = False
        self._response = response
        self._account = account
        self._passage = passage
        self._task: asyncio.Task[None] | None = None
        self._upstream: Upstream | None = None
        self._progressed_seconds = math.inf  # when a tunnel carried something last; infinite: there is no tunnel

    def begin(self) -> None:
        """Send the request on an idle connection, or else on a new one."""
        passage, pool = self._passage, self._shared.pool
        address: Address = self._shared.api if passage is None else (passage.address, passage.port)
        is_complete = self._body.complete
        # The engine may be closing an idle connection just now: only a request that can be sent again goes there.
        # After a failure nobody can tell whether the management API has acted on a request.
        is_repeatable = passage is not None or is_idempotent(self._head)
        upstream = pool.take(address) if is_complete and is_repeatable else None
        if upstream is not None:
            self._send(upstream)
            return
        if not is_complete:
            pool.make_room(address)
        self._connect(address)

    def pump(self) -> None:
        """Send what came of the body. Raise HttpError 500, as Body does."""
        if self._upstream is not None:
            self._push(self._upstream)
            if self._passage is not None:
                self._passage.touch()
            if not self._body.full:
                self._client.resume()

    def pause(self) -> None:
        """Read no more of the response for now."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        if self._upstream is not None:
            self._upstream.resume()

    def check(self, now: float) -> None:
        """Give up an engine that has been silent for ``upstream_timeout``; ``now`` is by the clock of the sweeps.

        A tunnel may be silent, but then it does not count as a use: a browser's tab that is only open must neither keep
        the model nor make it look stuck.
        """
        if now - self._progressed_seconds > self._shared.limits.quiet_seconds and self._passage is not None:
            self._passage.rest()
            self._account.set_attached(attached=True)
        limit = self._shared.settings().upstream_timeout_seconds
        upstream = self._upstream
        if limit and upstream is not None and upstream.is_awaited and now - upstream.heard > limit:
            text = f"{_name(self._serving)} sent nothing for {format_duration(limit)}."
            self._owner.fail(HttpError(504, text, code="upstream_timeout"))

    def abort(self) -> None:
        """Stop: the rest of the response is not needed."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()

    # What comes from the engine (upstream.Consumer).

    def on_head(self, head: ResponseHead, *, has_body: bool) -> None:
        if head.status < 200:
            self._response.interim(head)
        else:
            self._account.first_byte(head.status)
            self._response.begin(head, has_body=has_body, is_engine=self._passage is not None)

    def on_upgrade(self, upstream: Upstream, head: ResponseHead, rest: bytes) -> None:
        self._upstream = None
        self._progressed_seconds = self._shared.now
        self._response.switch(head)
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
            on_end=self._owner.finish,
        )

    def on_body(self, data: bytes) -> None:
        # The body of a server error is no progress.
        if self._passage is not None and self._response.status < 500:
            self._passage.touch()
        self._response.add(data)

    def on_pause(self) -> None:
        self._response.flush()

    def on_end(self, trailers: list[bytes]) -> None:
        self._upstream = None
        broken = self._response.broken_promise
        if broken is None:
            self._response.end(trailers)
            self._owner.finish()
            return
        status = self._response.status
        self._owner.fail(
            HttpError(
                status if status >= 400 else 502,
                faults.message_in(bytes(broken))
                or f"{_name(self._serving)} answered with status {status}, and without a stream.",
            )
        )

    def on_lost(self, upstream: Upstream, reason: str) -> None:
        self._upstream = None
        is_stale = upstream.is_used and not upstream.was_heard
        if is_stale and (is_idempotent(self._head) or upstream.is_untaken()) and self._body.rewind():
            self._connect(upstream.address)
            return
        if self._serving is not None:
            self._shared.activation.suspect(self._serving)
        when = "in the middle of its response" if upstream.was_heard else "before it answered"
        self._owner.fail(
            HttpError(502, f"{_name(self._serving)} {reason} {when}.", hint=_hint(self._serving), code="engine_lost")
        )

    def on_writable(self) -> None:
        try:
            self.pump()
        except HttpError as error:
            self._owner.fail(error)

    @property
    def _serving(self) -> Serving | None:
        return None if self._passage is None else self._passage.serving

    def _connect(self, address: Address) -> None:
        self._task = self._shared.loop.create_task(self._connect_anew(address))

    async def _connect_anew(self, address: Address) -> None:
        try:
            cgroup_id = None if self._passage is None else self._passage.cgroup_id
            upstream = await self._shared.pool.connect(address, cgroup_id)
        except (OSError, TimeoutError) as error:
            self._task = None
            self._owner.on_unreachable(error)
            return
        self._task = None
        try:
            self._send(upstream)
        except Exception as error:
            self._owner.fail(faults.to_http_error(error))

    def _send(self, upstream: Upstream) -> None:
        """Send the head, and as much of the body as there is."""
        self._upstream = upstream
        head, body = self._head, self._body
        length = body.length
        self._is_chunked = length is None
        first = write_head(head, self._path, self._lines, upstream.address, length)
        if length is not None:
            first += body.take()
        upstream.begin(self, first, is_head_only=head.method == b"HEAD", takes_upgrade=head.upgrade is not None)
        if length is not None and body.finished:
            upstream.end()
        else:
            self._push(upstream)
        if not body.full:
            self._client.resume()

    def _push(self, upstream: Upstream) -> None:
        """Send more of the body, as much as the upstream takes now."""
        body = self._body
        if upstream.is_written:
            return
        while not upstream.is_blocked and (data := body.take()):
            upstream.write(chunks.encode(data) if self._is_chunked else data)
        if body.finished:
            if self._is_chunked:
                upstream.write(chunks.LAST)
            upstream.end()

    def _progress(self, sent_bytes: int) -> None:
        self._response.sent_bytes += sent_bytes
        self._progressed_seconds = self._shared.now
        if self._passage is not None:
            self._passage.wake()
            self._account.set_attached(attached=False)
            self._passage.touch()


def unreachable(serving: Serving | None, reason: str) -> HttpError:
    """The error for an upstream that takes no connections."""
    text = f"{_name(serving)} takes no connections ({reason})."
    return HttpError(502, text, hint=_hint(serving), code="engine_unreachable")


def _name(serving: Serving | None) -> str:
    return "The management API" if serving is None else f"The engine of {serving.name}"


def _hint(serving: Serving | None) -> str:
    if serving is None:
        return "`systemctl status gpusvc-api.service` shows why."
    return f"`gpusvc logs {serving.name}` may show why."
