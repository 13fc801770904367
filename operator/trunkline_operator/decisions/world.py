"""What the operator sees of one agent: its pods, what gateways say of their workers, and its Modal app.

Raw observations come in, frozen facts go out. Whatever is not known is said to be unknown, and every
reader of these facts takes unknown for busy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Self

from trunkline_operator.agent.spec import Json, epoch
from trunkline_operator.burst.breaker import Breaker
from trunkline_operator.burst.limit import Limit, recalled
from trunkline_operator.burst.standby import Standing
from trunkline_operator.decisions.nodes import NodeFacts
from trunkline_operator.scaling.spend import Account, Terms
from trunkline_runtime.contract import (
    ANNOTATION_CA,
    ANNOTATION_DRAINING,
    ANNOTATION_TEMPLATE,
    GROUP,
    KIND,
)

CONTAINER: Final = "worker"
"""The pod's container that is the worker."""

SAFE_TO_EVICT: Final = "cluster-autoscaler.kubernetes.io/safe-to-evict"
DO_NOT_DISRUPT: Final = "karpenter.sh/do-not-disrupt"
"""Annotations by which a pod tells the cluster autoscaler and Karpenter whether they may evict it."""


class Phase(StrEnum):
    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


# A pod that has waited for a node for longer says nothing about how long the next one takes.
LONGEST_START_SECONDS: Final = 3600.0

# Of a container's last words, which may be many lines of its log: what a person reads, the end first of all.
LONGEST_WORDS: Final = 400

# Why a container waits, where waiting is no trouble.
ORDINARY_WAITS: Final = frozenset({"", "ContainerCreating", "PodInitializing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """One pod of the agent."""

    name: str
    uid: str
    owner: str  # uid of the agent that controls it
    phase: Phase
    ready: bool = False
    started: bool = False  # its worker runs and has been ready once; so it may hold calls
    terminating: bool = False
    draining_since: float | None = None
    protected: bool = False  # it tells autoscalers of nodes not to evict it
    template: str = ""
    ca: str = ""  # the CA of its links; "" = plain
    unschedulable: str = ""  # the scheduler's words
    mounting: float | None = None  # since when it is on a node and no container of it has begun
    unmounted: str = ""  # the kubelet's words, where that is for a volume
    trouble: str = ""  # the kubelet's words: image pull, crash loop, wrong configuration
    unready: str = (
        ""  # its worker runs and was ready before: since when it is not, and the kubelet's words
    )
    restarts: int = 0
    created: float = 0.0  # seconds since the epoch
    start_seconds: float | None = None  # from its creation until it was ready, where that is known
    node: str = ""  # where it runs
    node_leaving: str = ""  # why that node's pods must go; "" = they need not, as far as is known
    node_lost: bool = False  # that node is not ready

    @property
    def ordinal(self) -> int:
        """The number behind the last dash; -1 for a name that is not one of ours."""
        ordinal = self.name.rpartition("-")[2]
        return int(ordinal) if ordinal.isdecimal() else -1

    @property
    def finished(self) -> bool:
        """Its containers ended and stay ended."""
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def draining(self) -> bool:
        return self.draining_since is not None

    @property
    def active(self) -> bool:
        """Counts as capacity, now or soon."""
        return not (self.terminating or self.finished or self.draining or self.node_lost)

    def on(self, node: NodeFacts) -> "PodFacts":
        """The pod, with what is known of its node."""
        return replace(self, node_leaving=node.leaving, node_lost=node.lost)

    @classmethod
    def of(cls, pod: Mapping[str, Any]) -> Self:
        metadata, status = pod["metadata"], pod.get("status") or {}
        annotations = metadata.get("annotations") or {}
        owners = metadata.get("ownerReferences") or ()
        conditions = {c["type"]: c for c in status.get("conditions") or ()}
        scheduled = conditions.get("PodScheduled", {})
        containers = status.get("containerStatuses") or ()
        worker: Json = next((c for c in containers if c["name"] == CONTAINER), {})
        state = worker.get("state") or {}
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            owner=next((o["uid"] for o in owners if _controls(o)), ""),
            phase=Phase(status.get("phase", Phase.PENDING)),
            ready=conditions.get("Ready", {}).get("status") == "True",
            # Without word of `started`, a container that runs is taken for one that may hold calls.
            started="running" in state and worker.get("started") is not False,
            terminating="deletionTimestamp" in metadata,
            draining_since=_moment(annotations.get(ANNOTATION_DRAINING)),
            protected=(annotations.get(SAFE_TO_EVICT), annotations.get(DO_NOT_DISRUPT))
            == ("false", "true"),
            template=annotations.get(ANNOTATION_TEMPLATE, ""),
            ca=annotations.get(ANNOTATION_CA, ""),
            unschedulable=scheduled.get("message", "")
            if scheduled.get("status") == "False"
            else "",
            mounting=_mounting(state, status, scheduled),
            trouble=_trouble(worker, status),
            unready=_unready(state, conditions.get("Ready", {})),
            restarts=worker.get("restartCount", 0),
            created=epoch(metadata.get("creationTimestamp")) or 0.0,
            start_seconds=_start_seconds(metadata, conditions.get("Ready", {}), worker),
            node=(pod.get("spec") or {}).get("nodeName", ""),
        )


def _start_seconds(metadata: Json, ready: Json, worker: Json) -> float | None:
    """How long a pod took to become ready. A restart or a probe that failed once would say too much."""
    created, since = metadata.get("creationTimestamp"), ready.get("lastTransitionTime")
    if ready.get("status") != "True" or worker.get("restartCount") or not (created and since):
        return None
    took = (epoch(since) or 0.0) - (epoch(created) or 0.0)
    return took if 0 <= took <= LONGEST_START_SECONDS else None


def _controls(owner: Mapping[str, Any]) -> bool:
    """Whether an owner reference is of an agent. Others may use our labels for pods of theirs."""
    group = owner["apiVersion"].partition("/")[0]
    return (group, owner["kind"]) == (GROUP, KIND) and bool(owner.get("controller"))


def _moment(stamp: str | None) -> float | None:
    """The time of a drain; a text that is no time was not written by the operator and counts for nothing."""
    try:
        return epoch(stamp)
    except ValueError:
        return None


def _mounting(state: Json, status: Json, scheduled: Json) -> float | None:
    """Since when a kubelet makes ready what a pod needs before its first container."""
    begun = state.keys() - {"waiting"} or status.get("phase", Phase.PENDING) != Phase.PENDING
    wait = (state.get("waiting") or {}).get("reason", "")
    if begun or scheduled.get("status") != "True" or wait not in ORDINARY_WAITS:
        return None
    return epoch(scheduled.get("lastTransitionTime")) or 0.0


def _trouble(worker: Json, status: Json) -> str:
    """Why the worker's container does not run, in the kubelet's words and its own last ones, or ""."""
    state = worker.get("state") or {}
    before = (worker.get("lastState") or {}).get("terminated")
    waiting = state.get("waiting") or {}
    if waiting.get("reason", "") not in ORDINARY_WAITS:
        words = _sentence(waiting["reason"], waiting.get("message", ""))
        return f"{words}; it ended with {_ended(before)}" if before else words
    if terminated := state.get("terminated"):
        return _ended(terminated)
    if status.get("phase") == Phase.FAILED:
        return _sentence(status.get("reason", "Failed"), status.get("message", ""))
    # Between two crashes it runs for a moment, which is no end of the trouble.
    if before and worker.get("ready") is not True:
        return f"it was restarted; before, it ended with {_ended(before)}"
    return ""


def _ended(terminated: Json) -> str:
    """How a container ended. Its message is the end of its log where it wrote no other."""
    reason, code = terminated.get("reason", "Terminated"), terminated.get("exitCode")
    told = reason if code is None else f"{reason} (exit code {code})"
    return _sentence(told, terminated.get("message", ""))


def _unready(state: Json, ready: Json) -> str:
    """Since when a worker that runs and was ready is not; "" if it is, or never was."""
    began, since = (state.get("running") or {}).get("startedAt"), ready.get("lastTransitionTime")
    if ready.get("status") != "False" or not (began and since):
        return ""
    # The pod's condition is False from its creation on, before the container runs.
    if (epoch(since) or 0.0) <= (epoch(began) or 0.0):
        return ""
    return f"not ready since {since}: {ready.get('message') or 'its readiness probe fails'}"


def _sentence(reason: str, message: str) -> str:
    """In one line; of long words the end, where a program says why it gives up."""
    line = " ".join(message.split())
    if len(line) > LONGEST_WORDS:
        line = "…" + line[1 - LONGEST_WORDS :]
    return f"{reason}: {line}" if line else reason


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """One worker, as it last spoke of itself. Its name is its pod's."""

    slots: int
    busy: int
    draining: bool

    @property
    def drained(self) -> bool:
        """The worker itself takes no call and has none."""
        return self.draining and self.busy == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One agent's calls, of all gateways together."""

    known: bool = False  # a gateway reports, and none that should is silent
    silent: bool = False  # no gateway reports, and that for a while
    acknowledged: bool = False  # every gateway acts on the agent's latest route
    workers: Mapping[str, WorkerFacts] = field(default_factory=dict)  # a missing one is unknown
    burst: int = 0  # calls on burst, sessions being started included
    arrivals: int = 0  # total
    refused: int = 0  # total
    waiting: int = 0  # callers in line for a slot
    burst_error: str = ""  # the gateways' last failure to reach burst, "" after a success
    shut: Mapping[str, str] = field(default_factory=dict)
    """Regions of burst that gateways pass over for a while, and why."""

    @property
    def busy(self) -> int:
        """Slots of warm workers that are reserved or live."""
        return sum(worker.busy for worker in self.workers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Billed:
    """What Modal bills for a whole day of UTC, and what was reckoned for it, in dollars."""

    day: float  # its beginning, in seconds since the epoch
    dollars: float
    reckoned: float
    at: float  # when Modal said so

    @classmethod
    def of(cls, told: Json) -> Self | None:
        """What an earlier operator wrote into the status; None if there is nothing."""
        at = epoch(told.get("at"))
        day = epoch(f"{told['day']}T00:00:00Z") if "day" in told else None
        if day is None or at is None:
            return None
        return cls(day=day, dollars=told["usd"], reckoned=told["reckonedUsd"], at=at)


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstFacts:
    """The agent's Modal app, as far as the operator knows."""

    app: str = ""  # the deployed app's name; "" = none that we know of
    app_id: str = ""
    # Region → where sessions are started, in the order of the regions; each is known once its first
    # container has answered.
    urls: Mapping[str, str] = field(default_factory=dict)
    hash: str = ""  # what was deployed (`manifests.burst_hash`)
    snapshot: str = ""  # what its containers are restored from
    working: bool = False  # a deployment or a stop is under way
    stopped: bool = False  # Modal confirmed that no app is left
    failures: int = 0  # in a row
    failed_at: float = 0.0
    failed_hash: str = ""  # what the last failure was about; "" = the stop
    message: str = ""  # the last failure in words
    credentials: str = ""  # "" = present; else the sentence that says what is missing
    breaker: Breaker | None = None  # what containers start from; None = what is asked for
    watched: float = 0.0  # when Modal was last asked how they start
    first_boot: float = 0.0  # seconds until the slowest region's first session; 0 = unknown
    standing: Standing = field(default_factory=Standing)  # the containers that stand by
    unscaled_at: float = 0.0  # when Modal last refused another number of them; 0 = it did not
    limit: Limit | None = None  # of its workspace; None = Modal has refused nothing lately
    refused: bool = False  # a gateway was refused for a limit since the last count
    # Containers by region at the last count, those included that have gone since the one before.
    running: Mapping[str, int] = field(default_factory=dict)
    counted_at: float = 0.0  # when that was; 0 = never
    capped: bool = False  # the budget is spent: none stands by
    account: Account | None = None  # what it costs; None = no price is known, or there is no burst
    terms: Terms | None = None
    unpriced: str = ""  # why no price is known
    billed: Billed | None = None  # None = Modal has told nothing

    @property
    def containers(self) -> int:
        """At the last count, of all regions."""
        return sum(self.running.values())

    @property
    def least(self) -> int:
        """Containers that stand by without any call."""
        return sum(each.minimum for each in (self.standing.scalings or {}).values())

    @property
    def url(self) -> str:
        """That of the first region which has one."""
        return next(iter(self.urls.values()), "")

    @classmethod
    def of(cls, status: Json) -> Self:
        """What an earlier operator wrote into the agent's status."""
        burst = status.get("burst") or {}
        return cls(
            app=burst.get("app", ""),
            app_id=burst.get("appId", ""),
            urls={one["name"]: one["url"] for one in burst.get("regions") or ()},
            hash=burst.get("hash", ""),
            snapshot=burst.get("snapshot", ""),
            first_boot=burst.get("firstBootSeconds", 0.0),
            limit=recalled(burst.get("limit") or {}),
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the API lets no pod be made, in its own words."""

    words: str
    template: bool = False  # it would take no such pod, or what the template names is not there


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that is observed of one agent at one moment."""

    pods: tuple[PodFacts, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)
    secret_exists: bool = False  # the agent's own, `<agent>-trunkline`
    certificate: str = ""  # "" = its workers' is good; else the words why another must be issued
    burst: BurstFacts = field(default_factory=BurstFacts)
    access: str = ""  # "" = callers' keys were read; else the sentence that says what is missing
    tokens: str = ""  # "" = the tokens that the engine is to have were read; else likewise
