"""Autoscalers of nodes may evict a pod that callers can do without, and never one with calls."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_relay import ApiRelay
from hypothesis import given
from hypothesis import strategies as st
from operator_rig import NAME, SPEC, World, operated
from worlds import BURST, DEPLOYED, INSTALLATION, NOW, a_pod, a_world, an_agent, pending

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.eviction import EVICTABLE, PROTECTED
from trunkline_operator.decisions.manifests import burst_hash, worker_pod
from trunkline_operator.decisions.nodes import NodeFacts
from trunkline_operator.decisions.plan import planned
from trunkline_operator.decisions.steps import AllowEviction, ForbidEviction, Requeue
from trunkline_operator.decisions.world import PodFacts, Traffic
from trunkline_operator.decisions.world import World as Seen
from trunkline_operator.scaling.decision import Memory

Json = dict[str, Any]

PATIENT = replace(INSTALLATION, idle_seconds=600)
SAFE, KARPENTER = EVICTABLE
LOCAL = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"


class Looks:
    """Looks at an agent one after another, and what they told autoscalers."""

    def __init__(self, agent: VoiceAgent) -> None:
        self.agent = agent
        self.memory = Memory(wish=0, refused=0)
        self.marks: dict[str, bool] = {}  # name → whether it may be evicted, where that was written
        self.writes = 0
        self.wait: float | None = None

    def look(self, world: Seen, after: float) -> list[str]:
        """The pods that may be evicted after a look at this world, so many seconds after NOW."""
        pods = tuple(
            replace(pod, protected=not self.marks.get(pod.name, not pod.protected))
            for pod in world.pods
        )
        plan = planned(self.agent, replace(world, pods=pods), NOW + after, self.memory, PATIENT)
        self.memory = plan.memory
        self.wait = next((it.after for it in plan.steps if isinstance(it, Requeue)), None)
        for step in plan.steps:
            if isinstance(step, AllowEviction | ForbidEviction):
                self.marks[step.name] = isinstance(step, AllowEviction)
                self.writes += 1
        return sorted(name for name, free in self.marks.items() if free)


# --- the rule -----------------------------------------------------------------------------------------------


def test_a_pod_may_go_once_callers_could_do_without_it_for_ten_minutes() -> None:
    agent = an_agent(warm__minPods=2)
    looks, idle = Looks(agent), a_world([a_pod(agent, 0), a_pod(agent, 1)])
    assert looks.look(idle, 0) == []
    assert looks.wait == 600
    assert looks.look(idle, 599) == []
    assert looks.look(idle, 600) == ["desk-1"]  # the other one keeps the slot of bufferSlots
    assert looks.look(idle, 9999) == ["desk-1"]
    assert looks.writes == 1


def test_it_is_protected_again_with_its_first_call_and_ten_minutes_after_its_last() -> None:
    agent = an_agent(warm__minPods=2)
    looks, pods = Looks(agent), [a_pod(agent, 0), a_pod(agent, 1)]
    idle, busy = a_world(pods), a_world(pods, {"desk-0": 1, "desk-1": 1})
    looks.look(idle, 0)
    assert looks.look(idle, 600) == ["desk-1"]
    assert looks.look(busy, 700) == []
    assert looks.look(idle, 701) == []
    assert looks.look(idle, 1300) == []
    assert looks.look(idle, 1301) == ["desk-1"]


def test_before_a_call_comes_to_it_where_the_other_one_fills_up() -> None:
    agent = an_agent(warm__minPods=2)
    looks, pods = Looks(agent), [a_pod(agent, 0), a_pod(agent, 1)]
    looks.look(a_world(pods), 0)
    assert looks.look(a_world(pods, {"desk-0": 3, "desk-1": 0}), 600) == ["desk-1"]
    assert looks.look(a_world(pods, {"desk-0": 4, "desk-1": 0}), 601) == []


def test_the_only_pod_stays_unless_calls_may_go_to_burst_or_nothing_was_promised() -> None:
    def free(agent: VoiceAgent, **more: Any) -> list[str]:
        looks, world = Looks(agent), a_world([a_pod(agent, 0)], **more)
        looks.look(world, 0)
        return looks.look(world, 600)

    assert free(an_agent(warm__minPods=1)) == []
    assert free(an_agent(warm={"minPods": 1, "bufferSlots": 0})) == ["desk-0"]
    agent = an_agent(**BURST)
    burst = replace(DEPLOYED, hash=burst_hash(agent, PATIENT))
    assert free(agent, burst=burst) == ["desk-0"]
    assert free(agent, burst=replace(burst, capped=True)) == []


def test_unknown_is_busy_but_a_new_operator_waits_for_a_word_of_its_gateways() -> None:
    agent = an_agent(warm__minPods=2)
    pods = [a_pod(agent, 0), a_pod(agent, 1, protected=False)]
    silent = a_world(pods, known=False)
    looks = Looks(agent)
    assert looks.look(silent, 0) == []
    assert looks.writes == 0
    assert looks.look(a_world(pods), 1) == []
    assert looks.writes == 0  # it may go already, and nothing speaks against it
    looks.look(silent, 2)
    assert looks.marks == {"desk-1": False}
    looks = Looks(agent)
    looks.look(a_world(pods, {"desk-0": 0}), 0)  # no gateway has word of its worker
    assert looks.marks == {"desk-1": False}


def test_who_starts_or_leaves_keeps_what_it_has() -> None:
    agent = an_agent(warm={"minPods": 3, "bufferSlots": 0})
    looks = Looks(agent)
    going = NodeFacts(leaving="it is cordoned")
    pods = [
        pending(agent, 0),
        a_pod(agent, 1, node="n").on(going),
        a_pod(agent, 2, terminating=True),
    ]
    looks.look(a_world(pods), 0)
    assert looks.look(a_world(pods), 600) == []
    # One whose container crashes, time and again, holds no node.
    pods = [pending(agent, 0, trouble="CrashLoopBackOff")]
    looks.look(a_world(pods), 601)
    assert looks.look(a_world(pods), 1201) == ["desk-0"]


calls = st.lists(
    st.tuples(st.floats(0.1, 300), st.tuples(*[st.integers(0, 4)] * 3)), min_size=1, max_size=60
)


@given(done=calls)
def test_no_call_meets_a_pod_that_may_go_for_longer_than_a_look_and_writes_are_few(
    done: list[tuple[float, tuple[int, int, int]]],
) -> None:
    agent = an_agent(warm__minPods=3)
    looks, pods, at = Looks(agent), [a_pod(agent, n) for n in range(3)], 0.0
    for passed, busy in done:
        at += passed
        load = {f"desk-{n}": count for n, count in enumerate(busy)}
        free = looks.look(a_world(pods, load), at)
        assert all(load[name] == 0 for name in free)
        kept = [count for name, count in load.items() if name not in free]
        assert not free or sum(4 - count for count in kept) >= 1
    assert looks.writes <= 3 * 2 * (at // 600 + 1)


# --- what is written ----------------------------------------------------------------------------------------


def test_a_pod_is_made_protected_and_its_folders_keep_it_nowhere() -> None:
    notes = worker_pod(an_agent(), 0, INSTALLATION)["metadata"]["annotations"]
    assert notes[SAFE] == "false"
    assert notes[KARPENTER] == "true"
    assert notes[LOCAL] == "trunkline-tmp"
    volumes = [{"name": "cache", "emptyDir": {}}, {"name": "w", "configMap": {"name": "w"}}]
    agent = an_agent(warm__template={"volumes": volumes})
    assert worker_pod(agent, 0, INSTALLATION)["metadata"]["annotations"][LOCAL] == (
        "cache,trunkline-tmp"
    )
    own = [{"name": "tmp", "persistentVolumeClaim": {"claimName": "tmp"}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    agent = an_agent(warm__template={"volumes": own, "volumeMounts": mounts})
    assert LOCAL not in worker_pod(agent, 0, INSTALLATION)["metadata"]["annotations"]


def test_what_is_written_is_read_again() -> None:
    def protected(notes: Mapping[str, str | None]) -> bool:
        kept = {name: text for name, text in notes.items() if text is not None}
        return PodFacts.of({"metadata": {"name": "a", "uid": "u", "annotations": kept}}).protected

    assert protected(PROTECTED)
    assert not protected(EVICTABLE)
    assert not protected({**PROTECTED, KARPENTER: None})
    assert Traffic().known is False


# --- on a real API server -----------------------------------------------------------------------------------


@pytest.fixture
async def relay(api: Api) -> AsyncIterator[ApiRelay]:
    async with ApiRelay(api).serving() as relay:
        yield relay


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path, relay: ApiRelay
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        await world.start(
            "--evict-idle-seconds=0.5", env={"KUBECONFIG": str(relay.kubeconfig(tmp_path))}
        )
        yield world


def says(name: str, notes: Mapping[str, str | None]) -> Callable[[list[Json]], bool]:
    def holds(pods: list[Json]) -> bool:
        (pod,) = (it for it in pods if it["metadata"]["name"] == name)
        found = pod["metadata"]["annotations"]
        return all(found.get(key) == text for key, text in notes.items())

    return holds


async def test_an_idle_pod_may_be_evicted_until_a_call_comes_and_no_call_costs_a_write(
    world: World, relay: ApiRelay
) -> None:
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "minPods": 2}})
    await world.pod_count(2)
    first, second = f"{NAME}-0", f"{NAME}-1"
    await world.make_ready(first)
    await world.make_ready(second)
    await world.serve_calls(0, 0)
    await world.api.wait_for(world.pods, says(second, EVICTABLE))
    await world.api.wait_for(world.pods, says(first, PROTECTED))
    await world.serve_calls(0, 1)
    await world.api.wait_for(world.pods, says(second, PROTECTED))
    # A watch may tell of a mark before the operator's own request is answered.
    await relay.until(lambda it: len(it.written("PATCH", f"/pods/{second}")) == 2)
    # Calls come and go on the busy ones, each told and looked at.
    written = len(relay.written("PATCH", "/pods/"))
    for busy in range(1, 5):
        await world.serve_calls(busy, busy)
        await world.agent(lambda it, total=2 * busy: it["status"]["slots"]["busy"] == total)  # type: ignore[misc]
    assert len(relay.written("PATCH", "/pods/")) == written
