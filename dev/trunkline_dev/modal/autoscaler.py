"""How many containers a server should have, and which of them may go.

Pure: the clock is an argument. The rules are Modal's, as its guide to servers states them: the unit is the
session, a container with a live session is never stopped, a buffer is kept only while there is demand, and
a server without a target does not scale past one container.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the deployed server asks for."""

    minimum: int = 0
    maximum: int = 0  # 0: no limit
    buffer: int = 0  # containers above demand, while there is any
    scaledown_window: float = 60.0  # seconds that a container stays idle before it goes
    target: float = 0.0  # sessions per container; 0: one container serves whatever comes


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A container that is starting or serving; one that was told to stop is no member."""

    name: str
    ready: bool
    sessions: int
    idle_since: float  # when it became ready or lost its last session


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now. `start` and `stop` are never both set."""

    wanted: int
    start: int = 0
    stop: tuple[str, ...] = ()


def containers_wanted(settings: Settings, sessions: int) -> int:
    """Containers for so many sessions, live and waiting together."""
    if sessions == 0:
        wanted = 0
    elif settings.target == 0:
        wanted = 1
    else:
        wanted = math.ceil(sessions / settings.target) + settings.buffer
    wanted = max(wanted, settings.minimum)
    return min(wanted, settings.maximum) if settings.maximum else wanted


def decide(settings: Settings, members: Sequence[Member], waiting: int, now: float) -> Decision:
    """Starts what is missing at once; stops what is surplus, longest idle first, after the window."""
    wanted = containers_wanted(settings, waiting + sum(member.sessions for member in members))
    surplus = len(members) - wanted
    if surplus <= 0:
        return Decision(wanted=wanted, start=-surplus)
    idle = [
        member
        for member in members
        if member.ready
        and not member.sessions
        and now - member.idle_since >= settings.scaledown_window
    ]
    idle.sort(key=lambda member: member.idle_since)
    return Decision(wanted=wanted, stop=tuple(member.name for member in idle[:surplus]))
