"""``logs``: shows the journal of a model's unit with journalctl(1)."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from gpusvc.cli.arguments import NAME, paths_of
from gpusvc.journal import journalctl
from gpusvc.journal import units as unitlog

_FOLLOW: Any = typer.Option(False, "--follow", "-f", help="Go on with new lines as they come.")
_LINES: Any = typer.Option("", "--lines", "-n", metavar="N", help="Only the last N lines.  [default: all]")
_SINCE: Any = typer.Option("", "--since", metavar="TIME", help="Only lines since then, as in journalctl(1).")


def logs(
    context: typer.Context, name: str = NAME, *, follow: bool = _FOLLOW, lines: str = _LINES, since: str = _SINCE
) -> None:
    """Show what a model, gpusvc and systemd wrote about its runs."""
    from gpusvc.state import lease
    from gpusvc.status import inventory

    paths = paths_of(context)
    name = inventory.resolve(paths, name, also=lease.holders(paths))
    options = ["--follow"] if follow else []
    command = unitlog.command(name, *options, *journalctl.newest_since(unitlog.command(name), lines, since))
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        raise journalctl.cannot_run(error) from None
