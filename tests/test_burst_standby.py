"""Containers that stand by: raised as warm slots run short, given back after, none at a budget's cap."""

from dataclasses import replace
from typing import Final

from hypothesis import given
from hypothesis import strategies as st

from trunkline_operator.agent.spec import Burst, Region
from trunkline_operator.burst.standby import (
    AHEAD_SECONDS,
    GAP_SECONDS,
    Rush,
    Scaling,
    Scalings,
    Standing,
    asked,
    at_cap,
    following,
    needed,
    spread,
)

NOW: Final = 1_000.0
EAST, WEST = Region.US_EAST, Region.EU_WEST
BURST: Final = Burst(
    credentials_secret="modal",
    regions=(EAST, WEST),
    slots_per_container=4,
    min_containers=1,
    buffer_containers=1,
    max_containers=6,
)
REST: Final = asked(BURST)
CALM: Final = Rush(free=8, burst=0, growth=0.1)


def test_at_rest_it_is_what_the_agent_asks_for() -> None:
    assert needed(BURST, CALM) == REST
    assert needed(BURST, replace(CALM, growth=-5.0)) == REST
    assert (REST.minimum, REST.buffer, REST.maximum) == (1, 1, 6)


def test_it_is_raised_before_warm_slots_run_out() -> None:
    """1 call a second more for 15 s finds 8 free slots: 7 calls, two containers of 4; 15 come in all."""
    assert AHEAD_SECONDS == 15
    rush = Rush(free=8, burst=0, growth=1.0)
    assert needed(BURST, rush) == replace(REST, minimum=2, buffer=4)
    # Those that are there already need their containers, too.
    assert needed(BURST, replace(rush, free=0, burst=6)).minimum == 6
    assert needed(BURST, replace(rush, growth=100.0)) == replace(REST, minimum=6, buffer=6)


def test_containers_stand_by_where_calls_are_tried_first() -> None:
    assert spread(REST, BURST.regions, ()) == {EAST: REST, WEST: at_cap(REST)}
    assert spread(REST, BURST.regions, {EAST}) == {EAST: at_cap(REST), WEST: REST}
    assert spread(REST, BURST.regions, {EAST, WEST}) == {EAST: REST, WEST: at_cap(REST)}
    assert (at_cap(REST).minimum, at_cap(REST).buffer, at_cap(REST).maximum) == (0, 0, 6)


def of(scaling: Scaling) -> Scalings:
    return spread(scaling, (EAST,), ())


def test_a_raise_goes_at_once_and_a_fall_waits() -> None:
    raised = replace(REST, minimum=4)
    rest = Standing(scalings=of(REST), since=NOW)
    assert following(rest, of(REST), NOW) == (None, 0.0)
    later = NOW + GAP_SECONDS
    assert following(rest, of(raised), later) == (of(raised), 0.0)
    assert following(rest, of(raised), NOW) == (None, GAP_SECONDS)  # not twice a moment

    high = Standing(scalings=of(raised), since=NOW)
    assert following(high, of(REST), later) == (None, REST.window - GAP_SECONDS)
    assert following(high, of(REST), NOW + REST.window) == (of(REST), 0.0)
    # Higher in one and lower in the other: the one goes, the other waits.
    mixed = replace(REST, minimum=2, buffer=3)
    told, wait = following(high, of(mixed), later)
    assert told == of(replace(REST, minimum=4, buffer=3))
    assert wait > 0


def test_what_is_not_known_is_told_and_so_is_a_persons_wish() -> None:
    assert following(Standing(), of(REST), NOW) == (of(REST), 0.0)
    rest = Standing(scalings=of(REST), since=NOW)
    assert following(rest, of(replace(REST, maximum=9)), NOW) == (of(replace(REST, maximum=9)), 0.0)
    assert following(rest, of(replace(REST, window=9)), NOW) == (of(replace(REST, window=9)), 0.0)
    both = spread(REST, BURST.regions, ())
    assert following(rest, both, NOW) == (both, 0.0)


def test_at_a_cap_nothing_is_kept() -> None:
    high = Standing(scalings=of(replace(REST, minimum=4)), since=NOW)
    assert following(high, of(at_cap(REST)), NOW, capped=True) == (of(at_cap(REST)), 0.0)


SCALING = st.builds(
    Scaling,
    minimum=st.integers(0, 6),
    buffer=st.integers(0, 6),
    maximum=st.just(6),
    window=st.just(60),
)


@given(
    st.lists(st.tuples(st.floats(0, 100), SCALING, st.booleans())),
    st.builds(Rush, free=st.integers(0, 50), burst=st.integers(0, 50), growth=st.floats(-9, 9)),
)
def test_whatever_comes_it_is_told_in_the_end_and_never_too_often(
    wishes: list[tuple[float, Scaling, bool]], rush: Rush
) -> None:
    assert BURST.min_containers <= needed(BURST, rush).minimum <= BURST.max_containers
    standing, now = Standing(), NOW
    for seconds, wish, capped in wishes:
        now += seconds
        told, wait = following(standing, of(wish), now, capped=capped)
        if told is not None:
            assert told[EAST].minimum >= wish.minimum
            if capped:
                assert told == of(wish)
            elif standing.scalings is not None:
                assert now >= standing.since + GAP_SECONDS
            standing = Standing(scalings=told, since=now)
        assert wait >= 0
        # Of two moments in seconds since 1970, each is off by a tenth of a microsecond.
        assert standing.scalings == of(wish) or 0 < wait <= REST.window + 1e-6
