"""A rolling restart of all gateways, as processes before a worker process: no call is lost that ends within the grace."""

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from gateway_rig import AGENT, KEY, SECONDS, WORKER_KEY, a_route, http, routes_text
from ports import free_ports
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from trunkline_runtime.contract import (
    ENV_AGENT,
    ENV_ENGINE,
    ENV_GATEWAYS,
    ENV_HEALTH_PORT,
    ENV_HOST,
    ENV_OPERATOR_TOKEN,
    ENV_PORT,
    ENV_SLOTS,
    ENV_WORKER,
    ENV_WORKER_KEY,
    REALTIME_PATH,
)

CALLERS = 12
GRACE = 60.0  # seconds; every call is shorter
UPDATE = json.dumps({"type": "session.update", "session": {"type": "realtime"}})


class Served:
    """A process with a health port."""

    def __init__(self, what: str, log: Path, *options: object, **environment: object) -> None:
        self._command = [sys.executable, "-m", "trunkline_runtime", what, *map(str, options)]
        self._log = log
        self._environment = {
            **os.environ,
            **{key: str(value) for key, value in environment.items()},
        }
        self.process: asyncio.subprocess.Process | None = None
        self.health_port = 0

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, stdout=log, stderr=log
            )
        async with asyncio.timeout(60):
            while not await self.ready():
                assert self.process.returncode is None, self._log.read_text()[-2000:]
                await asyncio.sleep(0.05)

    async def ready(self) -> bool:
        """As a balancer asks."""
        try:
            return (await http(self.health_port, "/readyz"))[0] == 200
        except OSError:
            return False

    async def stop(self) -> int:
        """Sends SIGTERM and waits for the end."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(GRACE):
            return await self.process.wait()


class OneGateway(Served):
    def __init__(self, folder: Path, name: str) -> None:
        self.port, self.control_port, health_port = free_ports(3)
        options = {
            "host": "127.0.0.1",
            "port": self.port,
            "control-host": "127.0.0.1",
            "control-port": self.control_port,
            "health-host": "127.0.0.1",
            "health-port": health_port,
            "routes-file": folder / "routes.json",
            "grace-seconds": GRACE,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        super().__init__("gateway", folder / name, *words, **{ENV_OPERATOR_TOKEN: "token"})
        self.health_port = health_port


def a_worker(folder: Path, gateways: list[OneGateway]) -> Served:
    port, health_port = free_ports(2)
    environment = {
        ENV_AGENT: AGENT,
        ENV_WORKER: "worker-0",
        ENV_ENGINE: "loopback",
        ENV_SLOTS: 2 * CALLERS,
        ENV_HOST: "127.0.0.1",
        ENV_PORT: port,
        ENV_HEALTH_PORT: health_port,
        ENV_GATEWAYS: ",".join(f"127.0.0.1:{each.control_port}" for each in gateways),
        ENV_WORKER_KEY: WORKER_KEY,
    }
    worker = Served("worker", folder / "worker", **environment)
    worker.health_port = health_port
    return worker


class Callers:
    """Who call one after the other, through whatever gateway is ready."""

    def __init__(self, gateways: list[OneGateway]) -> None:
        self._gateways = gateways
        self.counts: Counter[str] = Counter()
        self.live: Counter[int] = Counter()  # by the port of the gateway
        self.lost: list[str] = []
        self.over = False

    async def call(self, draw: random.Random) -> None:
        """Calls until all is over."""
        while not self.over:
            ready = [each for each in self._gateways if await each.ready()]
            if not ready:
                await asyncio.sleep(0.05)
                continue
            port = draw.choice(ready).port
            uri = f"ws://127.0.0.1:{port}{REALTIME_PATH}?model={AGENT}"
            headers = {"Authorization": f"Bearer {KEY}"}
            try:
                connection = await connect(uri, additional_headers=headers, proxy=None)
            except (InvalidHandshake, OSError):
                self.counts["turned away"] += 1  # it asks again, as one does; nothing had begun
                await asyncio.sleep(0.05)
                continue
            self.live[port] += 1
            await self._talk(connection, draw.uniform(0.3, 3.0))
            self.live[port] -= 1

    async def _talk(self, connection: ClientConnection, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout(SECONDS):
                while asyncio.get_running_loop().time() < end:
                    await connection.send(UPDATE)
                    while json.loads(await connection.recv())["type"] != "session.updated":
                        pass
                    await asyncio.sleep(0.05)
                await connection.close()
        except (ConnectionClosed, TimeoutError) as error:
            self.lost.append(repr(error))
            return
        if connection.close_code == 1000:
            self.counts["ended"] += 1
        else:
            self.lost.append(f"closed with {connection.close_code}")


@pytest.mark.timeout(240)
def test_a_rolling_restart_loses_no_call(tmp_path: Path) -> None:
    async def run() -> None:
        (tmp_path / "routes.json").write_text(routes_text(a_route()))
        gateways = [OneGateway(tmp_path, f"gateway-{number}") for number in range(2)]
        worker = a_worker(tmp_path, gateways)
        everyone = [*gateways, worker]
        try:
            await asyncio.gather(*(each.start() for each in everyone))
            callers = Callers(gateways)
            calling = [
                asyncio.create_task(callers.call(random.Random(number)))
                for number in range(CALLERS)
            ]
            for gateway in gateways:
                async with asyncio.timeout(SECONDS):
                    while callers.live[gateway.port] < 2:
                        await asyncio.sleep(0.01)
                before = callers.counts["ended"]
                assert await gateway.stop() == 0, "it waited for its calls, and went"
                assert callers.live[gateway.port] == 0
                assert callers.counts["ended"] >= before + 2, "they ended as they would have"
                await gateway.start()
            async with asyncio.timeout(SECONDS):
                while callers.live[gateways[-1].port] < 2:
                    await asyncio.sleep(0.01)
            callers.over = True
            await asyncio.gather(*calling)
            assert callers.lost == []
            assert callers.counts["ended"] > 2 * CALLERS
        finally:
            for each in everyone:
                if each.process is not None and each.process.returncode is None:
                    each.process.kill()
                    await each.process.wait()
        said = b"".join(path.read_bytes() for path in tmp_path.glob("gateway-*"))
        assert b"Traceback" not in said
        assert b'"lost":true' not in said.replace(b" ", b"")

    asyncio.run(run())
