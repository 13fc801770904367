"""A call goes on in another process from its token log, exactly."""

import random
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moshi_rig import CONTEXT_FRAMES, SHORTEST, Frame, call, models, step

from trunkline_runtime.engine.moshi.rebuild import rebuild
from trunkline_runtime.engine.moshi.stepper import Step, Stepper
from trunkline_runtime.engine.moshi.tiny import tiny
from trunkline_runtime.engine.moshi.token_log import FRAME_BYTES, MAX_FRAMES, TokenLog

AFTER = 100  # frames that the rebuilt call is compared for
CHUNK = 7  # so that there are several, and the last is shorter
SLOT = 1

FRAMES = st.lists(
    st.tuples(st.integers(0, 32_000), st.lists(st.integers(0, 2047), min_size=16, max_size=16)),
    max_size=20,
)


@given(FRAMES)
def test_a_log_is_24_bytes_a_frame_and_gives_back_what_it_was_given(
    frames: list[tuple[int, list[int]]],
) -> None:
    log = TokenLog()
    for text, codes in frames:
        log.append([text, *codes[:8]], codes[8:])
    assert len(bytes(log)) == FRAME_BYTES * len(frames) == 24 * len(log)
    drawn, heard = TokenLog(bytes(log)).tables()
    assert drawn.tolist() == [[text, *codes[:8]] for text, codes in frames]
    assert heard.tolist() == [codes[8:] for _, codes in frames]


def test_a_log_that_is_full_or_cut_off_rebuilds_nothing() -> None:
    log = TokenLog(bytes(FRAME_BYTES * MAX_FRAMES))
    assert not log.full
    log.append([0] * 9, [0] * 8)
    assert log.full
    assert len(log) == MAX_FRAMES
    with pytest.raises(ValueError, match="24 bytes a frame"):
        TokenLog(bytes(25))


def long_call(frames: int) -> list[bytes]:
    """Frames of several callers, one after the other."""
    chance = random.Random(5)
    return [call(chance.randrange(8))[chance.randrange(SHORTEST)] for _ in range(frames)]


def record(log: TokenLog, made: Step, slot: int) -> None:
    log.append(made.drawn[slot].tolist(), made.heard[slot].tolist())


def is_encoder(name: str) -> bool:
    return name.startswith(("mimi.encoder", "mimi.downsample"))


def continued(
    before: int, *, after: int = AFTER, with_encoder: bool = True
) -> tuple[list[Frame], list[Frame], list[bool]]:
    """A call as it goes on where it is, and as it goes on rebuilt; and whether both hear the same codes."""
    frames = long_call(before + after)
    stay, went, same_codes = [], [], []
    log = TokenLog()
    elsewhere = tiny(0, context_frames=CONTEXT_FRAMES, mimi_context=CONTEXT_FRAMES)
    with closing(Stepper(models(), 2)) as here, closing(Stepper(elsewhere, 3)) as there:
        here.join(0)
        for frame in frames[:before]:
            record(log, here.step({0: frame}), 0)
        there.join(0)
        neighbour = [step(there, {0: frame})[0] for frame in frames[:5]]
        rebuild(there, SLOT, TokenLog(bytes(log)), CHUNK)
        if with_encoder:
            rows = here.rows.export(0)
            there.rows.restore(SLOT, {n: row for n, row in rows.items() if is_encoder(n)})
        for number, frame in enumerate(frames[before:]):
            mine, theirs = here.step({0: frame}), there.step({SLOT: frame, 0: frames[number]})
            stay.append(taken(mine, 0))
            went.append(taken(theirs, SLOT))
            same_codes.append(bool((mine.heard[0] == theirs.heard[SLOT]).all()))
        assert neighbour
    return stay, went, same_codes


def taken(made: Step, slot: int) -> Frame:
    ready = made.ready[slot]
    tokens = tuple(made.tokens[slot].tolist()) if ready else None
    return Frame(tokens, made.pcm[slot].copy() if ready else None, 0, 0.0)


@pytest.mark.parametrize("before", [5, 40])
def test_the_next_hundred_frames_are_equal_also_after_the_ring_has_wrapped(before: int) -> None:
    stay, went, _ = continued(before)
    assert [frame.tokens for frame in went] == [frame.tokens for frame in stay]
    pairs = [(a.pcm, b.pcm) for a, b in zip(stay, went, strict=True)]
    apart = [float(np.abs(a - b).max()) for a, b in pairs if a is not None and b is not None]
    # The decoder's ring takes two steps at once, see rebuild.py; six frames later nothing is left of it.
    assert max(apart[:8]) <= (1e-5 if before < CONTEXT_FRAMES // 2 else 1e-3)
    assert max(apart[8:]) <= 1e-5


def test_an_encoder_that_begins_anew_hears_the_same_again_when_its_window_has_passed() -> None:
    """What a log alone cannot bring back. The tiny encoder looks back six frames, and its convolutions one."""
    _, _, same_codes = continued(40, after=20, with_encoder=False)
    assert not all(same_codes[:8])
    assert all(same_codes[8:])


def test_the_neighbour_of_a_rebuilt_call_notices_nothing() -> None:
    frames, log = long_call(30), TokenLog()
    with closing(Stepper(models(), 2)) as stepper:
        stepper.join(0)
        alone = []
        for frame in frames:
            made = stepper.step({0: frame})
            record(log, made, 0)
            alone.append(taken(made, 0))
    with closing(Stepper(models(), 2)) as stepper:
        stepper.join(0)
        beside = []
        for number, frame in enumerate(frames):
            if number == 20:
                rebuild(stepper, SLOT, log)
            beside.append(taken(stepper.step({0: frame}), 0))
    assert [frame.tokens for frame in beside] == [frame.tokens for frame in alone]
