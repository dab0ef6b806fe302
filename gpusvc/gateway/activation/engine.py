"""Where a model's engine answers, by its lease as it was last read."""

from __future__ import annotations

from typing import NamedTuple

from gpusvc import files
from gpusvc.files import Stamp
from gpusvc.paths import Paths
from gpusvc.state import lease as leases
from gpusvc.state import upstream_key
from gpusvc.state.lease import BrokenLeaseError


class Engine(NamedTuple):
    """One run of an engine that is ready."""

    address: str
    port: int
    cgroup_id: int | None
    """The control group of its listening socket, by the kernel's number; None: unknown."""
    created: float
    """When its lease was made: another value means another run."""
    authorization: bytes | None = None
    """The line with the API key that it asks for; None: it asks for none."""


class EngineFinder:
    """Looks at the lease of one model often, and reads it when it has changed.

    What it finds is true for requests inside the model (Turnstile), which is not evicted then. If the model was stopped
    or died, the next look shows it, or the request that gets no connection reports it: suspect().
    """

    def __init__(self, paths: Paths, name: str) -> None:
        self._paths = paths
        self._name = name
        self._file = str(paths.lease_file(name))
        self._stamp: Stamp | None = None
        self._engine: Engine | None = None
        self._suspected: Engine | None = None

    @property
    def suspected(self) -> Engine | None:
        """The engine that the lease still names, although it did not answer; None: there is none."""
        return self._engine if self._engine == self._suspected else None

    def find(self) -> Engine | None:
        """Return the engine; None: the model is not ready, its lease is not valid, or its engine is suspected."""
        try:
            stamp = files.stamp(self._file)
        except OSError:
            stamp = None
        if stamp != self._stamp:
            self._stamp = stamp
            self._engine = self._read()
        return None if self._engine == self._suspected else self._engine

    def suspect(self) -> None:
        """Do not return this run of the engine any more, whatever its lease says."""
        self._suspected = self._engine

    def trust(self, engine: Engine) -> None:
        """Note that ``engine`` answered after all."""
        if self._suspected == engine:
            self._suspected = None

    def _read(self) -> Engine | None:
        try:
            lease = leases.read(self._paths, self._name)
        except BrokenLeaseError as error:
            if isinstance(error.__cause__, OSError):
                self._stamp = None  # the file may be valid: this process had no descriptors or no memory
            return None
        if lease is None or not lease.ready or lease.address is None:
            return None
        key = upstream_key.read(self._paths, self._name, upstream_key.GATEWAY)
        authorization = None if key is None else b"Authorization: Bearer " + key.encode()
        return Engine(lease.address, lease.port, lease.socket_cgroup_id, lease.created, authorization)
