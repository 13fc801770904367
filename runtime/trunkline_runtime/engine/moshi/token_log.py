"""A call as its tokens: what the model heard and drew in each frame, from which its slot can be rebuilt.

A frame is 24 bytes, so a second is 300: the text token in 2 bytes, then the 8 codes of the agent and the 8
codes of the caller in 11 bits each, big-endian. Agent tokens are those drawn in the frame, before the delays
are undone (`Step.drawn`). The log holds what was said: it is as confidential as a recording.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

CODE_BITS: Final = 11  # Mimi's codebooks have 2048 entries
CODES: Final = 16
CODE_BYTES: Final = CODES * CODE_BITS // 8
FRAME_BYTES: Final = 2 + CODE_BYTES
MAX_FRAMES: Final = 45_000  # an hour, the longest call: about 1 MB


class TokenLog:
    """Grows by a frame at a time; when it is full it stops, for a log with a gap rebuilds nothing."""

    def __init__(self, packed: bytes = b"") -> None:
        """Raises ValueError for bytes that are no whole number of frames."""
        if len(packed) % FRAME_BYTES:
            raise ValueError(
                f"a token log has {FRAME_BYTES} bytes a frame, not {len(packed)} in all"
            )
        self._packed = bytearray(packed)
        self.full = False

    def __repr__(self) -> str:
        return f"<TokenLog {len(self)} frames>"

    def __len__(self) -> int:
        return len(self._packed) // FRAME_BYTES

    def __bytes__(self) -> bytes:
        return bytes(self._packed)

    def tail(self, start: int) -> "TokenLog":
        """A copy from that frame on."""
        return TokenLog(bytes(self._packed[start * FRAME_BYTES :]))

    def append(self, drawn: Sequence[int], heard: Sequence[int]) -> None:
        """A frame: text and 8 audio tokens drawn, 8 codes heard."""
        if len(self) >= MAX_FRAMES:
            self.full = True
            return
        bits = 0
        for code in (*drawn[1:], *heard):
            bits = bits << CODE_BITS | code
        self._packed += drawn[0].to_bytes(2, "big") + bits.to_bytes(CODE_BYTES, "big")

    def tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Drawn [T, 9] and heard [T, 8]."""
        rows = np.frombuffer(bytes(self._packed), np.uint8).reshape(-1, FRAME_BYTES)
        text = rows[:, 0].astype(np.int64) << 8 | rows[:, 1]
        bits = np.unpackbits(rows[:, 2:], axis=1).reshape(-1, CODES, CODE_BITS)
        codes = bits @ (1 << np.arange(CODE_BITS - 1, -1, -1, dtype=np.int64))
        drawn = np.concatenate([text[:, None], codes[:, : CODES // 2]], axis=1)
        return drawn, codes[:, CODES // 2 :]
