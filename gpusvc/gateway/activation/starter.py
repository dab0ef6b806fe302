"""Asks the API to start a model, and waits for what comes of it; the gateway itself may start nothing.

The API keeps such a start going for as long as somebody waits for it, so that cancelling abandons it.
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

# An API that is being restarted or upgraded is back within seconds; its socket is there all the time, if its unit is.
_TRIES = 6
_FIRST_PAUSE_SECONDS = 0.1

# A connection that lasted for so long was to an API that worked: patience with the next one begins anew.
_WORKED_SECONDS = 1.0

_LONGEST_ANSWER_BYTES = 1 << 20

# What a client should know as it is. Whatever else the API says (such as 403) is about the gateway.
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
    """As HttpError has it: a reason may be who holds a GPU."""

    def to_http_error(self, *, show_logs: bool) -> HttpError:
        """A new one for each request that it is told to."""
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
    """The line to the API."""

    def __init__(self, api: Path) -> None:
        self._api = api

    async def start(self, name: str) -> Failure | None:
        """Have ``name`` started and wait until it is ready, for as long as that takes; None: it is."""
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
        """Raises OSError or ValueError where there is no answer, or none that makes sense."""
        reader, writer = await asyncio.open_unix_connection(self._api)
        try:
            # HTTP/1.0: the answer is what comes until the end, in one piece.
            writer.write(b"POST /gpusvc/models/%b/start?wait=request HTTP/1.0\r\n" % name.encode())
            writer.write(b"Host: localhost\r\nContent-Length: 0\r\n\r\n")
            return _read_answer(await _read_all(reader), name)
        finally:
            # At once: that is how the API learns that nobody waits any more.
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
            raise ValueError("its answer is too long")
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
        raise ConnectionError("it ended in the middle of its answer")
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
    except (ValueError, OverflowError):  # a date, which the API does not send
        return None
