"""Work that several wait for, on a real loop."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from gpusvc.api.backend.shared import outcome


def test_who_goes_away_takes_nothing_from_the_others() -> None:
    async def scenario() -> None:
        told = asyncio.Event()

        async def work() -> int:
            await told.wait()
            return 7

        task = asyncio.ensure_future(work())
        goes, stays = asyncio.ensure_future(outcome(task)), asyncio.ensure_future(outcome(task))
        await asyncio.sleep(0)
        goes.cancel()
        with pytest.raises(asyncio.CancelledError):
            await goes
        told.set()
        assert await stays == 7

    asyncio.run(scenario())


def test_a_failure_that_nobody_waits_for_any_more_is_no_error_of_the_program() -> None:
    problems: list[dict[str, Any]] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        told = asyncio.Event()

        async def work() -> None:
            await told.wait()
            raise ValueError("a word")

        task = asyncio.ensure_future(work())
        task.add_done_callback(lambda done: done.exception())  # as all who make one have it
        waits, goes = asyncio.ensure_future(outcome(task)), asyncio.ensure_future(outcome(task))
        await asyncio.sleep(0)
        goes.cancel()
        told.set()
        with pytest.raises(ValueError, match="a word"):
            await waits
        gone = await asyncio.gather(goes, return_exceptions=True)
        assert isinstance(gone[0], asyncio.CancelledError)

    asyncio.run(scenario())
    gc.collect()
    assert problems == []
