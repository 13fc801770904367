"""What a gateway is compared with and what stands behind it, each a process of its own.

    python bench/load/peers.py relay PORT URL [--uvloop] [--authority FILE --server-name NAME]
    python bench/load/peers.py echo PORT [--uvloop]
    python bench/load/peers.py workers CONTROL_PORT DATA_PORT COUNT

`relay` is the relay that one writes with `websockets`, `echo` the least that answers a handshake. `workers`
speaks for the load generator on a gateway's control port: workers that always have a slot, all behind one data
port. Each prints a line when it is ready, and runs until it is ended.
"""

import argparse
import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterable, Coroutine
from typing import Any, Final, Protocol

import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from trunkline_runtime.contract import (
    AGENT_HEADER,
    HEARTBEAT_SECONDS,
    WORKER_PROTOCOL_VERSION,
    WORKERS_PATH,
)

AGENT: Final = "default/echo"
WORKER_KEY: Final = "worker-key-of-the-benchmark"
SLOTS: Final = 256  # the most that a worker may offer
BACKLOG: Final = 4096  # as the gateway's: all callers may come at once

# No compression, no pings and no bound on messages: none of that is compared.
PLAIN: Final[dict[str, Any]] = {"compression": None, "ping_interval": None, "max_size": None}


class _Sink(Protocol):
    async def send(self, message: str | bytes) -> None: ...

    async def close(self, code: int = 1000, reason: str = "") -> None: ...


async def relay(port: int, url: str, tls: ssl.SSLContext | None, name: str | None) -> None:
    """Passes messages between callers and the worker at `url`, one connection for each caller."""

    async def answer(caller: ServerConnection) -> None:
        async with connect(url, ssl=tls, server_hostname=name, proxy=None, **PLAIN) as worker:
            await asyncio.gather(_pass(caller, worker), _pass(worker, caller))

    async with serve(answer, "127.0.0.1", port, backlog=BACKLOG, **PLAIN):
        await _ready()


async def _pass(source: AsyncIterable[str | bytes], sink: _Sink) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in source:
            await sink.send(message)
    await sink.close()


async def echo(port: int) -> None:
    """Answers each handshake and says back what it hears."""

    async def answer(caller: ServerConnection) -> None:
        await _pass(caller, caller)

    async with serve(answer, "127.0.0.1", port, backlog=BACKLOG, **PLAIN):
        await _ready()


async def workers(control_port: int, data_port: int, count: int) -> None:
    """Links of workers that always have a slot."""
    async with contextlib.AsyncExitStack() as stack:
        links = [
            await stack.enter_async_context(
                connect(
                    f"ws://127.0.0.1:{control_port}{WORKERS_PATH}",
                    additional_headers={
                        "Authorization": f"Bearer {WORKER_KEY}",
                        AGENT_HEADER: AGENT,
                    },
                    proxy=None,
                    **PLAIN,
                )
            )
            for _ in range(count)
        ]
        for number, link in enumerate(links):
            await link.send(json.dumps(_hello(number, data_port)))
        work = [work(link) for link in links for work in (_hear, _beat)]
        await asyncio.gather(_ready(), *work)


def _hello(number: int, data_port: int) -> dict[str, Any]:
    hello = {
        "type": "hello",
        "version": WORKER_PROTOCOL_VERSION,
        "agent": AGENT,
        "worker": f"worker-{number}",
    }
    hello |= {"boot": f"boot-{number}", "slots": SLOTS, "port": data_port}
    hello |= {"link": 1, "ticketKey": "whatever"}  # whose tickets nobody looks at
    return hello | {"protocols": ["realtime"], "build": "benchmark"}


async def _hear(link: ClientConnection) -> None:
    async for _ in link:
        pass


async def _beat(link: ClientConnection) -> None:
    while True:
        free = {"type": "free", "n": SLOTS, "busy": 0, "draining": False, "seq": 1}
        await link.send(json.dumps(free))
        await asyncio.sleep(HEARTBEAT_SECONDS)


async def _ready() -> None:
    print("ready", flush=True)
    await asyncio.get_running_loop().create_future()


def main() -> None:
    parser = argparse.ArgumentParser(prog="peers")
    parser.add_argument("--uvloop", action="store_true", help="else the loop of asyncio")
    kinds = parser.add_subparsers(required=True)
    relays = kinds.add_parser("relay")
    relays.add_argument("port", type=int)
    relays.add_argument("url")
    relays.add_argument("--authority", metavar="FILE", help="whom the worker's certificate is from")
    relays.add_argument("--server-name")
    relays.set_defaults(work=_relay)
    echoes = kinds.add_parser("echo")
    echoes.add_argument("port", type=int)
    echoes.set_defaults(work=lambda options: echo(options.port))
    stands = kinds.add_parser("workers")
    for name in ("control_port", "data_port", "count"):
        stands.add_argument(name, type=int)
    stands.set_defaults(work=lambda o: workers(o.control_port, o.data_port, o.count))
    options = parser.parse_args()
    work: Coroutine[Any, Any, None] = options.work(options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.uvloop else None) as runner:
        runner.run(work)


def _relay(options: argparse.Namespace) -> Coroutine[Any, Any, None]:
    tls = None
    if options.authority:
        tls = ssl.create_default_context(cafile=options.authority)
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
    return relay(options.port, options.url, tls, options.server_name)


if __name__ == "__main__":
    main()
