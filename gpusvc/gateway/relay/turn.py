"""What a client's connection needs of the request whose turn it is; and APIs that are translated to others.

A translated API has exchanges of its own, which ask an engine by an ordinary one. Nothing of it is imported or
asked before a request has a path that looks like it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.relay.shared import Downstream, Shared


class Turn(Protocol):
    """One request and its response, as Exchange has them."""

    def begin(self, whole: bytes | None) -> None: ...

    def feed(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def check(self, now: float) -> None: ...

    def fail(self, error: HttpError) -> None: ...


class Translation(NamedTuple):
    """An API that is translated."""

    prefixes: tuple[bytes, ...]
    """How the targets of its requests begin. Others may begin so too."""
    exchange_for: Callable[[Shared, Downstream, RequestHead], Turn]
    """The exchange of such a request."""
