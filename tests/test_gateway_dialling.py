"""A pod is dialled while it decides about a slot; whatever comes of it, no connection is left behind."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from gateway_rig import FakeWorker, a_gateway, a_route, call, on_uvloop, refused, until

pytestmark = pytest.mark.usefixtures("links")


class Hall:
    """Stands before a worker's data port, and counts who is there; it shows the first so many the door."""

    def __init__(self, worker: FakeWorker, cuts: int = 0) -> None:
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
                if self.came > self._cuts:
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


async def gone(hall: Hall) -> None:
    """Sooner than a worker gives up on somebody who says nothing, which is after ten seconds."""
    async with asyncio.timeout(5):
        await until(lambda: not hall.there)


@on_uvloop
async def test_a_pod_is_dialled_while_it_decides() -> None:
    worker = FakeWorker()
    worker.late = 0.5
    async with a_gateway(a_route()) as gateway, worker.serving(), Hall(worker).serving() as hall:
        async with worker.linked(gateway):
            calling = asyncio.create_task(call(gateway).__aenter__())
            await until(lambda: hall.there == 1)
            assert not worker.log.counts("reserved"), "it has granted nothing yet"
            caller = await calling
            await caller.send("hi")
            assert await caller.recv() == "hi"
            assert hall.came == 1
            await caller.close()
        await until(lambda: not hall.there)


@on_uvloop
async def test_one_that_is_full_is_left_and_so_is_one_whose_caller_goes() -> None:
    worker = FakeWorker(slots=1)
    worker.late = 0.2
    async with (
        a_gateway(a_route()) as gateway,
        worker.serving(),
        Hall(worker).serving() as hall,
        worker.linked(gateway),
    ):
        worker.reported, worker.slots = 1, 0
        await worker._tell()
        assert (await refused(call(gateway))).status_code == 503
        await gone(hall)
        assert hall.came == 1
        worker.reported, worker.slots, worker.late = None, 1, 5.0
        await worker._tell()
        calling = asyncio.create_task(call(gateway).__aenter__())
        await until(lambda: hall.there == 1)
        calling.cancel()
        await asyncio.wait([calling])
        await gone(hall)


@on_uvloop
async def test_one_that_let_nobody_wait_so_long_is_dialled_again_with_its_grant() -> None:
    worker = FakeWorker()
    worker.late = 0.3
    async with (
        a_gateway(a_route()) as gateway,
        worker.serving(),
        Hall(worker, cuts=1).serving() as hall,
        worker.linked(gateway),
    ):
        async with call(gateway) as caller:
            await caller.send("hi")
            assert await caller.recv() == "hi"
        assert hall.came == 2
        assert worker.log.counts("live") == 1
