"""Calls through a gateway to warm workers, on real sockets: how they begin, go on and end."""

from gateway_rig import FakeWorker, a_gateway, a_route, call, on_uvloop, until


@on_uvloop
async def test_a_call_is_relayed_to_a_warm_worker() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        async with call(gateway) as caller:
            await caller.send("hello")
            assert await caller.recv() == "hello"
            assert worker.live
        await until(lambda: not worker.live)
