"""A live call: the caller's socket from the 101 on, and the leg to its worker.

All that belongs to a call hangs off this object, and bytes pass between its two sockets in whole
messages only. No task and no await stands in their way: a message costs one callback.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from websockets.frames import Close, CloseCode

from trunkline_runtime.contract import MAX_CALL_MESSAGE_BYTES
from trunkline_runtime.contract import Close as Code
from trunkline_runtime.gateway.access.pace import AHEAD_SECONDS, Pace
from trunkline_runtime.gateway.accounts.budget import Price
from trunkline_runtime.gateway.frames import Stop, Tracker, close_frame, pong_frame
from trunkline_runtime.gateway.ladder import Placement
from trunkline_runtime.gateway.leg import LINGER_SECONDS, Leg, drop, finish, pause, resume


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


class Call(asyncio.Protocol):
    """Relays until one of the two sides, or the gateway, ends it; then `ended` is called, once."""

    __slots__ = (
        "_began",
        "_caller_stall",
        "_ended",
        "_expiry",
        "_feed",
        "_gone",
        "_jammed",
        "_leg",
        "_linger",
        "_loop",
        "_over",
        "_pace",
        "_ping_due",
        "_send",
        "_transport",
        "_up",
        "_worker_stall",
        "facts",
    )

    def __init__(
        self,
        facts: Facts,
        transport: asyncio.Transport,
        ended: Ended,
        gone: Callable[["Call"], None],
    ) -> None:
        self.facts = facts
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
        self._send: Callable[[bytes], object] = drop
        tracker = Tracker(masked=True, limit=MAX_CALL_MESSAGE_BYTES, pinged=self._pinged)
        self._feed: Callable[[bytes], bytes] = tracker.feed
        self._expiry = self._loop.call_later(facts.max_seconds, self._expire)
        self._linger: asyncio.TimerHandle | None = None
        self._caller_stall: asyncio.TimerHandle | None = None
        self._worker_stall: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Call {self.facts.call} over={self._over} up={self._up} leg={self._leg!r}>"

    def attach(self, leg: Leg) -> None:
        """Begins to relay. The caller has its 101 already."""
        self._leg = leg
        send = leg.attach(self, self._transport.write)
        if not self._over:  # the worker's first words may have been its last
            self._send = send

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
        self._end(Close(CloseCode.ABNORMAL_CLOSURE, ""), By.CALLER, told=False)
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
        self._end(close, By.WORKER)

    def worker_lost(self) -> None:
        self._end(Close(Code.LOST, "worker lost: call again"), By.WORKER, lost=True)

    # --- what the gateway tells ---

    def restart(self) -> None:
        """The gateway's grace is over."""
        self._end(Close(Code.RESTART, "the gateway restarts: call again"), By.GATEWAY)

    def keep_pace(self) -> None:
        """Ends the call if its caller sends faster than anybody speaks. To be asked each second."""
        if not self._pace.keeps(self._up, self._loop.time()):
            times = self.facts.audio_times_real
            reason = f"audio came {AHEAD_SECONDS:g} s ahead of {times:g} times real time"
            self._end(Close(Code.POLICY, reason), By.GATEWAY)

    def abort(self) -> None:
        self._transport.abort()

    # --- inside ---

    def _stopped(self, stop: Stop) -> None:
        if stop.data:
            self._up += len(stop.data)
            self._send(stop.data)
        self._end(stop.close, By.GATEWAY if stop.fault else By.CALLER)

    def _expire(self) -> None:
        reason = f"the call reached its {self.facts.max_seconds:g} s: call again"
        self._end(Close(Code.NORMAL, reason), By.GATEWAY)

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

    def _end(self, close: Close, by: By, *, lost: bool = False, told: bool = True) -> None:
        """Ends both sides, once. `told`: the caller's socket is there to be told."""
        if self._over:
            return
        self._over = True
        self._send = self._feed = drop  # and with them the tracker, whose callback refers to us
        for timer in (self._expiry, self._caller_stall, self._worker_stall):
            _cancel(timer)
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.retire(_for_worker(close, by))
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


def _for_worker(close: Close, by: By) -> Close:
    """What the worker is told: its caller's own Close, or that the caller is going."""
    if close.code == CloseCode.ABNORMAL_CLOSURE:
        return Close(CloseCode.GOING_AWAY, "the caller is gone")
    if by is By.GATEWAY and close.code in (Code.PROTOCOL_ERROR, Code.TOO_BIG):
        return Close(CloseCode.GOING_AWAY, "the caller broke the protocol")
    return close
