"""Where gpusvc's files are; the only place that spells a directory of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Paths:
    """The three roots, and what stands in them."""

    config: Path
    runtime: Path
    state: Path

    @classmethod
    def system(cls) -> Paths:
        return cls(config=Path("/etc/gpusvc"), runtime=Path("/run/gpusvc"), state=Path("/var/lib/gpusvc"))

    @property
    def host_file(self) -> Path:
        return self.config / "gpusvc.toml"

    @property
    def models_directory(self) -> Path:
        return self.config / "models"

    def model_file(self, name: str) -> Path:
        return self.models_directory / f"{name}.toml"

    @property
    def leases_directory(self) -> Path:
        return self.runtime / "models"

    def lease_directory(self, name: str) -> Path:
        return self.leases_directory / name

    def lease_file(self, name: str) -> Path:
        return self.lease_directory(name) / "lease.json"

    def pin_file(self, name: str) -> Path:
        return self.lease_directory(name) / "pinned"

    @property
    def waitlist_directory(self) -> Path:
        return self.runtime / "waiting"

    @property
    def placement_lock(self) -> Path:
        return self.runtime / "placement.lock"
