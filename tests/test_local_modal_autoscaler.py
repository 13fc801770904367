"""The local Modal's autoscaler: pure, so every rule is tried on arbitrary servers."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from trunkline_dev.modal.autoscaler import Member, Settings, containers_wanted, decide

NOW = 1_000.0
WINDOW = 60.0
# Servers that wait for nobody are the ones that may shrink, so half of them do.
WAITING = st.just(0) | st.integers(0, 100)


@st.composite
def settings(draw: st.DrawFn) -> Settings:
    minimum = draw(st.integers(0, 5))
    return Settings(
        minimum=minimum,
        maximum=draw(st.sampled_from([0, *range(max(1, minimum), 12)])),
        buffer=draw(st.integers(0, 3)),
        scaledown_window=WINDOW,
        target=draw(st.sampled_from([0.0, 1.0, 1.5, 4.0, 16.0])),
    )


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        ready = draw(st.sampled_from([True, True, True, False]))
        found.append(
            Member(
                name=f"c{number}",
                ready=ready,
                sessions=draw(st.sampled_from([0, 0, 0, 1, 4, 16])) if ready else 0,
                idle_since=NOW - draw(st.integers(0, 120)),
            )
        )
    return found


@given(settings(), members(), WAITING)
def test_a_decision_reaches_what_is_wanted_and_stays_there(
    wish: Settings, world: list[Member], waiting: int
) -> None:
    decision = decide(wish, world, waiting, NOW)
    started = [
        Member(name=f"new{n}", ready=False, sessions=0, idle_since=NOW)
        for n in range(decision.start)
    ]
    after = [member for member in world if member.name not in decision.stop] + started

    assert len(after) >= decision.wanted
    assert not (decision.start and decision.stop)
    again = decide(wish, after, waiting, NOW)
    assert (again.start, again.stop) == (0, ())


@given(settings(), members(), WAITING)
def test_only_ready_containers_that_were_idle_for_the_window_go(
    wish: Settings, world: list[Member], waiting: int
) -> None:
    stopped = set(decide(wish, world, waiting, NOW).stop)

    for member in world:
        if member.name in stopped:
            assert member.ready
            assert member.sessions == 0
            assert NOW - member.idle_since >= WINDOW
    kept = [m for m in world if m.ready and not m.sessions and m.name not in stopped]
    if stopped and kept:  # the longest idle go first
        latest_gone = max(m.idle_since for m in world if m.name in stopped)
        assert latest_gone <= min(m.idle_since for m in kept)


def test_the_longest_idle_go_and_no_more_than_are_surplus() -> None:
    world = [
        Member(name=f"idle for {seconds}", ready=True, sessions=0, idle_since=NOW - seconds)
        for seconds in (70, 90, 10, 80)
    ]

    decision = decide(Settings(minimum=2, scaledown_window=WINDOW, target=1.0), world, 0, NOW)

    assert decision.stop == ("idle for 90", "idle for 80")


@given(settings(), st.integers(0, 200))
def test_what_is_wanted_has_room_for_all_within_the_limits(wish: Settings, sessions: int) -> None:
    wanted = containers_wanted(wish, sessions)

    assert wanted >= wish.minimum
    assert not wish.maximum or wanted <= wish.maximum
    if wish.target and wanted != wish.maximum:
        assert wanted * wish.target >= sessions
    if not sessions:
        assert wanted == wish.minimum
    if sessions and wish.target and not wish.maximum:
        busy = math.ceil(sessions / wish.target)
        assert wanted == max(wish.minimum, busy + wish.buffer)


@given(settings(), members(), st.integers(1, 100))
def test_without_a_target_one_container_serves_all(
    wish: Settings, world: list[Member], waiting: int
) -> None:
    alone = replace(wish, target=0.0, minimum=0, maximum=0)

    assert decide(alone, world, waiting, NOW).start == (0 if world else 1)


@given(settings(), members())
def test_an_idle_server_goes_to_its_minimum_once_the_window_is_over(
    wish: Settings, world: list[Member]
) -> None:
    idle = [replace(member, ready=True, sessions=0) for member in world]
    decision = decide(wish, idle, 0, NOW + WINDOW)

    assert len(idle) + decision.start - len(decision.stop) == wish.minimum
