"""A gateway that runs out of file descriptors: live calls go on, callers are told, and it is over when it is over."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import AGENT, KEY, SECONDS, a_route, http, on_uvloop, routes_text
from process_rig import Process, a_worker_of
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from trunkline_runtime.contract import REALTIME_PATH
from trunkline_runtime.gateway.descriptors import Descriptors, is_short

FILES = 96
SLOTS = 64  # more than so few descriptors allow
UPDATE = json.dumps({"type": "session.update", "session": {"type": "realtime"}})
HEAD = (
    f"GET {REALTIME_PATH}?model={AGENT} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {KEY}\r\n\r\n"
)


@contextlib.asynccontextmanager
async def a_process(folder: Path, files: tuple[int, int], *options: str) -> AsyncIterator[Process]:
    path = folder / "routes.json"
    path.write_text(routes_text(a_route()))
    process = Process(path, *options, files=files)
    # The gateway goes first, and takes what calls there are along.
    async with a_worker_of(process, slots=SLOTS), process.running(grace=0):
        await process.ready()
        yield process


async def ended(process: Process) -> list[dict[str, Any]]:
    """The lines of its log, once it has been told to go."""
    assert process.child is not None
    process.child.send_signal(signal.SIGTERM)
    async with asyncio.timeout(SECONDS):
        said, _ = await process.child.communicate()
    return [json.loads(line) for line in said.splitlines()]


async def answer(process: Process) -> ClientConnection | int | None:
    """A call, the status of the plain answer instead, or None where the connection was just closed."""
    try:
        return await process.dial()
    except InvalidStatus as error:
        return error.response.status_code if "Retry-After" in error.response.headers else None
    except (InvalidHandshake, ConnectionClosed, OSError, EOFError):
        return None


async def talks(caller: ClientConnection) -> None:
    """Whether a call is alive: it says something and is answered."""
    await caller.send(UPDATE)
    async with asyncio.timeout(SECONDS):
        while json.loads(await caller.recv())["type"] != "session.updated":
            pass


async def shortages(process: Process, at: str) -> float:
    _, text = await http(process.health, "/metrics")
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "trunkline_descriptor_shortages_total" and sample.labels["at"] == at
    )


async def workers(process: Process) -> int:
    """How many the gateway knows."""
    _, text = await http(process.health, "/state")
    return len(json.loads(text)["agents"][AGENT]["workers"])


def processor_seconds(process: Process) -> float:
    assert process.child is not None
    fields = Path(f"/proc/{process.child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def files(process: Process) -> int:
    assert process.child is not None
    return len(os.listdir(f"/proc/{process.child.pid}/fd"))


def idle(port: int) -> socket.socket:
    """Somebody who connects and says nothing."""
    return socket.create_connection(("127.0.0.1", port))


@pytest.mark.timeout(120)
@on_uvloop
async def test_callers_are_told_when_descriptors_run_out_and_calls_go_on(tmp_path: Path) -> None:
    async with a_process(tmp_path, (FILES, FILES)) as process:
        live: list[ClientConnection] = []
        while not isinstance(found := await answer(process), int):
            assert found is not None, "an end without an answer"
            live.append(found)
        assert found == 503
        assert 20 < len(live) < FILES // 2
        assert await shortages(process, "arrival") == 1
        # Now the spare ones go, too: whoever comes is cut off, and those who talk notice nothing.
        with contextlib.ExitStack() as strangers:
            for _ in range(FILES):
                strangers.enter_context(idle(process.calls))
            before = processor_seconds(process)
            await asyncio.sleep(1.0)
            assert processor_seconds(process) - before < 0.5, "it does not turn in circles"
            await asyncio.gather(*map(talks, live))
        # It is over when others go: as many as before have room.
        gone = [live.pop() for _ in range(5)]
        await asyncio.gather(*(each.close() for each in gone))
        async with asyncio.timeout(SECONDS):
            for _ in gone:
                while not isinstance(again := await answer(process), ClientConnection):
                    await asyncio.sleep(0.05)
                live.append(again)
        await asyncio.gather(*map(talks, live))
        lines = await ended(process)
    assert sum("no file descriptor" in line["message"] for line in lines) == 1
    assert not any(line["level"] == "CRITICAL" or "exc_info" in line for line in lines)


@pytest.mark.timeout(120)
@on_uvloop
async def test_where_something_comes_first_callers_wait_in_the_backlog(tmp_path: Path) -> None:
    ahead = ("--proxy-protocol", "--trusted-proxies=10.0.0.0/8")  # whom nobody here comes from
    async with a_process(tmp_path, (FILES, FILES), *ahead) as process:
        caller = await process.dial()
        with contextlib.ExitStack() as strangers:
            for _ in range(2 * FILES):
                strangers.enter_context(idle(process.calls))
            before = processor_seconds(process)
            waits = [asyncio.create_task(answer(process)) for _ in range(4)]
            await asyncio.sleep(0.5)
            assert not any(each.done() for each in waits), "nobody is cut off"
            assert processor_seconds(process) - before < 0.3, "it does not turn in circles"
            await talks(caller)
        found = await asyncio.gather(*waits)
        assert None not in found, "each is told, or is let in"
        async with asyncio.timeout(SECONDS):
            while not isinstance(again := await answer(process), ClientConnection):
                await asyncio.sleep(0.05)
        await asyncio.gather(talks(caller), talks(again))
        assert 1 <= await shortages(process, "accept") < 60, "it looks again once a second"
        lines = await ended(process)
    assert sum("no file descriptor" in line["message"] for line in lines) == 1


async def was_cut_off(connection: socket.socket) -> bool:
    """Whether it was accepted and closed at once."""
    connection.setblocking(False)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            return not await asyncio.get_running_loop().sock_recv(connection, 1)
    return False


async def asked_with_none_left(process: Process) -> list[bytes]:
    """The heads of the answers to callers who were accepted while there were descriptors, and asked when there were none.

    They are more than there are workers: to each of those a connection may stand by.
    """
    while files(process) > FILES // 2:
        await asyncio.sleep(0.01)
    callers = [await asyncio.open_connection("127.0.0.1", process.calls) for _ in range(3)]
    await http(process.health, "/readyz")  # who is answered there came later
    try:
        with contextlib.ExitStack() as strangers:
            probe = strangers.enter_context(idle(process.health))
            while not await was_cut_off(probe):  # probes come without number
                probe = strangers.enter_context(idle(process.health))
            for _, writer in callers:
                writer.write(HEAD.encode())
            return [await reader.readuntil(b"\r\n\r\n") for reader, _ in callers]
    finally:
        for _, writer in callers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.timeout(120)
@on_uvloop
async def test_a_worker_that_cannot_be_dialled_for_want_of_one_is_not_to_blame(
    tmp_path: Path,
) -> None:
    # Of two, one would be set aside.
    async with a_process(tmp_path, (FILES, FILES)) as process, a_worker_of(process, name="real-1"):
        while await workers(process) < 2:
            await asyncio.sleep(0.02)
        told: list[bytes] = []
        async with asyncio.timeout(SECONDS):
            while not told:  # else some of what took them all was let go of in between
                heads = await asked_with_none_left(process)
                told = [head for head in heads if head.startswith(b"HTTP/1.1 503 ")]
        assert all(b"Retry-After" in head for head in told)
        async with asyncio.timeout(SECONDS):
            while not isinstance(found := await answer(process), ClientConnection):
                await asyncio.sleep(0.05)
        await talks(found)
        assert await shortages(process, "dial") >= 1
        lines = await ended(process)
    assert not any("set aside" in line["message"] for line in lines)
    refused = next(line for line in lines if line["message"] == "refused")
    assert "file descriptor" in refused["passed_over"][-1]["why"]


@on_uvloop
async def test_it_takes_all_that_it_may_have_and_says_how_many_calls_that_is(
    tmp_path: Path,
) -> None:
    async with a_process(tmp_path, (64, 640)) as process:
        assert process.child is not None
        limits = Path(f"/proc/{process.child.pid}/limits").read_text()
        (line,) = (line for line in await ended(process) if line["message"] == "listening")
    assert re.search(r"^Max open files +640 ", limits, re.MULTILINE)
    assert line["files"] == 640
    assert 250 < line["calls_at_most"] < 310


def test_a_number_near_the_limit_is_for_telling_so() -> None:
    descriptors = Descriptors(CollectorRegistry(), limit=1024)
    assert descriptors.are_for(100, waiting=1)
    assert descriptors.are_for(1024 - descriptors.spare - 2, waiting=1)
    assert not descriptors.are_for(1024 - descriptors.spare - 1, waiting=1)
    assert not descriptors.are_for(500, waiting=500), "each who waits will need one for its worker"


def test_what_an_error_came_of_tells_whether_one_was_missing() -> None:
    def of(outer: OSError, inner: OSError) -> OSError:
        outer.__cause__ = inner
        return outer

    assert is_short(OSError(24, "Too many open files"))
    assert is_short(of(ConnectionError("failed"), OSError(23, "in the whole system")))
    assert not is_short(OSError(111, "Connection refused"))
    assert not is_short(of(ConnectionError("failed"), OSError(111, "refused")))
    assert not is_short(None)
