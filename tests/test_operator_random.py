"""Whatever users, nodes and the API server do in whatever order: in the end the declared state is there."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from api_relay import ApiRelay, Request, let_pass
from forked_operator import Nursery
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from node_cast import Nodes
from operator_cast import played
from operator_rig import NAME, NO_ACCOUNT, SPEC, Json, operated
from operator_ward import Ward, leaving

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, ApiError, is_true
from trunkline_runtime.contract import FINALIZER, LABEL_AGENT

MORE = int(os.environ.get("TRUNKLINE_EXAMPLES", "8"))
Act = tuple[Any, ...]

_numbers = itertools.count(1)

edits = st.tuples(
    st.just("edit"),
    st.fixed_dictionaries(
        {
            "image": st.sampled_from(["", "trunkline/worker:a", "trunkline/worker:b"]),
            "minPods": st.integers(0, 3),
            "slotsPerPod": st.sampled_from([2, 4]),
        }
    ),
)
scales = st.tuples(st.just("scale"), st.integers(0, 4))
kills = st.tuples(st.just("kill a pod"), st.integers(0, 3))
faults = st.tuples(
    st.just("break"),
    st.sampled_from(
        [409, 429, 500, 503, 0]
    ),  # 0: the connection breaks once the API server has acted
    st.integers(1, 3),
)
crashes = st.tuples(st.just("kill the operator"))
deletes = st.tuples(st.just("delete and make anew"))
nodes = st.tuples(
    st.just("node"), st.sampled_from(["cordon", "uncordon", "is not ready", "is gone", "is well"])
)
pauses = st.tuples(st.just("wait"), st.sampled_from([0.05, 0.2, 0.5]))
acts = st.lists(
    st.one_of(edits, scales, kills, faults, crashes, deletes, nodes, pauses),
    min_size=4,
    max_size=12,
)


class Trial:
    """One world, and what was last asked of it."""

    def __init__(self, ward: Ward, nodes: Nodes) -> None:
        self.ward, self.world, self.nodes = ward, ward.world, nodes
        self.warm: Json = {**SPEC["warm"], "minPods": 1, "maxPods": 4, "autoscaling": "internal"}

    async def apply(self) -> None:
        await self.world.apply({**self.world.spec, "warm": self.warm})

    @property
    def wanted(self) -> int:
        warm = self.warm
        if warm["autoscaling"] == "external":
            return int(max(warm["minPods"], min(warm["replicas"], warm["maxPods"])))
        return int(max(warm["minPods"], 1))  # one spare slot is kept

    async def take(self, act: Act) -> None:
        """One thing that somebody does."""
        match act:
            case ("edit", fields):
                self.warm = {**self.warm, **fields}
                await self.apply()
            case ("scale", replicas):
                if self.warm["autoscaling"] == "internal":
                    self.warm = {**self.warm, "autoscaling": "external", "replicas": 1}
                    await self.apply()
                self.warm = {**self.warm, "replicas": replicas}
                scale = {"spec": {"replicas": replicas}}
                await self.world.api.patch(f"{self.world.agent_path}/scale", scale)
            case ("kill a pod", number):
                await self.kill_pod(number)
            case ("break", status, times):
                self.break_requests(status, times)
            case ("kill the operator",):
                self.ward.kill()
                await self.ward.next()
            case ("delete and make anew",):
                await self.nodes.heal()  # else it waits for a pod that may have calls, as it should
                await self.world.api.delete(self.world.agent_path)
                await self.world.api.wait_gone(self.world.agent_path)
                await self.apply()
            case ("node", "cordon"):
                await self.nodes.cordon(on=True)
            case ("node", "uncordon"):
                await self.nodes.cordon(on=False)
            case ("node", "is not ready"):
                await self.nodes.silence()
            case ("node", "is gone"):
                await self.nodes.lose()
            case ("node", "is well"):
                await self.nodes.heal()
            case ("wait", seconds):
                await asyncio.sleep(seconds)
            case _:
                raise AssertionError(act)

    async def kill_pod(self, number: int) -> None:
        """Its node is gone, or its container ended for good."""
        pods = await self.world.api.list(self.world.pods)
        if not pods:
            return
        path = f"{self.world.pods}/{pods[number % len(pods)]['metadata']['name']}"
        with contextlib.suppress(ApiError):  # the operator was faster
            if number % 2:
                await self.world.api.delete(path, {"gracePeriodSeconds": 0})
            else:
                await self.world.api.patch(f"{path}/status", {"status": {"phase": "Failed"}})

    def break_requests(self, status: int, times: int) -> None:
        """The next writes of the operator fail: refused by the API server, or unanswered."""
        left = itertools.repeat(None, times)

        async def before(request: Request) -> web.Response | None:
            if status and request.writes and next(left, "over") is None:
                reason = {"status": "Failure", "reason": "Conflict", "message": "by the test"}
                return web.json_response(reason, status=status)
            return None

        async def after(request: Request, _: int) -> bool:
            return bool(not status and request.writes and next(left, "over") is None)

        self.ward.relay.before, self.ward.relay.after = before, after

    async def ends_as_declared(self) -> None:
        """So many ready pods of the latest template, none leaving; one Secret; a route and a status of that.

        Where a node was lost, its pods are there until it comes back, so it does.
        """
        self.ward.relay.before = let_pass
        await self.nodes.heal()
        image = self.warm.get("image") or "trunkline/worker:test"
        # Pods of the agent before it may be there yet, as good as any.
        uid = (await self.world.api.get(self.world.agent_path))["metadata"]["uid"]

        def whole(pods: list[Json]) -> bool:
            return len(pods) == self.wanted and all(
                is_true(pod, "Ready")
                and not leaving(pod)
                and pod["status"]["phase"] == "Running"
                and pod["spec"]["containers"][0]["image"] == image
                and [owner["uid"] for owner in pod["metadata"]["ownerReferences"]] == [uid]
                for pod in pods
            )

        def tells(agent: Json) -> bool:
            status = agent.get("status") or {}
            return bool(
                status.get("observedGeneration") == agent["metadata"]["generation"]
                and status["readyReplicas"] == status["replicas"] == self.wanted
            )

        world = self.world
        await world.api.wait_for(world.pods, whole, 45, labelSelector=f"{LABEL_AGENT}={NAME}")
        agent = await world.agent(tells)
        kept = [FINALIZER] if "burst" in world.spec else None
        assert agent["metadata"].get("finalizers") == kept
        assert agent["metadata"]["uid"] == uid
        assert len(await world.api.list(world.secrets)) == 1
        await world.gateway.until(
            lambda it: world.key in it.routes and it.routes[world.key]["draining"] == []
        )


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery.open() as nursery:
        yield nursery


@pytest.mark.timeout(120 + 60 * MORE)
@settings(
    max_examples=MORE,
    deadline=None,
    derandomize="TRUNKLINE_EXAMPLES" not in os.environ,
    # A world costs seconds: what is found is told as it was found.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(done=acts, more=st.sampled_from([{}, {"burst": NO_ACCOUNT}]))
def test_any_sequence_ends_in_the_declared_state(
    control_plane: ControlPlane,
    nursery: Nursery,
    tmp_path_factory: Any,
    done: list[Act],
    more: Json,
) -> None:
    """Of an agent without the finalizer, and of one that has it."""
    asyncio.run(one_life(control_plane, nursery, tmp_path_factory.mktemp("life"), done, more))


async def one_life(
    plane: ControlPlane, nursery: Nursery, folder: Path, done: list[Act], more: Json
) -> None:
    namespace = f"random-{os.getpid()}-{next(_numbers)}"
    async with Api(plane.kubeconfig) as api, ApiRelay(api).serving() as relay:
        await api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        async with (
            operated(api, plane, namespace, folder) as world,
            Nodes.of(world) as nodes,
            played(world, nodes),
        ):
            world.spec = {**SPEC, **more}
            ward = Ward(world, relay, nursery)
            try:
                await ward.started()
                trial = Trial(ward, nodes)
                await trial.apply()
                for act in done:
                    await trial.take(act)
                await trial.ends_as_declared()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    ward.kill()
