"""Forms of a request target (RFC 9112, 3.2), and the errors for targets and methods that cannot be right."""

from __future__ import annotations

import re

from gpusvc.gateway.http.replies import HttpError

METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})

_ABSOLUTE = re.compile(rb"https?://([A-Za-z0-9_.:\[\]-]+)((?:[/?].*)?)", re.IGNORECASE)


def in_origin_form(method: bytes, target: bytes) -> tuple[bytes | None, bytes]:
    """Authority and path of a target that does not begin with a slash; RFC 9112, 3.2, has three forms of it.

    The authority stands for the Host of the request, also where origins are judged; None: there is none.

    Raises:
        HttpError: 400 it is none of them, 405 it is for a proxy.
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
    if method in (b"CONNECT", b"TRACE"):  # no tunnel to anywhere, and no echo of a request's keys
        allow = b", ".join(sorted(METHODS))
        return HttpError(
            405, f"The gateway does not support {shown}.", code="method_not_allowed", headers=((b"allow", allow),)
        )
    return HttpError(501, f"There is no method {shown}.", code="method_not_implemented")


def invalid_target(message: str) -> HttpError:
    return HttpError(400, message, code="invalid_url")
