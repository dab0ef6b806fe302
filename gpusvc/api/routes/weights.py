"""What the files of all models say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from gpusvc import files
from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.responses import json_response
from gpusvc.api.backend.shared import outcome
from gpusvc.api.routes.endpoints import Endpoint
from gpusvc.config.files import HostConfig, load_host, load_sound_model, model_names
from gpusvc.config.model import ModelConfig
from gpusvc.errors import GpusvcError
from gpusvc.files import Stamp
from gpusvc.weights import abilities
from gpusvc.weights.abilities import Abilities


class _Weights:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # Apart from the thread of the snapshots: the first look at many models on a slow disk takes its time.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        # By name; with the command, its environment, and the stamps of the files that it names.
        self._known: dict[str, tuple[object, Abilities | None]] = {}
        self._reading: asyncio.Future[list[dict[str, Any]]] | None = None

    async def list_(self, _: web.Request) -> web.Response:
        """What the files of all models say: size, architecture, quantisation, context, abilities."""
        # One at a time: behind a disk that hangs, requests would queue up.
        reading = self._reading
        if reading is None or reading.done():
            loop = asyncio.get_running_loop()
            reading = self._reading = loop.run_in_executor(self._thread, lambda: list(self._read()))
        return json_response(await outcome(reading))

    def _read(self) -> Iterator[dict[str, Any]]:
        """In the thread: disks may block."""
        paths = self._backend.paths
        try:
            host = load_host(paths)
        except GpusvcError:
            host = HostConfig()
        known, self._known = self._known, {}
        for name in model_names(paths):
            config = load_sound_model(paths, name, host)
            if config is None:
                continue
            key = (config.command, config.env, _stamps(config))
            before = known.get(name)
            found = before[1] if before is not None and before[0] == key else _abilities(config)
            self._known[name] = key, found
            if found is not None:
                yield {"name": name, **found.to_json()}


def _abilities(config: ModelConfig) -> Abilities | None:
    return abilities.of_command(config.command, config.env)


def _stamps(config: ModelConfig) -> list[Stamp | None]:
    return [_stamp(argument.rpartition("=")[2]) for argument in config.command[1:] if "/" in argument]


def _stamp(path: str) -> Stamp | None:
    try:
        return files.stamp(path)
    except (OSError, ValueError):
        return None


def endpoints(backend: Backend) -> list[Endpoint]:
    weights = _Weights(backend)
    return [Endpoint("GET", "/gpusvc/weights", weights.list_)]
