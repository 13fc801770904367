"""A gateway as it is started in a cluster, a process of its own, and a real worker before it in this one."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from gateway_rig import AGENT, KEY, OPERATOR_TOKEN, SECONDS, WORKER_KEY, http
from ports import free_ports
from tls_rig import Links
from websockets.asyncio.client import connect

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
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.worker.config import WorkerConfig
from trunkline_runtime.worker.host import WorkerHost


def worker_environment(name: str, *gateways: int, slots: int = 4) -> dict[str, str]:
    return {
        ENV_AGENT: AGENT,
        ENV_WORKER: name,
        ENV_ENGINE: "loopback",
        ENV_SLOTS: str(slots),
        ENV_HOST: "127.0.0.1",
        ENV_PORT: "0",
        ENV_HEALTH_PORT: "0",
        ENV_GATEWAYS: ",".join(f"127.0.0.1:{port}" for port in gateways),
        ENV_WORKER_KEY: WORKER_KEY,
        **(Links.pki.environment(AGENT) if Links.pki else {}),
    }


class Process:
    """`trunkline gateway` as it is started in a cluster, and one of its workers beside it."""

    def __init__(self, routes: Path, *options: str, files: tuple[int, int] | None = None) -> None:
        """`files`: how many it may have open, soft and hard."""
        self.options = options
        self.files = files
        self.calls, self.control, self.health = free_ports(3)
        self.routes = routes
        self.child: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def running(self, grace: float) -> AsyncIterator["Process"]:
        ports = ["--port", self.calls, "--control-port", self.control, "--health-port", self.health]
        tls = [f"--control-tls={Links.pki.folder}"] if Links.pki else []
        hosts = [f"--{kind}host=127.0.0.1" for kind in ("", "control-", "health-")]
        self.child = await asyncio.create_subprocess_exec(
            *self._limited(),
            *(sys.executable, "-m", "trunkline_runtime", "gateway", *map(str, ports), *hosts, *tls),
            *self.options,
            *("--routes-file", str(self.routes), "--grace-seconds", str(grace), "--name", "g"),
            env={**os.environ, ENV_OPERATOR_TOKEN: OPERATOR_TOKEN},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield self
        finally:
            if self.child.returncode is None:
                self.child.kill()
            await self.child.communicate()

    def _limited(self) -> list[str]:
        if self.files is None:
            return []
        soft, hard = self.files
        return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh"]

    async def ready(self) -> None:
        async with asyncio.timeout(SECONDS):
            while True:
                with contextlib.suppress(OSError):
                    if (await http(self.health, "/readyz"))[0] == 200:
                        return
                await asyncio.sleep(0.05)

    def dial(self) -> connect:
        return connect(
            f"ws://127.0.0.1:{self.calls}{REALTIME_PATH}?model=echo",
            additional_headers={"Authorization": f"Bearer {KEY}"},
            proxy=None,
            open_timeout=SECONDS,
        )


@contextlib.asynccontextmanager
async def a_worker_of(
    process: Process, slots: int = 4, name: str = "real-0"
) -> AsyncIterator[None]:
    """A real worker in this process, linked to a gateway in another."""
    config = WorkerConfig.from_environment(worker_environment(name, process.control, slots=slots))
    engine = LoopbackEngine(slots=slots)
    engine.load()
    engine.resume()
    stop = asyncio.Event()
    running = asyncio.create_task(WorkerHost(config, engine).run(stop))
    try:
        yield
    finally:
        stop.set()
        await running
        engine.close()
