"""Whether an engine serves, among real processes and sockets."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpusvc.errors import ConfigError, EngineError
from gpusvc.launcher import readiness
from gpusvc.launcher.loading import Load
from gpusvc.linux import cgroup
from gpusvc.linux.cgroup import Cgroup
from gpusvc.linux.sockets import Listener
from gpusvc.linux.users import User

# Any user may run it, whatever Python the tests run on.
PYTHON = "/usr/bin/python3"
AM_ROOT = os.geteuid() == 0
USER = User.named("nobody" if AM_ROOT else pwd.getpwuid(os.geteuid()).pw_name)
GROUP = Cgroup("/model")

# Listens on an address and answers every request with the same bytes; says on which port, and then what it was asked.
_SERVER = """
import json, socket, sys, threading
address, port, answer, reuse, drip = json.loads(sys.argv[1])
server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if ":" in address:
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
if reuse:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.bind((address, port))
server.listen()
print(server.getsockname()[1], flush=True)
never = threading.Event()
kept = []
while True:
    connection, _ = server.accept()
    kept.append(connection)
    try:
        print(json.dumps(connection.recv(65536).decode()), flush=True)
        if answer is None:
            continue
        for byte in answer.encode("latin-1") if drip else ():
            connection.sendall(bytes([byte]))
            never.wait(0.05)
        if not drip:
            connection.sendall(answer.encode("latin-1"))
    except OSError:
        pass
    kept.pop().close()
"""

# Does what a busy engine does: opens and closes files without end, beside a socket that listens.
_BUSY = """
import os, socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    for fd in [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]:
        os.close(fd)
"""

OK = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Program:
    """A running program that listens; ``port`` is where."""

    def __init__(self, script: str, *arguments: str, user: int, group: int) -> None:
        command = [PYTHON, "-I", "-c", script, *arguments]
        if AM_ROOT:
            command = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *command]
        self.process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True)
        self.port = int(self.hear())

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Serve = Callable[..., Program]


@pytest.fixture
def run() -> Iterator[Callable[..., Program]]:
    with ExitStack() as stack:

        def start(script: str, *arguments: str, user: int = USER.uid) -> Program:
            program = Program(script, *arguments, user=user, group=USER.gid)
            stack.callback(program.close)
            return program

        yield start


@pytest.fixture
def serve(run: Callable[..., Program]) -> Serve:
    def start(
        address: str = "127.0.0.1",
        *,
        port: int = 0,
        answer: str | None = OK,
        reuse: bool = False,
        drip: bool = False,
        user: int = USER.uid,
    ) -> Program:
        if ":" in address and not has_ipv6():
            pytest.skip("this machine has no IPv6")
        return run(_SERVER, json.dumps([address, port, answer, reuse, drip]), user=user)

    return start


@pytest.fixture
def engine_is(public: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which processes are in the model's control group, as cgroupfs would."""
    monkeypatch.setattr(cgroup, "ROOT", public)

    def put(*programs: Program) -> None:
        group = public / "model"
        group.mkdir(exist_ok=True)
        (group / "cgroup.procs").write_text("".join(f"{program.pid}\n" for program in programs))

    return put


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def at(program: Program, address: str = "127.0.0.1") -> Listener:
    return Listener(address, program.port, 0, 0)


# ---- an engine that listens elsewhere ----


class FakeRun:
    """What a load reads of a run."""

    class config:  # noqa: N801
        command: tuple[str, ...] = ("serve",)
        health = "/health"

    class lease:  # noqa: N801
        port = 1

    user = USER


def test_the_engines_sockets_on_other_ports_are_found_and_no_strangers(
    serve: Serve, engine_is: Callable[..., None]
) -> None:
    engine, stranger = serve(), serve()
    engine_is(engine)
    found = readiness.elsewhere(GROUP, 1, USER)
    assert [each.port for each in found] == [engine.port]
    assert readiness.elsewhere(GROUP, engine.port, USER) == []
    assert stranger.port not in [each.port for each in found]


def test_an_engine_that_answers_on_another_port_for_a_minute_is_given_up_with_the_remedy(
    serve: Serve, engine_is: Callable[..., None]
) -> None:
    engine = serve(answer="HTTP/1.1 404 Not Found\r\n\r\n")
    engine_is(engine)
    load = Load(FakeRun, GROUP, 0)  # type: ignore[arg-type]
    load._look_elsewhere(None, 0)
    load._look_elsewhere(None, 59)
    with pytest.raises(ConfigError, match=f"The engine listens on port {engine.port}, not on port 1") as caught:
        load._look_elsewhere(None, 61)
    assert f"set `port = {engine.port}`" in (caught.value.hint or "")


def test_a_socket_that_speaks_no_http_gives_no_engine_up(serve: Serve, engine_is: Callable[..., None]) -> None:
    engine = serve(answer="hello\r\n")
    engine_is(engine)
    load = Load(FakeRun, GROUP, 0)  # type: ignore[arg-type]
    for now in (0, 61, 200):
        load._look_elsewhere(None, now)


def test_an_engine_that_is_told_its_port_may_listen_elsewhere_too(serve: Serve, engine_is: Callable[..., None]) -> None:
    class Told(FakeRun):
        class config(FakeRun.config):  # noqa: N801
            command = ("serve", "--port={port}")

    engine = serve()
    engine_is(engine)
    load = Load(Told, GROUP, 0)  # type: ignore[arg-type]
    for now in (0, 61, 200):
        load._look_elsewhere(None, now)


# ---- whose socket it is ----


def test_the_engines_own_socket_is_found(serve: Serve, engine_is: Callable[..., None]) -> None:
    engine = serve()
    engine_is(engine)
    found = readiness.listener(GROUP, engine.port, USER)
    assert found is not None
    assert (found.reachable_at, found.port, found.uid) == ("127.0.0.1", engine.port, USER.uid)


@pytest.mark.parametrize(
    ("address", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::1", "::1"), ("127.0.0.9", "127.0.0.9")]
)
def test_it_is_reached_where_it_listens(
    serve: Serve, engine_is: Callable[..., None], address: str, reached: str
) -> None:
    engine = serve(address)
    engine_is(engine)
    found = readiness.listener(GROUP, engine.port, USER)
    assert found is not None
    assert found.reachable_at == reached
    assert readiness.answers(found, "/health", 5)


def test_its_health_is_asked_for_with_its_key() -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert readiness.answers(Listener("127.0.0.1", server.getsockname()[1], 1, 0), "/health", 5, key="secret")
        thread.join()
    assert b"\r\nAuthorization: Bearer secret\r\n\r\n" in asked[0]


def test_one_that_listens_twice_is_reached_on_ipv4(serve: Serve, engine_is: Callable[..., None]) -> None:
    six = serve("::1")
    four = serve(port=six.port)
    engine_is(six, four)
    found = readiness.listener(GROUP, six.port, USER)
    assert found is not None
    assert found.reachable_at == "127.0.0.1"


def test_nobody_listens_yet(serve: Serve, engine_is: Callable[..., None]) -> None:
    engine = serve()
    engine_is(engine)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert readiness.listener(GROUP, unused.getsockname()[1], USER) is None


def test_a_stranger_on_the_port_does_not_make_it_ready(serve: Serve, engine_is: Callable[..., None]) -> None:
    engine, stranger = serve(), serve()
    engine_is(engine)
    with pytest.raises(EngineError) as caught:
        readiness.listener(GROUP, stranger.port, USER)
    assert f"Port {stranger.port} is taken by another program: PID {stranger.pid} ({PYTHON} -I" in caught.value.message
    assert caught.value.message.endswith(f" of {USER.name}.")


@pytest.mark.skipif(not AM_ROOT, reason="only root may become somebody else")
def test_a_stranger_whom_no_name_is_known_for_is_told_by_number(serve: Serve, engine_is: Callable[..., None]) -> None:
    stranger = serve(user=54321)
    engine_is()
    with pytest.raises(EngineError, match="one of the unknown user 54321"):
        readiness.listener(GROUP, stranger.port, USER)


def test_a_twin_on_the_same_port_takes_half_of_the_requests(serve: Serve, engine_is: Callable[..., None]) -> None:
    engine = serve(reuse=True)
    twin = serve(port=engine.port, reuse=True)
    engine_is(engine)
    with pytest.raises(EngineError, match=f"PID {twin.pid} "):
        readiness.listener(GROUP, engine.port, USER)


def test_a_stranger_at_the_address_that_a_wildcard_is_reached_at_gets_its_requests(
    serve: Serve, engine_is: Callable[..., None]
) -> None:
    engine = serve("0.0.0.0", reuse=True)
    stranger = serve(port=engine.port, reuse=True)
    engine_is(engine)
    with pytest.raises(EngineError, match=f"PID {stranger.pid} "):
        readiness.listener(GROUP, engine.port, USER)


def test_a_stranger_at_a_wildcard_gets_the_requests_once_the_engine_closes_its_socket(
    serve: Serve, engine_is: Callable[..., None]
) -> None:
    engine = serve(reuse=True)
    stranger = serve("0.0.0.0", port=engine.port, reuse=True)
    engine_is(engine)
    with pytest.raises(EngineError, match=f"PID {stranger.pid} "):
        readiness.listener(GROUP, engine.port, USER)


def test_a_stranger_that_takes_ipv6_alone_gets_no_request_to_ipv4(serve: Serve, engine_is: Callable[..., None]) -> None:
    engine = serve()
    serve("::", port=engine.port)  # as IPV6_V6ONLY
    engine_is(engine)
    assert readiness.listener(GROUP, engine.port, USER) is not None


def test_several_processes_of_the_engine_share_a_port(serve: Serve, engine_is: Callable[..., None]) -> None:
    engine = serve(reuse=True)
    worker = serve(port=engine.port, reuse=True)
    engine_is(engine, worker)
    assert readiness.listener(GROUP, engine.port, USER) is not None


def test_a_stranger_at_another_address_is_none_of_its_business(serve: Serve, engine_is: Callable[..., None]) -> None:
    stranger = serve("127.0.0.2")
    engine = serve(port=stranger.port)
    engine_is(engine)
    found = readiness.listener(GROUP, engine.port, USER)
    assert found is not None
    assert found.reachable_at == "127.0.0.1"


def test_a_busy_engine_is_never_taken_for_a_stranger(
    run: Callable[..., Program], engine_is: Callable[..., None]
) -> None:
    engine = run(_BUSY)
    engine_is(engine)
    assert all(readiness.listener(GROUP, engine.port, USER) is not None for _ in range(100))


def test_whoever_asks_is_himself_again_afterwards(serve: Serve, engine_is: Callable[..., None]) -> None:
    before = os.getresuid(), os.getresgid()
    engine_is()
    with pytest.raises(EngineError):
        readiness.listener(GROUP, serve().port, USER)
    assert (os.getresuid(), os.getresgid()) == before


# ---- whether it answers ----


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        "HTTP/1.0 200 OK\r\n\r\n",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 307 Temporary Redirect\r\nLocation: /\r\n\r\n",
        "HTTP/1.1 200\r\n\r\n",
        OK + "x" * 50_000,
    ],
    ids=lambda answer: answer[:14].strip(),
)
def test_these_are_answers(serve: Serve, answer: str) -> None:
    assert readiness.answers(at(serve(answer=answer)), "/health", 5)


@pytest.mark.parametrize(
    "answer",
    [
        "HTTP/1.1 503 Service Unavailable\r\n\r\n",
        "HTTP/1.1 404 Not Found\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 2\r\n\r\n",
        "HTTP/1.1 OK\r\n\r\n",
        "HTTP/1.1",
        "",
        "\r\n",
        "200 OK\r\n\r\n",
        "\x00\xff\xfe garbage \r\n",
        "SSH-2.0-OpenSSH_9.2p1\r\n",
        "x" * 100_000,
    ],
    ids=lambda answer: repr(answer[:14]),
)
def test_these_are_none(serve: Serve, answer: str) -> None:
    assert not readiness.answers(at(serve(answer=answer)), "/health", 5)


def test_the_request_is_one_that_every_server_understands(serve: Serve) -> None:
    engine = serve()
    assert readiness.answers(at(engine), "/v1/health?full=1", 5)
    lines = json.loads(engine.hear()).split("\r\n")
    assert lines[0] == "GET /v1/health?full=1 HTTP/1.1"
    assert f"Host: 127.0.0.1:{engine.port}" in lines
    assert "Connection: close" in lines
    assert lines[-2:] == ["", ""]


def test_an_engine_that_hangs_does_not_answer_and_holds_nobody_up(serve: Serve) -> None:
    began = time.monotonic()
    assert not readiness.answers(at(serve(answer=None)), "/health", 0.2)
    assert time.monotonic() - began < 5


def test_one_that_drips_does_not_hold_anybody_up_either(serve: Serve) -> None:
    engine = serve(answer="HTTP/1.1 200 OK and so on and on" * 100, drip=True)
    began = time.monotonic()
    assert not readiness.answers(at(engine), "/health", 0.2)
    assert time.monotonic() - began < 5


def test_a_status_line_in_pieces_is_one(serve: Serve) -> None:
    assert readiness.answers(at(serve(answer="HTTP/1.1 200 OK\r\n", drip=True)), "/health", 10)


def test_without_a_path_an_open_port_is_enough(serve: Serve) -> None:
    assert readiness.answers(at(serve(answer=None)), "", 5)


def test_a_port_that_nobody_listens_on_does_not_answer(serve: Serve) -> None:
    engine = serve()
    engine.process.kill()
    engine.process.wait()
    assert not readiness.answers(at(engine), "", 5)
    assert not readiness.answers(at(engine), "/health", 5)


def test_a_port_whose_queue_is_full_does_not_answer() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        began = time.monotonic()
        assert not readiness.answers(Listener("127.0.0.1", server.getsockname()[1], 0, 0), "/health", 0.3)
        assert time.monotonic() - began < 5
