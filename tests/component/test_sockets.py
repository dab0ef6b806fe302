"""What the kernel says of listening sockets, by both of its ways."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gpusvc.linux import sockets
from gpusvc.linux.sockets import Listener

# What is bound, and under which address this machine reaches it.
ADDRESSES = {
    "127.0.0.1": "127.0.0.1",
    "127.0.0.7": "127.0.0.7",
    "0.0.0.0": "127.0.0.1",
    "::1": "::1",
    "::": "::1",
    "::ffff:127.0.0.1": "127.0.0.1",
}


@pytest.fixture
def bound() -> Iterator[dict[str, Listener]]:
    """A socket that listens on each address, and what is to be said of it."""
    found = {}
    with ExitStack() as stack:
        for address in ADDRESSES:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                server = stack.enter_context(socket.socket(family))
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                server.bind((address, 0))
                server.listen()
            except OSError as error:
                if family == socket.AF_INET or error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
                    raise
                continue  # no IPv6 here
            inode = os.fstat(server.fileno()).st_ino
            shown = address.removeprefix("::ffff:")
            found[address] = Listener(shown, server.getsockname()[1], inode, os.getuid())
        yield found


def test_every_listener_is_found_with_its_address_port_inode_and_user(bound: dict[str, Listener]) -> None:
    assert set(bound.values()) <= set(sockets.listeners())


@pytest.mark.parametrize("only", [True, False])
def test_a_wildcard_socket_for_ipv6_alone_is_told_apart(*, only: bool) -> None:
    try:
        server = socket.socket(socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only))
        server.bind(("::", 0))
        server.listen()
        inode = os.fstat(server.fileno()).st_ino
        assert [found.only_ipv6 for found in sockets.listeners() if found.inode == inode] == [only]


def test_the_tables_of_proc_say_the_same_where_sock_diag_is_missing(
    bound: dict[str, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(family: int) -> Iterator[Listener]:
        raise FileNotFoundError(errno.ENOENT, "no tcp_diag")

    monkeypatch.setattr(sockets, "_ask", refuse)
    assert set(bound.values()) <= set(sockets.listeners())


def test_a_socket_that_does_not_listen_is_none() -> None:
    with socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        port = idle.getsockname()[1]
        assert port not in {found.port for found in sockets.listeners()}


def test_each_is_reachable_at_an_address_of_this_machine(bound: dict[str, Listener]) -> None:
    for address, listener in bound.items():
        assert listener.reachable_at == ADDRESSES[address]
        socket.create_connection((listener.reachable_at, listener.port), timeout=5).close()


def test_a_family_that_the_kernel_cannot_list_is_an_error_and_not_an_empty_list() -> None:
    with pytest.raises(OSError, match=r"No such file|not supported|Invalid"):
        list(sockets._ask(socket.AF_APPLETALK))
