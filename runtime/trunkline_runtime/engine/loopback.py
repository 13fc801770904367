"""An engine that says back what it hears, on a real clock of 80 ms frames: for load, scale and tests.

One thread serves all conversations, as a GPU step does. Each tick gives every conversation that has heard
a whole frame exactly one frame back, so that timing, cancelling and back-pressure are those of a model
while a call costs next to nothing.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from trunkline_runtime.contract import Settings
from trunkline_runtime.engine import (
    FRAME_BYTES,
    FRAME_MS,
    Emit,
    Ended,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    TurnDetection,
)

FRAME_SECONDS: Final = FRAME_MS / 1000
MAX_QUEUED_BYTES: Final = 25 * FRAME_BYTES  # 2 s: an echo that comes later than this is of no use
QUIET_TICKS: Final = 25  # 2 s without audio end the reply
LATE_SECONDS: Final = FRAME_SECONDS / 2  # half of what a client buffers at least
MAX_BEHIND_SECONDS: Final = 2.0  # ticks that are further behind find empty queues: they are skipped


@dataclass(slots=True)
class Totals:
    """What the engine counts; each field has one writer, the engine's thread or the event loop."""

    frames: int = 0  # given back
    late_frames: int = 0  # of them, more than LATE_SECONDS after their tick was due
    dropped_frames: int = 0  # heard while MAX_QUEUED_BYTES were waiting
    skipped_ticks: int = 0  # never made, for the whole process had stood still


class LoopbackConversation:
    """One caller's echo. Its lock is held while it emits, so no event follows `close`."""

    def __init__(self, engine: "LoopbackEngine", emit: Emit) -> None:
        self._engine = engine
        self._emit = emit
        self._lock = threading.Lock()
        self._queued = bytearray()
        self._speaking = False
        self._asked = False  # the turn is over, or a reply is wanted: what is queued is all of it
        self._quiet_ticks = 0
        self._closed = False

    def __repr__(self) -> str:
        frames = len(self._queued) / FRAME_BYTES
        return f"<LoopbackConversation queued={frames:.1f} speaking={self._speaking}>"

    def configure(self, turn: TurnDetection) -> None:
        """An echo looks for no turns."""

    def hear(self, pcm: bytes) -> None:
        with self._lock:
            self._queued += pcm
            excess = len(self._queued) - MAX_QUEUED_BYTES
            if excess > 0:
                frames = -(-excess // FRAME_BYTES)  # whole ones, so that the rest stays in step
                del self._queued[: frames * FRAME_BYTES]
                self._engine.count.dropped_frames += frames

    def commit(self) -> None:
        with self._lock:
            self._asked = True

    def clear(self) -> None:
        with self._lock:
            self._queued.clear()

    def respond(self, instructions: str | None = None) -> None:
        with self._lock:
            self._asked = True

    def cancel(self) -> None:
        with self._lock:
            self._queued.clear()
            self._asked = False
            if self._speaking and not self._closed:
                self._end(Ended.CANCELLED)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._queued.clear()
        self._engine.forget(self)

    def tick(self) -> bool:
        """Gives back one frame, if one is there; returns whether it did."""
        with self._lock:
            if self._closed:
                return False
            frame = self._next_frame()
            if frame is None:
                self._pause()
                return False
            self._start()
            self._quiet_ticks = 0
            self._emit(ReplyAudio(frame))
            return True

    def _next_frame(self) -> bytes | None:
        if self._asked and 0 < len(self._queued) < FRAME_BYTES:
            self._queued += bytes(FRAME_BYTES - len(self._queued))  # the last of a turn
        if len(self._queued) < FRAME_BYTES:
            return None
        frame = bytes(self._queued[:FRAME_BYTES])
        del self._queued[:FRAME_BYTES]
        return frame

    def _start(self) -> None:
        if not self._speaking:
            self._speaking = True
            self._emit(ReplyStarted())

    def _pause(self) -> None:
        """A tick without a frame: the reply ends when it was asked for, or after a while."""
        self._quiet_ticks += 1
        if self._asked:
            self._start()  # a client that asked for a reply gets one, be it empty
        if self._speaking and (self._asked or self._quiet_ticks >= QUIET_TICKS):
            self._asked = False
            self._end(Ended.COMPLETED)

    def _end(self, how: Ended) -> None:
        self._speaking = False
        self._quiet_ticks = 0
        self._emit(ReplyEnded(how))


class LoopbackEngine:
    """`slots` conversations on one clock. Tests that pass time by hand call `tick` and never `resume`."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._conversations: set[LoopbackConversation] = set()
        self._lock = threading.Lock()  # of the set
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.count = Totals()

    def __repr__(self) -> str:
        return f"<LoopbackEngine {len(self._conversations)} of {self._slots} {self.count}>"

    @property
    def slots(self) -> int:
        return self._slots

    def load(self) -> None:
        """There are no weights."""

    def resume(self) -> None:
        self._thread = threading.Thread(target=self._run, name="loopback", daemon=True)
        self._thread.start()

    def open(self, settings: Settings, emit: Emit) -> LoopbackConversation:
        conversation = LoopbackConversation(self, emit)
        with self._lock:
            if len(self._conversations) >= self._slots:
                raise RuntimeError(f"all {self._slots} slots of the engine are taken")
            self._conversations.add(conversation)
        return conversation

    def forget(self, conversation: LoopbackConversation) -> None:
        with self._lock:
            self._conversations.discard(conversation)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def totals(self) -> Mapping[str, int]:
        """For /metrics."""
        return asdict(self.count)

    def tick(self, late: float = 0.0) -> None:
        """One step for all conversations, `late` seconds after it was due."""
        with self._lock:
            conversations = tuple(self._conversations)
        frames = sum(conversation.tick() for conversation in conversations)
        self.count.frames += frames
        if late > LATE_SECONDS:
            self.count.late_frames += frames

    def _run(self) -> None:
        due = time.monotonic() + FRAME_SECONDS
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            late = time.monotonic() - due
            self.tick(late)
            due, skipped = next_due(due, time.monotonic())
            self.count.skipped_ticks += skipped


def next_due(due: float, now: float) -> tuple[float, int]:
    """When the tick after the one due at `due` is due, and how many are given up on the way.

    Deadlines are counted from the first, never from `now`, so the clock does not drift: a tick that
    came late is followed by one that comes early. After a stop of the whole process the lost ticks
    would be a burst that nobody can use, so they are skipped.
    """
    behind = now - due
    skipped = int(behind / FRAME_SECONDS) if behind > MAX_BEHIND_SECONDS else 0
    return due + (1 + skipped) * FRAME_SECONDS, skipped
