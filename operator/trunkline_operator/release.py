"""`trunkline-operator release`: lets go of all agents before Trunkline is uninstalled.

The operator goes first, for it would set up again what is taken down here. Then each agent's Modal app is
stopped and, once that is done, Trunkline's finalizer is taken off the agent: nobody would be left to do so. Agents
and pods stay, and so does the operator's Lease, which costs nothing. The same again changes nothing.

A line per agent tells what was done, or what was not and what a person can do. Nothing is decided on a status
alone: an app that may have been deployed without anybody noting it is stopped, too.
"""

import argparse
import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trunkline_operator.agent.spec import Burst as BurstSpec
from trunkline_operator.agent.spec import Json
from trunkline_operator.burst.client import CALL_SECONDS, Burst, BurstError, BurstReason
from trunkline_operator.burst.deployments import Account
from trunkline_operator.cluster.client import AGENTS, ApiError, Cluster, path
from trunkline_operator.cluster.credentials import account_of, credentials_missing
from trunkline_operator.cluster.custody import Custody, Entry
from trunkline_operator.config import ConfigError, parse_name
from trunkline_operator.decisions.manifests import app_name, secret_strings
from trunkline_runtime.contract import FINALIZER

DEADLINE_SECONDS: Final = 240.0
# For the last lines and for Modal's connections to end, of the deadline.
REST_SECONDS: Final = 3.0
# An operator's pod has a grace of 30 s, and is gone from the API a moment after its end.
OPERATOR_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 0.5
RETRY_SECONDS: Final = (1.0, 10.0)
CALLS: Final = 4  # to Modal, each without an answer, fit into a short deadline
# Many agents share a workspace, whose API is limited to tens of requests a second.
AGENTS_AT_ONCE: Final = 8
CONFLICTS: Final = 5
FINISHED: Final = frozenset({"Succeeded", "Failed"})

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseConfig:
    """The flags of the command. `deadline` is in seconds, for all of it."""

    deadline: float = DEADLINE_SECONDS
    scale_down: tuple[str, str] | None = None  # the operator's Deployment
    namespaces: tuple[str, ...] = ()  # none means all
    burst_secret: tuple[str, str] | None = None  # the operator's own copies of credentials

    def __post_init__(self) -> None:
        if not self.deadline > 0:
            raise ConfigError("--deadline must be a number of seconds above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one agent may have at Modal."""

    namespace: str
    name: str
    uid: str
    app: str  # "" = it never had one
    deployed: bool  # its status says so
    burst: (
        BurstSpec | None
    )  # where and with which credentials; None: the spec does not say any more
    finalizer: bool

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def by_hand(self) -> str:
        """What a person types to stop the app."""
        environment = (
            f" --env {self.burst.environment}" if self.burst and self.burst.environment else ""
        )
        return f"modal app stop {self.app}{environment}"

    @property
    def finalizer_by_hand(self) -> str:
        return f"kubectl edit voiceagent {self.name} -n {self.namespace}, and delete {FINALIZER}"


def claim(obj: Json) -> Claim:
    """Reads an agent, also one whose spec is refused: its app runs all the same."""
    metadata = obj["metadata"]
    modal = (obj["spec"].get("burst") or {}).get("modal") or {}
    secret = (modal.get("credentialsSecretRef") or {}).get("name", "")
    deployed = ((obj.get("status") or {}).get("burst") or {}).get("app", "")
    derived = app_name(metadata["namespace"], metadata["name"], metadata["uid"]) if secret else ""
    return Claim(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        app=deployed or derived,
        deployed=bool(deployed),
        burst=BurstSpec(credentials_secret=secret, environment=modal.get("environment", ""))
        if secret
        else None,
        finalizer=FINALIZER in (metadata.get("finalizers") or ()),
    )


class Release:
    """One run of the command; `say` prints a line. `end` is the moment of `time.monotonic` to be done by."""

    def __init__(
        self, cluster: Cluster, burst: Burst, custody: Custody, say: Say, end: float
    ) -> None:
        self._cluster, self._burst, self._say, self._end = cluster, burst, say, end
        self._custody = custody
        self._room = asyncio.Semaphore(AGENTS_AT_ONCE)

    async def run(self, config: ReleaseConfig) -> int:
        """0 if nothing is left, else 1; what is left was told."""
        left = not await self._scaled_down(*config.scale_down) if config.scale_down else False
        try:
            async with asyncio.timeout(self._seconds()):
                await self._custody.open()
                found = await self._agents(config.namespaces)
        except (ApiError, TimeoutError) as error:
            self._say(f"LEFT: all agents: they cannot be listed: {error or 'no answer in time'}")
            return 1
        outcomes = await asyncio.gather(*(self._agent(claim(obj)) for obj in found))
        copies = await asyncio.gather(*(self._copy(*it) for it in self._custody.entries.items()))
        left = left or not all((*outcomes, *copies))
        rest = "see above what is left, then run this again" if left else "they and their pods stay"
        self._say(f"released {sum(outcomes)} of {len(found)} agents; {rest}")
        return 1 if left else 0

    def _seconds(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    # --- the operator -------------------------------------------------------------------------------

    async def _scaled_down(self, namespace: str, name: str) -> bool:
        """Whether no pod of the operator's Deployment is left."""
        what, where = f"operator {namespace}/{name}", path("Deployment", namespace, name)
        pods: list[str] = []
        try:
            # The agents get half of the time, whatever the operator does.
            async with asyncio.timeout(min(OPERATOR_SECONDS, self._seconds() / 2)):
                deployment = await self._cluster.find(where)
                if deployment is None:
                    self._say(f"{what}: there is no such Deployment, so nothing to stop")
                    return True
                await self._cluster.patch(f"{where}/scale", {"spec": {"replicas": 0}})
                labels = deployment["spec"]["selector"].get("matchLabels") or {}
                while pods := await self._running(namespace, labels):  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_SECONDS)  # the chart gives no right to watch them
        except ApiError as error:
            self._say(f"LEFT: {what}: cannot be scaled to 0: {error}")
            return False
        except TimeoutError:
            self._say(
                f"LEFT: {what}: {', '.join(pods) or 'it'} did not end in time, and may undo what is done here: "
                f"kubectl delete pod -n {namespace} {' '.join(pods) or '…'}, then run this again"
            )
            return False
        self._say(f"{what}: stopped")
        return True

    async def _running(self, namespace: str, labels: Mapping[str, str]) -> list[str]:
        found = await self._cluster.list(path("Pod", namespace), labels)
        return [
            pod["metadata"]["name"]
            for pod in found
            if (pod.get("status") or {}).get("phase") not in FINISHED
        ]

    # --- the agents ---------------------------------------------------------------------------------

    async def _agents(self, namespaces: Sequence[str]) -> list[Json]:
        paths = [path("VoiceAgent", namespace) for namespace in namespaces] or [AGENTS]
        found: list[Json] = []
        for where in paths:
            try:
                found += await self._cluster.list(where)
            except ApiError as error:
                if error.status != 404:
                    raise
                self._say("the cluster knows no VoiceAgents")
                return []
        return found

    async def _agent(self, it: Claim) -> bool:
        """Whether nothing of the agent is left."""
        async with self._room:
            stopped, words = await self._stopped(it)
            if stopped and it.finalizer:
                stopped, more = await self._let_go(it)
                words = f"{words}; {more}"
        self._say(f"{it.key}: {words}" if stopped else f"LEFT: {it.key}: {words}")
        return stopped

    async def _stopped(self, it: Claim) -> tuple[bool, str]:
        """Whether its app is stopped, and the sentence about it."""
        if not it.app:
            return True, "it has nothing at Modal"
        if it.burst is None:
            why = f"{it.app} may run at Modal, and the agent names no credentials any more"
            return False, f"{why}: {it.by_hand}; {it.finalizer_by_hand}"
        try:
            async with asyncio.timeout(self._seconds()):
                found = await self._cluster.find(
                    path("Secret", it.namespace, it.burst.credentials_secret)
                )
        except (ApiError, TimeoutError) as error:
            why = f"{it.app} may run at Modal, and its credentials cannot be read"
            return False, f"{why}: {error or 'no answer in time'}; {it.by_hand}"
        if found is None and (kept := self._custody.account(it.uid)):
            return await self._stop(it.app, kept, it.by_hand)
        account = None if found is None else secret_strings(found)
        if missing := credentials_missing(it.burst, account):
            if not it.deployed:
                return True, f"no app of it is known ({missing.partition(':')[0]})"
            why = f"{it.app} may run at Modal: {missing}; then run this again"
            return False, f"{why}, or {it.by_hand}; {it.finalizer_by_hand}"
        return await self._stop(it.app, account_of(it.burst, account or {}), it.by_hand)

    async def _copy(self, uid: str, entry: Entry) -> bool:
        """Whether nothing is left of an agent that the operator has kept an entry of; then that goes, too."""
        by_hand = f"modal app stop {entry.app}"
        stopped, words = await self._stop(entry.app, entry.account, by_hand)
        if not stopped:
            self._say(f"LEFT: {entry.agent}: {words}")
            return False
        try:
            async with asyncio.timeout(self._seconds() + REST_SECONDS / 2):
                await self._custody.drop(uid)
        except (ApiError, TimeoutError) as error:
            self._say(f"LEFT: {entry.agent}: a copy of its credentials: {error or 'no answer'}")
            return False
        return True

    async def _stop(self, app: str, account: Account, by_hand: str) -> tuple[bool, str]:
        """Tries until the end, for an app that is left behind costs money."""
        place = account.place(app)
        why, pause = "Modal did not answer in time", RETRY_SECONDS[0]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds()):
                while True:
                    try:
                        await self._burst.stop(place)
                        return True, f"stopped {app} at Modal"
                    except BurstError as error:
                        why = str(error)
                        if error.reason is BurstReason.CREDENTIALS_REFUSED:
                            break
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, RETRY_SECONDS[1])
        return False, f"{app} may still run at Modal: {why}: {by_hand}"

    async def _let_go(self, it: Claim) -> tuple[bool, str]:
        """Takes off the finalizer, only if nobody changes the agent meanwhile: others have finalizers too."""
        where, why = (
            path("VoiceAgent", it.namespace, it.name),
            "others change the agent all the time",
        )
        try:
            async with asyncio.timeout(self._seconds() + REST_SECONDS / 2):
                for _ in range(CONFLICTS):
                    obj = await self._cluster.find(where)
                    finalizers = obj["metadata"].get("finalizers") or [] if obj else []
                    if obj is None or FINALIZER not in finalizers:
                        return True, "it has no finalizer any more"
                    body = {
                        "finalizers": [other for other in finalizers if other != FINALIZER],
                        "resourceVersion": obj["metadata"]["resourceVersion"],
                    }
                    with contextlib.suppress(_Conflict):
                        await self._patched(where, {"metadata": body})
                        return True, "finalizer removed"
        except (ApiError, TimeoutError) as error:
            why = str(error) or "no answer in time"
        return False, f"its finalizer stays: {why}: {it.finalizer_by_hand}"

    async def _patched(self, where: str, body: Json) -> None:
        try:
            await self._cluster.patch(where, body)
        except ApiError as error:
            if error.status in (404, 409):  # gone, or changed: look again
                raise _Conflict from error
            raise


class _Conflict(Exception):
    """The agent is not as it was."""


async def release(config: ReleaseConfig, say: Say, began: float) -> int:
    """Runs the command against the cluster that is at hand; its exit status, within the deadline.

    The deadline counts from `began`, a moment of `time.monotonic`.
    """
    end = began + config.deadline - min(REST_SECONDS, config.deadline / 4)
    burst = Burst(call_seconds=min(CALL_SECONDS, config.deadline / CALLS))
    async with await Cluster.connect() as cluster:
        try:
            custody = Custody(cluster, config.burst_secret)
            return await Release(cluster, burst, custody, say, end).run(config)
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REST_SECONDS / 3):
                    await burst.close()


def configured(arguments: Sequence[str]) -> ReleaseConfig:
    """What the flags say, or a ConfigError."""
    flags = parser().parse_args(arguments)
    return ReleaseConfig(
        deadline=flags.deadline,
        scale_down=parse_name("--scale-down", flags.scale_down),
        namespaces=tuple(dict.fromkeys(flags.namespace)),
        burst_secret=parse_name("--burst-secret", flags.burst_secret),
    )


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="trunkline-operator release",
        description="Stops the Modal apps of all VoiceAgents and takes Trunkline's finalizer off them.",
        epilog="Ends with 0 if nothing is left, else with 1 and a line about each that is.",
    )
    add = flags.add_argument
    add("--namespace", action="append", default=[], metavar="NS", help="repeatable; none means all")
    add(
        "--scale-down",
        default="",
        metavar="NS/NAME",
        help="the operator's Deployment: stops it first",
    )
    add(
        "--burst-secret",
        default="",
        metavar="NS/NAME",
        help="the operator's own copies of credentials: used, and emptied",
    )
    add(
        "--deadline",
        type=float,
        default=DEADLINE_SECONDS,
        metavar="SECONDS",
        help=f"for all of it ({DEADLINE_SECONDS:g})",
    )
    return flags
