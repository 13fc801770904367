"""A live call: the caller's socket from the 101 on, and the leg to its worker.

All that belongs to a call hangs off this object, and bytes pass between its two sockets in whole
messages only. No task and no await stands in their way: a message costs one callback.

Until its worker has said a word, a call can go to another one: what the caller has said so far is kept, and the next
worker is told the same. The caller's parser cannot notice, for it has got nothing since the 101, and no half message
of the caller ever leaves the gateway.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from websockets.frames import Close

from trunkline_runtime.contract import MAX_CALL_MESSAGE_BYTES
from trunkline_runtime.contract import Close as Code
from trunkline_runtime.gateway.access.pace import AHEAD_SECONDS, Pace
from trunkline_runtime.gateway.accounts.budget import Price
from trunkline_runtime.gateway.closes import (
    MOVED,
    NO_CLOSE,
    NOBODY_ELSE,
    WORKER_LOST,
    for_worker,
    of_worker,
)
from trunkline_runtime.gateway.frames import Stop, Tracker, close_frame, pong_frame
from trunkline_runtime.gateway.ladder import Placement
from trunkline_runtime.gateway.leg import Leg
from trunkline_runtime.gateway.sockets import LINGER_SECONDS, drop, finish, pause, resume

log = logging.getLogger("trunkline.gateway")

MAX_KEPT_BYTES: Final = 64 * 2**10  # of a caller, for the next worker: a second of speech in JSON
MOST_MOVES: Final = 2  # a call whose words kill workers must not meet them all


class By(StrEnum):
    """Who ended a call."""

    CALLER = "caller"
    WORKER = "worker"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a call when it begins."""

    call: str
    agent: str
    tenant: str
    caller: str  # its name in the ledger
    placement: Placement
    price: Price | None  # of a second; None: not known
    max_seconds: float
    stall_seconds: float  # for either side to read something
    audio_times_real: float  # how fast its caller may send; 0: as it likes
    first_audio_ms: float = 0.0  # within which the agent should be heard; 0: no objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a call ended; `code` is the WebSocket close code, 1006 where there was none."""

    code: int
    by: By
    lost: bool  # by the death of its worker
    seconds: float
    bytes_up: int  # from the caller
    bytes_down: int
    cost: float | None = None  # in dollars; the gateway reckons it
    leg: Leg | None = field(
        default=None, repr=False, compare=False
    )  # which may yet tell of the call


Ended = Callable[["Call", Ending], None]
Again = Callable[[Facts, str], Coroutine[Any, Any, tuple[Leg, Facts] | None]]
"""Places a call anew, told what is known of it and why its worker is lost; None where there is no room."""


class Call(asyncio.Protocol):
    """Relays until one of the two sides, or the gateway, ends it; then `ended` is called, once."""

    __slots__ = (
        "_again",
        "_began",
        "_caller_stall",
        "_ended",
        "_feed",
        "_gone",
        "_jammed",
        "_kept",
        "_leg",
        "_linger",
        "_loop",
        "_moves",
        "_moving",
        "_over",
        "_pace",
        "_ping_due",
        "_send",
        "_transport",
        "_up",
        "_worker_stall",
        "_write",
        "facts",
    )

    def __init__(
        self,
        facts: Facts,
        transport: asyncio.Transport,
        ended: Ended,
        gone: Callable[["Call"], None],
        again: Again | None = None,
    ) -> None:
        self.facts = facts
        self._again = again  # None: as soon as it is too late for that
        self._transport = transport
        self._ended = ended
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._up = 0
        self._pace = Pace(self._began, facts.audio_times_real)
        self._over = False
        self._jammed = False  # the caller does not read as fast as the worker speaks
        self._ping_due: bytes | None = None
        self._leg: Leg | None = None
        self._write: Callable[[bytes], object] = drop  # to the worker
        self._kept = bytearray()  # what the caller has said, while another worker may have it
        self._moves = 0
        self._moving: asyncio.Task[None] | None = None  # looks for another worker
        self._send: Callable[[bytes], object] = drop if again is None else self._keep
        tracker = Tracker(masked=True, limit=MAX_CALL_MESSAGE_BYTES, pinged=self._pinged)
        self._feed: Callable[[bytes], bytes] = tracker.feed
        self._linger: asyncio.TimerHandle | None = None
        self._caller_stall: asyncio.TimerHandle | None = None
        self._worker_stall: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Call {self.facts.call} over={self._over} up={self._up} leg={self._leg!r}>"

    def attach(self, leg: Leg) -> None:
        """Relays to a leg from now on, which first gets all that has been kept. The caller has its 101 already."""
        self._leg, self._write = leg, leg.open()
        if self._kept:
            self._write(bytes(self._kept))
        if self._again is None:
            self._send = self._write
            self._kept.clear()
            leg.attach(self, self._transport.write)
        else:
            leg.attach(self, self._first)
        if self._jammed and self._leg is leg:  # its first words may have been its last
            leg.pause()

    # --- what the transport tells ---

    def data_received(self, data: bytes) -> None:
        try:
            out = self._feed(data)
        except Stop as stop:
            self._stopped(stop)
            return
        if out:
            self._up += len(out)
            self._send(out)

    def pause_writing(self) -> None:
        self._jammed = True
        if self._leg is not None:
            self._leg.pause()
        self._caller_stall = self._watch(self._caller_stalled)

    def resume_writing(self) -> None:
        self._jammed = False
        _cancel(self._caller_stall)
        if self._leg is not None:
            self._leg.resume()
        if self._ping_due is not None:
            payload, self._ping_due = self._ping_due, None
            self._pinged(payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(Close(NO_CLOSE, ""), By.CALLER, told=False)
        _cancel(self._linger)
        self._gone(self)

    # --- what the leg tells ---

    def pause(self) -> None:
        """The worker does not read as fast as the caller speaks."""
        pause(self._transport)
        self._worker_stall = self._watch(self._worker_stalled)

    def resume(self) -> None:
        _cancel(self._worker_stall)
        resume(self._transport)

    def worker_closed(self, close: Close) -> None:
        """The worker ends the call, or it cannot have it after all."""
        rule = of_worker(close.code)
        if rule.again and self._may_move():
            self._move(f"closed its data link with {close.code} before its first word", close)
        else:
            self._end(rule.told or close, By.WORKER, lost=rule.lost, echo=close)

    def worker_lost(self) -> None:
        if self._may_move():
            self._move("was lost before its first word")
        else:
            self._end(WORKER_LOST, By.WORKER, lost=True)

    # --- what the gateway tells ---

    def restart(self) -> None:
        """The gateway's grace is over."""
        self._end(Close(Code.RESTART, "the gateway restarts: call again"), By.GATEWAY)

    def look(self, now: float) -> None:
        """Ends a call that has lasted its time, or whose caller sends faster than anybody speaks.

        To be asked each second; a timer of its own would cost each call half a kilobyte.
        """
        if now - self._began >= self.facts.max_seconds:
            reason = f"the call reached its {self.facts.max_seconds:g} s: call again"
            self._end(Close(Code.NORMAL, reason), By.GATEWAY)
        elif not self._pace.keeps(self._up, now):
            times = self.facts.audio_times_real
            reason = f"audio came {AHEAD_SECONDS:g} s ahead of {times:g} times real time"
            self._end(Close(Code.POLICY, reason), By.GATEWAY)

    def abort(self) -> None:
        self._transport.abort()

    # --- inside ---

    def _keep(self, data: bytes) -> None:
        """Takes the place of the worker's write until the worker speaks or there is too much to keep."""
        self._kept += data
        self._write(data)
        if len(self._kept) <= MAX_KEPT_BYTES:
            return
        if self._moving is None:
            self._settle()
        else:
            pause(self._transport)  # the rest waits in the caller's socket

    def _first(self, data: bytes) -> None:
        """The worker's first word: from here on no other can take its place."""
        self._transport.write(data)
        self._settle()

    def _settle(self) -> None:
        """Lets go of what was for another worker; a message costs nothing more than its relay from now on."""
        self._again = None
        self._kept.clear()
        if self._leg is not None and not self._over:
            self._send = self._write
            self._leg.speak(self._transport.write)

    def _may_move(self) -> bool:
        return self._again is not None and not self._over and self._moves < MOST_MOVES

    def _move(self, why: str, close: Close = MOVED) -> None:
        """Looks for another worker. What the caller says meanwhile is kept for it."""
        self._moves += 1
        leg, self._leg, self._write = self._leg, None, drop
        if leg is not None:
            leg.retire(close)
        _cancel(self._worker_stall)
        resume(self._transport)
        self._moving = self._loop.create_task(self._place_again(why))

    async def _place_again(self, why: str) -> None:
        assert self._again is not None
        try:
            found = await self._again(self.facts, why)
        except Exception:  # the boundary of this task: nobody else would end the call
            log.exception("a call could not be placed again", extra={"call": self.facts.call})
            found = None
        self._moving = None
        if found is None:
            self._end(NOBODY_ELSE, By.WORKER, lost=True)
            return
        leg, self.facts = found
        if len(self._kept) > MAX_KEPT_BYTES:
            self._again = None  # so much is kept for this worker alone
        resume(self._transport)
        self.attach(leg)

    def _stopped(self, stop: Stop) -> None:
        if stop.data:
            self._up += len(stop.data)
            self._send(stop.data)
        self._end(stop.close, By.GATEWAY if stop.fault else By.CALLER)

    def _watch(self, stalled: Callable[[], None]) -> asyncio.TimerHandle | None:
        if self._over:
            return None
        return self._loop.call_later(self.facts.stall_seconds, stalled)

    def _caller_stalled(self) -> None:
        reason = f"nothing was read for {self.facts.stall_seconds:g} s"
        self._end(Close(Code.POLICY, reason), By.GATEWAY)

    def _worker_stalled(self) -> None:
        """It also ends a call whose caller left unnoticed, for a paused socket tells nothing."""
        self.worker_lost()

    def _pinged(self, payload: bytes) -> None:
        if self._jammed:  # the latest is answered when the caller reads again
            self._ping_due = payload
        elif not self._transport.is_closing():
            self._transport.write(pong_frame(payload, masked=False))

    def _end(
        self,
        close: Close,
        by: By,
        *,
        lost: bool = False,
        told: bool = True,
        echo: Close | None = None,
    ) -> None:
        """Ends both sides, once. `told`: the caller's socket is there to be told. `echo`: the worker's own Close."""
        if self._over:
            return
        self._over = True
        # And with these the tracker and the way to another worker, which refer to us.
        self._send = self._feed = self._write = drop
        self._again = None
        self._kept.clear()
        if self._moving is not None:
            self._moving.cancel()
        for timer in (self._caller_stall, self._worker_stall):
            _cancel(timer)
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.retire(echo or for_worker(close, by_gateway=by is By.GATEWAY))
        if told and not self._transport.is_closing():
            resume(self._transport)
            self._transport.write(close_frame(close, masked=False))
            finish(self._transport)
            self._linger = self._loop.call_later(LINGER_SECONDS, self._transport.abort)
        self._ended(
            self,
            Ending(
                code=close.code,
                by=by,
                lost=lost,
                seconds=self._loop.time() - self._began,
                bytes_up=self._up,
                bytes_down=leg.passed if leg is not None else 0,
                leg=leg,
            ),
        )


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
