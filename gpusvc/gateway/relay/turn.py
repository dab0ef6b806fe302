"""What a client's connection needs of the request whose turn it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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


TurnFor = Callable[[Shared, Downstream, RequestHead], Turn]
"""Makes the exchange of a request. It may be in an API that is translated to another one."""
