"""The route of a request, by its method and target alone. It knows no names of models and reads no body.

Every path that is not the gateway's own goes to a model: engines have too many paths to list them. A target that two
programs could read differently, such as one with /../, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import quote, unquote, unquote_to_bytes

from gpusvc.config.keys import Right
from gpusvc.gateway.http.replies import Dialect, HttpError
from gpusvc.gateway.http.target import METHODS, invalid_target, unsupported_method


class Target(StrEnum):
    """What answers a request."""

    MODEL = "model"  # the model that the body, the query or the header names
    NAMED = "named"  # the model that the path names: /upstream/NAME/…
    ORIGIN = "origin"  # the model whose origin the Host is: NAME.localhost
    MODELS = "models"  # the list of models
    MODEL_CARD = "model-card"  # one model of the list
    HEALTH = "health"
    MANAGEMENT = "management"  # the API socket


@dataclass(frozen=True, slots=True)
class Route:
    """The target of a request, and what it needs."""

    target: Target
    right: Right | None
    """The right that a key needs for it; None: no key is needed."""
    dialect: Dialect
    name: str | None
    """MODEL: the model in the query, if there is one. NAMED: the first segment after /upstream/; see ``names_in()``.
    MODEL_CARD: the model."""
    path: bytes
    """Path and query for the upstream. Of NAMED: what follows the name, which may have no path."""


def route(method: bytes, target: bytes) -> Route:
    """Return the route of a request.

    Args:
        method: as it stands in the request.
        target: as it stands in the request, in the form of a path; see ``in_origin_form()``.

    Raises:
        HttpError: 400 the target is not valid, 404 nothing answers there, 405 or 501 the method is not supported.
    """
    if method == b"POST":
        known = _POSTED.get(target)
        if known is not None:
            return known
    elif method not in METHODS:
        raise unsupported_method(method)
    if target == b"*" and method == b"OPTIONS":
        return _HEALTH  # RFC 9110, 9.3.7: it asks about the server as a whole
    path, mark, query = target.partition(b"?")
    path = _checked(path, query)
    if path in _MODELS:
        return _reading(method, Route(Target.MODELS, Right.USE, Dialect.OPENAI, None, path + mark + query))
    for prefix in _CARDS:
        if path.startswith(prefix) and method in _READING:
            name = unquote(path.removeprefix(prefix))
            return Route(Target.MODEL_CARD, Right.USE, Dialect.OPENAI, name, path + mark + query)
    if path.startswith(_UPSTREAM):
        return _named(path, mark + query)
    if path in _HEALTHS:
        return _reading(method, _HEALTH)
    model = _model_of(query) if query else None
    if path == b"/metrics" and model is None:
        return Route(Target.MANAGEMENT, Right.METRICS, Dialect.OPENAI, None, path + mark + query)
    if path in _MANAGED or path.startswith(_MANAGED_BELOW):
        return Route(Target.MANAGEMENT, Right.ADMIN, Dialect.OPENAI, None, path + mark + query)
    if path.startswith(_OF_BROWSERS):
        raise HttpError(404, f"The gateway has no {path.decode()}.", code="not_found")
    return Route(Target.MODEL, Right.USE, _dialect(path), model, path + mark + query)


def engine_route(name: str, target: bytes) -> Route:
    """Return the route of a request to an engine's own origin: every path is the engine's.

    Raises:
        HttpError: 400 the target is not valid.
    """
    path, mark, query = target.partition(b"?")
    path = _checked(path, query)
    return Route(Target.ORIGIN, Right.USE, _dialect(path), name, path + mark + query)


def dialect_of(target: bytes) -> Dialect:
    """Return the form of the response to a request that has no route."""
    path = target.partition(b"?")[0]
    if path.startswith(_UPSTREAM):
        path = b"/" + path.removeprefix(_UPSTREAM).partition(b"/")[2]
    return _dialect(path)


def names_in(named: Route, deepest: int) -> Iterator[tuple[str, bytes]]:
    """Yield what may be the name in the path of a NAMED route, shortest first, each with what follows it.

    Args:
        named: the route.
        deepest: the most slashes that any name has.
    """
    name = named.name or ""
    path, mark, query = named.path.partition(b"?")
    yield name, named.path
    while path not in (b"", b"/") and name.count("/") < deepest:
        segment, slash, rest = path[1:].partition(b"/")
        name = f"{name}/{unquote(segment)}"
        path = slash + rest
        yield name, path + mark + query


def to_pages(name: str, query: bytes) -> HttpError:
    """Return the redirect for /upstream/NAME: relative links of the engine's pages need /upstream/NAME/.

    Args:
        name: of the model, or an alias.
        query: with its question mark; may be empty.
    """
    location = _UPSTREAM + quote(name, safe="").encode() + b"/" + query
    return HttpError(308, "The path needs a slash after the model's name.", headers=((b"location", location),))


_READING = frozenset({b"GET", b"HEAD"})

# The characters of a target: those of RFC 3986, and harmless ones that clients forget to encode. Not "#", which only
# browsers use, and not "\", which some programs read as a slash.
_LETTERS = re.compile(rb'[!"$-\[\]-~]*')
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")

_UPSTREAM = b"/upstream/"
_MODELS = frozenset({b"/v1/models", b"/models", b"/v1/models/", b"/models/"})
_CARDS = (b"/v1/models/", b"/models/")
_HEALTHS = frozenset({b"/health", b"/healthz"})
_MANAGED = frozenset(
    {b"/", b"/gpusvc", b"/running", b"/unload", b"/api/models/unload", b"/backend/shutdown", b"/openapi.json"}
)
_MANAGED_BELOW = (b"/gpusvc/", b"/api/models/unload/")

# Browsers ask for these by themselves. That must not load a model.
_OF_BROWSERS = (b"/favicon.ico", b"/robots.txt", b"/apple-touch-icon", b"/.well-known/")

_ANTHROPIC = (b"/v1/messages", b"/messages")

OLLAMA = frozenset(
    b"/api/" + name
    for name in (
        b"chat",
        b"copy",
        b"create",
        b"delete",
        b"embed",
        b"embeddings",
        b"generate",
        b"ps",
        b"pull",
        b"push",
        b"show",
        b"tags",
        b"version",
    )
)
"""Paths of Ollama's API. Other APIs have paths below /api/ too."""

_HEALTH = Route(Target.HEALTH, None, Dialect.OPENAI, None, b"/health")


def _dialect(path: bytes) -> Dialect:
    for prefix in _ANTHROPIC:
        if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in (b"", b"/"):
            return Dialect.ANTHROPIC
    return Dialect.OLLAMA if path in OLLAMA else Dialect.OPENAI


# Each is what route() would make of it.
_POSTED = {
    prefix + path: Route(Target.MODEL, Right.USE, _dialect(prefix + path), None, prefix + path)
    for prefix in (b"/v1", b"")
    for path in (
        b"/chat/completions",
        b"/completions",
        b"/responses",
        b"/embeddings",
        b"/messages",
        b"/messages/count_tokens",
        b"/rerank",
        b"/audio/speech",
        b"/audio/transcriptions",
        b"/completion",
        b"/infill",
        b"/tokenize",
    )
}
USUAL = frozenset(_POSTED)
"""The targets of nearly all requests. They are no other API's."""


def _checked(path: bytes, query: bytes) -> bytes:
    """Return the path with one slash at its beginning. Raise HttpError 400 if it is not valid."""
    if not _LETTERS.fullmatch(path) or not _LETTERS.fullmatch(query):
        raise invalid_target("The target of the request has characters that must be percent-encoded.")
    if not path.startswith(b"/"):
        raise invalid_target("The target of the request must be a path.")
    if path.startswith(b"//"):
        path = b"/" + path.lstrip(b"/")  # from clients whose base URL ends with a slash
    plain = path
    if b"%" in path:
        if _BAD_ESCAPE.search(path):
            raise invalid_target("The path has a % that begins no percent-encoding.")
        # Programs that decode the path early or late must see the same segments.
        plain = unquote_to_bytes(path).replace(b"\\", b"/")
        if any(character < 0x20 or character == 0x7F for character in plain):
            raise invalid_target("The path has encoded control characters.")
    if b"/." in plain and not {b".", b".."}.isdisjoint(plain.split(b"/")):
        raise invalid_target("The path has a segment . or .., which could lead out of where it seems to lead.")
    return path


def _named(path: bytes, query: bytes) -> Route:
    name, slash, rest = path.removeprefix(_UPSTREAM).partition(b"/")
    if not name:
        raise HttpError(
            404, "The path names no model.", hint="An engine's own pages are at /upstream/NAME/.", code="not_found"
        )
    rest = slash + rest
    return Route(Target.NAMED, Right.USE, _dialect(rest), unquote(name), rest + query)


def _model_of(query: bytes) -> str | None:
    """Return the first parameter ``model``; None: there is none."""
    for parameter in query.split(b"&"):
        key, _, value = parameter.partition(b"=")
        if key == b"model" and value:
            return unquote(value.replace(b"+", b" "))
    return None


def _reading(method: bytes, read: Route) -> Route:
    """Return ``read``. Raise HttpError 405 if the method does not only read."""
    if method in _READING:
        return read
    raise HttpError(
        405,
        f"{read.path.partition(b'?')[0].decode()} supports GET and HEAD only.",
        code="method_not_allowed",
        headers=((b"allow", b"GET, HEAD"),),
    )
