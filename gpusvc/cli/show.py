"""``ps``, ``list``, ``status``, ``gpus``: what there is, as tables and as JSON."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from gpusvc.cli import journal, table
from gpusvc.cli.arguments import JSON, NAME, paths_of
from gpusvc.errors import GpusvcError, NvmlError, NvmlUnavailableError

if TYPE_CHECKING:
    from gpusvc.gpu import Gpu
    from gpusvc.inventory import GpuStatus, Holder, ModelProcess, ModelStatus
    from gpusvc.paths import Paths

_LOG_LINES = 10
_COMMAND_WIDTH = 50


def ps(context: typer.Context, *, as_json: bool = JSON) -> None:
    """Show the models that run, failed or are stuck."""
    _show_models(paths_of(context), (), as_json=as_json)


def list_(context: typer.Context, *, as_json: bool = JSON) -> None:
    """Show all models, those that are stopped too."""
    from gpusvc.config import model_names

    paths = paths_of(context)
    _show_models(paths, model_names(paths), as_json=as_json)


def status(context: typer.Context, name: str = NAME, *, as_json: bool = JSON) -> None:
    """Show all there is to know of one model."""
    from gpusvc import inventory, lease
    from gpusvc.systemd import Manager

    paths = paths_of(context)
    with Manager() as manager:
        name = inventory.resolve(paths, name, also=[*inventory.units(manager), *lease.holders(paths)])
        model, processes = inventory.model(paths, manager, name, _read_gpus)
    log = journal.last_lines(name, _LOG_LINES)
    file = paths.model_file(name)
    if as_json:
        more = {"file": str(file), "processes": [process.to_json() for process in processes], "log": log}
        table.print_json(model.to_json() | more)
    else:
        table.print_lines(_card(paths, model, processes, log))


def gpus(context: typer.Context, *, as_json: bool = JSON) -> None:
    """Show the GPUs, and who holds how much of each."""
    from gpusvc import inventory
    from gpusvc.nvml import Nvml

    try:
        with Nvml() as nvml:
            readings = nvml.snapshot(utilisation=True)
    except NvmlUnavailableError as error:
        # A machine without GPUs is a normal machine. One whose driver fails is not.
        _note(error)
        readings = ()
    statuses = inventory.gpus(paths_of(context), readings)
    if as_json:
        table.print_json([gpu.to_json() for gpu in statuses])
    elif statuses:
        table.print_lines(_gpu_lines(statuses))


def _show_models(paths: Paths, more: Sequence[str], *, as_json: bool) -> None:
    from gpusvc import inventory
    from gpusvc.systemd import Manager

    with Manager() as manager:
        models = inventory.models(paths, manager, _read_gpus, more=more)
    if as_json:
        table.print_json([model.to_json() for model in models])
        return
    now = time.time()
    rows = [
        (
            model.name,
            str(model.state),
            _indices(model),
            table.size(model.vram_bytes) if model.gpus else table.UNKNOWN,
            table.number(model.port),
            table.number(model.pid),
            table.UNKNOWN if model.since is None else table.age(now - model.since),
        )
        for model in models
    ]
    table.print_lines(
        table.table(("NAME", "STATE", "GPU", "VRAM", "PORT", "PID", "SINCE"), rows, right=("VRAM", "PORT", "PID"))
    )


def _read_gpus() -> tuple[Gpu, ...] | None:
    from gpusvc.nvml import Nvml

    try:
        with Nvml() as nvml:
            return nvml.snapshot()
    except NvmlError as error:
        _note(error)
        return None


def _note(error: NvmlError) -> None:
    typer.echo(f"Note: {error}", err=True)


def _indices(model: ModelStatus) -> str:
    return ",".join(str(gpu.index) for gpu in model.gpus) or table.UNKNOWN


def _card(paths: Paths, model: ModelStatus, processes: Sequence[ModelProcess], log: Sequence[str]) -> list[str]:
    from gpusvc.inventory import ModelState

    facts = [("State", str(model.state) if model.since is None else f"{model.state} since {_when(model.since)}")]
    facts.append(("Status", table.printable(model.text)))
    facts += [("GPU", f"{gpu.index} ({gpu.uuid})") for gpu in model.gpus]
    if model.gpus:
        reserved = "" if model.reserved_bytes is None else f", {table.size(model.reserved_bytes)} reserved"
        facts.append(("VRAM", f"{table.size(model.vram_bytes)}{reserved}"))
    if model.address is not None and model.state is ModelState.READY:
        host = f"[{model.address}]" if ":" in model.address else model.address
        facts.append(("Address", f"http://{host}:{model.port}"))
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
            (str(process.pid), table.size(process.vram_bytes), table.printable(process.command or "[gone]"))
            for process in processes
        ]
        lines += ["", *_indented(table.table(("PID", "VRAM", "COMMAND"), rows, right=("PID", "VRAM")))]
    if log:
        lines += ["", *_indented([table.printable(line) for line in log])]
    return lines


def _about_file(paths: Paths, name: str) -> str:
    """The model's file, and what is wrong with it."""
    from gpusvc.config import load_host, load_model

    try:
        load_model(paths, name, load_host(paths))
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
