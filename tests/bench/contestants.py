"""Who stands between clients and an engine in ``tests/bench/gateway``: nothing, nginx, HAProxy, LiteLLM, ourselves.

Each of them runs in the foreground with its files in a directory of its own, and ends with its context.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.component.gateways import ServedGateway

HAPROXY, NGINX, LITELLM = "HAProxy, by the body", "nginx, by the path", "LiteLLM"
DIRECT, OURS, OURS_TWICE = "no proxy", "gpusvc, 1 worker", "gpusvc, 2 workers"

CHAT = "/v1/chat/completions"

_BEGIN_SECONDS = 60.0

# Without anything that is written for each request.
_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {directory};
    proxy_temp_path {directory};
    fastcgi_temp_path {directory};
    uwsgi_temp_path {directory};
    scgi_temp_path {directory};
    keepalive_requests 1000000000;
    client_max_body_size 0;
    client_body_buffer_size 64k;
    {content}
}}
"""
_NGINX_PROXY = """
    upstream {model} {{ server 127.0.0.1:{port}; keepalive 256; keepalive_requests 1000000000; }}
"""
_NGINX_LOCATION = """
        location /{model}/ {{
            proxy_pass http://{model}/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
        }}
"""
_HAPROXY = """
global
    nbthread 1
    maxconn 8192
    tune.bufsize 65536
defaults
    mode http
    timeout connect 10s
    timeout client 100s
    timeout server 100s
    option http-buffer-request
    option http-no-delay
    http-reuse always
frontend clients
    bind 127.0.0.1:{port}
    http-request set-var(txn.model) req.body,json_query('$.model')
    use_backend %[var(txn.model)]
"""
_HAPROXY_BACKEND = """
backend {model}
    server engine 127.0.0.1:{port}
"""
_LITELLM_MODEL = """
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "http://127.0.0.1:{port}/v1", api_key: none}}
"""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One that runs."""

    title: str
    url: Callable[[str], str]
    """Where a chat with a model is posted to."""
    pids: Callable[[], list[int]]
    """Of the processes whose work it is."""
    key: str = "none"

    def cpu_seconds(self) -> float:
        """What it has used so far: clock_getcpuclockid(3) of each process."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids())

    def resident_bytes(self) -> int:
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids())
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def all_of(directory: Path, engines: Mapping[str, int], *, litellm: bool) -> Iterator[list[Contestant]]:
    """Those that can run on this machine, in front of the engines.

    Args:
        directory: for their files.
        engines: their ports, by the model's name.
        litellm: LiteLLM, too. It takes a minute of everybody's time.
    """
    makers: list[Callable[[Path, Mapping[str, int]], AbstractContextManager[Contestant]]] = [
        _direct,
        nginx,
        haproxy,
        _one_worker,
        _two_workers,
    ]
    if litellm:
        makers.insert(3, _litellm)
    with contextlib.ExitStack() as stack:
        contestants = []
        for number, maker in enumerate(makers):
            own = directory / str(number)
            own.mkdir()
            contestants.append(stack.enter_context(maker(own, engines)))
        yield contestants


def has_litellm() -> bool:
    return shutil.which("litellm") is not None


@contextmanager
def constant_engine(directory: Path) -> Iterator[int]:
    """``constant.c``, which answers everything at once and costs as little as can be; its port."""
    program = directory / "constant"
    subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_name("constant.c")], check=True)
    port = free_port()
    with _running([str(program), str(port)], port):
        yield port


@contextmanager
def _direct(_directory: Path, engines: Mapping[str, int]) -> Iterator[Contestant]:
    yield Contestant(DIRECT, lambda model: f"http://127.0.0.1:{engines[model]}{CHAT}", list)


@contextmanager
def nginx(directory: Path, engines: Mapping[str, int]) -> Iterator[Contestant]:
    port = free_port()
    pools = "".join(_NGINX_PROXY.format(model=model, port=engine) for model, engine in engines.items())
    locations = "".join(_NGINX_LOCATION.format(model=model) for model in engines)
    content = f"{pools} server {{ listen 127.0.0.1:{port} backlog=4096; {locations} }}"
    (directory / "conf").write_text(_NGINX.format(directory=directory, content=content))
    with _running(["nginx", "-p", str(directory), "-c", str(directory / "conf"), "-e", "stderr"], port) as process:
        workers = _children(process.pid)
        yield Contestant(NGINX, lambda model: f"http://127.0.0.1:{port}/{model}{CHAT}", lambda: workers)


@contextmanager
def haproxy(directory: Path, engines: Mapping[str, int]) -> Iterator[Contestant]:
    port = free_port()
    backends = "".join(_HAPROXY_BACKEND.format(model=model, port=engine) for model, engine in engines.items())
    (directory / "conf").write_text(_HAPROXY.format(port=port) + backends)
    with _running(["haproxy", "-db", "-f", str(directory / "conf")], port) as process:
        yield Contestant(HAPROXY, lambda _: f"http://127.0.0.1:{port}{CHAT}", lambda: [process.pid])


@contextmanager
def _litellm(directory: Path, engines: Mapping[str, int]) -> Iterator[Contestant]:
    port = free_port()
    models = "".join(_LITELLM_MODEL.format(model=model, port=engine) for model, engine in engines.items())
    (directory / "config.yaml").write_text(f"model_list:{models}")
    command = ["litellm", "--config", str(directory / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    with _running(command, port) as process:
        yield Contestant(LITELLM, lambda _: f"http://127.0.0.1:{port}{CHAT}", lambda: _tree(process.pid))


def _one_worker(directory: Path, engines: Mapping[str, int]) -> AbstractContextManager[Contestant]:
    return ours(directory, engines, OURS, workers=1)


def _two_workers(directory: Path, engines: Mapping[str, int]) -> AbstractContextManager[Contestant]:
    return ours(directory, engines, OURS_TWICE, workers=2)


@contextmanager
def ours(directory: Path, engines: Mapping[str, int], title: str, *, workers: int) -> Iterator[Contestant]:
    """With authentication, locks and counters, as ever."""
    gateway = ServedGateway(directory)
    gateway.configure(workers=workers)
    key = gateway.add_key()
    for model, port in engines.items():
        gateway.run_model(model, port)
    with gateway:
        yield Contestant(title, lambda _: gateway.url + CHAT, lambda: gateway.pids, key)


@contextmanager
def _running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        await_port(process, port)
        yield process
    finally:
        process.terminate()
        process.wait(_BEGIN_SECONDS)


def await_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Until somebody listens.

    Raises:
        RuntimeError: the process ended instead.
        TimeoutError: it did not come to that.
    """
    deadline = time.monotonic() + _BEGIN_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r} ended with status {process.returncode}.") from None
            if time.monotonic() > deadline:
                raise TimeoutError(f"{process.args!r} does not listen.") from None
            time.sleep(0.01)
        else:
            return


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _tree(pid: int) -> list[int]:
    return [pid, *(each for child in _children(pid) for each in _tree(child))]
