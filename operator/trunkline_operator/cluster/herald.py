"""Posts Events in the background, in order: nobody waits for one, and a lost one is only logged."""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Iterable
from typing import Final, Self

from trunkline_operator import parts
from trunkline_operator.agent.spec import Json
from trunkline_operator.cluster.client import ApiError, Cluster, path
from trunkline_operator.decisions.events import Event, manifest

# A thousand agents in trouble at once; what comes on top is in their status anyway.
LONGEST_QUEUE: Final = 1000

log = logging.getLogger("trunkline.events")


class Herald:
    """An asynchronous context manager; what is not posted at its end is dropped."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._waiting: deque[Json] = deque(maxlen=LONGEST_QUEUE)
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._troubled = False

    def __repr__(self) -> str:
        return f"Herald({len(self._waiting)} waiting)"

    async def __aenter__(self) -> Self:
        self._task = parts.begin(self._post(), "the posting of Events")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await parts.end(self._task)

    def tell(self, obj: Json, events: Iterable[Event], now: float) -> None:
        """Posts Events of this agent soon. Of too many that wait, the oldest are dropped."""
        for event in events:
            # A name that no other has, so that a create that is sent twice makes one.
            name = f"{obj['metadata']['name']}.{secrets.token_hex(8)}"
            self._waiting.append(manifest(event, obj, name, now))
            self._news.set()

    async def _post(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                await self._create(self._waiting.popleft())

    async def _create(self, body: Json) -> None:
        try:
            await self._cluster.create(path("Event", body["metadata"]["namespace"]), body)
        except ApiError as error:
            # Told once until one gets through: a missing right would fill the log.
            if not self._troubled:
                log.warning("Events cannot be posted: %s", error)
            self._troubled = True
        else:
            self._troubled = False
