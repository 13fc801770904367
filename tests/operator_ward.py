"""An operator that may be killed at any request, and is followed by the next."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

from api_relay import ApiRelay, Request, let_be, let_pass
from forked_operator import Nursery
from operator_rig import Json, World

from trunkline_runtime.contract import ANNOTATION_DRAINING

WATCHES = 3
"""Of an operator with all rights: agents, pods and nodes."""


class Ward:
    """A world whose operator may be killed at a request, and is followed by the next."""

    def __init__(self, world: World, relay: ApiRelay, nursery: Nursery) -> None:
        self.world, self.relay = world, relay
        self.pid = 0
        self.kills = 0
        self._nursery = nursery
        self._env = world.env | {"KUBECONFIG": str(relay.kubeconfig(world.logs))}

    def start(self) -> None:
        log = self.world.logs / "operator.log"
        self.pid = self._nursery.start(self.world.arguments(), self._env, log)

    async def started(self) -> None:
        """Starts an operator and waits until it watches."""
        self.start()
        await self.relay.until(lambda it: sum(it.watches.values()) == WATCHES)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def next(self) -> None:
        """Another operator, in place of one that was killed."""
        self.kills += 1
        await self.relay.until(lambda it: not any(it.watches.values()) and not it.passing)
        self.start()

    @contextlib.contextmanager
    def killing(self, number: int, *, answered: bool) -> Iterator[asyncio.Event]:
        """At that request from now on, before the API server gets it or before the operator gets the answer.

        The event is set once that has happened.
        """
        killed = asyncio.Event()

        async def fatal(request: Request) -> None:
            if request.number >= number and not killed.is_set():
                killed.set()
                self.kill()
                await asyncio.Event().wait()  # this ends when the connection does

        async def fatal_after(request: Request, _: int) -> bool:
            await fatal(request)
            return False

        self.relay.forget()
        if answered:
            self.relay.after = fatal_after
        else:
            self.relay.before = fatal
        try:
            yield killed
        finally:
            self.relay.before, self.relay.after = let_pass, let_be


def leaving(pod: Json) -> bool:
    """It is to go, or is going."""
    metadata = pod["metadata"]
    return "deletionTimestamp" in metadata or ANNOTATION_DRAINING in metadata.get("annotations", {})
