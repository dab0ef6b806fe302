"""Checks the machine below gpusvc: systemd, control groups, polkit, users, disks, the clock."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gpusvc.doctor.finding import Finding, error, note, ok, warning
from gpusvc.errors import GpusvcError
from gpusvc.linux import sockets
from gpusvc.paths import Paths, is_user_instance
from gpusvc.quantity import MIB, format_size
from gpusvc.systemd.manager import Manager

_OLDEST_SYSTEMD = 252
_CGROUPS = Path("/sys/fs/cgroup")
_POLKIT_RULES = Path("/usr/share/polkit-1/rules.d/50-gpusvc.rules")
_POLKIT_SERVICE = Path("/usr/share/dbus-1/system-services/org.freedesktop.PolicyKit1.service")
_LINGERING = Path("/var/lib/systemd/linger")
_JOURNAL = Path("/var/log/journal")
_LITTLE_SPACE_BYTES = 64 * MIB

# What the package enables for the system, and a user for himself, and what is lost without it.
_UNITS = {
    "gpusvc-watchdog.service": "no idle model is evicted, and nobody clears away what is left behind",
    "gpusvc-gateway.socket": "no client is served by the gateway",
    "gpusvc-api.socket": "the gateway cannot start models",
}
_GATEWAY_PORT, _USER_GATEWAY_PORT = 8484, 8485
_USERS = ("gpusvc", "gpusvc-watchdog", "gpusvc-gateway", "gpusvc-api")
_GROUPS = ("gpusvc", "gpusvc-engine")

# A package that was not installed as one, or not whole.
_REINSTALL = "Install the package again: apt install --reinstall gpusvc."


def findings(paths: Paths) -> Iterator[Finding]:
    yield _systemd()
    yield _control_groups()
    yield from _units()
    if is_user_instance():
        yield _lingering()
        yield _journal()
    else:
        yield _polkit()
        yield from _users()
    yield from _disks(paths)
    yield from _clock(paths)


def _systemd() -> Finding:
    try:
        with Manager() as manager:
            version = manager.version()
    except GpusvcError as problem:
        return error("systemd", problem.message, fix=problem.hint)
    digits = version.split("~")[0].split(".")[0].split(" ")[0]
    if digits.isdecimal() and int(digits) < _OLDEST_SYSTEMD:
        fix = f"gpusvc is tried with {_OLDEST_SYSTEMD} and newer: upgrade the distribution."
        return error("systemd", f"systemd {version} is too old.", fix=fix)
    return ok("systemd", f"systemd {version} is the service manager.")


def _control_groups() -> Finding:
    if not (_CGROUPS / "cgroup.controllers").exists():
        fix = "Boot without systemd.unified_cgroup_hierarchy=0 on the kernel's command line."
        return error(
            "cgroups", "The unified control group hierarchy is not mounted.", f"{_CGROUPS} is of version 1", fix
        )
    if not (_CGROUPS / "system.slice" / "cgroup.kill").exists() and not any(_CGROUPS.glob("*/cgroup.kill")):
        return warning("cgroups", "The kernel has no cgroup.kill.", fix="Linux 5.14 and newer have it.")
    missing = {"memory", "cpu", "pids"} - set((_CGROUPS / "cgroup.controllers").read_text().split())
    if missing:
        evidence = f"{_CGROUPS}/cgroup.controllers lacks {', '.join(sorted(missing))}"
        sentence = "Limits of models that need these controllers are not enforced."
        return warning(
            "cgroups", sentence, evidence, "See [scope] in gpusvc-model(5); is another hierarchy using them?"
        )
    return ok("cgroups", "The unified hierarchy is mounted, with all controllers that models may be limited by.")


def _units() -> Iterator[Finding]:
    is_user = is_user_instance()
    systemctl, port = ("systemctl --user", _USER_GATEWAY_PORT) if is_user else ("systemctl", _GATEWAY_PORT)
    try:
        with Manager() as manager:
            loaded = {unit.name: unit for unit in manager.units(*_UNITS)}
    except GpusvcError:
        return  # said already
    for name, loss in _UNITS.items():
        unit = loaded.get(name)
        if unit is None or unit.active != "active":
            state = "it is " + ("not loaded" if unit is None else str(unit.active))
            if name == "gpusvc-gateway.socket" and port in {each.port for each in sockets.listeners()}:
                state += f", and another program listens on port {port}"
            fix = f"`{systemctl} enable --now {name}`; `{systemctl} status {name}` shows why if it fails."
            yield (note if is_user else warning)("units", f"{name} does not run: {loss}.", state, fix)
        else:
            yield ok("units", f"{name} is {unit.sub}.")


def _lingering() -> Finding:
    user = pwd.getpwuid(os.getuid()).pw_name
    if (_LINGERING / user).exists():
        return ok("lingering", f"The manager of {user} runs from boot on, and so may models.")
    fix = f"`loginctl enable-linger {user}` has them run from boot on."
    return note("lingering", f"The models of {user} end with the last session.", f"{_LINGERING / user} is missing", fix)


def _journal() -> Finding:
    if _JOURNAL.is_dir():
        return ok("journal", "The journal is kept on disk, where users may read their own part of it.")
    sentence = (
        "The journal is kept in memory, where users cannot read their own part of it: no engine's last lines are shown."
    )
    fix = f"As root, make {_JOURNAL} and run `journalctl --flush`, or make the user a member of systemd-journal."
    return note("journal", sentence, f"{_JOURNAL} is missing", fix)


def _polkit() -> Finding:
    if not _POLKIT_SERVICE.exists():
        sentence = "polkit is not installed: the watchdog cannot stop models, nor the gateway start them."
        return error("polkit", sentence, f"{_POLKIT_SERVICE} is missing", "apt install polkitd")
    if not _POLKIT_RULES.exists():
        sentence = "polkit lacks the rule that lets the services of gpusvc start and stop models."
        return error("polkit", sentence, f"{_POLKIT_RULES} is missing", _REINSTALL)
    return ok("polkit", "polkit and its rule for the services of gpusvc are there.")


def _users() -> Iterator[Finding]:
    users = {entry.pw_name for entry in pwd.getpwall()}
    groups = {entry.gr_name for entry in grp.getgrall()}
    missing = [f"user {name}" for name in _USERS if name not in users]
    missing += [f"group {name}" for name in _GROUPS if name not in groups]
    if missing:
        fix = "`systemd-sysusers` makes them from what the package installs."
        yield error("users", f"These are missing: {', '.join(missing)}.", fix=fix)
    else:
        yield ok("users", "The users and groups of gpusvc are there.")
    members = grp.getgrnam("gpusvc").gr_mem if "gpusvc" in groups else []
    people = [name for name in members if not name.startswith("gpusvc")]
    if not people and "gpusvc" in groups:
        fix = "`adduser NAME gpusvc` lets NAME use models without root, after the next login."
        yield note("users", "Nobody but root may use `gpusvc use` and the management socket.", fix=fix)


def _disks(paths: Paths) -> Iterator[Finding]:
    for directory, loss in ((paths.runtime, "no model can start"), (paths.state, "nothing is learned of models")):
        where = next((each for each in (directory, *directory.parents) if each.is_dir()), directory)
        try:
            free = shutil.disk_usage(where).free
            inodes = os.statvfs(where)
        except OSError as problem:
            yield error("disk", f"{directory} cannot be looked at: {problem.strerror}.")
            continue
        if free < _LITTLE_SPACE_BYTES or (inodes.f_files and inodes.f_favail < 1000):
            evidence = f"{format_size(free)} and {inodes.f_favail} files are left"
            yield warning("disk", f"{directory} is nearly full; when it is, {loss}.", evidence, "Make room on it.")
        elif inodes.f_flag & os.ST_RDONLY:
            yield error("disk", f"{directory} is mounted read-only: {loss}.", fix="Mount it writable.")
        else:
            yield ok("disk", f"{directory} has {format_size(free)} left.")


def _clock(paths: Paths) -> Iterator[Finding]:
    now = time.time()
    ahead = [file for file in paths.leases_directory.glob("*/*") if file.stat().st_mtime > now + 60]
    if ahead:
        evidence = f"{ahead[0]} has a time in the future"
        sentence = "The clock was set back: the last uses of models lie in the future."
        yield note(
            "clock", sentence, evidence, "The next use of each model corrects it. The watchdog does not depend on it."
        )
    else:
        yield ok("clock", "No file of gpusvc has a time in the future.")
