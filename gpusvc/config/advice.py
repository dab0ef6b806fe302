"""What a model's file may say and yet rarely means: `gpusvc check`, doctor and each start tell it, and go on."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence

from gpusvc.config.files import HostConfig, load_host, load_sound_model, model_names
from gpusvc.config.model import ModelConfig
from gpusvc.config.presets import PORT
from gpusvc.config.table import Problem
from gpusvc.paths import Paths, is_user_instance
from gpusvc.quantity import shown

# Options by which engines are told the address to listen at.
_HOST_OPTIONS = ("--host", "--listen", "--bind", "--address")

# The addresses of the loopback, and those that stand for all of the machine's.
_USUAL = re.compile(r"localhost|127\.[0-9.]+|0\.0\.0\.0|\*|\[?::1?\]?|")


def advice(paths: Paths, host: HostConfig, config: ModelConfig) -> Iterator[Problem]:
    """What a person should know of a model's file; none of it keeps the model from starting."""
    file = paths.model_file(config.name)
    if config.caller is None and not config.port and not any(PORT in argument for argument in config.command):
        yield Problem(
            file,
            "command",
            "No argument has {port} in it, so the engine must listen on the port in the variable PORT.",
            "Write {port} where the engine takes its port, or set port to the one that it always uses.",
        )
    address = _address(config.command)
    if address is not None and not _USUAL.fullmatch(address):
        yield Problem(
            file,
            "command",
            f"The engine is told to listen at {shown(address)} only: other machines may use it past the gateway.",
            "Use 127.0.0.1, and the gateway's own address for clients elsewhere; see gpusvc-gateway.service(8).",
        )
    if config.user == "root" and not (is_user_instance() or host.allow_root_engines):
        yield Problem(
            file,
            "user",
            "The model does not start: an engine is not run as root, who can ask systemd over D-Bus for everything.",
            "Name another user, or set `allow_root_engines = true` in gpusvc.toml.",
        )
    try:
        mode = os.stat(file).st_mode  # noqa: PTH116 - a start asks
    except OSError:
        return
    if not mode & stat.S_IROTH:
        yield Problem(
            file,
            None,
            f"Its mode is {stat.S_IMODE(mode):04o}: the gateway, the API and the watchdog cannot read it, and go by"
            " defaults for its aliases, timeouts, concurrency, keep, preload and [filter].",
            f"`chmod 644 {file}`, and keep what is secret in a file of its own that the engine reads.",
        )


def all_advice(paths: Paths) -> list[Problem]:
    """The advice on all models whose files are right.

    Raises:
        GpusvcError: the directory or the host's file cannot be read.
    """
    host = load_host(paths)
    configs = (load_sound_model(paths, name, host) for name in model_names(paths))
    return [each for config in configs if config is not None for each in advice(paths, host, config)]


def _address(command: Sequence[str]) -> str | None:
    """The address in the last option that gives one; None if there is none."""
    found = None
    for position, argument in enumerate(command):
        option, equals, value = argument.partition("=")
        if option in _HOST_OPTIONS:
            found = value if equals else next(iter(command[position + 1 : position + 2]), None)
    return found
