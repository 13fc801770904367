"""What of the decider's facts comes from pods and gateways, and which pods its number takes away."""

from dataclasses import replace
from typing import Any

import pytest
from worlds import BURST, INSTALLATION, NOW, a_pod, a_world, an_agent, pending

from trunkline_operator.decisions.plan import planned
from trunkline_operator.decisions.steps import Drain
from trunkline_operator.decisions.world import PodFacts
from trunkline_operator.scaling.decision import Memory
from trunkline_operator.scaling.prices import GpuPrice, Prices
from trunkline_operator.scaling.staffing import Count, Flow

SETTLED = Memory(wish=0, refused=0)
FLOW = Flow(at=NOW, count=Count(), arriving=0.5, leaving=0.5)


def pod_object(**changes: Any) -> dict[str, Any]:
    """A pod as the API has it, created at noon and ready 72 seconds later."""
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-27T12:01:12Z"}
    worker = {"name": "worker", "state": {"running": {}}, "restartCount": 0, "started": True}
    return {
        "metadata": {
            "name": "desk-0",
            "uid": "u",
            "creationTimestamp": changes.get("created", "2026-11-27T12:00:00Z"),
        },
        "status": {
            "phase": "Running",
            "conditions": [ready | changes.get("ready", {})],
            "containerStatuses": [worker | changes.get("worker", {})],
        },
    }


def test_a_pods_start_is_measured_from_its_creation_until_it_was_ready() -> None:
    assert PodFacts.of(pod_object()).start_seconds == 72.0


@pytest.mark.parametrize(
    "changes",
    [
        {"ready": {"status": "False"}},
        {"worker": {"restartCount": 1}},
        {"created": "2026-11-27T10:00:00Z"},  # it waited for a node, or was not ready in between
        {"created": None},
    ],
)
def test_a_start_that_says_nothing_of_the_next_is_not_measured(changes: dict[str, Any]) -> None:
    assert PodFacts.of(pod_object(**changes)).start_seconds is None


def test_the_middle_of_the_measured_starts_is_believed() -> None:
    agent = an_agent(warm={"slotsPerPod": 1, "maxPods": 100, "bufferSlots": 0, "minPods": 0})
    memory = replace(SETTLED, flow=FLOW)
    wanted = []
    for starts in ((None,), (100.0,), (100.0, 100.0, 3000.0), (400.0,)):
        pods = [a_pod(agent, n, start_seconds=start) for n, start in enumerate(starts)]
        world = a_world([*pods, pending(agent, 9)], slots=1)
        plan = planned(agent, world, NOW, memory, INSTALLATION)
        assert plan.scaling is not None
        wanted.append(plan.scaling.pods)
    assert wanted == [15, 20, 20, 40]  # 2 x sqrt(2 x 0.5 x T), of the hint of 60 s first


def test_prices_of_the_installation_decide_how_much_is_kept_free() -> None:
    agent = an_agent(warm={"maxPods": 100, "gpu": {"count": 1}}, **BURST)
    memory = replace(SETTLED, flow=FLOW)
    wanted = []
    for modal in (0.2, 8.0):
        prices = Prices(gpus={"L4": GpuPrice(cluster=0.1, modal=modal)})
        installation = replace(INSTALLATION, prices=prices)
        plan = planned(agent, a_world(), NOW, memory, installation)
        assert plan.scaling is not None
        wanted.append(plan.scaling.pods)
    assert wanted[0] < wanted[1]


def test_with_mode_wait_only_pods_without_calls_go() -> None:
    for mode, gone in (("drain", ["desk-2", "desk-1"]), ("wait", ["desk-2"])):
        agent = an_agent(
            warm={
                "scaleDown": {"delaySeconds": 0, "mode": mode},
                "bufferSlots": 0,
                "slotsPerPod": 4,
            }
        )
        pods = [a_pod(agent, n) for n in range(3)]
        world = a_world(pods, {"desk-0": 3, "desk-1": 1, "desk-2": 0})
        steps = planned(agent, world, NOW, SETTLED, INSTALLATION).steps
        assert [step.name for step in steps if isinstance(step, Drain)] == gone
