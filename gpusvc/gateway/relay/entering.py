"""A request's way into its model: at once if the model is ready, else by waiting."""

from __future__ import annotations

from typing import Protocol

from gpusvc.config.serving import Serving
from gpusvc.gateway.activation.passage import Onlooker, Passage
from gpusvc.gateway.body.body import Body
from gpusvc.gateway.entry.destination import not_loaded
from gpusvc.gateway.entry.gate import check_load
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.relay import faults
from gpusvc.gateway.relay.account import Account
from gpusvc.gateway.relay.response import Response
from gpusvc.gateway.relay.shared import Shared
from gpusvc.state.line import Shown


def enter_now(
    shared: Shared, serving: Serving, head: RequestHead, scheme: bytes, probe: Account | None
) -> Passage | Onlooker | None:
    """Return the passage of a request that is not a POST; None: it must wait for the model.

    Args:
        shared: by all connections.
        serving: the model.
        head: of the request.
        scheme: of the client's connection.
        probe: the account of a request that only asks for the engine's state; None: it does more.

    Raises:
        HttpError: 503 or 403, the model is not loaded, and this request may not load it.
    """
    activation = shared.activation
    if probe is not None:
        probe.is_for_state()
        onlooker = activation.look_at(serving)
        if onlooker is None:
            raise not_loaded(serving)
        return onlooker
    if activation.look_at(serving) is None:
        check_load(head, scheme)
    return activation.try_enter(serving)


class Owner(Protocol):
    """Who waits. One of these calls is the end of the wait."""

    def on_entered(self, passage: Passage) -> None:
        """The model is ready, and the request may use it."""

    def fail(self, error: HttpError) -> None:
        """The request does not get its model."""


class Waiting:
    """It waits until cancel(), or until it tells its owner."""

    __slots__ = ("_account", "_body", "_head", "_is_over", "_owner", "_response", "_shared", "_task")

    def __init__(
        self,
        shared: Shared,
        owner: Owner,
        serving: Serving,
        head: RequestHead,
        body: Body,
        response: Response,
        account: Account,
        knows: Shown,
    ) -> None:
        """Begin to wait for the model of ``serving``. ``knows``: the models that the client may know of."""
        self._shared = shared
        self._owner = owner
        self._head = head
        self._body = body
        self._response = response
        self._account = account
        self._is_over = False
        account.wait()
        self._task = shared.loop.create_task(self._wait(serving, knows))

    def cancel(self) -> None:
        """Leave the queue. With the last request in it the start of the model is abandoned."""
        if not self._is_over:  # else it is the task itself that tells its owner
            self._task.cancel()

    async def _wait(self, serving: Serving, knows: Shown) -> None:
        tell = self._tell if self._shared.settings().loading_events else None
        try:
            passage = await self._shared.activation.enter(serving, on_wait=tell, knows=knows)
            self._is_over = True
            self._account.stop_waiting()
            self._owner.on_entered(passage)
        except Exception as error:
            self._is_over = True
            self._owner.fail(faults.to_http_error(error))

    def _tell(self, sentence: str) -> None:
        """Show a client that asked for a stream that something happens."""
        if not self._body.stream:
            return
        if not self._response.is_promised:
            self._response.promise_stream()
            self._head.refuse_coding()  # the head of the response did not say that it is compressed
        self._response.comment(sentence)
