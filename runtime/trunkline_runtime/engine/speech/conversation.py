"""One call in the speech engine: an inbox between the event loop and the thread of turns."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from trunkline_runtime.audio.pcm import BYTES_PER_SECOND, Samples
from trunkline_runtime.engine import FRAME_BYTES, Emit, Event, Failed, TurnDetection
from trunkline_runtime.engine.speech.dialogue import Dialogue, Reply, Turn
from trunkline_runtime.engine.speech.replies import Script
from trunkline_runtime.engine.speech.voice_activity import Detector, Windows

log = logging.getLogger("trunkline.speech")

# A client may send a recording at once; a minute of it waits, and the memory of a worker is bounded.
MAX_WAITING_BYTES: Final = 60 * BYTES_PER_SECOND
MAX_WAITING_MESSAGES: Final = 8192  # a minute in pieces of 10 ms, and room for commands

Step = Callable[[float], None]  # is given the time


class Workplace(Protocol):
    """What a conversation asks of its engine. Results come back in the thread of turns, None for a failure."""

    def ready(self, conversation: "SpeechConversation") -> None:
        """It has a message."""

    def wake(self, conversation: "SpeechConversation", at: float) -> None:
        """It wants `tick` then, and not at the time it named before."""

    def dismiss(self, conversation: "SpeechConversation") -> None:
        """It is closed."""

    def detector(self) -> Detector: ...

    def recognise(
        self,
        conversation: "SpeechConversation",
        work: tuple[Turn, Samples],
        told: Callable[[str | None, float], None],
    ) -> None: ...

    def synthesise(
        self,
        conversation: "SpeechConversation",
        sentence: str,
        made: Callable[[bytes | None, float], None],
    ) -> None: ...


class SpeechConversation:
    """Implements `Conversation` for the event loop, and `Effects` for its dialogue."""

    def __init__(self, workplace: Workplace, script: Script, emit: Emit) -> None:
        self._workplace = workplace
        self._emit = emit
        # Held while an event is told, so that none follows `close`. Reentrant: a listener may close.
        self._lock = threading.RLock()
        self._closed = False
        self._inbox: deque[tuple[int, Step]] = deque()
        self._waiting = 0  # bytes of audio in the inbox
        self._overrun = False
        self._dialogue = Dialogue(script, self)
        self._windows = Windows()
        self._detector: Detector | None = None
        self._put(self._dialogue.greet)

    def __repr__(self) -> str:
        return (
            f"<SpeechConversation closed={self._closed} waiting={self._waiting} {self._dialogue!r}>"
        )

    # --- on the event loop -------------------------------------------------------------------------------

    def configure(self, turn: TurnDetection) -> None:
        self._put(lambda now: self._dialogue.configure(turn))

    def hear(self, pcm: bytes) -> None:
        """Audio that comes much faster than it can be heard fails the call, when a minute of it waits."""
        if len(pcm) % 2:
            raise ValueError("audio must be a whole number of 16-bit samples")
        for at in range(0, len(pcm), FRAME_BYTES):
            piece = pcm[at : at + FRAME_BYTES]
            self._put(partial(self._hear, piece), len(piece))

    def commit(self) -> None:
        self._put(self._dialogue.commit)

    def clear(self) -> None:
        self._put(lambda now: self._dialogue.clear())

    def respond(self, instructions: str | None = None) -> None:
        """Speaks the instructions; without any, answers the last turn that has no reply, else greets."""
        self._put(partial(self._dialogue.respond, instructions))

    def cancel(self) -> None:
        self._put(lambda now: self._dialogue.cancel())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._inbox.clear()
        self._workplace.dismiss(self)

    # --- in the thread of turns --------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def receive(self, now: float) -> None:
        """Handles one message."""
        with self._lock:
            if not self._inbox or self._dialogue.busy:
                return
            size, step = self._inbox.popleft()
            self._waiting -= size
        step(now)

    @property
    def expects(self) -> bool:
        """Whether another message can be handled at once."""
        return bool(self._inbox) and not self._dialogue.busy

    def tick(self, now: float) -> None:
        if not self._closed:
            self._dialogue.tick(now)

    def fail(self, detail: str) -> None:
        """The conversation cannot go on."""
        try:
            self.emit(Failed(detail))
        except RuntimeError:  # the event loop has been closed
            log.warning("nobody is left to be told that a call failed")
        self.close()

    def release(self) -> Detector | None:
        """Gives up the detector, for the next call."""
        detector, self._detector = self._detector, None
        return detector

    # --- Effects -----------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        with self._lock:
            if not self._closed:
                self._emit(event)

    def recognise(self, turn: Turn, samples: Samples) -> None:
        def told(text: str | None, now: float) -> None:
            if text is None:
                self.fail("the speech could not be recognised")
            else:
                self._dialogue.recognised(turn, text, now)

        self._workplace.recognise(self, (turn, samples), told)

    def synthesise(self, reply: Reply, sentence: str) -> None:
        def made(pcm: bytes | None, now: float) -> None:
            if pcm is None:
                self._dialogue.failed(reply)
            else:
                self._dialogue.synthesised(reply, pcm, now)

        self._workplace.synthesise(self, sentence, made)

    def prepare(self, sentence: str) -> None:
        self._workplace.synthesise(self, sentence, lambda pcm, now: None)

    def wake(self, at: float) -> None:
        self._workplace.wake(self, at)

    # --- inside ------------------------------------------------------------------------------------------

    def _put(self, step: Step, size: int = 0) -> None:
        with self._lock:
            if self._closed or self._overrun:
                return
            if self._waiting + size > MAX_WAITING_BYTES or len(self._inbox) == MAX_WAITING_MESSAGES:
                self._overrun = True
                self._inbox.clear()
                step, size = self._fail_overrun, 0
            self._inbox.append((size, step))
            self._waiting += size
        self._workplace.ready(self)

    def _fail_overrun(self, now: float) -> None:
        self.fail("audio comes much faster than it can be heard; send it at the pace of speech")

    def _hear(self, pcm: bytes, now: float) -> None:
        for window in self._windows.cut(pcm):
            self._dialogue.window(window, self._probability(window), now)

    def _probability(self, window: Samples) -> float:
        if not self._dialogue.detects:
            return 0.0
        if self._detector is None:
            self._detector = self._workplace.detector()
        return self._detector.probability(window)
