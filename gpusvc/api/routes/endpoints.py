"""The routes of the API as values: the handler, and what the OpenAPI document says, in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A model's name or alias. A slash in it comes percent-encoded.
NAMED = "{name}"

JSON = "application/json"
SSE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a query."""

    name: str
    summary: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route. The first line of its handler's docstring is its summary."""

    method: str
    path: str
    handler: Handler
    parameters: tuple[Parameter, ...] = ()
    media: tuple[str, ...] = (JSON,)
    """The media types of its response."""
    body: Mapping[str, Any] | None = None
    """The JSON schema of its request body; None: it takes none."""
    changes: bool = False
    """Whether a GET changes something, as in other programs' APIs: then a HEAD is not answered as a GET."""

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().partition("\n")[0].rstrip(".")

    def route(self) -> web.RouteDef:
        options = {"allow_head": not self.changes} if self.method == "GET" else {}
        return web.RouteDef(self.method, self.path, self.handler, options)

    @classmethod
    def from_route(cls, route: web.RouteDef) -> Endpoint:
        """Return the endpoint of a plain aiohttp route."""
        handler: Any = route.handler
        return cls(route.method, route.path, handler, media=(getattr(handler, "media", "*/*"),))


def flag(request: web.Request, name: str) -> bool:
    """Whether the query sets the flag: ``?name``, ``?name=1``, ``?name=true``."""
    text = request.query.get(name)
    return text is not None and text.lower() in {"", "1", "true", "yes"}
