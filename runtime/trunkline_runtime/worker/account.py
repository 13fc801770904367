"""What a worker knows of a call and its gateway does not, because that relays without decoding. Pure.

Seconds are of audio that crossed the seam to the engine: what the caller sent and was understood, and what the agent
said. The agent's audio runs dry where its caller would have heard silence in the middle of a reply: what came so
far was played, and more came later. That is reckoned as if every byte arrived as it was made.
"""

import json
from typing import Final

from trunkline_runtime.contract import ACCOUNT_PING
from trunkline_runtime.engine import SAMPLE_RATE

BYTES_PER_SECOND: Final = SAMPLE_RATE * 2
GAP_SECONDS: Final = 0.04  # half a frame: less than that no caller's jitter buffer lets through


class Account:
    """One call's, from its 101 at `began`; every `now` is of the same steady clock."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._heard = 0  # bytes
        self._said = 0
        self._first_audio: float | None = None
        self._turns = 0
        self._gaps = 0
        self._played_until: float | None = None  # of the reply that is being spoken

    def __repr__(self) -> str:
        return f"<Account {self.told()!r}>"

    def heard(self, size: int) -> None:
        """So many bytes of PCM came from the caller."""
        self._heard += size

    def reply_begins(self) -> None:
        """The agent takes its turn."""
        self._turns += 1
        self._played_until = None

    def said(self, size: int, now: float) -> None:
        """So many bytes of PCM go to the caller."""
        self._said += size
        if self._first_audio is None:
            self._first_audio = now
        until = self._played_until
        if until is not None and now > until + GAP_SECONDS:
            self._gaps += 1
        begins = now if until is None else max(until, now)
        self._played_until = begins + size / BYTES_PER_SECOND

    def reply_ends(self) -> None:
        """What comes after it is no gap."""
        self._played_until = None

    def told(self) -> bytes:
        """The payload of the ping that brings it to the gateway: at most 125 bytes, as RFC 6455 has it."""
        first = self._first_audio
        account = {
            "in": round(self._heard / BYTES_PER_SECOND, 2),
            "out": round(self._said / BYTES_PER_SECOND, 2),
            "first": None if first is None else round((first - self._began) * 1000),
            "turns": self._turns,
            "gaps": self._gaps,
        }
        return ACCOUNT_PING + json.dumps(account, separators=(",", ":")).encode()
