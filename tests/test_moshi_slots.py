"""Many calls in one batch: each gets bit by bit what it would get alone from the stock server.

The oracle is the code of `moshi.server` itself at batch 1. The mutations are mistakes that have been made
in such code; each one has to be noticed here, or the comparison proves nothing.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from moshi_rig import CONTEXT_FRAMES, Frame, call, differences, drive, expected, models, step
from numpy.typing import NDArray
from test_moshi_rebuild import long_call

from trunkline_runtime.engine.moshi.models import PAD, Generation, Models
from trunkline_runtime.engine.moshi.state import SlotRows
from trunkline_runtime.engine.moshi.stepper import EngineBroken, Steering, Stepper
from trunkline_runtime.engine.moshi.tiny import tiny

FEW = range(8)  # calls for four slots


@pytest.mark.parametrize("seed", range(3))
def test_forty_calls_that_come_go_and_stall_in_sixteen_slots_hear_what_they_hear_alone(
    seed: int,
) -> None:
    with closing(Stepper(models(), 16)) as stepper:
        found = differences(drive(stepper, range(40), seed))
    assert found.frames > 600
    assert (found.missing, found.tokens, found.words) == (0, 0, 0)
    assert found.pcm <= 1e-5
    assert found.pause <= 1e-5


def test_calls_differ_and_their_rings_wrap() -> None:
    """Otherwise the comparison with the oracle would prove little."""
    frames = [frame for number in FEW for frame in expected(number)]
    said = [frame.tokens for frame in frames if frame.tokens]
    assert len(set(said)) > 0.9 * len(said)
    assert len({frame.word for frame in frames}) > 8
    assert max(len(call(number)) for number in FEW) > 2 * CONTEXT_FRAMES


# --- mutations -----------------------------------------------------------------------------------------------


class NothingErased(Stepper):
    """Forgets that the slot had another caller."""

    def settle(self) -> None:
        self._left.clear()


class NobodyStalls(Stepper):
    """Runs the slots without a frame, too."""

    def _on_device(self, mask: NDArray[np.bool_]) -> torch.Tensor:
        return torch.ones(self.slots, dtype=torch.bool)


class AllCodecsRestart(Stepper):
    """Does what moshi.server does, which has one caller only."""

    def _restart_codec(self, first: torch.Tensor) -> None:
        self.models.mimi.reset_streaming()


class NoCodecRestarts(Stepper):
    """Takes the first frame for the second."""

    def _restart_codec(self, first: torch.Tensor) -> None:
        pass


class DecodesTooEarly(Stepper):
    """Decodes the slots that were stepped, ready or not."""

    def _generate(self, codes: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
        self.running = running
        return super()._generate(codes, running)

    def _decode(self, tokens: torch.Tensor, ready: torch.Tensor) -> torch.Tensor:
        return super()._decode(tokens, self.running)


class TranscriptNotErased(Stepper):
    """Lets the transcriber remember the last caller."""

    def _open(self, models: Models) -> None:
        super()._open(models)
        self.rows = SlotRows(self.slots, gen=self.gen, lm=models.lm, mimi=models.mimi)


@pytest.mark.parametrize(
    "mistaken",
    [
        NothingErased,
        NobodyStalls,
        AllCodecsRestart,
        NoCodecRestarts,
        DecodesTooEarly,
        TranscriptNotErased,
    ],
)
def test_each_known_mistake_is_noticed(mistaken: Callable[..., Stepper]) -> None:
    with closing(mistaken(models(), 4)) as stepper:
        found = differences(drive(stepper, FEW, 0))
    assert not found.none


def test_without_a_mistake_the_same_calls_are_right() -> None:
    with closing(Stepper(models(), 4)) as stepper:
        found = differences(drive(stepper, FEW, 0))
    assert found.none, found


# --- nothing of a caller is left ----------------------------------------------------------------------------


def talk(stepper: Stepper, slot: int, number: int) -> list[Frame]:
    """A whole call in one slot."""
    stepper.join(slot)
    return [step(stepper, {slot: frame})[slot] for frame in call(number)]


def audio(frame: Frame) -> NDArray[np.float32]:
    return np.zeros(0, np.float32) if frame.pcm is None else frame.pcm


def test_a_slot_that_is_left_is_as_if_nobody_had_been_there() -> None:
    with closing(Stepper(models(), 2)) as stepper:
        new = stepper.rows.export(1)
        talk(stepper, 1, 3)
        used = [
            name for name, row in stepper.rows.export(1).items() if not torch.equal(row, new[name])
        ]
        holding = {name for name in new if name.endswith((".ring", ".partial", ".cache", "offset"))}
        assert holding <= set(used), "they had something of the caller"
        stepper.leave(1)
        stepper.settle()
        left = [
            name for name, row in stepper.rows.export(1).items() if not torch.equal(row, new[name])
        ]
        assert left == []
        assert not stepper._input[1].any()


def test_the_next_caller_gets_the_same_whoever_was_there_before() -> None:
    answers = []
    rows = []
    for before in (3, 4, None):
        with closing(Stepper(models(), 2)) as stepper:
            if before is not None:
                talk(stepper, 0, before)
                stepper.leave(0)
            answers.append(talk(stepper, 0, 5))
            rows.append(stepper.rows.export(0))
    first = answers[0]
    for answer in answers[1:]:
        assert [f.tokens for f in answer] == [f.tokens for f in first]
        assert all(map(np.array_equal, map(audio, answer), map(audio, first)))
    for row in rows[1:]:
        assert [n for n in row if not torch.equal(row[n], rows[0][n])] == []


def test_a_stepper_that_is_closed_gives_its_memory_back_at_once() -> None:
    """On a GPU the next, larger one needs it; a collection of garbage may be long in coming."""
    gc.disable()
    try:
        stepper = Stepper(models(), 2)
        stepper.step({0: call(0)[0]})
        rings = [weakref.ref(t) for name, t, _ in stepper.rows.tensors() if name.endswith("ring")]
        assert all(ring() is not None for ring in rings)
        stepper.close()
        assert [ring for ring in rings if ring() is not None] == []
    finally:
        gc.enable()


# --- steering -------------------------------------------------------------------------------------------------


def test_a_slot_says_the_words_it_is_given_and_its_neighbour_does_not_notice() -> None:
    with closing(Stepper(models(), 2)) as stepper:
        words, said = [11, 12, 13, 14], []
        for number, (left, right) in enumerate(zip(call(0), call(1), strict=False)):
            if number == 0:
                stepper.join(0)
                stepper.join(1)
            text = {1: words[number - 5]} if 5 <= number < 9 else {}
            got = step(stepper, {0: left, 1: right}, steering=Steering(text=text))
            assert got[0].tokens == expected(0)[number].tokens
            said.append(got[1].tokens)
    assert [tokens[0] for tokens in said[6:10] if tokens] == words, "one frame later, as all text"
    assert said[:5] == [frame.tokens for frame in expected(1)[:5]]


def test_a_silent_slot_says_nothing_and_its_neighbour_goes_on() -> None:
    with closing(Stepper(models(), 2)) as stepper:
        silence = tuple(stepper._silence.tolist())
        for slot in (0, 1):
            stepper.join(slot)
        for number, (left, right) in enumerate(zip(call(0), call(1), strict=False)):
            got = step(stepper, {0: left, 1: right}, steering=Steering(silent=[1]))
            assert got[0].tokens == expected(0)[number].tokens
            if number > 1:
                assert got[1].tokens == (PAD, *silence)


def test_a_slot_does_not_say_what_is_banned() -> None:
    often = max(range(64), key=[f.tokens[0] for f in expected(1) if f.tokens].count)
    with closing(Stepper(models(), 2)) as stepper:
        said = []
        for slot in (0, 1):
            stepper.join(slot)
        for number, (left, right) in enumerate(zip(call(0), call(1), strict=False)):
            got = step(stepper, {0: left, 1: right}, steering=Steering(banned={1: [often]}))
            assert got[0].tokens == expected(0)[number].tokens
            said.append(got[1].tokens)
    assert often not in [tokens[0] for tokens in said if tokens]


class Watched(Stepper):
    """Keeps the most likely text token of each slot in each step."""

    def _on_text_logits(self, logits: torch.Tensor) -> None:
        self.likeliest = logits[:, 0, 0].argmax(dim=-1)
        super()._on_text_logits(logits)


def test_a_temperature_of_its_own_is_one_slots_alone() -> None:
    """At a low one the likeliest word is drawn nearly always; at the models' own, which is high, it is not."""
    own = tiny(0, context_frames=CONTEXT_FRAMES)
    own.generation = Generation(temp_text=3.0)
    torch.manual_seed(7)
    likely = np.zeros(2)
    with closing(Watched(own, 2)) as stepper:
        for slot in (0, 1):
            stepper.join(slot)
        for frame in long_call(40):
            made = stepper.step({0: frame, 1: frame}, Steering(temperatures={1: 0.02}))
            likely += made.drawn[:, 0] == stepper.likeliest.numpy()
    assert likely[1] > 36
    assert likely[0] < 20


def test_logits_that_are_no_numbers_break_the_engine() -> None:
    broken = tiny(0, context_frames=CONTEXT_FRAMES)
    stepper = Stepper(broken, 2)
    stepper.join(1)
    stepper.step({1: call(0)[0]})
    broken.lm.text_linear.weight.fill_(torch.nan)
    with pytest.raises(EngineBroken, match=r"not finite in slots \[1\]"):
        stepper.step({1: call(0)[1]})


def test_a_transcript_begins_anew_when_it_is_told_to() -> None:
    with closing(Stepper(models(), 2)) as stepper:
        stepper.join(0)
        frames = call(1)
        heard = []
        for number, frame in enumerate(frames):
            if number == 9:
                stepper.forget_transcript(0)
            got = step(stepper, {0: frame})[0]
            heard.append(got.word)
            assert got.tokens == expected(1)[number].tokens
    before = [frame.word for frame in expected(1)]
    assert heard[:9] == before[:9]
    assert heard[9:] != before[9:]
