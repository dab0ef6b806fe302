"""Whether a user may read a file, by owners and modes. Access lists and namespaces are not evaluated."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

_ACCESS_LIST = "system.posix_acl_access"


def obstacle(path: Path, user: str) -> Path | None:
    """Return the file or directory of ``path`` that ``user`` may not read or pass; None: there is none, or unknown."""
    try:
        entry = pwd.getpwnam(user)
        groups = {*os.getgrouplist(user, entry.pw_gid)}
    except (KeyError, OSError):
        return None
    if entry.pw_uid == 0:
        return None
    real = Path(os.path.realpath(path))
    for step in [*reversed(real.parents), real]:
        try:
            status = step.stat()
        except OSError:
            return None
        wanted = 0o1 if stat.S_ISDIR(status.st_mode) and step != real else 0o4
        if not _granted(status, wanted, entry.pw_uid, groups) and not _has_access_list(step):
            return step
    return None


def _granted(status: os.stat_result, wanted: int, uid: int, groups: set[int]) -> bool:
    """Return whether the first class that fits (owner, group, others) has the permission. The kernel does the same."""
    shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
    return bool(status.st_mode >> shift & wanted)


def _has_access_list(path: Path) -> bool:
    try:
        return _ACCESS_LIST in os.listxattr(path)
    except OSError:
        return False
