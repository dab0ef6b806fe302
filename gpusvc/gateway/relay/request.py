"""The head of a request, written anew for its upstream: what is kept, and who the client is."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from gpusvc.gateway.http.fields import END
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.relay.shared import Downstream
from gpusvc.gateway.relay.upstream import Address

# RFC 9110, 8.6: with these methods a body is expected, so that the length is given even if it is zero.
_WITH_LENGTH = frozenset({b"POST", b"PUT", b"PATCH"})

# RFC 9110, 9.2.2.
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"})


def is_idempotent(head: RequestHead) -> bool:
    """Return whether the request may be sent twice."""
    return head.method in _IDEMPOTENT


def write_head(head: RequestHead, path: bytes, lines: list[bytes], address: Address, length: int | None) -> bytes:
    """Return the head with its empty line.

    Args:
        head: as the client sent it.
        path: what the upstream is asked for, path and query.
        lines: more for the head.
        address: the upstream's, for its Host.
        length: of the body in bytes; None: it is sent in chunks.
    """
    lines = [head.method + b" " + path + b" HTTP/1.1", _host_line(address), *head.kept, *lines]
    if length is None:
        lines.append(b"Transfer-Encoding: chunked")
    elif length or head.content_length is not None or head.method in _WITH_LENGTH:
        lines.append(b"Content-Length: %d" % length)
    if head.upgrade is not None:
        lines += (b"Connection: Upgrade", b"Upgrade: " + head.upgrade)
    elif head.takes_trailers:
        lines += (b"Connection: TE", b"TE: trailers")
    return b"\r\n".join(lines) + END


def client_lines(
    head: RequestHead,
    client: Downstream,
    *,
    key_name: str | None,
    authorization: bytes | None,
    passes_credentials: bool,
) -> list[bytes]:
    """Return lines for the head that say who the client is, and by what right it asks.

    Args:
        head: as the client sent it.
        client: the connection.
        key_name: the client's key, for the management API; None: do not say.
        authorization: the line that the engine asks for, in place of the client's credentials; None: it asks for none.
        passes_credentials: whether the client's own credentials are for the upstream.
    """
    own: list[bytes] = []
    if authorization is not None:
        own = [authorization]
    elif passes_credentials:
        own = _credentials(head)
    if head.forwarded_for is None and head.forwarded_proto is None and key_name is None:
        return [*client.forwarded, *own] if own else client.forwarded
    sources = client.address if head.forwarded_for is None else head.forwarded_for + b", " + client.address
    lines = [
        b"X-Forwarded-For: " + sources,
        b"X-Forwarded-Proto: " + (head.forwarded_proto or client.scheme),  # a proxy in front knows better
        *own,
    ]
    if key_name is not None:
        lines.append(b"X-Gpusvc-Key: " + key_name.encode())
    return lines


def _credentials(head: RequestHead) -> list[bytes]:
    lines = []
    if head.authorization is not None:
        lines.append(b"Authorization: " + head.authorization)
    if head.x_api_key is not None:
        lines.append(b"X-Api-Key: " + head.x_api_key)
    return lines


@lru_cache(maxsize=256)
def _host_line(address: Address) -> bytes:
    if isinstance(address, Path):
        return b"Host: localhost"
    host, port = address
    return f"Host: [{host}]:{port}".encode() if ":" in host else f"Host: {host}:{port}".encode()
