"""What Modal bills, beside what was reckoned: the local Modal's report through the unmodified SDK, and the operator's use of it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import modal as modal_sdk
import pytest
from burst_rig import APP, BAD, GOOD, PATIENCE, joined, place, until
from operator_rig import SPEC, World, operated
from worlds import NOW, a_pod, a_world, an_agent

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, condition
from trunkline_dev.modal.billing import CORE, GIB, GPUS
from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Boot, Kind
from trunkline_operator.burst.bills import ASK_SECONDS, Bill, Bills, last_whole_day
from trunkline_operator.burst.client import Burst, BurstError, BurstReason
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.decisions import events, spending
from trunkline_operator.decisions.plan import Plan
from trunkline_operator.decisions.status import reported
from trunkline_operator.decisions.world import Billed, BurstFacts
from trunkline_operator.scaling import spend
from trunkline_operator.scaling.decision import Memory
from trunkline_operator.scaling.spend import DAY, Account, Terms
from trunkline_runtime.contract import TAG_UID

REPORT: Final = "WorkspaceBillingReport"
LEAST: Final = 0.125 * (
    CORE + GIB
)  # dollars a second of a container that asks for no core and no memory


@pytest.fixture
async def burst() -> AsyncIterator[Burst]:
    burst = Burst(call_seconds=20)
    yield burst
    await burst.close()


def ran(modal: LocalModal, app: str, began: float, seconds: float, gpu: str = "") -> None:
    """A container of the app was there then."""
    record = next(each for each in modal.state.apps.values() if each.name == app)
    boot = Boot(
        app=app,
        app_id=record.app_id,
        function_id=next(iter(record.functions.values())),
        server="worker",
        container=f"ta-{began}-{gpu}",
        kind=Kind.COLD,
        t=began,
        gpu=gpu,
        end_t=began + seconds,
        exit=0,
    )
    modal.state.boots.append(boot)


def at(day: float, hours: float) -> float:
    return day + hours * 3600


# --- the local Modal's report --------------------------------------------------------------------------------


async def test_containers_are_billed_by_whole_intervals_with_the_apps_tags(
    modal: LocalModal, burst: Burst
) -> None:
    await burst.deploy(replace(APP, tags={TAG_UID: "uid-1"}), GOOD)
    await burst.deploy(replace(APP, name="other", tags={}), GOOD)
    day = last_whole_day(datetime.now(UTC).timestamp())
    ran(modal, APP.name, at(day, -1), 2 * 3600)  # half of it on the day before
    ran(modal, APP.name, at(day, 2.5), 3600, gpu="L4")
    ran(modal, "other", at(day, 1), 600)
    ran(modal, APP.name, at(day, 24), 1)  # today is not over
    client = await modal_sdk.Client.from_credentials.aio(GOOD.token_id, GOOD.token_secret)
    try:
        billing = modal_sdk.Workspace.from_context(client=client).billing
        start = datetime.fromtimestamp(day, UTC)
        daily = await billing.report.aio(start=start, resolution="d", tag_names=["*"])
        own = next(item for item in daily if item.description == APP.name)
        assert own.interval_start == start
        assert own.tags == {TAG_UID: "uid-1"}
        assert set(own.cost_by_resource) == {"CPU", "Memory", "L4"}
        assert own.cost_by_resource["L4"] == Decimal(str(GPUS["L4"])) * 3600
        assert float(own.cost) == pytest.approx(3600 * (2 * LEAST + GPUS["L4"]))
        assert sorted(item.description for item in daily) == sorted([APP.name, "other"])
        # An hour is an interval, too; what spans two is in both, and of no tag that was not asked for.
        hourly = await billing.report.aio(
            start=start, end=start + timedelta(hours=3), resolution="h"
        )
        mine = [item for item in hourly if item.description == APP.name]
        assert [item.interval_start.hour for item in mine] == [0, 2]
        assert [float(item.cost) for item in mine] == pytest.approx(
            [3600 * LEAST, 1800 * (LEAST + GPUS["L4"])]
        )
        assert mine[0].tags == {}
    finally:
        await client.close.aio()


async def test_a_container_that_is_bound_to_a_place_costs_more(
    modal: LocalModal, burst: Burst
) -> None:
    day = last_whole_day(datetime.now(UTC).timestamp())
    for where, factor in ("", 1.0), ("eu", 1.5), ("eu-west", 1.75):
        pinned = {"us-east": where} if where else {}
        name = f"app-{where}"
        await burst.deploy(replace(APP, name=name, tags={TAG_UID: name}, pinned=pinned), GOOD)
        ran(modal, name, at(day, 3), 1000)
        assert (await burst.billed(GOOD, day) or {})[name] == pytest.approx(1000 * LEAST * factor)


# --- the operator's question ---------------------------------------------------------------------------------


async def test_a_day_is_asked_for_by_the_uids_of_agents(modal: LocalModal, burst: Burst) -> None:
    day = last_whole_day(datetime.now(UTC).timestamp())
    assert await burst.billed(GOOD, day) == {}
    await burst.deploy(replace(APP, tags={TAG_UID: "uid-1"}), GOOD)
    ran(modal, APP.name, at(day, 3), 1000)
    await burst.stop(place())
    # Another app of the same agent, after the first was stopped.
    await burst.deploy(replace(APP, tags={TAG_UID: "uid-1"}, slots=3), GOOD)
    ran(modal, APP.name, at(day, -3), 1000)
    found = await burst.billed(GOOD, day)
    assert found is not None
    assert list(found) == ["uid-1"]
    assert found["uid-1"] == pytest.approx(1000 * LEAST)


@pytest.mark.parametrize("status", ["PERMISSION_DENIED", "UNIMPLEMENTED", "FAILED_PRECONDITION"])
async def test_a_plan_without_a_report_is_no_error(
    modal: LocalModal, burst: Burst, status: str
) -> None:
    await modal.inject(Rule(fault=Fault.RPC_FAILS, name=REPORT, status=status))
    assert await burst.billed(GOOD, 0.0) is None


async def test_a_report_that_fails_or_hangs_is_given_up_in_time(modal: LocalModal) -> None:
    hasty = Burst(call_seconds=2)
    try:
        with pytest.raises(BurstError) as refused:
            await hasty.billed(BAD, 0.0)
        assert refused.value.reason is BurstReason.CREDENTIALS_REFUSED
        await modal.inject(Rule(fault=Fault.RPC_HANGS, name=REPORT))
        with pytest.raises(BurstError) as late:
            await hasty.billed(GOOD, 0.0)
        assert late.value.reason is BurstReason.BILL_FAILED
    finally:
        await hasty.close()


async def test_a_question_that_is_cancelled_ends_so_whatever_modal_answers(
    modal: LocalModal, burst: Burst
) -> None:
    """At the moment at which the answer goes out: the SDK may bring either."""
    status = "PERMISSION_DENIED"
    await modal.inject(Rule(fault=Fault.RPC_FAILS, name=REPORT, status=status, done=True))
    for _ in range(40):
        task = asyncio.create_task(burst.billed(GOOD, 0.0))

        async def answering(name: str, task: "asyncio.Task[Any]" = task) -> None:
            if name == REPORT:
                task.cancel()

        modal.after = answering
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.cancelled()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


async def test_one_question_an_hour_answers_for_all_agents_of_an_account(
    modal: LocalModal, burst: Burst, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trunkline.burst")
    clock, told = Clock(), list[str]()
    clock.now = datetime.now(UTC).timestamp()
    day = last_whole_day(clock.now)
    await burst.deploy(replace(APP, tags={TAG_UID: "uid-1"}), GOOD)
    ran(modal, APP.name, at(day, 3), 1000)
    served = modal.state.sdk_calls.served
    async with Bills(Sdk(lambda: burst), told.append, clock) as bills:
        # The first two are there before anything is asked.
        assert bills.of("default/one", "uid-1", GOOD) is None
        assert bills.of("default/two", "uid-2", GOOD) is None
        await until(lambda: told)
        assert told == ["default/one", "default/two"]
        bill = bills.of("default/one", "uid-1", GOOD)
        assert bill
        assert (bill.day, bill.at) == (day, clock.now)
        assert bill.dollars == pytest.approx(1000 * LEAST)
        nothing = bills.of("default/two", "uid-2", GOOD)
        assert nothing
        assert nothing.dollars == 0.0
        # Whoever comes within the hour hears the same answer.
        clock.now += ASK_SECONDS - 1
        assert bills.of("default/three", "uid-3", GOOD)
        # Another account is due at once, and the loop, which looks at all, leaves the first alone.
        assert bills.of("default/far", "uid-4", BAD) is None
        await until(lambda: "CredentialsRefused" in caplog.text)
        assert served[REPORT] == 1
        clock.now += 2
        bills.of("default/four", "uid-5", GOOD)
        await until(lambda: served[REPORT] == 2)
        await until(lambda: "default/four" in told)
        # An account without agents is asked no more.
        for agent in "one", "two", "three", "four", "far":
            bills.forget(f"default/{agent}")
        assert repr(bills) == "Bills([])"


async def test_that_there_is_no_report_is_said_once(
    modal: LocalModal, burst: Burst, caplog: pytest.LogCaptureFixture
) -> None:
    clock, told = Clock(), list[str]()
    await modal.inject(Rule(fault=Fault.RPC_FAILS, name=REPORT, status="PERMISSION_DENIED"))
    caplog.set_level(logging.INFO, "trunkline.burst")

    def refused(times: int) -> bool:
        return modal.state.faults.counts[0].struck >= times

    async with Bills(Sdk(lambda: burst), told.append, clock) as bills:
        for asked in 1, 2, 3:
            assert bills.of(f"default/{asked}", f"uid-{asked}", GOOD) is None
            await until(partial(refused, asked))
            await until(lambda: caplog.messages)  # the first answer has been taken in
            clock.now += ASK_SECONDS
    assert [text for text in caplog.messages if "no billing report" in text] == [
        "Modal has no billing report for the account of default/1, so nothing is held against it"
    ]
    assert told == []


# --- beside what was reckoned --------------------------------------------------------------------------------

MIDNIGHT: Final = NOW - NOW % DAY
TERMS: Final = Terms(container_second=0.01, slots=2, call_seconds=600.0, linger_seconds=60.0)


def test_what_a_day_cost_is_kept_until_the_next_is_over() -> None:
    account = Account(at=MIDNIGHT - 30, day=7.0)
    assert account.before is None
    account = spend.counted(account, TERMS, 2, MIDNIGHT + 10)
    assert account.before == pytest.approx(7.0 + 30 * 2 * 0.01)
    assert account.day == pytest.approx(10 * 2 * 0.01)
    later = spend.counted(account, TERMS, 2, MIDNIGHT + 500)
    assert later.before == account.before
    # Nothing runs: the days go on all the same.
    assert spend.counted(later, TERMS, 0, MIDNIGHT + DAY + 1).before == pytest.approx(later.day)
    assert spend.counted(later, TERMS, 0, MIDNIGHT + 3 * DAY).before == 0.0
    # Over two nights, the whole day between them.
    assert spend.counted(later, TERMS, 1, MIDNIGHT + 2 * DAY + 5).before == pytest.approx(864.0)
    status = {"burst": {"spend": spending.told(facts(later), 0, {}, MIDNIGHT + 600)}}
    assert status["burst"]["spend"]["before"] == pytest.approx(7.6)
    again = spending.recalled(status)
    assert again
    assert again.before == pytest.approx(7.6)


def facts(account: Account | None, billed: Billed | None = None) -> BurstFacts:
    return BurstFacts(account=account, terms=TERMS, billed=billed)


def test_a_bill_is_held_against_the_same_day_alone() -> None:
    bill = Bill(day=MIDNIGHT - DAY, dollars=10.0, at=NOW)
    account = Account(at=NOW, before=8.0)
    told = spending.compared(bill, account, None)
    assert told == Billed(day=MIDNIGHT - DAY, dollars=10.0, reckoned=8.0, at=NOW)
    tomorrow = replace(account, at=NOW + DAY)
    assert spending.compared(bill, tomorrow, None) is None
    assert spending.compared(bill, tomorrow, told) is told
    assert spending.compared(bill, replace(account, before=None), None) is None
    assert spending.compared(None, account, told) is told
    shown = spending.billed(told, NOW)
    assert shown == {
        "day": "2027-01-14",
        "usd": 10.0,
        "reckonedUsd": 8.0,
        "at": "2027-01-15T08:00:00Z",
    }
    assert Billed.of(shown) == told
    assert Billed.of({}) is None
    assert spending.billed(told, NOW + 3 * DAY) == {}
    assert spending.billed(None, NOW) == {}


@pytest.mark.parametrize(
    ("billed", "reckoned", "apart"),
    [
        (10.0, 8.0, False),  # a fifth
        (10.0, 7.0, True),
        (10.0, 13.0, True),
        (0.5, 1.4, False),  # no dollar
        (0.0, 1.4, True),
        (0.0, 0.0, False),
    ],
)
def test_a_bill_that_is_far_off_is_told_as_condition_and_event(
    billed: float, reckoned: float, apart: bool
) -> None:
    agent = an_agent(
        burst__modal__credentialsSecretRef={"name": "modal"}, burst__modal__budget={"perDay": 50}
    )
    plan = Plan(steps=(), scaling=None, memory=Memory(), draining=())
    found = Billed(day=MIDNIGHT - DAY, dollars=billed, reckoned=reckoned, at=NOW)

    def status(known: Billed | None, now: float = NOW) -> dict[str, Any]:
        world = a_world([a_pod(agent, 0)], burst=facts(Account(at=now), known))
        return reported(agent, world, plan, {}, now)

    before, after = status(None), status(found)
    assert "billed" not in before["burst"]
    assert after["burst"]["billed"]["reckonedUsd"] == reckoned
    within = condition({"status": after}, "WithinBudget")
    assert within["status"] == "True"
    assert within["reason"] == ("BillDiffers" if apart else "WithinBudget")
    news = [event.reason for event in events.of_status(before, after)]
    assert news == (["BillDiffers"] if apart else [])
    if apart:
        words = f"Modal bills ${billed:.2f} for 2027-01-14, and ${reckoned:.2f} were reckoned"
        assert within["message"].startswith(words)
    # In the first hours of a day Modal's figures may still come in.
    early = condition({"status": status(found, MIDNIGHT + 3600)}, "WithinBudget")
    assert early["reason"] == "WithinBudget"


# --- on a cluster --------------------------------------------------------------------------------------------


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path, modal: LocalModal
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        await joined(world, modal)
        yield world


async def test_the_operator_tells_what_modal_bills_beside_what_it_reckoned(
    world: World, modal: LocalModal
) -> None:
    burst = {"credentialsSecretRef": {"name": "modal"}, "gpu": [], "snapshot": "none"}
    await world.start()
    await world.apply({**SPEC, "burst": {"modal": burst}})
    await world.condition("BurstReady", "BurstReady")
    (app,) = modal.state.apps.values()
    served = modal.state.sdk_calls.served
    await until(lambda: served[REPORT] == 1)
    await world.stop()
    # Yesterday an H100 ran for six hours, and an operator reckoned something else.
    now = datetime.now(UTC)
    day = last_whole_day(now.timestamp())
    ran(modal, app.name, at(day, 3), 6 * 3600, gpu="H100")
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    kept = {"at": stamp, "hour": 0, "day": 0, "before": 11.5, "containers": 0, "gateways": []}
    known = {"burst": {"spend": kept, "billed": None}}
    await world.api.patch(f"{world.agent_path}/status", {"status": known})
    world.processes.clear()
    await world.start()
    found = await world.agent(lambda it: "billed" in it["status"].get("burst", {}))
    billed = found["status"]["burst"]["billed"]
    dollars = pytest.approx(6 * 3600 * (GPUS["H100"] + LEAST), abs=1e-3)
    assert (billed["day"], billed["usd"], billed["reckonedUsd"]) == (
        datetime.fromtimestamp(day, UTC).strftime("%Y-%m-%d"),
        dollars,
        11.5,
    )
    assert served[REPORT] == 2
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{world.health}/metrics")).text
    shown = {
        line.partition('by="')[2].partition('"')[0]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("trunkline_operator_burst_billed_dollars{")
    }
    assert shown == {"modal": dollars, "reckoned": 11.5}
