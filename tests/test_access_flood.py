"""One tenant floods: what that costs another, measured beside the same without the flood, in one run."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator

from access_rig import jwt_access, tenants, token
from gateway_rig import (
    AGENT,
    SECONDS,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    on_uvloop,
    until,
)

from trunkline_runtime.gateway.process import Running

STARTS_PER_MINUTE = 6
GUARANTEED = 4
FLOOD_PER_SECOND = 50.0  # 500 times the limit
ROUNDS, CALLS = 5, 60
MOST_TIMES_QUIET = 2.0


class Flood:
    """A tenant that calls again at once whatever it is told; a socket and its bytes, so that it costs little itself."""

    def __init__(self, gateway: Running) -> None:
        self._port = gateway.port
        head = [
            f"GET /v1/realtime?model={AGENT} HTTP/1.1",
            "Host: x",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version: 13",
            f"Authorization: Bearer {token('ES256', org='noisy')}",
        ]
        self._head = "\r\n".join([*head, "", ""]).encode()
        self._held: list[asyncio.StreamWriter] = []
        self.told: list[int] = []

    async def _calls(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._held.append(writer)
        writer.write(self._head)
        status = int((await reader.readline()).split(b" ")[1])
        self.told.append(status)
        if status != 101:  # it keeps what it gets
            self._held.remove(writer)
            writer.close()

    async def _flows(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self._calls()
            due = max(due + 1 / FLOOD_PER_SECOND, loop.time() - 0.1)
            await asyncio.sleep(due - loop.time())

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        flowing = asyncio.create_task(self._flows())
        try:
            yield
        finally:
            flowing.cancel()
            await asyncio.gather(flowing, return_exceptions=True)

    def stop(self) -> None:
        for writer in self._held:
            writer.close()


async def admission_p99(gateway: Running, shown: str) -> float:
    """Seconds from a connection's first byte to its 101, of one caller after another. Every one is answered."""
    took = []
    for _ in range(CALLS):
        began = time.perf_counter()
        async with call(gateway, key=shown):
            took.append(time.perf_counter() - began)
    return statistics.quantiles(took, n=100)[98]


@on_uvloop
async def test_a_flood_at_many_times_its_limit_costs_a_quiet_tenant_no_slot_and_little_time() -> (
    None
):
    """The bound is that of the best of five pairs of rounds: what else the machine does spoils some, never all.

    A gateway that let the flood delay others would miss it in each.
    """
    own = {
        "noisy": {"startsPerMinute": STARTS_PER_MINUTE},
        "quiet": {"guaranteedSlots": GUARANTEED},
    }
    route = a_route(access=jwt_access(tenants=tenants(overrides=own)))
    async with a_gateway(route) as gateway, FakeWorker(slots=GUARANTEED + 4).serving(gateway):
        quiet, flood, began = token(org="quiet"), Flood(gateway), time.monotonic()
        ratios = []
        for _ in range(ROUNDS):
            alone = await admission_p99(gateway, quiet)
            async with flood.flowing():
                seen = len(flood.told)
                await until(lambda seen=seen: len(flood.told) > seen + 5)  # type: ignore[misc]
                ratios.append(await admission_p99(gateway, quiet) / alone)
        async with flood.flowing():
            await until(lambda: len(flood.told) >= 50 * STARTS_PER_MINUTE)
            mine = [await call(gateway, key=quiet) for _ in range(GUARANTEED)]
            for connection in mine:
                async with asyncio.timeout(SECONDS):
                    await connection.send("mine")
                    assert await connection.recv() == "mine"
        minutes = (time.monotonic() - began) / 60
        assert set(flood.told) <= {101, 429, 503}
        assert 1 <= flood.told.count(101) <= STARTS_PER_MINUTE * (1 + minutes)
        assert flood.told.count(429) > 40 * STARTS_PER_MINUTE
        assert min(ratios) <= MOST_TIMES_QUIET, ratios
        flood.stop()
        for connection in mine:
            await connection.close()
