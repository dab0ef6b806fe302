"""The port of an engine: the one that its model names, or a free one that is the same at each start."""

from __future__ import annotations

import itertools
import zlib

from gpusvc.errors import EngineError
from gpusvc.linux.sockets import holder, listeners

# For models that name none: below those that the kernel hands out for outgoing connections (ip(7)).
_PORTS = range(20000, 30000)


def choose(name: str, wanted: int, *, leased: set[int], leaving: set[int]) -> int:
    """Return a port for the model ``name`` on which no program listens, or only a victim of its start.

    Args:
        name: the model.
        wanted: the port that it asks for; 0: any.
        leased: the ports of other models, some of which may not listen yet.
        leaving: the ports of the victims.

    Raises:
        EngineError: there is none, or it is taken.
    """
    taken = {found.port: found for found in listeners()}
    if wanted:
        stranger = taken.get(wanted)
        if stranger is not None and wanted not in leaving:
            raise EngineError(f"Port {wanted} is taken by another program: {holder(stranger)}.")
        return wanted
    # The same one at each start unless it is taken, so that a port that a person noted stays right.
    first = zlib.crc32(name.encode()) % len(_PORTS)
    for port in itertools.chain(_PORTS[first:], _PORTS[:first]):
        if port not in taken and port not in leased:
            return port
    raise EngineError(f"All ports from {_PORTS.start} to {_PORTS.stop - 1} are taken.")
