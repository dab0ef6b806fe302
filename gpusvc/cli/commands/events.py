"""``events``: shows the events of models from the journal."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli import table
from gpusvc.cli.arguments import complete_model, paths_of
from gpusvc.printable import escaped_json, printable

if TYPE_CHECKING:
    from gpusvc.journal.eventlog import Event

_NAME: Any = typer.Argument(
    "", metavar="[NAME]", help="Only this model's, or an alias'.", show_default=False, autocompletion=complete_model
)
_FOLLOW: Any = typer.Option(False, "--follow", "-f", help="Go on with new events as they come.")
_LINES: Any = typer.Option("", "--lines", "-n", metavar="N", help="Only the last N events.  [default: all]")
_SINCE: Any = typer.Option("", "--since", metavar="TIME", help="Only events since then, as in journalctl(1).")
_JSON: Any = typer.Option(False, "--json", help="Print JSON; with --follow an object a line.")


def events(
    context: typer.Context,
    name: str = _NAME,
    *,
    follow: bool = _FOLLOW,
    lines: str = _LINES,
    since: str = _SINCE,
    as_json: bool = _JSON,
) -> None:
    """Show what happened: starts, evictions, releases and more."""
    from gpusvc.journal import eventlog, journalctl
    from gpusvc.state import lease
    from gpusvc.status import inventory

    paths = paths_of(context)
    model = inventory.resolve(paths, name, also=lease.holders(paths)) if name else None
    options = ["--follow"] if follow else []
    options += journalctl.newest_since(eventlog.command(model=model), lines, since)
    found = _read(eventlog.command(*options, model=model))
    if as_json and not follow:
        table.print_json([event.to_json() for event in found])
        return
    for event in found:
        # Flush each line, so that a reader of the pipe gets the event at once.
        typer.echo(escaped_json(json.dumps(event.to_json(), ensure_ascii=False)) if as_json else _lines(event))


def _read(command: list[str]) -> Iterator[Event]:
    from gpusvc.journal import eventlog, journalctl

    with journalctl.opened(command) as child:
        for line in journalctl.output_of(child):
            event = eventlog.parse(line)
            if event is not None:
                yield event
        status = child.wait()
    if status:
        raise journalctl.unreadable(status)  # journalctl has printed its complaint on stderr


def _lines(event: Event) -> str:
    """Return the event's line, with the further lines of its message below it."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.seconds))
    where = ",".join(map(str, event.gpus)) or table.UNKNOWN
    first, *rest = [printable(line) for line in event.message.splitlines()] or [""]
    if event.reason and event.reason not in event.message:
        first += f" ({printable(event.reason)})"
    what = f"{printable(event.kind):<10}  {printable(event.model or table.UNKNOWN):<16}"
    head = f"{when}  {what}  {where:<5}  {table.size(event.bytes):>9}  "
    return "\n".join([head + first, *("    " + line for line in rest)]).rstrip()
