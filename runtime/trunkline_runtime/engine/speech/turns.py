"""When the caller's turn begins, pauses and ends. Decisions only: no audio, no model, no clock.

Time is counted in windows of 32 ms, of which voice activity gives a probability and a level each.

A window is voice while its probability stands at or above the threshold; once a turn has begun, 0.15 less
will do, so that a soft word does not end it. A voice detector holds on for some 60 ms after the voice has
gone; in a turn, a window 30 dB below the loudest one is silence whatever the detector says.

A pause of 96 ms is reported as soon as it is there: the engine then recognises what was said so far, and
has the answer ready when the silence has lasted long enough to be the end.
"""

from enum import Enum
from typing import Final

from trunkline_runtime.engine import TurnDetection

WINDOW_MS: Final = 32
ONSET_WINDOWS: Final = 2  # 64 ms of voice: longer than a click, shorter than "no"
PAUSE_WINDOWS: Final = 3  # 96 ms: longer than the closure of a stop consonant
HYSTERESIS: Final = 0.15
QUIET_DB: Final = 30.0
# Whisper hears 30 s at once, so a longer turn is ended for the caller; memory is bounded by it.
MAX_TURN_MS: Final = 30_000


class Change(Enum):
    """What a window made of the caller's turn."""

    STARTED = "started"
    PAUSED = "paused"  # the turn may be over
    RESUMED = "resumed"  # it was not
    STOPPED = "stopped"


class Phase(Enum):
    LISTENING = "listening"
    SPEAKING = "speaking"
    PAUSED = "paused"


class Turns:
    """The turns of one call. `position_ms` is how much of the call has been heard."""

    def __init__(self, detection: TurnDetection) -> None:
        self.detection = detection
        self.phase = Phase.LISTENING
        self.position_ms = 0
        self.started_ms = (
            0  # where the audio of the turn begins, the padding before the voice included
        )
        self._voiced = 0  # windows of voice in a row, while listening
        self._quiet = 0  # windows of silence in a row, in a turn
        self._peak = -120.0

    def __repr__(self) -> str:
        return f"<Turns {self.phase.value} at {self.position_ms} ms>"

    def configure(self, detection: TurnDetection) -> None:
        """The new rules hold from the next window on; a turn in progress goes on, unless detection is off."""
        self.detection = detection
        if not detection.enabled:
            self.forget()

    def forget(self) -> None:
        """Whatever was being said is no turn any more."""
        self.phase = Phase.LISTENING
        self._voiced = 0

    def window(self, probability: float, level: float) -> Change | None:
        """Takes the next window; at most one change comes of it."""
        self.position_ms += WINDOW_MS
        if not self.detection.enabled:
            return None
        if self.phase is Phase.LISTENING:
            return self._listen(probability, level)
        return self._follow(probability, level)

    def _listen(self, probability: float, level: float) -> Change | None:
        self._voiced = self._voiced + 1 if probability >= self.detection.threshold else 0
        if self._voiced < ONSET_WINDOWS:
            return None
        before = ONSET_WINDOWS * WINDOW_MS + self.detection.prefix_padding_ms
        self.phase = Phase.SPEAKING
        self.started_ms = max(0, self.position_ms - before)
        self._quiet = 0
        self._peak = level
        return Change.STARTED

    def _follow(self, probability: float, level: float) -> Change | None:
        self._peak = max(self._peak, level)
        voice = probability >= self.detection.threshold - HYSTERESIS
        quiet = not voice or level < self._peak - QUIET_DB
        self._quiet = self._quiet + 1 if quiet else 0
        silent_ms = self._quiet * WINDOW_MS
        too_long = self.position_ms - self.started_ms >= MAX_TURN_MS
        if too_long or (quiet and silent_ms >= self.detection.silence_ms):
            self.forget()
            return Change.STOPPED
        if self.phase is Phase.SPEAKING and self._quiet >= PAUSE_WINDOWS:
            self.phase = Phase.PAUSED
            return Change.PAUSED
        if self.phase is Phase.PAUSED and not quiet:
            self.phase = Phase.SPEAKING
            return Change.RESUMED
        return None
