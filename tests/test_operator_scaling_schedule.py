"""Windows with a higher floor: when they open, in which zone, and what is told of wrong ones."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import an_agent

from trunkline_operator.agent.spec import Autoscaling, SpecError, Warm
from trunkline_operator.scaling.decision import Demand, Memory, decided
from trunkline_operator.scaling.schedule import Floor, Window, floor, trouble

OFFICE = Window(start="0 8 * * MON-FRI", duration_seconds=9 * 3600, min_pods=5)
NIGHT = Window(start="0 22 * * *", duration_seconds=8 * 3600, min_pods=2)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("2026-11-27 07:58", Floor(0, 60.0)),  # a Friday; a minute until pods must begin to start
        ("2026-11-27 07:59", Floor(5, 9 * 3600 + 60.0)),
        ("2026-11-27 16:59", Floor(5, 60.0)),
        ("2026-11-27 17:00", Floor(0, (2 * 24 + 15) * 3600 - 60.0)),
        ("2026-11-28 12:00", Floor(0, (24 + 20) * 3600 - 60.0)),  # a Saturday
    ],
)
def test_a_window_opens_early_enough_for_a_pod_to_start(when: str, expected: Floor) -> None:
    assert floor([OFFICE], at(when), start_seconds=60.0) == expected


def test_the_highest_of_all_windows_counts_also_past_midnight() -> None:
    early = replace(NIGHT, start="0 6 * * *", duration_seconds=3600, min_pods=1)
    assert floor([NIGHT, OFFICE], at("2026-11-27 05:00"), 0.0).pods == 2
    assert floor([NIGHT, early], at("2026-11-27 06:30"), 0.0).pods == 1
    for both in ([OFFICE, NIGHT, early], [early, NIGHT, OFFICE]):
        assert floor(both, at("2026-11-27 08:00"), 0.0).pods == 5
        late = [replace(window, duration_seconds=12 * 3600) for window in both]
        assert floor(late, at("2026-11-27 08:00"), 0.0).pods == 5
    assert floor([], 0.0, 60.0) == Floor(0, None)


def test_clocks_that_change_move_the_window() -> None:
    """Berlin's eight o'clock is 6:00 UTC in summer and 7:00 in winter."""
    berlin = replace(OFFICE, time_zone="Europe/Berlin")
    for day, hour in (("2026-07-01", 6), ("2026-12-01", 7)):
        assert floor([berlin], at(f"{day} {hour - 1:02}:59"), 0.0).pods == 0
        assert floor([berlin], at(f"{day} {hour:02}:00"), 0.0).pods == 5


@settings(deadline=None)
@given(st.floats(1.7e9, 1.9e9), st.integers(0, 3600), st.sampled_from([OFFICE, NIGHT]))
def test_it_changes_when_it_said_it_would_and_not_before(
    now: float, start: int, window: Window
) -> None:
    seen = floor([window], now, float(start))
    assert seen.changes_in is not None
    assert seen.changes_in > 0
    before = floor([window], now + seen.changes_in * 0.99, float(start))
    assert before.pods == seen.pods
    after = floor([window], now + seen.changes_in + 1, float(start))
    assert after.pods != seen.pods


def test_the_decider_looks_again_when_the_floor_changes() -> None:
    warm = Warm(min_pods=1, max_pods=9, buffer_slots=0, schedule=(OFFICE,))
    demand = Demand(busy=0, burst=0, refused=0, known=True, active=1, serving=1)
    for autoscaling, replicas in ((Autoscaling.INTERNAL, None), (Autoscaling.EXTERNAL, 2)):
        subject = replace(warm, autoscaling=autoscaling, replicas=replicas)
        memory = Memory(wish=1, refused=0)
        closed = decided(subject, demand, at("2026-11-27 07:58"), memory)
        assert (closed.pods, closed.look_again) == (replicas or 1, 60.0)
        open_ = decided(subject, demand, at("2026-11-27 07:59"), closed.memory)
        assert open_.pods == 5


def test_max_pods_is_stronger_than_a_window() -> None:
    warm = Warm(min_pods=1, max_pods=3, buffer_slots=0, schedule=(OFFICE,))
    demand = Demand(busy=0, burst=0, refused=0, known=True, active=1, serving=1)
    assert decided(warm, demand, at("2026-11-27 09:00"), Memory(wish=1)).pods == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start": "0 25 * * *"}, "is no cron expression of five fields"),
        ({"start": "every day at 8"}, "is no cron expression of five fields"),
        ({"start": "0 0 30 2 *"}, "is no cron expression of five fields"),
        ({"time_zone": "Berlin"}, "is not known: use a name such as Europe/Berlin"),
        ({"time_zone": "../etc/passwd"}, "is not known"),
    ],
)
def test_what_is_wrong_is_told(changes: dict[str, Any], said: str) -> None:
    assert said in trouble(replace(OFFICE, **changes))
    assert trouble(OFFICE) == ""


def test_an_agent_with_a_wrong_window_is_refused_in_words() -> None:
    wrong = {"start": "0 25 * * *", "durationSeconds": 60, "minPods": 1}
    with pytest.raises(SpecError, match=r"warm\.schedule\[0\]\.start '0 25 \* \* \*' is no cron"):
        an_agent(warm__schedule=[wrong])
