"""Takes the steps of a plan, each so that it may have been taken before.

A step that the API refuses (a quota, a name that is taken) does not keep the others from being taken.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from trunkline_operator.agent.policy import allowed_burst
from trunkline_operator.agent.spec import Json
from trunkline_operator.burst.deployments import Deployments, described
from trunkline_operator.cluster.authority import Authority, new_certificate
from trunkline_operator.cluster.client import ApiError, ended, path
from trunkline_operator.cluster.custody import Custody, Entry
from trunkline_operator.cluster.mirror import Mirror
from trunkline_operator.decisions.eviction import EVICTABLE, PROTECTED
from trunkline_operator.decisions.manifests import encoded, secret
from trunkline_operator.decisions.plan import Plan
from trunkline_operator.decisions.steps import (
    AddFinalizer,
    AllowEviction,
    CreatePod,
    DeletePod,
    DeployBurst,
    Drain,
    EnsureSecret,
    ForbidEviction,
    IssueCertificate,
    RemoveFinalizer,
    Requeue,
    ScaleBurst,
    Step,
    StopBurst,
    Undrain,
    WatchBurst,
)
from trunkline_operator.decisions.template import refusal
from trunkline_operator.decisions.world import PodFacts, Refusal, World
from trunkline_operator.observing import Observer, Seen
from trunkline_runtime.contract import ANNOTATION_DRAINING, FINALIZER

KEY_BYTES: Final = 32

Mark = Drain | Undrain | AllowEviction | ForbidEviction
"""Steps that annotate a pod."""

log = logging.getLogger("trunkline.reconcile")


@dataclass(slots=True, kw_only=True)
class Acts:
    """What became of a plan's steps."""

    taken: list[Step] = field(default_factory=list)
    made: list[PodFacts] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)  # uids of pods that are gone, as the API has said
    failures: list[ApiError] = field(default_factory=list)
    refused: Refusal | None = None  # what keeps a pod from being made

    def after(self, world: World) -> World:
        """The world with the pods that were just made and deleted, so that a status needs no correction."""
        deleted = {step.uid for step in self.taken if isinstance(step, DeletePod)}
        here = [
            replace(pod, terminating=pod.terminating or pod.uid in deleted)
            for pod in world.pods
            if pod.uid not in self.ended
        ]
        return replace(world, pods=(*here, *self.made))

    def then(self, later: "Acts") -> "Acts":
        """These and then later ones; `after` then takes the world that the later ones began with."""
        return Acts(
            taken=[*self.taken, *later.taken],
            made=later.made,
            ended=later.ended,
            failures=[*self.failures, *later.failures],
            refused=self.refused or later.refused,
        )


class Actor:
    """Acts on the cluster and, through `deployments`, at Modal. `authority` None: plain links."""

    def __init__(
        self,
        mirror: Mirror,
        observer: Observer,
        deployments: Deployments,
        custody: Custody,
        authority: Authority | None,
    ) -> None:
        self._cluster = mirror.cluster
        self._mirror = mirror
        self._observer = observer
        self._deployments = deployments
        self._custody = custody
        self._authority = authority

    async def act(self, seen: Seen, plan: Plan) -> Acts:
        """Takes the steps."""
        if plan.scaling and any(
            isinstance(step, CreatePod | Drain | Undrain) for step in plan.steps
        ):
            wanted = f"{plan.scaling.pods} pods are wanted: {plan.scaling.reason}"
            log.info("%s: %s", seen.agent.key, wanted, extra={"agent": seen.agent.key})
        acts, keyless = Acts(), False
        try:
            await self._keep(seen)
        except ApiError as error:
            acts.failures.append(error)
        for step in plan.steps:
            if keyless and isinstance(step, CreatePod):
                continue  # it would wait for the Secret, and nobody could drain it
            try:
                if isinstance(step, CreatePod):
                    acts.made += await self._create(seen, step)
                elif isinstance(step, DeletePod):
                    acts.ended |= await self._delete(seen.agent.key, step)
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
                keyless |= isinstance(step, EnsureSecret)
                if isinstance(step, EnsureSecret | CreatePod) and error.lasting:
                    why = refusal(seen.agent, error.status, error.message)
                    acts.refused = acts.refused or why
                if isinstance(step, AddFinalizer):  # before anything else is made
                    break
            else:
                acts.taken.append(step)
        return acts

    async def bury(self, key: str) -> None:
        """Has the pods go whose agent is gone. Workers let calls end, for which their pods have the grace.

        Kubernetes' garbage collector does so too, sooner or later. Raises the first `ApiError`.
        """
        failures = []
        for pod in self._mirror.orphans(key):
            try:
                await self._delete(key, DeletePod(pod.name, pod.uid))
            except ApiError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def tell(self, agent: Json, status: Json) -> None:
        """Merges this into the agent's status; nothing, if it is gone."""
        metadata = agent["metadata"]
        where = path("VoiceAgent", metadata["namespace"], metadata["name"])
        body = {"metadata": {"uid": metadata["uid"]}, "status": status}
        try:
            made = await self._cluster.patch(f"{where}/status", body)
        except ApiError as error:
            if error.status not in (404, 409):  # gone, or a new one has its name
                raise
        else:
            self._mirror.wrote_agent(made, agent)

    async def _create(self, seen: Seen, step: CreatePod) -> list[PodFacts]:
        """Makes a pod; nothing, if its name is taken."""
        key = seen.agent.key
        log.info("%s: %s", key, words(step), extra={"agent": key})
        made = await self._cluster.create(path("Pod", seen.agent.namespace), step.manifest)
        if made is None:
            log.warning("%s: a pod %s is there already", key, step.name)
            return []
        self._mirror.made_pod(made)
        return [PodFacts.of(made)]

    async def _delete(self, key: str, step: DeletePod) -> set[str]:
        """Deletes a pod; its uid, if the API says that it is gone."""
        log.info("%s: %s", key, words(step), extra={"agent": key})
        where = path("Pod", key.partition("/")[0], step.name)
        deleted = await self._cluster.delete(where, step.uid)
        if deleted is None:
            self._mirror.missing(step.uid)
        elif ended(deleted):
            self._mirror.ended_pod(deleted)
            return {step.uid}
        else:
            self._mirror.asked_to_go(step.uid)
        return set()

    async def _take(self, seen: Seen, step: Step) -> None:
        agent = seen.agent
        if not isinstance(step, Requeue):
            log.info("%s: %s", agent.key, words(step), extra={"agent": agent.key})
        match step:
            case AddFinalizer():
                await self._finalizers(seen, (*agent.finalizers, FINALIZER))
            case RemoveFinalizer():
                if step.left_behind:
                    log.error("%s is gone, and left behind: %s", agent.key, step.left_behind)
                await self._finalizers(seen, [f for f in agent.finalizers if f != FINALIZER])
                if not step.left_behind:  # the sweeper goes on trying, with this
                    await self._custody.drop(agent.uid)
            case EnsureSecret():
                await self._keys(seen)
            case IssueCertificate():
                await self._issue(seen, step.name)
            case Drain():
                await self._annotate(seen, step, {ANNOTATION_DRAINING: step.since})
            case Undrain():
                await self._annotate(seen, step, {ANNOTATION_DRAINING: None})
            case AllowEviction():
                await self._annotate(seen, step, EVICTABLE)
            case ForbidEviction():
                await self._annotate(seen, step, PROTECTED)
            case DeployBurst():
                await self._deploy(seen, step)
            case WatchBurst():
                self._deployments.watch(agent.key, step.app)
            case ScaleBurst():
                self._deployments.scale(agent.key, step.app, step.scalings)
            case StopBurst():
                self._deployments.stop(agent.key, step.app)
            case CreatePod() | DeletePod() | Requeue():
                pass

    async def _finalizers(self, seen: Seen, finalizers: "tuple[str, ...] | list[str]") -> None:
        """Only if nobody changed the agent meanwhile: others have finalizers too."""
        version = seen.obj["metadata"]["resourceVersion"]
        body = {"metadata": {"finalizers": list(finalizers), "resourceVersion": version}}
        made = await self._cluster.patch(seen.path, body)
        self._mirror.wrote_agent(made, seen.obj)

    async def _annotate(self, seen: Seen, step: Mark, notes: Mapping[str, str | None]) -> None:
        body = {"metadata": {"uid": step.uid, "annotations": dict(notes)}}
        try:
            marked = await self._cluster.patch(path("Pod", seen.agent.namespace, step.name), body)
        except ApiError as error:
            if error.status not in (404, 409):  # gone, or another has its name
                raise
            self._mirror.missing(step.uid)
        else:
            self._mirror.marked_pod(marked)

    async def _keys(self, seen: Seen) -> None:
        """Makes the agent's Secret, with a certificate where links are TLS; nothing, if it has one."""
        agent = seen.agent
        body = secret(agent, secrets.token_urlsafe(KEY_BYTES), secrets.token_urlsafe(KEY_BYTES))
        if self._authority is not None:
            body["data"] |= encoded(new_certificate(self._authority, agent.key))
        made = await self._cluster.create(path("Secret", agent.namespace), body)
        if made is None:
            made = await self._inherited(seen, body["metadata"])
        if made is not None:
            self._observer.wrote_secret(agent, made)

    async def _inherited(self, seen: Seen, metadata: Json) -> Json | None:
        """The Secret that an earlier agent of this name has left, made this one's; None where it is nobody's or its own.

        Kubernetes' garbage collector takes what belongs to an agent that is gone, and would take it from under the pods.
        """
        where = path("Secret", seen.agent.namespace, metadata["name"])
        found = await self._cluster.find(where)
        owners = found["metadata"].get("ownerReferences", []) if found else []
        mine = metadata["ownerReferences"]
        if found is None or not owners or owners == mine:
            return None
        if any(
            (owner["kind"], owner["name"]) != ("VoiceAgent", seen.agent.name) for owner in owners
        ):
            return None
        log.info("%s: takes over the Secret of an agent before it", seen.agent.key)
        version = found["metadata"]["resourceVersion"]
        body = {"metadata": {"resourceVersion": version, "ownerReferences": mine}}
        return await self._cluster.patch(where, body)

    async def _issue(self, seen: Seen, name: str) -> None:
        """In one write, so that whoever reads the Secret finds a pair."""
        if (authority := self._authority) is not None:
            data = encoded(new_certificate(authority, seen.agent.key))
            where = path("Secret", seen.agent.namespace, name)
            self._observer.wrote_secret(
                seen.agent, await self._cluster.patch(where, {"data": data})
            )

    async def _deploy(self, seen: Seen, step: DeployBurst) -> None:
        burst = allowed_burst(seen.agent)
        if burst is None:
            return
        keys = await self._observer.own_keys(seen)
        await self._kept(seen, step.app)  # before there is anything to stop
        await self._deployments.loaded()  # which knows what an app is
        app = described(seen.agent, burst, step.app, keys, self._custody.installation)
        if breaker := seen.world.burst.breaker:
            app = replace(app, snapshot=breaker.level.value)
        self._deployments.deploy(seen.agent.key, app, step.hash)

    async def _keep(self, seen: Seen) -> None:
        """What stops the agent's app is kept as it is now, and no longer than there is one."""
        facts = seen.world.burst
        if facts.stopped and not facts.app and seen.agent.deleted_at is None:
            await self._custody.drop(seen.agent.uid)
        elif facts.app:
            await self._kept(seen, facts.app)

    async def _kept(self, seen: Seen, app: str) -> None:
        if account := self._deployments.account(seen.agent.key):
            entry = Entry(agent=seen.agent.key, app=app, account=account)
            await self._custody.keep(seen.agent.uid, entry)


def words(step: Step) -> str:
    """A step for the log; a manifest is too long for it."""
    name = getattr(step, "name", "") or getattr(step, "app", "")
    why = getattr(step, "why", "")
    return f"{type(step).__name__} {name}".rstrip() + (f": {why}" if why else "")
