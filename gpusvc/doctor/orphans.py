"""Processes that hold VRAM and belong to no model: found by name and parents, and ended if their owner wants that.

Which program a process belongs to is a guess from names; that its parent is gone is a fact.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpusvc.doctor.finding import Finding, note, ok, warning
from gpusvc.errors import GpusvcError, UnreleasedError
from gpusvc.gpu.reading import Gpu
from gpusvc.linux import processes
from gpusvc.linux.processes import Portrait, Process
from gpusvc.paths import Paths
from gpusvc.quantity import format_amount
from gpusvc.status import inventory


class _Look(NamedTuple):
    """The name and command line of a server's processes, and the name of the process that manages them."""

    server: str
    process: str
    manager: str
    is_part: bool
    """It never runs alone: without its manager it is useless."""


_LOOKS = (
    _Look("Ollama", r"ollama[_ -](llama[_-]server|runner)|ollama runner|/ollama/\S*(llama|runner)", "ollama", True),
    _Look("vLLM", r"VLLM::", "vllm|python|VLLM::APIServer", True),
    _Look("SGLang", r"sglang::", "sglang|python", True),
    _Look(
        "LocalAI",
        r"local-?ai\S*/backend|/backends?(_data|-assets)?/\S*(llama|whisper|vllm|diffusers)",
        "local-?ai",
        True,
    ),
    _Look("Triton", r"triton_python_backend", "tritonserver", True),
    _Look("vLLM", r"\bvllm\b", "vllm", False),
    _Look("SGLang", r"\bsglang\b", "sglang", False),
    _Look("llama-server", r"llama[-_]server|llama[-_]cpp", "llama-(swap|server)", False),
    _Look("ComfyUI", r"comfyui", "comfy", False),
    _Look("Whisper", r"whisper", "whisper", False),
)

# An orphan is handed to PID 1, or to the manager of its user's session.
_ADOPTERS = {"systemd", "init", "tini", "dumb-init", "catatonit"}

_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Foreigner:
    """A process that holds VRAM and belongs to no model. ``used_bytes`` is per GPU index; None: NVML does not say."""

    portrait: Portrait
    used_bytes: dict[int, int | None]
    server: str | None
    """The program that it seems to belong to."""
    manager: str | None
    """The ancestor that manages it, as "name (PID)"; None: there is none any more."""

    @property
    def is_orphan(self) -> bool:
        """Whether the process belongs to a server whose manager is gone."""
        return self.server is not None and self.manager is None

    @property
    def pid(self) -> int:
        return self.portrait.process.pid

    def __str__(self) -> str:
        what = f"{self.portrait.name} (PID {self.pid}, of {self.portrait.user})"
        return f"{what} holds {_amounts(self.used_bytes)}"

    @property
    def evidence(self) -> str:
        line = " ← ".join(f"{name} ({pid})" for pid, name in self.portrait.ancestors) or "no parent"
        command = self.portrait.command if len(self.portrait.command) < 200 else self.portrait.command[:199] + "…"
        return f"{command}; its parents: {line}"


def recognise(portrait: Portrait) -> tuple[str | None, str | None]:
    """Return the server that a process seems to belong to, and its manager, as in Foreigner."""
    text = f"{portrait.name} {portrait.command}"
    look = next((look for look in _LOOKS if re.search(look.process, text, re.IGNORECASE)), None)
    if look is None:
        return None, _parent(portrait)
    for pid, name in portrait.ancestors:
        if name not in _ADOPTERS and re.match(look.manager, name, re.IGNORECASE):
            return look.server, f"{name} ({pid})"
    was_handed_over = not portrait.ancestors or portrait.ancestors[0][1] in _ADOPTERS
    # What a service or a shell started is a server of its own; the main process of a service leads its session.
    if was_handed_over and (look.is_part or not portrait.leads_session):
        return look.server, None
    return look.server, _parent(portrait)


def _parent(portrait: Portrait) -> str | None:
    return next((f"{name} ({pid})" for pid, name in portrait.ancestors), None)


def foreigners(paths: Paths, gpus: Sequence[Gpu]) -> list[Foreigner]:
    """Return all processes that hold VRAM and belong to no model, the largest first."""
    held: dict[int, dict[int, int | None]] = {}
    for status in inventory.gpus(paths, gpus):
        for holder in status.holders:
            if holder.model is None and holder.pid is not None:
                held.setdefault(holder.pid, {})[status.gpu.index] = holder.vram_bytes
    found = []
    for pid, used in held.items():
        portrait = processes.portrait(pid)
        if portrait is not None:
            server, manager = recognise(portrait)
            found.append(Foreigner(portrait, used, server, manager))
    return sorted(found, key=lambda each: -sum(used or 0 for used in each.used_bytes.values()))


def findings(paths: Paths, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    found = foreigners(paths, gpus)
    for foreigner in found:
        if foreigner.is_orphan:
            sentence = f"{foreigner}, and seems to be left over from {foreigner.server}."
            fix = "`gpusvc doctor --orphans` offers to end it."
            yield warning("vram", sentence, foreigner.evidence, fix)
        else:
            of = f", a part of {foreigner.server}" if foreigner.server else ""
            yield note("vram", f"{foreigner}{of}; gpusvc counts it and leaves it alone.", foreigner.evidence)
    if gpus and not found:
        yield ok("vram", "All VRAM that is held by processes belongs to models.")


def end(
    foreigner: Foreigner,
    snapshot: Callable[[], Sequence[Gpu]],
    *,
    signal_process: Callable[[Process, signal.Signals], None],
    timeout_seconds: float,
) -> str:
    """End the process: SIGTERM first, SIGKILL after a third of the time. Return a sentence on the VRAM that came back.

    Raises:
        UnreleasedError: NVML still lists it when the time is up.
        GpusvcError: it may not be signalled.
    """
    before = {gpu.index: gpu.used_bytes for gpu in snapshot()}
    began = time.monotonic()
    signal_process(foreigner.portrait.process, signal.SIGTERM)
    killed = False
    while True:
        gpus = snapshot()
        is_alive = processes.identify(foreigner.pid) == foreigner.portrait.process
        listed = [gpu.index for gpu in gpus if foreigner.pid in {each.pid for each in gpu.processes or ()}]
        unknown = [gpu.index for gpu in gpus if gpu.index in foreigner.used_bytes and gpu.processes is None]
        if not is_alive and not listed and not unknown:
            break
        elapsed = time.monotonic() - began
        if elapsed > timeout_seconds:
            state = "is still alive" if is_alive else "is gone, but NVML lists it"
            raise UnreleasedError(
                f"{foreigner.portrait.name} (PID {foreigner.pid}) {state}.",
                hint=f"/proc/{foreigner.pid}/stack shows where it hangs in the kernel." if is_alive else None,
            )
        if not killed and elapsed > timeout_seconds / 3:
            killed = True
            signal_process(foreigner.portrait.process, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)
    after = {gpu.index: gpu.used_bytes for gpu in gpus}
    back = {index: _difference(before.get(index), after.get(index)) for index in foreigner.used_bytes}
    return f"{foreigner.portrait.name} (PID {foreigner.pid}) is gone: {_amounts(back)} came back."


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, before - after)


def _amounts(used: dict[int, int | None]) -> str:
    return " and ".join(f"{format_amount(size)} of GPU {index}" for index, size in sorted(used.items()))


def send(process: Process, number: signal.Signals) -> None:
    """Send a signal to exactly this process. A process that has ended already is no error.

    Raises:
        GpusvcError: that is not permitted.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if processes.identify(process.pid) == process:
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise GpusvcError(f"You may not end PID {process.pid}.", hint="Try again as root, or with sudo.") from None
    finally:
        os.close(pidfd)
