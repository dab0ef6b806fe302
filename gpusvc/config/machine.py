"""Whether this machine has what a model's file names: its user, directory, program and model.

Starts and ``gpusvc check`` ask. The daemons do not: a model that runs needs no answer.
"""

from __future__ import annotations

import pwd
import stat
from pathlib import Path

from gpusvc.config import presets
from gpusvc.config.model import ModelConfig, default_user
from gpusvc.config.table import Table
from gpusvc.paths import is_user_instance
from gpusvc.quantity import shown


def check(config: ModelConfig, table: Table) -> None:
    """Note in ``table``, from which ``config`` was read, what the machine lacks."""
    _check_user(config, table)
    _check_working_directory(config, table)
    _check_model(config, table)
    _check_program(config, table)
    _check_upstream_key(config, table)


def _check_user(config: ModelConfig, table: Table) -> None:
    if is_user_instance():
        default = default_user()
        if config.user != default:
            message = f"A model of {default} runs as {default}, and not as {shown(config.user)}."
            table.problem("user", message, "Leave it out, or have the system's gpusvc run the model.")
        return
    try:
        pwd.getpwnam(config.user)
    except KeyError:
        hint = "It is the default, which the package creates; create it, or name another."
        table.problem("user", f"There is no user {shown(config.user)}.", None if table.has("user") else hint)


def _check_working_directory(config: ModelConfig, table: Table) -> None:
    directory = shown(str(config.working_directory))
    try:
        if not stat.S_ISDIR(config.working_directory.stat().st_mode):
            table.problem("working_directory", f"{directory} is not a directory.")
    except PermissionError:
        pass  # the engine's user may well enter it
    except OSError as error:
        table.problem("working_directory", f"{directory} cannot be used: {error.strerror}.")


def _check_model(config: ModelConfig, table: Table) -> None:
    preset = presets.PRESETS.get(config.engine or "")
    if preset is None or config.model is None:
        return
    try:
        preset.require_files(config.model)
    except ValueError as error:
        table.problem("model", str(error))


def _check_program(config: ModelConfig, table: Table) -> None:
    if not config.command:
        return
    program = config.command[0]
    try:
        presets.find_program(program, config.env)
    except ValueError as error:
        hint = None if "/" in program else "Install it, give an absolute path, or set PATH in env."
        table.problem("command" if table.has("command") else "engine", str(error), hint)


def _check_upstream_key(config: ModelConfig, table: Table) -> None:
    source = config.upstream_key
    if source is None:
        return
    if source.startswith("-"):
        if not any(argument == source or argument.startswith(source + "=") for argument in config.command):
            table.problem("upstream_key", f"The command has no option {source}.")
        return
    if not source.startswith("/"):
        return  # systemd adds credentials when the model starts
    try:
        if not stat.S_ISREG(Path(source).stat().st_mode):
            table.problem("upstream_key", f"{shown(source)} is not a file.")
    except PermissionError:
        pass  # root may look
    except OSError as error:
        table.problem("upstream_key", f"{shown(source)} cannot be used: {error.strerror}.")
