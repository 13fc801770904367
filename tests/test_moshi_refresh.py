"""At the end of its window a call begins anew from its last frames, as if it had begun with them."""

from contextlib import closing

import numpy as np
import torch
from moshi.models import LMGen
from moshi_rig import CONTEXT_FRAMES, call, expected, models, step
from numpy.typing import NDArray
from test_moshi_rebuild import long_call, record

from trunkline_runtime.engine import Event, TurnDetection
from trunkline_runtime.engine.moshi.capacity import GIB, Memory
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.moshi.refresh import KEPT, NEAR, Refresh, is_near, ring_frames
from trunkline_runtime.engine.moshi.stepper import Stepper
from trunkline_runtime.engine.moshi.tiny import tiny
from trunkline_runtime.engine.moshi.token_log import TokenLog

BEFORE, AFTER = 40, 60  # frames, of a window of twelve
CHUNK = 4


class Primed:
    """The stock LMGen at batch 1, made to say what was said from some frame on; then it goes on by itself."""

    def __init__(self) -> None:
        own = tiny(0, context_frames=CONTEXT_FRAMES, mimi_context=CONTEXT_FRAMES)
        self._forced: NDArray[np.int64] | None = None
        self._drawn = torch.zeros(9, dtype=torch.int64)
        self._gen = LMGen(
            own.lm, use_sampling=False, on_text_hook=self._text, on_audio_hook=self._audio
        )
        self._gen.streaming_forever(1)

    def _text(self, tokens: torch.Tensor) -> None:
        if self._forced is not None:
            tokens[:] = int(self._forced[0])
        self._drawn[0] = tokens[0]

    def _audio(self, tokens: torch.Tensor) -> None:
        if self._forced is not None:
            tokens[0] = torch.from_numpy(self._forced[1:])
        self._drawn[1:] = tokens[0]

    def __call__(
        self, heard: NDArray[np.int64], forced: NDArray[np.int64] | None = None
    ) -> list[int]:
        """Steps with the codes of the caller's frame; the tokens that were drawn."""
        self._forced = forced
        with torch.no_grad():
            self._gen.step(torch.from_numpy(heard.copy())[None, :, None])
        return [int(token) for token in self._drawn]


def refreshed(*, refresh: bool = True) -> tuple[list[list[int]], TokenLog, int]:
    """What a call draws after BEFORE frames, refreshed on the way; its whole log, and where it now begins."""
    log, frames, said, began = TokenLog(), long_call(BEFORE + AFTER), [], 0
    with closing(Stepper(models(), 2)) as stepper:
        stepper.join(0)
        under_way: Refresh | None = None
        for number, frame in enumerate(frames):
            made = stepper.step({0: frame})
            record(log, made, 0)
            if number + 1 > BEFORE:
                said.append(made.drawn[0].tolist())
            if refresh and number + 2 == BEFORE:
                under_way = Refresh(stepper, 0, log, CHUNK)
                began = under_way.began
            if under_way is not None and under_way.advance():
                assert number + 1 == BEFORE, "two chunks, while the call went on"
                under_way = None
    return said, log, began


def test_a_refreshed_call_goes_on_as_one_that_began_with_its_last_frames() -> None:
    said, log, began = refreshed()
    drawn, heard = log.tables()
    assert began == BEFORE - 1 - int(KEPT * CONTEXT_FRAMES)
    oracle = Primed()
    for frame in range(began, BEFORE):
        assert oracle(heard[frame], drawn[frame]) == drawn[frame].tolist()
    assert [oracle(heard[frame]) for frame in range(BEFORE, BEFORE + AFTER)] == said


def test_a_window_that_slides_says_other_things() -> None:
    """Otherwise the comparison above would prove nothing."""
    slid, _, _ = refreshed(refresh=False)
    anew, _, _ = refreshed()
    assert slid[:CONTEXT_FRAMES] != anew[:CONTEXT_FRAMES]


def test_a_neighbour_does_not_notice() -> None:
    with closing(Stepper(models(), 2)) as stepper:
        log, under_way = TokenLog(), None
        stepper.join(0)
        for frame in call(1)[:14]:
            made = stepper.step({0: frame})
            record(log, made, 0)
        stepper.join(1)
        for number, frame in enumerate(call(2)):
            got = step(stepper, {1: frame})[1]
            assert got.tokens == expected(2)[number].tokens
            if number == 4:
                under_way = Refresh(stepper, 0, log, CHUNK)
            if under_way is not None and under_way.advance():
                under_way = None
        assert under_way is None


# --- when ------------------------------------------------------------------------------------------------


def test_it_begins_near_the_end_and_its_memory_is_counted() -> None:
    assert not is_near(int(NEAR * 3000) - 1, 3000)
    assert is_near(int(NEAR * 3000), 3000)
    whole = {"weights": 0, "slot_fixed": 0, "slot_frame": 2**20, "context_frames": 3000}
    memory = Memory(**whole, beside_frames=ring_frames(3000))
    assert memory.beside == (1500 + 128 + 23) * 2**20
    assert f"+ {memory.beside / GIB:.3f} GiB to refresh one" in memory.sentence(4)


def talk(running: MoshiEngine, frames: int, *, pauses: bool) -> list[Event]:
    """A call whose agent is silenced again and again, or never."""
    told: list[Event] = []
    conversation = running.open({}, told.append)
    conversation.configure(TurnDetection(enabled=False))
    conversation.respond()
    for number, frame in enumerate(long_call(frames)):
        if pauses and number % 5 == 0:
            conversation.cancel()
        elif not pauses:
            conversation.respond()
        conversation.hear(frame)
        running.tick()
    assert conversation.window_frames <= frames
    conversation.close()
    return told


def test_an_engine_refreshes_at_pauses_and_slides_where_there_is_none() -> None:
    for refresh, pauses, least, most in (
        (True, True, 4, 8),  # each time it has come from a half to four fifths of twelve frames
        (True, False, 0, 0),
        (False, True, 0, 0),
    ):
        engine = MoshiEngine(models, Knobs(slots=2, measure=False, refresh=refresh))
        engine.load()
        engine.prepare()
        with closing(engine):
            talk(engine, 40, pauses=pauses)
            assert least <= engine.totals()["refreshes"] <= most, (refresh, pauses)
