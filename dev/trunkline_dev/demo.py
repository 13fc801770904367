"""The demo: one agent answers a spoken question, another takes a spike past its warm slots, and all of it goes away.

Counts come from the callers' own logs joined with the workers' slot logs (accounts.py), never from the
gateway; what is left behind is counted before anything is killed.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from trunkline_dev.accounts import Account, Outcome, account, percentile, stays
from trunkline_dev.callers import Holder, slot_records, spike
from trunkline_dev.kube import Expired, Json, is_true
from trunkline_dev.machine import AGENTS_PATH, Machine, MachineConfig, prepare, source
from trunkline_dev.picture import Interval, Scene, draw
from trunkline_dev.slot_log import SlotRecord
from trunkline_dev.spoken import Spoken, ask
from trunkline_dev.story import Story
from trunkline_runtime import contract

FRONT_DESK, SPIKE = "front-desk", "spike"
AGENTS: Final = f"{AGENTS_PATH}/namespaces/default/{contract.PLURAL}"
PODS: Final = "/api/v1/namespaces/default/pods"
CALLS, SPIKE_SECONDS, KEPT = 60, 2.0, 4
FLOOR, MOST_PODS = 2, 6  # examples/spike.yaml
PULL_SECONDS = 4.0  # longer than the spike: a pod on a real cluster takes tens of seconds
HEARD = 25  # frames: two seconds of audio
GONE_SECONDS = 10.0  # for pods without calls
READY_SECONDS = (
    90.0  # for an agent to become ready: a cold container takes 8 s, a busy machine longer
)


@dataclass(slots=True)
class Report:
    """What demo.json holds."""

    spoken: dict[str, Any] = field(default_factory=dict)
    spike: dict[str, Any] = field(default_factory=dict)
    drain: dict[str, Any] = field(default_factory=dict)
    left_behind: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    ok: bool = False


@dataclass(slots=True)
class Watched:
    """Ready pods of the spike's agent over time, as the API server told it."""

    ready: list[tuple[float, int]] = field(default_factory=list)
    pods: int = 0

    def saw(self, pods: list[Json]) -> None:
        self.pods = len(pods)
        ready = sum(is_true(pod, "Ready") for pod in pods)
        if not self.ready or self.ready[-1][1] != ready:
            self.ready.append((time.time(), ready))


def example(name: str) -> list[dict[str, Any]]:
    """The documents of an example."""
    return list(yaml.safe_load_all((source("examples") / f"{name}.yaml").read_text()))


def api_key(documents: list[dict[str, Any]]) -> str:
    """The first API key in an example's Secret."""
    secret = next(document for document in documents if document["kind"] == "Secret")
    key: str = next(iter(secret["stringData"].values()))
    return key


class Demo:
    """One run; `tell` is the whole story."""

    def __init__(self, out: Path, story: Story, config: MachineConfig) -> None:
        self.out, self.story, self.config = out, story, config
        self.report, self.watched = Report(), Watched()
        self.marks: list[tuple[float, str]] = []
        self.holders: list[Holder] = []

    async def tell(self) -> Report:
        with self.story.step("Control plane's programs"):
            prepare(self.story.note)
        machine = Machine(self.config, root=self.out / "machine", say=self.story.note)
        async with contextlib.AsyncExitStack() as stack:
            with self.story.step(
                "A machine: API server, node with 8 GPUs, local Modal, gateway, operator"
            ):
                await stack.enter_async_context(machine)
            await stack.enter_async_context(self._watching(machine))
            await self._agents(machine)
            await self._spoken(machine)
            await self._spike(machine)
            await self._drain(machine)
            await self._delete(machine)
            started = {process.name: process.pid for process in machine.processes}
        alive = [name for name, pid in started.items() if Path(f"/proc/{pid}").exists()]
        self.story.promise("the machine itself is gone", ", ".join(alive) or "yes", not alive)
        self.report.seconds = round(self.story.elapsed, 1)
        self.report.ok = self.story.kept
        return self.report

    @contextlib.asynccontextmanager
    async def _watching(self, machine: Machine) -> AsyncIterator[None]:
        async def watch() -> None:
            selector = f"{contract.LABEL_AGENT}={SPIKE}"
            changes = machine.api.follow(PODS, labelSelector=selector)
            async with contextlib.aclosing(changes):
                async for pods in changes:
                    self.watched.saw(list(pods.values()))

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def mark(self, text: str) -> None:
        self.marks.append((time.time(), text))

    # --- 1. agents

    async def _agents(self, machine: Machine) -> None:
        story = self.story
        with story.step(f"kubectl apply -f examples/{FRONT_DESK}.yaml -f examples/{SPIKE}.yaml"):
            await machine.modal_credentials()
            for name in (FRONT_DESK, SPIKE):
                for document in example(name):
                    await machine.apply(document)
        with story.step(
            "Both Ready, and a snapshot of the burst container taken before any caller needs it"
        ):
            await machine.api.wait_for_one(
                f"{AGENTS}/{FRONT_DESK}", lambda agent: is_true(agent, "Ready"), READY_SECONDS
            )
            await machine.api.wait_for_one(
                f"{AGENTS}/{SPIKE}",
                lambda agent: is_true(agent, "Ready") and is_true(agent, "BurstReady"),
                READY_SECONDS,
            )
        story.note("$ kubectl get va\n" + await machine.kubectl("get", "va"))

    # --- 2. a spoken call

    async def _spoken(self, machine: Machine) -> None:
        story = self.story
        with story.step("A spoken question with four random digits, by the stock openai client"):
            spoken: Spoken = await ask(
                machine.gateway_url(), api_key(example(FRONT_DESK)), FRONT_DESK, self.out
            )
        story.note(f"asked    {spoken.question}")
        story.note(f"heard    {spoken.heard}")
        story.note(f"answered {spoken.answered}   (recognised again from the answer's audio)")
        story.promise(
            "the answer says the digits back",
            f"{spoken.digits} → {spoken.answered_digits}",
            spoken.digits == spoken.answered_digits,
        )
        story.line(f"  end of speech → first audible audio: {spoken.latency_ms:.0f} ms")
        self.report.spoken = {
            "asked": spoken.question,
            "heard": spoken.heard,
            "answered": spoken.answered,
            "latency_ms": round(spoken.latency_ms),
            "wav": [str(path) for path in spoken.files],
        }

    # --- 3. the spike

    async def _spike(self, machine: Machine) -> None:
        story = self.story
        with story.step("Burst at rest: zero containers"):
            await self._containers(machine, 0)
        before = len(await machine.local_modal("containers"))
        self.mark(f"{CALLS} calls in {SPIKE_SECONDS:g} s")
        began = time.time()
        with story.step(f"Spike: {CALLS} calls in {SPIKE_SECONDS:g} s on 16 warm slots"):
            url = machine.gateway_url()
            self.holders = await spike(url, SPIKE, CALLS, SPIKE_SECONDS)
        outcomes = [holder.outcome for holder in self.holders]
        records = await slot_records(outcomes, lambda: self._slots(machine, began))
        found = account(outcomes, records)
        waits = [o.answered - o.offered for o in outcomes if o.answered is not None]
        starts = (await machine.local_modal("containers"))[before:]
        kinds = {kind: sum(c["kind"] == kind for c in starts) for kind in ("cold", "restored")}
        self._spike_promises(found, kinds, max(waits, default=0.0))
        self.report.spike = asdict(found) | {
            "container_starts": kinds,
            "admission_ms": {
                "p50": round(percentile(waits, 0.5) * 1000, 1),
                "p99": round(percentile(waits, 0.99) * 1000, 1),
            },
        }

    def _spike_promises(self, found: Account, kinds: dict[str, int], slowest: float) -> None:
        promise = self.story.promise
        where = f"{found.warm} in pods, {found.burst} at Modal, {found.refused} refused"
        promise(
            "16 calls go to pods, the other 44 to Modal",
            where,
            (found.warm, found.burst) == (16, 44),
        )
        promise("every call is answered within answerSeconds (8)", f"{slowest:.2f} s at most",
                not found.refused and not found.unanswered and slowest <= 8)  # fmt: skip
        promise("no call dropped", found.dropped, found.dropped == 0)
        promise("none answered without a slot", found.without_slot, found.without_slot == 0)
        promise("no slot given twice", found.double_booked, found.double_booked == 0)
        promise("containers start from the snapshot", f"{kinds['restored']} restored, {kinds['cold']} cold",
                kinds["restored"] > 0 and kinds["cold"] == 0)  # fmt: skip

    async def _slots(self, machine: Machine, since: float) -> list[SlotRecord]:
        return [record for record in machine.slot_log() if record.t >= since]

    # --- 4. the drain

    async def _drain(self, machine: Machine) -> None:
        story, api = self.story, machine.api
        selector = f"{contract.LABEL_AGENT}={SPIKE}"
        with story.step("The operator adds pods"):
            await api.wait_for(
                PODS,
                lambda pods: sum(is_true(pod, "Ready") for pod in pods) == MOST_PODS,
                READY_SECONDS,
                labelSelector=selector,
            )
        self.mark("pods added")
        story.promise("pods follow the load, as far as maxPods lets them", "2 → 6 pods", True)
        heard = await asyncio.gather(
            *(holder.hears(holder.frames + HEARD) for holder in self.holders)
        )
        story.promise("every caller hears the agent", f"{sum(heard)} of {CALLS}", all(heard))
        kept = await self._keep(machine)
        sent = {holder.call: holder.frames for holder in kept}
        with story.step(
            f"{CALLS - KEPT} callers hang up; {KEPT} talk on while everything shrinks round them"
        ):
            self.mark(f"{CALLS - KEPT} hang up")
            leaving = [holder for holder in self.holders if holder not in kept]
            await asyncio.gather(*(holder.hang_up() for holder in leaving))
            await self._containers(machine, 0)
            self.mark("no container left")
            await api.wait_for(
                PODS, lambda pods: len(pods) == FLOOR, READY_SECONDS, labelSelector=selector
            )
            self.mark("pods at the floor")
        # An echo that comes now proves that the call lives.
        heard = await asyncio.gather(*(holder.hears(holder.frames + HEARD) for holder in kept))
        lost = sum(
            holder.outcome.dropped or not alive for holder, alive in zip(kept, heard, strict=True)
        )
        story.note("$ kubectl get va,pods\n" + await machine.kubectl("get", "va,pods"))
        frames = ", ".join(str(holder.frames - sent[holder.call]) for holder in kept)
        story.promise(
            f"{KEPT} calls talk on undisturbed", f"{KEPT - lost} kept; {frames} frames", not lost
        )
        story.promise("burst goes to zero, pods go to the floor", "0 containers, 2 pods", True)
        self.report.drain = {"calls_kept": KEPT - lost, "calls_lost": lost}
        await asyncio.gather(*(holder.hang_up() for holder in kept))
        with story.step("Drawing"):
            await self._draw(machine)

    async def _keep(self, machine: Machine) -> list[Holder]:
        """The calls that go on: all in the two pods that hold most, so that others can empty."""
        place = {stay.call: stay for stay in stays(machine.slot_log())}
        warm = [holder for holder in self.holders if place[holder.call].place == "warm"]
        return sorted(warm, key=lambda holder: (place[holder.call].slot, holder.call))[:KEPT]

    async def _containers(self, machine: Machine, count: int) -> None:
        """Waits until the local Modal runs that many containers."""
        async with asyncio.timeout(READY_SECONDS):
            while len(await machine.live_containers()) != count:
                await asyncio.sleep(0.1)

    async def _draw(self, machine: Machine) -> None:
        began = self.marks[0][0] - 1.0
        containers = await machine.local_modal("containers")
        outcomes: list[Outcome] = [holder.outcome for holder in self.holders]
        scene = Scene(
            began=began,
            ended=time.time(),
            stays=stays(await self._slots(machine, began)),
            outcomes=outcomes,
            ready_pods=self.watched.ready,
            containers=[Interval(c["t"], c["end_t"]) for c in containers],
            marks=self.marks,
        )
        await asyncio.to_thread(draw, scene, self.out / "demo.png")

    # --- 5. gone

    async def _delete(self, machine: Machine) -> None:
        story = self.story
        with story.step(f"kubectl delete va {FRONT_DESK} {SPIKE}"):
            for name in (FRONT_DESK, SPIKE):
                await machine.api.delete(f"{AGENTS}/{name}")
            await machine.api.wait_for(AGENTS, lambda agents: not agents, READY_SECONDS)
            # An agent without burst is gone at once, and its pods a moment later. Those that stay are counted.
            with contextlib.suppress(Expired):
                await machine.api.wait_for(PODS, lambda pods: not pods, GONE_SECONDS)
        apps = [app for app in await machine.local_modal("apps") if app["state"] == "deployed"]
        self.report.left_behind = {
            "pods": len(await machine.api.list(PODS)),
            "containers": len(await machine.live_containers()),
            "apps": len(apps),
            "processes": len(machine.child_processes()),
        }
        left = ", ".join(f"{count} {what}" for what, count in self.report.left_behind.items())
        story.promise("nothing is left behind", left, not any(self.report.left_behind.values()))


async def run(out: Path, story: Story, config: MachineConfig) -> Report:
    """Runs the demo; writes demo.json, demo.png and the WAVs into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(out, story, config)
    try:
        return await demo.tell()
    finally:
        (out / "demo.json").write_text(json.dumps(asdict(demo.report), indent=2) + "\n")
