"""Many clients of models that do not fit together: all are answered, and none stands behind those who come later.

How long somebody waited is told by what was loaded for it, and not by a clock.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from gpusvc.journal.events import MESSAGE_IDS, EventType
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

CLIENTS = 500
MODELS = ("ash", "birch", "cedar")
LOAD_SECONDS = 0.5
ARRIVAL_SECONDS = 8.0

# Where both places are just being loaded, whoever wants the third model waits for one of those, to be ready and then to
# be drained; and for his own.
MOST_LOADS = 2

# The event of a load's end is in the journal a moment later, and whoever came in that moment did not wait.
_MOMENT_SECONDS = 0.05

# Clients come one after the other, each for the next model, and each is answered as soon as that is there. For each of
# them a line: its model, the status and the body's end, when it came, when it had its answer.
_CLIENTS = """
import asyncio, json, sys, time

models = sys.argv[3:]
clients, seconds = int(sys.argv[1]), float(sys.argv[2])

async def ask(number):
    await asyncio.sleep(seconds * number / clients)
    name = models[number % len(models)]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": str(number)}]})
    came = time.time()
    reader, writer = await asyncio.open_connection("127.0.0.1", 8484)
    head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close"
    writer.write(f"{head}\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
    answer = await reader.read()
    writer.close()
    text = answer.partition(b"\\r\\n\\r\\n")[2].decode()
    is_right = f'"You said: {number}"' in text and f'"model": "{name}"' in text
    print(json.dumps([name, int(answer.split(b" ")[1]), "" if is_right else text, came, time.time()]), flush=True)

async def main():
    await asyncio.gather(*map(ask, range(clients)))

asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request; times are in seconds since the epoch."""

    model: str
    status: int
    wrong: str
    """What was said instead of the right answer."""
    came: float
    answered: float


@pytest.mark.generations(Generation.TRIXIE)
def test_500_clients_of_three_models_of_which_two_fit_are_answered_within_two_loads(machine: Host) -> None:
    for name in MODELS:
        arguments = f"--vram 10GiB --load-seconds {LOAD_SECONDS}"
        machine.write_model(name, arguments=arguments, gpu='vram = "10GiB"\ndevices = [0]')
    machine.write("/root/clients.py", _CLIENTS)
    command = ("python3", "/root/clients.py", str(CLIENTS), str(ARRIVAL_SECONDS), *MODELS)
    asked = [Asked(*json.loads(line)) for line in machine.run(*command, timeout=120).stdout.splitlines()]

    assert Counter(each.status for each in asked) == {200: CLIENTS}
    assert [each for each in asked if each.wrong] == []
    loads = _loads(machine)
    assert len(loads) >= 2 * len(MODELS), f"there were no swaps: {loads}"
    waits = {each: _waited_for(each, loads) for each in asked}
    assert [(each, waited) for each, waited in waits.items() if len(waited) > MOST_LOADS] == []
    assert {0, 1} <= {len(waited) for waited in waits.values()}, "some had to wait, and some had not"
    assert sorted(machine.gpu_holders(0).values()) == [10 << 30, 10 << 30]


@dataclass(frozen=True, slots=True)
class Load:
    """From when a model got its GPU until it was ready."""

    model: str
    began: float
    ended: float
    victim: str | None
    """Whose place it got."""


def _waited_for(asked: Asked, loads: list[Load]) -> list[Load]:
    """The load of its model, before that the one of the model that had to go for it, and so on; the last one first."""
    row: list[Load] = []
    model: str | None = asked.model
    before = asked.answered
    while model is not None:
        load = max((each for each in loads if each.model == model and each.began < before), key=lambda each: each.began)
        if load.ended < asked.came + _MOMENT_SECONDS:
            break
        row.append(load)
        model, before = load.victim, load.began
    return row


def _loads(machine: Host) -> list[Load]:
    loads = []
    ends = {
        model: [at for at, entry in _events(machine, EventType.READY) if entry["GPUSVC_MODEL"] == model]
        for model in MODELS
    }
    for began, entry in _events(machine, EventType.START):
        victim = re.search(r"after (\w+) made room", entry["MESSAGE"])
        model = entry["GPUSVC_MODEL"]
        loads.append(Load(model, began, ends[model].pop(0), victim and victim[1]))
    return loads


def _events(machine: Host, kind: EventType) -> list[tuple[float, dict[str, Any]]]:
    """In the order in which the journal received them, and when that was."""
    text = machine.journal(None, f"MESSAGE_ID={MESSAGE_IDS[kind]}", "-o", "json")
    entries: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    return [(int(entry["__REALTIME_TIMESTAMP"]) / 1e6, entry) for entry in entries]
