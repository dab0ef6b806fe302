"""The screen of ``top``: values in, lines out. It knows neither the keyboard nor the clock."""
# ruff: noqa: PLC0415 - rich is loaded by who draws

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from gpusvc.cli import table
from gpusvc.printable import printable
from gpusvc.quantity import format_amount, format_duration, format_size
from gpusvc.status.gpus import GpuStatus
from gpusvc.status.models import ModelState, ModelStatus

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


class Order(StrEnum):
    """The order of the models."""

    NAME = "name"
    VRAM = "VRAM"
    IDLE = "idle time"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one moment. Times are in seconds; None means unknown or never."""

    status: ModelStatus
    in_use: bool | None
    idle_seconds: float | None
    leaves_in_seconds: float | None
    """When the watchdog evicts it if nobody comes; None: never."""
    pinned: bool
    rank: int | None
    """Its place among those that would make room for others: 1 goes first. None: it would not."""

    @property
    def name(self) -> str:
        return self.status.name


@dataclass(frozen=True, slots=True)
class View:
    """Everything on the screen."""

    gpus: tuple[GpuStatus, ...]
    rows: tuple[Row, ...]
    events: tuple[str, ...]
    clock: str
    line: tuple[str, ...] = ()
    """A sentence for each start that waits for room, the next one first."""
    order: Order = Order.NAME
    filter: str = ""
    chosen: str | None = None
    message: str = ""
    typing: bool = False


_STYLES = {
    ModelState.READY: "green",
    ModelState.STARTING: "cyan",
    ModelState.STOPPING: "yellow",
    ModelState.STUCK: "bold red",
    ModelState.FAILED: "red",
    ModelState.STOPPED: "dim",
}
# Colours of the models on a GPU, in order; foreign processes have their own colour.
_COLOURS = ("green", "blue", "magenta", "cyan", "bright_blue", "bright_magenta")
_FOREIGN = "yellow"
_KEYS = "↑↓ choose  s start  x stop  p pin  o order  / filter  q quit"
_WIDE = 110


def arranged(view: View) -> tuple[Row, ...]:
    """Return the rows that match the filter, in order."""
    keys: dict[Order, Callable[[Row], tuple[float | str, ...]]] = {
        Order.NAME: lambda row: (row.name,),
        Order.VRAM: lambda row: (-(row.status.vram_bytes or 0), row.name),
        Order.IDLE: lambda row: (-(row.idle_seconds if row.idle_seconds is not None else -1), row.name),
        Order.STATE: lambda row: (list(_STYLES).index(row.status.state), row.name),
    }
    wanted = view.filter.lower()
    rows = (row for row in view.rows if wanted in row.name.lower() or wanted in str(row.status.state))
    return tuple(sorted(rows, key=keys[view.order]))


def plain(view: View) -> list[str]:
    """Return the view as lines of text, for a pipe."""
    lines = [f"gpusvc top, {view.clock}"]
    for each in view.gpus:
        gpu = each.gpu
        busy = "" if gpu.utilisation_percent is None else f", {gpu.utilisation_percent} % busy"
        free = gpu.problem or f"{format_amount(gpu.free_bytes)} of {format_amount(gpu.total_bytes)} free{busy}"
        lines.append(f"GPU {gpu.index} {gpu.name}: {free}")
        lines += [f"  {_held(holder)}" for holder in each.holders]
    rows = [_cells(row) for row in arranged(view)]
    lines += table.table(_HEAD, rows, right=("VRAM",))
    return [*lines, *(f"  {sentence}" for sentence in view.line)]


_HEAD = ("NAME", "STATE", "GPU", "VRAM", "USE", "LEAVES", "NEXT")


def _cells(row: Row) -> tuple[str, ...]:
    status = row.status
    return (
        row.name,
        str(status.state),
        ",".join(str(gpu.index) for gpu in status.gpus) or table.UNKNOWN,
        table.size(status.vram_bytes) if status.gpus else table.UNKNOWN,
        _use(row),
        _leaves(row),
        table.UNKNOWN if row.rank is None else f"#{row.rank}",
    )


def _use(row: Row) -> str:
    if row.status.state is not ModelState.READY:
        return table.UNKNOWN
    if row.in_use:
        return "in use"
    return table.UNKNOWN if row.idle_seconds is None else f"idle {clock(row.idle_seconds)}"


def _leaves(row: Row) -> str:
    if row.pinned:
        return "pinned"
    if row.status.state is not ModelState.READY or row.in_use:
        return table.UNKNOWN
    return "never" if row.leaves_in_seconds is None else f"in {clock(max(0.0, row.leaves_in_seconds))}"


def clock(seconds: float) -> str:
    """Return a time span as ``4:05`` or ``1:02:03``, in days if it is longer."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return format_duration(hours // 24 * 86400)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _held(holder: object) -> str:
    model = getattr(holder, "model", None)
    amount = format_amount(getattr(holder, "vram_bytes", None))
    if model is not None:
        return f"{model}: {amount}"
    return table.shortened(f"PID {getattr(holder, 'pid', None)} {getattr(holder, 'command', '')}: {amount}", 100)


def drawn(view: View, width: int, height: int) -> RenderableType:
    """Return the screen for a terminal of this size. Rows that do not fit are left out and counted."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = [_title(view, width)]
    gpus = [line for gpu in view.gpus for line in _gpu_lines(gpu, width)]
    # Many GPUs must leave room for the models.
    most = max(2, (height - 4) // 2)
    if len(gpus) > most:
        gpus = [*gpus[: most - 1], Text(f"… and {len(view.gpus) - (most - 1) // 2} GPUs more", style="dim")]
    lines += gpus
    lines.append(Text(""))
    rows = arranged(view)
    rest = height - len(lines) - 2
    shown_line = min(len(view.line), max(1, rest // 4))
    rest -= shown_line
    shown_events = min(len(view.events), max(0, min(5, rest - len(rows) - 3)))
    room = max(1, rest - (shown_events + 1 if shown_events else 0) - 1)
    lines += _model_lines(view, rows, width, room)
    lines += [Text(table.shortened(each, width), style="cyan", no_wrap=True) for each in view.line[:shown_line]]
    if shown_events:
        lines.append(Text(""))
        lines += [
            Text(table.shortened(event, width), style="dim", no_wrap=True) for event in view.events[-shown_events:]
        ]
    lines = [*lines, *[Text("")] * height][: height - 1]
    lines.append(_footer(view, width))
    return Group(*lines)


def _title(view: View, width: int) -> Text:
    from rich.text import Text

    up = sum(row.status.state is ModelState.READY for row in view.rows)
    left = f"gpusvc top  {up} ready of {len(view.rows)} models"
    left += f"  by {view.order}" + (f'  filter "{view.filter}"' if view.filter and not view.typing else "")
    left = _fitted(left, max(1, width - len(view.clock) - 1))
    return Text(f"{left} {view.clock}"[:width], style="bold", no_wrap=True)


def _gpu_lines(status: GpuStatus, width: int) -> list[Text]:
    """Return a bar with one segment for each holder, and the legend below it."""
    from rich.text import Text

    gpu = status.gpu
    head = f"GPU {gpu.index} "
    if gpu.problem is not None or not gpu.total_bytes:
        said = gpu.problem or "shares the memory of the CPU"
        return [Text(table.shortened(f"{head}{gpu.name}: {said}", width), style="red", no_wrap=True)]
    busy = "" if gpu.utilisation_percent is None else f" {gpu.utilisation_percent:3} %"
    amounts = f" {format_size(gpu.used_bytes or 0)} of {format_size(gpu.total_bytes)}{busy}"
    cells = max(8, width - len(head) - len(amounts) - 2)
    bar, legend = Text("▕", no_wrap=True), Text(" " * len(head), no_wrap=True)
    filled = 0
    parts = [(holder.model, holder.vram_bytes or 0) for holder in status.holders]
    known = sum(size for _, size in parts)
    parts.append((None, max(0, (gpu.used_bytes or 0) - known)))
    colours = iter(_COLOURS * 8)
    for model, size in parts:
        if not size:
            continue
        colour = next(colours) if model is not None else _FOREIGN
        share = min(cells - filled, max(1, round(size / gpu.total_bytes * cells)))
        bar.append("█" * share, style=colour)
        filled += share
        legend.append("■ ", style=colour)
        legend.append(f"{model or 'others'} {format_size(size)}  ")
    bar.append("░" * (cells - filled), style="dim")
    bar.append("▏")
    line = Text(head, style="bold", no_wrap=True)
    line.append_text(bar)
    line.append(amounts)
    legend.append(f"{format_amount(gpu.free_bytes)} free", style="dim")
    legend.truncate(width, overflow="ellipsis")
    line.truncate(width)
    return [line, legend]


def _model_lines(view: View, rows: Sequence[Row], width: int, room: int) -> list[Text]:
    from rich.text import Text

    if not rows:
        empty = "No model fits the filter." if view.filter else "No model is configured: `gpusvc add` makes one."
        return [Text(empty, style="dim")]
    # The chosen row is always visible.
    place = next((number for number, row in enumerate(rows) if row.name == view.chosen), 0)
    first = max(0, min(place - room // 2, len(rows) - room))
    cells = [_cells(row) for row in rows]
    lines = table.table(_HEAD, cells, right=("VRAM",))
    head = Text(_fitted(lines[0], width), style="bold underline", no_wrap=True)
    shown = [head]
    for row, line in list(zip(rows, lines[1:], strict=True))[first : first + room]:
        text = line
        if width >= _WIDE and row.status.text:
            text = f"{line:<{max(map(len, lines))}}  {printable(row.status.text)}"
        style = _STYLES[row.status.state]
        shown.append(Text(_fitted(text, width), style=f"{style} reverse" if row.name == view.chosen else style))
    for each in shown:
        each.no_wrap = True
    return shown


def _fitted(line: str, width: int) -> str:
    return table.shortened(line, width).ljust(width)


def _footer(view: View, width: int) -> Text:
    from rich.text import Text

    if view.typing:
        return Text(_fitted(f"Filter: {view.filter}▏", width), style="reverse", no_wrap=True)
    if view.message:
        return Text(_fitted(view.message, width), style="reverse", no_wrap=True)
    return Text(_fitted(_KEYS, width), style="dim", no_wrap=True)
