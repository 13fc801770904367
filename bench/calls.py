"""Calls that one process holds over WebSockets: a worker with the Moshi engine, and `moshi.server`.

    python bench/calls.py [--quick] [--json FILE]

Both read the same tiny checkpoint, speak Moshi's own protocol, and run as a process of their own with one thread
for the models. Callers send noise at the pace of speech. A call is held when audio comes back without a break: 99
of 100 messages at most a frame (80 ms) late, and 97 % of them there at all. All calls at once must be held. The
search begins at the target and halves what is left. The callers share the machine, and load from elsewhere counts
against both.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import contextlib
import json
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import jwt
import numpy as np
import report
import sphn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from trunkline_runtime import contract
from trunkline_runtime.contract import SETTINGS_TYPE
from trunkline_runtime.engine import FRAME_SAMPLES, SAMPLE_RATE
from trunkline_runtime.engine.moshi.capacity import FRAME_SECONDS, p99
from trunkline_runtime.engine.moshi.checkpoint import MOSHI_FOLDER, write_tiny

LADDER = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
FIRST = 24  # the target
WARM_UP_SECONDS = 3.0
SECONDS = 8.0  # that a call must be held
BUDGET_SECONDS = 150.0  # for one peer; a rung takes up to 40 s more
START_SECONDS = 120.0
AGENT = "default/moshi"
AUDIO = 1  # first byte of a message
TOLD_AT_ALL = 0.97
TRIES = 2  # a machine that stands still for a moment says nothing about either
# moshi.server waits for a GPU in its warm-up, also where it runs on a CPU.
STOCK = (
    "import sys, runpy, torch; torch.cuda.synchronize = lambda: None; torch.set_num_threads(1);"
    "runpy.run_module('moshi.server', run_name='__main__', alter_sys=True)"
)
WORKER = "from trunkline_runtime.cli import main; import sys; sys.argv[1:] = ['worker']; main()"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that is started for a number of calls; `headers` are for one call."""

    name: str
    serve: Callable[[int], AbstractAsyncContextManager[str]]  # gives the URL
    headers: Callable[[], dict[str, str]]
    first: Sequence[str]  # messages that the server wants before the audio


def measure(quick: bool) -> list[report.Row]:
    seconds = 2.0 if quick else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(Path(folder), 0)
        checkpoint = Path(folder) / MOSHI_FOLDER
        theirs = asyncio.run(_most(_stock(checkpoint), LADDER[:2], seconds))
        ladder = LADDER[:2] if quick else LADDER
        ours = asyncio.run(_most(_worker(checkpoint), ladder, seconds))
    return [
        report.Row(
            what="calls held by one process, tiny models on a CPU",
            against="moshi.server",
            unit="calls",
            ours=[ours],
            theirs=[max(1, theirs)],  # it takes one call at a time, if nothing disturbs it
            floor=8,
            target=24,
        )
    ]


async def _most(peer: Peer, ladder: Sequence[int], seconds: float) -> int:
    """The longest rung of the ladder on which all calls are held, by halving; 0 where there is none.

    What is found when the time is over counts.
    """
    messages = _noise(WARM_UP_SECONDS + seconds)
    over = time.monotonic() + BUDGET_SECONDS
    held, broken = -1, len(ladder)
    at = ladder.index(FIRST) if FIRST in ladder else len(ladder) - 1
    while held + 1 < broken and time.monotonic() < over:
        if await _all_held(peer, ladder[at], messages, seconds):
            held = at
        else:
            broken = at
        at = (held + broken) // 2
    return ladder[held] if held >= 0 else 0


def _noise(seconds: float) -> list[bytes]:
    """Messages of 80 ms of noise each, as one Ogg Opus stream; all callers send the same."""
    writer = sphn.OpusStreamWriter(SAMPLE_RATE)
    noise = np.random.default_rng(0).normal(0, 0.1, FRAME_SAMPLES).astype(np.float32)
    return [bytes([AUDIO]) + writer.append_pcm(noise) for _ in range(int(seconds / FRAME_SECONDS))]


async def _all_held(peer: Peer, calls: int, messages: Sequence[bytes], seconds: float) -> bool:
    """Whether in one of some tries all of so many calls are held."""
    for _ in range(TRIES):
        async with peer.serve(calls) as url:
            tried = (_call(peer, url, messages, seconds) for _ in range(calls))
            held = await asyncio.gather(*tried)
        print(f"{peer.name}: {sum(held)} of {calls} calls held", file=sys.stderr)
        if all(held):
            return True
    return False


async def _call(peer: Peer, url: str, messages: Sequence[bytes], seconds: float) -> bool:
    """Whether one call is held for so long, after a while to warm up."""
    arrivals: list[float] = []
    try:
        async with connect(
            url, additional_headers=peer.headers(), proxy=None, compression=None
        ) as link:
            for message in peer.first:
                await link.send(message)
            listening = asyncio.create_task(_listen(link, arrivals))
            await _speak(link, messages)
            listening.cancel()
            await asyncio.wait({listening})
    except (ConnectionClosed, InvalidStatus, TimeoutError):
        return False
    return _held(arrivals, seconds)


def _held(arrivals: Sequence[float], seconds: float) -> bool:
    if not arrivals:
        return False
    kept = [at for at in arrivals if at >= arrivals[-1] - seconds]
    gaps = np.diff(kept)
    enough = len(kept) >= TOLD_AT_ALL * seconds / FRAME_SECONDS
    return enough and p99(gaps.tolist()) <= 2 * FRAME_SECONDS


async def _listen(link: ClientConnection, arrivals: list[float]) -> None:
    while True:
        message = await link.recv()
        if isinstance(message, bytes) and message[:1] == bytes([AUDIO]):
            arrivals.append(time.perf_counter())


async def _speak(link: ClientConnection, messages: Sequence[bytes]) -> None:
    """Sends a message each 80 ms."""
    due = time.perf_counter()
    for message in messages:
        await link.send(message)
        due += FRAME_SECONDS
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


# --- the two of them -----------------------------------------------------------------------------------


def _worker(folder: Path) -> Peer:
    key = secrets.token_hex(32)

    @contextlib.asynccontextmanager
    async def serve(calls: int) -> AsyncIterator[str]:
        port, health = _free_port(), _free_port()
        environment = {
            contract.ENV_AGENT: AGENT,
            contract.ENV_ENGINE: "moshi",
            contract.ENV_MODEL: str(folder),
            contract.ENV_DEVICE: "cpu",
            contract.ENV_SLOTS: str(calls),
            contract.ENV_HOST: "127.0.0.1",
            contract.ENV_PORT: str(port),
            contract.ENV_HEALTH_PORT: str(health),
            contract.ENV_TICKET_KEY: key,
        }
        async with _process([sys.executable, "-c", WORKER], environment):
            await _until(lambda: _ready(health))
            yield f"ws://127.0.0.1:{port}{contract.MOSHI_PATH}"

    def headers() -> dict[str, str]:
        name = secrets.token_hex(8)
        claims = {"aud": AGENT, "call": name, "jti": name, "exp": time.time() + 60}
        return {contract.TICKET_HEADER: jwt.encode(claims, key, "HS256")}

    first = json.dumps({"type": SETTINGS_TYPE, "settings": {}})
    return Peer("worker", serve, headers, [first])


def _stock(folder: Path) -> Peer:
    config = json.loads((folder / "config.json").read_text())
    # moshi.server asks the Hub for what does not say that it lies here.
    config["mimi_config_name"] = f"file://{folder / config['mimi_config_name']}"
    config["lm_gen_config"] = {"use_sampling": False}
    here = folder / "stock.json"
    here.write_text(json.dumps(config))

    @contextlib.asynccontextmanager
    async def serve(calls: int) -> AsyncIterator[str]:
        port = _free_port()
        files = {
            "--config-path": here,
            "--moshi-weight": folder / config["moshi_name"],
            "--mimi-weight": folder / config["mimi_name"],
            "--tokenizer": folder / config["tokenizer_name"],
        }
        options = [text for name, path in files.items() for text in (name, f"file://{path}")]
        options[1] = str(here)
        command = [sys.executable, "-c", STOCK, *options, "--device", "cpu", "--static", "none"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        async with _process(command, {"NO_TORCH_COMPILE": "1"}):
            await _until(lambda: _listens(port))
            yield f"ws://127.0.0.1:{port}/api/chat"

    return Peer("moshi.server", serve, dict, [])


@contextlib.asynccontextmanager
async def _process(command: Sequence[str], environment: dict[str, str]) -> AsyncIterator[None]:
    child = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
        await child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until(what: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(START_SECONDS):
        while not await what():  # noqa: ASYNC110  # of another process there is no event
            await asyncio.sleep(0.1)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def _ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(f"GET {contract.READYZ_PATH} HTTP/1.1\r\nHost: w\r\n\r\n".encode())
    head = await reader.readline()
    writer.close()
    return b"200" in head


if __name__ == "__main__":
    report.main("calls", measure)
