"""The pace of a reply: its audio leaves a little ahead of the caller's ear. Time is an argument.

Speech is made a hundred times faster than it is heard. Sent at once, it would be out of reach when the
caller speaks into it; sent exactly in time, every delay on the way would be a gap.
"""

from collections import deque
from typing import Final

from trunkline_runtime.audio.pcm import BYTES_PER_SECOND
from trunkline_runtime.engine import FRAME_BYTES, ReplyAudio, ReplyText

LEAD_SECONDS: Final = (
    0.4  # what a caller's client holds: it rides out a hiccup, and is little to discard
)


class Playout:
    """The part of a reply that is made and has not left."""

    def __init__(self) -> None:
        self._queue: deque[ReplyText | ReplyAudio] = deque()
        self._heard_at = 0.0  # when the caller will have heard all that has left
        self.seconds = 0.0  # of audio that waits here

    def __repr__(self) -> str:
        return f"<Playout {self.seconds:.2f} s waiting>"

    def put(self, text: str, pcm: bytes) -> None:
        """Queues a sentence: its text, then its audio in frames of 80 ms."""
        self._queue.append(ReplyText(text))
        for at in range(0, len(pcm), FRAME_BYTES):
            self._queue.append(ReplyAudio(pcm[at : at + FRAME_BYTES]))
        self.seconds += len(pcm) / BYTES_PER_SECOND

    def due(self, now: float) -> list[ReplyText | ReplyAudio]:
        """Takes out what is to leave now."""
        leaving: list[ReplyText | ReplyAudio] = []
        while self._queue and self.wait(now) <= 0:
            event = self._queue.popleft()
            leaving.append(event)
            if isinstance(event, ReplyAudio):
                seconds = len(event.pcm) / BYTES_PER_SECOND
                self._heard_at = max(self._heard_at, now) + seconds
                self.seconds -= seconds
        return leaving

    def wait(self, now: float) -> float:
        """Seconds until something is due; only meaningful while `pending`."""
        return self._heard_at - LEAD_SECONDS - now

    @property
    def pending(self) -> bool:
        return bool(self._queue)
