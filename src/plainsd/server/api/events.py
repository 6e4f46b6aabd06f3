"""Several streams of events as one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

Streamed = TypeVar("Streamed")


async def interleaved(streams: Sequence[AsyncIterator[Streamed]]) -> AsyncIterator[Streamed]:
    """What these yield, as it comes, until all have ended. None is asked for more before its last item was taken."""
    waiting = {asyncio.ensure_future(anext(one, None)): one for one in streams}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                if (item := task.result()) is not None:
                    yield item
                    waiting[asyncio.ensure_future(anext(waiting[task], None))] = waiting[task]
                del waiting[task]
    finally:
        for task in waiting:
            task.cancel()
