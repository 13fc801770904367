"""Whether a caller sends audio about as fast as people speak. Pure: the time is an argument.

A gateway does not decode what it relays, so it counts bytes against the widest format that a caller may use: PCM16
at 24 kHz as Base64 in JSON, an event each 20 ms. A caller with a narrower format may be faster; its worker's own
buffers bound that.
"""

from typing import Final

EVENT_BYTES: Final = (
    1493  # 20 ms: 1,280 characters of Base64, the JSON around them, and the frame's head
)
REAL_TIME: Final = 50 * EVENT_BYTES  # bytes a second
MOST_TIMES_REAL: Final = 1.5  # sustained; clocks of sound cards differ by a thousandth
AHEAD_SECONDS: Final = (
    60.0  # of audio at once: a recorded question, or what a stalled network held back
)


class Pace:
    """One call. A leaky bucket that is looked at once a second costs the relay nothing."""

    __slots__ = ("_level", "_seen", "_times", "_total")

    def __init__(self, now: float, times: float = MOST_TIMES_REAL) -> None:
        """`times` real time is what may be sustained; 0 is no bound."""
        self._times = times
        self._seen = now
        self._total = 0
        self._level = 0.0  # bytes beyond the rate

    def __repr__(self) -> str:
        return f"<Pace ahead={self._level / REAL_TIME:.1f} s>"

    def keeps(self, total: int, now: float) -> bool:
        """Whether `total` bytes since the call's beginning are no more than it may have sent by now."""
        if not self._times:
            return True
        leaked = (now - self._seen) * REAL_TIME * self._times
        self._level = max(0.0, self._level + (total - self._total) - leaked)
        self._seen, self._total = now, total
        return self._level <= AHEAD_SECONDS * REAL_TIME
