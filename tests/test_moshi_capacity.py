"""How many slots an engine offers, and when it stops; the arithmetic of memory; when frames are due."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moshi_rig import models

from trunkline_runtime.engine.moshi.capacity import (
    FRAME_SECONDS,
    GIB,
    HEADROOM,
    WINDOW_STEPS,
    Memory,
    Strain,
    fit,
    p99,
)
from trunkline_runtime.engine.moshi.clock import next_due
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.moshi.memory import memory_of
from trunkline_runtime.engine.moshi.models import ModelError
from trunkline_runtime.engine.moshi.tiny import tiny

BUDGET = FRAME_SECONDS * HEADROOM


@given(st.integers(1, 64), st.floats(0.001, 0.2), st.floats(0.0, 0.02))
def test_a_batch_that_fits_is_found_and_none_larger_fits(
    slots: int, base: float, each: float
) -> None:
    def measure(number: int) -> float:
        return base + each * number

    found = fit(slots, measure)
    assert 1 <= found.slots <= slots
    assert found.seconds == measure(found.slots)
    if found.slots > 1:
        assert found.keeps
    if found.slots < slots:
        # Rounding may cost one slot where the budget is met exactly.
        assert measure(found.slots + 1) > BUDGET * (1 - 1e-9)


def test_a_stall_of_the_machine_is_not_taken_for_the_models_speed() -> None:
    times = iter([0.5, 0.03])
    assert fit(8, lambda _: next(times)).slots == 8


def test_a_machine_too_slow_for_one_still_offers_one() -> None:
    found = fit(4, lambda slots: 0.1 * slots)
    assert (found.slots, found.keeps) == (1, False)
    assert "1: 100.0 ms, " in str(found)


def test_p99_is_the_nearest_rank() -> None:
    assert p99(list(range(1, 101))) == 99
    assert p99([5.0]) == 5.0


def test_slow_steps_strain_an_engine_and_fast_ones_relieve_it() -> None:
    strain = Strain()
    slow, near, fast = BUDGET * 1.01, BUDGET * 0.95, BUDGET * 0.5
    assert [strain.add(slow) for _ in range(WINDOW_STEPS)][-1]
    assert strain.strained
    assert not any(strain.add(near) for _ in range(WINDOW_STEPS)), "near is not yet relief"
    assert [strain.add(fast) for _ in range(WINDOW_STEPS)][-1]
    assert not strain.strained
    assert not any(strain.add(fast) for _ in range(WINDOW_STEPS - 2))
    assert not strain.add(slow)
    assert not strain.add(fast), "one slow step in 125 is within p99"


def test_on_a_cpu_the_median_counts_and_not_what_else_the_machine_does() -> None:
    steps = [BUDGET * (2 if number % 25 == 0 else 0.5) for number in range(WINDOW_STEPS)]
    strict, patient = Strain(), Strain(statistics.median)
    for seconds in steps:
        strict.add(seconds)
        patient.add(seconds)
    assert (strict.strained, patient.strained) == (True, False)


# Moshi 7B with STT-1B on an L4, from their configs.
L4 = Memory(
    weights=round(17.75e9), slot_fixed=round(114.5e6), slot_frame=524_288, context_frames=3_000
)
L4_TOTAL = round(22.49 * GIB)


def test_an_impossible_configuration_is_refused_with_the_numbers() -> None:
    free = L4_TOTAL - L4.weights
    L4.check(1, free, L4_TOTAL)
    with pytest.raises(ModelError) as refused:
        L4.check(4, free, L4_TOTAL)
    text = str(refused.value)
    assert "weights 16.53 GiB + 4 slots × 1.571 GiB (240 s of context) = 22.82 GiB" in text
    assert "of the device's 22.49 GiB only 3.71 GiB are left" in text
    assert "slotsPerPod: 2 or contextSeconds: 134" in text
    L4.check(2, free, L4_TOTAL)
    with pytest.raises(ModelError, match="take a larger GPU, or int8 weights"):
        L4.check(4, L4_TOTAL // 10, L4_TOTAL)


def test_memory_is_counted_on_the_modules() -> None:
    tiny = models()
    memory = memory_of(tiny)
    # Two layers of 32 channels, keys and values, 4 bytes each.
    assert memory.slot_frame == 2 * 2 * 32 * 4
    assert memory.context_frames == 12
    assert memory.slot_fixed > memory.slot_frame * 12, "the codec and the STT"
    parameters = [p for m in (tiny.lm, tiny.stt, tiny.mimi) for p in m.parameters()]  # type: ignore[union-attr]
    assert memory.weights >= sum(4 * p.numel() for p in parameters)


@given(st.floats(0, 1e6), st.floats(0, 100))
def test_the_clock_never_drifts_and_is_never_more_than_a_step_behind(
    due: float, late: float
) -> None:
    now = due + late
    following, skipped = next_due(due, now)
    ticks = (following - due) / FRAME_SECONDS
    assert ticks == pytest.approx(1 + skipped, abs=1e-6)
    assert now - following <= FRAME_SECONDS + 1e-6
    if late <= FRAME_SECONDS:
        assert skipped == 0


def test_with_auto_as_many_slots_as_are_content_are_taken() -> None:
    free, total = 10 * GIB, 24 * GIB
    most = L4.fits(free, total)
    assert most > 0
    L4.check(most, free, total)
    with pytest.raises(ModelError):
        L4.check(most + 1, free, total)
    assert L4.fits(0, total) == 0


class SlowMachine(MoshiEngine):
    """One on which each slot makes a step 20 ms longer."""

    def _measured(self, slots: int) -> float:
        return 0.02 * slots


def test_an_engine_that_may_have_fewer_offers_what_it_found(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = SlowMachine(lambda: tiny(0), Knobs(slots=8, auto=True))
    engine.load()
    with caplog.at_level("INFO", "trunkline.moshi"):
        engine.prepare()
    assert engine.slots == 3
    assert [record.levelname for record in caplog.records if "3 slots" in record.message] == [
        "INFO"
    ]
