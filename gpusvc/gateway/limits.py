"""Limits of a worker and of each client: bytes, fields, time. What operators may want to change is in gpusvc.toml."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for every connection. Times are kept by a sweep, and so up to ``sweep_seconds`` longer."""

    head_bytes: int = 32 * KIB  # of a request or an answer; 431
    target_bytes: int = 8 * KIB  # 414
    fields: int = 128  # of one head; 431
    held_bytes: int = 64 * 1024 * KIB  # of requests in memory, shared out among the workers; more of bodies is in files
    pipelined_bytes: int = 64 * KIB  # what is read ahead of the request that is being answered
    linger_bytes: int = 1024 * KIB  # what is read and thrown away of a request that was refused before its end

    head_seconds: float = 30.0  # from a head's first byte to its last; 408
    idle_seconds: float = 75.0  # between two requests
    body_seconds: float = 60.0  # in which body_bytes of a body must come, or its end; 408
    body_bytes: int = 64 * KIB
    quiet_seconds: float = 10.0  # without a byte either way, after which an upgraded connection is no use of its model
    stall_seconds: float = 120.0  # in which a client takes nothing of its answer
    linger_seconds: float = 5.0  # for a client to read its refusal before the connection is gone

    connect_seconds: float = 10.0  # to an engine
    pooled: int = 256  # idle connections to one engine
    # Many engines have a thread for each connection, which idle ones keep from others, as the health check; and those
    # that close idle ones themselves do so after 5 seconds (cpp-httplib, uvicorn), when a request may be on its way.
    pooled_seconds: float = 3.0

    sweep_seconds: float = 1.0
