"""``pull``: downloads a model from a hub or an address; ``add`` and ``rm`` use it too."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from gpusvc.cli.arguments import paths_of
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.paths import is_user_instance
from gpusvc.quantity import format_size

if TYPE_CHECKING:
    from gpusvc.cli.progress import Progress
    from gpusvc.gpu.reading import Gpu
    from gpusvc.hub.client import Client
    from gpusvc.hub.download import Item
    from gpusvc.hub.reference import HubReference, UrlReference
    from gpusvc.paths import Paths
    from gpusvc.weights.description import Description
    from gpusvc.weights.parts import Estimate

_WHAT: Any = typer.Argument(
    ...,
    metavar="MODEL",
    help="hf:OWNER/REPOSITORY, with :QUANTISATION or /FILE.gguf behind it; or https://…",
)
_TO: Any = typer.Option(
    "", "--to", metavar="DIRECTORY", help="Where it goes.  [default: /var/lib/gpusvc/models, with --user your cache]"
)
_SHA256: Any = typer.Option("", "--sha256", metavar="HEX", help="The SHA-256 that the file of an address must have.")
_DRY_RUN: Any = typer.Option(False, "--dry-run", help="Say what it is, but do not download it.")

_BAR_WIDTH = 24
_LOOK_SECONDS = 0.25
_RATE_SECONDS = 5.0
_MOST_SECONDS = 99 * 3600


class Pulled(NamedTuple):
    """A model that was downloaded."""

    main: Path  # a file, or a directory
    projector: Path | None


def pull(
    context: typer.Context,
    what: str = _WHAT,
    *,
    to: str = _TO,
    sha256: str = _SHA256,
    dry_run: bool = _DRY_RUN,
) -> None:
    """Download a model from Hugging Face, a mirror (HF_ENDPOINT) or an address.

    What was interrupted goes on where it stopped. A file has its name only once it is complete and verified.
    """
    found = fetch(paths_of(context), what, to=Path(to) if to else None, sha256=sha256, dry_run=dry_run)
    if found is None:
        return
    typer.echo(found.main)
    command = "gpusvc --user" if is_user_instance() else "gpusvc"
    typer.echo(f"`{command} add NAME {found.main}` makes a model of it.", err=True)


def fetch(
    paths: Paths,
    what: str,
    *,
    to: Path | None = None,
    sha256: str = "",
    dry_run: bool = False,
    on_choice: Callable[[str], None] = lambda _: None,
) -> Pulled | None:
    """Say what a model is and download it, with a progress bar on stderr. ``dry_run``: return None instead.

    ``on_choice`` gets the path of the model's main file, empty for a directory, before anything is downloaded.

    Raises:
        GpusvcError: it does not exist, may not be read, does not fit on the disk, or does not arrive.
    """
    from gpusvc.cli.progress import Progress
    from gpusvc.hub import client as hub
    from gpusvc.hub import download, reference

    wanted = reference.parse(what, sha256=sha256)
    client = hub.Client(hub.endpoint_in(os.environ), hub.token_in(os.environ, paths))
    if isinstance(wanted, reference.UrlReference):
        items, main, folders = [_of_address(client, wanted)], wanted.name, [wanted.host]
    else:
        if sha256:
            raise UsageError("--sha256 is for an address; a hub tells the hashes of its files.")
        items, main = _of_hub(client, wanted)
        folders = [wanted.owner, wanted.repository]
    on_choice(main)
    size = sum(item.file.size_bytes or 0 for item in items)
    for sentence in _sentences(paths, client, items, main, size):
        typer.echo(sentence, err=True)
    if dry_run:
        return None
    root = paths.downloads_directory if to is None else to.absolute()
    try:
        with Progress(sys.stderr) as progress:
            bar = _Bar(progress, main or "/".join(folders), size)
            download.download(client, items, root, folders, bar)
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on where it stopped.", err=True)
        raise
    directory = root.joinpath(*folders)
    projector = next((item.file.path for item in items if main and _is_projector(item.file.path)), None)
    return Pulled(directory / main if main else directory, None if projector is None else directory / projector)


def _is_projector(path: str) -> bool:
    return path.endswith(".gguf") and "mmproj" in path.casefold()


def _of_hub(client: Client, wanted: HubReference) -> tuple[list[Item], str]:
    from gpusvc.hub.download import Item
    from gpusvc.hub.selection import select

    listing = client.listing(wanted)
    chosen = select(listing.files, tag=wanted.tag, path=wanted.path)
    items = [Item(client.address(wanted, listing.commit, file.path), file) for file in chosen.files]
    return sorted(items, key=lambda item: item.file.path != chosen.main), chosen.main


def _of_address(client: Client, wanted: UrlReference) -> Item:
    from gpusvc.hub.download import Item
    from gpusvc.hub.selection import RemoteFile

    with client.open(wanted.url) as part:
        return Item(wanted.url, RemoteFile(wanted.name, part.total_bytes, wanted.sha256))


def _sentences(paths: Paths, client: Client, items: Sequence[Item], main: str, size: int) -> list[str]:
    """Return what the model is, how much VRAM it takes, and where that is; as far as its headers tell."""
    files = "1 file" if len(items) == 1 else f"{len(items)} files"
    found, need = _look(client, items, main)
    if found is None:
        return [f"{main or 'The model'}: {files}, {format_size(size)}."]
    sentences = [f"{found} {files}, {format_size(size)} to download."]
    if need is None or need.gpu_share is not None:
        return sentences
    sentences.append(f"It needs about {format_size(need.bytes)} of VRAM: {need.reason}")
    gpus = _gpus(paths)
    return sentences if not gpus else [*sentences, where_it_fits(gpus, need.bytes)]


def _look(client: Client, items: Sequence[Item], main: str) -> tuple[Description | None, Estimate | None]:
    """Return what a model's headers say, and the VRAM that it needs. None: they do not say, or cannot be read."""
    from gpusvc.config import presets
    from gpusvc.hub.outline import outline
    from gpusvc.weights.description import FileKind, describe
    from gpusvc.weights.estimate import estimate

    # OSError: the hub's paths are no paths here, or the disk is full.
    with suppress(OSError, ValueError), outline(client, items, main) as path:
        found = describe(path)
        if found is not None:
            engine = "llama-server" if found.kind is FileKind.GGUF else "vllm"
            command = presets.PRESETS[engine].command(presets.Served(str(path), ("model",), 1))
            return found, estimate(command, {})
    return None, None


def where_it_fits(gpus: Sequence[Gpu], need_bytes: int) -> str:
    """Return a sentence on the GPU that has room for a model now, or that could have it."""
    free = [gpu for gpu in gpus if gpu.free_bytes is not None and gpu.free_bytes >= need_bytes]
    if free:
        best = max(free, key=lambda gpu: gpu.free_bytes or 0)
        return f"It fits on GPU {best.index} ({best.name}), which has {format_size(best.free_bytes or 0)} free."
    large = [gpu for gpu in gpus if gpu.total_bytes is not None and gpu.total_bytes >= need_bytes]
    if large:
        best = max(large, key=lambda gpu: gpu.free_bytes or 0)
        return (
            f"It fits on GPU {best.index} ({best.name}) once others leave: "
            f"{format_size(best.free_bytes or 0)} of {format_size(best.total_bytes or 0)} are free now."
        )
    if all(gpu.total_bytes is None for gpu in gpus):
        return "The GPUs do not tell their memory."
    return "No GPU here is large enough for all of it."


def _gpus(paths: Paths) -> tuple[Gpu, ...]:
    from gpusvc.state import hung

    try:
        with hung.driver(paths) as driver:
            return driver.snapshot()
    except GpusvcError:
        return ()


class _Bar:
    """A line with how much is here, how fast it comes, and how long the rest takes."""

    def __init__(self, progress: Progress, name: str, size_bytes: int) -> None:
        self._progress = progress
        self._name = name
        self._size = size_bytes
        self._here = 0
        self._rate: float | None = None  # bytes per second, smoothed
        self._since = (time.monotonic(), 0)

    def received(self, count: int) -> None:
        self._here += count
        now = time.monotonic()
        began, before = self._since
        if now - began < _LOOK_SECONDS and self._here < self._size:
            return
        self._since = (now, self._here)
        rate = max(0.0, (self._here - before) / max(now - began, 0.001))
        weight = min(1.0, (now - began) / _RATE_SECONDS)
        self._rate = rate if self._rate is None else self._rate + weight * (rate - self._rate)
        self._progress.show({self._name: bar(self._here, self._size, self._rate)})

    def waits(self, sentence: str) -> None:
        self._since = (time.monotonic(), self._here)
        self._progress.show({self._name: f"{bar(self._here, self._size, None)}  {sentence}"})


def bar(here: int, size: int, rate: float | None) -> str:
    """Return a bar with numbers. ``rate``: bytes per second; None: unknown."""
    share = min(1.0, here / size) if size else 0.0
    words = [
        f"[{'#' * int(share * _BAR_WIDTH):{_BAR_WIDTH}}] {share:4.0%}",
        f"{format_size(here)} of {format_size(size)}",
    ]
    if rate:
        words.append(f"{format_size(int(rate))}/s")
        minutes, seconds = divmod(int(min(_MOST_SECONDS, max(0, size - here) / rate)), 60)
        words.append(f"{minutes}:{seconds:02} left")
    return "  ".join(words)
