"""The paths of gpusvc's files. Only this module names gpusvc's directories.

A machine may have several instances: the system's, and one for each user who runs gpusvc under a service manager of
their own (`systemctl --user`). They share no file. The environment of a process says to which instance it belongs.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

from gpusvc.record import Record

# "1" in the environment of every process of a user's instance, set by Environment= of its units or `gpusvc --user`.
USER_INSTANCE = "GPUSVC_USER"


def is_user_instance() -> bool:
    """Return whether this process belongs to a user's instance of gpusvc and not to the system's."""
    return os.environ.get(USER_INSTANCE) == "1"


class Paths(Record):
    """The three root directories of an instance, the files in them, and where systemd keeps the instance's units."""

    config: Path
    runtime: Path
    state: Path
    control_group: str = "/gpusvc.slice"
    """The control group above all services and scopes, as in cgroup.Cgroup, unless an administrator moved them."""
    cache: Path | None = None
    """The directory for what can be downloaded again; None: a part of ``state``."""
    unit_directory: Path = Path("/run/systemd/system")
    """The directory for units and drop-ins that exist until the service manager ends."""

    @classmethod
    def here(cls) -> Paths:
        """Return the paths of the instance that this process belongs to."""
        return cls.user(os.environ) if is_user_instance() else cls.system()

    @classmethod
    def system(cls) -> Paths:
        return cls(config=Path("/etc/gpusvc"), runtime=Path("/run/gpusvc"), state=Path("/var/lib/gpusvc"))

    @classmethod
    def user(cls, environment: Mapping[str, str]) -> Paths:
        """Return the paths of this process's user, by the XDG base directory specification."""
        uid = os.getuid()
        home = Path(environment.get("HOME") or pwd.getpwuid(uid).pw_dir)
        # su(1) and sudo(8) set no XDG_RUNTIME_DIR; pam_systemd(8) always puts it there.
        runtime = Path(f"/run/user/{uid}")
        named = _directory(environment, "XDG_RUNTIME_DIR", runtime)
        # `su` without a dash keeps the caller's: root would write where that user can put links.
        runtime = named if _is_own(named, uid) else runtime
        return cls(
            config=_directory(environment, "XDG_CONFIG_HOME", home / ".config") / "gpusvc",
            runtime=runtime / "gpusvc",
            state=_directory(environment, "XDG_STATE_HOME", home / ".local/state") / "gpusvc",
            control_group=f"/user.slice/user-{uid}.slice/user@{uid}.service/gpusvc.slice",
            cache=_directory(environment, "XDG_CACHE_HOME", home / ".cache") / "gpusvc",
            unit_directory=runtime / "systemd/user",
        )

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

    def readiness_file(self, name: str) -> Path:
        return self.lease_directory(name) / "ready"

    def demand_file(self, name: str) -> Path:
        return self.runtime / "wanted" / name

    def pin_file(self, name: str) -> Path:
        return self.runtime / "pins" / name

    def keep_file(self, name: str) -> Path:
        return self.runtime / "keep" / name

    @property
    def downloads_directory(self) -> Path:
        """The directory of downloaded models."""
        return (self.cache or self.state) / "models"

    @property
    def runs_directory(self) -> Path:
        return self.runtime / "runs"

    def run_file(self, name: str) -> Path:
        return self.runs_directory / f"{name}.toml"

    @property
    def waitlist_directory(self) -> Path:
        return self.runtime / "waiting"

    @property
    def line_directory(self) -> Path:
        return self.runtime / "line"

    @property
    def placement_lock(self) -> Path:
        return self.runtime / "placement.lock"


def _is_own(directory: Path, uid: int) -> bool:
    """Whether a directory belongs to this user, as the specification demands, or is yet to be made."""
    try:
        return directory.stat().st_uid == uid
    except OSError:
        return True


def _directory(environment: Mapping[str, str], variable: str, default: Path) -> Path:
    value = environment.get(variable, "")
    return Path(value) if value.startswith("/") else default  # the specification says to ignore relative paths
