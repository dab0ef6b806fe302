"""Which model a request is for, by its path, query, header or body. It does no I/O of its own."""

from __future__ import annotations

from typing import NamedTuple

from gpusvc.config.keys import Key
from gpusvc.config.serving import Serving
from gpusvc.gateway.body.body import Body
from gpusvc.gateway.entry.catalog import Allowed, Catalog
from gpusvc.gateway.entry.routes import Route, Target
from gpusvc.gateway.http.replies import HttpError, Reply, reply_json
from gpusvc.gateway.http.request_head import RequestHead

_FORWARDED = frozenset({Target.MODEL, Target.NAMED, Target.ORIGIN, Target.MANAGEMENT})

_JSON = ((b"content-type", b"application/json"),)

# In Python 3.11 each access to a member of an enum class is a call.
_MODEL, _MANAGEMENT, _NAMED = Target.MODEL, Target.MANAGEMENT, Target.NAMED


class Destination(NamedTuple):
    """The upstream of a request, and what it is asked for."""

    serving: Serving | None
    """The model; None: the management API."""
    path: bytes
    """Path and query of the request to the upstream."""
    is_edited: bool
    """Whether the model's configuration may change the body."""
    is_probe: bool = False
    """Whether it only asks for the engine's state: it neither loads the model nor keeps it."""


def allowed_by(key: Key | None) -> Allowed:
    """Return the function that says whether a request with this key may use a model. None: no keys are needed."""
    return _anybody if key is None else key.may_use


def _anybody(_model: str) -> bool:
    return True


def find(catalog: Catalog, route: Route, head: RequestHead, body: Body, allowed: Allowed) -> Destination | None:
    """Return the destination of a request; None: more of its body must be read first.

    Raises:
        HttpError: 400 the request names no model, 404 there is no such model, or the key is not for it.
    """
    target = route.target
    if target is _MODEL:
        if not body.settled:
            return None
        serving, path = _resolve(catalog, route, head, body, allowed), route.path
    elif target is _MANAGEMENT:
        return Destination(None, route.path, False)
    elif target is _NAMED:
        serving, path = catalog.locate(route, allowed=allowed)
    else:
        serving, path = catalog.resolve(route.name, allowed=allowed), route.path
    is_probe = head.method != b"POST" and _is_probe(head.method, path, serving)
    return Destination(serving, path, target is _MODEL, is_probe)


def own_reply(catalog: Catalog, route: Route, allowed: Allowed) -> Reply | None:
    """Return the response to a request that the gateway answers itself; None: it has another destination.

    Raises:
        HttpError: 404 there is no such model, or the key is not for it.
    """
    target = route.target
    if target in _FORWARDED:
        return None
    if target is Target.MODELS:
        return Reply(200, _JSON, catalog.listing(allowed))
    if target is Target.MODEL_CARD:
        return Reply(200, _JSON, catalog.card(route.name or "", allowed=allowed))
    return reply_json(200, {"status": "ok"})


def _is_probe(method: bytes, path: bytes, serving: Serving) -> bool:
    if method not in {b"GET", b"HEAD"}:
        return False
    name, _, query = path.partition(b"?")
    return name.decode("ascii", "replace") in serving.probe_paths or b"autoload=false" in query.split(b"&")


def not_loaded(serving: Serving) -> HttpError:
    """The error for a probe of a model that is not ready."""
    return HttpError(
        503,
        f"The model {serving.name} is not loaded, and this request does not load it.",
        hint="GET /v1/models has the state of all models.",
        code="model_not_loaded",
    )


def _resolve(catalog: Catalog, route: Route, head: RequestHead, body: Body, allowed: Allowed) -> Serving:
    name = body.model
    if name is None:
        name = route.name
    if name is None and head.model is not None:
        name = head.model.decode(errors="replace")
    if name is None and head.method in {b"GET", b"HEAD"}:
        raise HttpError(
            404,
            "This path needs a model name.",
            hint="Name it by ?model= or the header X-Model. /v1/models lists the models; / is the status page.",
            code="not_found",
        )
    # Only a POST may mean the only model without naming it: opening a page in a browser must not load a model.
    is_guessed = head.method == b"POST"
    try:
        return catalog.resolve(name, allowed=allowed, guess=is_guessed)
    except HttpError as error:
        raise (body.no_model() if name is None else None) or error from None
