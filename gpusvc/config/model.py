"""One model, ``models/NAME.toml``: its keys; gpusvc-model(5) says what they mean.

Reading a file asks the machine nothing: whether the program, the user and the files exist is checked in ``machine.py``.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

from gpusvc import names
from gpusvc.config import presets, resource_control
from gpusvc.config.host import SHORTEST_SECONDS, BusyAction, HostConfig
from gpusvc.config.presets import Probe, StopSignal
from gpusvc.config.section import (
    Section,
    boolean,
    choice,
    composed,
    custom,
    devices,
    duration,
    duration_or_word,
    integer,
    outside,
    read,
    section,
    size,
    text,
)
from gpusvc.config.serving import Serving, read_serving
from gpusvc.config.table import Table, did_you_mean
from gpusvc.gpu.nodes import is_of_a_gpu
from gpusvc.gpu.selector import DeviceSelector
from gpusvc.gpu.visible import DeviceIds
from gpusvc.paths import is_user_instance
from gpusvc.quantity import MIB, shown

# Variables of the engine's environment that the launcher sets, and why a file may not set them.
OWNED_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "gpusvc sets it to the GPUs that the model gets; see devices and device_ids in [gpu].",
    "CUDA_DEVICE_ORDER": "gpusvc sets it, so that an index means the same GPU to every program.",
    "PORT": "gpusvc sets it to the port that the engine must listen on; see port.",
    "NOTIFY_SOCKET": "gpusvc tells systemd itself when the engine is ready.",
}

# Enough to order a thousand models; the bound catches typing errors.
MAX_PRIORITY = 1000


def default_user() -> str:
    """The user of engines: the package's, or the one whose service manager runs this instance."""
    return pwd.getpwuid(os.getuid()).pw_name if is_user_instance() else "gpusvc"


def _read_env(table: Table, key: str, _default: object) -> dict[str, str]:
    env = table.words(key, (str, int))
    for variable in env:
        if variable in OWNED_VARIABLES:
            table.problem(f"{key}.{variable}", "It cannot be set.", OWNED_VARIABLES[variable])
        elif not variable or "=" in variable or not variable.isprintable():
            table.problem(f"{key}.{variable}", f"{shown(variable)} cannot name a variable.")
    return env


def _read_engine(table: Table, key: str, default: str | None) -> str | None:
    engine = table.text(key, default)
    if engine is not None and engine not in presets.PRESETS:
        hint = did_you_mean(engine, presets.PRESETS) or "For any other engine write its command."
        table.problem(key, f"{shown(engine)} is no preset: there are {', '.join(presets.PRESETS)}.", hint)
    return engine


def _read_upstream_key(table: Table, key: str, default: str | None) -> str | None:
    """A file, an option of the command, or a credential. What it holds is not looked at here."""
    source = table.text(key, default)
    if source is None or source.startswith("/"):
        return source
    name = source.removeprefix("--")
    if not name or name.startswith("-") or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
        # A key that stands here would be shown wherever the configuration is.
        hint = "Write the path of a file, the name of a credential, or an option of the command such as --api-key."
        table.problem(key, "It does not say where the key is.", hint)
        return default
    return source


def _read_working_directory(table: Table, key: str, default: Path) -> Path:
    directory = Path(table.text(key, str(default)))
    if not directory.is_absolute():
        table.problem(key, f"{shown(str(directory))} is not an absolute path.")
        return default
    return directory


def _read_exclusive(table: Table, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    groups = table.texts(key)
    if groups is None:
        return default
    listed: set[str] = set()
    for position, entry in enumerate(groups):
        place = f"{key}[{position}]"
        group, slash, side = entry.partition("/")
        if not names.is_name(group) or (slash and not names.is_name(side)):
            hint = "It is written as a model's name: letters, digits, ':', '_', '.' or '-'."
            table.problem(place, f"{shown(entry)} cannot name a group.", hint)
        elif group in listed:
            table.problem(place, f"{shown(group)} is listed twice.")
        listed.add(group)
    return groups


def _read_scope(table: Table, key: str, _default: object) -> dict[str, str]:
    scope = table.words(key, (str, int, bool))
    for name, value in scope.items():
        place = f"{key}.{name}"
        if not value.isprintable():
            table.problem(place, f"{shown(value)} has characters that cannot be printed.")
        if name in resource_control.OWNED:
            table.problem(place, "gpusvc decides this property itself.", resource_control.OWNED[name])
        elif name in resource_control.LEGACY:
            table.problem(place, "It belongs to cgroup v1.", f"Use {resource_control.LEGACY[name]}.")
        elif name not in resource_control.PROPERTIES:
            hint = did_you_mean(name, resource_control.PROPERTIES) or resource_control.ELSEWHERE
            table.problem(place, "It is no property of systemd.resource-control(5).", hint)
    return scope


def _read_nodes(table: Table, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    nodes = table.texts(key)
    for position, node in enumerate(nodes or ()):
        place = f"{key}[{position}]"
        if not node.startswith("/dev/") or "/../" in node or not node.isprintable():
            table.problem(
                place, f"{shown(node)} is not the path of a device node.", 'For example "/dev/infiniband/uverbs0".'
            )
        elif is_of_a_gpu(node):
            table.problem(place, f"{shown(node)} belongs to a GPU.", "The model gets the nodes of its own GPUs anyway.")
    return default if nodes is None else nodes


class GpuRequest(Section):
    """What a model asks of the GPUs."""

    count: int = integer("count", default=1, minimum=0, maximum=1024)  # 0: it needs none
    devices: tuple[str, ...] = devices("devices", default=())  # empty: any GPU
    vram_bytes: int | None = size("vram", default=None, minimum=MIB)  # on each GPU; None: not declared
    nodes: tuple[str, ...] = custom("nodes", _read_nodes, default=())
    """Further device nodes that the engine may open."""
    device_ids: DeviceIds = choice("device_ids", default=DeviceIds.AUTO)
    """How CUDA_VISIBLE_DEVICES names the GPUs."""


class ModelConfig(Section, kw_only=True):
    """One model, ``models/NAME.toml``, with all defaults filled in."""

    name: str = outside()
    serving: Serving = section("", Serving)
    engine: str | None = custom("engine", _read_engine, default=None)
    model: str | None = text("model", default=None)
    args: tuple[str, ...] = composed("args", shown=False)
    """A preset's further arguments. They are in ``command`` too."""
    command: tuple[str, ...] = composed("command")
    """With the preset expanded; ``{port}`` is still in its place."""
    user: str = text("user", default=default_user)
    env: Mapping[str, str] = custom("env", _read_env, default=dict)
    working_directory: Path = custom("working_directory", _read_working_directory, default=Path("/"))
    port: int = integer("port", default=0, minimum=0, maximum=65535)  # 0: any free one
    upstream_key: str | None = custom("upstream_key", _read_upstream_key, default=None)
    """Where the API key is that the engine asks for: a path, a credential, or an option of ``command``."""
    probe: Probe | None = composed("probe", shown=False)
    """The request for one token by which the watchdog tries an engine; None: it is not tried."""
    health: str = composed("health")  # a path; "": the open port is enough
    start_timeout_seconds: float = duration("start_timeout", default=600.0)  # without progress
    stop_signal: StopSignal = composed("stop_signal")
    """That ends the engine when it is evicted."""
    stop_timeout_seconds: float = duration("stop_timeout", default=10.0)
    release_timeout_seconds: float = duration("release_timeout", host="release_timeout")
    health_timeout_seconds: float = duration("health_timeout", default=60.0, zero=True)
    """0: an engine that does not answer is left alone."""
    idle_timeout_seconds: float = duration(
        "idle_timeout", host="watchdog.idle_timeout", minimum=SHORTEST_SECONDS, zero=True, live=True
    )
    """Without use; 0: never."""
    busy_timeout_seconds: float = duration(
        "busy_timeout", host="watchdog.busy_timeout", minimum=SHORTEST_SECONDS, zero=True, live=True
    )
    """In use without progress; 0: never."""
    attached_timeout_seconds: float | None = duration_or_word(
        "attached_timeout",
        "idle_timeout",
        host="watchdog.attached_timeout",
        minimum=SHORTEST_SECONDS,
        zero=True,
        live=True,
    )
    """Without use, while clients keep quiet WebSockets open; 0: never; None: the idle timeout."""
    failing_time_seconds: float = duration(
        "failing_time", host="watchdog.failing_time", minimum=SHORTEST_SECONDS, zero=True, live=True
    )
    """Of server errors without a success; 0: never."""
    busy_action: BusyAction = choice("busy_action", host="watchdog.busy_action", live=True)
    abandon_after_seconds: float | None = duration_or_word(
        "abandon_after", "learned", minimum=SHORTEST_SECONDS, live=True
    )
    """How long a start goes on after the last client that waited for it left; None: as loads of the model suggest."""
    priority: int = integer("priority", default=0, minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY, live=True)
    """The lowest is evicted first."""
    pinned: bool = boolean("pinned", default=False, live=True)  # never evicted
    exclusive: tuple[str, ...] = custom("exclusive", _read_exclusive, default=(), live=True)
    """``GROUP`` or ``GROUP/SIDE``; placement.plan.exclude_each_other() says what they mean."""
    ram_bytes: int | None = size("ram", default=None, minimum=MIB)
    """Of host memory; None: not declared."""
    gpu: GpuRequest = section("gpu", GpuRequest)
    scope: Mapping[str, str] = custom("scope", _read_scope, default=dict)
    """systemd.resource-control(5) properties, verbatim."""
    caller: Path | None = outside()
    """The socket of the `gpusvc run` that runs it; None: it has a file of its own."""

    @property
    def description(self) -> str:
        return self.serving.description

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.serving.aliases

    def digest(self) -> str:
        """Eight hexadecimal digits that change with whatever decides how much VRAM the engine takes."""
        import json  # noqa: PLC0415 - only footprints need it
        import zlib  # noqa: PLC0415

        # A checksum, as hashlib would load libcrypto into every launcher.
        footprint = [self.command, sorted(self.env.items()), self.gpu.count]
        return f"{zlib.crc32(json.dumps(footprint).encode()):08x}"


def read_run(table: Table, name: str, host: HostConfig) -> ModelConfig:
    """The model of `gpusvc run`: like any other, but with its caller, and its arguments without placeholders."""
    caller, arguments = table.text("caller", ""), table.texts("arguments") or ()
    model = read_model(table, name, host)
    return model.replace(command=(*model.command, *arguments), caller=Path(caller))


def read_model(table: Table, name: str, host: HostConfig) -> ModelConfig:
    """The model's configuration in ``table``. What is wrong is noted there, and a default stands in for it."""
    serving = read_serving(table, name)
    values = read(ModelConfig, table, host)
    args = table.texts("args") or ()
    preset = presets.PRESETS.get(values["engine"] or "")
    served = None
    if preset is not None and values["model"] is not None:
        served = presets.Served(values["model"], (name, *serving.aliases), values["gpu"].count)
    _check_gpu(table.table("gpu"), values["gpu"])
    return ModelConfig(
        name=name,
        serving=serving,
        args=args,
        command=_read_command(table, preset, served, args),
        probe=_read_probe(table, preset, served),
        health=_read_health(table, preset),
        stop_signal=table.choice("stop_signal", preset.stop_signal if preset else StopSignal.TERM),
        caller=None,
        **values,
    )


def _read_command(
    table: Table, preset: presets.Preset | None, served: presets.Served | None, args: tuple[str, ...]
) -> tuple[str, ...]:
    """The command, from ``command`` or from ``engine``, ``model`` and ``args``; empty if there is none."""
    command = table.texts("command")
    if table.has("command"):
        for key in ("engine", "model", "args"):
            if table.has(key):
                table.problem(key, "It cannot stand beside command.", "Give either command, or engine, model and args.")
        if command is not None and not any(command[:1]):
            table.problem("command", "It names no program.")
    elif table.has("engine"):
        command = _expand(table, preset, served, args)
    else:
        table.problem("command", "It is missing.", "Say what to run, or give engine and model.")
        for key in ("model", "args"):
            if table.has(key):
                table.problem(key, "It means nothing without engine.", f"Presets: {', '.join(presets.PRESETS)}.")

    misplaced = presets.misplaced_placeholder((command or ()) + (args if command is None else ()))
    if misplaced is not None:
        key = "args" if misplaced in args else "command"
        table.problem(key, f"{shown(misplaced)} is not replaced by anything.", "The one placeholder is {port}.")
    return command if command and command[0] else ()


def _expand(
    table: Table, preset: presets.Preset | None, served: presets.Served | None, args: tuple[str, ...]
) -> tuple[str, ...] | None:
    """The command of a preset; None if the preset or its model is not known."""
    if not table.has("model"):
        table.problem("model", "It is missing.", "Say which model the engine serves: a path, or a repository's name.")
    if preset is None or served is None:
        return None
    try:
        preset.require_name(served.model)
    except ValueError as error:
        table.problem("model", str(error))
    return preset.command(served) + args


def _read_probe(table: Table, preset: presets.Preset | None, served: presets.Served | None) -> Probe | None:
    """The probe of the file, or else the preset's; None if there is neither."""
    values = table.json("probe")
    if not table.has("probe"):
        return None if preset is None or served is None else preset.probe(served)
    path, body = values.get("path"), values.get("body", {})
    for name in values.keys() - {"path", "body"}:
        table.problem(f"probe.{name}", "There is no such key.", "A probe has a path and a body.")
    if (
        not isinstance(path, str)
        or not path.startswith("/")
        or not path.isascii()
        or not path.isprintable()
        or " " in path
    ):
        table.problem("probe.path", "It must be the path of a request for one token, such as /v1/completions.")
        return None
    if not isinstance(body, dict):
        table.problem("probe.body", "It must be a table, which is sent as JSON.")
        return None
    return Probe(path, body)


def _read_health(table: Table, preset: presets.Preset | None) -> str:
    health = table.text("health", preset.health if preset else "/health")
    if health and not health.startswith("/"):
        table.problem("health", f"{shown(health)} does not begin with '/'.", 'Write a path, or "" for none.')
    elif not health.isascii() or not health.isprintable() or " " in health:
        table.problem("health", f"{shown(health)} has characters that a URL cannot have.")
    return health


def _check_gpu(table: Table, request: GpuRequest) -> None:
    """Note keys of [gpu] that contradict each other."""
    if request.count == 0:
        for key in ("devices", "vram", "device_ids", "nodes"):
            if table.has(key):
                table.problem(key, "It means nothing where count is 0.")
    selectors = [DeviceSelector.parse(device) for device in request.devices]
    if selectors and len(selectors) < request.count and all(selector.is_single for selector in selectors):
        table.problem("devices", f"It names fewer GPUs ({len(selectors)}) than count asks for ({request.count}).")
