"""Work that continues when its waiters are gone."""

from __future__ import annotations

import asyncio
from typing import TypeVar

_T = TypeVar("_T")


async def outcome(task: asyncio.Future[_T]) -> _T:
    """Return the result of ``task``, which continues if the waiter is cancelled.

    asyncio.shield() does the same, but from Python 3.14 on it reports a failure without a waiter as a program error. A
    model that did not start is no program error, and its launcher has written the failure to the journal.
    """
    await asyncio.wait({task})
    return task.result()
