"""The operator with 1,000 agents, in a rush, and among others: time, CPU, memory, and writes to the API server.

    python bench/reconcile.py [--quick] [--agents N] [--rounds N] [--rest SECONDS] [--only crowds|rush|trouble] [--alone]
        [--json FILE]

A real API server, no node and no kubelet; a gateway that the benchmark plays. Ours and the peer (plain_kopf.py)
take turns act by act, each with a process and a namespace of its own, and the other begins in each second round; who has
no turn rests. `--alone` leaves the peer out. Before that somebody has worked with the API server, which is slower in its first minute. What they do
for each agent:

    act        ours                                       plain kopf
    created    Secret, pod, status                        finalizer, Secret, pod, status, kopf's annotation
    edited     status                                     status, kopf's annotation
    replaced   old pod deleted, new pod, status           the same, and kopf's annotation
    deleted    pod deleted                                pod deleted, finalizer

The agents have no burst. Ours would give them a finalizer with it, as kopf does for every handler of deletions; without,
Kubernetes ends all that was made for an agent. No pod gets a node, so none has a worker and a deleted one is gone at once.
Ours watches pods and nodes too, lists everything now and then, holds a link to a gateway and gives it routes;
the peer does nothing of that. Our status has five conditions and the reasons for them, 1.2 KB, the peer's three
numbers, 0.1 KB; each later write to the agent, also the one that asks for its end, reads and writes that anew. Our
pod's manifest has 2.5 KB, the peer's 1.7.

API server, gateway and the one who asks share the machine with the operators, and the API server needs most of the
CPU: its share for each agent has rows of its own. So the speeds depend on writes more than on the operators' code.
"""

import argparse
import asyncio
import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import kubernetes
import report
from crowd import ONE_POD, Crowd, Stage, Usage, cpu, writes
from hurry import rush, trouble
from operator_rig import World

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.processes import Process
from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.tidings import PAGE

MEGABYTES: Final = 130
# Of one with all agents there: it has then looked at all of them, and its watches have told of them.
START_SECONDS: Final = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is done."""

    agents: int
    rounds: int
    rest_seconds: float
    lists: int
    rushes: int
    edit_seconds: float
    strangers: int


FULL: Final = Size(
    agents=1000, rounds=1, rest_seconds=30, lists=9, rushes=100, edit_seconds=10, strangers=2000
)
WARM_UP: Final = 30  # agents

QUICK: Final = Size(
    agents=20, rounds=1, rest_seconds=1, lists=3, rushes=5, edit_seconds=2, strangers=200
)

ACTS: Final = ("created", "edited", "replaced", "deleted")
# What can be done again, each does twice, in the order ours, theirs, theirs, ours.
TWICE: Final = ("edited", "replaced")
WORDS: Final = {
    "created": "created",
    "edited": "changed in what replaces no pod",
    "replaced": "changed in what replaces the pod",
    "deleted": "deleted",
}


PARTS: Final = ("crowds", "rush", "trouble")


def measured(options: argparse.Namespace) -> Callable[[bool], list[report.Row]]:
    """What is to be measured, for `report.main`."""

    def measure(quick: bool) -> list[report.Row]:
        size = QUICK if quick else FULL
        size = replace(size, agents=options.agents or size.agents)
        size = replace(size, rounds=options.rounds or size.rounds)
        size = replace(size, rest_seconds=options.rest or size.rest_seconds)
        with ControlPlane() as plane, tempfile.TemporaryDirectory() as folder:
            stage = Stage(plane, Path(folder))
            peers = ("ours",) if options.alone else ("ours", "theirs")
            return asyncio.run(_measure(stage, size, options.only or PARTS, peers))

    return measure


async def _measure(
    stage: Stage, size: Size, parts: Sequence[str], peers: Sequence[str]
) -> list[report.Row]:
    rows: list[report.Row] = []
    if "crowds" in parts:
        rows += await _crowds(stage, size, peers)
    if "rush" in parts:
        rows += await rush(stage, size.rushes)
    if "trouble" in parts:
        rows += await trouble(stage, size.edit_seconds, size.strangers)
    return rows


# --- 1,000 agents ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one act on all agents."""

    seconds: float
    cpu: float
    server: float  # seconds of CPU of the API server and its etcd
    writes: float  # of one agent


@dataclass(slots=True, kw_only=True)
class Side:
    """One operator in a namespace of its own, with the agents there; and what it needed."""

    name: str
    start: Callable[[World], Awaitable[Process]]
    world: World
    crowd: Crowd
    process: Process
    acts: dict[str, list[Cost]] = field(default_factory=dict)
    rest_writes: float = 0.0  # in a minute
    rest_cpu: float = 0.0  # share of a core
    megabytes: float = 0.0
    anew: float = 0.0  # of one that starts with all agents there
    lists: tuple[list[float], list[float]] = field(
        default_factory=lambda: ([], [])
    )  # seconds, raw and typed

    def __repr__(self) -> str:
        acts = {
            act: [f"{cost.seconds:.1f} s" for cost in costs] for act, costs in self.acts.items()
        }
        return f"{self.name}: {acts}, {self.megabytes:.0f} MB"


async def _crowds(stage: Stage, size: Size, peers: Sequence[str]) -> list[report.Row]:
    await _round(stage, replace(size, agents=WARM_UP, rest_seconds=0.1), peers[-1:])
    rounds = []
    for number in range(size.rounds):
        sides = await _round(stage, size, peers if number % 2 == 0 else peers[::-1])
        rounds.append({side.name: side for side in sides})
        print(f"round {number}: {sides}", file=sys.stderr)
    ours = [sides["ours"] for sides in rounds]
    theirs = [sides["theirs"] for sides in rounds if "theirs" in sides]
    rows = [row for act in ACTS for row in _act_rows(size.agents, act, ours, theirs)]
    return [*rows, *_rest_rows(size.agents, ours, theirs), _list_row(size.agents, ours)]


async def _round(stage: Stage, size: Size, peers: Sequence[str]) -> list[Side]:
    """All acts, by each of the operators right after the other: the speed of a machine that others use drifts."""
    async with contextlib.AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(_side(stage, name)) for name in peers]
        for act in ACTS[:-1]:
            for side in (*sides, *sides[::-1]) if act in TWICE else sides:
                await _act(stage, side, act, size.agents)
        for side in sides:
            await _at_rest(stage, side, size)
        for side in sides[::-1]:
            await _act(stage, side, ACTS[-1], size.agents)
    return sides


@contextlib.asynccontextmanager
async def _side(stage: Stage, name: str) -> AsyncIterator[Side]:
    start = getattr(stage, name)
    async with stage.world() as world:
        process = await start(world)
        async with Crowd.watched(world) as crowd:
            await _warmed_up(crowd, "warm-up")
            yield Side(name=name, start=start, world=world, crowd=crowd, process=process)


async def _at_rest(stage: Stage, side: Side, size: Size) -> None:
    """What it does with nothing to do; then it begins anew."""
    process, api = side.process, side.world.api
    before, usage, began = await writes(api), Usage.of(process.pid), time.monotonic()
    await asyncio.sleep(size.rest_seconds)
    passed = time.monotonic() - began
    side.rest_writes = (await writes(api) - before) * 60 / passed
    side.rest_cpu = (Usage.of(process.pid).cpu - usage.cpu) / passed
    side.megabytes = Usage.of(process.pid).peak / 1e6
    if side.name == "ours":
        side.lists = await _lists(stage, side.world, size)
    await process.stop()
    side.process = await side.start(side.world)
    await asyncio.sleep(min(size.rest_seconds, START_SECONDS))
    side.anew = Usage.of(side.process.pid).peak / 1e6
    # So that no start is counted as part of the deletions. Another name: nobody has collected the Secret of the
    # first here, and the peer stumbles over it.
    await _warmed_up(side.crowd, "warm-up-anew")


async def _warmed_up(crowd: Crowd, name: str) -> None:
    """It watches, and has done everything once."""
    for act in ACTS:
        await crowd.act(act, [name], ONE_POD)


async def _act(stage: Stage, side: Side, act: str, agents: int) -> None:
    names = [f"agent-{number:04}" for number in range(agents)]
    before, began = await writes(side.world.api), time.monotonic()
    own, others = cpu(side.process.pid), cpu(*stage.plane.pids)
    await side.crowd.act(act, names, ONE_POD)
    seconds = time.monotonic() - began
    own, others = cpu(side.process.pid) - own, cpu(*stage.plane.pids) - others
    await side.crowd.quiet()  # what is written after the world is as it should be counts, too
    asked = agents  # by the benchmark itself
    written = await writes(side.world.api) - before - asked
    side.acts.setdefault(act, []).append(Cost(seconds, own, others, written / agents))


def _act_rows(
    agents: int, act: str, ours: Sequence[Side], theirs: Sequence[Side]
) -> list[report.Row]:
    what = f"{agents:,} agents {WORDS[act]}"
    peer = "plain kopf"

    def of(part: str, sides: Sequence[Side]) -> list[float]:
        return [getattr(cost, part) for side in sides for cost in side.acts[act]]

    def speed(part: str, sides: Sequence[Side]) -> list[float]:
        return [agents / value for value in of(part, sides)]

    return [
        report.Row(
            what=what,
            against=peer,
            unit="agents/s",
            ours=speed("seconds", ours),
            theirs=speed("seconds", theirs),
            floor=1.3,
            target=1.8,
        ),
        report.Row(
            what=f"{what}: per second of the operator's CPU",
            against=peer,
            unit="agents",
            ours=speed("cpu", ours),
            theirs=speed("cpu", theirs),
        ),
        report.Row(
            what=f"{what}: CPU of the API server for each",
            against=peer,
            unit="ms",
            ours=[value / agents * 1000 for value in of("server", ours)],
            theirs=[value / agents * 1000 for value in of("server", theirs)],
            at_most=True,
        ),
        report.Row(
            what=f"{what}: writes of the operator for each",
            against=peer,
            unit="",
            ours=of("writes", ours),
            theirs=of("writes", theirs),
            at_most=True,
            floor=1.0,
        ),
    ]


def _rest_rows(agents: int, ours: Sequence[Side], theirs: Sequence[Side]) -> list[report.Row]:
    peer = max((side.rest_writes for side in theirs), default=0.0)
    return [
        report.Row(
            what=f"{agents:,} agents at rest: writes (target 0)",
            against=f"plain kopf, {peer:.3g}",
            unit="/min",
            ours=[side.rest_writes for side in ours],
            theirs=[],
        ),
        report.Row(
            what=f"{agents:,} agents at rest: CPU",
            against="plain kopf, which never looks again",
            unit="cores",
            ours=[side.rest_cpu for side in ours],
            theirs=[],
        ),
        report.Row(
            what=f"memory at its peak, {agents:,} agents",
            against=f"{MEGABYTES} MB",
            unit="MB",
            ours=[side.megabytes for side in ours],
            theirs=[MEGABYTES],
            at_most=True,
            floor=1.0,
        ),
        report.Row(
            what=f"memory at its peak, {agents:,} agents",
            against="plain kopf",
            unit="MB",
            ours=[side.megabytes for side in ours],
            theirs=[side.megabytes for side in theirs],
            at_most=True,
        ),
        report.Row(
            what=f"memory at its peak of one that starts with {agents:,} agents",
            against="plain kopf",
            unit="MB",
            ours=[side.anew for side in ours],
            theirs=[side.anew for side in theirs],
            at_most=True,
        ),
    ]


# --- lists -------------------------------------------------------------------------------------------


async def _lists(stage: Stage, world: World, size: Size) -> tuple[list[float], list[float]]:
    """Seconds for a list of all pods, read as the operator does and as the typed client does."""
    kubernetes.config.load_kube_config(str(stage.plane.kubeconfig))
    typed = kubernetes.client.CoreV1Api()
    ours, theirs = [], []
    async with await Cluster.connect({"KUBECONFIG": str(stage.plane.kubeconfig)}) as cluster:
        for turn in range(size.lists + 1):
            gc.collect()  # what the other's turn has left is not paid for here
            began = time.monotonic()
            pages = cluster.pages(world.pods, listed.pods, PAGE)
            found = [pod async for page in pages for pod in page.items]
            middle = time.monotonic()
            same = typed.list_namespaced_pod(world.namespace).items
            end = time.monotonic()
            assert len(found) == len(same) >= size.agents
            if turn:  # the first opened connections
                ours.append(middle - began)
                theirs.append(end - middle)
    typed.api_client.close()
    return ours, theirs


def _list_row(agents: int, sides: Sequence[Side]) -> report.Row:
    return report.Row(
        what=f"list of {agents:,} pods, of each what a look sees",
        against="kubernetes client, typed",
        unit="/s",
        ours=[1 / seconds for side in sides for seconds in side.lists[0]],
        theirs=[1 / seconds for side in sides for seconds in side.lists[1]],
        floor=4,
        target=9,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--agents", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rest", type=float)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--alone", action="store_true")
    options, others = parser.parse_known_args()
    given = "".join(f" {each}" for each in sys.argv[1:] if each not in others)
    report.main("reconcile", measured(options), arguments=others, given=given)
