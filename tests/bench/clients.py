"""The clients of ``tests/bench/waiting``, run inside the machine; each response is a line ``[model, status, seconds]``.

All clients begin at once, and each asks again as soon as it has its response. Standard library only: it is copied into
the machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

GATEWAY_PORT = 8484
DEADLINE_SECONDS = 600.0

# What an answer takes once the model has the request.
ANSWER_SECONDS = 0.05


def main() -> None:
    clients, requests, seed = map(int, sys.argv[1:4])
    models = sys.argv[4:]
    asyncio.run(crowd(clients, requests, random.Random(seed), models))


async def crowd(clients: int, requests: int, chance: random.Random, models: list[str]) -> None:
    plans = [[chance.choice(models) for _ in range(requests)] for _ in range(clients)]
    # A swap with nobody else about: each of these needs the room of the one before last.
    for model in (*models[:2], *models):
        say("alone", *await ask(model))
    await asyncio.gather(*(client(plan) for plan in plans))


async def client(plan: list[str]) -> None:
    for model in plan:
        say(model, *await ask(model))


async def ask(model: str) -> tuple[int, float]:
    """Return the status of the response (0: there was none), and how long it took."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await post(model), time.monotonic() - began
    except (OSError, EOFError, TimeoutError, ValueError):
        return 0, time.monotonic() - began


async def post(model: str) -> int:
    message = {"role": "user", "content": "Well?"}
    body = json.dumps({"model": model, "messages": [message], "seconds": ANSWER_SECONDS}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", GATEWAY_PORT)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        return int((await reader.read()).split(maxsplit=2)[1])
    finally:
        writer.transport.abort()


def say(model: str, status: int, seconds: float) -> None:
    print(json.dumps([model, status, seconds]), flush=True)


if __name__ == "__main__":
    main()
