"""What runs for as long as the operator acts does not end in silence."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from trunkline_operator import parts


@pytest.fixture
async def told() -> AsyncIterator[asyncio.Event]:
    """Is set when the process is told to end."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, event.set)
    yield event
    loop.remove_signal_handler(signal.SIGTERM)


async def forever() -> None:
    await asyncio.Event().wait()


async def broken() -> None:
    raise KeyError("a bug")


async def over() -> None:
    """It should not have come to an end."""


@pytest.mark.parametrize("part", [broken, over])
async def test_a_part_that_ends_ends_the_operator(
    part: Callable[[], Coroutine[Any, Any, None]],
    told: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with parts.running(forever(), part(), name="the counting of sheep"):
        async with asyncio.timeout(5):
            await told.wait()
    (record,) = (record for record in caplog.records if record.levelname == "CRITICAL")
    assert record.getMessage().startswith("the counting of sheep has stopped, which is a bug")
    assert ("a bug" in caplog.text.partition("Traceback")[2]) == (part is broken)


async def test_a_part_that_is_ended_says_nothing(
    told: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    async with parts.running(forever(), name="the counting of sheep"):
        await asyncio.sleep(0)
    task = parts.begin(forever(), "another")
    await parts.end(task)
    await asyncio.sleep(0)
    assert task.cancelled()
    assert not told.is_set()
    assert not caplog.records
