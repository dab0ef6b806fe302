"""Asks the API to start a model, and waits for the result. The gateway itself has no right to start anything.

The API goes on with such a start only as long as its caller waits. So cancelling abandons the start.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpusvc.gateway.http.replies import HttpError

# An API that is being restarted or upgraded is back within seconds. Its socket is there all the time.
_TRIES = 6
_FIRST_PAUSE_SECONDS = 0.1

# If a connection lasted this long, the API worked: the tries are counted anew.
_WORKED_SECONDS = 1.0

_LONGEST_ANSWER_BYTES = 1 << 20

# Statuses that the client gets as they are. Others, such as 403, are about the gateway and not about the client.
_PASSED_ON = frozenset({404, 409, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model did not start."""

    status: int
    message: str
    hint: str | None = None
    kind: str | None = None
    code: str | None = None
    retry_after_seconds: int | None = None
    log: tuple[str, ...] = ()
    """The engine's last lines."""
    brief: str | None = None
    """As in HttpError: the reason may name the model that holds a GPU."""

    def to_http_error(self, *, show_logs: bool) -> HttpError:
        """Return the error for one request."""
        message = self.message
        said = [line for line in self.log if line.strip() and line.strip() not in message]
        if said and show_logs:
            stop = "" if message.endswith((".", "!", "?")) else "."
            message = "\n".join([f"{message}{stop} The last lines of its log:", *said])
        return HttpError(
            self.status,
            message,
            hint=self.hint,
            kind=self.kind,
            code=self.code,
            retry_after_seconds=self.retry_after_seconds,
            brief=self.brief,
        )


class Starter:
    """Sends the API's socket one request for each start."""

    def __init__(self, api: Path) -> None:
        self._api = api

    async def start(self, name: str) -> Failure | None:
        """Have ``name`` started, and wait until it is ready. Return why it did not start; None: it is ready."""
        pause = _FIRST_PAUSE_SECONDS
        tries = 0
        while True:
            began = time.monotonic()
            try:
                return await self._ask(name)
            except (OSError, ValueError) as error:
                if time.monotonic() - began >= _WORKED_SECONDS:
                    pause, tries = _FIRST_PAUSE_SECONDS, 0
                tries += 1
                if tries >= _TRIES:
                    return self._unreachable(name, error)
            await asyncio.sleep(pause)
            pause *= 2

    async def _ask(self, name: str) -> Failure | None:
        """Ask once. Raise OSError or ValueError if there is no valid response."""
        reader, writer = await asyncio.open_unix_connection(self._api)
        try:
            # HTTP/1.0: the response is everything up to the end of the connection.
            writer.write(b"POST /gpusvc/models/%b/start?wait=request HTTP/1.0\r\n" % name.encode())
            writer.write(b"Host: localhost\r\nContent-Length: 0\r\n\r\n")
            return _read_answer(await _read_all(reader), name)
        finally:
            # At once: so the API learns that no request waits any more.
            writer.transport.abort()

    def _unreachable(self, name: str, error: Exception) -> Failure:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        return Failure(
            503,
            f"{name} is not running, and cannot be started: {self._api} does not answer ({reason}).",
            hint="`systemctl status gpusvc-api.socket gpusvc-api.service` shows why.",
            code="api_unreachable",
            retry_after_seconds=5,
        )


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    pieces = bytearray()
    while piece := await reader.read(1 << 16):
        pieces += piece
        if len(pieces) > _LONGEST_ANSWER_BYTES:
            raise ValueError("its response is too long")
    return bytes(pieces)


def _read_answer(answer: bytes, name: str) -> Failure | None:
    head, end, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in rest)}
    words = first.split(maxsplit=2)
    if (
        not end
        or len(words) < 2
        or not words[0].startswith("HTTP/1.")
        or len(body) < int(fields.get("content-length", 0))
    ):
        raise ConnectionError("it ended in the middle of its response")
    status = int(words[1])
    if 200 <= status < 300:
        return None
    try:
        error: Any = json.loads(body)["error"]
        message, said = str(error["message"]), error
    except (ValueError, KeyError, TypeError):
        message, said = f"{name} did not start: the API answered {status}.", {}
    log = said.get("log")
    return Failure(
        status if status in _PASSED_ON else 503,
        message,
        hint=_text(said.get("hint")),
        kind=_text(said.get("type")),
        code=_text(said.get("code")),
        retry_after_seconds=_seconds(fields.get("retry-after")),
        log=tuple(str(line) for line in log) if isinstance(log, list) else (),
        brief=f"{name} did not start.",
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _seconds(value: str | None) -> int | None:
    try:
        return None if value is None else max(0, math.ceil(float(value)))
    except (ValueError, OverflowError):  # a date; the API sends none
        return None
