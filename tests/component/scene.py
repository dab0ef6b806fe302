"""A machine as the status page and the metrics show it: the API's real application, over models that do as a test says.

The journal is real files, read through a journalctl(1) of our own; systemd and NVML are values that a test changes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.journal import Events
from gpusvc.api.backend.streams import Streams
from gpusvc.api.routes.application import application
from gpusvc.errors import GpusvcError, PlacementError
from gpusvc.gpu.reading import Gpu, GpuProcess
from gpusvc.journal.events import MESSAGE_IDS, EventType
from gpusvc.paths import Paths
from gpusvc.quantity import GIB
from gpusvc.status.gpus import GpuStatus, Holder
from gpusvc.status.models import HeldGpu, ModelState, ModelStatus
from gpusvc.status.standing import Standing

T = TypeVar("T")

TRAIN = "python3 /home/ada/train.py --epochs 400 --resume-from=/srv/checkpoints/run-2041/last.ckpt"

# Knows the options that are used, and ends with whoever started it.
_JOURNALCTL = """#!{python} -S
import json, os, sys, time
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
name = options.get("unit", "events")
file = open(os.path.join({directory!r}, name), "a+")
file.seek(0)
entries = file.readlines()
cursors = [json.loads(entry)["__CURSOR"] for entry in entries]
if options.get("after-cursor") in cursors:
    entries = entries[cursors.index(options["after-cursor"]) + 1:]
count = int(options.get("lines", len(entries)))
print("".join(entries[len(entries) - count:] if count < len(entries) else entries), end="", flush=True)
while "follow" in options and os.getppid() == {parent}:
    line = file.readline()
    print(line, end="", flush=True)
    if not line:
        time.sleep(0.01)
"""


class Snapshots:
    """What there is now, without asking anybody."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.problem: GpusvcError | None = None

    async def models(self) -> list[ModelStatus]:
        if self.problem is not None:
            raise self.problem
        self._scene.look_at_pins()
        return [self._scene.models[name] for name in sorted(self._scene.models)]

    async def gpus(self) -> list[GpuStatus]:
        if self.problem is not None:
            raise self.problem
        return self._scene.gpus()

    async def beside(self, work: Callable[[], T]) -> T:
        return work()

    def forget(self) -> None:
        pass


class Jobs:
    """What was asked for."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.asked: list[tuple[str, str]] = []
        self.error: GpusvcError | None = None

    def begin(self, name: str) -> None:
        self._ask("start", name)
        self._scene.change(name, state=ModelState.STARTING, text="It loads: 31 % of 9.0 GiB.", since=time.time())

    async def stop(self, name: str) -> bool:
        self._ask("stop", name)
        self._scene.change(name, state=ModelState.STOPPING, text="systemd stops it.", since=time.time())
        return True

    def _ask(self, verb: str, name: str) -> None:
        self.asked.append((verb, name))
        if self.error is not None:
            raise self.error


class Bus:
    """Nobody runs that has no file."""

    def ask(self, question: object) -> list[object]:
        return []


class Scene:
    """Two GPUs, some models, and somebody who trains something. ``url`` ends with a slash."""

    def __init__(self, directory: Path, bin_directory: Path) -> None:
        self.paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "state")
        for made in (self.paths.models_directory, self.paths.pin_file("x").parent, self.paths.runtime / "gateway"):
            made.mkdir(parents=True)
        self._journal = directory / "journal"
        self._journal.mkdir()
        script = bin_directory / "journalctl"
        script.write_text(_JOURNALCTL.format(python=sys.executable, directory=str(self._journal), parent=os.getpid()))
        script.chmod(0o755)
        self._cursors = itertools.count(1)
        self.models: dict[str, ModelStatus] = {}
        self.foreign_bytes: int | None = 3 * GIB
        self.events = Events()
        self.snapshots = Snapshots(self)
        self.jobs = Jobs(self)
        self.streams = Streams()
        self.url = ""

    @property
    def backend(self) -> Backend:
        parts: list[Any] = [self.paths, Bus(), self.snapshots, self.events, self.jobs, self.jobs, self.streams]
        return Backend(*parts)

    def add(
        self,
        name: str,
        *,
        state: ModelState = ModelState.STOPPED,
        gpu: int | None = None,
        vram: int = 0,
        idle: float | None = None,
        text: str = "",
        file: str = "",
    ) -> None:
        """A model; with ``idle`` seconds without use, or None: in use."""
        self.paths.pin_file(name).parent.mkdir(parents=True, exist_ok=True)
        self.paths.model_file(name).write_text(f'command = ["/bin/true"]\n{file}')
        standing = Standing(
            in_use=idle is None and state is ModelState.READY,
            last_use=time.time() - (idle or 0),
            pinned_by_file="pinned = true" in file,
            pinned_by_hand=False,
            priority=0,
            declared_bytes=None,
            learned_bytes=None,
        )
        self.models[name] = ModelStatus(
            name,
            state,
            text,
            gpus=() if gpu is None else (HeldGpu(gpu, f"GPU-{gpu}"),),
            vram_bytes=vram if gpu is not None else 0,
            reserved_bytes=vram if gpu is not None else 0,
            since=time.time() - 65,
            standing=standing,
        )

    def change(self, name: str, **values: Any) -> None:
        self.models[name] = replace(self.models[name], **values)

    def use(self, name: str, *, in_use: bool, idle: float = 0.0) -> None:
        standing = self.models[name].standing
        assert standing is not None
        self.change(name, standing=replace(standing, in_use=in_use, last_use=time.time() - idle))

    def look_at_pins(self) -> None:
        for name, model in self.models.items():
            assert model.standing is not None
            pinned = self.paths.pin_file(name).exists()
            self.change(name, standing=replace(model.standing, pinned_by_hand=pinned))

    def become_ready(self, name: str, *, gpu: int, vram: int) -> None:
        where = (HeldGpu(gpu, f"GPU-{gpu}"),)
        self.change(name, state=ModelState.READY, text="", gpus=where, vram_bytes=vram, reserved_bytes=vram)
        self.use(name, in_use=False)
        self.happen(EventType.READY, f"{name} is ready on GPU {gpu}.", model=name)

    def be_evicted(self, name: str, reason: str) -> None:
        self.happen(EventType.EVICT, f"{name} is evicted: {reason}.", model=name, reason=reason)
        self.change(name, state=ModelState.STOPPED, text="It is not running.", gpus=(), vram_bytes=0, reserved_bytes=0)
        self.happen(EventType.RELEASE, f"{name} gave all of its VRAM back.", model=name)

    def happen(self, kind: EventType, message: str, *, model: str, reason: str | None = None, level: int = 6) -> None:
        fields = {"GPUSVC_EVENT": kind.value, "GPUSVC_MODEL": model, "MESSAGE_ID": MESSAGE_IDS[kind]}
        if reason is not None:
            fields["GPUSVC_REASON"] = reason
        self._write("events", message, level, fields)

    def say(self, name: str, line: str, *, level: int = 6) -> None:
        """A line in a model's log."""
        self._write(f"model@{name}.service", line, level, {"SYSLOG_IDENTIFIER": name})

    def gpus(self) -> list[GpuStatus]:
        return [self._gpu(0, "NVIDIA GeForce RTX 4090", 24), self._gpu(1, "NVIDIA RTX 6000 Ada Generation", 48)]

    def _gpu(self, index: int, name: str, size: int) -> GpuStatus:
        holders = [
            Holder(model.name, 4000 + number, None, model.vram_bytes, model.reserved_bytes)
            for number, model in enumerate(self.models.values())
            if any(gpu.index == index for gpu in model.gpus)
        ]
        if index == 1:
            holders.append(Holder(None, 31337, TRAIN, self.foreign_bytes, None))
        used = sum(holder.vram_bytes or 0 for holder in holders) + GIB // 2
        gpu = Gpu(
            index=index,
            uuid=f"GPU-{index}",
            name=name,
            minor=index,
            pci_bus_id="",
            total_bytes=size * GIB,
            used_bytes=used,
            free_bytes=size * GIB - used,
            processes=tuple(GpuProcess(holder.pid or 0, holder.vram_bytes) for holder in holders),
            utilisation_percent=37 if holders else 0,
        )
        return GpuStatus(gpu, sum(holder.reserved_bytes or 0 for holder in holders), tuple(holders))

    def _write(self, file: str, message: str, level: int, fields: dict[str, str]) -> None:
        entry = {
            "__CURSOR": f"s={next(self._cursors):032x}",
            "__REALTIME_TIMESTAMP": str(time.time_ns() // 1000),
            "PRIORITY": str(level),
            "MESSAGE": message,
            **fields,
        }
        with (self._journal / file).open("a") as journal:
            journal.write(json.dumps(entry) + "\n")


@asynccontextmanager
async def serving(scene: Scene) -> AsyncIterator[Scene]:
    """The scene over HTTP."""
    runner = web.AppRunner(application(scene.backend), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    scene.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    follower = asyncio.create_task(scene.events.run())
    try:
        yield scene
    finally:
        follower.cancel()
        scene.streams.close()
        await asyncio.gather(follower, return_exceptions=True)
        await runner.cleanup()


def furnish(scene: Scene) -> None:
    """One of everything, hostile words among them."""
    scene.add("coder", state=ModelState.READY, gpu=1, vram=21 * GIB, file='description = "Coder 30B, for the editors"')
    scene.add("embed", state=ModelState.READY, gpu=0, vram=GIB, idle=340, file="keep = true")
    scene.add("flux", file='description = "Images, on request"')
    scene.add(
        "qwen", state=ModelState.READY, gpu=0, vram=9 * GIB, idle=170, file='description = "Qwen3 8B, for everybody"'
    )
    scene.add(
        "scribe",
        state=ModelState.FAILED,
        text="The engine ended while it loaded (exit status 1): CUDA error: out of memory",
        file='description = "<script>document.title = \\"owned\\"</script><img src=x onerror=alert(1)>"',
    )
    scene.add("whisper", state=ModelState.STARTING, gpu=0, vram=6 * GIB, text="It loads: 31 % of 6.0 GiB.")
    scene.change("whisper", vram_bytes=2 * GIB)
    scene.happen(EventType.START, "qwen starts on GPU 0.", model="qwen")
    scene.happen(EventType.READY, "qwen is ready on GPU 0.", model="qwen")
    scene.happen(EventType.IDLE, "flux was not used for 15min.", model="flux")
    scene.happen(EventType.EVICT, "flux is evicted: flux was not used for 15min.", model="flux", reason="idle")
    scene.happen(
        EventType.FAIL, "scribe: <script>document.title = 'owned'</script> out of memory", model="scribe", level=3
    )
    scene.happen(EventType.PRESSURE, "GPU 1 has had 0.2 GiB of free VRAM for 10s.", model="coder", level=4)
    scene.say("qwen", "llama_model_loader: loaded meta data with 33 key-value pairs and 399 tensors")
    scene.say("qwen", "<script>document.title = 'owned'</script><b>bold</b>")
    scene.say("qwen", "srv  log_server_r: request: POST /v1/chat/completions 127.0.0.1 200", level=4)


def refusal() -> GpusvcError:
    return PlacementError("No GPU has room for flux: it takes 18.0 GiB.", hint="<b>coder</b> is in use.")
