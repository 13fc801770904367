"""The local Modal's faults as decisions: pure, so every rule is tried on arbitrary schedules."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline_dev.modal.faults import (
    STATES,
    Fault,
    FaultError,
    Plan,
    Rule,
    Schedule,
    described,
    parse,
    struck,
)

NOW = 1_000.0
SEEDS = st.integers(0, 2**32)


def schedule(*rules: Rule, seed: int = 0) -> Schedule:
    made = Schedule()
    made.replace(Plan(seed=seed, rules=rules), NOW)
    return made


def strikes(schedule: Schedule, fault: Fault, subject: str, events: int) -> list[int]:
    """Which of so many events are struck, counted from 1."""
    return [n for n in range(1, events + 1) if schedule.strike(fault, subject, NOW)]


def test_the_nth_event_that_a_rule_concerns_is_struck() -> None:
    faults = schedule(Rule(fault=Fault.RPC_FAILS, name="App*", nth=(2, 4)))

    assert not faults.strike(Fault.RPC_FAILS, "FunctionCreate", NOW)
    assert not faults.strike(Fault.RPC_HANGS, "AppPublish", NOW)
    assert strikes(faults, Fault.RPC_FAILS, "AppPublish", 6) == [2, 4]
    assert (faults.counts[0].seen, faults.counts[0].struck) == (6, 2)


def test_the_first_rule_that_strikes_counts_and_all_have_seen_the_event() -> None:
    faults = schedule(
        Rule(fault=Fault.SESSION_REFUSED, status="429", nth=(2,)),
        Rule(fault=Fault.SESSION_REFUSED, status="503"),
    )
    found = [faults.strike(Fault.SESSION_REFUSED, "app/us-east", NOW) for _ in range(3)]

    assert [strike and strike.rule.status for strike in found] == ["503", "429", "503"]
    assert [(count.seen, count.struck) for count in faults.counts] == [(3, 1), (3, 2)]


@settings(deadline=None)  # hundreds of generators are seeded, on a machine that may be busy
@given(SEEDS, st.floats(0, 1), st.integers(0, 5))
def test_a_share_depends_on_seed_place_and_number_alone(
    seed: int, share: float, place: int
) -> None:
    rule = Rule(fault=Fault.RESTORE_CRASHES, share=share)
    first = [bool(struck(rule, seed, place, n)) for n in range(1, 200)]
    backwards = [bool(struck(rule, seed, place, n)) for n in range(199, 0, -1)]

    assert first == backwards[::-1]
    assert abs(sum(first) / len(first) - share) < 0.2  # five standard deviations and more
    if share in (0.0, 1.0):
        assert sum(first) == share * len(first)


def test_other_seeds_and_other_places_draw_differently() -> None:
    rule = Rule(fault=Fault.RESTORE_CRASHES, share=0.5)

    def draws(seed: int, place: int) -> list[bool]:
        return [bool(struck(rule, seed, place, n)) for n in range(64)]

    assert draws(1, 0) != draws(2, 0) != draws(1, 1)


@settings(deadline=None)
@given(SEEDS, st.integers(0, 100), st.integers(0, 50))
def test_seconds_are_drawn_around_their_mean_and_never_negative(
    seed: int, seconds: int, spread: int
) -> None:
    rule = Rule(fault=Fault.BOOT_SLOW, seconds=seconds, spread=spread)
    drawn = [strike.seconds for n in range(1, 400) if (strike := struck(rule, seed, 0, n))]

    assert len(drawn) == 399
    assert all(value is not None and value >= 0 for value in drawn)
    if spread == 0:
        assert set(drawn) == {seconds}
    elif seconds >= 5 * spread:  # hardly anything is cut off at 0
        mean = sum(value or 0 for value in drawn) / len(drawn)
        assert abs(mean - seconds) < spread / 2


def test_a_state_holds_in_its_window_and_for_what_it_names() -> None:
    faults = schedule(Rule(fault=Fault.REGION_DOWN, name="eu-*", after=10, lasts=5))
    times = (NOW, NOW + 9.9, NOW + 10, NOW + 14.9, NOW + 15)

    held = [bool(faults.holds(Fault.REGION_DOWN, "eu-west", time)) for time in times]
    assert held == [False, False, True, True, False]
    assert not faults.holds(Fault.REGION_DOWN, "us-east", NOW + 12)
    assert [faults.next_change(time) for time in times] == [
        *(NOW + 10, NOW + 10),
        *(NOW + 15, NOW + 15, None),
    ]


def test_events_outside_a_window_are_not_counted() -> None:
    faults = schedule(Rule(fault=Fault.RPC_FAILS, nth=(1,), after=10))

    assert not faults.strike(Fault.RPC_FAILS, "AppPublish", NOW)
    assert faults.strike(Fault.RPC_FAILS, "AppPublish", NOW + 10)


def test_new_rules_start_counting_anew() -> None:
    faults = schedule(Rule(fault=Fault.RPC_FAILS, nth=(1,)))
    assert strikes(faults, Fault.RPC_FAILS, "x", 3) == [1]
    faults.replace(faults.plan, NOW)
    assert strikes(faults, Fault.RPC_FAILS, "x", 3) == [1]
    faults.replace(Plan(), NOW)
    assert strikes(faults, Fault.RPC_FAILS, "x", 3) == []


def test_what_is_written_is_what_is_meant() -> None:
    plan = parse(
        {
            "seed": 7,
            "rules": [
                {"fault": "rpc-fails", "name": "App*", "nth": 2, "status": "ABORTED", "done": True},
                {"fault": "rpc-fails", "status": "RESOURCE_EXHAUSTED", "retryAfter": 1},
                {"fault": "session-refused", "status": 429, "share": 0.5, "nth": [1, 3]},
                {"fault": "boot-slow", "name": "*/restored", "seconds": 13.8, "spread": 4},
                {"fault": "region-down", "name": "eu-west", "after": 5, "lasts": 60, "cut": True},
            ],
        }
    )

    assert plan == Plan(
        seed=7,
        rules=(
            Rule(fault=Fault.RPC_FAILS, name="App*", nth=(2,), status="ABORTED", done=True),
            Rule(fault=Fault.RPC_FAILS, status="RESOURCE_EXHAUSTED", retry_after=1.0),
            Rule(fault=Fault.SESSION_REFUSED, status="429", share=0.5, nth=(1, 3)),
            Rule(fault=Fault.BOOT_SLOW, name="*/restored", seconds=13.8, spread=4.0),
            Rule(fault=Fault.REGION_DOWN, name="eu-west", after=5.0, lasts=60.0, cut=True),
        ),
    )
    shown = described(schedule(*plan.rules, seed=7))
    assert shown.pop("counts") == [{"seen": 0, "struck": 0}] * 5
    assert parse(shown) == plan
    assert parse([]) == Plan()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("down", 'faults are an object with "seed" and "rules"'),
        ({"rule": []}, 'faults are an object with "seed" and "rules"'),
        ({"seed": "x"}, "seed: a whole number, not 'x'"),
        ({"rules": {}}, "rules: a list of at most 100"),
        ([{}], 'rules[0]: an object with "fault"'),
        ([{"fault": "fire"}], "rules[0]: there is no fault 'fire'; there are rpc-fails, "),
        ([{"fault": "rpc-hangs", "status": "X"}], "rules[0]: rpc-hangs has no 'status'; it takes"),
        ([{"fault": "no-capacity", "nth": 1}], "rules[0]: no-capacity has no 'nth'; it takes"),
        ([{"fault": "rpc-fails", "nth": 0}], "rules[0].nth: a whole number from 1"),
        ([{"fault": "rpc-fails", "share": 1.1}], "rules[0].share: a number from 0 to 1, not 1.1"),
        ([{"fault": "rpc-fails", "after": -1}], "rules[0].after: a number from 0 to 86400, not -1"),
        ([{"fault": "rpc-fails", "after": float("nan")}], "rules[0].after: a number from 0"),
        ([{"fault": "rpc-fails", "status": "503"}], "rules[0].status: one of CANCELLED, "),
        ([{"fault": "session-refused", "status": 200}], "status: an HTTP status from 400 to 599"),
        ([{"fault": "rpc-fails", "done": 1}], "rules[0].done: true or false, not 1"),
        ([{"fault": "rpc-fails", "name": 1}], "rules[0].name: a text, not 1"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_a_sentence(content: Any, sentence: str) -> None:
    with pytest.raises(FaultError) as refused:
        parse(content)
    assert sentence in str(refused.value)


def test_every_fault_can_be_written_and_states_take_no_number() -> None:
    for fault in Fault:
        [rule] = parse([{"fault": fault.value}]).rules
        assert rule == Rule(fault=fault)
        if fault in STATES:
            with pytest.raises(FaultError):
                parse([{"fault": fault.value, "share": 0.5}])
