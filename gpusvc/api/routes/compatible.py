"""Routes that tools know from elsewhere: llama-swap's /running and /unload, and LocalAI's /backend/shutdown."""

from __future__ import annotations

import json

from aiohttp import web

from gpusvc.api.backend.answers import answer
from gpusvc.api.backend.caller import caller
from gpusvc.api.backend.service import Service
from gpusvc.api.routes.endpoints import Endpoint
from gpusvc.errors import UsageError
from gpusvc.log import log
from gpusvc.status.inventory import ModelState, url

_MODEL = {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}

_RUNNING = {
    ModelState.STARTING: "starting",
    ModelState.READY: "ready",
    ModelState.STOPPING: "stopping",
}


class _Compatible:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def running(self, _: web.Request) -> web.Response:
        """The models that run, in llama-swap's form."""
        models = await self._service.snapshots.models()
        return answer(
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
        await self._service.jobs.stop_all()
        return web.Response(text="OK")

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
        return answer({})

    async def _stop(self, request: web.Request, text: str) -> None:
        name = self._service.resolve(text)
        log(6, f"stop {name}: asked for by {caller(request)}.")
        await self._service.jobs.stop(name)


def endpoints(service: Service) -> list[Endpoint]:
    compatible = _Compatible(service)
    plain = ("text/plain",)
    return [
        Endpoint("GET", "/running", compatible.running),
        Endpoint("GET", "/unload", compatible.unload_all, media=plain, changes=True),
        Endpoint("POST", "/unload", compatible.unload_all, media=plain),
        Endpoint("POST", "/api/models/unload", compatible.unload_all, media=plain),
        Endpoint("POST", "/api/models/unload/{name}", compatible.unload, media=plain),
        Endpoint("POST", "/backend/shutdown", compatible.shutdown, body=_MODEL),
    ]
