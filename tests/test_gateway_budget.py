"""A burst budget at a gateway and between it and the operator's treasury, on real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    OPERATOR_TOKEN,
    FakeModal,
    FakeOperator,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    events,
    metric,
    on_uvloop,
    refused,
    until,
)

from trunkline_operator.decisions.spending import recalled, told
from trunkline_operator.decisions.world import BurstFacts
from trunkline_operator.gateways.fleet import Fleet
from trunkline_operator.scaling.spend import Account, Budget, Terms, bound
from trunkline_operator.treasury import Count, Treasury
from trunkline_runtime.contract import Price, Route, WarmRung
from trunkline_runtime.gateway.process import Running

PRICE = {"callSecond": 0.001, "basis": "a dollar in 1000 s"}
WORST = 0.001 * (600 + 20)  # maxSeconds + answerSeconds of the rig's route


def priced(modal: FakeModal, **changes: Any) -> Route:
    rungs = [modal.rung(price=PRICE)]
    return a_route(rungs=rungs, budget={"perHour": 5.0}, **changes)


def allowances(dollars: float, epoch: int = 1) -> str:
    return json.dumps({"type": "allowances", "epoch": epoch, "agents": {AGENT: dollars}})


def spend(gateway: Running) -> dict[str, Any]:
    return {**gateway.gateway.load()["agents"][AGENT].get("spend", {})}


@on_uvloop
async def test_a_call_past_the_ceiling_is_refused_and_the_rest_of_an_ended_one_is_used_again() -> (
    None
):
    async with FakeModal().serving() as modal, a_gateway(priced(modal)) as gateway:
        with events("trunkline.calls") as lines:
            assert (await refused(call(gateway))).status_code == 503
            async with FakeOperator().linked(gateway) as operator:
                await operator.push(allowances(9.0, epoch=0))  # of an operator that was replaced
                await operator.push(allowances(1.5 * WORST))
                await until(lambda: spend(gateway).get("ceiling") == 1.5 * WORST)
                async with call(gateway) as first:
                    await first.send("hi")
                    assert await first.recv() == "hi"
                    assert (await refused(call(gateway))).status_code == 503
                    told = spend(gateway)
                    assert told["spent"] + told["reserved"] == pytest.approx(WORST)
                await until(lambda: spend(gateway)["reserved"] == 0)
                async with call(gateway):
                    pass
        await until(lambda: len([line for line in lines if line["message"] == "ended"]) == 2)
        said = [line["passed_over"][0]["why"] for line in lines if line["message"] == "refused"]
        assert said == [
            "budget: the operator has dealt this gateway no share yet",
            "budget: a call's worst case no longer fits",
        ]
        ended = [line for line in lines if line["message"] == "ended"]
        assert all(line["price"] == PRICE["basis"] for line in ended)
        # The session began before the 101, so its cost is a little more than the call's.
        costs = [line["cost"] - line["seconds"] * 0.001 for line in ended]
        assert all(-1e-6 <= more < 0.005 for more in costs)
        total = sum(line["cost"] for line in ended)
        assert abs(spend(gateway)["spent"] - total) < 1e-5
        assert await metric(gateway, "trunkline_burst_over_budget_total", agent=AGENT) == 2
        assert len(modal.starts) == 2


@on_uvloop
async def test_a_tenant_without_a_share_stays_off_burst() -> None:
    tenants: dict[str, Any] = {
        "claim": "sub",
        "limits": {
            "concurrentCalls": 0,
            "startsPerMinute": 0,
            "minutesPerDay": 0,
            "guaranteedSlots": 0,
            "burstShare": 0,
        },
        "overrides": {},
    }
    async with FakeModal().serving() as modal:
        route = priced(modal)
        route["access"]["tenants"] = tenants  # type: ignore[typeddict-item]
        async with a_gateway(route) as gateway, FakeOperator().linked(gateway) as operator:
            await operator.push(allowances(9.0))
            await until(lambda: spend(gateway).get("ceiling") == 9.0)
            with events("trunkline.calls") as lines:
                await refused(call(gateway))
            assert lines[-1]["passed_over"][0]["why"] == "budget: the tenant has no share"


# --- with the operator's own link and treasury ---------------------------------------------------------------


TERMS = Terms(
    container_second=0.004,
    slots=4,
    call_seconds=620.0,
    linger_seconds=60.0,
    most=4,
    budget=Budget(per_hour=6.0),
)


class Clock:
    """Half past a full hour; it is set by hand."""

    def __init__(self) -> None:
        self.now = 1_800_001_800.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def treasury(
    gateway: Running, route: Route, clock: Clock, epoch: int
) -> AsyncIterator[Treasury]:
    """An operator's treasury, linked to a gateway that has taken its routes."""
    changed: list[str] = []
    address = ("127.0.0.1", gateway.control_port)
    async with Fleet([address], OPERATOR_TOKEN, epoch=epoch, changed=changed.append) as fleet:
        kept = Treasury(fleet, changed.append, clock)
        fleet.set_route(AGENT, route)
        fleet.open()
        await until(lambda: gateway.gateway.load()["epoch"] == epoch and len(fleet.loads) == 1)
        yield kept


async def ticked(kept: Treasury, clock: Clock, true: Callable[[], object]) -> None:
    """Ticks until that is so; the gateway speaks each second."""
    async with asyncio.timeout(30):
        while not true():
            clock.now += 0.05
            kept.tick()
            await asyncio.sleep(0.05)


def committed(account: Account) -> float:
    """The most that the hour may cost by what is paid, what runs, and what gateways may still let in."""
    last = TERMS.call_seconds + TERMS.after
    factor = TERMS.slots * last / TERMS.call_seconds
    return account.hour + bound(account, TERMS) + factor * account.credit


@on_uvloop
async def test_the_operator_deals_ceilings_that_hold_the_budget_also_across_its_restart() -> None:
    clock = Clock()
    async with FakeModal().serving() as modal, a_gateway() as gateway:
        route = priced(modal)
        async with treasury(gateway, route, clock, 2) as kept:
            kept.agree(AGENT, TERMS, None, None, 0)
            await ticked(kept, clock, lambda: spend(gateway).get("ceiling"))
            assert spend(gateway)["ceiling"] == round(2 * TERMS.call_worst, 6)  # whole calls
            async with call(gateway), call(gateway):
                assert (await refused(call(gateway))).status_code == 503
                kept.agree(AGENT, TERMS, None, Count(containers={"us-east": 2}, until=clock.now), 2)
                await ticked(kept, clock, lambda: (kept.account(AGENT) or Account(at=0)).reserved)
                account = kept.account(AGENT)
                assert account
                assert committed(account) <= 6.0
                facts = BurstFacts(account=account, terms=TERMS)
                status = {"burst": {"spend": told(facts, 2, {}, clock.now)}}
                # The operator dies; another begins with what stands in the status.
                async with treasury(gateway, route, clock, 3) as later:
                    later.agree(AGENT, TERMS, recalled(status), None, 2)
                    await ticked(
                        later, clock, lambda: (later.account(AGENT) or Account(at=0)).reserved
                    )
                    after = later.account(AGENT)
                    assert after
                    assert after.hour >= account.hour - 1e-4
                    assert committed(after) <= 6.0
                    assert after.credit < TERMS.call_worst
                    assert (await refused(call(gateway))).status_code == 503


@on_uvloop
async def test_an_operator_is_told_when_the_budget_is_used_up_and_when_it_is_not() -> None:
    clock = Clock()
    async with (
        FakeModal().serving() as modal,
        a_gateway() as gateway,
        treasury(gateway, priced(modal), clock, 2) as kept,
    ):
        kept.agree(AGENT, TERMS, None, None, 0)
        await ticked(kept, clock, lambda: spend(gateway).get("ceiling"))
        assert not kept.shut(AGENT)
        kept.agree(AGENT, TERMS, None, Count(containers={"us-east": 4}, until=clock.now + 390.0), 0)
        clock.now += 390.0
        await ticked(kept, clock, lambda: kept.shut(AGENT))
        await ticked(kept, clock, lambda: spend(gateway)["ceiling"] == 0.0)
        assert (await refused(call(gateway))).status_code == 503
        # The next hour, with nothing running.
        kept.agree(AGENT, TERMS, None, Count(containers={}, until=clock.now + 1.0), 0)
        clock.now += 3600.0
        await ticked(kept, clock, lambda: not kept.shut(AGENT))
        await ticked(kept, clock, lambda: spend(gateway)["ceiling"] > 0.0)
        async with call(gateway):
            pass


# --- calls that are placed again -----------------------------------------------------------------------------


DEAR = {"callSecond": 1.0, "basis": "a dollar a second"}  # so that a moment is seen in the sum


@on_uvloop
async def test_a_call_that_two_sessions_had_costs_what_both_did() -> None:
    async with FakeModal().serving() as modal:
        route = a_route(rungs=[modal.rung(price=DEAR)], budget={"perHour": 5_000.0})
        async with a_gateway(route) as gateway, FakeOperator().linked(gateway) as operator:
            await operator.push(allowances(2_000.0))
            await until(lambda: spend(gateway).get("ceiling") == 2_000.0)
            modal.deaths = 1
            with events("trunkline.calls") as lines:
                async with call(gateway) as caller:
                    await caller.send("hi")
                    assert await caller.recv() == "hi"
                await until(lambda: any(line["message"] == "ended" for line in lines))
            assert len(modal.starts) == 2
            (ended,) = (line for line in lines if line["message"] == "ended")
            await until(lambda: spend(gateway)["reserved"] == 0)
            assert 0 < ended["cost"] == pytest.approx(spend(gateway)["spent"], abs=1e-5)


@on_uvloop
async def test_a_call_that_left_a_pod_for_a_session_costs_what_it_had_of_both() -> None:
    async with FakeModal().serving() as modal:
        warm = Price(callSecond=1_000.0, basis="a pod of gold")
        rungs = [WarmRung(kind="warm", price=warm), modal.rung(price=DEAR)]
        route = a_route(rungs=rungs, budget={"perHour": 5_000.0})
        bad = FakeWorker("bad", slots=1)
        bad.last_words = "die"
        async with (
            a_gateway(route) as gateway,
            FakeOperator().linked(gateway) as operator,
            bad.serving(gateway),
        ):
            await operator.push(allowances(2_000.0))
            await until(lambda: spend(gateway).get("ceiling") == 2_000.0)
            with events("trunkline.calls") as lines:
                async with call(gateway) as caller:
                    await caller.send("hi")
                    assert await caller.recv() == "hi"
                await until(lambda: any(line["message"] == "ended" for line in lines))
            (ended,) = (line for line in lines if line["message"] == "ended")
            assert ended["rung"] == "burst/us-east"
            await until(lambda: spend(gateway)["reserved"] == 0)
            in_session = spend(gateway)["spent"]
            at_pod = ended["cost"] - in_session
            assert 0.1 < at_pod < 1_000.0 * ended["seconds"], (
                "a tenth of a millisecond, not the whole call"
            )
