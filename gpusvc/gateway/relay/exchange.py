"""One request and its response: admitted, led to its model, forwarded, counted.

The steps follow each other, each as soon as it can. Everything that needs no waiting happens in one call, without a
task, a future or a timer:

    begin()     the gate (origin, key), the route, and the body as far as it came
    _lead()     the destination: which model; again for each piece of a body that has not named it yet
    _go()       the passage into the model: at once, or a Waiting that comes back to on_entered()
    _forward()  a Forwarding sends the request to the upstream, and relays the response

An exchange ends in one of four ways: the end of the response, an error response, a response that breaks off, or a
client that is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVarTuple

from gpusvc.config.keys import Key
from gpusvc.gateway.activation.passage import Onlooker, Passage
from gpusvc.gateway.activation.peer import StrangerError
from gpusvc.gateway.body.body import Body, body_of
from gpusvc.gateway.entry import destination as destinations
from gpusvc.gateway.entry import routes
from gpusvc.gateway.entry.destination import Destination, allowed_by
from gpusvc.gateway.entry.routes import Route, Target
from gpusvc.gateway.http import replies
from gpusvc.gateway.http.replies import HttpError, Reply
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.relay import faults
from gpusvc.gateway.relay.account import Account
from gpusvc.gateway.relay.entering import Waiting, enter_now
from gpusvc.gateway.relay.forwarding import Forwarding, unreachable
from gpusvc.gateway.relay.request import client_lines
from gpusvc.gateway.relay.response import Response
from gpusvc.gateway.relay.shared import Downstream, Shared
from gpusvc.log import log

_A = TypeVarTuple("_A")

# In Python 3.11 each access to a member of an enum class is a call.
_MODEL, _NAMED = Target.MODEL, Target.NAMED


def _failing(step: Callable[[Exchange, *_A], None]) -> Callable[[Exchange, *_A], None]:
    """An exception in this step fails its exchange, and nothing else."""

    @wraps(step)
    def guarded(self: Exchange, *arguments: *_A) -> None:
        try:
            step(self, *arguments)
        except Exception as error:
            self.fail(faults.to_http_error(error))

    return guarded


class Exchange:
    """The request whose turn it is on a client's connection."""

    __slots__ = (
        "_account",
        "_body",
        "_client",
        "_destination",
        "_forwarding",
        "_head",
        "_is_over",
        "_is_retried",
        "_key",
        "_passage",
        "_response",
        "_route",
        "_shared",
        "_waiting",
    )

    def __init__(self, shared: Shared, client: Downstream, head: RequestHead) -> None:
        self._shared = shared
        self._client = client
        self._head = head
        self._response = Response(shared, client, head)
        self._account = Account(shared.counters)
        self._route: Route | None = None
        self._key: Key | None = None
        self._body: Body | None = None
        self._destination: Destination | None = None
        self._passage: Passage | Onlooker | None = None
        self._waiting: Waiting | None = None
        self._forwarding: Forwarding | None = None
        self._is_retried = False
        self._is_over = False

    # The request as it comes in.

    def begin(self, whole: bytes | None) -> None:
        """The head is there. ``whole``: the body, if all of it is there too; None: feed() and end() follow."""
        try:
            self._admit(whole)
        except Exception as error:
            self.fail(faults.to_http_error(error))

    @_failing
    def feed(self, data: bytes) -> None:
        """More of the body."""
        if self._body is not None and not self._is_over:
            self._body.feed(data)
            self._advance(self._body)

    @_failing
    def end(self) -> None:
        """The body is complete."""
        if self._body is not None and not self._is_over:
            self._body.end()
            self._advance(self._body)

    def cancel(self) -> None:
        """The client is gone."""
        if not self._is_over:
            self._leave()
            self._close()

    # The steps to the upstream.

    def _admit(self, whole: bytes | None) -> None:
        head, shared = self._head, self._shared
        granted = shared.gate.check_origin(head)
        if granted:
            if isinstance(granted, Reply):
                self._reply(granted)
                return
            self._response.granted = granted
        route, self._key = shared.gate.admit(head)
        self._route = route
        is_of_model = route.target is _MODEL
        if not is_of_model:
            reply = destinations.own_reply(shared.catalog, route, allowed_by(self._key))
            if reply is not None:
                self._reply(reply)
                return
        self._body = body_of(
            head,
            whole,
            limit_bytes=shared.settings().max_body_bytes,
            names_model=is_of_model,
            budget=shared.budget,
        )
        self._lead(route, self._body)

    def _advance(self, body: Body) -> None:
        """Go on with a request of whose body there is more now."""
        if self._forwarding is not None:
            self._forwarding.pump()
        elif self._destination is not None:
            if self._waiting is None:
                self._go(self._destination, body)
        elif self._route is not None:
            self._lead(self._route, body)
        if body.full and not self._is_over:
            self._client.pause()

    def _lead(self, route: Route, body: Body) -> None:
        """Find the destination, as soon as it can be known."""
        destination = destinations.find(self._shared.catalog, route, self._head, body, allowed_by(self._key))
        if destination is None:
            return
        serving = destination.serving
        if serving is not None and route.target is _NAMED:
            path, gate = destination.path, self._shared.gate
            gate.send_to_engine(self._head, self._client.scheme, serving.name, path, self._key)
        self._destination = destination
        body.begin(serving if destination.is_edited else None)
        if serving is not None:
            self._account.open(serving.name)
        self._go(destination, body)

    def _go(self, destination: Destination, body: Body) -> None:
        """Get into the model, as far as that is possible now."""
        if body.awaited:
            return  # a client that sends slowly must not hold a slot of the model
        serving = destination.serving
        if serving is not None and self._passage is None:
            shared, head = self._shared, self._head
            if head.method == b"POST":
                self._passage = shared.activation.try_enter(serving)
            else:
                probe = self._account if destination.is_probe else None
                self._passage = enter_now(shared, serving, head, self._client.scheme, probe)
            if self._passage is None:
                knows = allowed_by(self._key)
                self._waiting = Waiting(shared, self, serving, head, body, self._response, self._account, knows)
                return
        self._forward(destination, body)

    def on_entered(self, passage: Passage) -> None:
        """The wait is over (entering.Owner)."""
        self._waiting = None
        self._passage = passage
        if self._destination is not None and self._body is not None:
            self._forward(self._destination, self._body)

    def _forward(self, destination: Destination, body: Body) -> None:
        """Send the request to its upstream, unless more of its body must come before."""
        if not body.ready:
            return
        head, serving, key = self._head, destination.serving, self._key
        lines = client_lines(
            head,
            self._client,
            key_name=None if serving is not None or key is None else key.name,
            # Where the gateway needs no keys, a client's credentials are meant for an engine that has its own.
            authorization=None if self._passage is None else self._passage.authorization,
            passes_credentials=serving is not None and not self._shared.keys.configured,
        )
        forwarding = self._forwarding = Forwarding(
            self._shared,
            self._client,
            self,
            head,
            body,
            destination.path,
            lines,
            self._response,
            self._account,
            self._passage,
        )
        forwarding.begin()

    # Back-pressure and time.

    def pause(self) -> None:
        """The client does not take the response as fast as it comes."""
        if self._forwarding is not None:
            self._forwarding.pause()

    def resume(self) -> None:
        """The client takes more."""
        if self._forwarding is not None:
            self._forwarding.resume()

    def check(self, now: float) -> None:
        """Look whether the engine takes too long; ``now`` is by the clock of the sweeps."""
        if self._forwarding is not None:
            self._forwarding.check(now)

    # The end (forwarding.Owner).

    @_failing
    def on_unreachable(self, error: OSError | TimeoutError) -> None:
        if error.errno in faults.EXHAUSTED:
            raise error  # which is not the engine's fault
        self._forwarding = None
        destination, body, passage = self._destination, self._body, self._passage
        serving = None if destination is None else destination.serving
        if serving is not None:
            self._shared.activation.suspect(serving)
            if isinstance(error, StrangerError):
                log(4, f"A request for {serving.name} is not sent: {error.strerror}.")
        if destination is None or body is None or serving is None or passage is None or self._is_retried:
            raise unreachable(serving, faults.reason(error))
        # The engine has ended, or is ending: wait until the model is back.
        self._is_retried = True
        self._passage = None
        passage.close()
        self._go(destination, body)

    def fail(self, error: HttpError) -> None:
        """Answer with an error; or break off a response that has begun."""
        if self._is_over:
            return
        self._leave()
        if self._key is not None and self._key.is_limited:
            error = error.in_brief()
        dialect = routes.dialect_of(self._head.target) if self._route is None else self._route.dialect
        if self._response.status:
            self._response.status = error.status
            self._close()
            self._response.break_off(replies.error_event(dialect, error))
        else:
            self._reply(replies.error_reply(dialect, error))

    def finish(self) -> None:
        """The response was written to its end."""
        self._close()
        self._client.finish(is_kept=self._response.is_kept)

    def _reply(self, reply: Reply) -> None:
        self._response.reply(reply)
        self.finish()

    def _leave(self) -> None:
        """Stop everything that takes time."""
        if self._waiting is not None:
            self._waiting.cancel()
        forwarding, self._forwarding = self._forwarding, None
        if forwarding is not None:
            forwarding.abort()

    def _close(self) -> None:
        self._is_over = True
        self._forwarding = None  # which refers to this exchange: without the cycle both are freed at once
        if self._passage is not None:
            self._passage.close()
        body = self._body
        if body is not None:
            body.close()
        self._account.close(self._response, 0 if body is None else body.received_bytes)
