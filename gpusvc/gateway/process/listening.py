"""The sockets that the gateway listens on: those that systemd passes to it, or one of its own.

systemd keeps its sockets open when the gateway ends, so that the next gateway accepts the connections that still wait.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping, Sequence

from gpusvc.errors import ConfigError, GpusvcError
from gpusvc.paths import is_user_instance

# Where the gateway listens without systemd's sockets: the system's gateway, and a user's.
ADDRESS = ("127.0.0.1", 8484)
USER_ADDRESS = ("127.0.0.1", 8485)

# The same as in gpusvc-gateway.socket: event loops call listen(2) again, which replaces the socket unit's value.
BACKLOG = 4096

OLLAMA = "ollama"
"""FileDescriptorName= of gpusvc-ollama.socket."""

_FIRST_FD = 3  # SD_LISTEN_FDS_START


def take(environment: Mapping[str, str], ollama_port: int = 0) -> list[socket.socket]:
    """Return all sockets to listen on: systemd's, by sd_listen_fds(3), or else a new one at 127.0.0.1.

    The port of a new one is 8484, or 8485 for a user's gateway. With ``ollama_port`` there is a second one.

    Raises:
        ConfigError: systemd passed something that cannot be listened on.
        GpusvcError: systemd passed nothing, and the address is in use.
    """
    if not _is_ours(environment):
        host, port = USER_ADDRESS if is_user_instance() else ADDRESS
        return [_open(host, port), *([_open(host, ollama_port)] if ollama_port else [])]
    return inherited(int(environment.get("LISTEN_FDS", "0")))


def of_ollama(listeners: Iterable[socket.socket], port: int, environment: Mapping[str, str]) -> frozenset[int]:
    """Return the file descriptors of the sockets for clients of Ollama: by systemd's name for them, or by their port.

    Args:
        listeners: all sockets.
        port: ``ollama_port``; 0: there is none.
        environment: as for take().
    """
    names = environment.get("LISTEN_FDNAMES", "").split(":") if _is_ours(environment) else []
    named = {fd for fd, name in enumerate(names, start=_FIRST_FD) if name == OLLAMA}
    return frozenset(each.fileno() for each in listeners if each.fileno() in named or _port(each) == port > 0)


def inherited(count: int) -> list[socket.socket]:
    """Return the ``count`` sockets that systemd passed, from file descriptor 3 on. Child programs do not get them.

    Raises:
        ConfigError: one of them does not listen for connections, or there is none.
    """
    sockets = []
    for fd in range(_FIRST_FD, _FIRST_FD + count):
        os.set_inheritable(fd, False)
        try:
            taken = socket.socket(fileno=fd)
        except OSError:
            raise _unfit(fd) from None
        if taken.type != socket.SOCK_STREAM or not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _unfit(fd)
        taken.setblocking(False)
        sockets.append(taken)
    if not sockets:
        raise ConfigError(
            "systemd gave the gateway no socket.", hint="gpusvc-gateway.socket should have ListenStream=."
        )
    return sockets


def shown(listener: socket.socket) -> str:
    """Return the address of ``listener`` as a person writes it."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return "@" + text[1:] if text.startswith("\0") else text
    host, port = name[:2]
    return f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"


def reachable(listeners: Iterable[socket.socket]) -> list[socket.socket]:
    """Return the sockets that may be reached from other machines."""
    return [listener for listener in listeners if not _is_local(listener)]


def guard(listeners: Sequence[socket.socket], *, needs_key: bool, allow_without_keys: bool) -> None:
    """Refuse to serve other machines without keys, unless ``allow_without_keys`` is set.

    Raises:
        ConfigError: other machines can reach a socket, and neither keys nor ``allow_without_keys`` are there.
    """
    if needs_key or allow_without_keys:
        return
    for listener in reachable(listeners):
        raise ConfigError(
            f"The gateway would answer everybody who reaches {shown(listener)}: there are no API keys.",
            hint="Make one with `gpusvc key add NAME`, or set allow_without_keys = true in [gateway] of gpusvc.toml.",
        )


def _is_ours(environment: Mapping[str, str]) -> bool:
    """Return whether systemd's sockets are for this process."""
    return environment.get("LISTEN_PID") == str(os.getpid())


def _port(listener: socket.socket) -> int:
    return 0 if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])


def _open(host: str, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise GpusvcError(
            f"The gateway cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}.",
            hint="gpusvc-gateway.socket may be there already: systemctl stop gpusvc-gateway.socket.",
        ) from None
    return opened


def _is_local(listener: socket.socket) -> bool:
    if listener.family == socket.AF_UNIX:
        return True  # the socket's file mode decides who may connect
    if listener.family not in {socket.AF_INET, socket.AF_INET6}:
        return False
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def _unfit(fd: int) -> ConfigError:
    return ConfigError(
        f"File descriptor {fd}, which systemd gave the gateway, is no listening stream socket.",
        hint="gpusvc-gateway.socket may have ListenStream= only, and no Accept=yes.",
    )
