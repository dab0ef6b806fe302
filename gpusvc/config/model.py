"""One model, ``models/NAME.toml``: its values, and how they are read; gpusvc-model(5) says what they mean."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gpusvc import names
from gpusvc.config import presets as engines
from gpusvc.config import resource_control
from gpusvc.config.host import BusyAction, HostConfig, read_busy_timeout, read_idle_timeout
from gpusvc.config.serving import Serving, read_serving
from gpusvc.config.table import Table, did_you_mean
from gpusvc.gpu.selector import DeviceSelector
from gpusvc.paths import is_user_instance
from gpusvc.quantity import MIB, shown

# Variables of the engine's environment that the launcher sets, and why nobody else may.
OWNED_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "gpusvc sets it to the GPUs that the model gets; see devices in [gpu].",
    "CUDA_DEVICE_ORDER": "gpusvc sets it, so that indices mean the same to all.",
    "PORT": "gpusvc sets it to the port that the engine must listen on; see port.",
    "NOTIFY_SOCKET": "gpusvc tells systemd itself when the engine is ready.",
}

# A model that must stay before or after all others needs no more than this.
MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """What a model asks of the GPUs."""

    count: int  # 0: it needs none
    devices: tuple[str, ...]  # each as DeviceSelector.parse() takes it; empty: any GPU
    vram_bytes: int | None  # on each GPU; None: not declared


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model, ``models/NAME.toml``, with all defaults filled in."""

    name: str
    description: str
    command: tuple[str, ...]  # a preset is expanded; "{port}" is still in its place
    engine: str | None
    model: str | None
    aliases: tuple[str, ...]
    user: str
    env: Mapping[str, str]
    working_directory: Path
    port: int  # 0: any free one
    health: str  # a path; "": the open port is enough
    start_timeout_seconds: float  # without progress
    stop_timeout_seconds: float
    release_timeout_seconds: float
    health_timeout_seconds: float  # 0: an engine that hangs is left alone
    idle_timeout_seconds: float  # without use; 0: never
    busy_timeout_seconds: float  # in use without progress; 0: never
    busy_action: BusyAction
    priority: int  # the lowest is evicted first
    pinned: bool  # never evicted
    exclusive: tuple[str, ...]  # names of groups; of each, one model runs at a time
    gpu: GpuRequest
    scope: Mapping[str, str]  # systemd.resource-control(5) properties, verbatim
    serving: Serving  # what the gateway goes by
    caller: Path | None = None  # the socket of who ran it with `gpusvc run`

    def digest(self) -> str:
        """Eight hexadecimal digits that change with whatever decides how much VRAM the engine takes."""
        import json  # noqa: PLC0415 - only footprints need it
        import zlib  # noqa: PLC0415

        # A checksum, as hashlib would load libcrypto into every launcher.
        footprint = [self.command, sorted(self.env.items()), self.gpu.count]
        return f"{zlib.crc32(json.dumps(footprint).encode()):08x}"


def read_run(table: Table, name: str, host: HostConfig) -> ModelConfig:
    """What `gpusvc run` wrote down: a model like any other, but for its caller, and its arguments as given."""
    caller, arguments = table.text("caller", ""), table.texts("arguments") or ()
    model = read_model(table, name, host)
    return replace(model, command=(*model.command, *arguments), caller=Path(caller))


def read_model(table: Table, name: str, host: HostConfig) -> ModelConfig:
    """Each key is one line. What is wrong is noted in ``table``, and a default stands in for it."""
    gpu = _read_gpu(table.table("gpu"))
    serving = read_serving(table, name)
    env = _read_env(table)
    engine = table.text("engine", None)
    model = table.text("model", None)
    return ModelConfig(
        name=name,
        description=serving.description,
        engine=engine,
        model=model,
        command=_read_command(table, engine, model, served_names=(name, *serving.aliases), gpus=gpu.count, env=env),
        aliases=serving.aliases,
        user=_read_user(table),
        env=env,
        working_directory=_read_working_directory(table),
        port=table.integer("port", 0, minimum=0, maximum=65535),
        health=_read_health(table, engine),
        start_timeout_seconds=table.duration("start_timeout", 600.0),
        stop_timeout_seconds=table.duration("stop_timeout", 10.0),
        release_timeout_seconds=table.duration("release_timeout", host.release_timeout_seconds),
        health_timeout_seconds=table.duration("health_timeout", 60.0, zero=True),
        idle_timeout_seconds=read_idle_timeout(table, host.watchdog.idle_timeout_seconds),
        busy_timeout_seconds=read_busy_timeout(table, host.watchdog.busy_timeout_seconds),
        busy_action=table.choice("busy_action", host.watchdog.busy_action),
        priority=table.integer("priority", 0, minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY),
        pinned=table.boolean("pinned", default=False),
        exclusive=_read_exclusive(table),
        gpu=gpu,
        scope=_read_scope(table),
        serving=serving,
    )


def _read_env(table: Table) -> dict[str, str]:
    env = table.words("env", (str, int))
    for variable in env:
        if variable in OWNED_VARIABLES:
            table.problem(f"env.{variable}", "It cannot be set.", OWNED_VARIABLES[variable])
        elif not variable or "=" in variable or not variable.isprintable():
            table.problem(f"env.{variable}", f"{shown(variable)} cannot name a variable.")
    return env


def _read_command(
    table: Table,
    engine: str | None,
    model: str | None,
    *,
    served_names: tuple[str, ...],
    gpus: int,
    env: Mapping[str, str],
) -> tuple[str, ...]:
    """What to run, from ``command`` or from ``engine``, ``model`` and ``args``; empty if that went wrong."""
    command = table.texts("command")
    args = table.texts("args") or ()
    if table.has("command"):
        for key in ("engine", "model", "args"):
            if table.has(key):
                table.problem(key, "It cannot stand beside command.", "Give either command, or engine, model and args.")
        if command is not None and not any(command[:1]):
            table.problem("command", "It names no program.")
    elif table.has("engine"):
        command = _expand_preset(table, engine, model, served_names=served_names, gpus=gpus, args=args)
    else:
        table.problem("command", "It is missing.", "Say what to run, or give engine and model.")
        for key in ("model", "args"):
            if table.has(key):
                table.problem(key, "It means nothing without engine.", f"Presets: {', '.join(engines.PRESETS)}.")

    misplaced = engines.misplaced_placeholder((command or ()) + (args if command is None else ()))
    if misplaced is not None:
        key = "args" if misplaced in args else "command"
        table.problem(key, f"{shown(misplaced)} is not replaced by anything.", "The one placeholder is {port}.")
    if not command or not command[0]:
        return ()
    try:
        engines.find_program(command[0], env)
    except ValueError as error:
        hint = None if "/" in command[0] else "Install it, give an absolute path, or set PATH in env."
        table.problem("command" if table.has("command") else "engine", str(error), hint)
    return command


def _expand_preset(
    table: Table,
    engine: str | None,
    model: str | None,
    *,
    served_names: tuple[str, ...],
    gpus: int,
    args: tuple[str, ...],
) -> tuple[str, ...] | None:
    if engine is not None and engine not in engines.PRESETS:
        hint = did_you_mean(engine, engines.PRESETS) or "For any other engine write its command."
        table.problem("engine", f"{shown(engine)} is no preset: there are {', '.join(engines.PRESETS)}.", hint)
    if not table.has("model"):
        table.problem("model", "It is missing.", "Say which model the engine serves: a path, or a repository's name.")
    preset = engines.PRESETS.get(engine or "")
    if preset is None or model is None:
        return None
    try:
        preset.check(model)
    except ValueError as error:
        table.problem("model", str(error))
    return preset.command(engines.Served(model, served_names, gpus)) + args


def default_user() -> str:
    """Whom engines run as: the package's user, or whose models they are."""
    return pwd.getpwuid(os.getuid()).pw_name if is_user_instance() else "gpusvc"


def _read_user(table: Table) -> str:
    default = default_user()
    user = table.text("user", default)
    if is_user_instance():
        if user != default:
            message = f"A model of {default} runs as {default}, and not as {shown(user)}."
            table.problem("user", message, "Leave it out, or have the system's gpusvc run the model.")
        return default
    try:
        pwd.getpwnam(user)
    except KeyError:
        hint = (
            None if table.has("user") else "It is the default, which the package creates; create it, or name another."
        )
        table.problem("user", f"There is no user {shown(user)}.", hint)
    return user


def _read_working_directory(table: Table) -> Path:
    directory = table.text("working_directory", "/")
    if not directory.startswith("/"):
        table.problem("working_directory", f"{shown(directory)} is not an absolute path.")
        return Path("/")
    try:
        if not stat.S_ISDIR(Path(directory).stat().st_mode):
            table.problem("working_directory", f"{shown(directory)} is not a directory.")
    except PermissionError:
        pass  # the engine's user may well enter it
    except OSError as error:
        table.problem("working_directory", f"{shown(directory)} cannot be used: {error.strerror}.")
    return Path(directory)


def _read_health(table: Table, engine: str | None) -> str:
    preset = engines.PRESETS.get(engine or "")
    health = table.text("health", preset.health if preset else "/health")
    if health and not health.startswith("/"):
        table.problem("health", f"{shown(health)} does not begin with '/'.", 'Write a path, or "" for none.')
    elif not health.isascii() or not health.isprintable() or " " in health:
        table.problem("health", f"{shown(health)} has characters that a URL cannot have.")
    return health


def _read_exclusive(table: Table) -> tuple[str, ...]:
    groups = table.texts("exclusive") or ()
    for position, group in enumerate(groups):
        key = f"exclusive[{position}]"
        if not names.is_name(group):
            hint = "It is written as a model's name: letters, digits, ':', '_', '.' or '-'."
            table.problem(key, f"{shown(group)} cannot name a group.", hint)
        elif group in groups[:position]:
            table.problem(key, f"{shown(group)} is listed twice.")
    return groups


def _read_gpu(table: Table) -> GpuRequest:
    request = GpuRequest(
        count=table.integer("count", 1, minimum=0, maximum=1024),
        devices=table.devices("devices"),
        vram_bytes=table.size("vram", None, minimum=MIB),
    )
    if request.count == 0:
        for key in ("devices", "vram"):
            if table.has(key):
                table.problem(key, "It means nothing where count is 0.")
    selectors = [DeviceSelector.parse(device) for device in request.devices]
    if selectors and len(selectors) < request.count and all(selector.is_single for selector in selectors):
        table.problem("devices", f"It names fewer GPUs ({len(selectors)}) than count asks for ({request.count}).")
    return request


def _read_scope(table: Table) -> dict[str, str]:
    scope = table.words("scope", (str, int, bool))
    for name, value in scope.items():
        key = f"scope.{name}"
        if not value.isprintable():
            table.problem(key, f"{shown(value)} has characters that cannot be printed.")
        if name in resource_control.OWNED:
            table.problem(key, "gpusvc decides this property itself.", resource_control.OWNED[name])
        elif name in resource_control.LEGACY:
            table.problem(key, "It belongs to cgroup v1.", f"Use {resource_control.LEGACY[name]}.")
        elif name not in resource_control.PROPERTIES:
            hint = did_you_mean(name, resource_control.PROPERTIES) or resource_control.ELSEWHERE
            table.problem(key, "It is no property of systemd.resource-control(5).", hint)
    return scope
