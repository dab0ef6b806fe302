"""Routes that show, start, stop, evict and pin models."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiohttp import web

from gpusvc.api.backend import journal, pins
from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.caller import caller
from gpusvc.api.backend.responses import error_response, json_response
from gpusvc.api.backend.shared import outcome
from gpusvc.api.backend.starts import Ready
from gpusvc.api.backend.streams import is_gone
from gpusvc.api.routes.endpoints import Endpoint, Parameter, flag
from gpusvc.config.files import load_host
from gpusvc.config.serving import load_serving
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.log import log
from gpusvc.quantity import parse_duration
from gpusvc.state import keepalive
from gpusvc.state import lease as leases
from gpusvc.watchdog import verdicts

_T = TypeVar("_T")

_LOG_LINES = 10

# How often a handler checks whether its client still waits. Only some releases of aiohttp cancel it.
_LOOK_SECONDS = 0.25

_WAIT = Parameter(
    "wait",
    "Absent: the response comes when the model is ready, and the start goes on even if the client disconnects. no: the "
    "response comes at once. request: the start goes on only while requests wait for it, and is refused during the "
    "cooldown after a failed start.",
    {"enum": ["no", "request"]},
)
_PATIENCE = Parameter(
    "wait", "How long to wait for the end of its uses, as in 30s; absent: as long as a start waits.", {"type": "string"}
)
_IDLE = Parameter(
    "idle",
    "How long it stays without use, as in 10m; never: as long as it runs; default: as its file says.",
    {"type": "string"},
)
_FORCE = Parameter("force", "Then evict it all the same.", {"type": "boolean", "default": False})


class _NotRunningError(GpusvcError):
    """The model has no run that anything could be said of."""

    http_status = 409


class _Models:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._background: set[asyncio.Task[Any]] = set()

    async def list_(self, _: web.Request) -> web.Response:
        """All models, stopped ones too."""
        return json_response([model.to_json() for model in await self._backend.snapshots.models()])

    async def show(self, request: web.Request) -> web.Response:
        """Everything about one model."""
        name = self._name(request)
        backend = self._backend
        status, processes = await backend.snapshots.model(name)
        last = verdicts.read(backend.paths).get(name)
        more = {
            "verdict": None if last is None else last.kind,
            "evidence": None if last is None else last.source,
            "file": str(backend.paths.model_file(name)),
            "processes": [process.to_json() for process in processes],
            "log": await journal.last_words(name, _LOG_LINES, 0.0),
        }
        return json_response(status.to_json() | more)

    async def start(self, request: web.Request) -> web.StreamResponse:
        """Start a model, and wait until it is ready."""
        name = self._backend.resolve(request.match_info["name"], configured=True)
        how = request.query.get("wait", "")
        if how == "request":
            return await self._start_on_request(request, name)
        if how not in {"", "no"}:
            raise UsageError(f"wait={how} means nothing here.", hint="It is request, or no.")
        self._note(request, name, "start")
        if how == "no" or _is_form(request):
            self._backend.starts.begin(name)
            return _done(request, {"name": name, "state": "starting"}, status=202)
        return _ready(await self._finish(self._backend.starts.start(name)))

    async def _start_on_request(self, request: web.Request, name: str) -> web.Response:
        start = asyncio.ensure_future(self._backend.starts.start_on_request(name))
        try:
            while not is_gone(request):
                done, _ = await asyncio.wait({start}, timeout=_LOOK_SECONDS)
                if done:
                    return _ready(start.result())
        except GpusvcError as error:
            return error_response(error, with_log=self._may_show_log(name))
        finally:
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        return web.Response(status=499)  # nobody reads it

    async def stop(self, request: web.Request) -> web.StreamResponse:
        """Stop a model, in use or not, and wait until its VRAM is proven free."""
        name = self._name(request)
        self._note(request, name, "stop")
        was_up = await self._finish(self._backend.stops.stop(name))
        return _done(request, {"name": name, "state": "stopped", "was_running": was_up})

    async def restart(self, request: web.Request) -> web.StreamResponse:
        """Stop a model, prove its VRAM free, start it again, and wait until it is ready."""
        name = self._backend.resolve(request.match_info["name"], configured=True)
        self._note(request, name, "restart")
        ready = await self._finish(self._backend.starts.restart(name))
        return _done(request, {}) if _is_form(request) else _ready(ready)

    async def evict(self, request: web.Request) -> web.StreamResponse:
        """Stop a model once nobody uses it, and wait until its VRAM is proven free."""
        name = self._name(request)
        patience = self._patience(request.query.get("wait"))
        self._note(request, name, "evict")
        work = self._backend.stops.evict(
            name, patience_seconds=patience, force=flag(request, "force"), is_wanted=lambda: not is_gone(request)
        )
        was_up = await self._finish(work)
        return _done(request, {"name": name, "state": "stopped", "was_running": was_up})

    async def release(self, request: web.Request) -> web.StreamResponse:
        """Try again to prove the release of a stuck model."""
        name = self._name(request)
        self._note(request, name, "release")
        await self._finish(self._backend.stops.release(name))
        return _done(request, {"name": name, "state": "stopped"})

    async def pin(self, request: web.Request) -> web.StreamResponse:
        """Protect a model from eviction until the next boot."""
        name = self._name(request)
        self._note(request, name, "pin")
        pins.pin(self._backend.paths, name)
        self._backend.snapshots.forget()
        return _done(request, {"name": name, "pinned": True})

    async def unpin(self, request: web.Request) -> web.StreamResponse:
        """Let a model be evicted again."""
        name = self._name(request)
        self._note(request, name, "unpin")
        self._backend.snapshots.forget()
        pins.unpin(self._backend.paths, name)
        return _done(request, {"name": name, "pinned": False})

    async def keep(self, request: web.Request) -> web.StreamResponse:
        """Replace the idle timeout of a model's present run, as a client of the gateway wants it."""
        name = self._name(request)
        lease = leases.read(self._backend.paths, name)
        if lease is None:
            raise _NotRunningError(f"{name} does not run.", hint="idle_timeout in its file is for every run.")
        text = request.query.get("idle", "")
        self._note(request, name, f"idle timeout {text[:32]!r} for")
        if text == "default":
            keepalive.remove(self._backend.paths, name)
        else:
            keepalive.write(self._backend.paths, name, lease.created, _idle_seconds(text))
        self._backend.snapshots.forget()
        return _done(request, {"name": name, "idle": text})

    def _name(self, request: web.Request) -> str:
        return self._backend.resolve(request.match_info["name"])

    def _note(self, request: web.Request, name: str, what: str) -> None:
        log(6, f"{what} {name}: asked for by {caller(request)}.")

    def _patience(self, text: str | None) -> float:
        if text is None:
            eviction = load_host(self._backend.paths).eviction
            return eviction.retries * eviction.interval_seconds
        try:
            return parse_duration(text)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _may_show_log(self, name: str) -> bool:
        try:
            return load_serving(self._backend.paths, name).show_logs
        except GpusvcError:
            return False

    async def _finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Finish ``work`` even if the client disconnects and aiohttp cancels the handler."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await outcome(task)


def endpoints(backend: Backend) -> list[Endpoint]:
    models = _Models(backend)
    one = "/gpusvc/models/{name}"
    return [
        Endpoint("GET", "/gpusvc/models", models.list_),
        Endpoint("GET", one, models.show),
        Endpoint("POST", f"{one}/start", models.start, (_WAIT,)),
        Endpoint("POST", f"{one}/stop", models.stop),
        Endpoint("POST", f"{one}/restart", models.restart),
        Endpoint("POST", f"{one}/evict", models.evict, (_PATIENCE, _FORCE)),
        Endpoint("POST", f"{one}/release", models.release),
        Endpoint("POST", f"{one}/pin", models.pin),
        Endpoint("POST", f"{one}/unpin", models.unpin),
        Endpoint("POST", f"{one}/keep", models.keep, (_IDLE,)),
    ]


def _idle_seconds(text: str) -> float:
    if text == "never":
        return math.inf
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(str(error), hint="?idle= is a duration, never, or default.") from None


def _ready(ready: Ready) -> web.Response:
    return json_response({"name": ready.name, "state": "ready", "address": ready.address, "port": ready.port})


def _done(request: web.Request, value: dict[str, Any], *, status: int = 200) -> web.StreamResponse:
    """Return ``value`` as JSON, or for a form of the page a redirect to the page."""
    if _is_form(request):
        return web.Response(status=303, headers={"Location": "/"})
    return json_response(value, status=status)


def _is_form(request: web.Request) -> bool:
    return "text/html" in request.headers.get("Accept", "")
