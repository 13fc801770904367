"""The shell of a caller: one WebSocket, a frame each time the clock says so, and all that comes back."""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.http11 import Response

from trunkline_runtime.caller.hearing import Answer, Count, Ear, Listen
from trunkline_runtime.caller.records import CallError, CallLog, EndedBy, Line, Plan
from trunkline_runtime.caller.speaking import Hum, Mouth, Question
from trunkline_runtime.contract import CALL_HEADER
from trunkline_runtime.engine import FRAME_MS
from trunkline_runtime.process import QUIET

MAX_MESSAGE_BYTES: Final = 4 * 2**20  # a minute of audio in one event, should a server send so
CLOSE_SECONDS: Final = 2.0  # for the other half of the close
MAX_REFUSAL_CHARS: Final = 2_000  # a sentence; a proxy in between may send a page
ASKED: Final = Plan()
HELD: Final = Plan(chunk_ms=FRAME_MS, replies=0, timeout_seconds=3600.0)

Clock = Callable[[], float]


class Caller:
    """One call, from dialling to its close; `run` it once. `log` can be read at any moment."""

    def __init__(
        self, line: Line, mouth: Mouth, ear: Ear, plan: Plan, clock: Clock = time.time
    ) -> None:
        self.settled = asyncio.Event()  # answered, refused, or not to be reached
        self._line = line
        self._mouth = mouth
        self._ear = ear
        self._plan = plan
        self._clock = clock
        self._over = asyncio.Event()
        self._connection: ClientConnection | None = None
        self._refusal: Response | None = None
        self._started: float | None = None
        self._answered: float | None = None
        self._first_message: float | None = None
        self._ended: float | None = None
        self._ended_by: EndedBy | None = None
        self._frames_sent = self._frames_received = 0
        self._bytes_sent = self._bytes_received = 0

    @classmethod
    def asking(
        cls, line: Line, audio: bytes, plan: Plan = ASKED, listen: Listen | None = None
    ) -> "Caller":
        """Says the audio (PCM16, 24 kHz, mono), hears the reply and hangs up."""
        question = Question(audio, plan)
        return cls(line, question, Answer(question, plan, listen), plan)

    @classmethod
    def holding(cls, line: Line, plan: Plan = HELD) -> "Caller":
        """Keeps the call until `hang_up`, with an 80 ms frame each 80 ms, and counts what comes back."""
        return cls(line, Hum(), Count(), plan)

    def __repr__(self) -> str:
        return (
            f"<Caller answered={self._answered} ended_by={self._ended_by}"
            f" sent={self._frames_sent} received={self._frames_received}>"
        )

    async def run(self) -> CallLog:
        """Places the call and returns its log once it is over. A refusal is a result.

        Raises `CallError` where nothing answers, or what answers is no WebSocket server.
        """
        self._started = self._clock()
        try:
            self._connection = await self._dial()
        finally:
            self.settled.set()
        if self._connection is not None:
            try:
                await self._converse(self._connection)
            finally:
                await self._connection.close()
        return self.log()

    def hang_up(self) -> None:
        self._end(EndedBy.HANG_UP)

    def log(self) -> CallLog:
        """The call so far."""
        connection, refusal, ear, mouth = self._connection, self._refusal, self._ear, self._mouth
        response = refusal or (connection.response if connection else None)
        asked = mouth if isinstance(mouth, Question) else None
        answer = ear if isinstance(ear, Answer) else None
        return CallLog(
            call=_header(response, CALL_HEADER) if response else "",
            started=self._started,
            answered=self._answered,
            first_message=self._first_message,
            first_audio=ear.arrivals.first,
            spoke_until=asked.spoke_until if asked else None,
            answer_heard=answer.answer_heard if answer else None,
            ended=self._ended,
            ended_by=self._ended_by,
            status=refusal.status_code if refusal else None,
            refusal=_body(refusal) if refusal else "",
            retry_after=_retry_after(refusal) if refusal else None,
            close_code=connection.close_code if connection else None,
            close_reason=(connection.close_reason or "") if connection else "",
            frames_sent=self._frames_sent,
            frames_received=self._frames_received,
            audio_frames_received=ear.arrivals.frames,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            max_gap=ear.arrivals.max_gap,
            underruns=answer.playout.underruns if answer else 0,
            heard=tuple(answer.heard) if answer else (),
            said=tuple(answer.said) if answer else (),
            answer=bytes(answer.pcm) if answer else b"",
        )

    # --- before the 101 ------------------------------------------------------------------------------

    async def _dial(self) -> ClientConnection | None:
        """The connection, or None when the call was refused."""
        address = self._line.address()
        try:
            connection = await connect(
                address,
                additional_headers=self._line.headers(),
                compression=None,  # of base64 it saves a quarter and costs more than all the rest
                proxy=None if _is_loopback(address) else True,
                open_timeout=self._plan.dial_seconds,
                close_timeout=CLOSE_SECONDS,
                max_size=MAX_MESSAGE_BYTES,
                logger=QUIET,
                **self._line.security(),
            )
        except InvalidStatus as refused:
            self._refusal = refused.response
            self._end(EndedBy.REFUSED)
            return None
        except TimeoutError as error:
            seconds = f"{self._plan.dial_seconds:g} s"
            raise CallError(f"no answer from {address} within {seconds}") from error
        except OSError as error:
            raise CallError(f"cannot reach {address}: {error.strerror or error}") from error
        except InvalidHandshake as error:
            raise CallError(f"{address} is no WebSocket server: {error}") from error
        self._answered = self._clock()
        return connection

    # --- the call ------------------------------------------------------------------------------------

    async def _converse(self, connection: ClientConnection) -> None:
        timeout = asyncio.get_running_loop().call_later(
            self._plan.timeout_seconds, self._end, EndedBy.TIMEOUT
        )
        try:
            async with asyncio.TaskGroup() as group:
                parts = [
                    group.create_task(self._speak(connection)),
                    group.create_task(self._listen(connection)),
                ]
                await self._over.wait()
                for part in parts:
                    part.cancel()
        finally:
            timeout.cancel()

    async def _speak(self, connection: ClientConnection) -> None:
        """Sends each chunk when its audio ends, as a microphone does, by a clock that does not drift."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for chunks in itertools.count(1):
            await asyncio.sleep(began + chunks * self._plan.chunk_ms / 1000 - loop.time())
            message = self._mouth.next(self._clock())
            try:
                await connection.send(message)
            except ConnectionClosed:
                return  # what listens says why
            self._frames_sent += 1
            self._bytes_sent += len(message)

    async def _listen(self, connection: ClientConnection) -> None:
        try:
            while True:
                message = await connection.recv()
                now = self._clock()
                self._frames_received += 1
                self._bytes_received += len(message)
                if self._first_message is None:
                    self._first_message = now
                if isinstance(message, bytes):
                    return self._end(EndedBy.NONSENSE)
                if self._ear.hear(message, now):
                    return self._end(EndedBy.REPLY)
        except ConnectionClosed:
            self._end(EndedBy.CLOSED)
        except (ValueError, RecursionError):
            self._end(EndedBy.NONSENSE)

    def _end(self, why: EndedBy) -> None:
        """The first reason counts."""
        if self._ended_by is None:
            self._ended_by, self._ended = why, self._clock()
            self._over.set()


async def ask(
    line: Line, audio: bytes, plan: Plan = ASKED, listen: Listen | None = None
) -> CallLog:
    """Places a call that says the audio (PCM16, 24 kHz, mono) and returns when the reply is done.

    Raises `CallError`.
    """
    return await Caller.asking(line, audio, plan, listen).run()


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host.startswith("127.") or host in ("localhost", "::1")


def _header(response: Response, name: str) -> str:
    """The first of this name: a server may send any number of them."""
    return next(iter(response.headers.get_all(name)), "")


def _body(refusal: Response) -> str:
    return bytes(refusal.body).decode(errors="replace")[:MAX_REFUSAL_CHARS].strip()


def _retry_after(refusal: Response) -> float | None:
    """In seconds; the other form, a date, is read as none."""
    value = _header(refusal, "Retry-After")
    return float(value) if value.isascii() and value.isdigit() else None
