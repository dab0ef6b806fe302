"""The port of an engine: the one that its model names, or a free one that stays the same from day to day."""

from __future__ import annotations

import itertools
import zlib

from gpusvc.errors import EngineError
from gpusvc.linux.sockets import holder, listeners

# For models that name none: below those that the kernel hands out for outgoing connections (ip(7)).
_PORTS = range(20000, 30000)


def choose(name: str, wanted: int, leased: set[int]) -> int:
    """A port for the model ``name`` that nobody listens on.

    Args:
        name: the model.
        wanted: the one that it asks for; 0: any.
        leased: those of other models, some of which may not listen yet.

    Raises:
        EngineError: there is none, or it is taken.
    """
    taken = {found.port: found for found in listeners()}
    if wanted:
        stranger = taken.get(wanted)
        if stranger is not None:
            raise EngineError(f"Port {wanted} is taken by another program: {holder(stranger)}.")
        return wanted
    # The same one every time unless it is taken, so that what was written down yesterday is right today.
    first = zlib.crc32(name.encode()) % len(_PORTS)
    for port in itertools.chain(_PORTS[first:], _PORTS[:first]):
        if port not in taken and port not in leased:
            return port
    raise EngineError(f"All ports from {_PORTS.start} to {_PORTS.stop - 1} are taken.")
