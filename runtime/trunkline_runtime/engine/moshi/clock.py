"""When frames are due. Decisions only."""

from trunkline_runtime.engine.moshi.capacity import FRAME_SECONDS


def next_due(due: float, now: float) -> tuple[float, int]:
    """When the tick after the one due at `due` is due, and how many are given up on the way.

    Deadlines are counted from the first, so the clock does not drift. An engine that is more than one
    whole step behind gives up the ticks that it cannot make: frames that come in bursts help nobody, and
    what callers said meanwhile is shed by their inboxes.
    """
    following = due + FRAME_SECONDS
    skipped = max(0, int((now - following) / FRAME_SECONDS))
    return following + skipped * FRAME_SECONDS, skipped
