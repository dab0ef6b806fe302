"""Users of the machine, from the user database (getpwnam(3))."""

from __future__ import annotations

import os
import pwd
from typing import Self

from gpusvc.errors import ConfigError
from gpusvc.record import Record, replace


class User(Record):
    """A user that an engine runs as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the user of this name. Raises ConfigError if there is none."""
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(f"There is no user {name!r}.") from None
        groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir, entry.pw_shell)

    def without_group(self, name: str) -> Self:
        """Return this user without the supplementary group ``name``.

        Raises:
            ConfigError: it is the user's primary group.
        """
        import grp  # noqa: PLC0415  not for models of users

        try:
            gid = grp.getgrnam(name).gr_gid
        except KeyError:
            return self
        if self.gid == gid:
            raise ConfigError(
                f"The primary group of {self.name} is {name}, whose members may use all models.",
                hint=f"Run the engine as a user with another primary group: `usermod --gid GROUP {self.name}`.",
            )
        return replace(self, groups=tuple(group for group in self.groups if group != gid))
