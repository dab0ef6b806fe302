"""Events and logs: the last ones, and new ones as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from aiohttp import web

from gpusvc.api.backend import journal
from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.responses import json_response
from gpusvc.api.backend.streams import Message
from gpusvc.api.routes.endpoints import JSON, SSE, Endpoint, Parameter
from gpusvc.errors import UsageError
from gpusvc.journal import eventlog
from gpusvc.journal.eventlog import Event

_MAX_LINES = 10_000
_FEW_LINES = 10

_LINES = Parameter("lines", "How many of the last entries are sent first.", {"type": "integer", "minimum": 0})
_FOLLOW = Parameter("follow", "0: an array of the last entries, and no stream.", {"enum": ["0", "1"], "default": "1"})
_MODEL = Parameter("model", "Only of this model, or an alias of it.", {"type": "string"})


class _History:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def events(self, request: web.Request) -> web.StreamResponse:
        """The last events, and new ones as they happen."""
        text = request.query.get("model")
        model = None if text is None else self._backend.resolve(text)
        lines = _lines(request)
        if not _follows(request):
            return json_response([event.to_json() for event in await self._backend.events.last(lines, model=model)])
        seen = request.headers.get("Last-Event-ID", "")
        after = seen if eventlog.is_cursor(seen) else None
        return await self._backend.streams.send(request, self._events(model, lines, after))

    async def log(self, request: web.Request) -> web.StreamResponse:
        """The last lines of a model's log, and new ones as they are written: by its engine, gpusvc and systemd."""
        name = self._backend.resolve(request.match_info["name"])
        lines = _lines(request)
        if not _follows(request):
            async with journal.log_of(name, lines, follow=False) as entries:
                return await self._backend.streams.send_array(request, entries)
        return await self._backend.streams.send(request, _log(name, lines))

    async def _events(self, model: str | None, lines: int, after: str | None) -> AsyncGenerator[Message, None]:
        events = self._backend.events
        with events.subscribed() as subscription:
            told = set()
            if lines or after is not None:
                for event in await events.last(_MAX_LINES if after is not None else lines, model=model, after=after):
                    told.add(event.cursor)
                    yield _message(event)
            while (news := await subscription.next()) is not None:
                if (model is None or news.model == model) and news.cursor not in told:
                    yield _message(news)


def endpoints(backend: Backend) -> list[Endpoint]:
    history = _History(backend)
    return [
        Endpoint("GET", "/gpusvc/events", history.events, (_LINES, _FOLLOW, _MODEL), (SSE, JSON)),
        Endpoint("GET", "/gpusvc/models/{name}/log", history.log, (_LINES, _FOLLOW), (SSE, JSON)),
    ]


async def _log(name: str, lines: int) -> AsyncGenerator[Message, None]:
    async with journal.log_of(name, lines, follow=True) as entries:
        async for entry in entries:
            yield Message(entry, event="line", id=entry["cursor"])


def _message(event: Event) -> Message:
    return Message(event.to_json(), event=event.kind, id=event.cursor)


def _follows(request: web.Request) -> bool:
    return request.query.get("follow", "1") not in {"0", "false", "no"}


def _lines(request: web.Request) -> int:
    text = request.query.get("lines", str(_FEW_LINES))
    if not (text.isascii() and text.isdecimal()) or int(text) > _MAX_LINES:
        raise UsageError(f"lines={text[:20]} is no number of lines.", hint=f"It is a number from 0 to {_MAX_LINES}.")
    return int(text)
