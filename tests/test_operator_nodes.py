"""Pods leave a node that is to go, and those on a node that is not ready count as none."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from node_cast import Node, a_node, bind
from operator_rig import NAME, SPEC, World, operated
from worlds import INSTALLATION, NOW, a_pod, a_world, an_agent, pending

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, condition, is_true
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.events import Look, of_look
from trunkline_operator.decisions.events import Memory as News
from trunkline_operator.decisions.nodes import FINE, GOING, NodeFacts
from trunkline_operator.decisions.plan import planned
from trunkline_operator.decisions.status import reported
from trunkline_operator.decisions.steps import CreatePod, DeletePod, Drain, Step, Undrain
from trunkline_operator.decisions.world import World as Seen
from trunkline_operator.scaling.decision import Memory
from trunkline_runtime.contract import ANNOTATION_DRAINING

Json = dict[str, Any]
SETTLED = Memory(wish=0, refused=0)
CORDONED = NodeFacts(leaving="it is cordoned")
LOST = NodeFacts(lost=True)


def a_body(*taints: str, ready: str | None = "True", **spec: Any) -> Json:
    kinds = [] if ready is None else [{"type": "Ready", "status": ready}]
    return {
        "metadata": {"name": "n"},
        "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints], **spec},
        "status": {"conditions": [{"type": "DiskPressure", "status": "False"}, *kinds]},
    }


# --- what a node says -------------------------------------------------------------------------------------


@pytest.mark.parametrize("taint", sorted(GOING))
def test_a_taint_of_an_autoscaler_says_that_its_node_goes(taint: str) -> None:
    assert NodeFacts.of(a_body("nvidia.com/gpu", taint)).leaving == GOING[taint]


def test_a_node_is_taken_for_fine_unless_it_says_otherwise() -> None:
    assert NodeFacts.of(a_body("nvidia.com/gpu")) == FINE
    assert NodeFacts.of(a_body(ready=None)) == FINE
    assert NodeFacts.of({"metadata": {"name": "n"}}) == FINE
    assert NodeFacts.of(a_body(unschedulable=True)) == CORDONED
    assert NodeFacts.of(a_body(ready="False")) == LOST
    assert NodeFacts.of(a_body(ready="Unknown")) == LOST


# --- what follows -----------------------------------------------------------------------------------------


def steps(agent: VoiceAgent, world: Seen) -> tuple[Step, ...]:
    taken = planned(agent, world, NOW, SETTLED, INSTALLATION).steps
    return tuple(
        step for step in taken if isinstance(step, CreatePod | Drain | DeletePod | Undrain)
    )


def test_a_pod_is_drained_off_a_node_that_goes_and_another_takes_its_place() -> None:
    agent = an_agent(warm__maxPods=2)
    leaving = a_pod(agent, 0, node="n").on(CORDONED)
    drain, made = steps(agent, a_world([leaving], busy={"desk-0": 3}))
    assert isinstance(drain, Drain)
    assert drain.name == "desk-0"
    assert isinstance(made, CreatePod)
    assert made.name == "desk-1"


def test_a_pod_that_has_not_begun_there_goes_at_once() -> None:
    agent = an_agent(warm__maxPods=2)
    unborn = pending(agent, 0, node="n").on(CORDONED)
    gone, made = steps(agent, a_world([unborn]))
    assert gone == DeletePod("desk-0", "pod-0")
    assert isinstance(made, CreatePod)


def test_no_drain_is_taken_back_on_a_node_that_goes() -> None:
    agent = an_agent(warm__maxPods=1)
    drained = a_pod(agent, 0, node="n", draining_since=NOW - 1)
    busy = {"desk-0": 1}
    assert [type(step) for step in steps(agent, a_world([drained], busy))] == [Undrain]
    assert steps(agent, a_world([drained.on(CORDONED)], busy)) == ()


def test_a_pod_on_a_lost_node_is_replaced_beyond_the_most_pods() -> None:
    agent = an_agent(warm__minPods=1, warm__maxPods=1)
    lost = a_pod(agent, 0, node="n", ready=False).on(LOST)
    (made,) = steps(agent, a_world([lost], busy={}))
    assert isinstance(made, CreatePod)
    assert made.name == "desk-1"
    # Its node comes back, and with it one pod too many: the one with fewest calls goes.
    both = [a_pod(agent, 0, node="n"), a_pod(agent, 1)]
    (drain,) = steps(agent, a_world(both, busy={"desk-0": 2, "desk-1": 0}))
    assert isinstance(drain, Drain)
    assert drain.name == "desk-1"


def test_both_are_told() -> None:
    agent = an_agent(warm__minPods=1, warm__maxPods=1)
    world = a_world([a_pod(agent, 0, node="gpu-7", ready=False).on(LOST)], busy={})
    plan = planned(agent, world, NOW, SETTLED, INSTALLATION)
    status = reported(agent, world, plan, {}, NOW)
    warm = condition({"status": status}, "WarmReady")
    assert warm["reason"] == "NodeNotReady"
    assert "desk-0: its node gpu-7 is not ready, so it counts as none" in warm["message"]
    assert status["pods"] == {"ready": 0, "starting": 0, "draining": 0}

    world = a_world([a_pod(agent, 0, node="gpu-7").on(CORDONED)])
    plan = planned(agent, world, NOW, SETTLED, INSTALLATION)
    look = Look(
        agent=agent, world=world, plan=plan, taken=plan.steps, installation=INSTALLATION, now=NOW
    )
    (told,) = of_look(look, News())
    assert told.message.endswith("its node gpu-7 is to go: it is cordoned")


# --- on a real API server -----------------------------------------------------------------------------------


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


async def one_pod_on(node: Node, world: World, spec: Json) -> None:
    await world.apply(spec)
    await world.pod_count(1)
    await bind(world, f"{NAME}-0", node.name)
    await world.make_ready(f"{NAME}-0")
    await world.serve_calls(1)
    await world.agent(lambda it: is_true(it, "WarmReady"))


def drains(pods: list[Json]) -> bool:
    return any(ANNOTATION_DRAINING in (it["metadata"].get("annotations") or {}) for it in pods)


@pytest.mark.parametrize("namespaced", [False, True])
async def test_a_cordon_drains_and_its_end_takes_the_drain_back(
    world: World, tmp_path: Path, namespaced: bool
) -> None:
    values: Json = {"watchNamespaces": [world.namespace]} if namespaced else {}
    async with world.charted({**values, "watchNodes": True}, "rbac.yaml", "operator.yaml"):
        file = await world.kubeconfig_of("trunkline-operator", tmp_path)
        await world.start(everywhere=not namespaced, env={"KUBECONFIG": str(file)})
        async with a_node(world) as node:
            # Of one pod at most, so that no other stands in its place.
            await one_pod_on(node, world, {**SPEC, "warm": {**SPEC["warm"], "maxPods": 1}})
            await node.cordon()
            await world.gateway.until(lambda it: it.routes[world.key]["draining"] == [f"{NAME}-0"])
            await world.api.wait_for(world.pods, drains)
            await node.cordon(on=False)
            await world.gateway.until(lambda it: it.routes[world.key]["draining"] == [])
            await world.api.wait_for(world.pods, lambda pods: not drains(pods))
        assert [line for line in world.log if line["level"] in ("WARNING", "ERROR")] == []


async def test_a_pod_on_a_node_that_is_not_ready_is_replaced(world: World) -> None:
    await world.start()
    async with a_node(world) as node:
        await one_pod_on(node, world, {**SPEC, "warm": {**SPEC["warm"], "maxPods": 1}})
        await node.say("Unknown")
        told = await world.condition("WarmReady", "NodeNotReady")
        assert f"its node {node.name} is not ready" in told["message"]
        pods = await world.pod_count(2)
        assert not drains(pods)


async def test_without_the_right_to_see_nodes_all_else_goes_on(
    world: World, tmp_path: Path
) -> None:
    async with world.charted({}, "rbac.yaml", "operator.yaml"):
        file = await world.kubeconfig_of("trunkline-operator", tmp_path)
        await world.start(everywhere=True, env={"KUBECONFIG": str(file)})
        async with a_node(world) as node:
            await one_pod_on(node, world, SPEC)
            await node.cordon()
            await world.serve_calls(4)  # the next that happens: a second pod is wanted
            pods = await world.pod_count(2)
            assert not drains(pods)
        assert any("nodes may not be watched" in line["message"] for line in world.log)
