"""One call in the Moshi engine: between the event loop, which hears and asks, and the engine's thread.

The lock is held for microseconds, never during a step, so that neither side waits for the other.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trunkline_runtime.engine import Emit, Event, Failed, TurnDetection
from trunkline_runtime.engine.moshi.dialogue import Dialogue, Outcome
from trunkline_runtime.engine.moshi.inbox import Inbox
from trunkline_runtime.engine.moshi.token_log import TokenLog

log = logging.getLogger("trunkline.moshi")


@dataclass(frozen=True, slots=True)
class Taken:
    """A call's part in a step."""

    frame: bytes
    silent: bool  # the agent says nothing in it
    text: int | None  # the token that it must say
    banned: Sequence[int]  # tokens that it cannot say
    temperature: float | None = None  # of its text; None: the models'


class MoshiConversation:
    """Implements `Conversation`. `slot` is the engine's until `close`."""

    def __init__(
        self,
        slot: int,
        dialogue: Dialogue,
        emit: Emit,
        closed: Callable[["MoshiConversation"], None],
    ) -> None:
        self.slot = slot
        self._dialogue = dialogue
        self._emit = emit
        self._tell_closed = closed
        # Held while an event is told, so that none follows `close`. Reentrant: a listener may close.
        self._lock = threading.RLock()
        self._closed = False
        self._inbox = Inbox()
        self.temperature: float | None = None  # of the agent's words; None: the models' own
        self.token_log: TokenLog | None = None  # grows on the engine's thread
        self.window_began = (
            0  # the frame that is the first for the model, unless it has slid out; likewise
        )

    def __repr__(self) -> str:
        return f"<MoshiConversation {self.slot} closed={self._closed} {self._inbox!r} {self._dialogue!r}>"

    # --- on the event loop -------------------------------------------------------------------------------

    def configure(self, turn: TurnDetection) -> None:
        with self._lock:
            self._dialogue.configure(turn)

    def hear(self, pcm: bytes) -> None:
        """Takes audio at the pace of speech; what is more than two seconds ahead of it is not heard."""
        if len(pcm) % 2:
            raise ValueError("audio must be a whole number of 16-bit samples")
        with self._lock:
            if not self._closed:
                self._inbox.put(pcm)

    def commit(self) -> None:
        with self._lock:
            self._dialogue.commit()

    def clear(self) -> None:
        with self._lock:
            self._inbox.clear()
            self._dialogue.clear()

    def respond(self, instructions: str | None = None) -> None:
        """Says the instructions (experimental); without any, the agent's next words are the reply."""
        with self._lock:
            self._dialogue.respond(instructions)

    def cancel(self) -> None:
        """Ends the reply, and keeps the agent silent for a second, so that it finds itself interrupted."""
        with self._lock:
            self._dialogue.cancel()
            self._tell(self._dialogue.told())

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.clear()
        self._dialogue.close()
        self._tell_closed(self)

    # --- on the engine's thread --------------------------------------------------------------------------

    def take(self) -> Taken | None:
        """What the next step is given; None: the slot stands still."""
        with self._lock:
            frame = self._inbox.take()
            if frame is None:
                return None
            dialogue = self._dialogue
            return Taken(
                frame,
                dialogue.silent,
                dialogue.next_text(),
                tuple(dialogue.banned()),
                self.temperature,
            )

    def advance(self, outcome: Outcome) -> None:
        with self._lock:
            if not self._closed:
                self._tell(self._dialogue.advance(outcome))

    @property
    def window_frames(self) -> int:
        """Frames in the log since the model's window began."""
        return len(self.token_log or ()) - self.window_began

    @property
    def calm(self) -> bool:
        """Neither caller nor agent is speaking."""
        return self._dialogue.calm

    @property
    def wants_flush(self) -> bool:
        return self._dialogue.wants_flush and not self._closed

    @property
    def flush_frames(self) -> int:
        return self._dialogue.flush_frames

    def flushed(self, words: Sequence[int]) -> None:
        with self._lock:
            if not self._closed:
                self._tell(self._dialogue.flushed(words))

    def wants_restart(self) -> bool:
        """Whether the transcribing model is to begin anew; it is taken to do so."""
        with self._lock:
            wanted = self._dialogue.wants_restart and not self._closed
            if wanted:
                self._dialogue.restarted()
            return wanted

    def fail(self, detail: str) -> None:
        """The conversation cannot go on."""
        with self._lock:
            self._tell([Failed(detail)])
            self._closed = True

    def counts(self) -> dict[str, int]:
        """What this call adds to the engine's totals."""
        with self._lock:
            return {"dropped_frames": self._inbox.dropped, **self._dialogue.notes}

    def _tell(self, events: Sequence[Event]) -> None:
        if self._closed:
            return
        try:
            for event in events:
                self._emit(event)
        except RuntimeError:  # the event loop has been closed, with the process on its way out
            log.warning("nobody is left to be told what a call says")
            self._closed = True
