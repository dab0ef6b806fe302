"""The management API, asked by the gateway itself: what it knows of models, and that one is kept or unloaded."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from gpusvc.gateway.http.replies import HttpError
from gpusvc.log import log

_LOOK_SECONDS = 5.0
# An engine is stopped and its release proven meanwhile.
_STOP_SECONDS = 120.0
_LONGEST_BYTES = 16 << 20


class Management:
    """The line to the management API."""

    def __init__(self, api: Path, lines: Sequence[bytes]) -> None:
        """
        Args:
            api: the API's socket.
            lines: of the request's head, which say for whom the gateway asks.
        """
        self._api = api
        self._lines = lines

    async def weights(self) -> Mapping[str, Mapping[str, object]]:
        """Return what the files of all models say; empty if the API does not answer."""
        return _by_name(await self._look("/gpusvc/weights"))

    async def models(self) -> Mapping[str, Mapping[str, object]]:
        """Return how all models stand; empty if the API does not answer."""
        return _by_name(await self._look("/gpusvc/models"))

    async def keep(self, name: str, seconds: float) -> None:
        """Have a model unloaded after so long without use; infinity: never.

        Raises:
            HttpError: the API does not answer, or refuses.
        """
        idle = "never" if math.isinf(seconds) else f"{math.ceil(seconds)}s"
        await self._act(f"/gpusvc/models/{quote(name, safe='')}/keep?idle={idle}", _LOOK_SECONDS)

    async def unload(self, name: str) -> bool:
        """Stop a model unless it is in use. Return False if it is.

        Raises:
            HttpError: the API does not answer, or refuses.
        """
        try:
            await self._act(f"/gpusvc/models/{quote(name, safe='')}/evict?wait=0s", _STOP_SECONDS)
        except HttpError as error:
            if error.code == "in_use":
                return False
            raise
        return True

    async def _look(self, path: str) -> object:
        try:
            status, value = await self._ask("GET", path, _LOOK_SECONDS)
        except (OSError, ValueError, TimeoutError) as error:
            reason = str(error) or "it takes too long"
            log(4, f"A list for a client of Ollama is not complete: the management API does not answer ({reason}).")
            return None
        return value if status == 200 else None

    async def _act(self, path: str, seconds: float) -> None:
        try:
            status, value = await self._ask("POST", path, seconds)
        except (OSError, ValueError, TimeoutError) as error:
            raise HttpError(
                503,
                f"The management API does not answer ({str(error) or 'it takes too long'}).",
                hint="`systemctl status gpusvc-api.socket gpusvc-api.service` shows why.",
                code="api_unreachable",
                retry_after_seconds=5,
            ) from None
        if status < 300:
            return
        told = value.get("error") if isinstance(value, dict) else None
        told = told if isinstance(told, dict) else {}
        message, hint, code = told.get("message"), told.get("hint"), told.get("code")
        raise HttpError(
            status if status in (404, 409) else 503,
            message if isinstance(message, str) else f"The management API answered with status {status}.",
            hint=hint if isinstance(hint, str) else None,
            code=code if isinstance(code, str) else None,
        )

    async def _ask(self, method: str, path: str, seconds: float) -> tuple[int, object]:
        """Raises OSError, ValueError, TimeoutError: there is no answer, or none that makes sense."""
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(self._api)
            try:
                # HTTP/1.0: the answer is what comes until the end, in one piece.
                lines = [f"{method} {path} HTTP/1.0".encode(), b"Host: localhost", *self._lines, b"Content-Length: 0"]
                writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
                answer = bytearray()
                while piece := await reader.read(1 << 16):
                    answer += piece
                    if len(answer) > _LONGEST_BYTES:
                        raise ValueError("its answer is too long")
            finally:
                writer.transport.abort()
        head, end, body = bytes(answer).partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
        if not end or len(words) < 2 or not words[1].isdigit():
            raise ValueError("its answer is not HTTP")
        return int(words[1]), json.loads(body)


def _by_name(value: object) -> Mapping[str, Mapping[str, object]]:
    rows = value if isinstance(value, list) else []
    return {str(row.get("name")): row for row in rows if isinstance(row, dict)}
