"""The data link to a worker for one call: dialled before the caller's 101, then half of the relay."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol, cast

from websockets.frames import Close

from trunkline_runtime.contract import ACCOUNT_PING, END_PING, MAX_CALL_MESSAGE_BYTES
from trunkline_runtime.gateway.frames import Stop, Tracker, close_frame, ping_frame, pong_frame
from trunkline_runtime.gateway.handshake import Handshake, Key
from trunkline_runtime.gateway.sockets import (
    LINGER_SECONDS,
    drop,
    notice_dead_peer,
    pause,
    resume,
)

HUNG_UP: Final = "closed its data link at once"
ACCOUNT_SECONDS: Final = 0.5  # for a worker's account of its call; its Close goes then, in any case


class Talk(Protocol):
    """The call that a leg is attached to, as far as the leg has something to tell it."""

    def pause(self) -> None:
        """The worker does not read as fast as the caller speaks."""

    def resume(self) -> None:
        """It does again."""

    def worker_closed(self, close: Close) -> None:
        """The worker has said Close."""

    def worker_lost(self) -> None:
        """Its connection is gone, or what it says is no WebSocket."""


class Leg(asyncio.Protocol):
    """One connection to a worker. `passed` counts bytes that went on to the caller."""

    __slots__ = (
        "_aborted",
        "_asked",
        "_awaited",
        "_call",
        "_early",
        "_emit",
        "_feed",
        "_gone",
        "_handshake",
        "_jammed",
        "_linger",
        "_loop",
        "_opening",
        "_ping_due",
        "_stop",
        "_tells",
        "_transport",
        "account",
        "answered",
        "home",
        "key",
        "over",
        "passed",
        "seq",
        "start",
        "started",
        "subprotocol",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.answered: asyncio.Future[str | None] | None = loop.create_future()
        """Why the worker does not take the call, or None where it does; None itself once that is known."""
        self.subprotocol: str | None = None  # that the worker selected
        self.started: tuple[str, float] | None = None  # what its worker says of its container
        self.seq: int | None = None  # of the state of a pod's slots right after its answer
        self.start = ""  # what that means for the call: warm, cold or restored
        self.over = False  # the connection is gone
        self.passed = 0
        self.account: bytes | None = None  # what the worker tells of its call at the end
        self._tells = False  # whether it will
        self._awaited: tuple[Callable[[], None], ...] = ()  # those who wait for that
        self._loop = loop
        self._handshake: Handshake | None = None  # until the worker has answered
        self._asked = False
        self._opening = b""  # goes before anything of the caller, and after the caller's 101
        self._transport: asyncio.Transport | None = None
        self._aborted = False
        self._call: Talk | None = None
        early: list[bytes] = []
        self._early: Sequence[bytes] = early  # came in one chunk with the worker's 101
        self._stop: Stop | None = None  # likewise
        self._emit: Callable[[bytes], object] = early.append
        tracker = Tracker(masked=False, limit=MAX_CALL_MESSAGE_BYTES, pinged=self._pinged)
        self._feed: Callable[[bytes], bytes] = tracker.feed
        self._jammed = False  # the worker does not read as fast as the caller speaks
        self._ping_due: bytes | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._gone: tuple[Callable[[Leg], object], ...] = ()
        self.home: object = None  # whose leg it is, for whoever keeps it
        self.key: Key | None = None  # for its handshake, made while nobody waits for that

    def __repr__(self) -> str:
        return f"<Leg over={self.over} attached={self._call is not None} passed={self.passed}>"

    # --- what the transport tells ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._aborted:
            self._transport.abort()
            return
        if self._handshake is not None:
            self._transport.write(self._handshake.request)
        notice_dead_peer(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._answer(self._handshake, data)
            return
        if not self._asked:  # a worker that speaks first is none of ours
            self.abort()
            return
        try:
            out = self._feed(data)
        except Stop as stop:
            self._stopped(stop)
            return
        if out:
            self.passed += len(out)
            self._emit(out)

    def pause_writing(self) -> None:
        self._jammed = True
        if self._call is not None:
            self._call.pause()

    def resume_writing(self) -> None:
        self._jammed = False
        if self._call is not None:
            self._call.resume()
        if self._ping_due is not None:
            payload, self._ping_due = self._ping_due, None
            self._pinged(payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        if self._linger is not None:
            self._linger.cancel()
        self.fail(HUNG_UP)
        self._emit = self._feed = drop  # and with them the tracker, whose callback refers to us
        call, self._call = self._call, None
        if call is not None:
            call.worker_lost()
        self._account_settled()
        gone, self._gone = self._gone, ()
        for callback in gone:
            callback(self)

    # --- what its dialling asks for ---

    @property
    def ready(self) -> bool:
        """Whether it is connected, as far as is known."""
        return self._transport is not None and not self._transport.is_closing() and not self.over

    def ask(self, handshake: Handshake) -> None:
        """Asks the worker to take a call, once it is connected; `answered` says how that went."""
        self._asked = True
        if self.over or self._aborted:
            return
        self._handshake = handshake
        if self._transport is not None:
            self._transport.write(handshake.request)

    def fail(self, why: str) -> None:
        """It could not be connected, or the worker took too long."""
        self._tell(why)

    # --- what the call asks for ---

    def open(self) -> Callable[[bytes], object]:
        """Begins to speak to the worker; what is returned takes what the caller says."""
        assert self._transport is not None
        opening, self._opening = self._opening, b""
        if opening and self.ready:
            self._transport.write(opening)
        return self._transport.write

    def attach(self, call: Talk, emit: Callable[[bytes], object]) -> None:
        """Hands the leg to a call; `emit` takes what the worker says."""
        self._call, self._emit = call, emit
        if self._jammed:
            call.pause()
        for chunk in self._early:
            emit(chunk)
        self._early = ()
        resume(self._transport)
        if self._stop is not None:
            self._stopped(self._stop)

    def speak(self, emit: Callable[[bytes], object]) -> None:
        """Hands what the worker says to another place from now on."""
        self._emit = emit

    def pause(self) -> None:
        """The caller does not read as fast as the worker speaks."""
        pause(self._transport)

    def resume(self) -> None:
        resume(self._transport)

    def retire(self, close: Close) -> None:
        """The call has left this leg: nothing of it reaches the caller from here on."""
        self._call, self._emit = None, drop
        transport = self._transport
        if transport is None or transport.is_closing():
            self._feed = drop
            return
        if self._linger is not None:  # it has been told
            return
        resume(transport)  # to read the worker's own Close, and to see it go
        if self._tells and self.account is None:
            self._awaited += (partial(self._part, close),)
            transport.write(ping_frame(END_PING, masked=True))
            self._linger = self._loop.call_later(ACCOUNT_SECONDS, self._account_settled)
        else:
            self._part(close)

    def when_told(self, callback: Callable[[], None]) -> None:
        """Calls back once when there is an account, or will be none: soon after the call has left the leg."""
        if self.over or self.account is not None or not self._tells:
            callback()
        else:
            self._awaited += (callback,)

    def when_gone(self, callback: "Callable[[Leg], object]") -> None:
        """Calls back once with this leg when the connection is gone."""
        if self.over:
            callback(self)
        else:
            self._gone += (callback,)

    def abort(self) -> None:
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    # --- inside ---

    def _tell(self, why: str | None) -> None:
        answered, self.answered = self.answered, None
        if answered is not None and not answered.done():
            answered.set_result(why)

    def _part(self, close: Close) -> None:
        """Our Close, after which nothing of the worker counts."""
        self._feed = drop
        transport = self._transport
        if self._linger is not None:
            self._linger.cancel()
        if transport is not None and not transport.is_closing():
            transport.write(close_frame(close, masked=True))
            self._linger = self._loop.call_later(LINGER_SECONDS, transport.abort)

    def _account_settled(self) -> None:
        awaited, self._awaited = self._awaited, ()
        for callback in awaited:
            callback()

    def _answer(self, handshake: Handshake, data: bytes) -> None:
        assert self._transport is not None
        rest = handshake.receive(data)
        if rest is None:
            return
        self._handshake = None
        self._opening, self.seq = handshake.opening, handshake.seq
        self.subprotocol = handshake.subprotocol
        self._tells = handshake.tells
        self.started = handshake.started
        if handshake.refusal is None:
            self._transport.pause_reading()  # until the call takes it: what is early stays small
        self._tell(handshake.refusal)
        if rest and handshake.refusal is None:
            self.data_received(rest)

    def _stopped(self, stop: Stop) -> None:
        """The worker said Close, or something that is no WebSocket."""
        self._feed = drop
        self._tells = self._tells and self.account is not None  # it says nothing more
        if self._call is None:
            self._stop = stop
            self._account_settled()
            return
        if stop.data:
            self.passed += len(stop.data)
            self._emit(stop.data)
        if stop.fault:
            call = self._call
            self.retire(stop.close)
            call.worker_lost()
        else:
            self._call.worker_closed(stop.close)

    def _pinged(self, payload: bytes) -> None:
        if self._tells and payload.startswith(ACCOUNT_PING):
            self.account = payload
        if self._jammed:  # the latest is answered when the worker reads again
            self._ping_due = payload
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(pong_frame(payload, masked=True))
        if self.account is not None:
            self._account_settled()
