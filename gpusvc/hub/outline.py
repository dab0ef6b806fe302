"""What a model is before it is downloaded: its headers at their sizes, in files without content.

The files have holes in place of the weights. So the functions that describe and estimate a model on this machine
describe one that is not here yet.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpusvc.errors import GpusvcError
from gpusvc.hub.client import Client
from gpusvc.hub.download import Item
from gpusvc.quantity import MIB

# Headers with a whole vocabulary and the table of tensors are smaller, as a rule.
_HEAD_BYTES = 16 * MIB
_MAX_SIZE_BYTES = 1 << 46


@contextlib.contextmanager
def outline(client: Client, items: Sequence[Item], main: str) -> Iterator[Path]:
    """Yield the path of a model of which only the headers are true: its main file, or its directory.

    Args:
        client: asks for the headers.
        items: all files of the model.
        main: the path of the file that an engine is given; empty: the directory.

    A header that cannot be read is empty, so that nothing describes the model.

    Raises:
        OSError: the files cannot be made, for example because a name is too long.
    """
    with tempfile.TemporaryDirectory(prefix="gpusvc-outline-") as name:
        directory = Path(name)
        for item in items:
            file = directory / item.file.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_head(client, item))
            with contextlib.suppress(OSError):  # the file system has no files of this size
                os.truncate(file, min(item.file.size_bytes or 0, _MAX_SIZE_BYTES))
        yield directory / main


def _head(client: Client, item: Item) -> bytes:
    """Return the first bytes of a file whose header counts, and nothing of any other."""
    path = item.file.path
    if not path.endswith(".gguf") and path.rpartition("/")[2] != "config.json":
        return b""
    parts: list[bytes] = []
    with contextlib.suppress(GpusvcError), client.open(item.address) as part:
        left = _HEAD_BYTES
        while left > 0 and (chunk := part.read(min(left, MIB))):
            parts.append(chunk)
            left -= len(chunk)
    return b"".join(parts)
