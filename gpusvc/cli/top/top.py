"""``top``: shows GPUs, models and events live; keys start, stop and pin models."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli.arguments import paths_of
from gpusvc.cli.top import dashboard
from gpusvc.cli.top.dashboard import Order, Row, View
from gpusvc.errors import GpusvcError, NvmlError
from gpusvc.names import service
from gpusvc.printable import printable
from gpusvc.status.models import ModelState, ModelStatus

if TYPE_CHECKING:
    from gpusvc.config.watched import Watched
    from gpusvc.gpu.driver import Driver
    from gpusvc.gpu.reading import Gpu
    from gpusvc.paths import Paths
    from gpusvc.systemd.manager import Manager

_COUNT: Any = typer.Option(
    0, "--count", "-n", min=0, metavar="N", help="End after N looks.  [default: never]", show_default=False
)
_INTERVAL: Any = typer.Option(1.0, "--interval", min=0.2, metavar="SECONDS", help="From one look to the next.")

_MESSAGE_SECONDS = 4.0

# How long a new screen waits for the driver.
_PATIENCE_SECONDS = 2.0
_EVENTS = 20
_ARROWS = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x1bOA": "up", b"\x1bOB": "down"}


def top(context: typer.Context, *, count: int = _COUNT, interval: float = _INTERVAL) -> None:
    """Watch the GPUs and models.

    On a terminal there are keys to start, stop and pin; in a pipe it prints plain lines.
    """
    from gpusvc.systemd.manager import Manager

    paths = paths_of(context)
    with Manager() as manager, _Look(paths, manager) as look:
        if sys.stdout.isatty() and sys.stdin.isatty():
            _Screen(paths, manager, look).run(count, interval)
        else:
            _print(look, count, interval)


def _print(look: _Look, count: int, interval: float) -> None:
    seen = 0
    while True:
        typer.echo("\n".join(dashboard.plain(look.view())))
        seen += 1
        if seen == count:
            return
        typer.echo("")
        sys.stdout.flush()
        select.select([], [], [], interval)


class _Look:
    """Reads models and GPUs for each new screen."""

    def __init__(self, paths: Paths, manager: Manager) -> None:
        from gpusvc.config.watched import Watched

        self._paths = paths
        self._manager = manager
        self._driver: Driver | None = None
        self._watched: Watched = Watched(paths, lambda _: None)

    def __enter__(self) -> _Look:
        return self

    def __exit__(self, *_: object) -> None:
        if self._driver is not None:
            self._driver.close()

    def view(self) -> View:
        from gpusvc.config import files as config
        from gpusvc.state import line
        from gpusvc.status import inventory

        readings = self._readings()
        with contextlib.suppress(GpusvcError):
            configured = config.model_names(self._paths)
        models = inventory.models(self._paths, self._manager, lambda: readings, more=configured)
        rows = _ranked([self._row(model) for model in models], self._watched)
        gpus = inventory.gpus(self._paths, readings or ())
        waiting = tuple(printable(each.sentence(time.time())) for each in line.read(self._paths))
        return View(tuple(gpus), tuple(rows), (), time.strftime("%H:%M:%S"), waiting)

    def _readings(self) -> tuple[Gpu, ...] | None:
        from gpusvc.gpu.driver import Driver
        from gpusvc.state import hung

        try:
            if self._driver is None:
                self._driver = Driver(
                    patience_seconds=_PATIENCE_SECONDS, step_seconds=None, hung=hung.read(self._paths)
                )
            return self._driver.snapshot(utilisation=True, fresh=False)
        except NvmlError:
            return None

    def _row(self, model: ModelStatus) -> Row:
        from gpusvc.state import use

        settings = self._watched.model(model.name)
        pinned = (settings is not None and settings.pinned) or self._paths.pin_file(model.name).exists()
        seen = use.glance(str(self._paths.lease_directory(model.name)))
        last = max((mark for mark in (seen.last_use, model.since) if mark is not None), default=None)
        idle = None if last is None or model.state is not ModelState.READY else max(0.0, time.time() - last)
        limit = settings.idle_timeout_seconds if settings is not None else 0.0
        keeps = pinned or not limit or (settings is not None and settings.serving.keep)
        leaves = None if keeps or idle is None or seen.in_use else limit - idle
        return Row(model, seen.in_use, idle, leaves, pinned, None)


def _ranked(rows: list[Row], watched: Watched) -> list[Row]:
    """Return the rows with their rank for eviction: by priority and last use, as placement orders them."""

    def worth(row: Row) -> tuple[int, float, str]:
        settings = watched.model(row.name)
        return (0 if settings is None else settings.priority, -(row.idle_seconds or 0.0), row.name)

    movable = [row for row in rows if row.status.state is ModelState.READY and not row.in_use and not row.pinned]
    ranks = {row.name: rank for rank, row in enumerate(sorted(movable, key=worth), start=1)}
    return [replace(row, rank=ranks.get(row.name)) for row in rows]


class _Screen:
    """The terminal: it draws the screen and acts on keys."""

    def __init__(self, paths: Paths, manager: Manager, look: _Look) -> None:
        # cli/__init__.py keeps it out for commands without colours.
        if sys.modules.get("rich") is None:
            sys.modules.pop("rich", None)
        from rich.console import Console

        self._paths = paths
        self._manager = manager
        self._look = look
        self._console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self._view = look.view()
        self._events: collections.deque[str] = collections.deque(maxlen=_EVENTS)
        self._confirm: str | None = None
        self._message_until = 0.0

    def run(self, count: int, interval: float) -> None:
        seen = 0
        with self._raw(), self._followed() as events, self._resized() as resized:
            poll = select.poll()
            for fd in (sys.stdin.fileno(), events, resized):
                poll.register(fd, select.POLLIN)
            due = time.monotonic()
            while True:
                if time.monotonic() >= due:
                    self._refresh()
                    seen += 1
                    due = max(due + interval, time.monotonic())
                self._draw()
                if seen == count:
                    return
                for fd, _ in poll.poll(max(0.0, due - time.monotonic()) * 1000):
                    if fd == events and not self._hear(events):
                        poll.unregister(events)
                    elif fd == resized:
                        os.read(resized, 64)
                    elif fd == sys.stdin.fileno() and not self._press(os.read(fd, 64)):
                        return

    def _refresh(self) -> None:
        view = self._look.view()
        message = self._view.message if time.monotonic() < self._message_until or self._confirm else ""
        self._view = replace(
            self._view,
            gpus=view.gpus,
            rows=view.rows,
            clock=view.clock,
            line=view.line,
            message=message,
        )
        self._choose(0)

    def _draw(self) -> None:
        size = self._console.size
        view = replace(self._view, events=tuple(self._events))
        with self._console.capture() as captured:
            self._console.print(dashboard.drawn(view, size.width, size.height), end="", soft_wrap=True)
        # Cursor home, and each line cleared to its end: no flicker, and no old text.
        lines = captured.get().rstrip("\n").split("\n")
        sys.stdout.write("\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J")
        sys.stdout.flush()

    def _press(self, keys: bytes) -> bool:
        """Act on a key. Return False to quit."""
        pressed = _ARROWS.get(keys)
        if pressed is not None:
            self._choose(-1 if pressed == "up" else 1)
            return True
        for key in keys.decode(errors="ignore"):
            if self._view.typing:
                self._type(key)
            elif self._confirm is not None:
                self._answer(key)
            elif key in {"q", "\x03", "\x04"} or not self._command(key):
                return False
        return bool(keys)

    def _command(self, key: str) -> bool:
        match key:
            case "k" | "j":
                self._choose(-1 if key == "k" else 1)
            case "o":
                orders = list(Order)
                following = orders[(orders.index(self._view.order) + 1) % len(orders)]
                self._view = replace(self._view, order=following)
            case "/":
                self._view = replace(self._view, typing=True, filter="")
            case "s" | "x" | "p":
                self._act(key)
        return True

    def _type(self, key: str) -> None:
        text = self._view.filter
        if key in {"\r", "\n"}:
            self._view = replace(self._view, typing=False)
        elif key == "\x1b":
            self._view = replace(self._view, typing=False, filter="")
        elif key in {"\x7f", "\b"}:
            self._view = replace(self._view, filter=text[:-1])
        elif key.isprintable():
            self._view = replace(self._view, filter=text + key)
        self._choose(0)

    def _choose(self, step: int) -> None:
        names = [row.name for row in dashboard.arranged(self._view)]
        if not names:
            self._view = replace(self._view, chosen=None)
            return
        place = names.index(self._view.chosen) if self._view.chosen in names else 0
        self._view = replace(self._view, chosen=names[min(max(place + step, 0), len(names) - 1)])

    def _act(self, key: str) -> None:
        row = next((row for row in self._view.rows if row.name == self._view.chosen), None)
        if row is None:
            return
        if key == "x" and row.in_use:
            self._confirm = row.name
            self._say(f"{row.name} is in use. Stop it? y/n")
            return
        with self._said():
            if key == "p":
                self._pin(row)
            else:
                verb, doing = ("Start", "starts") if key == "s" else ("Stop", "is being stopped")
                self._manager.enqueue(verb, service(row.name))
                self._say(f"{row.name} {doing}.")

    def _answer(self, key: str) -> None:
        name, self._confirm = self._confirm, None
        self._say("")
        if key == "y" and name is not None:
            with self._said():
                self._manager.enqueue("Stop", service(name))
                self._say(f"{name} is being stopped.")

    def _pin(self, row: Row) -> None:
        from gpusvc.cli.commands import pins

        if not row.pinned:
            pins.set_pin(self._paths, row.name)
            self._say(f"{row.name} is pinned until the next boot.")
        elif pins.take_pin(self._paths, row.name):
            self._say(f"{row.name} is pinned no more.")
        else:
            self._say(f"{row.name} stays pinned: its file says so.")

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except GpusvcError as error:
            self._say(f"{error.message} {error.hint or ''}".strip())

    def _say(self, message: str) -> None:
        self._view = replace(self._view, message=message)
        self._message_until = time.monotonic() + _MESSAGE_SECONDS

    def _hear(self, events: int) -> bool:
        """Read new lines of the journal. Return False at its end."""
        from gpusvc.journal import eventlog

        data = os.read(events, 1 << 20)
        for line in data.splitlines():
            event = eventlog.parse(line)
            if event is not None:
                when = time.strftime("%H:%M:%S", time.localtime(event.seconds))
                said = event.message.splitlines()[0] if event.message else str(event.kind)
                whose = f"{event.model}: " if event.model and not said.startswith(event.model) else ""
                self._events.append(printable(f"{when} {whose}{said}"))
        return bool(data)

    @contextlib.contextmanager
    def _followed(self) -> Iterator[int]:
        """Return a file of lines for eventlog.parse(): the last events, and new ones."""
        from gpusvc.journal import eventlog, journalctl

        # A user who may not read the journal sees no events: the pipe is at its end.
        with journalctl.opened(eventlog.command("--follow", f"--lines={_EVENTS}"), quiet=True) as child:
            yield journalctl.output_of(child).fileno()

    @contextlib.contextmanager
    def _resized(self) -> Iterator[int]:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = signal.signal(signal.SIGWINCH, lambda *_: None)
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGWINCH, before)
            os.close(reading)
            os.close(writing)

    @contextlib.contextmanager
    def _raw(self) -> Iterator[None]:
        """Use the alternate screen, hide the cursor, and read keys at once; restore everything at the end."""
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        try:
            tty.setcbreak(fd)
            yield
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
            sys.stdout.write("\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()
