"""What a client is told of an exception."""

from __future__ import annotations

import errno
import json
import os
import traceback

from gpusvc.errors import GpusvcError
from gpusvc.gateway.http.replies import HttpError
from gpusvc.log import log

# Resources that may be free again in a moment.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EAGAIN})


def to_http_error(error: Exception) -> HttpError:
    """The HTTP error for any exception. One that nobody expected is logged with its traceback."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, GpusvcError):
        return HttpError(error.http_status, error.message, hint=error.hint)
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        why = os.strerror(error.errno)
        log(4, f"A request is turned away: {why}.")
        return HttpError(
            503,
            f"The gateway cannot take this request now: {why}.",
            code="exhausted",
            retry_after_seconds=1,
            close=True,
        )
    log(3, "".join(traceback.format_exception(error)))
    return HttpError(500, "The gateway failed.", hint="Its journal says how.", code="internal_error", close=True)


def message_in(body: bytes) -> str | None:
    """The message of an error body in the form of either API; None: there is none."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return message if isinstance(message, str) else None
