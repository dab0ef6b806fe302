"""The forms of a request target (RFC 9112, 3.2), and the errors for invalid targets and methods."""

from __future__ import annotations

import re

from gpusvc.gateway.http.replies import HttpError

METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})

_ABSOLUTE = re.compile(rb"https?://([A-Za-z0-9_.:\[\]-]+)((?:[/?].*)?)", re.IGNORECASE)


def in_origin_form(method: bytes, target: bytes) -> tuple[bytes | None, bytes]:
    """Return the authority and the path of a target that does not begin with a slash (RFC 9112, 3.2).

    The authority replaces the request's Host, also in the check of origins; None: the target has none.

    Raises:
        HttpError: 400, the target has no valid form; 405, the method is CONNECT.
    """
    if target == b"*":
        if method != b"OPTIONS":
            raise invalid_target("The target * is for OPTIONS.")
        return None, target
    if method == b"CONNECT":
        raise unsupported_method(method)
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise invalid_target("The target of the request must be a path.")
    authority, rest = absolute.groups()
    return authority, rest if rest.startswith(b"/") else b"/" + rest


def unsupported_method(method: bytes) -> HttpError:
    shown = method[:20].decode("ascii", "replace")
    if method in (b"CONNECT", b"TRACE"):  # the gateway opens no tunnels, and echoes no request with its keys
        allow = b", ".join(sorted(METHODS))
        return HttpError(
            405, f"The gateway does not support {shown}.", code="method_not_allowed", headers=((b"allow", allow),)
        )
    return HttpError(501, f"There is no method {shown}.", code="method_not_implemented")


def invalid_target(message: str) -> HttpError:
    return HttpError(400, message, code="invalid_url")
