"""Which pages in a browser may use the gateway, by the headers that no page can forge.

A browser runs programs of any site on the user's machine, which the gateway trusts. Where no key is needed, such a page
could load models, read responses and stop models. This module closes four ways:

- **DNS rebinding:** a name of another site that suddenly means 127.0.0.1. Host shows it.
- **Unspecified addresses:** 0.0.0.0 and [::] reach the loopback, and browsers send no Sec-Fetch-Site there. They are
  refused as a Host.
- **Cross-origin requests** (CSRF): sent even where the page may not read the response. Origin shows them; browsers send
  it with every method but GET and HEAD.
- **Images, links and forms** that GET: they have no Origin. Sec-Fetch-Site shows them at trustworthy addresses. At a
  LAN address over plain HTTP nothing does: therefore no GET changes anything.

Programs that are not browsers send only Host, and are let through.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from gpusvc.config.host import HostGateway
from gpusvc.gateway.http.replies import Headers, HttpError, Reply

_ADDRESS = re.compile(rb"\[[0-9a-f:.]+\]|[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_AUTHORITY = re.compile(rb"([a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5})?)?")
_TOKENS = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_PORTS = {b"http": b"80", b"https": b"443"}

_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_EXPOSED = b"retry-after, x-request-id"
_PREFLIGHT_SECONDS = b"600"

# The most hosts that are remembered as accepted: clients could make up any number.
_MAX_KNOWN = 1024


class Guard:
    """Checks origins, for one set of settings."""

    def __init__(self, settings: HostGateway, *, keyed: bool, names: Collection[str] = ()) -> None:
        """
        Args:
            settings: ``hosts`` and ``cors_origins``.
            keyed: whether every request needs a key. A page of another site has none, so that the Host does not matter.
            names: more names that only this machine has, such as its host name.
        """
        self._is_keyed = keyed
        self._hosts = {host.lower().encode() for host in (*settings.hosts, *names)}
        self._origins = {origin.encode() for origin in settings.cors_origins}
        self._known: set[bytes] = set()

    def judge(
        self,
        method: bytes,
        target: bytes,
        *,
        host: bytes | None,
        origin: bytes | None = None,
        fetch_site: bytes | None = None,
        fetch_mode: bytes | None = None,
        request_method: bytes | None = None,
        request_headers: bytes | None = None,
        private_network: bytes | None = None,
    ) -> Headers | Reply:
        """Return headers for the response, or the whole response to a preflight request.

        Args:
            method: of the request.
            target: path and query of the request.
            host: ``Host``, or the authority of the target if it has one.
            origin: ``Origin``.
            fetch_site: ``Sec-Fetch-Site``.
            fetch_mode: ``Sec-Fetch-Mode``.
            request_method: ``Access-Control-Request-Method``.
            request_headers: ``Access-Control-Request-Headers``.
            private_network: ``Access-Control-Request-Private-Network``.

        Raises:
            HttpError: 403 the request is refused, 400 the host is not valid.
        """
        if host is not None and not self.knows(host):
            self._admit(host)
        if origin is None:
            if fetch_site in (b"cross-site", b"same-site") and not _is_visit(method, target, fetch_mode):
                raise _refused("A page of another site may not send this request.")
            return ()
        if fetch_site == b"same-origin" or _is_same(origin, host):
            return ()
        granted = self._granted(origin)
        if method == b"OPTIONS" and request_method is not None:
            return Reply(204, (*granted, *_leave(request_headers, private_network)), b"")
        return (*granted, (b"access-control-expose-headers", _EXPOSED))

    def knows(self, host: bytes | None) -> bool:
        """Return whether ``host`` needs no check: judge() accepted it before, or accepts every host."""
        return self._is_keyed or host is None or host in self._known

    def _admit(self, host: bytes) -> None:
        """Raise HttpError if another site may own the name ``host``."""
        parts = _AUTHORITY.fullmatch(host.lower())
        if parts is None:
            raise HttpError(400, "The header Host is not valid.", code="invalid_host", close=True)
        name = parts[1].rstrip(b".")
        # Nobody can make an address mean another machine. By RFC 6761, .localhost is the machine itself.
        is_ours = name in self._hosts or name == b"localhost" or name.endswith(b".localhost")
        if not is_ours and not _is_address(name):
            raise HttpError(
                403,
                f"This host is not known as {name.decode()}.",
                hint="Name it in hosts of [gateway] in gpusvc.toml, or have requests need a key.",
                code="host_not_allowed",
            )
        if len(self._known) < _MAX_KNOWN:
            self._known.add(host)

    def _granted(self, origin: bytes) -> Headers:
        """Return the headers that allow ``origin``. Raise HttpError if its pages may not use the gateway."""
        if b"*" in self._origins:
            return ((b"access-control-allow-origin", b"*"),)
        if origin.lower() in self._origins:
            return ((b"access-control-allow-origin", origin), (b"vary", b"Origin"))
        raise _refused("Pages of this origin may not use the gateway.")


def _is_address(name: bytes) -> bool:
    """Return whether ``name`` is an address of one interface of one machine.

    0.0.0.0 and [::] are not: browsers connect them to the loopback and do not count them as a local address, so that a
    page of any site may send requests there, without Sec-Fetch-Site.
    """
    if not _ADDRESS.fullmatch(name):
        return False
    try:
        address = ipaddress.ip_address(name.decode().strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return not (mapped or address).is_unspecified


def _is_visit(method: bytes, target: bytes, fetch_mode: bytes | None) -> bool:
    """Return whether a person follows a link to the status page."""
    return method in (b"GET", b"HEAD") and fetch_mode == b"navigate" and target.partition(b"?")[0] == b"/"


def _is_same(origin: bytes, host: bytes | None) -> bool:
    """Return whether ``origin`` is the gateway's own. The scheme does not count: a proxy may have ended TLS."""
    scheme, _, authority = origin.lower().partition(b"://")
    if host is None or scheme not in _PORTS:
        return False
    implied = b":" + _PORTS[scheme]
    return authority.removesuffix(implied) == host.lower().removesuffix(implied)


def _leave(request_headers: bytes | None, private_network: bytes | None) -> Headers:
    """Return the headers that grant a preflight request all it asks for: only the origin and the key matter."""
    headers: Headers = (
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", _PREFLIGHT_SECONDS),
    )
    if request_headers is not None and _TOKENS.fullmatch(request_headers):
        headers += ((b"access-control-allow-headers", request_headers),)
    if private_network == b"true":
        headers += ((b"access-control-allow-private-network", b"true"),)
    return headers


def _refused(message: str) -> HttpError:
    hint = "Their origins can be let in by cors_origins of [gateway] in gpusvc.toml."
    return HttpError(403, message, hint=hint, code="origin_not_allowed")
