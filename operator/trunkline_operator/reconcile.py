"""One look at an agent: observe, plan, act, route, report. The same whatever made it look.

Nothing is remembered that a restart could not do without: the pods, the Secret and the status are in the
cluster, the load comes from the gateways. A step that the API refuses (a quota, a name that is taken) does
not keep the others from being taken, nor the agent from being routed and its status from being told.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from trunkline_operator import metrics
from trunkline_operator.acting import Actor, Acts
from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.policy import here
from trunkline_operator.agent.spec import Json, SpecError
from trunkline_operator.burst.bills import Bills
from trunkline_operator.burst.breaker import slow_after
from trunkline_operator.burst.deployments import Deployments
from trunkline_operator.cluster.authority import Authority
from trunkline_operator.cluster.client import ApiError
from trunkline_operator.cluster.custody import Custody
from trunkline_operator.cluster.herald import Herald
from trunkline_operator.cluster.mirror import Mirror
from trunkline_operator.decisions import events
from trunkline_operator.decisions.manifests import (
    Installation,
)
from trunkline_operator.decisions.offers import measured
from trunkline_operator.decisions.plan import Plan, planned
from trunkline_operator.decisions.routes import Keys, route
from trunkline_operator.decisions.runway import runway
from trunkline_operator.decisions.spending import costs
from trunkline_operator.decisions.status import only_numbers_differ, rejected, reported
from trunkline_operator.decisions.steps import (
    CreatePod,
    DeletePod,
    RemoveFinalizer,
    Requeue,
)
from trunkline_operator.gateways.fleet import Fleet
from trunkline_operator.observing import Observer, Seen
from trunkline_operator.scaling.decision import Memory
from trunkline_operator.treasury import Treasury

# Secrets are not watched, so that nobody needs the right to read them all.
MISSING_SECRET_SECONDS: Final = 5.0
# After a step of a deletion. If nothing holds that up it is over by then, and nobody would have read what was
# written into the agent.
SILENT_SECONDS: Final = 3.0
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


class Reconciler:
    """Looks at agents, for an `Agenda`."""

    def __init__(
        self,
        mirror: Mirror,
        fleet: Fleet,
        deployments: Deployments,
        custody: Custody,
        treasury: Treasury,
        bills: Bills,
        herald: Herald,
        settings: Settings,
    ) -> None:
        self._mirror = mirror
        self._fleet = fleet
        self._deployments = deployments
        self._custody = custody
        self._treasury = treasury
        self._bills = bills
        self._herald = herald
        self._settings = settings
        self._observer = Observer(
            mirror,
            fleet,
            deployments,
            custody,
            treasury,
            bills,
            settings.installation,
            settings.authority,
        )
        self._actor = Actor(mirror, self._observer, deployments, custody, settings.authority)
        self._notes: dict[str, _Notes] = {}

    async def look(self, key: str) -> float | None:
        """One look; the seconds until the next, or None for an agent that is gone.

        Raises the first `ApiError` that kept a step from being taken.
        """
        began, outcome = time.monotonic(), "failed"
        try:
            with self._mirror.looking(key):
                after, outcome = await self._look(key)
            return after
        finally:
            metrics.LOOKS.labels(outcome).observe(time.monotonic() - began)

    async def _look(self, key: str) -> tuple[float | None, str]:
        namespace, _, name = key.partition("/")
        obj = self._mirror.agent(key)
        if obj is None:
            self._forget(key)
        await self._actor.bury(key)
        if obj is None:
            return None, "gone"
        notes = self._notes_of(key, obj["metadata"]["uid"])
        now = time.time()
        try:
            agent = here(parsed(obj), self._settings.installation.region)
        except SpecError as error:
            # Its pods and its route stay as they are: a wrong edit ends no call.
            status = rejected(obj, error, now)
            self._announce(notes, obj, events.of_status(obj.get("status") or {}, status), now)
            await self._tell(notes, obj, status)
            return self._settings.resync_seconds, "refused"
        seen = await self._observer.observe(obj, agent, now)
        agent = measured(agent, seen.world.traffic)
        seen = replace(seen, agent=agent)
        plan = planned(agent, seen.world, now, notes.memory, self._settings.installation)
        acts, last = await self._actor.act(seen, plan), seen
        if following := self._following(seen, plan, acts):
            last, plan = following
            acts = acts.then(await self._actor.act(last, plan))
        notes.memory = plan.memory
        try:
            await self._route(notes, last, plan)
        except ApiError as error:
            acts.failures.append(error)
        status = reported(
            agent, acts.after(last.world), plan, obj.get("status") or {}, now, acts.refused
        )
        status["cost"] = costs(
            agent, seen.world, status["replicas"], self._settings.installation.prices
        )
        metrics.tell_spend(namespace, name, seen.world.burst.account)
        if bill := seen.world.burst.billed:
            metrics.tell_bill(namespace, name, bill.dollars, bill.reckoned)
        metrics.PODS.count(namespace, name, status.get("pods") or {})
        self._announce_look(notes, seen, plan, acts, status)
        going = agent.deleted_at is not None and any(
            isinstance(step, DeletePod | RemoveFinalizer) for step in acts.taken
        )
        wait = [SILENT_SECONDS] if going else await self._tell(notes, obj, status)
        if acts.failures:
            raise acts.failures[0]
        waits = [step.after for step in plan.steps if isinstance(step, Requeue)]
        if seen.world.access or seen.world.tokens:
            waits.append(MISSING_SECRET_SECONDS)
        if self._mirror.agent(key) is None:  # it was let go, and nobody else held it
            self._forget(key)
            return None, "gone"
        if acts.ended and last is seen:
            waits.append(0.0)  # something may have waited for that
        waits.append(self._observer.stale_in(key))
        return min([*waits, *wait]), "done"

    def _following(self, seen: Seen, plan: Plan, acts: Acts) -> tuple[Seen, Plan] | None:
        """What waited for pods that went at once need not wait for a watch to tell of it, nor for another look."""
        if not acts.ended or acts.failures or not _only(plan, CreatePod, DeletePod):
            return None
        later = replace(seen, world=acts.after(seen.world))
        then = planned(seen.agent, later.world, seen.now, plan.memory, self._settings.installation)
        return (later, then) if _only(then, CreatePod, RemoveFinalizer) else None

    def _notes_of(self, key: str, uid: str) -> _Notes:
        notes = self._notes.get(key)
        if notes and notes.uid != uid:  # deleted, and made anew before anybody looked
            self._forget(key)
        return self._notes.setdefault(key, _Notes(uid=uid))

    def _forget(self, key: str) -> None:
        if notes := self._notes.pop(key, None):
            self._custody.gone(notes.uid)
        self._observer.forget(key)
        self._fleet.forget(key)
        self._deployments.forget(key)
        self._treasury.forget(key)
        self._bills.forget(key)
        metrics.forget_spend(*key.split("/", 1))
        metrics.PODS.forget(*key.split("/", 1))

    # --- route and report ---------------------------------------------------------------------------

    async def _route(self, notes: _Notes, seen: Seen, plan: Plan) -> None:
        if any(isinstance(step, RemoveFinalizer) for step in plan.steps):
            return  # the next look finds no agent, and drops the route
        leaving = seen.agent.deleted_at is not None
        # A Secret that was deleted before its agent is not made anew.
        kept = notes.keys if leaving else None
        if leaving and not (kept or seen.world.secret_exists):
            # Nobody knows the keys of its workers any more: no new call, and calls go on where they are.
            self._fleet.set_route(seen.agent.key, None)
            return
        notes.keys = kept or await self._observer.own_keys(seen)
        made = route(
            seen.agent,
            notes.keys,
            seen.world.burst.urls,
            plan.draining,
            default_namespace=seen.agent.namespace == self._settings.default_namespace,
            worker_ca=self._settings.authority.pem if self._settings.authority else "",
            slow_seconds=slow_after(seen.world.burst.breaker, seen.world.burst.first_boot),
            prices=self._settings.installation.prices,
        )
        self._fleet.set_route(seen.agent.key, made)
        new = sum(isinstance(step, CreatePod) for step in plan.steps)
        coming = runway(seen.agent, seen.world.pods, new, seen.now, plan.usual)
        self._fleet.set_runway(
            seen.agent.key, [(each.slots, each.at - seen.now) for each in coming]
        )

    def _announce_look(
        self, notes: _Notes, seen: Seen, plan: Plan, acts: Acts, status: Json
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
        await self._actor.tell(obj, patch)
        notes.told_at = now
        return []


def _only(plan: Plan, *kinds: type) -> bool:
    """Whether a plan has no other steps; a Requeue is none."""
    return all(isinstance(step, (*kinds, Requeue)) for step in plan.steps)


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
