"""Work that one or several wait for, and that goes on when they are gone."""

from __future__ import annotations

import asyncio
from typing import TypeVar

_T = TypeVar("_T")


async def outcome(task: asyncio.Task[_T]) -> _T:
    """What comes of ``task``, which goes on if whoever waits here is cancelled.

    asyncio.shield() does the same, but from Python 3.14 on takes a failure that nobody waits for any more for an
    error of the program. That a model did not start is none, and the journal has it from its launcher.
    """
    await asyncio.wait({task})
    return task.result()
