"""The errors that clients get for exceptions."""

from __future__ import annotations

import errno
import json
import os
import traceback

from gpusvc.errors import GpusvcError
from gpusvc.gateway.activation.peer import StrangerError
from gpusvc.gateway.entry import routes
from gpusvc.gateway.http.replies import HttpError, error_reply
from gpusvc.gateway.http.response_head import write_whole
from gpusvc.gateway.relay.shared import Shared
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


def refusal(shared: Shared, beginning: bytes, error: HttpError) -> bytes:
    """Return the response to a request that is refused before its head was read, and count it.

    ``beginning``: what came of the head.
    """
    line = beginning.split(b" ", 2)
    reply = error_reply(routes.dialect_of(line[1] if len(line) > 1 else b""), error)
    counters = shared.counters.of("")
    counters.began()
    counters.ended(reply.status, 0.0)
    return write_whole(reply, shared.date)


def reason(error: OSError | TimeoutError) -> str:
    """Why nobody takes connections, as the end of a sentence."""
    if isinstance(error, StrangerError):
        return str(error.strerror)
    return os.strerror(error.errno) if error.errno else "it takes too long"


def message_in(body: bytes) -> str | None:
    """The message of an error body in the form of either API; None: there is none."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return message if isinstance(message, str) else None
