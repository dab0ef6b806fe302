"""The sockets that systemd gives, as a process gets them, and whom they are for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpusvc.errors import ConfigError
from gpusvc.gateway.process import listening
from tests.component.conftest import ROOT

# Puts what it inherited at the numbers where systemd would put it, and tells what is made of it.
_PROGRAM = """
import os, sys
for target, fd in enumerate(map(int, sys.argv[1:]), start=3):
    os.dup2(fd, target)
environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sys.argv) - 1)}
from gpusvc.errors import ConfigError
from gpusvc.gateway.process import listening
try:
    taken = listening.take(environment)
except ConfigError as error:
    sys.exit(str(error))
print(*map(listening.shown, taken))
print(*(listening.shown(each) for each in listening.reachable(taken)))
print(any(each.get_inheritable() or each.getblocking() for each in taken))
"""


def taken(*sockets: socket.socket) -> list[str]:
    """The lines that a process tells that gets these sockets."""
    # High numbers, so that none is in the way of those that dup2() makes.
    fds = [fcntl_dup(each) for each in sockets]
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *map(str, fds)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=fds,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    finally:
        for fd in fds:
            os.close(fd)
    return (result.stdout or result.stderr).splitlines()


def fcntl_dup(each: socket.socket) -> int:
    import fcntl  # noqa: PLC0415

    return fcntl.fcntl(each.fileno(), fcntl.F_DUPFD_CLOEXEC, 50)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def tcp(stack: ExitStack, address: str, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    try:
        return stack.enter_context(socket.create_server((address, 0), family=family))
    except OSError:
        pytest.skip("no IPv6 here")


def test_several_sockets_of_all_kinds_are_taken(stack: ExitStack, tmp_path: Path) -> None:
    unix = stack.enter_context(socket.socket(socket.AF_UNIX))
    unix.bind(str(tmp_path / "sock"))
    unix.listen()
    four, six = tcp(stack, "127.0.0.1"), tcp(stack, "::1", socket.AF_INET6)
    names = [f"127.0.0.1:{four.getsockname()[1]}", f"[::1]:{six.getsockname()[1]}", str(tmp_path / "sock")]
    assert taken(four, six, unix) == [" ".join(names), "", "False"]


def test_what_others_reach_is_told_apart(stack: ExitStack) -> None:
    everywhere, here = tcp(stack, "0.0.0.0"), tcp(stack, "127.5.5.5")
    everywhere_too = tcp(stack, "::", socket.AF_INET6)
    wanted = f"0.0.0.0:{everywhere.getsockname()[1]} [::]:{everywhere_too.getsockname()[1]}"
    assert taken(everywhere, here, everywhere_too)[1] == wanted


def test_what_does_not_listen_is_refused(stack: ExitStack) -> None:
    datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    unbound = stack.enter_context(socket.socket())
    pipe, end = os.pipe()
    stack.callback(os.close, pipe)
    stack.callback(os.close, end)
    for wrong in (datagrams, unbound):
        assert "is no listening stream socket" in taken(wrong)[0]


def test_no_socket_at_all_is_an_error() -> None:
    assert taken() == ["systemd gave the gateway no socket. gpusvc-gateway.socket should have ListenStream=."]


def test_without_systemd_it_opens_one_for_this_machine_only(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "ADDRESS", ("127.0.0.1", 0))
    for environment in ({}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}):
        [opened] = listening.take(environment)
        stack.enter_context(opened)
        assert listening.reachable([opened]) == []


@pytest.mark.parametrize(
    ("address", "needs_key", "allow_without_keys", "is_refused"),
    [
        ("127.0.0.1", False, False, False),
        ("0.0.0.0", False, False, True),
        ("0.0.0.0", True, False, False),
        ("0.0.0.0", False, True, False),
    ],
)
def test_others_are_let_in_with_keys_or_if_it_was_said_twice(
    stack: ExitStack, address: str, *, needs_key: bool, allow_without_keys: bool, is_refused: bool
) -> None:
    listener = tcp(stack, address)
    if not is_refused:
        listening.guard([listener], needs_key=needs_key, allow_without_keys=allow_without_keys)
        return
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:\d+: there are no API keys") as caught:
        listening.guard([listener], needs_key=needs_key, allow_without_keys=allow_without_keys)
    assert caught.value.hint is not None
    assert "gpusvc key add" in caught.value.hint
    assert caught.value.permanent
