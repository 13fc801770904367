"""The operator with 1,000 agents, in a rush, and among others: time, CPU, memory, and writes to the API server.

    python bench/reconcile.py [--quick] [--agents N] [--rounds N] [--rest SECONDS] [--only crowds|rush|trouble] [--alone]
        [--json FILE]

A real API server, no node and no kubelet; a gateway that the benchmark plays. Ours and the peer (plain_kopf.py)
take turns, each with a new process in a new namespace, and the other begins in each second round; `--alone` leaves
the peer out. Before that somebody has worked with the API server, which is slower in its first minute. What they do
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
import gc
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What a process did with all agents, from first to last."""

    acts: dict[str, Cost]
    rest_writes: float  # in a minute
    rest_cpu: float  # share of a core
    megabytes: float
    anew: float  # of one that starts with all agents there
    lists: tuple[list[float], list[float]]  # seconds, raw and typed


async def _crowds(stage: Stage, size: Size, peers: Sequence[str]) -> list[report.Row]:
    lives: dict[str, list[Life]] = {"ours": [], "theirs": []}
    await _life(stage, getattr(stage, peers[-1]), replace(size, agents=WARM_UP, rest_seconds=0.1))
    for number in range(size.rounds):
        for name in peers if number % 2 == 0 else peers[::-1]:
            life = await _life(stage, getattr(stage, name), size)
            lives[name].append(life)
            print(f"round {number}, {name}: {life}", file=sys.stderr)
    ours, theirs = lives["ours"], lives["theirs"]
    rows = [row for act in ACTS for row in _act_rows(size.agents, act, ours, theirs)]
    return [*rows, *_rest_rows(size.agents, ours, theirs), _list_row(size.agents, ours)]


async def _life(stage: Stage, start: Callable[[World], Awaitable[Process]], size: Size) -> Life:
    async with stage.world() as world:
        process = await start(world)
        async with Crowd.watched(world) as crowd:
            await _warmed_up(crowd, "warm-up")
            acts = {}
            for act in ACTS[:-1]:
                acts[act] = await _cost(stage, crowd, process, act, size.agents)
            before, usage, began = await writes(world.api), Usage.of(process.pid), time.monotonic()
            await asyncio.sleep(size.rest_seconds)
            passed = time.monotonic() - began
            rest = await writes(world.api) - before
            idle = Usage.of(process.pid).cpu - usage.cpu
            megabytes = Usage.of(process.pid).peak / 1e6
            lists = await _lists(stage, world, size) if start == stage.ours else ([], [])
            await process.stop()
            process = await start(world)
            await asyncio.sleep(min(size.rest_seconds, START_SECONDS))
            anew = Usage.of(process.pid).peak / 1e6
            # So that no start is counted as part of the deletions. Another name: nobody has collected the Secret of the
            # first here, and the peer stumbles over it.
            await _warmed_up(crowd, "warm-up-anew")
            acts["deleted"] = await _cost(stage, crowd, process, "deleted", size.agents)
        return Life(
            acts=acts,
            rest_writes=rest * 60 / passed,
            rest_cpu=idle / passed,
            megabytes=megabytes,
            anew=anew,
            lists=lists,
        )


async def _warmed_up(crowd: Crowd, name: str) -> None:
    """It watches, and has done everything once."""
    for act in ACTS:
        await crowd.act(act, [name], ONE_POD)


async def _cost(stage: Stage, crowd: Crowd, process: Process, act: str, agents: int) -> Cost:
    names = [f"agent-{number:04}" for number in range(agents)]
    before, began = await writes(crowd.world.api), time.monotonic()
    own, others = cpu(process.pid), cpu(*stage.plane.pids)
    await crowd.act(act, names, ONE_POD)
    seconds = time.monotonic() - began
    own, others = cpu(process.pid) - own, cpu(*stage.plane.pids) - others
    await crowd.quiet()  # what is written after the world is as it should be counts, too
    asked = agents  # by the benchmark itself
    written = await writes(crowd.world.api) - before - asked
    return Cost(seconds, own, others, written / agents)


def _act_rows(
    agents: int, act: str, ours: Sequence[Life], theirs: Sequence[Life]
) -> list[report.Row]:
    what = f"{agents:,} agents {WORDS[act]}"
    peer = "plain kopf"

    def of(part: str, lives: Sequence[Life]) -> list[float]:
        return [getattr(life.acts[act], part) for life in lives]

    def speed(part: str, lives: Sequence[Life]) -> list[float]:
        return [agents / value for value in of(part, lives)]

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


def _rest_rows(agents: int, ours: Sequence[Life], theirs: Sequence[Life]) -> list[report.Row]:
    peer = max((life.rest_writes for life in theirs), default=0.0)
    return [
        report.Row(
            what=f"{agents:,} agents at rest: writes (target 0)",
            against=f"plain kopf, {peer:.3g}",
            unit="/min",
            ours=[life.rest_writes for life in ours],
            theirs=[],
        ),
        report.Row(
            what=f"{agents:,} agents at rest: CPU",
            against="plain kopf, which never looks again",
            unit="cores",
            ours=[life.rest_cpu for life in ours],
            theirs=[],
        ),
        report.Row(
            what=f"memory at its peak, {agents:,} agents",
            against=f"{MEGABYTES} MB",
            unit="MB",
            ours=[life.megabytes for life in ours],
            theirs=[MEGABYTES],
            at_most=True,
            floor=1.0,
        ),
        report.Row(
            what=f"memory at its peak, {agents:,} agents",
            against="plain kopf",
            unit="MB",
            ours=[life.megabytes for life in ours],
            theirs=[life.megabytes for life in theirs],
            at_most=True,
        ),
        report.Row(
            what=f"memory at its peak of one that starts with {agents:,} agents",
            against="plain kopf",
            unit="MB",
            ours=[life.anew for life in ours],
            theirs=[life.anew for life in theirs],
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


def _list_row(agents: int, lives: Sequence[Life]) -> report.Row:
    return report.Row(
        what=f"list of {agents:,} pods, of each what a look sees",
        against="kubernetes client, typed",
        unit="/s",
        ours=[1 / seconds for life in lives for seconds in life.lists[0]],
        theirs=[1 / seconds for life in lives for seconds in life.lists[1]],
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
