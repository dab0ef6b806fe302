"""Routes that other programs' clients use: llama-swap's /running and /unload, and LocalAI's /backend/shutdown."""

from __future__ import annotations

import json

from aiohttp import web

from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.caller import caller
from gpusvc.api.backend.responses import json_response
from gpusvc.api.routes.endpoints import Endpoint
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.log import log
from gpusvc.status.models import ModelState, url

_MODEL = {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}

_RUNNING = {
    ModelState.STARTING: "starting",
    ModelState.READY: "ready",
    ModelState.STOPPING: "stopping",
}


class _PostOnlyError(GpusvcError):
    """A request that changes something came as a GET, which a link or an image of any web page sends."""

    http_status = 405


class _Compatible:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def running(self, _: web.Request) -> web.Response:
        """The models that run, in llama-swap's form."""
        models = await self._backend.snapshots.models()
        return json_response(
            {
                "running": [
                    {
                        "model": model.name,
                        "state": _RUNNING[model.state],
                        "proxy": url(model.address, model.port) if model.address and model.port else "",
                    }
                    for model in models
                    if model.state in _RUNNING
                ]
            }
        )

    async def unload_all(self, request: web.Request) -> web.Response:
        """Stop all models, in use or not."""
        log(6, f"stop all models: asked for by {caller(request)}.")
        await self._backend.stops.stop_all()
        return web.Response(text="OK")

    async def refuse_get(self, _: web.Request) -> web.Response:
        """Refuse to unload on a GET, which any page in a browser can send: POST does it."""
        raise _PostOnlyError("GET /unload stops no model.", hint="POST /unload stops all models: curl -X POST …/unload")

    async def unload(self, request: web.Request) -> web.Response:
        """Stop a model, in use or not."""
        await self._stop(request, request.match_info["name"])
        return web.Response(text="OK")

    async def shutdown(self, request: web.Request) -> web.Response:
        """Stop a model, in use or not, in LocalAI's form."""
        try:
            value = json.loads(await request.read())
            model = value["model"]
        except (ValueError, KeyError, TypeError, RecursionError):
            model = None
        if not isinstance(model, str):
            raise UsageError("The body names no model.", hint='It is {"model": NAME}.')
        await self._stop(request, model)
        return json_response({})

    async def _stop(self, request: web.Request, text: str) -> None:
        name = self._backend.resolve(text)
        log(6, f"stop {name}: asked for by {caller(request)}.")
        await self._backend.stops.stop(name)


def endpoints(backend: Backend) -> list[Endpoint]:
    compatible = _Compatible(backend)
    plain = ("text/plain",)
    return [
        Endpoint("GET", "/running", compatible.running),
        Endpoint("GET", "/unload", compatible.refuse_get, media=plain),
        Endpoint("POST", "/unload", compatible.unload_all, media=plain),
        Endpoint("POST", "/api/models/unload", compatible.unload_all, media=plain),
        Endpoint("POST", "/api/models/unload/{name}", compatible.unload, media=plain),
        Endpoint("POST", "/backend/shutdown", compatible.shutdown, body=_MODEL),
    ]
