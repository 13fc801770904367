"""The steps: all rules together, by a random world that must come to rest."""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from worlds import BURST, DEADLINE, DEPLOYED, INSTALLATION, NOW, a_pod, an_agent

from trunkline_operator.agent.spec import VoiceAgent, epoch
from trunkline_operator.burst.standby import Standing
from trunkline_operator.decisions.manifests import Installation
from trunkline_operator.decisions.plan import Plan, planned, rfc3339
from trunkline_operator.decisions.routes import Keys, route
from trunkline_operator.decisions.steps import (
    AddFinalizer,
    AllowEviction,
    CreatePod,
    DeletePod,
    DeployBurst,
    Drain,
    EnsureSecret,
    ForbidEviction,
    RemoveFinalizer,
    Requeue,
    ScaleBurst,
    Step,
    StopBurst,
    Undrain,
)
from trunkline_operator.decisions.world import (
    BurstFacts,
    Phase,
    PodFacts,
    Traffic,
    WorkerFacts,
    World,
)
from trunkline_operator.scaling.decision import Memory
from trunkline_runtime.contract import ANNOTATION_CA, FINALIZER

KEYS = Keys(worker="w", ticket="t")


@dataclass
class SimPod:
    """A pod, its kubelet and its worker, as they truly are."""

    uid: str
    template: str
    slots: int
    phase: Phase = Phase.PENDING
    ready: bool = False
    started: bool = False
    terminating: bool = False
    draining_since: float | None = None
    told_to_drain: bool = False  # the worker's own mind
    calls: int = 0
    silent: bool = False  # no gateway has word of it
    ca: str = ""  # with which it was made
    protected: bool = True

    @property
    def takes_calls(self) -> bool:
        return self.ready and not (self.told_to_drain or self.terminating)

    def facts(self, name: str, owner: str) -> PodFacts:
        return PodFacts(
            name=name,
            uid=self.uid,
            owner=owner,
            phase=self.phase,
            ready=self.ready and not self.told_to_drain,
            started=self.started,
            terminating=self.terminating,
            draining_since=self.draining_since,
            template=self.template,
            ca=self.ca,
            protected=self.protected,
        )


Route = tuple[bool, tuple[str, ...]]
"""Whether there is a burst rung, and the drain list."""


class Cluster(RuleBasedStateMachine):
    """Anything happens between two looks; when it stops happening, the declared state is reached."""

    @initialize()
    def begin(self) -> None:
        self.spec: dict[str, Any] = {"minPods": 1, "maxPods": 3, "slotsPerPod": 2, "image": "one"}
        self.spec["scaleDown"] = {"delaySeconds": 30}
        self.finalizers: list[str] = []
        self.deleted_at: float | None = None
        self.gone = False
        self.pods: dict[str, SimPod] = {}
        self.burst_on = False
        self.burst = BurstFacts()
        self.burst_calls = 0
        self.refused = 0
        self.secret = False
        self.linked = True
        self.now = NOW
        self.memory = Memory()
        self.ca = ""
        self.made = 0
        self.route: Route = (False, ())
        self.heard: Route = (False, ())

    # What happens.

    @rule()
    def look(self) -> None:
        for step in self.planned().steps:
            self.take(step)

    @rule(seconds=st.sampled_from([1, 20, 100, 1000]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def gateways_hear(self) -> None:
        """Gateways act on the last route, and tell workers."""
        if self.linked:
            self.heard = self.route
        for name, pod in self.reachable.items():
            pod.told_to_drain = name in self.heard[1]

    @rule(count=st.integers(1, 5))
    def calls_arrive(self, count: int) -> None:
        for _ in range(count):
            there = [pod for pod in self.reachable.values() if pod.takes_calls]
            room = [pod for pod in there if pod.calls < pod.slots]
            if room:
                max(room, key=lambda pod: pod.calls).calls += 1
            elif self.heard[0]:
                self.burst_calls += 1
            else:
                self.refused += 1

    @rule(data=st.data())
    def calls_end(self, data: st.DataObject) -> None:
        for pod in self.pods.values():
            pod.calls = data.draw(st.integers(0, pod.calls))
        self.burst_calls = data.draw(st.integers(0, self.burst_calls))

    @rule()
    def kubelets_work(self) -> None:
        """Pending pods start, unready ones become ready, terminating ones without calls are gone."""
        for name, pod in list(self.pods.items()):
            if pod.terminating and not pod.calls:
                del self.pods[name]
            elif pod.phase is Phase.PENDING:
                pod.phase = Phase.RUNNING
            elif pod.phase is Phase.RUNNING:
                pod.started = pod.ready = True

    @precondition(lambda self: self.pods)
    @rule(data=st.data(), what=st.sampled_from(["dies", "evicted", "crashes", "unready", "silent"]))
    def pod_suffers(self, data: st.DataObject, what: str) -> None:
        pod = self.pods[data.draw(st.sampled_from(sorted(self.pods)))]
        if what in ("dies", "crashes"):
            pod.calls = 0
            pod.started = pod.ready = False
        if what == "dies":
            pod.phase = Phase.FAILED
        pod.terminating |= what == "evicted"
        pod.ready &= what != "unready"
        pod.silent = what == "silent"

    @precondition(lambda self: self.pods)
    @rule(data=st.data())
    def pod_vanishes(self, data: st.DataObject) -> None:
        del self.pods[data.draw(st.sampled_from(sorted(self.pods)))]

    @rule(linked=st.booleans())
    def gateways(self, linked: bool) -> None:
        self.linked = linked

    @rule(low=st.integers(0, 4), more=st.integers(1, 3), slots=st.integers(1, 3))
    def edit_size(self, low: int, more: int, slots: int) -> None:
        self.spec |= {"minPods": low, "maxPods": low + more, "slotsPerPod": slots}

    @rule(image=st.sampled_from(["one", "two"]))
    def edit_image(self, image: str) -> None:
        self.spec["image"] = image

    @rule(ca=st.sampled_from(["", "", "one", "two"]))
    def replace_ca(self, ca: str) -> None:
        """Operator and gateways have it; pods keep what they were made with."""
        self.ca = ca

    @rule(on=st.booleans())
    def edit_burst(self, on: bool) -> None:
        self.burst_on = on

    @precondition(lambda self: self.deleted_at is None)
    @rule(surely=st.sampled_from([False, False, False, True]))
    def delete_agent(self, surely: bool) -> None:
        if surely:
            self.deleted_at = self.now
            self.gone_if_nothing_keeps_it()

    def gone_if_nothing_keeps_it(self) -> None:
        """Then its pods are told to end, as `Actor.bury` does: their workers let calls end."""
        self.gone = not self.finalizers
        for pod in self.pods.values():
            pod.terminating |= self.gone

    @rule()
    def operator_restarts(self) -> None:
        self.memory = Memory()

    @precondition(lambda self: self.burst.working)
    @rule(fine=st.booleans())
    def modal_answers(self, fine: bool) -> None:
        facts = replace(self.burst, working=False)
        if not fine:
            failures = facts.failures + 1
            self.burst = replace(
                facts, failures=failures, failed_at=self.now, failed_hash=self.work
            )
        elif self.work:
            self.burst = replace(DEPLOYED, hash=self.work)
        else:
            self.burst = BurstFacts(stopped=True)
            assert self.burst_calls == 0 or self.late
            self.burst_calls = 0

    # What the operator sees and does.

    @property
    def agent(self) -> VoiceAgent:
        metadata: dict[str, Any] = {"finalizers": self.finalizers}
        if self.deleted_at is not None:
            metadata["deletionTimestamp"] = rfc3339(self.deleted_at)
        return an_agent(metadata=metadata, warm=self.spec, **(BURST if self.burst_on else {}))

    @property
    def late(self) -> bool:
        return self.deleted_at is not None and self.now >= self.deleted_at + DEADLINE

    @property
    def reachable(self) -> dict[str, SimPod]:
        """Pods whose links to gateways can be made."""
        return {name: pod for name, pod in self.pods.items() if pod.ca == self.ca}

    @property
    def installation(self) -> Installation:
        return replace(INSTALLATION, ca=self.ca, idle_seconds=30)

    def planned(self) -> Plan:
        if self.gone:
            return Plan(steps=(), scaling=None, memory=self.memory, draining=())
        agent = self.agent
        here = self.reachable.items()
        heard = {name: pod for name, pod in here if pod.started and not pod.silent}
        workers = {
            name: WorkerFacts(slots=pod.slots, busy=pod.calls, draining=pod.told_to_drain)
            for name, pod in heard.items()
        }
        world = World(
            pods=tuple(pod.facts(name, agent.uid) for name, pod in self.pods.items()),
            traffic=Traffic(
                known=self.linked,
                acknowledged=self.linked and self.heard == self.route,
                workers=workers if self.linked else {},
                burst=self.burst_calls if self.linked else 0,
                refused=self.refused,
            ),
            secret_exists=self.secret,
            burst=self.burst,
        )
        made = planned(agent, world, self.now, self.memory, self.installation)
        assert made == planned(agent, world, self.now, self.memory, self.installation)
        self.memory = made.memory
        rung = any(rung["kind"] == "burst" for rung in route(agent, KEYS, self.burst.urls)["rungs"])
        self.route = (rung, made.draining)
        return made

    def take(self, step: Step) -> None:
        match step:
            case AddFinalizer():
                self.finalizers = [FINALIZER]
            case RemoveFinalizer():
                assert self.late or not self.pods
                self.finalizers, self.gone = [], True
            case EnsureSecret():
                assert self.finalizers or not self.burst_on
                self.secret = True
            case CreatePod(name, manifest):
                assert name not in self.pods
                assert self.secret
                assert self.deleted_at is None
                self.made += 1
                annotations = manifest["metadata"]["annotations"]
                (template,) = [v for k, v in annotations.items() if k.endswith("/template")]
                made = SimPod(f"uid-{self.made}", template, self.spec["slotsPerPod"])
                made.ca = annotations.get(ANNOTATION_CA, "")
                self.pods[name] = made
                here = [pod for pod in self.pods.values() if pod.facts("x-0", "").active]
                assert len(here) <= self.spec["maxPods"]
            case Drain(name, uid, since):
                assert self.pods[name].uid == uid
                assert self.pods[name].draining_since is None
                self.pods[name].draining_since = epoch(since)
            case Undrain(name, uid):
                assert self.pods[name].uid == uid
                self.pods[name].draining_since = None
            case AllowEviction(name, _):
                assert self.pods[name].calls == 0
                self.pods[name].protected = False
            case ForbidEviction(name, _):
                self.pods[name].protected = True
            case DeletePod(name, uid):
                self.delete(self.pods[name], uid)
            case DeployBurst(_, goal):
                assert self.finalizers
                self.burst, self.work = replace(self.burst, working=True), goal
            case ScaleBurst(_, scalings):
                self.burst = replace(
                    self.burst, standing=Standing(scalings=scalings, since=self.now)
                )
            case StopBurst():
                assert self.burst_calls == 0 or self.late
                self.burst, self.work = replace(self.burst, working=True), ""
            case Requeue(after):
                assert after > 0

    def delete(self, pod: SimPod, uid: str) -> None:
        """Never a pod with calls, but past a deadline that no call outlives."""
        assert pod.uid == uid
        assert not pod.terminating
        outlived = pod.silent or not self.linked or pod.ca != self.ca
        outlived &= pod.draining_since is not None and self.now >= pod.draining_since + DEADLINE
        assert not pod.calls or outlived or self.late
        pod.terminating = True
        if pod.phase is Phase.FAILED or outlived or self.late:
            pod.calls = 0  # none lasts so long in truth

    @invariant()
    def one_pod_a_name(self) -> None:
        uids = [pod.uid for pod in self.pods.values()]
        assert len(uids) == len(set(uids))

    # The end: nothing more happens but what must.

    def calm(self, looks: int = 60) -> None:
        """Everybody does their part until there is nothing to do."""
        self.linked = True
        for pod in self.pods.values():
            pod.silent = False
        quiet = 0
        for _ in range(looks):
            before = repr(self.pods)
            taken = self.planned().steps
            for step in taken:
                self.take(step)
            acts = [step for step in taken if not isinstance(step, Requeue)]
            self.gateways_hear()
            if self.burst.working:
                self.modal_answers(fine=True)
            self.kubelets_work()
            waits = [step.after for step in taken if isinstance(step, Requeue)]
            self.now += waits[0] if waits else 1
            quiet = quiet + 1 if not acts and before == repr(self.pods) else 0
            if quiet == 4 or self.gone:
                return
        raise AssertionError(f"no rest after {looks} looks: {taken} {self.pods}")

    def teardown(self) -> None:
        if not hasattr(self, "pods"):
            return
        if self.deleted_at is None:
            self.calm_with_calls()
            self.calls_gone()
            self.deleted_at = self.now
            self.gone_if_nothing_keeps_it()
        self.deletion()

    def calm_with_calls(self) -> None:
        """Calls that talk on are never ended, whatever is declared; of a pod of another CA, till the deadline."""
        # By itself hardly any example ends with a call: one comes to each pod that is there when all is quiet.
        self.calm()
        for pod in self.reachable.values():
            pod.calls += pod.takes_calls and pod.calls < pod.slots
        talking = {pod.uid: pod.calls for pod in self.reachable.values() if pod.calls}
        self.now += 100
        self.calm()
        assert talking == {pod.uid: pod.calls for pod in self.pods.values() if pod.calls}
        assert all(pod.protected for pod in self.pods.values() if pod.calls)

    def calls_gone(self) -> None:
        """Without calls, exactly the declared pods are there, all of the declared template."""
        for pod in self.pods.values():
            pod.calls = 0
        self.burst_calls = 0
        self.calm()
        plan = self.planned()
        assert plan.scaling is not None
        assert plan.steps == ()
        assert len(self.pods) == plan.scaling.pods == max(self.spec["minPods"], 1)
        assert not any(pod.draining_since or pod.terminating for pod in self.pods.values())
        assert self.reachable == self.pods
        (template,) = {pod.template for pod in self.pods.values()}
        assert template == a_pod(self.agent, 0).template
        assert bool(self.burst.app) == self.burst_on

    def deletion(self) -> None:
        """Calls or not, it ends by its deadline, and leaves nothing."""
        self.calm()
        if not self.gone:  # calls talk on at Modal
            assert self.burst_calls
            self.now += DEADLINE
            self.calm()
        assert self.gone
        for (
            pod
        ) in self.pods.values():  # going, and past the deadline: its kubelet ends what is left
            pod.calls = 0
        for _ in self.pods.copy():
            self.kubelets_work()
        assert self.pods == {}
        assert self.burst.app == ""


Cluster.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCluster = Cluster.TestCase
