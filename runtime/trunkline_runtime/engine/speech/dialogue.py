"""One call's conversation: hears turns, has them recognised, answers them, and is interrupted.

Everything here runs in the engine's one thread of turns, so nothing is locked. Time is an argument. Work
for the models is asked for through `Effects` and comes back through `recognised` and `synthesised`.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from trunkline_runtime.audio.pcm import Samples, level
from trunkline_runtime.engine import (
    Ended,
    Event,
    Heard,
    ReplyEnded,
    ReplyStarted,
    SpeechStarted,
    SpeechStopped,
    TurnDetection,
)
from trunkline_runtime.engine.speech.playout import Playout
from trunkline_runtime.engine.speech.replies import Script, sentences
from trunkline_runtime.engine.speech.turns import (
    MAX_TURN_MS,
    ONSET_WINDOWS,
    WINDOW_MS,
    Change,
    Phase,
    Turns,
)

SILENT_DBFS: Final = -60.0  # a committed turn that nowhere is louder holds no speech
# Turns that wait for the recogniser; a caller who commits faster is not listened to meanwhile.
MAX_UNRECOGNISED: Final = 4
READY_SECONDS: Final = 2.0  # of a reply are made ahead


@dataclass(slots=True, eq=False)
class Turn:
    """Something the caller said. It is recognised while it may still go on, and told once it is over."""

    seconds: float
    over: bool = False
    answer: bool = False  # whether a reply is wanted
    text: str | None = None  # None until recognised
    dropped: bool = False  # nobody waits for its text any more


@dataclass(slots=True, eq=False)
class Reply:
    """What the agent is saying."""

    rest: deque[str]  # sentences that have not been asked for
    playout: Playout = field(default_factory=Playout)
    making: str | None = None  # the sentence that is being made
    spoken: bool = False  # whether a sentence came before

    @property
    def done(self) -> bool:
        return not (self.rest or self.making or self.playout.pending)


class Effects(Protocol):
    """What a dialogue asks of its engine."""

    def emit(self, event: Event) -> None: ...

    def recognise(self, turn: Turn, samples: Samples) -> None:
        """Has `recognised` called with the turn."""

    def synthesise(self, reply: Reply, sentence: str) -> None:
        """Has `synthesised` called with the reply."""

    def prepare(self, sentence: str) -> None:
        """Makes a sentence that will probably be asked for."""

    def wake(self, at: float) -> None:
        """Has `tick` called then."""


class Dialogue:
    """See the module. `repr` is its state."""

    def __init__(self, script: Script, effects: Effects) -> None:
        self._script = script
        self._effects = effects
        self._turns = Turns(TurnDetection())
        self._audio: deque[Samples] = deque()  # of the turn, or of the moment before one
        self._guess: Turn | None = None  # the turn in progress, recognised because it paused
        self._unrecognised: deque[Turn] = deque()  # over, in the order they were said
        self._unanswered: str | None = None  # the last turn told, while no reply was made to it
        self._reply: Reply | None = None
        self._next: str | None = None  # to be said after the reply in progress

    def __repr__(self) -> str:
        return (
            f"<Dialogue {self._turns!r} unrecognised={len(self._unrecognised)}"
            f" replying={self._reply is not None}>"
        )

    @property
    def busy(self) -> bool:
        """Whether so many turns wait to be recognised that no more audio should come in."""
        return len(self._unrecognised) >= MAX_UNRECOGNISED

    def greet(self, now: float) -> None:
        if self._script.greeting:
            self._say(self._script.greeting, now)

    # --- the caller --------------------------------------------------------------------------------------

    def configure(self, detection: TurnDetection) -> None:
        self._turns.configure(detection)
        if not detection.enabled:
            self._drop_guess()
        self._keep()

    @property
    def detects(self) -> bool:
        """Whether the probability of voice matters now."""
        return self._turns.detection.enabled

    def window(self, samples: Samples, probability: float, now: float) -> None:
        """Takes the next 32 ms of audio and what the detector makes of it."""
        self._audio.append(samples)
        change = self._turns.window(probability, level(samples))
        match change:
            case Change.STARTED:
                self._start(now)
            case Change.PAUSED:
                self._guess = self._recognise()
            case Change.RESUMED:
                self._drop_guess()
            case Change.STOPPED:
                self._effects.emit(SpeechStopped(self._turns.position_ms))
                self._finish(answer=self._turns.detection.create_response, now=now)
        self._keep()

    def commit(self, now: float) -> None:
        """Ends the turn. It is answered by itself only where turns are detected and answered at all."""
        detection = self._turns.detection
        if not detection.enabled:
            self._finish(answer=False, now=now)
        elif self._turns.phase is not Phase.LISTENING:
            self._turns.forget()
            self._finish(answer=detection.create_response, now=now)
        else:  # no voice was found, so there is nothing to recognise
            self._over(Turn(self._seconds(), text=""), now)
        self._keep()

    def clear(self) -> None:
        self._turns.forget()
        self._drop_guess()
        self._audio.clear()

    def respond(self, instructions: str | None, now: float) -> None:
        """Speaks the instructions; without any, answers the last turn that has no reply, else greets.

        Without instructions, a reply in progress is the one that was asked for.
        """
        if instructions:
            self._say(instructions, now)
        elif self._unrecognised:
            self._unrecognised[-1].answer = True
        elif self._unanswered is not None:
            self._answer(self._unanswered, now)
        elif self._reply is None:
            self._say(self._script.greeting or self._script.fallback, now)

    def cancel(self) -> None:
        self._end(Ended.CANCELLED)

    # --- the models --------------------------------------------------------------------------------------

    def recognised(self, turn: Turn, text: str, now: float) -> None:
        turn.text = text
        if turn is self._guess and (first := sentences(self._script.answer(text))[:1]):
            self._effects.prepare(first[0])
        self._tell(now)

    def synthesised(self, reply: Reply, pcm: bytes, now: float) -> None:
        if reply is not self._reply or reply.making is None:
            return  # it was interrupted meanwhile
        reply.playout.put(f" {reply.making}" if reply.spoken else reply.making, pcm)
        reply.making, reply.spoken = None, True
        self.tick(now)

    def failed(self, reply: Reply) -> None:
        """The sentence that the reply waits for cannot be made."""
        if reply is self._reply:
            self._end(Ended.FAILED, "the speech could not be made")

    # --- the clock ---------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Lets go what is due of the reply, and sees to what comes after it."""
        reply = self._reply
        if reply is None:
            return
        for event in reply.playout.due(now):
            self._effects.emit(event)
        if reply.rest and reply.making is None and reply.playout.seconds < READY_SECONDS:
            reply.making = reply.rest.popleft()
            self._effects.synthesise(reply, reply.making)
        if reply.playout.pending:
            self._effects.wake(now + reply.playout.wait(now))
        elif reply.done:
            self._reply = None
            self._effects.emit(ReplyEnded(Ended.COMPLETED))
            if following := self._next:
                self._next = None
                self._say(following, now)

    # --- inside ------------------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        self._effects.emit(SpeechStarted(self._turns.started_ms))
        if self._turns.detection.interrupt_response:
            self._end(Ended.INTERRUPTED)
            for turn in self._unrecognised:
                turn.answer = False

    def _finish(self, *, answer: bool, now: float) -> None:
        """The audio at hand is a turn of the caller's."""
        turn = self._guess or self._recognise()
        self._guess = None
        turn.answer = answer
        self._audio.clear()
        self._over(turn, now)

    def _over(self, turn: Turn, now: float) -> None:
        turn.over = True
        self._unrecognised.append(turn)
        self._tell(now)

    def _recognise(self) -> Turn:
        turn = Turn(self._seconds())
        if any(level(window) > SILENT_DBFS for window in self._audio):
            self._effects.recognise(turn, np.concatenate(self._audio))
        else:
            turn.text = ""
        return turn

    def _drop_guess(self) -> None:
        if self._guess is not None:
            self._guess.dropped = True
            self._guess = None

    def _tell(self, now: float) -> None:
        """Tells of turns that are over and recognised, in the order they were said."""
        while self._unrecognised and (text := self._unrecognised[0].text) is not None:
            turn = self._unrecognised.popleft()
            self._effects.emit(Heard(text, turn.seconds))
            self._unanswered = text
            if turn.answer:
                self._answer(text, now)

    def _answer(self, heard: str, now: float) -> None:
        self._unanswered = None
        text = self._script.answer(heard)
        if self._reply is None:
            if text:
                self._say(text, now)
        else:  # the caller spoke into it, and may not interrupt
            self._next = text

    def _say(self, text: str, now: float) -> None:
        self._end(Ended.CANCELLED)
        self._reply = Reply(deque(sentences(text)))
        self._effects.emit(ReplyStarted())
        self.tick(now)

    def _end(self, how: Ended, detail: str = "") -> None:
        self._next = None
        if self._reply is not None:
            self._reply = None
            self._effects.emit(ReplyEnded(how, detail))

    def _seconds(self) -> float:
        return len(self._audio) * WINDOW_MS / 1000

    def _keep(self) -> None:
        """Lets go audio that no turn can need."""
        detection = self._turns.detection
        if detection.enabled and self._turns.phase is Phase.LISTENING:
            # A turn is found with the window that comes next, the last of its onset.
            kept = ONSET_WINDOWS - 1 + math.ceil(detection.prefix_padding_ms / WINDOW_MS)
        else:
            kept = MAX_TURN_MS // WINDOW_MS
        while len(self._audio) > kept:
            self._audio.popleft()
