"""What each part of the gateway's way costs, in one process and without a network: the interpreter's work alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from gpusvc.config import keys
from gpusvc.config.host import HostGateway
from gpusvc.gateway.activation.activation import Activation
from gpusvc.gateway.body import whole as bodies
from gpusvc.gateway.entry import routes
from gpusvc.gateway.entry.catalog import Catalog
from gpusvc.gateway.entry.origin import Guard
from gpusvc.gateway.http import request_head, response_head
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.process.gateway import Gateway
from gpusvc.gateway.relay.shared import Shared
from gpusvc.gateway.relay.upstream import Upstream
from gpusvc.state.counters import Counters, directory, file_of
from tests.component.gateways import ServedGateway

_REPEATS, _TIMES = 9, 2000
_PORT = 1
_PATH = b"/v1/chat/completions"

_CHAT = b'{"model": "qwen", "messages": [{"role": "user", "content": "Well? And how is the weather?"}]}'
_REQUEST = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:8484\r\nUser-Agent: OpenAI/Python 3.52.0\r\nAccept: application/json\r\nAuthorization: Bearer %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"  # noqa: E501
_ANSWER_HEAD = b"HTTP/1.1 200 OK\r\nServer: engine\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_ANSWER = b'{"choices":[{"message":{"role":"assistant","content":"Fine."}}],"usage":{"prompt_tokens":9,"completion_tokens":2}}'  # noqa: E501
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'  # noqa: E501
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)


class _Wire(asyncio.Transport):
    """Takes all that is written, and knows nobody."""

    def write(self, data: object) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", _PORT) if name == "peername" else default

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def abort(self) -> None:
        pass


def measure(directory_of_files: Path) -> list[tuple[str, float]]:
    """What, and its seconds: first of whole requests and events, then of parts of a request."""
    return uvloop.run(_measure(directory_of_files))


async def _measure(root: Path) -> list[tuple[str, float]]:
    loop = asyncio.get_running_loop()
    served = ServedGateway(root)
    secret = served.add_key()
    served.run_model("qwen", _PORT)
    paths, settings = served.paths, HostGateway()
    known = keys.Keys.read([keys.file_of(paths)])
    catalog, counters = Catalog(paths), Counters(file_of(directory(paths), 0))
    activation = Activation(loop, paths, root / "api.sock", lambda: settings)
    gateway = Gateway(
        Shared(
            loop,
            settings=lambda: settings,
            keys=known,
            catalog=catalog,
            activation=activation,
            counters=counters,
            api=root / "api.sock",
        )
    )
    try:
        whole = list(_whole(gateway, secret.encode()))
        return [*whole, *_parts(known, secret.encode(), catalog, activation, counters)]
    finally:
        gateway.close()
        activation.close()
        counters.close()
        served.close()


def _whole(gateway: Gateway, secret: bytes) -> Iterator[tuple[str, float]]:
    pool = gateway._shared.pool
    client, engine = gateway.protocol(), Upstream(pool, ("127.0.0.1", _PORT))
    client.connection_made(_Wire())
    engine.connection_made(_Wire())
    pool.give(engine)
    request = _REQUEST % (_PATH, secret, len(_CHAT)) + _CHAT
    answer = _ANSWER_HEAD % len(_ANSWER) + _ANSWER

    def relay() -> None:
        client.data_received(request)
        engine.data_received(answer)

    yield "a request and its answer", _cost(relay)
    client.data_received(request)
    engine.data_received(_STREAM)
    yield "an event of a stream", _cost(lambda: engine.data_received(_CHUNK))


def _parts(
    known: keys.Keys, secret: bytes, catalog: Catalog, activation: Activation, counters: Counters
) -> Iterator[tuple[str, float]]:
    limits, guard, authorization = Limits(), Guard(HostGateway(), keyed=True), b"Bearer " + secret
    asked = _REQUEST % (_PATH, secret, len(_CHAT))
    answer_head = _ANSWER_HEAD % len(_ANSWER)
    of_model = counters.of("qwen")
    qwen = catalog.resolve("qwen")

    def enter() -> None:
        passage = activation.try_enter(qwen)
        assert passage is not None
        passage.touch()
        passage.close()

    def count() -> None:
        of_model.began()
        of_model.first_byte(0.01)
        of_model.ended(200, 0.01)
        of_model.received(100)
        of_model.sent(100)
        of_model.tokens(9, 2)

    yield "  the request's head", _cost(lambda: request_head.read_request(asked, limits))
    yield "  its origin", _cost(lambda: guard.judge(b"POST", _PATH, host=b"127.0.0.1:8484"))
    yield "  its path", _cost(lambda: routes.route(b"POST", _PATH))
    yield "  its key", _cost(lambda: known.authenticate(authorization, None))
    yield "  the model's name in its body", _cost(lambda: bodies.find_model(b"application/json", _CHAT))
    yield "  the model of that name", _cost(lambda: catalog.resolve("qwen"))
    yield "  into the model and out: locks, lease, marks", _cost(enter)
    yield "  the answer's head", _cost(lambda: response_head.read_response(answer_head, limits))
    yield "  counters", _cost(count)


def _cost(step: Callable[[], object]) -> float:
    """Of one time, in seconds of CPU."""
    costs = []
    for _ in range(_REPEATS):
        began = time.process_time()
        for _ in range(_TIMES):
            step()
        costs.append((time.process_time() - began) / _TIMES)
    return median(costs)
