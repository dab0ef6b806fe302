"""What confines the engine's process before it is executed: closed GPU nodes, no privileges, a Landlock domain."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpusvc.linux.users import User

_PR_SET_NO_NEW_PRIVS = 38
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522

# landlock(7). These system calls have the same number on every architecture of systemd and NVIDIA.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_ABI_WITH_SCOPES = 6  # of Linux 6.12
_LANDLOCK_SCOPE_SIGNAL = 2


def open_errno(node: str) -> int:
    """The errno of opening ``node``; 0 if it opened.

    Without O_NONBLOCK, which makes the driver open the GPU later, from a queue that is known to block a suspend.
    """
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def drop_privileges(user: User) -> None:
    """Become ``user``, without capabilities and for good.

    Raises:
        OSError: the kernel refused a step.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # A model of a user's manager keeps the user's groups, and a bounding set that no_new_privs makes useless.
    if os.geteuid() == 0:
        os.setgroups(user.groups)
        _empty_bounding_set(libc)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    if libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    _enter_landlock_domain(libc)


def _empty_bounding_set(libc: ctypes.CDLL) -> None:
    """Needed for an engine that runs as root: its exec would gain what is in the bounding set (capabilities(7))."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            if ctypes.get_errno() == errno.EINVAL:
                return  # past the last capability of this kernel
            raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def _enter_landlock_domain(libc: ctypes.CDLL) -> None:
    """On Linux 6.12 and newer, let the process signal, trace and look into no processes but its own.

    Engines mostly run as the same user, whose processes may otherwise do all of that to each other. A Landlock domain
    keeps all tracing inside. Landlock's rules for files are not used: they would forbid mounts to engines that bring
    their own container.
    """
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if abi < _LANDLOCK_ABI_WITH_SCOPES:
        return
    attributes = struct.pack("=QQQ", 0, 0, _LANDLOCK_SCOPE_SIGNAL)  # landlock_ruleset_attr: files, network, scopes
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0 or libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "it cannot be kept to its own processes")
    os.close(ruleset)
