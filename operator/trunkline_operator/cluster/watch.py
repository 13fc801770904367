"""A watch of pods or nodes: what happens to them, told as it happens, for as long as the operator acts.

Agents are watched by kopf, which has a queue, a task and a memory for each object, and makes objects of all that an
event holds: 0.6 ms of CPU an event when 150 agents change together, where this takes 0.1 of a pod's. Three of the five
events of a replacement are of pods.

Rules
- A watch begins at the version of a list. After it was lost it goes on from the last version that it has heard of, so
  that nothing is missed between two connections.
- Where the API server has forgotten that version (410), or says anything else in place of an event, a list comes first.
- The API server says something once a minute, be it a bookmark. A watch that is silent for longer is lost.
- A watch that was lost begins anew later each time, at random, and not before the API server wants it to.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import aiohttp
import msgspec

from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import ApiError, Cluster

# The API server ends a watch after some time between these, so that not all begin anew at once.
SECONDS: Final = (240, 300)
# Bookmarks come once a minute, or a little later (k8s.io/apiserver pkg/storage/cacher, `bookmarkFrequency`).
SILENCE_SECONDS: Final = 90.0
# Between two tries. kopf's watches of agents and the mirror's lists try beside it.
PAUSES: Final = (0.1, 10.0)
# Of an answer at a time: 15 events of pods, which take less than 1 ms. Then others have their turn.
PART: Final = 2**16
# Of answers after which a watch may go on from its version. 200 is of what was said in a watch that had begun.
PASSING: Final = frozenset({0, 401, 403, 429, 500, 502, 503})
# etcd holds 1.5 MB an object, and its JSON may be longer.
LONGEST_LINE: Final = 2**23

Thing = TypeVar("Thing", bound=listed.Object)

log = logging.getLogger("trunkline.watch")


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Trouble(msgspec.Struct):
    """What the API server says in place of an event (`Status`)."""

    reason: str = ""
    message: str = ""


class _Mark(msgspec.Struct):
    metadata: listed.Mark


_EVENT: Final = msgspec.json.Decoder(_Event)
_TROUBLE: Final = msgspec.json.Decoder(_Trouble)
_MARK: Final = msgspec.json.Decoder(_Mark)


@dataclass(slots=True)
class Course:
    """Where a watch is, and when it goes on. Pure."""

    version: int = 0  # from which it goes on; 0 = a list comes first
    failures: int = 0  # in a row
    told: str = ""  # the trouble that people know of

    def heard(self, version: int) -> None:
        self.version, self.failures = version, 0

    def lost(self, *, forgotten: bool = False) -> None:
        """It has ended without a word, or in trouble; `forgotten`: it cannot go on from its version."""
        self.failures += 1
        if forgotten:
            self.version = 0

    def pause(self, chance: float, asked: float = 0.0) -> float:
        """Seconds until it goes on, where the server asks for so many; `chance` is from 0 to 1."""
        first, longest = PAUSES
        # 2 ** 7 is past the bound already; the exponent must not grow for weeks.
        return max(min(first * 2.0 ** min(self.failures, 7), longest) * (0.5 + chance / 2), asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch(Generic[Thing]):
    """Of what is at a path of the API, and has a label where one is named.

    `hear` gets each event, `lists` has all taken in as it is now and returns the version of that.
    """

    cluster: Cluster
    path: str
    label: str = ""
    read: Callable[[bytes], Thing]
    lists: Callable[[], Awaitable[int]]
    hear: Callable[[str, Thing], None]
    silence: float = SILENCE_SECONDS  # after which it is lost

    async def follow(self, version: int = 0) -> None:
        """Goes on until it is cancelled. `version` is that of a list that was taken in; 0: one comes first."""
        course = Course(version)
        while True:
            asked = 0.0
            try:
                await self._follow(course)
            except ApiError as error:
                course.lost(forgotten=error.status not in PASSING)
                asked = error.wait
                self._tell(course, str(error))
            except Exception:  # a bug: whatever it has missed is listed
                course.lost(forgotten=True)
                log.exception("%s: the watch begins anew", self.path)
            await asyncio.sleep(course.pause(random.random(), asked))

    async def _follow(self, course: Course) -> None:
        """One connection, until the API server ends it."""
        if not course.version:
            course.version = await self.lists()
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": str(course.version),
            "timeoutSeconds": str(random.randint(*SECONDS)),
        }
        if self.label:
            params["labelSelector"] = self.label
        silent = True
        async with self.cluster.watching(self.path, params, self.silence) as answer:
            if course.told:
                log.info("%s: is watched again", self.path)
                course.told = ""
            async with contextlib.aclosing(lines(answer)) as events:
                async for line in events:
                    course.heard(self._taken(line))
                    silent = False
        if silent:
            course.lost()

    def _taken(self, line: bytes) -> int:
        """Takes one event in; its version. Raises ApiError with status 200 for what is none."""
        try:
            event = _EVENT.decode(line)
            if event.type == "ERROR":
                trouble = _TROUBLE.decode(event.object)
                raise ApiError(200, trouble.reason, trouble.message)
            if event.type == "BOOKMARK":
                return int(_MARK.decode(event.object).metadata.version)
            thing = self.read(event.object)
        except (ValueError, msgspec.MsgspecError) as failure:
            raise ApiError(200, "Unreadable", f"{self.path}: {failure}") from failure
        try:
            self.hear(event.type, thing)
        except Exception:  # a bug; one object's trouble is not another's
            log.exception("%s: an event cannot be taken in", self.path)
        return int(thing["metadata"]["resourceVersion"])

    def _tell(self, course: Course, trouble: str) -> None:
        """A connection may break, and a version is forgotten now and then: only what lasts is a trouble."""
        if course.failures > 1 and trouble != course.told:
            log.warning("%s cannot be watched: %s", self.path, trouble)
            course.told = trouble


async def lines(answer: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    """The whole lines of an answer, as they come."""
    rest = b""
    async for part in answer.iter_chunked(PART):
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            if line:
                yield line
        if len(rest) > LONGEST_LINE:
            raise ApiError(200, "Unreadable", f"an event of more than {LONGEST_LINE:,} bytes")
        await asyncio.sleep(0)
