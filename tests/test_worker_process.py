"""A worker as a process of its own on uvloop: made from its environment, drained by SIGTERM."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator

import pytest
from worker_rig import (
    AGENT,
    PATIENCE,
    TICKET_KEY,
    WORKER_KEY,
    FakeGateway,
    append,
    health,
    next_message,
    refusal,
    worker,
    worker_config,
)

from trunkline_runtime import contract
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.worker.host import WorkerHost

ENVIRONMENT = {
    contract.ENV_AGENT: AGENT,
    contract.ENV_WORKER: "echo-7",
    contract.ENV_ENGINE: "loopback",
    contract.ENV_SLOTS: "2",
    contract.ENV_HOST: "127.0.0.1",
    contract.ENV_PORT: "0",
    contract.ENV_HEALTH_PORT: "0",
}
MAIN = (
    "import sys; sys.argv = ['trunkline', 'worker']; from trunkline_runtime.cli import main; main()"
)


@contextlib.asynccontextmanager
async def process(
    main: str = MAIN, /, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`trunkline worker`, or another program, killed at the end if it is still there."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRUNKLINE_")}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        main,
        env={**inherited, **ENVIRONMENT, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


def pod(gateway: FakeGateway) -> dict[str, str]:
    return {
        contract.ENV_GATEWAYS: f"127.0.0.1:{gateway.port}",
        contract.ENV_WORKER_KEY: WORKER_KEY,
    }


async def outcome(child: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    """Exit status, standard output and error of a process that ends by itself."""
    async with asyncio.timeout(PATIENCE):
        out, err = await child.communicate()
    return child.returncode, out.decode(), err.decode()


async def test_sigterm_lets_the_call_go_on_and_ends_the_process_after_it() -> None:
    async with FakeGateway().serving() as gateway, process(**pod(gateway)) as child:
        await gateway.until(lambda: bool(gateway.free))
        async with gateway.call("call-1") as caller:
            await next_message(caller, "session.created")
            child.send_signal(signal.SIGTERM)
            await gateway.until(lambda: gateway.free["draining"])
            assert await refusal(gateway.call("call-2")) == (503, "no slot is free\n")
            await caller.send(append())
            await next_message(caller, "response.output_audio.delta")
            assert child.returncode is None
        status, out, err = await outcome(child)
        assert status == 0, err
        assert gateway.heard("bye")
    lines = [json.loads(line) for line in out.splitlines()]
    slots = [line for line in lines if line["logger"] == "trunkline.slots"]
    assert [(line["message"], line["slot"], line["call"]) for line in slots] == [
        ("live", 0, "call-1"),
        ("freed", 0, "call-1"),
    ]
    assert {(line["worker"], line["boot"]) for line in slots} == {
        ("echo-7", gateway.hellos[0]["boot"])
    }
    assert slots == sorted(slots, key=lambda line: float(line["t"]))
    assert gateway.hellos[0]["ticketKey"] not in out + err
    assert WORKER_KEY not in out + err


async def test_a_worker_killed_in_a_call_is_a_new_one_when_it_comes_back() -> None:
    async with FakeGateway().serving() as gateway:
        async with process(**pod(gateway)) as child:
            await gateway.until(lambda: bool(gateway.free))
            async with gateway.call("call-1") as caller:
                await next_message(caller, "session.created")
                child.kill()
                await gateway.until(lambda: gateway.links == 0)
        gateway.messages.clear()
        async with process(**pod(gateway)):
            await gateway.until(lambda: gateway.free.get("n") == 2)
        boots = [hello["boot"] for hello in gateway.hellos]
        assert len(set(boots)) == 2


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({contract.ENV_SLOTS: "many"}, "set TRUNKLINE_SLOTS to a whole number"),
        ({}, "set TRUNKLINE_GATEWAYS"),
    ],
)
async def test_a_wrong_environment_ends_with_a_sentence(
    environment: dict[str, str], words: str
) -> None:
    async with process(**environment) as child:
        status, _, err = await outcome(child)
    assert status == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", [contract.ENV_PORT, contract.ENV_HEALTH_PORT])
async def test_a_port_in_use_ends_with_a_sentence(name: str) -> None:
    async with worker(slots=1) as running:
        taken = {
            contract.ENV_PORT: running.host.port,
            contract.ENV_HEALTH_PORT: running.host.health_port,
        }
        burst = {contract.ENV_TICKET_KEY: TICKET_KEY, name: str(taken[name])}
        async with process(**burst) as child:
            status, _, err = await outcome(child)
    assert status == 1
    assert f"cannot listen on 127.0.0.1:{taken[name]}" in err.replace("\n", " ")
    assert f"set {name}" in err.replace("\n", " ")
    assert "Traceback" not in err


class SlowEngine(LoopbackEngine):
    """An engine whose weights take as long as the test wants, and may be broken."""

    def __init__(self) -> None:
        super().__init__(slots=1)
        self.go = threading.Event()
        self.error: Exception | None = None

    def load(self) -> None:
        assert self.go.wait(PATIENCE)
        if self.error is not None:
            raise self.error


async def test_a_worker_that_loads_is_alive_but_not_ready() -> None:
    engine, stop, listening = SlowEngine(), asyncio.Event(), asyncio.Event()
    host = WorkerHost(worker_config(slots=1), engine, engine.load)
    running = asyncio.create_task(host.run(stop, listening.set))
    async with asyncio.timeout(PATIENCE):
        await listening.wait()
        assert host.why_unready() == "loading"
        assert await health(host, "/healthz") == (200, "ok\n")
        assert await health(host, "/readyz") == (503, "loading\n")
        engine.go.set()
        while host.why_unready():
            await asyncio.sleep(0.01)
        assert repr(host) == "<WorkerHost echo-0 ready>"
        stop.set()
        await running


async def test_an_engine_that_cannot_load_ends_the_worker() -> None:
    engine = SlowEngine()
    engine.error = RuntimeError("no weights")
    engine.go.set()
    host = WorkerHost(worker_config(slots=1), engine, engine.load)
    with pytest.raises(RuntimeError, match="no weights"):
        async with asyncio.timeout(PATIENCE):
            await host.run(asyncio.Event())
