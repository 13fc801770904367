"""One call in a worker: its seat, the caller's protocol and the engine's conversation, on one object.

    caller ──frames──▶ session.receive ──commands──▶ conversation
    caller ◀─frames─── outbox ◀── session.send ◀──events── engine (any thread)

However a call ends, the conversation is closed first, then the seat is given back, then the link is
closed; each of them once.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed

from trunkline_runtime.contract import Close, Settings
from trunkline_runtime.engine import (
    Conversation,
    Engine,
    Event,
    Failed,
    Heard,
    HeardPart,
    HungUp,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
)
from trunkline_runtime.wire.session import (
    Cancel,
    Clear,
    Command,
    Commit,
    Configure,
    Hear,
    Message,
    Respond,
    Session,
)
from trunkline_runtime.worker.account import Account
from trunkline_runtime.worker.metrics import WorkerMetrics
from trunkline_runtime.worker.slots import Seat

log = logging.getLogger("trunkline.calls")

IDLE_SECONDS: Final = 300.0  # where settings say nothing; the default of session.idleSeconds
FLUSH_SECONDS: Final = 5.0  # for the last messages, such as an error, before the close
ACCOUNT_SECONDS: Final = 1.0  # for a gateway to take the account; the seat is free already


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """What bounds a call in time and memory."""

    max_seconds: float
    # The longest scripted reply, 1,024 characters, takes about 70 s to say and an engine may make it
    # at once. Twice as much waits only for a caller who does not read.
    unread_seconds: float = 140.0


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a call is over, and the close code for it: None when the caller has closed or is gone."""

    code: Close | None
    reason: str  # at most 123 bytes, the room in a close frame


def shortened(reason: str) -> str:
    """As much of a reason as a close frame has room for."""
    return reason.encode()[:123].decode(errors="ignore")


def untold(event: Event) -> Event:
    """The event without what was recognised of the caller's words."""
    match event:
        case HeardPart():
            return HeardPart("")
        case Heard(_, seconds):
            return Heard("", seconds)
    return event


class Call:
    """Runs one call from the answer to the close."""

    def __init__(
        self,
        seat: Seat,
        connection: Connection,
        session: Session,
        limits: CallLimits,
        metrics: WorkerMetrics,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._seat = seat
        self._connection = connection
        self._session = session
        self._limits = limits
        self._metrics = metrics
        self._conversation: Conversation | None = None
        self._outbox: deque[Message] = deque()
        self._unread = 0  # bytes in the outbox
        self._filled = asyncio.Event()
        self._ending: asyncio.Future[Ending] = self._loop.create_future()
        self._last_heard = self._last_said = self._loop.time()
        self._transcripts = seat.settings.get("transcripts", True)
        self._account = Account(self._last_said)

    def __repr__(self) -> str:
        return f"<Call {self._seat.call} {self._session!r} unread={self._unread} over={self._ending.done()}>"

    async def run(self, engine: Engine, give_back: Callable[[], None]) -> Ending:
        """Serves the call to its end; `give_back` is called between conversation and link."""
        idle_seconds = self._seat.settings.get("idleSeconds", IDLE_SECONDS)
        parts = [
            self._loop.create_task(self._guarded(part))
            for part in (
                self._read(engine),
                self._write(),
                self._watch_clock(idle_seconds),
                self._bridge_silence(),
            )
        ]
        try:
            ending = await self._ending
        finally:
            for part in parts:
                part.cancel()
            conversation, self._conversation = self._conversation, None  # which refers to us
            try:
                if conversation is not None:
                    conversation.close()
            finally:
                give_back()
        await asyncio.wait(parts)
        await self._close(ending)
        return ending

    # --- from the caller -----------------------------------------------------------------------------

    async def _read(self, engine: Engine) -> None:
        settings = Settings(**self._seat.settings, call=self._seat.call)
        self._conversation = conversation = engine.open(settings, self._emit)
        self._say(self._session.opening())
        while True:
            received = self._session.receive(await self._connection.recv())
            if received.refused:
                return self._end(Ending(Close.POLICY, shortened(received.refused)))
            for command in received.commands:
                self._command(conversation, command)
            self._say(received.messages)

    def _command(self, conversation: Conversation, command: Command) -> None:
        match command:
            case Hear(pcm):
                self._last_heard = self._loop.time()
                self._metrics.heard.inc(len(pcm))
                self._account.heard(len(pcm))
                conversation.hear(pcm)
            case Configure(turn):
                conversation.configure(turn)
            case Commit():
                conversation.commit()
            case Clear():
                conversation.clear()
            case Respond(instructions):
                conversation.respond(instructions)
            case Cancel():
                conversation.cancel()

    # --- to the caller -------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        """The engine's side of the seam; called from any thread."""
        self._loop.call_soon_threadsafe(self._tell, event)

    def _tell(self, event: Event) -> None:
        if self._ending.done():
            return  # it was on its way between threads when the call ended
        with self._guard():
            self._count(event)
            self._say(self._session.send(event if self._transcripts else untold(event)))
            if isinstance(event, Failed):
                log.error("engine failed", extra={"call": self._seat.call, "detail": event.detail})
                self._end(Ending(Close.LOST, "the engine failed: call again"))
            elif isinstance(event, HungUp):
                self._end(Ending(Close.NORMAL, shortened(event.reason)))

    def _count(self, event: Event) -> None:
        match event:
            case ReplyStarted():
                self._account.reply_begins()
            case ReplyAudio(pcm):
                self._metrics.spoken.inc(len(pcm))
                self._account.said(len(pcm), self._loop.time())
            case ReplyEnded():
                self._account.reply_ends()

    def _say(self, messages: Iterable[Message]) -> None:
        """Queues messages; ends the call of a caller who lets too many of them wait."""
        for message in messages:
            self._outbox.append(message)
            self._unread += len(message)
            self._last_said = self._loop.time()
        longest = self._limits.unread_seconds
        if self._unread > longest * self._session.bytes_per_second:
            self._outbox.clear()
            self._end(Ending(Close.POLICY, f"more than {longest:g} s of audio wait: read faster"))
        elif self._outbox:
            self._filled.set()

    async def _write(self) -> None:
        while True:
            await self._filled.wait()
            await self._send_all()
            self._filled.clear()

    async def _send_all(self) -> None:
        while self._outbox:
            message = self._outbox.popleft()
            await self._connection.send(message)
            self._unread -= len(message)

    # --- how it ends ---------------------------------------------------------------------------------

    async def _watch_clock(self, idle_seconds: float) -> None:
        too_long = self._loop.time() + self._limits.max_seconds
        while True:
            now, too_quiet = self._loop.time(), self._last_heard + idle_seconds
            if too_long <= now:
                reason = f"the call has lasted {self._limits.max_seconds:g} s, its limit"
                return self._end(Ending(Close.NORMAL, reason))
            if too_quiet <= now:
                reason = f"no audio from the caller for {idle_seconds:g} s"
                return self._end(Ending(Close.NORMAL, reason))
            await asyncio.sleep(min(too_long, too_quiet) - now)

    async def _bridge_silence(self) -> None:
        """For clients that take a quiet line for a dead one."""
        while (longest := self._session.quiet_seconds) is not None:
            left = self._last_said + longest - self._loop.time()
            if left <= 0:
                self._say(self._session.still_there())
            await asyncio.sleep(left if left > 0 else longest)

    async def _guarded(self, part: Coroutine[None, None, None]) -> None:
        with self._guard():
            await part

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """The boundary between one call and all others: what goes wrong inside ends this call alone."""
        try:
            yield
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else None
            self._end(Ending(None, f"the caller closed ({code})" if code else "the link broke"))
        except Exception:  # the boundary itself: logged whole, and told to the caller
            log.exception("a call failed", extra={"call": self._seat.call})
            self._end(Ending(Close.LOST, "the worker failed: call again"))

    def _end(self, ending: Ending) -> None:
        """The first reason counts."""
        if not self._ending.done():
            self._ending.set_result(ending)

    def hang_up(self) -> None:
        """The gateway says that the caller is gone; its Close follows when it has the account."""
        self._end(Ending(None, "the caller is gone"))

    async def _close(self, ending: Ending) -> None:
        if ending.code is not None:
            with contextlib.suppress(ConnectionClosed, TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._send_all()
        await self._tell_account()
        if ending.code is not None:
            await self._connection.close(ending.code, ending.reason)

    async def _tell_account(self) -> None:
        """Its pong says that the gateway has it, so that the Close cannot overtake it there."""
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(ACCOUNT_SECONDS):
                await (await self._connection.ping(self._account.told()))
