"""kill -9 before and after each request of a reconcile; the next operator finishes, and nothing is lost or doubled."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from api_relay import ApiRelay, Request
from forked_operator import Nursery
from node_cast import NODES, Nodes
from operator_cast import played
from operator_rig import NAME, NO_ACCOUNT, SPEC, Json, World, operated
from operator_ward import WATCHES, Ward, leaving

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, is_true
from trunkline_runtime.contract import FINALIZER, LABEL_AGENT

EVERY = bool(os.environ.get("TRUNKLINE_EVERY_KILL"))
"""Kill at every request. Without it, only at those that change something."""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery.open() as nursery:
        yield nursery


@pytest.fixture
async def ward(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path, nursery: Nursery
) -> AsyncIterator[Ward]:
    async with (
        ApiRelay(api).serving() as relay,
        operated(api, control_plane, namespace, tmp_path) as world,
        Nodes.of(world) as nodes,
        played(world, nodes),
    ):
        ward = Ward(world, relay, nursery)
        try:
            yield ward
        finally:
            if ward.pid:
                with contextlib.suppress(ProcessLookupError):
                    ward.kill()


# --- what is asked of the operator ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """Something that a user asks for, and what must be there in the end."""

    name: str
    ask: Callable[[World, int], Awaitable[None]]
    settled: Callable[[World], Awaitable[None]]
    writes: dict[tuple[str, str], int]
    """How often such a request changes something, however often operators are killed."""


async def create(world: World, _: int) -> None:
    await world.apply()


async def change(world: World, number: int) -> None:
    warm = {**SPEC["warm"], "image": f"trunkline/worker:{number}"}
    await world.apply({**world.spec, "warm": warm})


async def cordon(world: World, _: int) -> None:
    """Of the node where the pod is; the other takes pods."""
    (pod,) = await world.api.list(world.pods)
    for name in await nodes_of(world):
        here = name == pod["spec"]["nodeName"]
        await world.api.patch(f"{NODES}/{name}", {"spec": {"unschedulable": here or None}})


async def nodes_of(world: World) -> dict[str, Json]:
    """Others have theirs in the same cluster."""
    found = {node["metadata"]["name"]: node for node in await world.api.list(NODES)}
    return {name: node for name, node in found.items() if name.endswith(f"-of-{world.namespace}")}


async def delete(world: World, _: int) -> None:
    await world.api.delete(world.agent_path)


async def serves(world: World) -> None:
    """One pod of the latest template, known to all; one Secret; nothing else."""

    def whole(pods: list[Json]) -> bool:
        return len(pods) == 1 and is_true(pods[0], "Ready") and not leaving(pods[0])

    async with asyncio.timeout(30):
        while True:  # what is true of one pod may not be what its agent says by now
            agent = await world.agent(tells_all)
            image = agent["spec"]["warm"]["image"] or "trunkline/worker:test"
            selector = f"{LABEL_AGENT}={NAME}"
            (pod,) = await world.api.wait_for(world.pods, whole, labelSelector=selector)
            if pod["spec"]["containers"][0]["image"] == image:
                break
    kept = [FINALIZER] if "burst" in agent["spec"] else None
    assert agent["metadata"].get("finalizers") == kept
    for thing in (pod, await own_secret(world)):
        (owner,) = thing["metadata"]["ownerReferences"]
        assert owner["uid"] == agent["metadata"]["uid"]
    await world.gateway.until(
        lambda it: world.key in it.routes and it.routes[world.key]["draining"] == []
    )
    assert world.gateway.routes[world.key]["rungs"] == [{"kind": "warm"}]


async def moved(world: World) -> None:
    """As `serves`, on a node that takes pods."""
    nodes = await nodes_of(world)

    def there(pods: list[Json]) -> bool:
        spec = nodes.get(pods[0]["spec"].get("nodeName", ""), {}).get("spec") if pods else None
        return len(pods) == 1 and spec is not None and not spec.get("unschedulable")

    await world.api.wait_for(world.pods, there)
    await serves(world)


def tells_all(agent: Json) -> bool:
    status = agent.get("status") or {}
    return (
        is_true(agent, "WarmReady")
        and status["observedGeneration"] == agent["metadata"]["generation"]
        and status["pods"] == {"ready": 1, "starting": 0, "draining": 0}
    )


async def own_secret(world: World) -> Json:
    """The only one there is, whole."""
    (secret,) = await world.api.list(world.secrets)
    assert secret["metadata"]["name"] == f"{NAME}-trunkline"
    assert set(secret["data"]) == {"worker-key", "ticket-key"}
    return secret


async def is_gone(world: World) -> None:
    """No agent, no pod, no route; and the Secret, which Kubernetes collects."""
    await world.api.wait_gone(world.agent_path)
    if "burst" in world.spec:  # the finalizer has kept it until then
        assert await world.api.list(world.pods) == []
    await world.api.wait_for(world.pods, lambda pods: not pods)
    await own_secret(world)
    await world.gateway.until(lambda it: it.routes == {})


async def collect(world: World) -> None:
    """What Kubernetes' garbage collector does with an agent's Secret once the agent is gone."""
    if not await world.api.list(world.agents):
        await world.api.delete(f"{world.secrets}/{NAME}-trunkline")


WISHES = (
    Wish("create", create, serves, {("POST", "/secrets"): 1, ("POST", "/pods"): 1}),
    Wish("change", change, serves, {("POST", "/pods"): 1, ("DELETE", "/pods/"): 1}),
    Wish("cordon", cordon, moved, {("POST", "/pods"): 1, ("DELETE", "/pods/"): 1}),
    Wish("delete", delete, is_gone, {("DELETE", "/pods/"): 1}),
)


async def granted(ward: Ward, wish: Wish, number: int) -> None:
    """What was wished is there, made once."""
    await wish.settled(ward.world)
    for (method, part), times in wish.writes.items():
        assert len(ward.relay.written(method, part)) == times, (wish.name, number, method, part)


async def requests_of(ward: Ward, wish: Wish) -> list[Request]:
    """Those of a reconcile that nobody disturbs."""
    ward.relay.forget()
    await wish.ask(ward.world, 0)
    await granted(ward, wish, 0)
    await collect(ward.world)
    return ward.relay.seen


async def killed_or_settled(killed: asyncio.Event, ward: Ward, wish: Wish) -> None:
    """Waits for either: looks that fall together make fewer requests, and then none is the fatal one."""
    death = asyncio.ensure_future(killed.wait())
    settled = asyncio.ensure_future(wish.settled(ward.world))
    try:
        await asyncio.wait({death, settled}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        death.cancel()
        settled.cancel()
        await asyncio.gather(death, settled, return_exceptions=True)


def moments(seen: list[Request]) -> list[tuple[int, bool]]:
    """(number, whether the API server has answered) at which to kill."""
    chosen = [request.number for request in seen if EVERY or request.writes]
    return [(number, answered) for number in chosen for answered in (False, True)]


@pytest.mark.timeout(1800 if EVERY else 300)
@pytest.mark.parametrize("spec", [SPEC, {**SPEC, "burst": NO_ACCOUNT}], ids=["warm", "kept"])
async def test_whatever_request_an_operator_dies_at_the_next_one_finishes(
    ward: Ward, spec: Json
) -> None:
    ward.world.spec = spec
    await ward.started()
    cases = {wish.name: moments(await requests_of(ward, wish)) for wish in WISHES}
    for wish in WISHES:
        assert len(cases[wish.name]) >= 2 * sum(wish.writes.values()), cases
        assert len(cases[wish.name]) > 2 or "burst" not in spec, cases
    for turn in range(max(map(len, cases.values()))):
        for wish in WISHES:
            mine = cases[wish.name]
            number, answered = mine[turn % len(mine)]
            with ward.killing(number, answered=answered) as killed:
                await wish.ask(ward.world, turn + 1)
                await killed_or_settled(killed, ward, wish)
            if killed.is_set():  # asked when nothing kills any more: a last request may come late
                await ward.next()
            await granted(ward, wish, number)
            await collect(ward.world)
            await ward.relay.until(lambda it: sum(it.watches.values()) == WATCHES)
    # Nearly all came about: a few requests more or less are made by looks that fall together or apart.
    assert ward.kills > 0.8 * len(WISHES) * max(map(len, cases.values()))
