"""Limits of a tenant that calls at several gateways, over real sockets: the stated tolerance, and no more."""

import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from access_rig import jwt_access, tenants, token
from gateway_rig import (
    FakeWorker,
    a_gateway,
    a_route,
    call,
    on_uvloop,
    refused,
    routes_text,
)
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from trunkline_runtime.gateway.process import Running
from trunkline_runtime.gateway.routes_reader import routes_from

GATEWAYS = 3


@contextlib.asynccontextmanager
async def replicas(**limits: int) -> AsyncIterator[list[Running]]:
    """Gateways that have been dealt a third each, and a worker that has room at all of them."""
    limited = tenants()
    limited["limits"] |= limits
    route = a_route(access=jwt_access(tenants=limited))
    routes = routes_from(json.loads(routes_text(route)) | {"share": 1 / GATEWAYS})
    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(a_gateway()) for _ in range(GATEWAYS)]
        for gateway in found:
            gateway.gateway.take(routes, "operator")
        await stack.enter_async_context(FakeWorker(slots=64).serving(*found))
        yield found


async def greedy(gateways: list[Running], shown: str, *, keeps: bool) -> list[ClientConnection]:
    """Calls at each gateway until it says no."""
    got = []
    for gateway in gateways:
        with contextlib.suppress(InvalidStatus):
            while True:
                got.append(await call(gateway, key=shown))
                if not keeps:
                    await got[-1].close()
        assert (await refused(call(gateway, key=shown))).status_code == 429
    return got


@pytest.mark.parametrize("limit", [1, 3, 4, 6])
def test_calls_at_once_exceed_the_limit_by_less_than_one_a_gateway(limit: int) -> None:
    @on_uvloop
    async def run() -> None:
        async with replicas(concurrentCalls=limit) as gateways:
            got = await greedy(gateways, token(), keeps=True)
            assert limit <= len(got) <= limit + GATEWAYS - 1
            # And another tenant has its own.
            async with call(gateways[0], key=token(org="other")):
                pass
            for connection in got:
                await connection.close()

    run()


def test_starts_of_a_minute_are_the_limit_itself() -> None:
    @on_uvloop
    async def run() -> None:
        async with replicas(startsPerMinute=6) as gateways:
            got = await greedy(gateways, token(), keeps=False)
            # While the test ran, a slow machine may have earned it one more at each.
            assert 6 <= len(got) <= 6 + GATEWAYS
            answer = await refused(call(gateways[0], key=token()))
            assert 0 < int(answer.headers["Retry-After"]) <= 30

    run()
