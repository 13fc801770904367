"""One call: what each step's outcome tells its client, and how its next step is steered. Decisions only.

Moshi listens and speaks all the time; a client wants replies that begin and end. A reply begins at the
first word of the agent's inner monologue, which runs a little ahead of its voice, and ends when there has
been no word for HOLD_FRAMES and the voice is gone, or no word for twice as long whatever is heard.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from trunkline_runtime.engine import (
    Ended,
    Event,
    HeardPart,
    HungUp,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
    TurnDetection,
)
from trunkline_runtime.engine import Heard as TurnHeard
from trunkline_runtime.engine.moshi.bans import Bans
from trunkline_runtime.engine.moshi.models import BOS, END_OF_PAD, EOS, PAD
from trunkline_runtime.engine.moshi.policy import (
    Action,
    Ban,
    Hangup,
    Mute,
    Note,
    Policy,
    ResetTranscript,
    Say,
    Unmute,
)
from trunkline_runtime.engine.moshi.transcript import (
    Heard,
    Partial,
    Pause,
    Restart,
    Transcript,
    Word,
)

HOLD_FRAMES: Final = 12  # about 1 s
VOICE_DBFS: Final = -45.0  # of the agent
MAX_REPLY_FRAMES: Final = 375  # 30 s; an agent that does not stop makes several replies
CANCEL_FRAMES: Final = 12  # of forced silence after a cancel: the model finds that it has stopped
WORD_FRAMES: Final = 4  # of scripted speech, about three words a second
MAX_SCRIPTED: Final = 1_500  # frames that wait to be said: two minutes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step made of one slot."""

    text: int | None  # the agent's text token; None while it has nothing to say
    drawn: int  # the text token that was drawn in this step, which is told a step later
    pcm: bytes  # the agent's frame
    level: float  # its level, dBFS
    word: int  # token of the transcript
    pause: float  # probability
    heard_level: float  # of the caller's frame, dBFS


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The two ways between words and ids of Moshi's inner monologue."""

    piece: Callable[[int], str]  # with ▁ for a space
    encode: Callable[[str], Sequence[int]]


class Dialogue:
    """The state of one call on the engine's thread."""

    def __init__(self, policy: Policy, tokenizer: Tokenizer, transcript: Transcript | None) -> None:
        self._policy = policy
        self._tokenizer = tokenizer
        self._transcript = transcript
        self._replying = 0  # frames of the reply so far
        self._wordless = 0  # frames in a row
        self._asked = False  # a reply, whether the agent has a word or not
        self._in_turn = False  # the client was told that the caller speaks
        self._shown = 0  # words of the turn that the client was told
        self._ending: list[bool] = []  # turns that wait for a flush; True: the client committed it
        self._scripted: deque[int] = deque()
        self._bans = Bans()
        self._muted = False
        self._cancelled = 0  # frames of forced silence to come
        self.wants_flush = False
        self.wants_restart = False  # of the transcribing model
        self.notes: dict[str, int] = {}
        self._told: list[Event] = []
        self._act(policy.on_start())

    def __repr__(self) -> str:
        return f"<Dialogue replying={self._replying} muted={self._muted} {self._transcript!r}>"

    # --- how the next step is steered ---------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        """The agent is to say nothing in the next frame."""
        return self._muted or self._cancelled > 0

    @property
    def calm(self) -> bool:
        """Neither caller nor agent is speaking, or about to."""
        speaks = self._replying or self._scripted or self._asked
        return not (speaks or self._in_turn or self._ending)

    def next_text(self) -> int | None:
        """The text token that the agent is to say in the next frame, if it is not its own choice."""
        return self._scripted.popleft() if self._scripted and not self.silent else None

    def banned(self) -> Iterable[int]:
        """Text tokens that the agent cannot say in the next frame."""
        return self._bans.next()

    # --- what the client asks ------------------------------------------------------------------------------

    def configure(self, turn: TurnDetection) -> None:
        if self._transcript is not None:
            self._transcript.detection = turn

    def commit(self) -> None:
        """Ends the caller's turn; one `Heard` follows."""
        self._ending.append(True)
        self.wants_flush = True

    def clear(self) -> None:
        """Forgets the turn in progress, and what of it is on its way through the model; no committed one."""
        if self._transcript is not None and not self._ending:
            self._transcript.end_turn()
            self._in_turn, self._shown = False, 0
            self.wants_restart = True

    def respond(self, instructions: str | None) -> None:
        """Says the instructions; without any, the agent's own next words are the reply."""
        self._asked = True
        self._cancelled = 0
        if instructions:
            self._say(instructions)

    def cancel(self) -> None:
        self._scripted.clear()
        self._asked = False
        self._cancelled = CANCEL_FRAMES
        self._end_reply(Ended.CANCELLED)

    # --- what the engine tells -----------------------------------------------------------------------------

    def advance(self, outcome: Outcome) -> list[Event]:
        """Takes the outcome of a step; returns what the client is told."""
        self._cancelled = max(0, self._cancelled - 1)
        self._act(self._policy.answers())
        self._bans.say(outcome.drawn)
        self._speak(outcome)
        if self._transcript is not None:
            heard = self._transcript.hear(outcome.word, outcome.pause, outcome.heard_level)
            self._listen(heard)
        return self.told()

    def flushed(self, words: Sequence[int]) -> list[Event]:
        """Takes what the transcribing model says to a little silence, which ends the turns that wait."""
        self.wants_flush = False
        if self._transcript is not None:
            self._listen(self._transcript.flush(words))
            self.wants_restart = True
        for committed in self._ending:
            self._end_turn(committed=committed)
        self._ending.clear()
        return self.told()

    def restarted(self) -> None:
        """The transcribing model begins anew."""
        self.wants_restart = False
        if self._transcript is not None:
            self._transcript.restart()

    def close(self) -> None:
        """The call is over; called from any thread."""
        self._policy.close()

    def told(self) -> list[Event]:
        """What has happened since this was asked last."""
        told, self._told = self._told, []
        return told

    @property
    def flush_frames(self) -> int:
        return self._transcript.flush_frames if self._transcript is not None else 0

    # --- the agent -----------------------------------------------------------------------------------------

    def _speak(self, outcome: Outcome) -> None:
        if outcome.text is None or self.silent:
            return
        said = outcome.text not in (PAD, END_OF_PAD, BOS, EOS)
        self._wordless = 0 if said else self._wordless + 1
        if not self._replying and (said or self._asked):
            self._told.append(ReplyStarted())
            self._asked = False
            self._wordless = 0
        elif not self._replying:
            return
        self._replying += 1
        if said:
            self._told.append(ReplyText(self._tokenizer.piece(outcome.text).replace("▁", " ")))
        self._told.append(ReplyAudio(outcome.pcm))
        if self._reply_is_over(outcome):
            self._end_reply(Ended.COMPLETED)

    def _reply_is_over(self, outcome: Outcome) -> bool:
        if self._replying >= MAX_REPLY_FRAMES:
            return True
        if self._scripted:
            return False
        hold = HOLD_FRAMES if outcome.level < VOICE_DBFS else 2 * HOLD_FRAMES
        return self._wordless >= hold

    def _end_reply(self, how: Ended) -> None:
        if self._replying:
            self._replying = 0
            self._told.append(ReplyEnded(how))

    # --- the caller ----------------------------------------------------------------------------------------

    def _listen(self, heard: Iterable[Heard]) -> None:
        for item in heard:
            match item:
                case Partial(text):
                    self._act(self._policy.on_partial(text))
                case Word():
                    self._hear_word(item)
                case Pause():
                    if not self._ending:
                        self._ending.append(False)
                    self.wants_flush = True
                case Restart(why):
                    self._note(f"transcript_{why}")
                    self.wants_restart = True
                case _:
                    assert_never(item)

    def _hear_word(self, word: Word) -> None:
        assert self._transcript is not None
        detection = self._transcript.detection
        if not self._in_turn and detection.enabled:
            self._in_turn = True
            self._told.append(SpeechStarted(round(word.start * 1000)))
        self._told.append(HeardPart(f" {word.text}" if self._shown else word.text))
        self._shown += 1
        turn = self._transcript.text
        self._act(self._policy.on_word(word, turn, agent_speaks=self._replying > 0))

    def _end_turn(self, *, committed: bool) -> None:
        text, seconds = self._transcript.end_turn() if self._transcript is not None else ("", 0.0)
        if not committed:
            assert self._transcript is not None
            self._told.append(SpeechStopped(round(self._transcript.frames * 80)))
        self._in_turn, self._shown = False, 0
        self._told.append(TurnHeard(text, seconds))
        self._act(self._policy.on_pause(text))

    # --- the policy ----------------------------------------------------------------------------------------

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Say(text):
                    self._say(text)
                case Ban(word):
                    # A word begins with a blank where it does not begin a text, and has other pieces then.
                    self._bans.add(self._tokenizer.encode(word))
                    self._bans.add(self._tokenizer.encode(f"a {word}")[1:])
                case Mute():
                    self._muted = True
                    self._scripted.clear()
                    self._end_reply(Ended.INTERRUPTED)
                case Unmute():
                    self._muted = False
                case Hangup(reason):
                    self._end_reply(Ended.COMPLETED)
                    self._told.append(HungUp(reason))
                case ResetTranscript():
                    self.wants_restart = True
                case Note(name):
                    self._note(name)
                case _:
                    assert_never(action)

    def _say(self, text: str) -> None:
        for word in text.split():
            pieces = [END_OF_PAD, *self._tokenizer.encode(word)]
            pieces += [PAD] * (WORD_FRAMES - len(pieces))
            if len(self._scripted) + len(pieces) <= MAX_SCRIPTED:
                self._scripted.extend(pieces)

    def _note(self, name: str) -> None:
        self.notes[name] = self.notes.get(name, 0) + 1
