"""The stock `moshi.client` calls a real worker through a real gateway; only its sound card is played.

What drives its callbacks here is a clock that hands over and takes blocks of 80 ms, as PortAudio does.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import aiohttp
import numpy as np
import pytest
import sphn
import torch
from gateway_rig import AGENT, KEY, a_gateway, a_route
from moshi_rig import models
from numpy.typing import NDArray
from test_worker_calls import signed
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from worker_rig import PATIENCE, FakeGateway, append, worker, worker_config

from trunkline_runtime.contract import MOSHI_PATH, REALTIME_PATH
from trunkline_runtime.engine import SAMPLE_RATE, Engine
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.gateway.process import Running
from trunkline_runtime.worker.control import Endpoint
from trunkline_runtime.worker.host import WorkerHost
from trunkline_runtime.worker.metrics import WorkerMetrics
from trunkline_runtime.worker.server import CallServer
from trunkline_runtime.worker.tickets import LinkTickets

torch.set_num_threads(1)

BLOCK = 1920
WORKER_KEY = "worker-key-of-the-tests"


class SoundCard(ModuleType):
    """What `moshi.client` uses of the module `sounddevice`: a tone is spoken, what is played is kept."""

    def __init__(self) -> None:
        super().__init__("sounddevice")
        self.played: list[NDArray[np.float32]] = []
        self.at = 0

    def InputStream(self, *, callback: Callable[..., None], **_: Any) -> "Stream":
        def speak() -> None:
            phases = (np.arange(BLOCK) + self.at) * 2 * np.pi * 440 / SAMPLE_RATE
            self.at += BLOCK
            callback((0.3 * np.sin(phases)).astype(np.float32)[:, None], BLOCK, None, None)

        return Stream(speak)

    def OutputStream(self, *, callback: Callable[..., None], **_: Any) -> "Stream":
        def play() -> None:
            block = np.zeros((BLOCK, 1), np.float32)
            callback(block, BLOCK, None, None)
            self.played.append(block[:, 0])

        return Stream(play)

    def loud(self) -> int:
        """Blocks in which something was heard."""
        return sum(float(np.abs(block).max()) > 0.02 for block in list(self.played))


class Stream:
    """Calls back every 80 ms, on a thread of its own."""

    def __init__(self, block: Callable[[], None]) -> None:
        self._block = block
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            self._block()
            due += BLOCK / SAMPLE_RATE


class Printer:
    """Where the client writes."""

    def __init__(self) -> None:
        self.text = ""
        self.complaints: list[str] = []

    def print_token(self, token: str) -> None:
        self.text += token

    def log(self, level: str, message: str) -> None:
        if level != "info":
            self.complaints.append(message)

    def print_header(self) -> None: ...

    def print_pending(self) -> None: ...

    def print_lag(self) -> None: ...


@pytest.fixture
def card() -> Iterator[SoundCard]:
    """`moshi.client` with a sound card, though the machine has none."""
    card = SoundCard()
    sys.modules["sounddevice"] = card
    sys.modules.pop("moshi.client", None)
    yield card
    del sys.modules["sounddevice"], sys.modules["moshi.client"]


@contextlib.asynccontextmanager
async def talking(url: str) -> AsyncIterator[Printer]:
    """`moshi.client --url …`, until the end of the block."""
    client, printer = importlib.import_module("moshi.client"), Printer()
    options = argparse.Namespace(url=url, host="", port=0, https=False)
    running = asyncio.create_task(client.run(printer, options))
    try:
        yield printer
    finally:
        running.cancel()
        await asyncio.wait({running})
    if not running.cancelled():
        running.result()


async def until(what: Callable[[], bool], patience: float = PATIENCE) -> None:
    async with asyncio.timeout(patience):
        while not what():
            await asyncio.sleep(0.02)


def free(gateway: Running) -> int:
    """Slots of the agent's workers, as the gateway would tell the operator."""
    agents = gateway.gateway.load()["agents"]
    workers = agents[AGENT]["workers"].values() if AGENT in agents else ()
    return sum(each["free"] for each in workers)


@contextlib.asynccontextmanager
async def line(engine: Engine, **access: Any) -> AsyncIterator[Running]:
    """A gateway, and a worker with this engine behind it."""
    engine.load()
    engine.resume()
    keys = a_route()["access"]
    async with a_gateway(a_route(access=keys | access)) as gateway:
        config = replace(
            worker_config(slots=2),
            ticket_key="",
            worker_key=WORKER_KEY,
            gateways=(Endpoint("127.0.0.1", gateway.control_port),),
        )
        stop = asyncio.Event()
        running = asyncio.create_task(WorkerHost(config, engine).run(stop))
        try:
            await until(lambda: free(gateway) == 2)
            yield gateway
        finally:
            stop.set()
            await running
            engine.close()


async def test_the_stock_client_hears_an_echo_of_what_it_says(card: SoundCard) -> None:
    async with line(LoopbackEngine(slots=2)) as gateway:
        url = f"ws://me:{KEY}@127.0.0.1:{gateway.port}/{AGENT}"
        async with talking(url) as printer:
            await until(lambda: card.loud() >= 8)
            assert printer.complaints == ["unknown message kind 0"], (
                "it does not know the handshake"
            )
        heard = next(b for b in reversed(card.played) if np.abs(b).max() > 0.02)
        spectrum = np.abs(np.fft.rfft(heard))
        assert np.argmax(spectrum) * SAMPLE_RATE / BLOCK == pytest.approx(440, abs=13)


async def test_it_cannot_call_with_a_wrong_key(card: SoundCard) -> None:
    async with line(LoopbackEngine(slots=2)) as gateway:
        client = importlib.import_module("moshi.client")
        options = argparse.Namespace(url=f"ws://me:wrong@127.0.0.1:{gateway.port}")
        with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
            await client.run(Printer(), options)


async def test_on_moshi_it_and_a_realtime_client_hold_calls_side_by_side(card: SoundCard) -> None:
    """Both on one worker's batch; the client that can name no agent gets the only one."""
    engine = MoshiEngine(models, Knobs(slots=2, measure=False))
    async with line(engine, public=True) as gateway:
        url = f"ws://127.0.0.1:{gateway.port}{REALTIME_PATH}?model=echo"
        async with (
            talking(f"ws://127.0.0.1:{gateway.port}") as printer,
            connect(url, proxy=None, compression=None) as realtime,
        ):
            kinds: set[str] = set()
            async with asyncio.timeout(PATIENCE):
                while "response.output_audio.delta" not in kinds or not printer.text:
                    await realtime.send(append())
                    kinds.add(json.loads(await realtime.recv())["type"])
                    await asyncio.sleep(0)
            await until(lambda: card.loud() >= 3)
            assert printer.complaints == ["unknown message kind 0"]


# --- what the stock client does not do -------------------------------------------------------------------


async def test_audio_that_is_none_closes_with_the_reason() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = gateway.ticket("call-1")
        async with running.dial(ticket, MOSHI_PATH) as caller:
            assert await caller.recv() == b"\x00"
            await caller.send(b"\x01RIFF")
            with pytest.raises(ConnectionClosed) as closed:
                await caller.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert closed.value.rcvd.reason.startswith("audio must be one stream of Ogg Opus")


async def test_a_quiet_line_is_kept_alive() -> None:
    """Browsers hang up after 10 s without a message; this engine says nothing unless it hears something."""
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = gateway.ticket("call-1")
        async with running.dial(ticket, MOSHI_PATH) as caller:
            assert await caller.recv() == b"\x00"
            began = time.monotonic()
            async with asyncio.timeout(9):
                assert await caller.recv() == b"\x02"
            assert time.monotonic() - began > 4


async def test_a_burst_worker_speaks_it_too() -> None:
    pages = sphn.OpusStreamWriter(SAMPLE_RATE).append_pcm(np.zeros(BLOCK, np.float32))
    async with worker() as running, running.dial(signed("1"), MOSHI_PATH) as caller:
        assert await caller.recv() == b"\x00"
        await caller.send(b"\x01" + pages)
        answer = await caller.recv()
        assert isinstance(answer, bytes)
        assert answer[:5] == b"\x01OggS"


async def test_a_temperature_in_the_url_is_that_of_the_calls_own_slot() -> None:
    engine = MoshiEngine(models, Knobs(slots=2, measure=False))
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        for number, query in enumerate(("?text_temperature=0.5", "")):
            ticket = gateway.ticket(f"call-{number}")
            async with running.dial(ticket, MOSHI_PATH + query) as caller:
                assert await caller.recv() == b"\x00"
                (conversation,) = engine._seated.values()
                assert conversation.temperature == (0.5 if query else None)
            await gateway.until(lambda: gateway.free["busy"] == 0)


async def test_without_its_codec_a_worker_says_so() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        switchboard = running.host._switchboard
        assert switchboard is not None
        desk = running.host._desk(switchboard, WorkerMetrics(), LinkTickets())
        without = CallServer(replace(desk, protocols=("realtime",)))
        async with without.serving("127.0.0.1", 0) as port:
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://127.0.0.1:{port}{MOSHI_PATH}", proxy=None)
        assert refused.value.response.status_code == 501
