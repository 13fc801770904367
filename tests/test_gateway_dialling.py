"""A pod is asked on a connection that stands by; whatever comes of it, none is left behind but the next."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection

import pytest
from gateway_rig import AGENT, FakeWorker, a_gateway, a_route, call, on_uvloop, refused, until

from trunkline_runtime.gateway.handshake import Address
from trunkline_runtime.gateway.standby import AGAIN_SECONDS, Standby

links = pytest.mark.usefixtures("links")


class Hall:
    """Stands before a worker's data port, and counts who is there.

    Those whose numbers are in `cuts` are shown the door at their first word.
    """

    def __init__(self, worker: FakeWorker, cuts: Collection[int] = ()) -> None:
        self.there = 0
        self.came = 0
        self._cuts = cuts
        self._worker = worker

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Hall"]:
        """From here on the worker names this as its port, to gateways that it greets later."""
        behind = self._worker.port
        tasks: set[asyncio.Task[None]] = set()

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    writer.write(data)
            writer.close()

        async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.came += 1
            self.there += 1
            try:
                if self.came in self._cuts:
                    await reader.read(1)
                    writer.transport.abort()
                    return
                inner, out = await asyncio.open_connection("127.0.0.1", behind)
                await asyncio.gather(pump(reader, out), pump(inner, writer))
                await asyncio.gather(out.wait_closed(), return_exceptions=True)
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
                self.there -= 1

        def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(enter(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        async with await asyncio.start_server(arrived, "127.0.0.1", 0) as server:
            self._worker.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                await until(lambda: not tasks)


@links
@on_uvloop
async def test_a_call_takes_the_connection_that_stands_by_and_leaves_one_behind() -> None:
    worker = FakeWorker()
    async with a_gateway(a_route()) as gateway, worker.serving(), Hall(worker).serving() as hall:
        async with worker.linked(gateway):
            await until(lambda: hall.there == 1)
            assert not worker.requests
            async with call(gateway) as caller:
                await caller.send("hi")
                assert await caller.recv() == "hi"
                await until(lambda: hall.came == 2)
                assert hall.there == 2
            await until(lambda: hall.there == 1)
            assert hall.came == 2
        await until(lambda: not hall.there)  # it goes with its control link


@links
@on_uvloop
async def test_callers_who_come_at_once_each_get_a_connection() -> None:
    worker = FakeWorker(slots=8)
    async with a_gateway(a_route()) as gateway, worker.serving(), Hall(worker).serving() as hall:
        async with worker.linked(gateway), contextlib.AsyncExitStack() as stack:
            await asyncio.gather(*(stack.enter_async_context(call(gateway)) for _ in range(8)))
            assert len(worker.live) == 8
            await until(lambda: hall.there == 9)
        await until(lambda: not hall.there)


@links
@on_uvloop
async def test_of_one_that_is_full_nothing_stays_and_nothing_of_one_whose_caller_goes() -> None:
    worker = FakeWorker(slots=1)
    worker.late = 0.2
    async with (
        a_gateway(a_route()) as gateway,
        worker.serving(),
        Hall(worker).serving() as hall,
        worker.linked(gateway),
    ):
        await until(lambda: hall.there == 1)
        worker.reported, worker.slots = 1, 0  # another gateway was quicker
        await worker.changed()
        assert (await refused(call(gateway))).status_code == 503
        await until(lambda: (hall.came, hall.there) == (2, 1))
        worker.reported, worker.slots, worker.late = None, 1, 5.0
        await worker.changed()
        calling = asyncio.create_task(call(gateway).__aenter__())
        await until(lambda: len(worker.requests) == 2)
        calling.cancel()
        await asyncio.wait([calling])
        async with asyncio.timeout(4):  # sooner than the worker answers
            await until(lambda: (hall.came, hall.there) == (3, 1))


@links
@on_uvloop
async def test_where_the_one_that_stood_by_is_gone_the_worker_is_dialled_anew() -> None:
    worker = FakeWorker()
    async with (
        a_gateway(a_route()) as gateway,
        worker.serving(),
        Hall(worker, cuts=[1]).serving() as hall,
        worker.linked(gateway),
    ):
        await until(lambda: hall.there == 1)
        async with call(gateway) as caller:
            await caller.send("hi")
            assert await caller.recv() == "hi"
            assert hall.came >= 2
            assert worker.log.counts("live") == 1
            (row,) = gateway.gateway._table.rows(AGENT)
            assert not gateway.gateway.workers._outliers._marks.get(row), "it is not to blame"


@links
@on_uvloop
async def test_a_worker_that_hangs_up_again_is_passed_over() -> None:
    bad, good = FakeWorker("bad", slots=1), FakeWorker("good", slots=2)
    async with (
        a_gateway(a_route()) as gateway,
        bad.serving(),
        Hall(bad, cuts=range(100)).serving(),
        bad.linked(gateway),
        good.serving(gateway),
    ):
        async with call(gateway) as caller:
            await caller.send("hi")
            assert await caller.recv() == "hi"
            assert good.live
        assert not bad.log.lines
        assert bad.row(gateway)["aside"] is True


# --- the connection by itself ----------------------------------------------------------------------------


class Port:
    """Takes connections and says nothing."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        self.came = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Address]:
        async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.came += 1
            self.writers.append(writer)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            self.writers.remove(writer)

        async with await asyncio.start_server(enter, "127.0.0.1", 0) as server:
            yield Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1])


@on_uvloop
async def test_it_is_made_once_looked_after_and_dropped() -> None:
    port, standby = Port(), Standby()
    async with port.serving() as address:
        assert standby.take(Address(host="127.0.0.1", port=1)) is None
        for _ in range(3):
            standby.look(address, 0.0)
        await until(lambda: port.came == 1 and "Leg" in repr(standby))
        standby.look(address, AGAIN_SECONDS)
        port.writers[0].transport.abort()
        await until(lambda: standby._leg is not None and not standby._leg.ready)
        assert standby.take(address) is None, "that one is gone"
        standby.renew(address)
        standby.renew(address)
        await until(lambda: port.came == 2 and standby._leg is not None)
        standby.renew(address)
        leg = standby.take(address)
        assert leg is not None
        assert leg.ready
        standby.drop()
        leg.abort()
        await until(lambda: not port.writers)
        await asyncio.sleep(0.05)
        assert standby.take(address) is None
        standby.renew(address)
        standby.look(address, 10 * AGAIN_SECONDS)
        await asyncio.sleep(0.05)
        assert port.came == 2, "after the worker has gone there is no other"


@on_uvloop
async def test_one_to_another_address_is_not_taken() -> None:
    port, standby = Port(), Standby()
    async with port.serving() as address:
        standby.look(address, 0.0)
        await until(lambda: standby._leg is not None)
        assert standby.take(Address(host=address.host, port=address.port, server_name="x")) is None
        await until(lambda: not port.writers)
        standby.drop()
        await until(lambda: not port.writers)


@on_uvloop
async def test_a_worker_that_cannot_be_reached_is_tried_again_once_in_a_while() -> None:
    port, standby = Port(), Standby()
    async with port.serving() as address:
        pass
    for now in (0.0, 1.0, AGAIN_SECONDS - 0.1):
        standby.look(address, now)
        await until(lambda: standby._connecting is None)
        assert standby._leg is None
    assert standby._next_look == AGAIN_SECONDS


@on_uvloop
async def test_a_worker_that_speaks_first_is_hung_up_on() -> None:
    port, standby = Port(), Standby()
    async with port.serving() as address:
        standby.look(address, 0.0)
        await until(lambda: standby._leg is not None)
        port.writers[0].write(b"HTTP/1.1 101 Switching Protocols\r\n")
        await until(lambda: standby._leg is not None and not standby._leg.ready)
        standby.drop()


@on_uvloop
async def test_it_yields_its_place_to_a_caller_and_comes_back_later() -> None:
    port = Port()
    async with port.serving() as address:
        standby, now = Standby(), asyncio.get_running_loop().time()
        standby.look(address, now - AGAIN_SECONDS)
        await until(lambda: len(port.writers) == 1 and standby._leg is not None)
        standby.yield_place()
        await until(lambda: not port.writers)
        standby.look(address, now + AGAIN_SECONDS / 2)
        await asyncio.sleep(0.05)
        assert port.came == 1
        standby.look(address, now + 2 * AGAIN_SECONDS)
        await until(lambda: port.came == 2 and standby._leg is not None)
        standby.drop()
        await until(lambda: not port.writers)
