"""Who acts of several operators: the decisions with many clocks, then real processes on a real API server."""

import asyncio
import base64
import contextlib
import heapq
import itertools
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from api_relay import ApiRelay, Request, let_be
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_rig import NAME, SPEC, World, operated
from ports import free_port

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_dev.processes import Process, ProcessFailed
from trunkline_operator.cluster.client import Cluster, path
from trunkline_operator.cluster.leader import LOST_STATUS, Tenure, identity
from trunkline_operator.cluster.lease import (
    ANNOTATION_EPOCH,
    DEADLINE_SECONDS,
    LEASE_SECONDS,
    LOOK_SECONDS,
    Action,
    Candidate,
    Create,
    Lease,
    Left,
    Lost,
    Read,
    Sleep,
    Write,
    epoch_after,
)

Json = dict[str, Any]
WALL = 1_700_000_000.0

# --- one candidate, by hand ----------------------------------------------------------------------------------


def candidate(name: str = "a") -> Candidate:
    return Candidate(name, "lease", lambda: 0.5)


def lease(version: int, holder: str = "", epoch: int = 0, seconds: int = LEASE_SECONDS) -> Lease:
    return Lease(version=str(version), holder=holder, epoch=epoch, seconds=seconds)


def leader(now: float = 0.0) -> Candidate:
    """One that has just made the Lease."""
    it = candidate()
    assert it.next(now, WALL) == Read()
    it.read(None, now)
    made = it.next(now, WALL)
    assert isinstance(made, Create)
    it.wrote(Lease.of(made.body | stored(made.body, 1)), now)
    return it


def stored(body: Json, version: int) -> Json:
    return {"metadata": body["metadata"] | {"resourceVersion": str(version)}}


def test_the_first_makes_the_lease_and_renews_it() -> None:
    it = leader()
    assert it.holds(DEADLINE_SECONDS - 0.01)
    assert not it.holds(DEADLINE_SECONDS)
    assert it.next(0.5, WALL) == Sleep(1.5)
    renewal = it.next(2.0, WALL + 2)
    assert isinstance(renewal, Write)
    assert renewal.body == {
        "metadata": {"resourceVersion": "1"},
        "spec": {"renewTime": "2023-11-14T22:13:22.000000Z"},
    }
    it.wrote(lease(2, "a"), 2.0)
    assert it.holds(11.9)


def test_another_waits_from_the_last_change_that_it_saw() -> None:
    it = candidate("b")
    it.read(lease(1, "a"), 100)
    assert it.next(100, WALL) == Sleep(LOOK_SECONDS)
    assert it.next(101, WALL) == Read()
    it.read(lease(2, "a"), 101)
    for now in (102.0, 110.0, 115.5):
        assert it.next(now, WALL) == Read()
        it.read(lease(2, "a"), now)
    assert it.next(115.5, WALL) == Sleep(0.5)  # no later than it runs out
    assert it.next(116, WALL) == Read()
    it.read(lease(2, "a", epoch=2**60), 116)
    taken = it.next(116, WALL)
    assert isinstance(taken, Write)
    assert taken.body["metadata"]["resourceVersion"] == "2"
    assert taken.body["spec"]["holderIdentity"] == "b"
    assert taken.body["spec"]["leaseTransitions"] == 1
    assert taken.body["metadata"]["annotations"][ANNOTATION_EPOCH] == str(2**60 + 1)


def test_a_lease_that_was_given_back_is_taken_at_once() -> None:
    it = candidate("b")
    it.read(lease(1, "a"), 0)
    assert it.next(1, WALL) == Read()
    it.read(lease(2, "", seconds=1), 1)
    assert isinstance(it.next(1, WALL), Write)


def test_a_lease_that_was_deleted_is_waited_out() -> None:
    it = candidate("b")
    it.read(lease(1, "a"), 0)
    assert it.next(1, WALL) == Read()
    it.read(None, 1)
    assert it.next(2, WALL) == Read()
    it.read(None, 15.9)
    assert isinstance(it.next(15.95, WALL), Sleep)
    assert it.next(16, WALL) == Read()
    it.read(None, 16)
    assert isinstance(it.next(16, WALL), Create)


def test_who_is_refused_looks_again() -> None:
    it = candidate("b")
    it.read(lease(1), 0)
    assert isinstance(it.next(0, WALL), Write)
    it.refused()
    assert it.next(0, WALL) == Read()
    it.read(lease(2, "c"), 0)
    assert isinstance(it.next(0, WALL), Sleep)
    assert not it.holds(0)


def test_a_renewal_without_an_answer_is_no_renewal() -> None:
    it = leader()
    assert isinstance(it.next(2, WALL), Write)
    it.failed(6)
    assert it.next(6, WALL) == Sleep(0.5)
    assert it.next(6.5, WALL) == Read()
    it.read(lease(2, "a"), 6.6)  # it had arrived
    assert isinstance(it.next(6.6, WALL), Write)
    assert not it.holds(DEADLINE_SECONDS)
    assert it.patience(9) == 1
    assert it.next(DEADLINE_SECONDS, WALL) == Lost("the Lease could not be renewed for 10 s")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (None, "the Lease was deleted"),
        (lease(2, "b"), "b has the Lease"),
        (lease(2), "nobody has the Lease"),
    ],
)
def test_a_leader_that_finds_the_lease_otherwise_ends(found: Lease | None, why: str) -> None:
    it = leader()
    it.refused()
    assert it.next(2, WALL) == Read()
    it.read(found, 2)
    assert it.next(2, WALL) == Lost(why)


def test_an_acquisition_without_an_answer_is_done_again() -> None:
    it = candidate()
    it.read(lease(1), 0)
    assert isinstance(it.next(0, WALL), Write)
    it.failed(4)
    assert it.next(5, WALL) == Read()
    it.read(lease(2, "a"), 5)
    assert not it.holds(5)
    assert isinstance(it.next(5, WALL), Write)


def test_leaving() -> None:
    it = leader()
    it.leave()
    assert not it.holds(0)
    given = it.next(1, WALL)
    assert isinstance(given, Write)
    assert given.body["spec"]["holderIdentity"] == ""
    it.refused()  # its own last renewal was faster
    assert it.next(1, WALL) == Read()
    it.read(lease(3, "a"), 1)
    assert isinstance(it.next(1, WALL), Write)
    it.wrote(lease(4), 1)
    assert it.next(1, WALL) == Left()


def test_one_that_never_wrote_leaves_without_a_word() -> None:
    it = candidate("b")
    it.read(lease(1, "a"), 0)
    it.leave()
    assert it.next(0, WALL) == Left()


def test_one_that_leaves_while_it_takes_the_lease_gives_it_back() -> None:
    it = candidate()
    it.read(lease(1), 0)
    assert isinstance(it.next(0, WALL), Write)
    it.leave()  # and the answer never came
    it.failed(0)
    assert it.next(0, WALL) == Read()
    it.read(lease(2, "a"), 0)
    assert isinstance(it.next(0, WALL), Write)


def test_a_lease_that_others_wrote_is_understood() -> None:
    obj = {"metadata": {"resourceVersion": "7", "annotations": {ANNOTATION_EPOCH: "x"}}}
    assert Lease.of(obj) == lease(7)
    assert Lease.of(obj | {"spec": {"holderIdentity": None, "leaseDurationSeconds": 30}}) == lease(
        7, seconds=30
    )


def test_epochs_rise_whatever_the_clock_says() -> None:
    assert epoch_after(0, WALL) == int(WALL * 1000)
    assert epoch_after(int(WALL * 1000) + 5, WALL) == int(WALL * 1000) + 6


def test_two_processes_of_one_pod_are_two() -> None:
    one, two = identity({"POD_ID": "operator-0"}), identity({"POD_ID": "operator-0"})
    assert re.fullmatch(r"operator-0_[0-9a-f]{8}", one)
    assert one != two


# --- many candidates, with clocks of their own ----------------------------------------------------------------


@dataclass(slots=True)
class Machine:
    """A candidate on a machine whose clock starts anywhere and is up to a tenth fast or slow."""

    candidate: Candidate
    start: float
    rate: float
    up: bool = True
    cut: bool = False  # from the API server
    sleeps_until: float = 0.0  # as a process that is stopped for a while

    def clock(self, true: float) -> float:
        return self.start + true * self.rate


@dataclass(slots=True)
class Simulation:
    """A server with one Lease, a network that delays and drops, and crashes, pauses and departures."""

    random: random.Random
    machines: dict[str, Machine] = field(default_factory=dict)
    body: Json | None = None
    version: int = 0
    now: float = 0.0
    epochs: list[tuple[str, int]] = field(default_factory=list)
    handed_over: int = 0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def run(self, seconds: float) -> None:
        while self._events and self._events[0][0] <= seconds:
            self.now, _, what = heapq.heappop(self._events)
            what()
            self.check()

    def acting(self) -> list[str]:
        return [
            name
            for name, it in self.machines.items()
            if it.up and it.candidate.holds(it.clock(self.now))
        ]

    def check(self) -> None:
        acting = self.acting()
        assert len(acting) <= 1, f"{acting} act at once at {self.now}"
        if acting:
            known = self.machines[acting[0]].candidate.known
            assert known is not None
            tenure = acting[0], known.epoch
            if not self.epochs or self.epochs[-1] != tenure:
                assert not self.epochs or tenure[1] > self.epochs[-1][1], self.epochs
                self.epochs.append(tenure)

    # --- machines

    def boot(self, name: str) -> None:
        it = Machine(
            Candidate(name, "lease", self.random.random),
            self.random.uniform(-1e6, 1e6),
            self.random.uniform(0.9, 1.1),
        )
        self.machines[name] = it
        self.turn(name, it)

    def turn(self, name: str, it: Machine) -> None:
        """What the shell does with a decision; a machine that sleeps does it later."""
        if not it.up:
            return
        if it.sleeps_until > self.now:
            self.at(it.sleeps_until, lambda: self.turn(name, it))
            return
        wall = WALL + self.random.uniform(-1e6, 1e6)  # nobody's time of day is worth anything
        action = it.candidate.next(it.clock(self.now), wall)
        match action:
            case Sleep(seconds):
                assert seconds > 0
                # No clock is so fine that nothing passes.
                self.at(self.now + max(seconds / it.rate, 1e-6), lambda: self.turn(name, it))
            case Read() | Create() | Write():
                self.send(name, it, action)
            case Lost():
                it.up = False
                self.at(self.now + 1, lambda: self.boot(f"{name}+"))
            case Left():
                it.up = False
                self.handed_over += 1

    def send(self, name: str, it: Machine, action: Read | Create | Write) -> None:
        sent = it.clock(self.now)
        patience = it.candidate.patience(sent) / it.rate
        waiting = [True]

        def give_up() -> None:
            if it.sleeps_until > self.now:
                self.at(it.sleeps_until, give_up)
            elif waiting[0] and it.up:
                waiting[0] = False
                it.candidate.failed(it.clock(self.now))
                self.turn(name, it)

        def arrive() -> None:
            answer = self.serve(action)
            if not (it.cut or self.random.random() < 0.05):
                self.at(self.now + self.delay(), lambda: back(answer))

        def back(answer: Callable[[Candidate, float, float], None]) -> None:
            if it.sleeps_until > self.now:
                self.at(it.sleeps_until, lambda: back(answer))
            elif waiting[0] and it.up:
                waiting[0] = False
                answer(it.candidate, sent, it.clock(self.now))
                self.turn(name, it)

        self.at(self.now + patience, give_up)
        if not (it.cut or self.random.random() < 0.05):
            self.at(self.now + self.delay(), arrive)

    def delay(self) -> float:
        """Mostly milliseconds; now and then longer than anybody waits."""
        usual: float = self.random.choice((0.001, 0.01, 0.1))
        return usual * math.pow(1000, self.random.random() ** 8)

    # --- the server

    def serve(self, action: Action) -> Callable[[Candidate, float, float], None]:
        body = getattr(action, "body", None)
        if isinstance(action, Read):
            found = Lease.of(self.body) if self.body else None
            return lambda it, _, now: it.read(found, now)
        assert body is not None
        if isinstance(action, Create):
            if self.body is not None:
                return lambda it, *_: it.refused()
            self.body = body
        else:
            if self.body is None or body["metadata"]["resourceVersion"] != str(self.version):
                return lambda it, *_: it.refused()
            self.body = {
                part: self.body.get(part, {}) | body.get(part, {}) for part in ("metadata", "spec")
            }
        self.version += 1
        self.body["metadata"]["resourceVersion"] = str(self.version)
        now_is = Lease.of(self.body)
        return lambda it, sent, _: it.wrote(now_is, sent)

    # --- what befalls machines

    def trouble(self) -> None:
        """Something happens to one of them, mostly to the one that acts."""
        running = [name for name, it in self.machines.items() if it.up]
        acting = self.acting()
        if running:
            name = (
                acting[0] if acting and self.random.random() < 0.7 else self.random.choice(running)
            )
            it = self.machines[name]
            match self.random.randrange(4):
                case 0:  # killed
                    it.up = False
                    self.at(self.now + self.random.uniform(1, 30), lambda: self.boot(f"{name}'"))
                case 1:  # cut off
                    it.cut = True
                    self.at(
                        self.now + self.random.uniform(1, 40), lambda: setattr(it, "cut", False)
                    )
                case 2:  # paused
                    it.sleeps_until = self.now + self.random.uniform(1, 40)
                case 3:  # leaves
                    it.candidate.leave()
                    self.at(self.now + self.random.uniform(1, 30), lambda: self.boot(f"{name}*"))
        self.at(self.now + self.random.uniform(5, 60), self.trouble)


@given(seed=st.integers(0, 2**32), count=st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_never_two_act_at_once(seed: int, count: int) -> None:
    it = Simulation(random.Random(seed))
    for number in range(count):
        it.at(it.random.uniform(0, 5), lambda name=f"m{number}": it.boot(name))  # type: ignore[misc]
    it.at(20, it.trouble)
    it.run(600)
    assert len(it.epochs) > 1


# --- real processes -------------------------------------------------------------------------------------------

FAIL_OVER_SECONDS = 20.0


@dataclass(slots=True)
class Operator:
    """One of several."""

    name: str
    process: Process
    health: str
    log: Path

    async def asked(self, path: str) -> tuple[int, str]:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(self.health + path)
        return answer.status_code, answer.text

    async def metric(self, name: str) -> float:
        _, text = await self.asked("/metrics")
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.rpartition(" ")[2])

    async def ended(self, seconds: float) -> int:
        """Its exit status."""
        async with asyncio.timeout(seconds):
            while self.process.running:
                await asyncio.sleep(0.02)
        return await self.process.stop()


class Operators:
    """Several operators of one world, with one Lease."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.path = f"/apis/coordination.k8s.io/v1/namespaces/{world.namespace}/leases/operator"

    async def start(self, name: str, **env: str) -> Operator:
        health = f"http://127.0.0.1:{free_port()}"
        process = await self.world.start(
            f"--lease={self.world.namespace}/operator",
            f"--routes-secret={self.world.namespace}/routes",
            env={"POD_ID": name, **env},
            name=name,
            health=health,
        )
        return Operator(name, process, health, self.world.logs / f"{name}.log")

    async def led_by(self, name: str, timeout: float = 30) -> Json:
        """The Lease once that operator has it."""
        return await self.world.api.wait_for_one(
            self.path, lambda it: holder(it).startswith(f"{name}_"), timeout
        )

    async def pair(self, **env: str) -> tuple[Operator, Operator]:
        """One that acts and one that stands by."""
        acting = await self.start("one", **env)
        await self.led_by("one")
        await self.world.one_ready_pod()
        return acting, await self.start("two")

    async def takes_over(self, epoch: int, timeout: float) -> float:
        """The seconds until gateways have routes of a later epoch, and what an agent asks for is done."""
        began, world = time.monotonic(), self.world
        await world.gateway.until(lambda it: it.told[-1]["epoch"] > epoch, timeout)
        took = time.monotonic() - began
        await world.apply({**SPEC, "warm": {**SPEC["warm"], "minPods": 2}})
        await world.pod_count(2)
        return took


def holder(lease: Json) -> str:
    return str(lease["spec"].get("holderIdentity") or "")


@pytest.fixture
async def operators(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[Operators]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield Operators(world)


async def test_one_acts_and_one_stands_by_until_the_first_is_killed(operators: Operators) -> None:
    world = operators.world
    one, two = await operators.pair()
    assert await one.asked("/readyz") == (200, "ready\n")
    status, words = await two.asked("/readyz")
    assert (status, words[:13]) == (200, "standby: one_")
    assert (await two.asked("/healthz"))[0] == 200
    assert await one.metric("trunkline_operator_leader") == 1
    assert await two.metric("trunkline_operator_leader") == 0
    assert world.gateway.links == 1
    # It has asked whether there are agents at all, and reads the Lease; it lists and watches nothing.
    asked = re.findall(r'api_requests_total{resource="(\S+?)"', (await two.asked("/metrics"))[1])
    assert set(asked) == {"v1alpha1", "leases"}
    epoch = world.gateway.told[-1]["epoch"]
    lease = await operators.led_by("one")
    assert lease["metadata"]["annotations"][ANNOTATION_EPOCH] == str(epoch)

    one.process.kill()
    took = await operators.takes_over(epoch, FAIL_OVER_SECONDS)
    assert took > LEASE_SECONDS - DEADLINE_SECONDS
    print(f"killed: another acted after {took:.1f} s")
    lease = await operators.led_by("two")
    assert lease["spec"]["leaseTransitions"] == 1
    assert await two.metric("trunkline_operator_leader") == 1
    assert await two.asked("/readyz") == (200, "ready\n")


async def test_an_operator_that_is_told_to_stop_hands_over_at_once(operators: Operators) -> None:
    world = operators.world
    one, _ = await operators.pair()
    three = await operators.start("three")
    assert await three.process.stop() == 0  # nobody minds
    assert holder(await operators.led_by("one")).startswith("one_")
    epoch, lease = world.gateway.told[-1]["epoch"], await operators.led_by("one")
    stopping = asyncio.create_task(one.process.stop())
    took = await operators.takes_over(epoch, 6)
    print(f"stopped: another acted after {took:.1f} s")
    assert await stopping == 0
    after = await operators.led_by("two")
    # Given back, then taken: its holder wrote once more than it needed to.
    assert after["spec"]["leaseTransitions"] == lease["spec"]["leaseTransitions"] + 1
    assert '"WARNING"' not in one.log.read_text() + three.log.read_text()


async def test_an_operator_that_is_stopped_while_it_starts_gives_the_lease_back(
    operators: Operators,
) -> None:
    world = operators.world
    # An agent that cannot be looked at is waited for.
    await world.apply()
    await world.secret(f"{NAME}-trunkline", another="entry")
    starting = asyncio.create_task(operators.start("one"))
    await operators.led_by("one")
    process = world.processes[-1]
    assert await process.stop() == 0
    with pytest.raises(ProcessFailed, match="ended before it was ready"):
        await starting
    lease = await world.api.get(operators.path)
    assert holder(lease) == ""


async def test_a_lease_whose_writing_was_cut_short_is_given_back(
    api: Api, namespace: str, tmp_path: Path
) -> None:
    """The API server has made it, and the operator was told to stop before it heard of that."""
    made = asyncio.Event()

    async def keep_from_the_operator(request: Request, _: int) -> bool:
        if request.writes:
            made.set()
            await asyncio.get_running_loop().create_future()
        return False

    async with ApiRelay(api).serving() as relay:
        relay.after = keep_from_the_operator
        env = {"KUBECONFIG": str(relay.kubeconfig(tmp_path))}
        async with await Cluster.connect(env) as cluster:
            tenure = Tenure(cluster, namespace, "lease", Candidate("one", "lease", lambda: 0.5))
            winning = asyncio.create_task(tenure.won(lambda _: None))
            await made.wait()
            winning.cancel()
            await asyncio.wait([winning])
            relay.after = let_be
            assert holder(await api.get(path("Lease", namespace, "lease"))) == "one"
            await tenure.leave()
            assert holder(await api.get(path("Lease", namespace, "lease"))) == ""


async def test_an_operator_that_is_cut_off_ends_before_another_begins(operators: Operators) -> None:
    world = operators.world
    async with Relay.of(world.env["KUBECONFIG"]) as relay:
        kubeconfig = relay.kubeconfig(world.logs)
        one, _ = await operators.pair(KUBECONFIG=str(kubeconfig))
        epoch = world.gateway.told[-1]["epoch"]
        relay.cut()
        await world.apply({**SPEC, "warm": {**SPEC["warm"], "minPods": 2}})
        assert await one.ended(DEADLINE_SECONDS + 2) == LOST_STATUS
        ended = time.time()
        assert "could not be renewed for 10 s" in one.log.read_text()
        lease = await operators.led_by("two", FAIL_OVER_SECONDS)
        assert lease["spec"]["acquireTime"] > rfc3339(ended)
        await operators.takes_over(epoch, 10)
        await world.agent(told_of_two_pods)
        await world.api.wait_for_one(  # a second after the gateways are told
            f"{world.secrets}/routes", lambda it: routes_in(it) == world.gateway.told[-1]
        )
        before = await versions(world)
        relay.heal()
        await relay.emptied()  # the API server has answered all of it
        assert relay.delivered
        assert await versions(world) == before
        assert holder(await operators.led_by("two")).startswith("two_")


async def test_an_operator_that_was_paused_too_long_ends_when_it_wakes(
    operators: Operators,
) -> None:
    world = operators.world
    one, _ = await operators.pair()
    epoch = world.gateway.told[-1]["epoch"]
    os.kill(one.process.pid, signal.SIGSTOP)
    try:
        await operators.takes_over(epoch, FAIL_OVER_SECONDS)
        steps = one.log.read_text()
    finally:
        os.kill(one.process.pid, signal.SIGCONT)
    assert await one.ended(5) == LOST_STATUS
    woken = one.log.read_text().removeprefix(steps)
    assert "this operator ends" in woken
    assert "trunkline.reconcile" not in woken
    assert [told["epoch"] for told in world.gateway.told] == sorted(
        told["epoch"] for told in world.gateway.told
    )
    assert holder(await operators.led_by("two")).startswith("two_")


async def versions(world: World) -> dict[str, str]:
    """Of all that an operator writes, but for the Lease."""
    where = world.pods, world.secrets, world.agents
    found = [it for path in where for it in await world.api.list(path)]
    return {it["metadata"]["name"]: it["metadata"]["resourceVersion"] for it in found}


def routes_in(secret: Json) -> Json:
    kept: Json = json.loads(base64.b64decode(secret["data"]["routes.json"]))
    return kept


def told_of_two_pods(agent: Json) -> bool:
    """The last that an operator has to say of it."""
    status = agent["status"]
    made: bool = sum(status["pods"].values()) == 2
    return made and status["observedGeneration"] == agent["metadata"]["generation"]


def rfc3339(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


class Relay:
    """A way to the API server that can be cut: then nothing passes, and no connection is told so."""

    def __init__(self, config: Json) -> None:
        self._config = config
        host, _, port = (
            config["clusters"][0]["cluster"]["server"].rpartition("//")[2].partition(":")
        )
        self._target = host, int(port)
        self._open = asyncio.Event()
        self._open.set()
        self._connections: set[asyncio.Task[Any]] = set()
        self.delivered = False  # something that was held up while it was cut
        self.port = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, kubeconfig: str) -> AsyncIterator["Relay"]:
        relay = cls(yaml.safe_load(Path(kubeconfig).read_text()))
        async with await asyncio.start_server(relay._connect, "127.0.0.1", 0) as server:
            relay.port = server.sockets[0].getsockname()[1]
            yield relay

    def kubeconfig(self, folder: Path) -> Path:
        cluster = self._config["clusters"][0]["cluster"]
        cluster["server"] = f"https://127.0.0.1:{self.port}"
        file = folder / "relayed"
        file.write_text(yaml.safe_dump(self._config))
        return file

    def cut(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    async def emptied(self) -> None:
        """Once whoever used it is gone, until all that it had sent has come to an end."""
        async with asyncio.timeout(20):
            await asyncio.gather(*self._connections)

    async def _connect(self, near: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        with contextlib.closing(to):
            far, on = await asyncio.open_connection(*self._target)
            await asyncio.gather(self._carry(near, on), self._carry(far, to))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(sink):
            while data := await source.read(65536):
                if not self._open.is_set():
                    await self._open.wait()
                    self.delivered = True
                sink.write(data)
                await sink.drain()
