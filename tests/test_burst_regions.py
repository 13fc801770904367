"""An app in several regions while one of them is down: the others take calls, and it is told and tried again."""

import asyncio
from dataclasses import replace

import pytest
from burst_rig import APP, GOOD, PATIENCE, world
from worlds import BURST, INSTALLATION, NOW, a_pod, a_world, an_agent

from trunkline_dev.modal.faults import Fault, Rule
from trunkline_operator.burst.deployments import Account, Deployments
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.decisions.conditions import Reason
from trunkline_operator.decisions.plan import planned
from trunkline_operator.decisions.status import reported
from trunkline_operator.decisions.world import BurstFacts
from trunkline_operator.scaling.decision import Memory

AGENT = "ns/desk"
REGIONS = ("eu-west", "us-east")


async def settled(deployments: Deployments) -> BurstFacts:
    """What is known once no work is under way."""
    async with asyncio.timeout(2 * PATIENCE):
        while (facts := deployments.facts(AGENT, BurstFacts())).working:
            await asyncio.sleep(0.05)
    return facts


async def test_a_region_that_is_down_keeps_no_other_from_taking_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as (local, burst):
        await local.inject(Rule(fault=Fault.REGION_DOWN, name="eu-west"))
        # A session's start at a region that is down is tried by the SDK for minutes.
        deployments = Deployments(Sdk(lambda: burst), lambda _: None, warm_up_seconds=8.0)
        deployments.facts(AGENT, BurstFacts())
        deployments.remember(AGENT, Account(credentials=GOOD, environment=""))
        app = replace(APP, regions=REGIONS)
        deployments.deploy(AGENT, app, "hash-1")
        facts = await settled(deployments)
        assert (list(facts.urls), facts.failures, facts.hash) == (["us-east"], 1, "")
        assert facts.message.startswith("WarmUpFailed: eu-west: ")
        assert facts.app == app.name

        # It is told, and calls go where there is a slot for them.
        agent = an_agent(**BURST, burst__modal__regions=list(REGIONS))
        seen = a_world([a_pod(agent, 0)], burst=facts)
        plan = planned(agent, seen, NOW, Memory(wish=1, refused=0), INSTALLATION)
        status = reported(agent, seen, plan, {}, NOW)
        (told,) = (one for one in status["conditions"] if one["type"] == "BurstReady")
        assert told["reason"] == Reason.BURST_FAILING
        assert "eu-west" in told["message"]
        assert [one["name"] for one in status["burst"]["regions"]] == ["us-east"]

        # The same deployment again is none at Modal, and brings the region in, in the agent's order.
        await local.inject()
        deployments.deploy(AGENT, app, "hash-1")
        facts = await settled(deployments)
        assert (list(facts.urls), facts.failures, facts.hash) == (
            ["eu-west", "us-east"],
            0,
            "hash-1",
        )
        (record,) = local.state.apps.values()
        assert record.version == 1
        await deployments.close()
