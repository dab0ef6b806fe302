"""The machine: its GPUs, and the configuration in effect."""

from __future__ import annotations

from aiohttp import web

from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.responses import json_response
from gpusvc.api.routes.endpoints import Endpoint
from gpusvc.config.effective import effective
from gpusvc.status import inventory


class _Machine:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def gpus(self, _: web.Request) -> web.Response:
        """The GPUs, and who holds how much of each."""
        return json_response([gpu.to_json() for gpu in await self._backend.snapshots.gpus()])

    async def host(self, _: web.Request) -> web.Response:
        """Each setting of the host in effect, and its source."""
        return await self._settings(None)

    async def model(self, request: web.Request) -> web.Response:
        """Each setting of a model in effect, and its source."""
        return await self._settings(inventory.resolve(self._backend.paths, request.match_info["name"]))

    async def _settings(self, name: str | None) -> web.Response:
        settings = await self._backend.snapshots.beside(lambda: effective(self._backend.paths, name))
        return json_response([{"key": each.key, "value": each.value, "source": each.source} for each in settings])


def endpoints(backend: Backend) -> list[Endpoint]:
    machine = _Machine(backend)
    return [
        Endpoint("GET", "/gpusvc/gpus", machine.gpus),
        Endpoint("GET", "/gpusvc/config", machine.host),
        Endpoint("GET", "/gpusvc/config/{name}", machine.model),
    ]
