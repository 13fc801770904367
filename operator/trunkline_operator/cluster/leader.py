"""Waits until this operator holds the Lease, keeps it, and gives it back.

The `kubernetes` package has an election too (`kubernetes.aio.leaderelection`, 37.0). It is not used: a broken
connection ends its renewals with an exception that leaves the work running, a request has no deadline and so
can outlast the Lease, expiry is measured by the day's clock, and it cannot give a Lease back, so that each
rollout would wait for 15 s.

The loss of the Lease ends the process at once and without any tidying, for tidying writes. What the process
has sent before may still arrive: pods are created under fixed names, patched and deleted by uid, and gateways
refuse the routes of an earlier epoch. A process that was stopped for a while, and wakes up past its time, is
kept from writing by `Cluster.may_write`, which asks `Tenure.holds` before each request.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final, NoReturn

from trunkline_operator import metrics
from trunkline_operator.agent.spec import Json
from trunkline_operator.cluster.client import ApiError, Cluster, path
from trunkline_operator.cluster.lease import (
    Candidate,
    Create,
    Lease,
    Left,
    Lost,
    Read,
    Sleep,
    Write,
)
from trunkline_operator.config import ConfigError

LOST_STATUS: Final = 3
"""The exit status of a process that lost the Lease."""

# A Lease that is not given back by then runs out by itself.
LEAVE_SECONDS: Final = 3.0

log = logging.getLogger("trunkline.leader")


def identity(env: Mapping[str, str]) -> str:
    """This process among all that want the Lease; a container that restarts keeps its pod's name."""
    return f"{env.get('POD_ID') or socket.gethostname()}_{secrets.token_hex(4)}"


def end_process(why: str) -> NoReturn:
    """Ends this process with LOST_STATUS before it can do anything more."""
    log.critical("%s: this operator ends, so that it does not act beside another", why)
    os._exit(LOST_STATUS)


class Tenure:
    """The Lease in the hands of this operator."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, candidate: Candidate) -> None:
        self._cluster = cluster
        self._namespace, self._name = namespace, name
        self._candidate = candidate
        self._trouble = ""

    def __repr__(self) -> str:
        return f"Tenure({self._namespace}/{self._name}, {self._candidate!r})"

    @property
    def epoch(self) -> int:
        """Above that of any operator which had the Lease before."""
        return self._candidate.known.epoch if self._candidate.known else 0

    def holds(self) -> bool:
        """This operator may act, now."""
        return self._candidate.holds(time.monotonic())

    async def won(self, standby: Callable[[str], None]) -> None:
        """Waits until this operator holds the Lease; `standby(holder)` is told whom it waits for."""
        told = ""
        while not self.holds():
            await self._step()
            holder = self._candidate.known.holder if self._candidate.known else ""
            if holder not in ("", told, self._candidate.identity):
                told = holder
                log.info("stands by: %s has the Lease", holder)
                standby(holder)
        log.info("has the Lease as %s, epoch %d", self._candidate.identity, self.epoch)

    async def keep(self) -> str:
        """Renews the Lease; returns why it is lost."""
        while not isinstance(action := await self._step(), Lost):
            pass
        return action.why

    async def leave(self) -> None:
        """Gives the Lease back, so that another operator need not wait for it to run out."""
        self._candidate.leave()
        with contextlib.suppress(TimeoutError, ConfigError):
            async with asyncio.timeout(LEAVE_SECONDS):
                while not isinstance(await self._step(), Left):
                    pass

    async def _step(self) -> Read | Create | Write | Sleep | Lost | Left:
        action = self._candidate.next(time.monotonic(), time.time())
        match action:
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Read() | Create() | Write():
                await self._request(action)
            case Lost() | Left():
                pass
        return action

    async def _request(self, action: Read | Create | Write) -> None:
        candidate, sent = self._candidate, time.monotonic()
        try:
            async with asyncio.timeout(candidate.patience(sent)):
                found = await self._send(action)
        except TimeoutError:
            self._fail(f"no answer within {time.monotonic() - sent:.1f} s")
        except ApiError as error:
            if error.status == 409:
                candidate.refused()
            elif error.status == 404 and isinstance(action, Write):
                candidate.read(None, time.monotonic())
            else:
                self._unable(error)
        except asyncio.CancelledError:
            candidate.failed(time.monotonic())  # it may have been done: to leave, it is read first
            raise
        else:
            self._answer(action, found, sent)

    async def _send(self, action: Read | Create | Write) -> Json | None:
        where = path("Lease", self._namespace, self._name)
        match action:
            case Read():
                return await self._cluster.find(where)
            case Create(body):
                return await self._cluster.create(path("Lease", self._namespace), body)
            case Write(body):
                return await self._cluster.patch(where, body)

    def _answer(self, action: Read | Create | Write, found: Json | None, sent: float) -> None:
        if self._trouble:
            log.info("the Lease can be reached again")
            self._trouble = ""
        lease = Lease.of(found) if found else None
        if isinstance(action, Read):
            self._candidate.read(lease, time.monotonic())
        elif lease:
            self._candidate.wrote(lease, sent)
        else:  # another has just made it
            self._candidate.refused()

    def _unable(self, error: ApiError) -> None:
        """Raises ConfigError for what only a person can mend, unless this operator acts."""
        if error.status in (403, 404) and not self.holds():
            where = f"{self._namespace}/{self._name}"
            raise ConfigError(
                f"the Lease {where} of --lease cannot be used: {error.message}. The namespace must exist "
                "and the operator may get, create and patch the Lease, as with the chart's Role"
            )
        self._fail(str(error))

    def _fail(self, trouble: str) -> None:
        self._candidate.failed(time.monotonic())
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("the Lease cannot be reached: %s", trouble)


@contextlib.asynccontextmanager
async def leading(
    cluster: Cluster,
    lease: tuple[str, str],
    candidate: Candidate,
    standby: Callable[[str], None],
) -> AsyncIterator[Tenure]:
    """Yields once this operator may act; gives the Lease back at the end.

    `cluster` is for the Lease alone: its requests wait for no others.
    """
    tenure = Tenure(cluster, *lease, candidate)

    async def keep() -> None:
        try:
            why = await tenure.keep()
        except Exception as error:  # a bug: as good as lost
            log.exception("the Lease is not renewed any more")
            why = repr(error)
        end_process(why)

    keeping: asyncio.Task[None] | None = None
    try:
        await tenure.won(standby)
        keeping = asyncio.create_task(keep(), name="lease")
        metrics.LEADER.set(1)
        yield tenure
    finally:
        metrics.LEADER.set(0)
        if keeping:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        await tenure.leave()
