"""How many burst containers stand by: what the agent asks for, more while its warm slots run short, none at its
budget's cap.

Modal keeps `buffer_containers` only while a server is in use, so containers that are to be there before the first
caller are `min_containers`. Both are raised when more calls are coming than there are free warm slots, and given
back some time after. Nothing here is a deployment: all of it are settings of a live server's autoscaler.

Pure: what is known goes in, and the time is an argument.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from trunkline_operator.agent.spec import Burst, Region

# What comes within so long is looked at. Restores of Modal's whole fleet took 13.8 s on average in spring 2026.
AHEAD_SECONDS: Final = 15.0
# Between two raises. Each is a request or more, and a workspace has tens a second for all its agents.
GAP_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """One server's autoscaler, in containers; the window is in seconds."""

    minimum: int  # there without any call
    buffer: int  # idle while there are calls
    maximum: int
    window: int  # after which a container without calls goes


Scalings = Mapping[Region, Scaling]
"""Of each region's server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rush:
    """The load as burst meets it."""

    free: int  # warm slots
    burst: int  # calls at Modal
    growth: float  # calls that come less those that end, a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What was last told to Modal, and when; None = nothing since the deployment or this operator's start."""

    scalings: Scalings | None = None
    since: float = 0.0


def asked(burst: Burst) -> Scaling:
    """What the agent asks for at rest."""
    return Scaling(
        minimum=burst.min_containers,
        buffer=burst.buffer_containers,
        maximum=burst.max_containers,
        window=burst.scaledown_window_seconds,
    )


def needed(burst: Burst, rush: Rush) -> Scaling:
    """What the load of this moment asks for, never less than the agent and never more than its most."""
    rest = asked(burst)
    coming = max(rush.growth, 0.0) * AHEAD_SECONDS
    short = coming - rush.free
    if short <= 0:
        return rest
    slots, most = burst.slots_per_container, burst.max_containers
    return replace(
        rest,
        minimum=min(max(rest.minimum, _containers(rush.burst + short, slots)), most),
        buffer=min(max(rest.buffer, _containers(coming, slots)), most),
    )


def _containers(calls: float, slots: int) -> int:
    return -int(-calls // slots)


def at_cap(scaling: Scaling) -> Scaling:
    """For an agent whose budget is spent: no container is there without a call."""
    return replace(scaling, minimum=0, buffer=0)


def spread(scaling: Scaling, regions: Iterable[Region], shut: Collection[str]) -> Scalings:
    """Containers stand by where calls are tried first; a region that takes none is passed over."""
    regions = tuple(regions)
    front = next((region for region in regions if region not in shut), regions[0])
    return {region: scaling if region is front else at_cap(scaling) for region in regions}


def following(
    standing: Standing, wanted: Scalings, now: float, *, capped: bool = False, limited: bool = False
) -> tuple[Scalings | None, float]:
    """What to tell Modal now, None = nothing; and the seconds after which to ask again, 0 = on the next news.

    What was raised stays raised as long as a container without calls does, so that calls which come in waves do not
    stop and start containers; but not at a cap, nor beyond what Modal gives.
    """
    told, since = standing.scalings, standing.since
    if told == wanted:
        return None, 0.0
    if told is None or told.keys() != wanted.keys():
        return wanted, 0.0
    keep = max((to.window for to in wanted.values()), default=0)
    keeping = not (capped or limited) and now < since + keep
    due = {each: _raised(told[each], to) if keeping else to for each, to in wanted.items()}
    if due == told:
        return None, since + keep - now
    # Another most, or another window, is a person's wish.
    hurry = capped or any(_bounds(told[each]) != _bounds(to) for each, to in wanted.items())
    if not hurry and now < since + GAP_SECONDS:
        return None, since + GAP_SECONDS - now
    return due, since + keep - now if due != wanted else 0.0


def _raised(told: Scaling, to: Scaling) -> Scaling:
    """No fewer than before, as far as the most allows."""
    minimum, buffer = max(told.minimum, to.minimum), max(told.buffer, to.buffer)
    return replace(to, minimum=min(minimum, to.maximum), buffer=min(buffer, to.maximum))


def _bounds(scaling: Scaling) -> tuple[int, int]:
    return scaling.maximum, scaling.window
