"""Ollama's endpoints: what answers each of them, and what those say that gpusvc does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from gpusvc.config.keys import Right
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.ollama.questions import Form

VERSION = "0.12.6"
"""The release of Ollama whose API this is. Clients compare it with what they need."""

RUNNING = b"Ollama is running"
"""What its clients look for at its root."""


class Endpoint(StrEnum):
    """What a request asks for."""

    ROOT = "root"
    VERSION = "version"
    TAGS = "tags"
    PS = "ps"
    SHOW = "show"
    PULL = "pull"
    CHAT = "chat"
    GENERATE = "generate"
    EMBED = "embed"
    EMBEDDINGS = "embeddings"

    @property
    def form(self) -> Form | None:
        """The form of a request to an engine; None: the gateway answers itself."""
        return _FORMS.get(self)

    @property
    def right(self) -> Right | None:
        """The right that a key needs for it; None: no key is needed."""
        return None if self is Endpoint.ROOT else Right.USE


_FORMS = {
    Endpoint.CHAT: Form.CHAT,
    Endpoint.GENERATE: Form.GENERATE,
    Endpoint.EMBED: Form.EMBED,
    Endpoint.EMBEDDINGS: Form.EMBEDDINGS,
}

_READING = (b"GET", b"HEAD")
_POST = (b"POST",)

_KNOWN: Mapping[bytes, tuple[Endpoint, tuple[bytes, ...]]] = {
    b"/api/version": (Endpoint.VERSION, _READING),
    b"/api/tags": (Endpoint.TAGS, _READING),
    b"/api/ps": (Endpoint.PS, _READING),
    b"/api/show": (Endpoint.SHOW, _POST),
    b"/api/pull": (Endpoint.PULL, _POST),
    b"/api/chat": (Endpoint.CHAT, _POST),
    b"/api/generate": (Endpoint.GENERATE, _POST),
    b"/api/embed": (Endpoint.EMBED, _POST),
    b"/api/embeddings": (Endpoint.EMBEDDINGS, _POST),
}

# What gpusvc leaves to the administrator.
_REFUSED = {
    b"/api/push": "This server sends no models anywhere.",
    b"/api/create": "This server makes no models. An administrator adds one with `gpusvc add`.",
    b"/api/copy": "This server copies no models. A second name is an alias in the model's file.",
    b"/api/delete": "This server deletes no models. An administrator removes one with `gpusvc rm`.",
}
_BLOB = re.compile(rb"/api/blobs/[^/]+")
_BLOBS = "This server takes no model files. An administrator adds a model with `gpusvc add`."

PATHS = frozenset({*_KNOWN, *_REFUSED})
"""All paths of Ollama, but those of blobs and the root."""


def find(method: bytes, target: bytes, *, is_own_port: bool) -> Endpoint | None:
    """Return what a request asks for; None: the target is none of Ollama's.

    Args:
        method: of the request.
        target: path and query. Some clients write two slashes, as their base URL ends with one.
        is_own_port: whether the request came to ``ollama_port``, where the root is Ollama's too.

    Raises:
        HttpError: 405, the endpoint does not support the method; 404 and 501, gpusvc does not have what it does.
    """
    path = b"/" + target.partition(b"?")[0].lstrip(b"/")
    if path == b"/" and is_own_port:
        return _checked(Endpoint.ROOT, method, _READING)
    known = _KNOWN.get(path)
    if known is not None:
        return _checked(known[0], method, known[1])
    refusal = _REFUSED.get(path)
    if refusal is None and _BLOB.fullmatch(path):
        if method in _READING:
            raise HttpError(404, "There is no such blob.", code="not_found")
        refusal = _BLOBS
    if refusal is not None:
        raise refused(refusal)
    return None


def refused(message: str) -> HttpError:
    """Return the error for what gpusvc does not do."""
    return HttpError(501, message, code="not_supported")


def _checked(endpoint: Endpoint, method: bytes, methods: tuple[bytes, ...]) -> Endpoint:
    if method in methods:
        return endpoint
    allow = b", ".join(methods)
    raise HttpError(
        405,
        f"This path supports {allow.decode()} only.",
        code="method_not_allowed",
        headers=((b"allow", allow),),
    )
