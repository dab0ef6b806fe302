"""The steps of a campaign, out of a seed: the same seed, the same steps. What comes of them is the machine's to say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SETTLE_EVERY = 60
"""Steps between two times at which all faults end, and the machine has to become as new."""

WHO = ("launcher", "engine", "child", "proof", "watchdog", "gateway", "api", "everything")

DRIVER = ("slow", "init-error", "list-error", "lost", "lose", "late", "never", "ghost", "no-bytes", "grown")


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done. ``model``, ``what`` and ``seconds`` are its arguments, as far as it has any."""

    kind: str
    model: str = ""
    what: str = ""
    seconds: float = 0.0
    lasts: int = 0
    """A fault ends after so many more steps."""
    pause: float = 0.0
    """How long the machine is left alone after it."""


def make(
    seed: int, count: int, models: Sequence[str], *, heavy: bool = True, settle_every: int = SETTLE_EVERY
) -> list[Step]:
    """``count`` operations, and the settling in between. ``heavy``: with reboots and reinstallations, seconds each."""
    chance = random.Random(seed)
    kinds = [kind for kind in _KINDS if heavy or kind not in HEAVY]
    weights = [_KINDS[kind][0] for kind in kinds]
    steps: list[Step] = []
    for number in range(1, count + 1):
        kind = chance.choices(kinds, weights)[0]
        pause = chance.choice((0.0, 0.0, 0.01, 0.03, 0.1, 0.2)) * chance.random()
        steps.append(_KINDS[kind][1](chance, kind, chance.choice(models), round(pause, 4)))
        if number % settle_every == 0 or number == count:
            steps.append(Step("settle"))
    return steps


HEAVY = ("reboot", "power-cut", "reinstall")


def _plain(chance: random.Random, kind: str, model: str, pause: float) -> Step:
    return Step(kind, model, pause=pause)


def _timed(longest: float) -> Callable[[random.Random, str, str, float], Step]:
    def make(chance: random.Random, kind: str, model: str, pause: float) -> Step:
        return Step(kind, model, seconds=round(chance.random() ** 2 * longest, 3), pause=pause)

    return make


def _one_of(*words: str, longest: int = 0) -> Callable[[random.Random, str, str, float], Step]:
    def make(chance: random.Random, kind: str, model: str, pause: float) -> Step:
        lasts = chance.randint(1, longest) if longest else 0
        return Step(kind, model, chance.choice(words), lasts=lasts, pause=pause)

    return make


# What there is, how often, and with which arguments.
_KINDS: dict[str, tuple[float, Callable[[random.Random, str, str, float], Step]]] = {
    # Use
    "request": (26, _timed(1.0)),
    "hold": (8, _timed(3.0)),
    "crowd": (2, _timed(0.5)),
    "swap": (1.5, _timed(0.3)),
    "insist": (3, _timed(1.5)),
    "socket": (4, _timed(24.0)),
    "probe": (6, _one_of("health", "metrics", "props", "slots", "v1/models", "ask?autoload=false")),
    # Words of operators
    "start": (5, _plain),
    "stop": (4, _plain),
    "restart": (2, _plain),
    "evict": (4, _one_of("", "", "force")),
    "unload": (1, _plain),
    "pin": (2, _one_of("pin", "unpin", "unpin")),
    "release": (1, _plain),
    "edit": (5, _one_of("priority", "idle", "description", "broken", "gone", "back", "back")),
    "policy": (1.5, _one_of("max_active = 0", "max_active = 2", "max_active = 3", "reserve")),
    "reload": (2, _one_of("gpusvc-watchdog.service", "gpusvc-gateway.service")),
    # Faults of processes
    "kill": (12, _one_of(*WHO, *WHO[:2])),
    "freeze": (4, _one_of("launcher", "engine", "watchdog", "gateway", "api", "proof", longest=8)),
    "wedge": (2, _plain),
    "descriptors": (2, _one_of("launcher", "watchdog", "gateway", "api", longest=8)),
    "processes": (1, _one_of("1", "4", "12", longest=5)),
    # Faults of the driver
    "driver": (
        7,
        _one_of(*DRIVER, longest=60),
    ),
    # Faults of the machine
    "full": (2, _one_of("run", "var", longest=6)),
    "touch": (1, _one_of("future", "past")),
    "systemd": (2, _one_of("daemon-reload", "daemon-reload", "daemon-reexec")),
    "service": (1, _one_of("dbus.service", "systemd-journald.service", "polkit.service")),
    "reinstall": (0.3, _plain),
    "reboot": (0.15, _plain),
    "power-cut": (0.15, _plain),
}

KINDS = tuple(_KINDS)


def write(file: Path, steps: Sequence[Step], **about: object) -> None:
    """Steps to do again, one a line."""
    lines = [json.dumps(about), *(json.dumps(asdict(step)) for step in steps)]
    file.write_text("\n".join(lines) + "\n")


def read(file: Path) -> tuple[dict[str, str], list[Step]]:
    about, *steps = map(json.loads, file.read_text().splitlines())
    return about, [Step(**step) for step in steps]
