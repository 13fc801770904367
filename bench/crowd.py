"""A stage for operators, many agents at once, and what an operator needs for them: for reconcile.py."""

import asyncio
import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

# Who plays the gateway and the relay in the tests does so here.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from operator_rig import SPEC, Json, World, operated

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_dev.processes import Process
from trunkline_runtime.contract import GROUP, KIND, LABEL_AGENT, VERSION

# The requests of the one who asks that are under way at a time.
AT_ONCE: Final = 32
LOOK_SECONDS: Final = 0.002
LOOK_SHARE: Final = 20  # of the time, a twentieth at most
QUIET_SECONDS: Final = 1.5
RESOURCES: Final = ("voiceagents", "pods", "secrets")
Thing = TypeVar("Thing")

KIND_OF_AGENT: Final = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND}
COUNTED: Final = re.compile(r"apiserver_request_total\{(.*?)\} ([0-9.e+]+)")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process until now."""

    cpu: float  # seconds
    peak: float  # bytes in memory

    @classmethod
    def of(cls, pid: int) -> Self:
        status = Path(f"/proc/{pid}/status").read_text()
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
        return cls(cpu(pid), int(peak) * 1024)


def cpu(*pids: int) -> float:
    """Seconds that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def writes(api: Api) -> float:
    """Requests that changed an agent, a pod or a Secret, as the API server itself has counted them."""
    async with api.session.get("/metrics") as answer:
        text = await answer.text()
    total = 0.0
    for labels, value in COUNTED.findall(text):
        known = dict(re.findall(r'(\w+)="(.*?)"', labels))
        if known["verb"] not in ("GET", "LIST", "WATCH") and known["resource"] in RESOURCES:
            total += float(value)
    return total


async def at_once(things: Iterable[Thing], do: Callable[[Thing], Awaitable[Any]]) -> None:
    """Does it for each, some at a time."""
    rest = iter(things)

    async def work() -> None:
        for thing in rest:
            await do(thing)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())


# Nobody waits for a last call here, so more than a look's delay is not needed.
ONE_POD: Final = {**SPEC, "warm": {"minPods": 1, "maxPods": 1, "gpu": {"count": 0}}}


class Stage:
    """The API server, and operators that come and go."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane, self.folder = plane, folder
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def world(self) -> AsyncIterator[World]:
        """A new namespace with a gateway."""
        async with Api(self.plane.kubeconfig) as api:
            namespace = f"bench-{next(self._numbers)}"
            logs = self.folder / namespace
            logs.mkdir()
            await api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
            async with operated(api, self.plane, namespace, logs) as world:
                world.gateway.told, world.gateway.messages = Last(), Last()
                yield world

    async def ours(self, world: World, env: dict[str, str] | None = None) -> Process:
        """An operator with the settings of the chart."""
        return await world.start("--status-seconds=15", env=env)

    async def theirs(self, world: World) -> Process:
        command = [sys.executable, str(Path(__file__).parent / "plain_kopf.py"), world.namespace]
        process = Process("plain", command, world.logs / "plain.log", world.env)
        process.start()
        world.processes.append(process)
        return process


class Last(list[Any]):
    """Of what a gateway was told, only the last: 1,000 agents' routes are long."""

    def append(self, told: Any) -> None:
        self[:] = [told]


class Crowd:
    """The agents of one world and their pods, as a watch tells of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._agents: dict[str, Json] = {}
        self._pods: dict[str, Json] = {}
        self._generations: dict[str, int] = {}
        self._edits = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def watched(cls, world: World) -> AsyncIterator[Self]:
        crowd = cls(world)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part()) for part in (crowd._watch_agents, crowd._watch_pods)]
            yield crowd
            for task in tasks:
                task.cancel()

    async def act(self, act: str, names: Sequence[str], spec: Json, seconds: float = 300) -> None:
        """Has all of them created, edited, replaced or deleted; returns when the operator is done with it."""
        self._edits += 1

        async def ask(name: str) -> None:
            await self._ask(act, name, spec)

        await at_once(names, ask)
        async with asyncio.timeout(seconds):
            # Looked at now and then: there are many events, and a look at a thousand agents takes milliseconds.
            while True:
                began = time.monotonic()
                if self._done(act, names):
                    return
                await asyncio.sleep(max(LOOK_SECONDS, LOOK_SHARE * (time.monotonic() - began)))

    async def quiet(self) -> None:
        """Waits until nobody has written anything for a while."""
        last, since = await writes(self.world.api), time.monotonic()
        while time.monotonic() - since < QUIET_SECONDS:
            await asyncio.sleep(QUIET_SECONDS / 4)
            now = await writes(self.world.api)
            if now != last:
                last, since = now, time.monotonic()

    async def _ask(self, act: str, name: str, spec: Json) -> None:
        api, path = self.world.api, f"{self.world.agents}/{name}"
        match act:
            case "created":
                body = {**KIND_OF_AGENT, "metadata": {"name": name}, "spec": spec}
                answer = await api.create(self.world.agents, body)
            case "edited":
                # Whatever it is about, it differs from the default and from the edit before.
                session = {"idleSeconds": 60 + self._edits % 100}
                answer = await api.patch(path, {"spec": {"session": session}})
            case "replaced":
                warm = {"image": self._image}
                answer = await api.patch(path, {"spec": {"warm": warm}})
            case _:
                await api.delete(path)
                return
        self._generations[name] = answer["metadata"]["generation"]

    @property
    def _image(self) -> str:
        return f"trunkline/worker:{self._edits}"

    def _done(self, act: str, names: Sequence[str]) -> bool:
        agents = {agent["metadata"]["name"]: agent for agent in self._agents.values()}
        images: dict[str, list[str]] = {}  # of an agent's pods
        for pod in self._pods.values():
            of = images.setdefault(pod["metadata"]["labels"][LABEL_AGENT], [])
            of.append(pod["spec"]["containers"][0]["image"])
        if act == "deleted":
            return not any(name in agents or name in images for name in names)
        return all(
            name in agents
            and told(agents[name], self._generations[name])
            and len(found := images.get(name, [])) == 1
            and (act != "replaced" or found[0] == self._image)
            for name in names
        )

    async def _watch_agents(self) -> None:
        async with contextlib.aclosing(self.world.api.follow(self.world.agents)) as changes:
            async for self._agents in changes:
                pass

    async def _watch_pods(self) -> None:
        pods = self.world.api.follow(self.world.pods, labelSelector=LABEL_AGENT)
        async with contextlib.aclosing(pods) as changes:
            async for self._pods in changes:
                pass


def told(agent: Json, generation: int) -> bool:
    """The operator has said that it made this of the agent: a pod that starts."""
    status = agent.get("status") or {}
    starting: int = (status.get("pods") or {}).get("starting", 0)
    return status.get("observedGeneration", 0) >= generation and starting == 1
