"""What runs beside the looks for as long as the operator acts.

A part that ends has a bug, and the operator ends with it as if it had been told to: another one takes the Lease at once, or
this one's container is started again. With a part missing it would go on and be wrong in silence: budgets that nobody
deals out, or routes that no Secret keeps.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Coroutine
from typing import Any

log = logging.getLogger("trunkline.operator")


def begin(part: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
    """Runs a part until `end`."""
    task = asyncio.create_task(part, name=name)
    task.add_done_callback(_told)
    return task


async def end(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(*parts: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Parts that run while the block does."""
    tasks = [begin(part, name) for part in parts]
    try:
        yield
    finally:
        await end(*tasks)


def _told(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        log.critical(
            "%s has stopped, which is a bug: the operator ends, to begin anew",
            task.get_name(),
            exc_info=task.exception(),
        )
        signal.raise_signal(signal.SIGTERM)
