"""Two hundred calls in ten seconds against three warm pods of sixteen slots and containers that stand by."""

import asyncio
import time
from typing import Any

import pytest
from burst_stage import APP, Outcome, Stage, percentile, staged, until, waits
from gateway_rig import AGENT, metric, on_uvloop

CALLS, ARRIVING = 200, 10.0
WARM, SLOTS = 48, 16
ANSWER_SECONDS = 8.0
LATE = 2.0  # seconds in which a busy machine must have said so


def test_the_arithmetic_of_a_line() -> None:
    assert waits([0, 1, 2], [0.0], 2, 8) == [0, 0, None]
    assert waits([0, 1, 2], [5.0], 2, 8) == [5, 4, None]
    assert waits([0.0, 2.0], [9.5], 2, 8) == [None, 7.5]
    assert waits([], [1.0], 2, 8) == []


async def hang_up(outcomes: list[Outcome]) -> None:
    await asyncio.gather(*(one.call.close() for one in outcomes if one.call))


async def zero(stage: Stage) -> float:
    """The seconds until no container is there any more."""
    began = time.monotonic()
    await stage.stand_by(0)
    await until(lambda: not stage.there)
    return time.monotonic() - began


def load(stage: Stage) -> dict[str, int]:
    return {**stage.gateway.gateway.load()["agents"][AGENT]}  # type: ignore[dict-item]  # of counts


@pytest.mark.timeout(400)
def test_with_ten_standing_by_nobody_is_refused() -> None:
    @on_uvloop
    async def run() -> None:
        route = {"answerSeconds": ANSWER_SECONDS}
        async with staged(pods=3, slots=SLOTS, route=route) as stage:
            await stage.stand_by(10)
            await stage.ready(10)
            outcomes = await stage.callers(CALLS, ARRIVING)
            assert all(one.call for one in outcomes)
            assert load(stage)["refused"] == 0
            assert load(stage)["burst"] == CALLS - WARM
            start = "trunkline_burst_start_seconds_count"
            assert await metric(stage.gateway, start, agent=AGENT, start="warm") == CALLS - WARM
            assert len(stage.there) == 10
            waited = [one.waited for one in outcomes]
            assert percentile(waited, 0.5) < 0.5
            assert percentile(waited, 0.99) < ANSWER_SECONDS
            await hang_up(outcomes)
            assert APP.scaledown_window <= await zero(stage) < 60

    run()


@pytest.mark.timeout(400)
def test_with_two_standing_by_those_are_refused_whom_arithmetic_cannot_answer() -> None:
    """The other containers take so long to be restored that only those who come late enough are answered."""
    patience, arriving = 6.0, 10.0

    @on_uvloop
    async def run() -> None:
        route = {"answerSeconds": patience}
        modal: dict[str, Any] = {"restore_seconds": 7.0, "clones": 8}
        async with staged(pods=3, slots=SLOTS, route=route, **modal) as stage:
            await stage.stand_by(2)
            await stage.ready(2)
            await stage.clones(8)
            began = time.time()
            outcomes = await stage.callers(CALLS, arriving)
            ready = [boot.ready_t - began for boot in stage.there if boot.ready_t]
            # The first 48 find a warm slot, and of the others the first that come a container that stands by.
            predicted = waits([one.came for one in outcomes[WARM:]], ready, SLOTS, patience)
            refused = [one for one in outcomes if one.call is None]
            assert all(one.call for one in outcomes[: WARM + 2 * SLOTS])
            assert refused
            for one, expected in zip(outcomes[WARM:], predicted, strict=True):
                if (one.call is None) != (expected is None):
                    # Only whose last moment is that in which a container became ready may go either way.
                    gap = min(abs(one.came + patience - moment) for moment in ready)
                    assert gap < 1.0, (one, expected)
            assert len(refused) == load(stage)["refused"]
            assert max(one.waited for one in refused) < patience + LATE
            assert max(one.waited for one in outcomes) < patience + LATE
            await hang_up(outcomes)
            await zero(stage)

    run()
