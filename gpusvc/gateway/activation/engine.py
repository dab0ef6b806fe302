"""Where a model's engine answers, as its lease said when it was last looked at."""

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
    """The lease of one model: looked at often, and read when it changed.

    It holds for whoever is inside the model (Turnstile), which is not evicted then. A model that was stopped or
    died all the same is seen by the next look, or by who finds that nobody answers: suspect().
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
        """The engine that the lease still names, and that is not believed to answer."""
        return self._engine if self._engine == self._suspected else None

    def find(self) -> Engine | None:
        """None: the model is not ready, its lease makes no sense, or its engine is suspected."""
        try:
            stamp = files.stamp(self._file)
        except OSError:
            stamp = None
        if stamp != self._stamp:
            self._stamp = stamp
            self._engine = self._read()
        return None if self._engine == self._suspected else self._engine

    def suspect(self) -> None:
        """Do not believe in this run of the engine any more, whatever its lease says."""
        self._suspected = self._engine

    def trust(self, engine: Engine) -> None:
        """It answered after all."""
        if self._suspected == engine:
            self._suspected = None

    def _read(self) -> Engine | None:
        try:
            lease = leases.read(self._paths, self._name)
        except BrokenLeaseError as error:
            if isinstance(error.__cause__, OSError):
                self._stamp = None  # it says nothing of the file: there were no descriptors, or no memory
            return None
        if lease is None or not lease.ready or lease.address is None:
            return None
        key = upstream_key.read(self._paths, self._name, upstream_key.GATEWAY)
        authorization = None if key is None else b"Authorization: Bearer " + key.encode()
        return Engine(lease.address, lease.port, lease.socket_cgroup_id, lease.created, authorization)
