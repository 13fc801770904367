"""The Modal app of each agent: what is known of it, and the one task at a time that changes it.

A deployment takes seconds to minutes, so it runs beside the agent's looks and tells when it ends. An app
counts as deployed once it also has had a session: then its snapshot exists before a caller waits for it.
Credentials are remembered while there may be an app, because an agent's Secret may go before the agent.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from trunkline_operator.agent.policy import pins
from trunkline_operator.agent.spec import Burst as BurstSpec
from trunkline_operator.agent.spec import Snapshot, VoiceAgent
from trunkline_operator.burst import limit as limits
from trunkline_operator.burst.breaker import Breaker, noted
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.burst.standby import Scalings, Standing
from trunkline_operator.burst.terms import BurstError, BurstReason, Credentials, Place
from trunkline_operator.decisions.manifests import engine_environment
from trunkline_operator.decisions.routes import Keys
from trunkline_operator.decisions.world import BurstFacts
from trunkline_operator.metrics import DEPLOYMENTS
from trunkline_runtime.contract import TAG_INSTALLATION, TAG_NAME, TAG_NAMESPACE, TAG_UID

if TYPE_CHECKING:  # the SDK is loaded when something is first asked of Modal
    from trunkline_operator.burst.client import BurstApp

# The first boot of an app loads its model: minutes, where it is not in the image.
WARM_UP_SECONDS: Final = 900.0
# Modal tells of a week at most; starts of an hour ago say little of the next.
LONGEST_STATS: Final = 3600.0

Outcome = Callable[[], Awaitable[BurstFacts]]
"""Work at Modal, and what is known after it."""

log = logging.getLogger("trunkline.burst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where at Modal an agent's app lives."""

    credentials: Credentials = field(repr=False)
    environment: str

    def place(self, app: str) -> Place:
        """Of an app there."""
        return Place(app=app, environment=self.environment, credentials=self.credentials)


@dataclass(slots=True)
class _App:
    facts: BurstFacts
    account: Account | None = None
    task: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None
    scaling: asyncio.Task[None] | None = None
    slow: int | None = None  # slow restores that gateways have told of; None = not looked at yet
    unheeded: int = 0  # of them, those that Modal will count among the starts that went well
    limited: int | None = None  # refusals for a limit that gateways have told of, likewise
    counted: float = field(default_factory=time.time)  # starts until then are known


class Deployments:
    """All agents' apps. `changed(agent)` is called when work on one has ended."""

    def __init__(
        self, sdk: Sdk, changed: Callable[[str], None], warm_up_seconds: float = WARM_UP_SECONDS
    ) -> None:
        self._sdk = sdk
        self._warm_up_seconds = warm_up_seconds
        self._changed = changed
        self._apps: dict[str, _App] = {}

    def __repr__(self) -> str:
        return f"Deployments({ {agent: app.facts.app for agent, app in self._apps.items()} })"

    async def loaded(self) -> None:
        """Once the SDK is there, which `described` needs."""
        await self._sdk.burst()

    def facts(self, agent: str, earlier: BurstFacts) -> BurstFacts:
        """What is known; at first, what an earlier operator left in the agent's status."""
        return self._apps.setdefault(agent, _App(earlier)).facts

    def account(self, agent: str) -> Account | None:
        app = self._apps.get(agent)
        return app.account if app else None

    def remember(self, agent: str, account: Account) -> None:
        self._apps[agent].account = account

    def keep(self, agent: str, breaker: Breaker) -> None:
        """What its containers start from, for the looks to come."""
        self._apps[agent].facts = replace(self._apps[agent].facts, breaker=breaker)

    def slower(self, agent: str, total: int) -> int:
        """Slow restores since the last look; what was before the first is old."""
        app = self._apps[agent]
        more = 0 if app.slow is None else max(total - app.slow, 0)
        app.slow, app.unheeded = total, app.unheeded + more
        return more

    def refused(self, agent: str, total: int) -> None:
        """Gateways were refused so often for a limit of the workspace; the next count says how many ran."""
        app = self._apps[agent]
        if app.limited is not None and total > app.limited:
            app.facts = replace(app.facts, refused=True)
        app.limited = total

    def forget(self, agent: str) -> None:
        app = self._apps.pop(agent, None)
        for task in (app.task, app.watch, app.scaling) if app else ():
            if task:
                task.cancel()

    async def close(self) -> None:
        apps = self._apps.values()
        tasks = [task for app in apps for task in (app.task, app.watch, app.scaling) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sdk.close()

    def deploy(self, agent: str, app: "BurstApp", build: str) -> None:
        """Deploys and warms up, beside everything else; `build` is the hash of what is deployed."""
        if self.account(agent) is not None:
            self._start(agent, "deploy", build, lambda: self._deployed(agent, app, build))

    def stop(self, agent: str, name: str) -> None:
        """Stops the app of that name, beside everything else."""
        if self.account(agent) is not None:
            self._start(agent, "stop", "", lambda: self._stopped(agent, name))

    async def _deployed(self, agent: str, app: "BurstApp", build: str) -> BurstFacts:
        account = self._apps[agent].account
        assert account is not None
        deployed = await (await self._sdk.burst()).deploy(app, account.credentials)
        # From here on there is something to stop, whatever comes; what it stood at before is wiped.
        known = self._apps[agent]
        known.facts = replace(
            known.facts,
            app=app.name,
            app_id=deployed.app_id,
            stopped=False,
            standing=Standing(),
            urls={each: url for each, url in deployed.urls.items() if each in known.facts.urls},
        )
        self._changed(agent)
        if app.snapshot != Snapshot.NONE.value:
            await self._warmed(agent, app, account.place(app.name), deployed.urls)
        known.counted = time.time()  # the first start makes the snapshot
        return BurstFacts(
            app=app.name,
            app_id=deployed.app_id,
            urls=deployed.urls,
            hash=build,
            snapshot=app.snapshot,
            breaker=known.facts.breaker,
            first_boot=known.facts.first_boot,
            limit=known.facts.limit,
            running=dict.fromkeys(app.regions, 1),  # of the first sessions; they stay for a while
            counted_at=known.counted,
        )

    async def _warmed(
        self, agent: str, app: "BurstApp", place: Place, urls: Mapping[str, str]
    ) -> None:
        """A session in each region, all at once; calls may go to one as soon as it has had its own.

        Raises the first failure, after all have ended.
        """

        async def warm(region: str) -> None:
            sdk = await self._sdk.burst()
            seconds = await sdk.warm_up(place, region, self._warm_up_seconds)
            words = "%s: first session in %s after %.1f s"
            log.info(words, agent, region, seconds, extra={"agent": agent})
            facts = self._apps[agent].facts
            ready = {each: urls[each] for each in urls if each == region or each in facts.urls}
            self._apps[agent].facts = replace(
                facts, urls=ready, first_boot=max(facts.first_boot, seconds)
            )
            self._changed(agent)

        outcomes = await asyncio.gather(*map(warm, app.regions), return_exceptions=True)
        for region, outcome in zip(app.regions, outcomes, strict=True):
            if isinstance(outcome, BurstError):
                raise BurstError(outcome.reason, f"{region}: {outcome.message}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome

    def watch(self, agent: str, name: str) -> None:
        """Asks Modal how the app's containers have started, and tells the breaker."""
        app = self._apps[agent]
        if app.account is not None and app.watch is None:
            app.watch = asyncio.create_task(self._watched(agent, app, app.account, name))

    async def _watched(self, agent: str, app: _App, account: Account, name: str) -> None:
        now, told = time.time(), app.facts.refused
        since = max(app.counted, now - LONGEST_STATS)
        try:
            starts = await (await self._sdk.burst()).starts(
                account.place(name), app.facts.urls, since, now
            )
        except BurstError as error:  # the next look asks for this time as well
            log.warning("%s: no news of starts: %s", agent, error, extra={"agent": agent})
        else:
            app.counted = now
            app.facts = replace(
                app.facts,
                running=starts.there,
                counted_at=now,
                limit=(limits.refused if told else limits.counted)(
                    app.facts.limit, starts.alive, now
                ),
                refused=app.facts.refused and not told,
            )
            if before := app.facts.breaker:
                # What gateways found slow is known already, and not good.
                good, app.unheeded = max(starts.good - app.unheeded, 0), 0
                self.keep(agent, after := noted(before, good, starts.bad, now))
                if after.level is not before.level:
                    log.warning("%s: snapshot %s", agent, after.level, extra={"agent": agent})
        finally:
            app.watch = None
            app.facts = replace(app.facts, watched=now)
        self._changed(agent)

    def scale(self, agent: str, name: str, scalings: Scalings) -> None:
        """Tells Modal how many containers stand by, beside everything else but a change of the app."""
        app = self._apps[agent]
        if app.account is not None and app.task is None and app.scaling is None:
            app.scaling = asyncio.create_task(
                self._scaled(agent, app, app.account.place(name), scalings)
            )

    async def _scaled(self, agent: str, app: _App, place: Place, scalings: Scalings) -> None:
        standing, failed_at = app.facts.standing, 0.0
        try:
            await (await self._sdk.burst()).scale(place, scalings)
            standing = Standing(scalings=scalings, since=time.time())
            words = ", ".join(
                f"{region} {each.minimum}+{each.buffer}" for region, each in scalings.items()
            )
            log.info("%s: containers stand by: %s", agent, words, extra={"agent": agent})
        except BurstError as error:  # the next look tries again
            failed_at = time.time()
            app.facts = limited(app.facts, error, failed_at)
            log.warning("%s: not scaled: %s", agent, error, extra={"agent": agent})
        finally:
            app.scaling = None
            # A deployment that began meanwhile wipes what was told.
            if app.task is None:
                app.facts = replace(app.facts, standing=standing, unscaled_at=failed_at)
        DEPLOYMENTS.labels("scale", "failed" if failed_at else "done").inc()
        self._changed(agent)

    async def _stopped(self, agent: str, name: str) -> BurstFacts:
        account = self._apps[agent].account
        assert account is not None
        await (await self._sdk.burst()).stop(account.place(name))
        return BurstFacts(stopped=True)

    def _start(self, agent: str, work: str, build: str, outcome: Outcome) -> None:
        app = self._apps[agent]
        if app.task is None:  # never two at once; the next look asks again
            app.facts = replace(app.facts, working=True)
            app.task = asyncio.create_task(self._run(agent, work, build, outcome))

    async def _run(self, agent: str, work: str, build: str, outcome: Outcome) -> None:
        log.info("%s: %s begins", agent, work, extra={"agent": agent})
        app = self._apps[agent]
        try:
            app.facts = await outcome()
        except BurstError as error:
            facts = limited(app.facts, error, time.time())
            app.facts = failed(facts, build, f"{error.reason}: {error.message}")
            log.warning("%s: %s failed: %s", agent, work, app.facts.message, extra={"agent": agent})
        except (
            Exception
        ) as error:  # a bug of ours or of the SDK must not leave the agent working for ever
            app.facts = failed(app.facts, build, f"InternalError: {error!r}")
            log.exception("%s: %s failed", agent, work, extra={"agent": agent})
        else:
            log.info("%s: %s done", agent, work, extra={"agent": agent})
        finally:
            app.task = None
        DEPLOYMENTS.labels(work, "failed" if app.facts.failures else "done").inc()
        self._changed(agent)


def limited(facts: BurstFacts, error: BurstError, now: float) -> BurstFacts:
    """After a failure that may tell of the workspace's limit, by the containers of the last count."""
    if error.reason is not BurstReason.LIMIT_REACHED:
        return facts
    return replace(facts, limit=limits.refused(facts.limit, facts.containers, now))


def failed(facts: BurstFacts, build: str, message: str) -> BurstFacts:
    return replace(
        facts,
        working=False,
        failures=facts.failures + 1,
        failed_at=time.time(),
        failed_hash=build,
        message=message,
    )


def described(
    agent: VoiceAgent, burst: BurstSpec, name: str, keys: Keys, installation: str = ""
) -> "BurstApp":
    """The app of that name which the agent asks for.

    It is deployed with no container that stands by: those come once a snapshot exists to restore them from, and
    none is paid for if the operator ends before the deployment is known.
    """
    from trunkline_operator.burst.client import BurstApp

    return BurstApp(
        name=name,
        agent=agent.key,
        engine=engine_environment(agent.engine),
        ticket_key=keys.ticket,
        hub_token=keys.hub_token,
        registry=keys.registry,
        environment=burst.environment,
        tags=({TAG_INSTALLATION: installation} if installation else {})
        | {
            TAG_NAMESPACE: agent.namespace,
            TAG_NAME: agent.name,
            TAG_UID: agent.uid,
        },
        image=burst.image,
        gpu=burst.gpu,
        regions=tuple(region.value for region in burst.regions),
        pinned=pins(agent, burst),
        slots=burst.slots_per_container,
        max_containers=burst.max_containers,
        scaledown_window=burst.scaledown_window_seconds,
        max_seconds=agent.session.max_seconds,
        snapshot=burst.snapshot.value,
    )
