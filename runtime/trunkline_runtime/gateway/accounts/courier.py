"""Carries records to a collector by HTTP, at least once each.

A call's end only leaves its record in a queue. One task puts what is there into the spool, another sends the
spool's batches one after the other: `POST`, newline-delimited JSON, `Idempotency-Key` with the batch's name. A
batch that came twice has the same key and the same records, and a record's own identity is its `call`.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeVar

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge

from trunkline_runtime.contract import CallRecord
from trunkline_runtime.gateway.accounts.record import as_line
from trunkline_runtime.gateway.accounts.spool import Batch, Spool

log = logging.getLogger("trunkline.ledger")

Made = TypeVar("Made")

QUEUE_RECORDS: Final = 10_000  # calls that end while the disk stands still
# What a collector will refuse again however often it is asked: the batch itself is at fault.
HOPELESS: Final = frozenset({400, 405, 411, 413, 415, 422})


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """Where records are sent, and how patiently; times in seconds."""

    url: str
    token: str = field(default="", repr=False)  # sent as a bearer; "" for none
    gather: float = 0.2  # between two batches, so that a busy gateway sends many calls at once
    answer: float = 10.0  # for one request, all of it
    retry: tuple[float, float] = (0.5, 30.0)  # the first pause after a failure, and the longest
    farewell: float = 5.0  # for what is left when the gateway ends


class Verdict(Enum):
    """What a collector said of a batch."""

    TAKEN = "taken"
    HOPELESS = "hopeless"
    LATER = "later"


def verdict(status: int) -> Verdict:
    """By the response's status. A wrong token or path can be mended, so it is tried again."""
    if 200 <= status < 300:
        return Verdict.TAKEN
    return Verdict.HOPELESS if status in HOPELESS else Verdict.LATER


def pause(failures: int, chance: float, bounds: tuple[float, float]) -> float:
    """Seconds until the next try after so many failures in a row; `chance` is from 0 to 1.

    Doubling with half of it random, so that gateways do not come back as one.
    """
    first, longest = bounds
    most = min(first * 2.0 ** min(failures - 1, 16), longest)
    return most / 2 + most / 2 * chance


class CourierMetrics:
    """What alerts ask for. All outcomes are there from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        records = Counter(
            "trunkline_ledger_records",
            "Records for the collector: delivered, dropped (no room in the spool), rejected (by it)",
            ["outcome"],
            registry=registry,
        )
        self.delivered = records.labels("delivered")
        self.dropped = records.labels("dropped")
        self.rejected = records.labels("rejected")
        self.failures = Counter(
            "trunkline_ledger_failures",
            "Requests that the collector did not take",
            registry=registry,
        )
        self.backlog = Gauge(
            "trunkline_ledger_backlog_bytes", "Records that wait in the spool", registry=registry
        )


class Courier:
    """One gateway's. `keep` is all that a call's end waits for."""

    def __init__(self, collector: Collector, spool: Spool, registry: CollectorRegistry) -> None:
        self._collector = collector
        self._spool = spool
        self._metrics = CourierMetrics(registry)
        self._queue: deque[bytes] = deque()
        self._queued = asyncio.Event()
        self._spooled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "ledger")  # one: a spool is used by one at a time
        self._full = False  # told of, until a batch is taken
        self._failures = 0  # in a row
        self._under_way: asyncio.Task[bool] | None = None
        self._client = httpx.AsyncClient(
            trust_env=False,
            timeout=collector.answer,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=60.0),
        )

    def __repr__(self) -> str:
        return f"<Courier queue={len(self._queue)} failures={self._failures} {self._spool!r}>"

    def keep(self, record: CallRecord) -> None:
        """Leaves a record to be sent."""
        if len(self._queue) >= QUEUE_RECORDS:
            self._queue.popleft()
            self._lost(1)
        self._queue.append(as_line(record))
        self._queued.set()

    async def run(self) -> None:
        """Works until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._shelving())
            tasks.create_task(self._sending())

    async def close(self) -> None:
        """Sends what is left, for a moment; the rest stays in a spool on disk. To be called after `run`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._collector.farewell):
                if self._under_way is not None:
                    await self._under_way
                await self._shelve()
                while (batch := await self._apart(self._spool.oldest)) is not None:
                    if not await self._sent(batch):
                        break
        await self._client.aclose()
        await self._apart(self._spool.close)
        self._thread.shutdown()
        if waiting := self._spool.backlog():
            log.warning("records of calls were not sent", extra={"bytes": waiting})

    # --- inside ---

    async def _shelving(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            await self._shelve()
            self._spooled.set()

    async def _shelve(self) -> None:
        """Moves what is queued into the spool."""
        lines, self._queue = self._queue, deque()
        if lost := await self._apart(lambda: self._spool.append(lines)):
            self._lost(lost)

    async def _sending(self) -> None:
        while True:
            self._spooled.clear()
            batch = await self._apart(self._spool.oldest)
            if batch is None:
                await self._spooled.wait()
            elif await self._not_cut_off(batch):
                await asyncio.sleep(self._collector.gather)
            else:
                retry = self._collector.retry
                await asyncio.sleep(pause(self._failures, random.random(), retry))

    async def _not_cut_off(self, batch: Batch) -> bool:
        """As `_sent`, which `close` lets come to its end: else what the collector has just taken comes twice."""
        self._under_way = asyncio.create_task(self._sent(batch))
        return await asyncio.shield(self._under_way)

    async def _sent(self, batch: Batch) -> bool:
        """Whether the collector is through with the batch."""
        found, why = await self._post(batch)
        if found is Verdict.LATER:
            self._failures += 1
            self._metrics.failures.inc()
            if self._failures == 1:
                log.warning(
                    "the ledger's collector takes nothing: records wait", extra={"why": why}
                )
            return False
        if found is Verdict.HOPELESS:
            self._metrics.rejected.inc(batch.records)
            extra = {"why": why, "records": batch.records}
            log.error("the ledger's collector will not take these records: dropped", extra=extra)
        else:
            self._metrics.delivered.inc(batch.records)
            if self._failures:
                log.info("the ledger's collector takes records again")
            self._failures, self._full = 0, False
        await self._apart(lambda: self._spool.done(batch))
        return True

    async def _post(self, batch: Batch) -> tuple[Verdict, str]:
        headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": batch.name}
        if self._collector.token:
            headers["Authorization"] = f"Bearer {self._collector.token}"
        try:
            async with asyncio.timeout(self._collector.answer):
                async with self._client.stream(
                    "POST", self._collector.url, content=batch.body, headers=headers
                ) as response:  # its body is nobody's concern, however long
                    status = response.status_code
        except httpx.HTTPError as error:
            return Verdict.LATER, type(error).__name__  # its text may name the URL
        except TimeoutError:
            return Verdict.LATER, "no answer in time"
        return verdict(status), f"HTTP {status}"

    def _lost(self, records: int) -> None:
        self._metrics.dropped.inc(records)
        if not self._full:
            self._full = True
            log.error("the ledger's spool is full: the oldest records are dropped")

    async def _apart(self, work: Callable[[], Made]) -> Made:
        """Runs what may block on the disk on the spool's own thread, where alone the spool is touched."""

        def done() -> tuple[Made, int]:
            return work(), self._spool.backlog()

        made, backlog = await asyncio.get_running_loop().run_in_executor(self._thread, done)
        self._metrics.backlog.set(backlog)
        return made
