"""One look at an agent: observe, plan, act, route, report. The same whatever made it look.

Nothing is remembered that a restart could not do without: the pods, the Secret and the status are in the
cluster, the load comes from the gateways. A step that the API refuses (a quota, a name that is taken) does
not keep the others from being taken, nor the agent from being routed and its status from being told.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from trunkline_operator import metrics
from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.policy import allowed_burst
from trunkline_operator.agent.spec import Json, SpecError, VoiceAgent
from trunkline_operator.burst.breaker import LEVELS, Breaker, following, probed, recovered
from trunkline_operator.burst.deployments import Deployments, described
from trunkline_operator.cluster.authority import Authority, new_certificate, why_issue
from trunkline_operator.cluster.client import ApiError, Cluster, path
from trunkline_operator.cluster.credentials import (
    HOOK_TOKEN,
    account_of,
    caller_keys_missing,
    credentials_missing,
    hook_secret,
    proxy_token,
)
from trunkline_operator.cluster.herald import Herald
from trunkline_operator.decisions import events
from trunkline_operator.decisions.manifests import (
    TICKET_KEY,
    WORKER_KEY,
    Installation,
    burst_hash,
    encoded,
    secret,
    secret_name,
    secret_strings,
)
from trunkline_operator.decisions.plan import Plan, planned
from trunkline_operator.decisions.routes import Keys, route
from trunkline_operator.decisions.status import only_numbers_differ, rejected, reported
from trunkline_operator.decisions.steps import (
    AddFinalizer,
    CreatePod,
    DeletePod,
    DeployBurst,
    Drain,
    EnsureSecret,
    IssueCertificate,
    RemoveFinalizer,
    Requeue,
    Step,
    StopBurst,
    Undrain,
    WatchBurst,
)
from trunkline_operator.decisions.world import BurstFacts, PodFacts, Traffic, WorkerFacts, World
from trunkline_operator.fleet import Fleet
from trunkline_operator.scaling.decision import Memory
from trunkline_runtime.contract import ANNOTATION_DRAINING, FINALIZER, LABEL_AGENT

KEY_BYTES: Final = 32
# Secrets are not watched, so that nobody needs the right to read them all.
MISSING_SECRET_SECONDS: Final = 5.0
# An agent that a new operator lets go before it watches is gone without an event, and has a route until then.
GONE_SECONDS: Final = 0.5
NEVER: Final = float("-inf")

log = logging.getLogger("trunkline.reconcile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the looks at all agents share."""

    installation: Installation
    default_namespace: str
    status_seconds: float
    resync_seconds: float
    authority: Authority | None = None  # None: plain links


@dataclass(slots=True, kw_only=True)
class _Notes:
    """What one look leaves for the next; a new operator does without."""

    uid: str
    memory: Memory = field(default_factory=Memory)
    keys: Keys | None = None  # the last that were read
    told_at: float = NEVER  # when the status was written
    news: events.Memory = field(default_factory=events.Memory)  # what was told of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """An agent, and all that was observed of it at one moment."""

    obj: Json
    agent: VoiceAgent
    world: World
    keys: Keys
    now: float

    @property
    def path(self) -> str:
        return path("VoiceAgent", self.agent.namespace, self.agent.name)


@dataclass(slots=True, kw_only=True)
class _Acts:
    """What became of a plan's steps."""

    taken: list[Step] = field(default_factory=list)
    made: list[PodFacts] = field(default_factory=list)
    failures: list[ApiError] = field(default_factory=list)
    refused: str = ""  # the API's words where they keep a pod from being made

    def after(self, world: World) -> World:
        """The world with the pods that were just made and deleted, so that a status needs no correction."""
        deleted = {step.uid for step in self.taken if isinstance(step, DeletePod)}
        here = [
            replace(pod, terminating=pod.terminating or pod.uid in deleted)
            for pod in world.pods
            if pod.started or pod.uid not in deleted  # one without a worker is gone at once
        ]
        return replace(world, pods=(*here, *self.made))


class Reconciler:
    """Looks at agents, for an `Agenda`."""

    def __init__(
        self,
        cluster: Cluster,
        fleet: Fleet,
        deployments: Deployments,
        herald: Herald,
        settings: Settings,
    ) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._deployments = deployments
        self._herald = herald
        self._settings = settings
        self._notes: dict[str, _Notes] = {}

    async def look(self, key: str) -> float | None:
        """One look; the seconds until the next, or None for an agent that is gone.

        Raises the first `ApiError` that kept a step from being taken.
        """
        began, outcome = time.monotonic(), "failed"
        try:
            after, outcome = await self._look(key)
            return after
        finally:
            metrics.LOOKS.labels(outcome).observe(time.monotonic() - began)

    async def _look(self, key: str) -> tuple[float | None, str]:
        namespace, _, name = key.partition("/")
        obj = await self._cluster.find(path("VoiceAgent", namespace, name))
        if obj is None:
            self._forget(key)
            return None, "gone"
        notes = self._notes_of(key, obj["metadata"]["uid"])
        now = time.time()
        try:
            agent = parsed(obj)
        except SpecError as error:
            # Its pods and its route stay as they are: a wrong edit ends no call.
            status = rejected(obj, error, now)
            self._announce(notes, obj, events.of_status(obj.get("status") or {}, status), now)
            await self._tell(notes, obj, status)
            return self._settings.resync_seconds, "refused"
        seen = await self._observe(obj, agent, now)
        plan = planned(agent, seen.world, now, notes.memory, self._settings.installation)
        notes.memory = plan.memory
        acts = await self._act(seen, plan)
        try:
            await self._route(notes, seen, plan)
        except ApiError as error:
            acts.failures.append(error)
        status = reported(
            agent, acts.after(seen.world), plan, obj.get("status") or {}, now, acts.refused
        )
        metrics.count_pods(namespace, name, status.get("pods") or {})
        self._announce_look(notes, seen, plan, acts, status)
        let_go = any(isinstance(step, RemoveFinalizer) for step in plan.steps)
        # Who is let go is gone by now, or waits for somebody else and is told about at the next look.
        wait = [] if let_go else await self._tell(notes, obj, status)
        if acts.failures:
            raise acts.failures[0]
        waits = [step.after for step in plan.steps if isinstance(step, Requeue)]
        if seen.world.access or (hook_secret(agent) and not seen.keys.hook_token):
            waits.append(MISSING_SECRET_SECONDS)
        if let_go:
            waits.append(GONE_SECONDS)
        return min([self._settings.resync_seconds, *waits, *wait]), "done"

    def _notes_of(self, key: str, uid: str) -> _Notes:
        notes = self._notes.get(key)
        if notes and notes.uid != uid:  # deleted, and made anew before anybody looked
            self._forget(key)
        return self._notes.setdefault(key, _Notes(uid=uid))

    def _forget(self, key: str) -> None:
        self._notes.pop(key, None)
        self._fleet.forget(key)
        self._deployments.forget(key)
        metrics.forget_pods(*key.split("/", 1))

    # --- observe ------------------------------------------------------------------------------------

    async def _observe(self, obj: Json, agent: VoiceAgent, now: float) -> _Seen:
        modal = agent.burst
        pods, own, callers, account, hook = await asyncio.gather(
            self._cluster.list(path("Pod", agent.namespace), {LABEL_AGENT: agent.name}),
            self._secret(agent.namespace, secret_name(agent)),
            self._secret(agent.namespace, agent.access.api_keys_secret),
            self._secret(agent.namespace, modal.credentials_secret if modal else ""),
            self._secret(agent.namespace, hook_secret(agent)),
        )
        world = World(
            pods=tuple(PodFacts.of(pod) for pod in pods),
            traffic=self._traffic(agent.key),
            secret_exists=own is not None,
            certificate=self._certificate(own or {}, agent, now),
            burst=self._burst_facts(obj, agent, account, now),
            access=caller_keys_missing(agent, callers),
        )
        keys = Keys(
            worker=(own or {}).get(WORKER_KEY, ""),
            ticket=(own or {}).get(TICKET_KEY, ""),
            callers=callers or {},
            proxy_token=proxy_token(account or {}),
            hook_token=(hook or {}).get(HOOK_TOKEN, ""),
        )
        return _Seen(obj=obj, agent=agent, world=world, keys=keys, now=now)

    def _certificate(self, own: Mapping[str, str], agent: VoiceAgent, now: float) -> str:
        """Why the workers need a new certificate; "" = they do not."""
        authority = self._settings.authority
        if authority is None:
            return ""
        return why_issue(own, authority, agent.key, datetime.fromtimestamp(now, UTC))

    async def _secret(self, namespace: str, name: str) -> dict[str, str] | None:
        """The entries of a Secret, None if it does not exist."""
        found = await self._cluster.find(path("Secret", namespace, name)) if name else None
        return None if found is None else secret_strings(found)

    def _traffic(self, key: str) -> Traffic:
        report = self._fleet.report(key)
        return Traffic(
            known=self._fleet.complete,
            acknowledged=self._fleet.acknowledged(key),
            workers={
                name: WorkerFacts(
                    slots=worker["slots"], busy=worker["busy"], draining=worker["draining"]
                )
                for name, worker in report.workers.items()
            },
            burst=report.burst,
            arrivals=report.arrivals,
            refused=report.refused,
            burst_error=report.burst_error,
        )

    def _burst_facts(
        self, obj: Json, agent: VoiceAgent, account: Mapping[str, str] | None, now: float
    ) -> BurstFacts:
        # Without the finalizer nobody looked after the app, and `release` may have stopped it.
        status = obj.get("status") or {} if FINALIZER in agent.finalizers else {}
        facts = self._deployments.facts(agent.key, BurstFacts.of(status))
        missing = ""
        if agent.burst:
            missing = credentials_missing(agent.burst, account)
            if account and not missing:
                self._deployments.remember(agent.key, account_of(agent.burst, account))
        remembered = self._deployments.account(agent.key) is not None
        if agent.deleted_at is not None and remembered:
            # A Secret may go first, and what is remembered of it is enough to stop the app.
            missing = ""
        elif agent.burst is None and facts.app and not remembered:
            missing = f"{facts.app} runs at Modal and cannot be stopped: its credentials are gone"
        breaker = self._breaker(agent, facts, now)
        return replace(facts, credentials=missing, breaker=breaker)

    def _breaker(self, agent: VoiceAgent, facts: BurstFacts, now: float) -> Breaker | None:
        """The one that is kept, or what the deployed app tells of an earlier operator's."""
        burst = allowed_burst(agent)
        if burst is None:
            return None
        asked = burst.snapshot
        known = facts.breaker
        if known is None:
            levels = {burst_hash(agent, self._settings.installation, at): at for at in LEVELS}
            known = recovered(asked, levels.get(facts.hash, asked), now)
        known = probed(following(known, asked), now)
        self._deployments.keep(agent.key, known)
        return known

    # --- act ----------------------------------------------------------------------------------------

    async def _act(self, seen: _Seen, plan: Plan) -> _Acts:
        """Takes the steps."""
        if plan.scaling and any(
            isinstance(step, CreatePod | Drain | Undrain) for step in plan.steps
        ):
            why = f"{plan.scaling.pods} pods are wanted: {plan.scaling.reason}"
            log.info("%s: %s", seen.agent.key, why, extra={"agent": seen.agent.key})
        acts = _Acts()
        for step in plan.steps:
            try:
                if isinstance(step, CreatePod):
                    acts.made += await self._create(seen, step)
                else:
                    await self._take(seen, step)
            except ApiError as error:
                log.warning(
                    "%s: %s: %s",
                    seen.agent.key,
                    type(step).__name__,
                    error,
                    extra={"agent": seen.agent.key},
                )
                acts.failures.append(error)
                if isinstance(step, EnsureSecret | CreatePod) and error.lasting:
                    acts.refused = acts.refused or error.message
                if isinstance(step, AddFinalizer):  # before anything else is made
                    break
            else:
                acts.taken.append(step)
        return acts

    async def _create(self, seen: _Seen, step: CreatePod) -> list[PodFacts]:
        """Makes a pod; nothing, if its name is taken."""
        key = seen.agent.key
        log.info("%s: %s", key, words(step), extra={"agent": key})
        made = await self._cluster.create(path("Pod", seen.agent.namespace), step.manifest)
        if made is None:
            log.warning("%s: a pod %s is there already", key, step.name)
            return []
        return [PodFacts.of(made)]

    async def _take(self, seen: _Seen, step: Step) -> None:
        agent, cluster = seen.agent, self._cluster
        if not isinstance(step, Requeue):
            log.info("%s: %s", agent.key, words(step), extra={"agent": agent.key})
        match step:
            case AddFinalizer():
                await self._finalizers(seen, (*agent.finalizers, FINALIZER))
            case RemoveFinalizer():
                if step.left_behind:
                    log.error("%s is gone, and left behind: %s", agent.key, step.left_behind)
                await self._finalizers(seen, [f for f in agent.finalizers if f != FINALIZER])
            case EnsureSecret():
                body = secret(
                    agent, secrets.token_urlsafe(KEY_BYTES), secrets.token_urlsafe(KEY_BYTES)
                )
                await cluster.create(path("Secret", agent.namespace), body)
            case IssueCertificate():
                await self._issue(seen, step.name)
            case Drain():
                await self._annotate(seen, step.name, step.uid, step.since)
            case Undrain():
                await self._annotate(seen, step.name, step.uid, None)
            case DeletePod():
                await cluster.delete(path("Pod", agent.namespace, step.name), step.uid)
            case DeployBurst():
                await self._deploy(seen, step)
            case WatchBurst():
                self._deployments.watch(agent.key, step.app)
            case StopBurst():
                self._deployments.stop(agent.key, step.app)
            case CreatePod() | Requeue():
                pass

    async def _finalizers(self, seen: _Seen, finalizers: "tuple[str, ...] | list[str]") -> None:
        """Only if nobody changed the agent meanwhile: others have finalizers too."""
        version = seen.obj["metadata"]["resourceVersion"]
        body = {"metadata": {"finalizers": list(finalizers), "resourceVersion": version}}
        await self._cluster.patch(seen.path, body)

    async def _annotate(self, seen: _Seen, name: str, uid: str, since: str | None) -> None:
        body = {"metadata": {"uid": uid, "annotations": {ANNOTATION_DRAINING: since}}}
        try:
            await self._cluster.patch(path("Pod", seen.agent.namespace, name), body)
        except ApiError as error:
            if error.status not in (
                404,
                409,
            ):  # gone, or another has its name: the next look sees it
                raise

    async def _issue(self, seen: _Seen, name: str) -> None:
        """In one write, so that whoever reads the Secret finds a pair."""
        if (authority := self._settings.authority) is not None:
            data = encoded(new_certificate(authority, seen.agent.key))
            await self._cluster.patch(path("Secret", seen.agent.namespace, name), {"data": data})

    async def _deploy(self, seen: _Seen, step: DeployBurst) -> None:
        burst = allowed_burst(seen.agent)
        if burst is None:
            return
        keys = await self._own_keys(seen)
        app = described(seen.agent, burst, step.app, keys.ticket)
        if breaker := seen.world.burst.breaker:
            app = replace(app, snapshot=breaker.level.value)
        self._deployments.deploy(seen.agent.key, app, step.hash)

    # --- route and report ---------------------------------------------------------------------------

    async def _route(self, notes: _Notes, seen: _Seen, plan: Plan) -> None:
        if any(isinstance(step, RemoveFinalizer) for step in plan.steps):
            return  # the next look finds no agent, and drops the route
        leaving = seen.agent.deleted_at is not None
        # A Secret that was deleted before its agent is not made anew.
        kept = notes.keys if leaving else None
        notes.keys = kept or await self._own_keys(seen)
        made = route(
            seen.agent,
            notes.keys,
            seen.world.burst.url,
            plan.draining,
            default_namespace=seen.agent.namespace == self._settings.default_namespace,
            worker_ca=self._settings.authority.pem if self._settings.authority else "",
        )
        self._fleet.set_route(seen.agent.key, made)

    async def _own_keys(self, seen: _Seen) -> Keys:
        """The agent's keys, also where this look has made its Secret."""
        if seen.keys.worker and seen.keys.ticket:
            return seen.keys
        name = secret_name(seen.agent)
        own = await self._secret(seen.agent.namespace, name) or {}
        if not (own.get(WORKER_KEY) and own.get(TICKET_KEY)):
            raise ApiError(
                422,
                "Invalid",
                f"Secret {name} lacks {WORKER_KEY} or {TICKET_KEY}: delete it, then it is made anew",
            )
        return replace(seen.keys, worker=own[WORKER_KEY], ticket=own[TICKET_KEY])

    def _announce_look(
        self, notes: _Notes, seen: _Seen, plan: Plan, acts: _Acts, status: Json
    ) -> None:
        """Tells what is new since the look before; a status that cannot be written does not keep it back."""
        look = events.Look(
            agent=seen.agent,
            world=seen.world,
            plan=plan,
            taken=tuple(acts.taken),
            installation=self._settings.installation,
            now=seen.now,
        )
        before = seen.obj.get("status") or {}
        news = [*events.of_status(before, status), *events.of_look(look, notes.news)]
        notes.news = events.remembered(look, notes.news)
        self._announce(notes, seen.obj, news, seen.now)

    def _announce(self, notes: _Notes, obj: Json, news: Iterable[events.Event], now: float) -> None:
        """Tells those that are neither repetitions nor too many."""
        told, notes.news = events.chosen(news, notes.news, now)
        self._herald.tell(obj, told, now)

    async def _tell(self, notes: _Notes, obj: Json, status: Json) -> list[float]:
        """Writes the status if it says something new; else, where it may not yet, the wait until then."""
        before = obj.get("status") or {}
        patch = difference(before, status)
        if not patch:
            return []
        now = time.monotonic()
        wait = notes.told_at + self._settings.status_seconds - now
        if wait > 0 and only_numbers_differ(before, status):
            return [wait]
        metadata = obj["metadata"]
        where = path("VoiceAgent", metadata["namespace"], metadata["name"])
        body = {"metadata": {"uid": metadata["uid"]}, "status": patch}
        try:
            await self._cluster.patch(f"{where}/status", body)
        except ApiError as error:
            if error.status not in (404, 409):  # gone, or a new one has its name
                raise
        notes.told_at = now
        return []


def words(step: Step) -> str:
    """A step for the log; a manifest is too long for it."""
    name = getattr(step, "name", "") or getattr(step, "app", "")
    why = getattr(step, "why", "")
    return f"{type(step).__name__} {name}".rstrip() + (f": {why}" if why else "")


def difference(old: Json, new: Json) -> Json:
    """The merge patch (RFC 7386) that makes `new` of `old`; empty if they are equal."""
    patch: Json = dict.fromkeys(old.keys() - new.keys())
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := difference(before, value):
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch
