"""Plain text for people: aligned columns, sizes and times; and JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from gpusvc.printable import escaped_json, printable
from gpusvc.quantity import format_size

UNKNOWN = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> list[str]:
    """Return lines of aligned columns; those named in ``right`` are flush right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def print_lines(lines: Sequence[str]) -> None:
    if lines:
        typer.echo("\n".join(lines))


def print_json(value: Any) -> None:
    import json  # noqa: PLC0415  tables do without

    typer.echo(escaped_json(json.dumps(value, indent=2, ensure_ascii=False)))


def size(amount: int | None) -> str:
    return UNKNOWN if amount is None else format_size(amount)


def number(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def age(seconds: float) -> str:
    """Return a time span in its largest unit: ``42 s``, ``3 min``, ``2 h``, ``5 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds / length)} {unit}"
    return f"{max(0, int(seconds))} s"


def shortened(text: str, width: int) -> str:
    """Return ``text`` made printable and cut to ``width`` characters."""
    return printable(text, width=width)
