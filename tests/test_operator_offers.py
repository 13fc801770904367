"""What workers offer counts, not what they were told to."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import agent_load, worker_load
from hypothesis import given
from hypothesis import strategies as st
from operator_rig import NAME, SPEC, World, operated
from worlds import INSTALLATION, NOW, a_pod, a_world, an_agent

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, condition
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.plan import Plan, planned
from trunkline_operator.decisions.status import reported
from trunkline_operator.decisions.steps import CreatePod, Drain
from trunkline_operator.decisions.world import WorkerFacts
from trunkline_operator.decisions.world import World as Seen
from trunkline_operator.scaling.decision import Memory, pods_for

SETTLED = Memory(wish=0, refused=0)
AT_ONCE: dict[str, Any] = {"warm": {"maxPods": 10, "scaleDown": {"delaySeconds": 0}}}


def telling(world: Seen, *offers: tuple[int, int]) -> Seen:
    """The world with (slots, busy) of pods 0, 1, …"""
    workers = {
        f"desk-{n}": WorkerFacts(slots=slots, busy=busy, draining=False)
        for n, (slots, busy) in enumerate(offers)
    }
    return replace(world, traffic=replace(world.traffic, workers=workers))


def plan_of(agent: VoiceAgent, world: Seen) -> Plan:
    return planned(agent, world, NOW, SETTLED, INSTALLATION)


# --- how many pods ------------------------------------------------------------------------------------------


@given(
    slots=st.integers(0, 200),
    offers=st.lists(st.integers(0, 12), max_size=20).map(tuple),
    usual=st.integers(1, 12),
)
def test_the_fewest_pods_that_have_the_slots(
    slots: int, offers: tuple[int, ...], usual: int
) -> None:
    def there(count: int) -> int:
        return sum(offers[:count]) + usual * max(count - len(offers), 0)

    pods = pods_for(slots, offers, usual)
    assert there(pods) >= slots
    assert pods == 0 or there(pods - 1) < slots


def test_a_pod_that_offers_less_is_made_up_for() -> None:
    agent = an_agent(**AT_ONCE)
    world = a_world([a_pod(agent, 0), a_pod(agent, 1)])
    # 7 calls and one spare slot: 8 slots, of which 7 are there.
    plan = plan_of(agent, telling(world, (4, 4), (3, 3)))
    assert plan.scaling is not None
    assert plan.scaling.pods == 3
    assert "with 7 slots in 2 pods and 4 in each more need 3" in plan.scaling.reason
    assert [step.name for step in plan.steps if isinstance(step, CreatePod)] == ["desk-2"]
    plan = plan_of(agent, telling(world, (4, 4), (4, 3)))
    assert plan.scaling is not None
    assert plan.scaling.pods == 2


def test_one_that_offers_nothing_is_replaced_by_one_that_does() -> None:
    agent = an_agent(**AT_ONCE)
    ill = a_pod(agent, 0)
    plan = plan_of(agent, telling(a_world([ill]), (0, 0)))
    assert [step.name for step in plan.steps if isinstance(step, CreatePod)] == ["desk-1"]
    plan = plan_of(agent, telling(a_world([ill, a_pod(agent, 1)]), (0, 0), (4, 0)))
    assert [step.name for step in plan.steps if isinstance(step, Drain)] == ["desk-0"]


def test_the_next_pod_is_expected_to_offer_what_several_do() -> None:
    agent = an_agent(**AT_ONCE)
    pods = [a_pod(agent, n) for n in range(2)]
    assert plan_of(agent, a_world()).usual == 4
    assert plan_of(agent, telling(a_world(pods), (1, 0))).usual == 4  # it may be ill
    assert plan_of(agent, telling(a_world(pods), (1, 0), (3, 0))).usual == 3
    assert plan_of(agent, telling(a_world(pods), (3, 0), (8, 0))).usual == 4
    # Of another template: they were told another number.
    old = [replace(pod, template="old") for pod in pods]
    assert plan_of(agent, telling(a_world(old), (1, 0), (1, 0))).usual == 4


# --- what is told -------------------------------------------------------------------------------------------


def message(agent: VoiceAgent, world: Seen) -> str:
    status = reported(agent, world, plan_of(agent, world), {}, NOW)
    return str(condition({"status": status}, "WarmReady")["message"])


def test_who_offers_less_is_told() -> None:
    agent = an_agent(warm__minPods=3)
    pods = [a_pod(agent, n) for n in range(3)]
    ready = "3 of 3 pods are ready"
    assert message(agent, telling(a_world(pods), (4, 0), (4, 0), (4, 0))) == ready
    one = telling(a_world(pods), (4, 0), (3, 0), (4, 0))
    assert message(agent, one) == f"{ready}; desk-1 offers 3 of 4 slots"
    all_ = telling(a_world(pods), (2, 0), (3, 0), (1, 0))
    assert message(agent, all_) == (
        f"{ready}; desk-0 offers 2 of 4 slots, and 2 more offer fewer than 4"
    )
    # Whose worker measures was told no number; whose template is older was told another.
    auto = an_agent(engine={"type": "moshi", "model": "tiny"}, warm__slotsPerPod="auto")
    assert message(auto, telling(a_world([a_pod(auto, 0)]), (3, 0))) == "1 of 1 pods are ready"
    old = replace(pods[0], template="old")
    assert "offers" not in message(
        agent, telling(a_world([old, *pods[1:]]), (2, 0), (4, 0), (4, 0))
    )


# --- on a real API server -----------------------------------------------------------------------------------


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        await world.start()
        yield world


async def test_slots_that_are_missing_are_told_counted_and_made_up_for(world: World) -> None:
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "slotsPerPod": 4, "maxPods": 3}})
    await world.pod_count(1)
    await world.make_ready(f"{NAME}-0")
    await world.gateway.say(world.key, agent_load({f"{NAME}-0": worker_load(4, 2)}))
    await world.condition("WarmReady", "PodsReady")
    # Its engine gives one slot up. Two calls and a spare one still fit; with the third they do not.
    await world.gateway.say(world.key, agent_load({f"{NAME}-0": worker_load(3, 2)}))
    agent = await world.agent(lambda it: it["status"]["slots"]["total"] == 3)
    assert condition(agent, "WarmReady")["message"] == (
        f"1 of 1 pods are ready; {NAME}-0 offers 3 of 4 slots"
    )
    assert len(await world.api.list(world.pods)) == 1
    await world.gateway.say(world.key, agent_load({f"{NAME}-0": worker_load(3, 3)}))
    await world.pod_count(2)
