"""What the kernel says of listening sockets, by both of its ways."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gpusvc.linux import sock_diag, sockets
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
    assert set(bound.values()) <= {found._replace(cgroup_id=None) for found in sockets.listeners()}


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


# --- Who made the other end of a connection.


def own_group() -> int:
    """The control group of this process's sockets, as the kernel's list has it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (group,) = (found.cgroup_id for found in sockets.listeners() if found.port == port)
    assert group is not None, "this kernel does not tell"
    return group


@pytest.mark.parametrize(("listens", "connects"), [("127.0.0.1",) * 2, ("::1",) * 2, ("::", "127.0.0.1")])
def test_the_other_end_of_a_connection_tells_its_control_group(listens: str, connects: str) -> None:
    try:
        server = socket.socket(socket.AF_INET6 if ":" in listens else socket.AF_INET)
        if ":" in listens:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((listens, 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        server.listen()
        # Nobody accepts it: the kernel has made the socket all the same.
        with socket.create_connection((connects, server.getsockname()[1]), timeout=5) as client:
            assert sockets.peer_group(client.getsockname()[:2], client.getpeername()[:2]) == own_group()


def test_an_end_that_was_closed_meanwhile_is_no_ones() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        near, far = client.getsockname(), client.getpeername()
        accepted, _ = server.accept()
        for end in (accepted, client):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()
        # The listener is still there, and is not mistaken for the connection.
        with pytest.raises(ConnectionResetError):
            sockets.peer_group(near, far)


def test_a_kernel_that_cannot_be_asked_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(near: sock_diag.End, far: sock_diag.End) -> None:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        ends = client.getsockname(), client.getpeername()
        with monkeypatch.context() as patch:
            patch.setattr(sock_diag, "find", refuse)
            assert sockets.peer_group(*ends) is None
        monkeypatch.setattr(sock_diag, "find", lambda near, far: None)  # without tcp_diag even one's own end is missing
        assert sockets.peer_group(*ends) is None


@pytest.mark.parametrize(("groups", "found"), [((7,), 7), ((7, 7), 7), ((7, 8), 0), ((), 0)])
def test_a_connection_in_a_full_queue_is_that_of_the_listeners(
    groups: tuple[int, ...], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = ("127.0.0.1", 40000), ("127.0.0.1", 8123)
    request = sock_diag.Found(sock_diag.SYN_RECV, far[1], b"", 0, 0, is_only_ipv6=False, cgroup_id=None)
    monkeypatch.setattr(sock_diag, "find", lambda near, far: request)
    others = [Listener("127.0.0.1", 8124, 1, 0, cgroup_id=9), Listener("127.0.0.2", 8123, 1, 0, cgroup_id=9)]
    own = [
        Listener(address, 8123, 1, 0, cgroup_id=group)
        for address, group in zip(("0.0.0.0", "::"), groups, strict=False)
    ]
    monkeypatch.setattr(sockets, "listeners", lambda: [*others, *own])
    assert sockets.peer_group(near, far) == found
