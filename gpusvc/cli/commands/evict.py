"""``evict``: stops models after their users finished; new users wait meanwhile."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from gpusvc.cli.arguments import NAMES, paths_of
from gpusvc.cli.commands.lifecycle import choose, raise_all
from gpusvc.cli.progress import Progress
from gpusvc.errors import UsageError
from gpusvc.quantity import parse_duration, parse_size

if TYPE_CHECKING:
    from gpusvc.gpu.selector import DeviceSelector

_GPU: Any = typer.Option("", "--gpu", metavar="N", help="All idle models on this GPU: its index, UUID or name.")
_VRAM: Any = typer.Option("", "--vram", metavar="SIZE", help="As many idle models as it takes to have that much free.")
_FORCE: Any = typer.Option(False, "--force", help="Evict also what is still in use once the wait is over.")
_WAIT: Any = typer.Option(
    "",
    "--wait",
    metavar="DURATION",
    help="How long to wait for those who use them.  [default: as long as a start would]",
)

Value = TypeVar("Value")


def evict(
    context: typer.Context,
    names: list[str] = NAMES,
    *,
    gpu: str = _GPU,
    vram: str = _VRAM,
    force: bool = _FORCE,
    wait: str = _WAIT,
) -> None:
    """Stop models once nobody uses them.

    It returns when their VRAM is proven free.
    """
    from gpusvc.cli.evictor import Evictor
    from gpusvc.cli.room import Room
    from gpusvc.config.files import load_host
    from gpusvc.state import lease
    from gpusvc.status import inventory
    from gpusvc.systemd.manager import Manager

    if bool(names) == bool(gpu or vram):
        raise UsageError("Name models, or else a GPU or an amount of VRAM with --gpu and --vram.")
    size = _parsed(parse_size, vram) if vram else None
    patience = _parsed(parse_duration, wait) if wait else None
    selector = _selector(gpu) if gpu else None
    paths = paths_of(context)
    host = load_host(paths)
    default = host.eviction.retries * host.eviction.interval_seconds
    with Manager() as manager, Progress(sys.stderr) as progress:
        if size is not None:
            room = Room(paths, host, manager, progress, default if patience is None else patience, force=force)
            room.make(size, selector)
        elif selector is not None:
            # Models in use are left out unless --force names them.
            evictor = Evictor(paths, manager, progress, patience or 0.0, force=force)
            evictor.clear(selector)
        else:
            known = {*inventory.units(manager), *lease.holders(paths)}
            chosen = choose(names, lambda text: inventory.resolve(paths, text, also=known), None)
            evictor = Evictor(paths, manager, progress, default if patience is None else patience, force=force)
            raise_all(evictor.evict(chosen))


def _selector(text: str) -> DeviceSelector:
    from gpusvc.gpu.selector import DeviceSelector

    return _parsed(DeviceSelector.parse, text)


def _parsed(parse: Callable[[str], Value], text: str) -> Value:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
