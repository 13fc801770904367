"""The audio of one caller that waits for the frame clock. Decisions only; one frame a tick comes out.

The clock does not wait for callers, so two things are decided here:

- *Too little:* for STALL_TICKS a slot that has no whole frame stands still, for packets come late. After
  that silence is heard in its place; a caller who sends nothing at all must still get an answer.
- *Too much:* what stands in the queue is delay, and a call must not drift. Beyond MAX_FRAMES the oldest is
  dropped at once. A backlog that has not been below STANDING_FRAMES for WINDOW_TICKS did not come from late
  packets; it is dropped down to one frame.
"""

from typing import Final

from trunkline_runtime.engine import FRAME_BYTES

STALL_TICKS: Final = 2
MAX_FRAMES: Final = 25  # 2 s: clients send up to half a second at once, and networks stand still
STANDING_FRAMES: Final = 2
WINDOW_TICKS: Final = 25
SILENCE: Final = bytes(FRAME_BYTES)


class Inbox:
    """Bytes of PCM16 in, frames out."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._stalled = 0  # ticks in a row
        self._lowest = MAX_FRAMES  # backlog after a take, in this window
        self._ticks = 0  # of this window
        self.dropped = 0  # frames

    def __repr__(self) -> str:
        return f"<Inbox {len(self._bytes) / FRAME_BYTES:.1f} frames, {self.dropped} dropped>"

    def put(self, pcm: bytes) -> None:
        self._bytes += pcm
        self._drop_to(MAX_FRAMES)

    def clear(self) -> None:
        self._bytes.clear()

    def take(self) -> bytes | None:
        """The next frame; None: the slot stands still in this tick."""
        frame = self._next()
        self._watch()
        return frame

    def _next(self) -> bytes | None:
        if len(self._bytes) >= FRAME_BYTES:
            self._stalled = 0
            frame = bytes(self._bytes[:FRAME_BYTES])
            del self._bytes[:FRAME_BYTES]
            return frame
        self._stalled += 1
        if self._stalled <= STALL_TICKS:
            return None
        if not self._bytes:
            return SILENCE
        rest = bytes(self._bytes)
        self._bytes.clear()
        return rest + SILENCE[len(rest) :]

    def _watch(self) -> None:
        self._lowest = min(self._lowest, len(self._bytes) // FRAME_BYTES)
        self._ticks += 1
        if self._ticks == WINDOW_TICKS:
            if self._lowest >= STANDING_FRAMES:
                self._drop_to(len(self._bytes) // FRAME_BYTES - self._lowest + 1)
            self._lowest, self._ticks = MAX_FRAMES, 0

    def _drop_to(self, frames: int) -> None:
        """Drops the oldest whole frames, so that at most so many and a part of one are left."""
        excess = len(self._bytes) // FRAME_BYTES - frames
        if excess > 0:
            del self._bytes[: excess * FRAME_BYTES]
            self.dropped += excess
