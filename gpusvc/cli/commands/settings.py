"""``config``: shows the settings in effect, and which file each comes from."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

from typing import Any

import typer

from gpusvc.cli import table
from gpusvc.cli.arguments import JSON, complete_model, paths_of
from gpusvc.printable import printable

_NAME: Any = typer.Argument(
    "",
    metavar="[NAME]",
    help="A model, or an alias of it; none: the host.",
    show_default=False,
    autocompletion=complete_model,
)


def config(context: typer.Context, name: str = _NAME, *, as_json: bool = JSON) -> None:
    """Show each setting in effect, and its source."""
    from gpusvc.config.effective import effective
    from gpusvc.status import inventory

    paths = paths_of(context)
    settings = effective(paths, inventory.resolve(paths, name) if name else None)
    if as_json:
        table.print_json(
            [{"key": setting.key, "value": setting.value, "source": setting.source} for setting in settings]
        )
        return
    # The value is last, because a command may be long.
    rows = [
        (setting.key, setting.source, table.UNKNOWN if setting.value is None else printable(setting.value))
        for setting in settings
    ]
    table.print_lines(table.table(("KEY", "SOURCE", "VALUE"), rows))
