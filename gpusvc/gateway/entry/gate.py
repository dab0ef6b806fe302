"""Who may send a request: by its Host and origin, and by its key. It knows no models."""

from __future__ import annotations

from gpusvc.config.keys import Key, Keys, Right
from gpusvc.gateway.entry import routes
from gpusvc.gateway.entry.engine_origin import Sessions, hide_session, is_local, missing_session, model_in, to_engine
from gpusvc.gateway.entry.origin import Guard
from gpusvc.gateway.entry.routes import Route
from gpusvc.gateway.http.replies import Headers, HttpError, Reply
from gpusvc.gateway.http.request_head import RequestHead

_SAFE = frozenset({b"GET", b"HEAD", b"OPTIONS"})

# With this header a browser asks for a name and a password.
_FOR_BROWSERS = ((b"www-authenticate", b'Basic realm="gpusvc"'),)


class Gate:
    """Admits requests, for one set of settings and keys."""

    def __init__(self, guard: Guard, keys: Keys, sessions: Sessions) -> None:
        self._guard = guard
        self._sessions = sessions
        self._keys = keys

    def check_origin(self, head: RequestHead) -> Headers | Reply:
        """Return headers for the response, or the whole response to a browser's preflight request.

        Raises:
            HttpError: 400 or 403, the Host or the origin may not use the gateway.
        """
        if head.origin is None and head.fetch_site is None and self._guard.knows(head.host):
            return ()  # as for nearly all programs, which are not browsers
        return self._guard.judge(
            head.method,
            head.target,
            host=head.host,
            origin=head.origin,
            fetch_site=head.fetch_site,
            fetch_mode=head.fetch_mode,
            request_method=head.request_method,
            request_headers=head.request_headers,
            private_network=head.private_network,
        )

    def admit(self, head: RequestHead) -> tuple[Route, Key | None]:
        """Return the route of a request, and its key; None: none is needed.

        Raises:
            HttpError: as routes.route(), authorise() and authorise_page().
        """
        engine = model_in(head.host)
        if engine is None:
            route = routes.route(head.method, head.target)
            return route, self.authorise(head, route.right)
        return routes.engine_route(engine, head.target), self.authorise_page(head, engine)

    def authorise_page(self, head: RequestHead, model: str) -> Key | None:
        """Return the key of a request to an engine's own origin. Browsers have a ticket or a cookie, programs a key.

        Raises:
            HttpError: 303 the ticket becomes a cookie, 401 there is none of these.
        """
        key = None
        if self._keys.configured:
            redirect = self._sessions.redeem(head, model)
            if redirect is not None:
                raise redirect
            key = self._sessions.key_of(head, model) or self._keys.authenticate(head.authorization, head.x_api_key)
            if key is None:
                raise missing_session(model)
        hide_session(head)
        return key

    def send_to_engine(self, head: RequestHead, scheme: bytes, model: str, path: bytes, key: Key | None) -> None:
        """Raise HttpError 307 if a browser opens an engine's page at the gateway's own origin."""
        if head.fetch_mode == b"navigate" and head.method == b"GET":
            location = self._sessions.location(head, scheme, model, path, key)
            if location is not None:
                raise to_engine(location)

    def authorise(self, head: RequestHead, right: Right | None) -> Key | None:
        """Return the key of the request; None: none is needed.

        Raises:
            HttpError: 401 there is no valid key, 403 it has not got the right.
        """
        if right is None or not self._keys.configured:
            return None
        key = self._keys.authenticate(head.authorization, head.x_api_key)
        if key is None:
            raise HttpError(
                401,
                "The request has no valid API key.",
                hint="Send it in the header Authorization after Bearer, or in X-Api-Key.",
                code="invalid_api_key",
                headers=_FOR_BROWSERS if right is Right.ADMIN else (),
            )
        if not _is_proven(head):
            raise HttpError(
                403,
                "A browser's password does not allow this without the origin of the page.",
                hint="Programs send the key in the header Authorization after Bearer, or in X-Api-Key.",
                code="origin_unproven",
            )
        if not key.may(right):
            raise HttpError(403, f"The key {key.name} does not have the right {right.value}.", code="right_missing")
        return key


def check_load(head: RequestHead, scheme: bytes) -> None:
    """Check whether a request may load its model.

    Any page can make a browser send a GET. Over plain HTTP to another machine browsers send nothing that tells which
    page it was. So such a GET needs something that a page of another site cannot add.

    Args:
        head: of the request.
        scheme: of the client's connection.

    Raises:
        HttpError: 403, it may come from a page of another site.
    """
    if (
        head.method not in _SAFE
        or head.origin is not None  # these two were checked
        or head.fetch_site is not None
        or head.x_api_key is not None
        or head.model is not None
        or head.upgrade is not None  # browsers always send Origin with it
        or (head.authorization is not None and head.authorization[:6].lower() != b"basic ")
        or b"https" in (scheme, head.forwarded_proto)  # browsers send Sec-Fetch-Site there
        or head.host is None
        or is_local(head.host)  # likewise
    ):
        return
    raise HttpError(
        403,
        "The model is not loaded, and a GET from another machine loads it only if its origin is known.",
        hint="Start it on the status page, or by a POST, or send a key after Bearer or in X-Api-Key.",
        code="origin_unproven",
    )


def _is_proven(head: RequestHead) -> bool:
    """Return whether a request that may change something comes from the page where its credentials were entered.

    A browser adds a remembered password to the requests of every page. So a request with a password needs an origin,
    which was checked before. A program sends its key in a header that a browser never adds by itself.
    """
    authorization = head.authorization
    if head.method in _SAFE or authorization is None or authorization[:6].lower() != b"basic ":
        return True
    return head.origin is not None or head.fetch_site == b"same-origin"
