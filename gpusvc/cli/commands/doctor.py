"""``doctor``: shows what is wrong with this machine, with evidence and cure; it can also end orphans."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli import table
from gpusvc.cli.arguments import JSON, paths_of
from gpusvc.cli.commands.lifecycle import raise_all
from gpusvc.errors import GpusvcError, NvmlError
from gpusvc.printable import printable

if TYPE_CHECKING:
    from gpusvc.doctor.finding import Finding
    from gpusvc.paths import Paths

_ORPHANS: Any = typer.Option(False, "--orphans", help="Offer to end the processes that servers left behind on GPUs.")
_REPORT: Any = typer.Option(
    "", "--report", metavar="FILE", show_default=False, help="Write a report without secrets to FILE, for a bug report."
)
_YES: Any = typer.Option(False, "--yes", help="With --orphans: end them all, without asking.")

_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}
_MARK_WIDTH = 7
_END_SECONDS = 30.0


def doctor(
    context: typer.Context,
    *,
    orphans: bool = _ORPHANS,
    yes: bool = _YES,
    report: str = _REPORT,
    as_json: bool = JSON,
) -> int:
    """Look for what is wrong with this machine. The exit status is 1 if anything has to be mended."""
    paths = paths_of(context)
    if orphans:
        _end_orphans(paths, ask=not yes)
        return 0
    found = []
    for finding in _findings(paths):
        found.append(finding)
        if not as_json:
            _print(finding)
    if report:
        _write_report(paths, Path(report), found)
    mend = [finding for finding in found if finding.wants_mending]
    if as_json:
        table.print_json([finding.to_json() for finding in found])
    else:
        number = f"1 of {len(found)} findings wants" if len(mend) == 1 else f"{len(mend)} of {len(found)} findings want"
        typer.echo(f"\n{number} mending." if mend else f"\nNothing wants mending ({len(found)} findings).")
    return 1 if mend else 0


def _write_report(paths: Paths, file: Path, found: list[Finding]) -> None:
    from gpusvc import files
    from gpusvc.doctor.report import compose

    try:
        files.write(file, compose(paths, found, _gpus(paths)))
    except OSError as error:
        raise GpusvcError(f"The report {file} cannot be written: {error.strerror}.") from None
    typer.echo(f"The report is in {file}. Read it before you attach it to a bug.", err=True)


def _findings(paths: Paths) -> Iterator[Finding]:
    from gpusvc.doctor import configuration, driver, isolation, machine, orphans

    yield from machine.findings(paths)
    yield isolation.finding()
    yield from driver.findings(paths)
    yield from configuration.findings(paths)
    yield from orphans.findings(paths, _gpus(paths))


def _gpus(paths: Paths) -> tuple[Any, ...]:
    from gpusvc.state import hung

    try:
        with hung.driver(paths) as driver:
            return driver.snapshot()
    except NvmlError:
        return ()  # printed already


def _print(finding: Finding) -> None:
    margin = " " * (_MARK_WIDTH + 2)
    lines = [f"{_MARKS[finding.level]:<{_MARK_WIDTH}}  {finding.subject}: {finding.sentence}"]
    if finding.level != "ok":
        lines += [f"{margin}{text}" for text in (finding.evidence, finding.fix) if text]
    table.print_lines([printable(line) for line in lines])


def _end_orphans(paths: Paths, *, ask: bool) -> None:
    from gpusvc.doctor import orphans
    from gpusvc.state import hung

    failures: list[GpusvcError] = []
    with hung.driver(paths) as driver:
        found = [each for each in orphans.foreigners(paths, driver.snapshot()) if each.is_orphan]
        if not found:
            typer.echo("Nobody left anything behind on the GPUs.")
        for orphan in found:
            typer.echo(printable(f"{orphan}, and seems to be left over from {orphan.server}."))
            typer.echo(printable(f"  {orphan.evidence}"))
            if ask and not _agreed(orphan.pid):
                typer.echo("It is left alone.")
                continue
            try:
                typer.echo(
                    orphans.end(orphan, driver.snapshot, signal_process=orphans.send, timeout_seconds=_END_SECONDS)
                )
            except GpusvcError as error:
                failures.append(error)
    raise_all(failures)


def _agreed(pid: int) -> bool:
    """Ask a person. Without a terminal the answer is no."""
    if not sys.stdin.isatty():
        typer.echo("Nobody is there to be asked; --yes answers for you.", err=True)
        return False
    return typer.confirm(f"End PID {pid}?", default=False)
