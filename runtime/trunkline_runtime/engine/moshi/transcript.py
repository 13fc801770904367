"""What the caller says, from the tokens of a Kyutai STT model. Decisions only: no model, no clock.

One token a frame: PAD while nothing is said, END_OF_PAD where a word begins, otherwise a piece of a word.
A word is whole at the PAD or END_OF_PAD after it; it began at the END_OF_PAD before it. Tokens come late by
the model's delay. Times are seconds since the call's first frame. (As `moshi-server`'s asr.rs counts them.)

The models have known failures: they stop writing while somebody speaks
(https://github.com/kyutai-labs/delayed-streams-modeling/issues/146) or repeat one word for ever (175). The
watchdog sees both; the cure is to begin anew, which costs a frame.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from trunkline_runtime.engine import TurnDetection
from trunkline_runtime.engine.moshi.models import END_OF_PAD, FRAME_RATE, PAD, Transcription

PAUSE: Final = 0.6  # probability at which Kyutai's own application takes a pause for an end
PAUSE_FRAMES: Final = 2  # in a row: one frame alone is often a breath
WARM_UP_FRAMES: Final = 12  # of a model that has begun anew, whose pauses mean nothing yet
LOUD_DBFS: Final = -45.0  # a caller who speaks is louder
DEAF_FRAMES: Final = 100  # 8 s of loud frames without a word
STUCK_WORDS: Final = 6  # the same word in a row; people stop at four
MAX_WORDS: Final = (
    400  # of one turn: two minutes of speech. More end the turn; memory is bounded by it
)


@dataclass(frozen=True, slots=True)
class Word:
    """A whole word and when it was said, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Partial:
    """A word that may go on."""

    text: str


@dataclass(frozen=True, slots=True)
class Pause:
    """The caller's turn seems to be over. What was said last is still on its way through the model."""

    at: float


@dataclass(frozen=True, slots=True)
class Restart:
    """The model has failed in a known way and must begin anew."""

    why: str


Heard = Word | Partial | Pause | Restart


class Transcript:
    """The transcript of one call's turn in progress. `decode` makes text of the ids of a word."""

    def __init__(self, timing: Transcription, decode: Callable[[Sequence[int]], str]) -> None:
        self._delay = timing.delay_seconds + timing.prefix_seconds
        self._has_pauses = timing.pause_head is not None
        self._decode = decode
        self.detection = TurnDetection()
        self.frames = 0  # of the call
        self._since_restart = 0
        self._pieces: list[int] = []
        self._began = 0.0  # the word
        self.words: list[Word] = []  # of the turn
        self._paused = 0  # frames in a row
        self._quiet = 0  # frames since the last piece
        self._loud = 0  # loud frames since the last piece
        self._same = 0  # the last word came so often in a row

    def __repr__(self) -> str:
        return f"<Transcript {len(self.words)} words at {self.frames / FRAME_RATE:.2f} s>"

    @property
    def text(self) -> str:
        """What was said in the turn so far."""
        return " ".join(word.text for word in self.words)

    @property
    def seconds(self) -> float:
        """From the beginning of the turn's first word to the end of its last."""
        return self.words[-1].end - self.words[0].start if self.words else 0.0

    @property
    def flush_frames(self) -> int:
        """After so many frames of silence the model has told of all that was said before them."""
        return math.ceil(self._delay * FRAME_RATE) + 1

    def hear(self, token: int, pause: float, level: float) -> list[Heard]:
        """Takes a frame: its token, its probability of a pause, its level in dBFS."""
        self.frames += 1
        self._since_restart += 1
        self._paused = self._paused + 1 if pause > PAUSE else 0
        found = self._take(token)
        if token in (PAD, END_OF_PAD):
            self._quiet += 1
            self._loud += level > LOUD_DBFS
        else:
            self._quiet = self._loud = 0
        if self._loud >= DEAF_FRAMES:
            found.append(Restart("deaf"))
        elif self._same >= STUCK_WORDS:
            found.append(Restart("stuck"))
        elif self._turn_is_over():
            found.append(Pause(self._now))
        return found

    def flush(self, tokens: Sequence[int]) -> list[Heard]:
        """Takes the tokens of silence that was not said, and ends the word in progress."""
        return [heard for token in (*tokens, PAD) for heard in self._take(token)]

    def end_turn(self) -> tuple[str, float]:
        """Text and seconds of the turn, which is forgotten."""
        ended = self.text, self.seconds
        self.words.clear()
        self._same = 0
        return ended

    def restart(self) -> None:
        """The model begins anew; words that are whole stay."""
        self._pieces.clear()
        self._since_restart = self._paused = self._quiet = self._loud = self._same = 0

    @property
    def _now(self) -> float:
        return max(0.0, self.frames / FRAME_RATE - self._delay)

    def _take(self, token: int) -> list[Heard]:
        found: list[Heard] = []
        if token not in (PAD, END_OF_PAD):
            self._pieces.append(token)
            return [Partial(self._decode(self._pieces))]
        if self._pieces:
            found.append(self._whole_word())
        if token == END_OF_PAD:
            self._began = self._now
        return found

    def _whole_word(self) -> Word:
        word = Word(self._decode(self._pieces).strip(), self._began, self._now)
        same = bool(self.words) and self.words[-1].text == word.text
        self._same = self._same + 1 if same else 1
        self.words.append(word)
        self._pieces.clear()
        self._began = self._now
        return word

    def _turn_is_over(self) -> bool:
        if not self.detection.enabled or not self.words or self._pieces:
            return False
        if len(self.words) >= MAX_WORDS:
            return True
        if self._has_pauses:
            return self._since_restart > WARM_UP_FRAMES and self._paused >= PAUSE_FRAMES
        # A model without pauses: as long a silence as the client asks for, after the model's delay.
        silence = self.detection.silence_ms / 1000 + self._delay
        return self._quiet >= silence * FRAME_RATE
