"""The body of a request, whole or streamed, behind one type; and how to make one.

body = body_of(head, whole, …)           raises HttpError 413
body.feed(data); body.end()              as the client's bytes come; raise HttpError 413, 500 and 507
body.settled                             True: the model's name is known, or it is known that there is none
body.model                               the name, or None
body.no_model() -> HttpError | None      why there is none, for a request that names its model nowhere else
body.stream                              whether the client asked for a stream, as far as is known
body.begin(serving | None)               the model is chosen; None: change nothing. Also before `settled`
body.ready                               True: bytes may be taken, and `length` is final. False only before begin(),
                                         and while an edit waits for what it changes. feed() and end() change it,
                                         and raise HttpError 400 if a body to be filtered is not JSON
body.length                              bytes that go upstream, when ready; None: unknown, send it chunked
body.take() -> bytes                     the next bytes for the engine; b"": nothing now
body.finished                            True: end() was called and everything was taken
body.complete                            True: end() was called: all of the body is held here until it is taken
body.full                                True: stop reading from the client until some was taken
body.rewind() -> bool                    take from the start again, on another connection; False: it is not all held
body.close()                             free memory and file; may be called twice
"""

from __future__ import annotations

from typing import Protocol

from gpusvc.config.serving import Serving
from gpusvc.gateway.body.reading import too_large
from gpusvc.gateway.body.streamed import StreamedBody
from gpusvc.gateway.body.whole import WholeBody
from gpusvc.gateway.budget import Budget
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead


class Body(Protocol):
    """A request's body. The module's docstring describes each member."""

    @property
    def model(self) -> str | None: ...

    @property
    def received_bytes(self) -> int: ...

    @property
    def settled(self) -> bool: ...

    @property
    def stream(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    @property
    def length(self) -> int | None: ...

    @property
    def finished(self) -> bool: ...

    @property
    def complete(self) -> bool: ...

    @property
    def full(self) -> bool: ...

    @property
    def awaited(self) -> bool: ...

    def no_model(self) -> HttpError | None: ...

    def feed(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def begin(self, serving: Serving | None) -> None: ...

    def take(self) -> bytes: ...

    def rewind(self) -> bool: ...

    def close(self) -> None: ...


def body_of(head: RequestHead, whole: bytes | None, *, limit_bytes: int, names_model: bool, budget: Budget) -> Body:
    """Return the body of a request.

    Args:
        head: the request's head.
        whole: the body, if all of it came with the head; None: feed() and end() follow.
        limit_bytes: the length that a body may have.
        names_model: whether the body may name the model.
        budget: the memory for all requests.

    Raises:
        HttpError: 413, the body is longer; 500 and 507, it must go to a file, and cannot.
    """
    if whole is None:
        return StreamedBody(head.content_type, head.content_length, limit_bytes=limit_bytes, budget=budget)
    if len(whole) > limit_bytes:
        raise too_large(limit_bytes)
    if budget.held_bytes + len(whole) <= budget.bodies_bytes:  # has_room(), without a call for nearly every request
        return WholeBody(head.content_type, whole, names_model=names_model, budget=budget)
    body = StreamedBody(head.content_type, len(whole), limit_bytes=limit_bytes, budget=budget)
    body.feed(whole)
    body.end()
    return body
