"""The breaker of snapshots: pure, so that every history of starts can be tried."""

import random

from hypothesis import given
from hypothesis import strategies as st

from trunkline_operator.agent.spec import Snapshot
from trunkline_operator.burst.breaker import (
    FIRST_WAIT,
    LEVELS,
    LONGEST_WAIT,
    NEVER_SLOW_SECONDS,
    SLOW_SECONDS,
    TRIP,
    WINDOW,
    Breaker,
    following,
    noted,
    probe_at,
    probed,
    slow_after,
)

NOW = 1_000.0
GPU, CPU, NONE = LEVELS
ASKED = st.sampled_from(LEVELS)
# (starts that were good, bad, seconds until then)
HISTORY = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.floats(0, 2 * LONGEST_WAIT)))


def test_two_bad_starts_of_five_are_too_many() -> None:
    once = noted(Breaker.of(GPU), good=0, bad=1, now=NOW)
    assert (once.level, once.bad, once.fallen) == (GPU, 1, False)
    apart = once
    for _ in range(WINDOW - 1):
        apart = noted(apart, good=1, bad=0, now=NOW)
    assert noted(apart, good=0, bad=1, now=NOW).level is GPU  # the first is long ago

    twice = noted(noted(once, good=3, bad=0, now=NOW), good=0, bad=1, now=NOW)
    assert (twice.level, twice.since, twice.recent) == (CPU, NOW, ())
    assert twice.fallen
    lower = noted(twice, good=0, bad=2, now=NOW + 1)
    assert (lower.level, lower.trips) == (NONE, 2)
    assert noted(lower, good=0, bad=9, now=NOW + 2) == lower  # nothing is restored any more


def test_the_level_above_is_tried_again_and_each_failure_doubles_the_wait() -> None:
    breaker, now, waits = Breaker.of(CPU), NOW, []
    for _ in range(8):
        breaker = noted(breaker, good=0, bad=TRIP, now=now)
        assert breaker.level is NONE
        waits.append(probe_at(breaker) - now)
        assert probed(breaker, probe_at(breaker) - 1) == breaker
        now = probe_at(breaker)
        breaker = probed(breaker, now)
        assert (breaker.level, breaker.fallen) == (CPU, False)
    assert waits[:3] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
    assert waits[-1] == LONGEST_WAIT


def test_a_restore_is_slow_if_it_takes_longer_than_the_first_boot() -> None:
    cpu = Breaker.of(CPU)
    assert slow_after(cpu, 95.04) == 95.0
    assert slow_after(cpu, 1.2) == NEVER_SLOW_SECONDS
    assert slow_after(cpu, 0.0) == SLOW_SECONDS  # nobody measured one
    fallen = noted(cpu, good=0, bad=2, now=NOW)
    assert slow_after(fallen, 95.0) == slow_after(None, 95.0) == 0.0


def test_restores_around_the_mean_of_modals_fleet_are_not_slow_by_themselves() -> None:
    draw = random.Random(1)
    slow = [max(draw.gauss(13.8, 4.0), 0.0) > SLOW_SECONDS for _ in range(10_000)]
    assert sum(slow) / 10_000 < 0.001


def test_healthy_starts_make_it_forget() -> None:
    breaker = probed(noted(Breaker.of(CPU), good=0, bad=TRIP, now=NOW), NOW + FIRST_WAIT)
    assert breaker.trips == 1
    assert noted(breaker, good=4, bad=0, now=NOW).trips == 1
    assert noted(breaker, good=5, bad=0, now=NOW).trips == 0


def test_from_none_it_climbs_a_level_at_a_time() -> None:
    fallen = noted(noted(Breaker.of(GPU), good=0, bad=2, now=NOW), good=0, bad=2, now=NOW)
    assert fallen.level is NONE
    halfway = probed(fallen, NOW + LONGEST_WAIT)
    assert halfway.level is CPU
    assert probed(halfway, halfway.since + 1) == halfway
    assert probed(halfway, probe_at(halfway)).level is GPU


@given(ASKED, ASKED, HISTORY)
def test_it_never_rises_above_what_is_asked_for(
    asked: Snapshot, later: Snapshot, history: list[tuple[int, int, float]]
) -> None:
    breaker, now = Breaker.of(asked), NOW
    for good, bad, seconds in history:
        now += seconds
        before = breaker
        breaker = probed(noted(breaker, good, bad, now), now)
        assert LEVELS.index(breaker.level) >= LEVELS.index(asked)
        assert abs(LEVELS.index(breaker.level) - LEVELS.index(before.level)) <= 1
        assert len(breaker.recent) <= WINDOW
        assert FIRST_WAIT <= breaker.wait <= LONGEST_WAIT
    assert following(breaker, asked) is breaker
    if later is not asked:
        assert following(breaker, later) == Breaker.of(later)


@given(st.integers(0, 2**32), st.floats(0.0, 1.0))
def test_told_one_by_one_it_trips_no_later_than_told_at_once(seed: int, share: float) -> None:
    draw = random.Random(seed)
    starts = [draw.random() >= share for _ in range(WINDOW)]
    single = Breaker.of(CPU)
    for good in starts:
        single = noted(single, good=int(good), bad=int(not good), now=NOW)
    once = noted(Breaker.of(CPU), good=sum(starts), bad=WINDOW - sum(starts), now=NOW)
    assert single.level is once.level is (NONE if starts.count(False) >= TRIP else CPU)


def test_of_six_bad_in_ten_it_trips_within_five_starts_and_of_one_in_fifty_hardly_ever() -> None:
    def starts_until_it_trips(share: float, seed: int) -> int:
        draw, breaker = random.Random(seed), Breaker.of(GPU)
        for n in range(1, 101):
            good = draw.random() >= share
            breaker = noted(breaker, good=int(good), bad=int(not good), now=NOW)
            if breaker.fallen:
                return n
        return 101

    crashing = [starts_until_it_trips(0.6, seed) for seed in range(500)]
    assert sum(n <= 5 for n in crashing) / 500 > 0.88
    assert max(crashing) < 20
    healthy = [starts_until_it_trips(0.02, seed) for seed in range(500)]
    assert sum(n <= 5 for n in healthy) / 500 < 0.02
