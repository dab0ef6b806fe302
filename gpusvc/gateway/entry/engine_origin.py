"""Each engine's pages have an origin of their own, so that their scripts cannot use the status page's rights.

The whole of http://NAME.localhost:8484 is the engine of NAME. A browser that opens /upstream/NAME/ at a loopback host
is sent there. Where keys are configured it takes a ticket along: valid for half a minute and once. The
ticket becomes a cookie of that origin alone, which scripts cannot read and which allows the use of that model only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import quote

from gpusvc.config.keys import Key, Keys
from gpusvc.gateway.entry.tickets import UsedTickets
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead

COOKIE = b"gpusvc-session"
SANDBOX = b"Content-Security-Policy: sandbox allow-scripts allow-forms allow-modals allow-popups allow-downloads"
"""A line for engines' responses at the gateway's own origin: a document there gets an origin of nobody."""

_TICKET = b"gpusvc-ticket"
_TICKET_SECONDS = 30
_SESSION_SECONDS = 12 * 3600

_HOST = re.compile(rb"([a-z0-9][a-z0-9_.-]*)\.localhost\.?(?::[0-9]{1,5})?", re.IGNORECASE)
_LOOPBACK = re.compile(rb"(?:localhost|127\.[0-9.]+|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_LABELS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*[A-Za-z0-9]|[A-Za-z0-9]")
_SIGNED = re.compile(rb"([0-9]{1,12})\.([0-9a-f]{64})\.([A-Za-z0-9_-]+)")


@lru_cache(maxsize=256)
def model_in(host: bytes | None) -> str | None:
    """Return the model whose origin a Host is; None: it is the gateway's own."""
    match = None if host is None else _HOST.fullmatch(host)
    return None if match is None else match[1].decode()


def is_loopback(host: bytes | None) -> bool:
    """Return whether the browser runs on this machine, where NAME.localhost leads here too."""
    return host is not None and _LOOPBACK.fullmatch(host) is not None


def is_local(host: bytes) -> bool:
    """Return whether a Host can only mean this machine. Browsers trust such a Host as they trust TLS."""
    return _LOOPBACK.fullmatch(host) is not None or model_in(host) is not None


class Sessions:
    """Tickets and cookies for the engines' origins. All workers have the same secret, which ends with them."""

    def __init__(self, secret: bytes, keys: Keys, used: UsedTickets, *, now: Callable[[], float] = time.time) -> None:
        """
        Args:
            secret: signs tickets and cookies.
            keys: of the clients.
            used: the tickets that any worker has seen.
            now: seconds since 1970.
        """
        self._secret = secret
        self._keys = keys
        self._used = used
        self._now = now

    def location(self, head: RequestHead, scheme: bytes, model: str, path: bytes, key: Key | None) -> bytes | None:
        """Return the URL of a path at the engine's own origin; None: this Host or this name has none."""
        match = None if head.host is None else _LOOPBACK.fullmatch(head.host)
        if match is None or _LABELS.fullmatch(model) is None:
            return None
        location = scheme + b"://" + model.lower().encode() + b".localhost" + (match[1] or b"") + path
        if key is not None:
            ticket = self._sign(_TICKET, model, key, _TICKET_SECONDS)
            location += (b"&" if b"?" in path else b"?") + _TICKET + b"=" + ticket
        return location

    def redeem(self, head: RequestHead, model: str) -> HttpError | None:
        """A redirect that sets the cookie, if the request has a valid ticket; None: it has none."""
        path, _, query = head.target.partition(b"?")
        parameters = query.split(b"&")
        tickets = [parameter for parameter in parameters if parameter.startswith(_TICKET + b"=")]
        if not tickets:
            return None
        ticket = tickets[0].partition(b"=")[2]
        key = self._verified(_TICKET, model, ticket)
        now = self._now()
        if key is None or not self._used.take(ticket, now=now, expires=now + _TICKET_SECONDS):
            return None
        rest = b"&".join(parameter for parameter in parameters if parameter not in tickets)
        cookie = COOKIE + b"=" + self._sign(COOKIE, model, key, _SESSION_SECONDS)
        return HttpError(
            303,
            "The browser may use the engine's pages now.",
            headers=(
                (b"location", path + (b"?" + rest if rest else b"")),
                (b"set-cookie", cookie + b"; Path=/; HttpOnly; SameSite=Strict"),
                (b"referrer-policy", b"no-referrer"),
                (b"cache-control", b"no-store"),
            ),
        )

    def key_of(self, head: RequestHead, model: str) -> Key | None:
        """Return the key that the request's cookie stands for; None: it has no valid cookie."""
        for cookie in cookies_in(head):
            name, _, value = cookie.partition(b"=")
            if name == COOKIE and (key := self._verified(COOKIE, model, value)) is not None:
                return key
        return None

    def _sign(self, purpose: bytes, model: str, key: Key, seconds: int) -> bytes:
        signed = b"%d.%b" % (self._now() + seconds, key.digest.encode())
        return signed + b"." + self._mac(purpose, model, signed)

    def _verified(self, purpose: bytes, model: str, text: bytes) -> Key | None:
        match = _SIGNED.fullmatch(text)
        if match is None:
            return None
        signed = text.rpartition(b".")[0]
        if not hmac.compare_digest(match[3], self._mac(purpose, model, signed)) or int(match[1]) < self._now():
            return None
        return self._keys.of_digest(match[2].decode())

    def _mac(self, purpose: bytes, model: str, signed: bytes) -> bytes:
        text = b"\0".join((purpose, model.lower().encode(), signed))
        return base64.urlsafe_b64encode(hmac.digest(self._secret, text, hashlib.sha256)).rstrip(b"=")


def cookies_in(head: RequestHead) -> list[bytes]:
    """Return all cookies of a request, as NAME=VALUE."""
    return [cookie.strip() for line in head.kept if _is_cookie(line) for cookie in line[7:].split(b";")]


def hide_session(head: RequestHead) -> None:
    """Remove the gateway's own cookie from the head: the engine must not get it."""
    if not any(_is_cookie(line) for line in head.kept):
        return
    others = [cookie for cookie in cookies_in(head) if not cookie.startswith(COOKIE + b"=")]
    head.kept = [line for line in head.kept if not _is_cookie(line)]
    if others:
        head.kept.append(b"Cookie: " + b"; ".join(others))


def _is_cookie(line: bytes) -> bool:
    return line[:7].lower() == b"cookie:"


def to_engine(location: bytes) -> HttpError:
    """Return the redirect of a browser to the engine's own origin."""
    return HttpError(
        307,
        "The engine's pages are at an address of their own.",
        headers=((b"location", location), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store")),
    )


def missing_session(model: str) -> HttpError:
    """Return the error for a browser that opens an engine's page without a ticket."""
    return HttpError(
        401,
        "The request has no valid API key.",
        hint=f"Open /upstream/{quote(model, safe='')}/ at the gateway's own address: it leads here.",
        code="invalid_api_key",
    )
