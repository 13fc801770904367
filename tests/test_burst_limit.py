"""The limit of a workspace, as refusals tell it: learned, kept to, tried again, and forgotten."""

from dataclasses import replace
from typing import Final

import pytest
from burst_rig import APP, GOOD, until, world
from hypothesis import given
from hypothesis import strategies as st

from trunkline_dev.modal.faults import Fault, Rule
from trunkline_operator.agent.spec import Region
from trunkline_operator.burst.deployments import Account, Deployments
from trunkline_operator.burst.limit import (
    FIRST_WAIT,
    LONGEST_WAIT,
    Limit,
    counted,
    current,
    refused,
    within,
)
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.burst.standby import Scaling
from trunkline_operator.decisions.world import BurstFacts

NOW: Final = 1_000.0
WISH: Final = Scaling(minimum=8, buffer=6, maximum=10, window=60)


def learned(containers: int = 5, now: float = NOW) -> Limit:
    limit = refused(None, containers, now)
    assert limit
    return limit


def test_what_runs_when_modal_refuses_is_all_that_stands_by_for_a_while() -> None:
    limit = learned()
    assert (limit.containers, limit.since, limit.until) == (5, NOW, NOW + FIRST_WAIT)
    assert within(WISH, limit, 3, NOW) == replace(WISH, minimum=5, buffer=2)
    assert within(WISH, limit, 7, NOW) == replace(WISH, minimum=5, buffer=0)
    assert within(replace(WISH, minimum=1, buffer=1), limit, 0, NOW).minimum == 1
    assert within(WISH, limit, 3, limit.until) == WISH
    assert within(WISH, None, 3, NOW) == WISH


def test_a_refusal_while_nothing_runs_tells_no_number() -> None:
    assert refused(None, 0, NOW) is None
    assert refused(learned(), 0, NOW + 1) == learned()


def test_each_refusal_after_a_wait_doubles_the_next_up_to_an_hour() -> None:
    limit, waits = learned(), []
    # Callers who are refused meanwhile are no trial; they tell how many run now.
    assert refused(limit, 4, NOW + 1) == replace(limit, containers=4)
    for _ in range(6):
        again = refused(limit, 5, limit.until)
        assert again
        waits.append(again.until - limit.until)
        assert again.since == NOW
        limit = again
    assert waits == [600.0, 1200.0, 2400.0, LONGEST_WAIT, LONGEST_WAIT, LONGEST_WAIT]


def test_it_is_forgotten_when_more_run_or_nobody_was_refused_for_long() -> None:
    limit = learned()
    assert counted(limit, 5, NOW + 10) == limit
    assert counted(limit, 6, NOW + 10) is None
    assert current(limit, limit.forgotten - 1) == limit
    assert current(limit, limit.forgotten) is None
    assert counted(limit, 0, limit.forgotten) is None
    assert refused(limit, 5, limit.forgotten) == learned(now=limit.forgotten)


@given(st.lists(st.tuples(st.floats(0, 5000), st.booleans(), st.integers(0, 20))))
def test_whatever_comes_it_never_lasts_for_ever(events: list[tuple[float, bool, int]]) -> None:
    limit, now = None, NOW
    for seconds, no, containers in events:
        now += seconds
        limit = (refused if no else counted)(limit, containers, now)
        assert limit is None or limit.containers >= 1
        told = within(WISH, limit, containers, now)
        assert told.minimum <= WISH.minimum
        assert told.maximum == WISH.maximum
        if limit is not None:
            assert limit.since <= limit.at <= now < limit.forgotten <= now + 2 * LONGEST_WAIT
            assert within(WISH, limit, containers, limit.until) == WISH


# --- at the local Modal --------------------------------------------------------------------------------------


async def test_modal_tells_its_limit_by_refusing_a_setting_or_a_deployment_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as (local, burst):
        deployments = Deployments(Sdk(lambda: burst), lambda _: None)

        def facts() -> BurstFacts:
            return deployments.facts(APP.agent, BurstFacts())

        assert facts().limit is None
        deployments.remember(APP.agent, Account(credentials=GOOD, environment=""))
        deployments.deploy(APP.agent, APP, "hash-1")
        await until(lambda: facts().hash == "hash-1")
        words = "Workspace limit reached: 1 container."
        await local.inject(
            *(
                Rule(fault=Fault.RPC_FAILS, name=name, status="RESOURCE_EXHAUSTED", message=words)
                for name in ("FunctionUpdateSchedulingParams", "AppPublish")
            )
        )
        deployments.scale(APP.agent, APP.name, {Region.US_EAST: WISH})
        await until(lambda: facts().unscaled_at)
        limit = facts().limit
        assert limit
        assert (limit.containers, limit.refusals) == (1, 1)  # that of the first session
        # The next deployment is refused, and forgets nothing.
        deployments.deploy(APP.agent, replace(APP, slots=3), "hash-2")
        await until(lambda: facts().failures == 1)
        assert facts().message == f"LimitReached: {words}"
        assert facts().limit == limit
        # One that is made does not either: only containers tell.
        await local.inject()
        deployments.deploy(APP.agent, replace(APP, slots=3), "hash-2")
        await until(lambda: facts().hash == "hash-2")
        assert facts().limit == limit
        await deployments.close()
