"""Restores that crash, from Modal's statistics to the level below: the local Modal, the real SDK and worker."""

import time
from dataclasses import replace
from typing import Final

import pytest
from burst_rig import (
    APP,
    EAST,
    GOOD,
    PATIENCE,
    answered,
    call,
    fails,
    place,
    session,
    until,
    world,
)

from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.state import Kind
from trunkline_operator.agent.spec import Snapshot
from trunkline_operator.burst.breaker import Breaker, noted, probe_at, probed
from trunkline_operator.burst.client import Burst, BurstApp, BurstReason, Starts

MEAN: Final = 1.38  # seconds of a restore: Modal's fleet's 13.8, ten times as fast
ONE_CALL: Final = replace(APP, slots=1, max_containers=12, scaledown_window=3600)


async def seen(burst: Burst, app: BurstApp, since: float) -> tuple[Starts, float]:
    """What has happened since then, and until when."""
    until_ = time.time()
    return await burst.starts(place(app), app.regions, since, until_), until_


async def test_modal_tells_how_containers_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as (local, burst):
        began = time.time()
        error = await fails(burst.starts(place(), [EAST], began - 1, began))
        assert error.reason is BurstReason.STATS_FAILED
        url = (await burst.deploy(ONE_CALL, GOOD)).urls[EAST]
        await burst.warm_up(place(), EAST, PATIENCE)
        starts, now = await seen(burst, APP, began)
        assert starts == Starts(good=1, bad=0, there={"us-east": 1})
        # The one that is there is taken; the next is to be restored, and cannot.
        await local.inject(Rule(fault=Fault.RESTORE_CRASHES, seconds=0.0, nth=(1,)))
        await session(url)
        await session(url)
        assert [boot.kind for boot in local.boots] == [Kind.COLD, Kind.RESTORED, Kind.COLD]
        starts, now = await seen(burst, APP, now)
        assert starts == Starts(good=0, bad=1, there={"us-east": 3})
        assert (await seen(burst, APP, now))[0] == Starts(good=0, bad=0, there={"us-east": 2})


async def test_crashing_restores_open_the_breaker_and_healthy_ones_close_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as (local, burst):
        now = time.time()
        breaker = Breaker.of(Snapshot.CPU)
        url = (await burst.deploy(ONE_CALL, GOOD)).urls[EAST]
        await burst.warm_up(place(), EAST, PATIENCE)
        async with call(url, await session(url)) as link:
            await answered(link)
            await local.inject(
                Rule(fault=Fault.RESTORE_CRASHES, share=0.6, seconds=MEAN, spread=MEAN / 4),
                Rule(fault=Fault.BOOT_SLOW, name="*/restored", seconds=MEAN, spread=MEAN / 4),
                seed=1,
            )

            # Every session that is given has a container of its own, restored or booted anew.
            tokens = []
            while not breaker.fallen:
                tokens.append(await session(url))
                starts, now = await seen(burst, APP, now)
                breaker = noted(breaker, starts.good, starts.bad, now)
            restores = [boot for boot in local.boots if boot.kind is Kind.RESTORED]
            assert len(restores) <= 5
            assert sum(boot.exit == 222 for boot in restores) >= 2
            for token in tokens:
                async with call(url, token, call=token) as other:
                    await answered(other)

            # The level below is a deployment; the call that is there stays where it is.
            below = replace(ONE_CALL, snapshot=breaker.level.value)
            assert (await burst.deploy(below, GOOD)).urls[EAST] == url
            async with call(url, await session(url), call="below") as other:
                await answered(other)
            assert local.boots[-1].kind is Kind.COLD
            assert sum(boot.kind is Kind.RESTORED for boot in local.boots) == len(restores)

            await local.inject()
            now = time.time()
            breaker = probed(breaker, probe_at(breaker))
            assert (breaker.level, breaker.fallen) == (Snapshot.CPU, False)
            await burst.deploy(ONE_CALL, GOOD)
            await burst.warm_up(place(), EAST, PATIENCE)
            first = len(local.boots)
            for _ in range(3):
                await session(url)
            kinds = [boot.kind for boot in list(local.boots)[first:]]
            assert kinds == [Kind.RESTORED, Kind.RESTORED]  # and the one that was warmed up
            starts, now = await seen(burst, APP, now)
            assert starts == Starts(good=3, bad=0, there={"us-east": 7})
            assert not noted(breaker, starts.good, starts.bad, now).fallen
            await link.ping()
            assert link.close_code is None
        await until(lambda: local.pids)
