"""How many containers an agent's workspace lets it have, as Modal's refusals tell: limits of a plan are told nowhere.

When Modal refuses a session or a setting for a limit, as many containers as ran then are taken for all that the
agent gets. No more stand by, so that Modal is not asked again and again for what it does not give. After a while
more are asked for, and after each refusal then the while is twice as long. Callers are not held back by it: each
of them who finds no warm slot tries Modal, and if more containers run after all, there was no such limit.

Other agents of the workspace count towards the same limit, so it may be another number each time. Modal refuses a
rush of requests in the same words as a container too many; then the count soon rises, and the limit is forgotten.

Pure: the time is an argument.
"""

from dataclasses import dataclass, replace
from typing import Final

from trunkline_operator.agent.spec import Json, epoch
from trunkline_operator.burst.standby import Scaling

FIRST_WAIT: Final = 300.0  # seconds; as long as a container stays that stood by for a spike
LONGEST_WAIT: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Of one agent."""

    containers: int  # that ran when Modal refused more
    since: float  # when it first did
    at: float  # when it did after a wait, or first
    refusals: int = 1  # of those

    @property
    def wait(self) -> float:
        return float(min(FIRST_WAIT * 2 ** min(self.refusals - 1, 10), LONGEST_WAIT))

    @property
    def until(self) -> float:
        """From then on more is asked for."""
        return self.at + self.wait

    @property
    def forgotten(self) -> float:
        """When nobody was refused again for as long, it says nothing any more."""
        return self.until + self.wait


def current(limit: Limit | None, now: float) -> Limit | None:
    """The limit, unless it is too old to say anything."""
    return None if limit is None or now >= limit.forgotten else limit


def refused(limit: Limit | None, containers: int, now: float) -> Limit | None:
    """After Modal refused more while so many ran. Where none ran it does not tell how many may."""
    known = current(limit, now)
    if containers < 1:
        return known
    if known is None:
        return Limit(containers=containers, since=now, at=now)
    if now < known.until:
        return replace(known, containers=containers)
    return replace(known, containers=containers, at=now, refusals=known.refusals + 1)


def counted(limit: Limit | None, containers: int, now: float) -> Limit | None:
    """After a count without a refusal: if more run, it was none."""
    known = current(limit, now)
    return None if known is None or containers > known.containers else known


def recalled(status: Json) -> Limit | None:
    """What an earlier operator wrote (`told`); None if there is none."""
    since, until = epoch(status.get("since")), epoch(status.get("until"))
    if since is None or until is None:
        return None
    refusals = status.get("refusals", 1)
    limit = Limit(containers=status["containers"], since=since, at=until, refusals=refusals)
    return replace(limit, at=until - limit.wait)


def within(scaling: Scaling, limit: Limit | None, running: int, now: float) -> Scaling:
    """What may stand by of what is wanted, where calls need so many containers already.

    The most stays as it is: a caller whom Modal refuses goes on at once, and one who waits at a most does not.
    """
    if limit is None or now >= limit.until:
        return scaling
    spare = max(limit.containers - running, 0)
    return replace(
        scaling,
        minimum=min(scaling.minimum, limit.containers),
        buffer=min(scaling.buffer, spare),
    )
