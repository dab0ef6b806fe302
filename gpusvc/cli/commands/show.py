"""``ps``, ``list``, ``status``, ``gpus``: show models and GPUs as tables and as JSON."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli import table
from gpusvc.cli.arguments import JSON, NAME, paths_of
from gpusvc.errors import GpusvcError, NvmlError, NvmlUnavailableError
from gpusvc.paths import is_user_instance
from gpusvc.printable import printable
from gpusvc.quantity import format_duration

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.paths import Paths
    from gpusvc.status.gpus import GpuStatus, Holder
    from gpusvc.status.models import ModelProcess, ModelState, ModelStatus
    from gpusvc.status.standing import Standing
    from gpusvc.watchdog.verdicts import LastVerdict

_LOG_LINES = 10
_COMMAND_WIDTH = 50

# Keys are the values of judge.Source.
_EVIDENCE = {"NVML": "use of the GPU", "CPU time": "CPU time"}


_WIDE: Any = typer.Option(False, "--wide", "-w", help="Show also what models take, their use and their priority.")


def ps(context: typer.Context, *, wide: bool = _WIDE, as_json: bool = JSON) -> None:
    """Show the models that run, failed or are stuck."""
    _show_models(paths_of(context), (), wide=wide, as_json=as_json)


def list_(context: typer.Context, *, wide: bool = _WIDE, as_json: bool = JSON) -> None:
    """Show all models, stopped ones too."""
    from gpusvc.config.files import model_names

    paths = paths_of(context)
    _show_models(paths, model_names(paths), wide=wide, as_json=as_json)


def status(context: typer.Context, name: str = NAME, *, as_json: bool = JSON) -> None:
    """Show everything about one model."""
    from gpusvc.journal import lastwords
    from gpusvc.journal import units as unitlog
    from gpusvc.state import lease
    from gpusvc.status import inventory
    from gpusvc.systemd.manager import Manager
    from gpusvc.watchdog import verdicts

    paths = paths_of(context)
    with Manager() as manager:
        name = inventory.resolve(paths, name, also=[*inventory.units(manager), *lease.holders(paths)])
        model, processes = inventory.model(paths, manager, name, lambda: _read_gpus(paths))
    log = lastwords.last_words(*unitlog.own_lines(name), lines=_LOG_LINES)
    last = verdicts.read(paths).get(name)
    if as_json:
        more = {
            "verdict": None if last is None else last.kind,
            "evidence": None if last is None else last.source,
            "file": str(paths.model_file(name)),
            "processes": [process.to_json() for process in processes],
            "log": log,
        }
        table.print_json(model.to_json() | more)
    else:
        table.print_lines(_card(paths, model, last, processes, log))


def gpus(context: typer.Context, *, as_json: bool = JSON) -> None:
    """Show the GPUs, and who holds how much of each."""
    from gpusvc.state import hung
    from gpusvc.status import inventory

    try:
        with hung.driver(paths_of(context)) as driver:
            readings = driver.snapshot(utilisation=True)
    except NvmlUnavailableError as error:
        # A machine without GPUs is no error. A failing driver is.
        _note(error)
        readings = ()
    statuses = inventory.gpus(paths_of(context), readings)
    if as_json:
        table.print_json([gpu.to_json() for gpu in statuses])
    elif statuses:
        table.print_lines(_gpu_lines(statuses))


def _show_models(paths: Paths, more: Sequence[str], *, wide: bool, as_json: bool) -> None:
    from gpusvc.status import inventory
    from gpusvc.systemd.manager import Manager

    with Manager() as manager:
        models = inventory.models(paths, manager, lambda: _read_gpus(paths), more=more, standing=wide or as_json)
    if as_json:
        table.print_json([model.to_json() for model in models])
        return
    now = time.time()
    head: tuple[str, ...] = ("NAME", "STATE", "GPU", "VRAM", "PORT", "PID", "SINCE")
    if wide:
        # The columns of VRAM stand side by side.
        head = ("NAME", "STATE", "GPU", "DECLARED", "LEARNED", "USED", "USE", "PRIORITY", *head[4:])
    rows = [[_cell(title, model, now) for title in head] for model in models]
    lines = table.table(head, rows, right=("VRAM", "DECLARED", "LEARNED", "USED", "PRIORITY", "PORT", "PID"))
    table.print_lines([*lines, *_line_lines(paths, now)])


def _line_lines(paths: Paths, now: float) -> list[str]:
    """Return the line of starts that wait for room, the next one first."""
    from gpusvc.state import line

    waiting = line.read(paths)
    return ["", "Waiting for room:", *(f"  {printable(each.sentence(now))}" for each in waiting)] if waiting else []


def _cell(title: str, model: ModelStatus, now: float) -> str:
    standing = model.standing
    match title:
        case "NAME":
            return model.name
        case "STATE":
            return str(model.state)
        case "GPU":
            return ",".join(str(gpu.index) for gpu in model.gpus) or table.UNKNOWN
        case "VRAM" | "USED":
            return table.size(model.vram_bytes) if model.gpus else table.UNKNOWN
        case "PORT":
            return table.number(model.port)
        case "PID":
            return table.number(model.pid)
        case "SINCE":
            return table.UNKNOWN if model.since is None else table.age(now - model.since)
        case "DECLARED" if standing is not None:
            return table.size(standing.declared_bytes)
        case "LEARNED" if standing is not None:
            return table.size(standing.learned_bytes)
        case "PRIORITY" if standing is not None:
            return table.number(standing.priority)
        case "USE" if standing is not None:
            words = [_use(model.state, standing, now), "pinned" if standing.pinned else None]
            return ", ".join(word for word in words if word is not None) or table.UNKNOWN
        case _:
            return table.UNKNOWN


def _use(state: ModelState, standing: Standing, now: float) -> str | None:
    """Return "in use" or for how long the model is idle; None if it is not ready or that is unknown."""
    from gpusvc.status.models import ModelState

    if standing.in_use and state in {ModelState.READY, ModelState.STARTING}:
        return "in use"
    if standing.in_use is False and standing.last_use is not None and state is ModelState.READY:
        return f"idle {table.age(now - standing.last_use)}"
    return None


def _read_gpus(paths: Paths) -> tuple[Gpu, ...] | None:
    from gpusvc.state import hung

    try:
        with hung.driver(paths) as driver:
            return driver.snapshot()
    except NvmlError as error:
        _note(error)
        return None


def _note(error: NvmlError) -> None:
    typer.echo(f"Note: {error}", err=True)


def _card(
    paths: Paths,
    model: ModelStatus,
    last: LastVerdict | None,
    processes: Sequence[ModelProcess],
    log: Sequence[str],
) -> list[str]:
    from gpusvc.status.models import ModelState, url

    facts = [("State", str(model.state) if model.since is None else f"{model.state} since {_when(model.since)}")]
    facts.append(("Status", printable(model.text)))
    if model.waiting is not None:
        facts.append(("Waits", f"{model.waiting.sentence(time.time())} Place {model.waiting.position} in the line."))
    facts += [("GPU", f"{gpu.index} ({gpu.uuid})") for gpu in model.gpus]
    if model.gpus:
        reserved = "" if model.reserved_bytes is None else f", {table.size(model.reserved_bytes)} reserved"
        facts.append(("VRAM", f"{table.size(model.vram_bytes)}{reserved}"))
        if is_user_instance():
            facts.append(("Isolation", "its environment alone: a user's manager filters no devices"))
    if model.standing is not None:
        facts += _about_standing(model.state, model.standing)
    if last is not None and last.source is not None:
        facts.append(("Work", f"seen by the watchdog in its processes' {_EVIDENCE[last.source]}"))
    if model.address is not None and model.port is not None and model.state is ModelState.READY:
        facts.append(("Address", url(model.address, model.port)))
    elif model.port is not None:
        facts.append(("Port", str(model.port)))
    if model.pid is not None:
        facts.append(("PID", str(model.pid)))
    if model.scope is not None:
        facts.append(("Scope", model.scope))
    facts.append(("File", _about_file(paths, model.name)))
    width = max(len(title) for title, _ in facts)
    lines = [model.name, *(f"  {title.ljust(width)}  {text}" for title, text in facts)]
    if processes:
        rows = [
            (str(process.pid), table.size(process.vram_bytes), printable(process.command or "[gone]"))
            for process in processes
        ]
        lines += ["", *_indented(table.table(("PID", "VRAM", "COMMAND"), rows, right=("PID", "VRAM")))]
    if log:
        lines += ["", *_indented([printable(line) for line in log])]
    return lines


def _about_standing(state: ModelState, standing: Standing) -> Iterator[tuple[str, str]]:
    footprint = [
        f"{table.size(size)} {how}"
        for size, how in ((standing.declared_bytes, "declared"), (standing.learned_bytes, "seen at most"))
        if size is not None
    ]
    if footprint:
        yield "Takes", ", ".join(footprint)
    use = _use(state, standing, time.time())
    if use is not None:
        yield "Use", use
    pins = [
        how
        for is_so, how in ((standing.pinned_by_file, "by its file"), (standing.pinned_by_hand, "until the next boot"))
        if is_so
    ]
    if pins:
        yield "Pinned", " and ".join(pins)
    if standing.is_kept_by_client and standing.idle_timeout_seconds is not None:
        limit = standing.idle_timeout_seconds
        yield "Kept by", f"a client, until it {f'is idle for {format_duration(limit)}' if limit else 'stops'}"
    if standing.priority:
        yield "Priority", str(standing.priority)


def _about_file(paths: Paths, name: str) -> str:
    """Return the path of the model's file, or the error in it."""
    from gpusvc.config.files import load_host, load_startable_model

    try:
        load_startable_model(paths, name, load_host(paths))
    except GpusvcError as error:
        return error.message
    return str(paths.model_file(name))


def _when(since: float) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(since))
    return f"{moment} ({table.age(time.time() - since)})"


def _gpu_lines(statuses: Sequence[GpuStatus]) -> list[str]:
    head = ("GPU", "NAME", "TOTAL", "USED", "FREE", "RESERVED", "LOAD", "HELD BY")
    rows: list[tuple[str, ...]] = []
    for status in statuses:
        gpu = status.gpu
        held_by = [_holder(holder) for holder in status.holders]
        if gpu.problem is not None:
            held_by.insert(0, gpu.problem)
        rows.append(
            (
                str(gpu.index),
                gpu.name,
                table.size(gpu.total_bytes),
                table.size(gpu.used_bytes),
                table.size(gpu.free_bytes),
                table.size(status.reserved_bytes),
                table.UNKNOWN if gpu.utilisation_percent is None else f"{gpu.utilisation_percent} %",
                held_by[0] if held_by else table.UNKNOWN,
            )
        )
        rows += [("",) * (len(head) - 1) + (line,) for line in held_by[1:]]
    return table.table(head, rows, right=head[2:7])


def _holder(holder: Holder) -> str:
    who = holder.model or f"PID {holder.pid} ({table.shortened(holder.command or 'gone', _COMMAND_WIDTH)})"
    return f"{who}: {table.size(holder.vram_bytes)}"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
