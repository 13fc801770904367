"""An operator in a hurry and among others: for reconcile.py."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import report
from api_relay import ApiRelay, Request
from crowd import ONE_POD, Crowd, Stage, Usage, at_once, writes
from fake_gateway import agent_load, worker_load
from operator_rig import NAME, SPEC, Json, World

from trunkline_dev.processes import Process

FLOOR_SECONDS, TARGET_SECONDS = 0.5, 0.1
OTHERS = 15  # agents that come meanwhile, one after the other

# --- no free slot ------------------------------------------------------------------------------------


async def rush(stage: Stage, rushes: int) -> list[report.Row]:
    """Time from a gateway's word that no slot is free until the API server is asked for a pod.

    Loads come at random moments of the operator's own rhythm, and each is preceded by one that changes less.
    """
    spec = {**SPEC, "warm": {"maxPods": 1000, "gpu": {"count": 0}, "slotsPerPod": 4}}
    chance = random.Random(1)
    found: list[float] = []
    async with stage.world() as world, ApiRelay(world.api).serving() as relay:
        created: asyncio.Queue[float] = asyncio.Queue()

        async def before(request: Request) -> None:
            if request.method == "POST" and request.path.endswith("/pods"):
                created.put_nowait(time.monotonic())

        relay.before = before
        await stage.ours(world, {"KUBECONFIG": str(relay.kubeconfig(world.logs))})
        await world.apply(spec)
        for pods in range(1, rushes + 1):
            await asyncio.wait_for(created.get(), 30)
            await world.api.wait_for_one(f"{world.pods}/{NAME}-{pods - 1}")
            await world.make_ready(f"{NAME}-{pods - 1}")
            await _say(world, pods, free=3)
            await world.agent(partial(_has_ready, pods))
            await asyncio.sleep(chance.uniform(0.3, 0.6))
            await _say(world, pods, free=1)
            await asyncio.sleep(chance.uniform(0, 0.3))
            began = time.monotonic()
            await _say(world, pods, free=0)
            found.append(await asyncio.wait_for(created.get(), 30) - began)
            created.put_nowait(0.0)  # for the next turn
    return _rush_rows(found)


def _has_ready(pods: int, agent: Json) -> bool:
    ready: int = (agent.get("status") or {}).get("readyReplicas", 0)
    return ready == pods


async def _say(world: World, pods: int, free: int) -> None:
    workers = {f"{NAME}-{n}": worker_load(4, 4) for n in range(pods - 1)}
    workers[f"{NAME}-{pods - 1}"] = worker_load(4, 4 - free)
    await world.gateway.say(world.key, agent_load(workers))


def _rush_rows(seconds: Sequence[float]) -> list[report.Row]:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    median = ordered[len(ordered) // 2]
    against = "500 ms (HPA asks every 15 s, KEDA every 30 s, Knative every 2 s)"
    return [
        report.Row(
            what=f"no free slot → pod create sent, p99 of {len(ordered)}",
            against=against,
            unit="ms",
            ours=[p99 * 1000],
            theirs=[FLOOR_SECONDS * 1000],
            at_most=True,
            floor=1.0,
            target=TARGET_SECONDS / FLOOR_SECONDS,
        ),
        report.Row(
            what="no free slot → pod create sent, median",
            against=against,
            unit="ms",
            ours=[median * 1000],
            theirs=[FLOOR_SECONDS * 1000],
            at_most=True,
        ),
    ]


# --- trouble -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spell:
    """A while of an operator's life."""

    cpu: float  # share of a core
    writes: float  # a second, of the operator
    others: list[float]  # seconds until each new agent has its pod


async def trouble(stage: Stage, seconds: float, strangers: int) -> list[report.Row]:
    """An agent that is edited all the time, and a namespace full of others' pods."""
    async with stage.world() as world:
        process = await stage.ours(world)
        async with Crowd.watched(world) as crowd:
            await crowd.act("created", ["edited"], ONE_POD)

            async def nothing() -> int:
                await asyncio.sleep(seconds)
                return 0

            calm = await _spell(crowd, process, "calm", nothing)

            async def edits() -> int:
                return await _edit(world, "edited", seconds)

            edited = await _spell(crowd, process, "beside-edits", edits)
            await _strangers(world, strangers)
            crowded = await _spell(crowd, process, "in-a-crowd", nothing)
    edits_words = "an agent that is edited every 50 ms"
    crowd_words = f"{strangers:,} pods of others in the namespace"
    return [*_spell_rows(edits_words, edited, calm), *_spell_rows(crowd_words, crowded, calm)]


async def _spell(
    crowd: Crowd, process: Process, name: str, meanwhile: Callable[[], Awaitable[int]]
) -> Spell:
    """What the operator needs while that goes on; other agents come, too."""
    await crowd.quiet()
    before, usage, began = await writes(crowd.world.api), Usage.of(process.pid), time.monotonic()
    task = asyncio.ensure_future(meanwhile())
    others = [f"{name}-{number}" for number in range(OTHERS)]
    took = []
    for other in others:
        asked = time.monotonic()
        await crowd.act("created", [other], ONE_POD)
        took.append(time.monotonic() - asked)
    own = await task + len(others)
    passed = time.monotonic() - began
    cpu = Usage.of(process.pid).cpu - usage.cpu
    written = await writes(crowd.world.api) - before - own
    return Spell(cpu / passed, written / passed, took)


async def _edit(world: World, name: str, seconds: float) -> int:
    """Edits an agent every 50 ms; how often."""
    path, end = f"{world.agents}/{name}", time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() > end:
            return number
        due = time.monotonic() + 0.05
        await world.api.patch(path, {"spec": {"session": {"idleSeconds": 60 + number % 1000}}})
        await asyncio.sleep(max(due - time.monotonic(), 0))
    raise AssertionError


async def _strangers(world: World, count: int) -> None:
    """Pods of nobody we know."""
    containers = [{"name": "c", "image": "i"}]
    bodies: list[Json] = [
        {
            "metadata": {"name": f"stranger-{n}", "labels": {"app": "x"}},
            "spec": {"containers": containers},
        }
        for n in range(count)
    ]
    await at_once(bodies, lambda body: world.api.create(world.pods, body))


def _spell_rows(words: str, ours: Spell, calm: Spell) -> list[report.Row]:
    against = f"the same without ({calm.writes:.2g} writes/s, {calm.cpu:.2g} cores)"
    return [
        report.Row(
            what=f"{words}: writes", against=against, unit="/s", ours=[ours.writes], theirs=[]
        ),
        report.Row(what=f"{words}: CPU", against=against, unit="cores", ours=[ours.cpu], theirs=[]),
        report.Row(
            what=f"{words}: another agent gets its pod after",
            against="the same without",
            unit="s",
            ours=ours.others,
            theirs=calm.others,
            at_most=True,
            floor=2.0,
        ),
    ]
