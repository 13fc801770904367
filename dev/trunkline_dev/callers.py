"""Many callers at once, each with a record of its own."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

from trunkline_dev.accounts import Outcome, written
from trunkline_dev.slot_log import SlotRecord
from trunkline_runtime.caller import Caller, EndedBy, Line

HEAR_SECONDS = 10.0  # for audio that should come every 80 ms
LOG_SECONDS = 5.0  # for a line of a worker's log, through Modal's or a kubelet's hands


class Holder:
    """A caller who holds a call: sends a frame each 80 ms, counts what comes back, and hangs up when told."""

    def __init__(self, line: Line) -> None:
        self._caller = Caller.holding(line)
        self._task = asyncio.create_task(self._caller.run())

    def __repr__(self) -> str:
        return f"<Holder {self._caller!r}>"

    @property
    def call(self) -> str:
        return self._caller.log().call

    @property
    def frames(self) -> int:
        """Audio frames heard so far."""
        return self._caller.log().audio_frames_received

    @property
    def outcome(self) -> Outcome:
        log = self._caller.log()
        assert log.started is not None
        return Outcome(
            offered=log.started,
            call=log.call or None,
            answered=log.answered,
            status=log.status,
            ended=log.ended,
            dropped=log.ended_by in (EndedBy.CLOSED, EndedBy.NONSENSE, EndedBy.TIMEOUT),
        )

    async def settled(self) -> Self:
        """Waits until the call is answered or refused."""
        await self._caller.settled.wait()
        return self

    async def hears(self, frames: int) -> bool:
        """Whether so many frames in all have been heard, soon."""
        try:
            async with asyncio.timeout(HEAR_SECONDS):
                while self.frames < frames and not self._task.done():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return self.frames >= frames

    async def hang_up(self) -> None:
        self._caller.hang_up()
        await self._task


async def spike(url: str, agent: str, count: int, seconds: float) -> list[Holder]:
    """Places `count` calls, evenly over `seconds`, and waits until each is answered or refused."""
    loop, line = asyncio.get_running_loop(), Line(url=url, model=agent)
    began, holders = loop.time(), []
    for number in range(count):
        await asyncio.sleep(began + number * seconds / count - loop.time())
        holders.append(Holder(line))
    return list(await asyncio.gather(*(holder.settled() for holder in holders)))


async def slot_records(
    outcomes: Sequence[Outcome], read: Callable[[], Awaitable[list[SlotRecord]]]
) -> list[SlotRecord]:
    """What workers wrote of these calls. What they have not written in `LOG_SECONDS`, they have not."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOG_SECONDS):
            while not written(outcomes, await read()):
                await asyncio.sleep(0.05)
    return await read()
