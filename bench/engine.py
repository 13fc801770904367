"""The Moshi engine around its models: what a frame costs beside them, and how long the event loop waits.

    python bench/engine.py [--quick] [--json FILE]

Tiny models of the real classes on one thread of a CPU, so that what is around them weighs as much as it ever
can. Costs are CPU time of the thread, which other processes of the machine do not lengthen as they do the clock.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_TORCH_COMPILE", "1")

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import report
import torch
import uvloop
from moshi.models import LMGen

from trunkline_runtime.engine import FRAME_SAMPLES
from trunkline_runtime.engine.moshi.capacity import p99
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.moshi.tiny import tiny

torch.set_num_threads(1)

SLOTS = 32
ROUNDS = 15
STEPS = 10  # of a round
PING_SECONDS = 0.005
PING_LIMIT_MS = 10.0


def measure(quick: bool) -> list[report.Row]:
    count = 2 if quick else ROUNDS
    with _engine() as ours, _bare() as theirs:
        found = report.rounds(count, {"ours": _cost(ours), "bare": _cost(theirs)})
    return [
        report.Row(
            what=f"a frame of {SLOTS} calls, from inboxes to events",
            against="the same models stepped in a loop, without slots",
            unit="ms CPU",
            ours=found["ours"],
            theirs=found["bare"],
            floor=1.25,
            target=1.10,
            at_most=True,
        ),
        *_pings(2.0 if quick else 20.0),
    ]


def _cost(step: Callable[[], object]) -> Callable[[], float]:
    """CPU milliseconds of a step."""

    def run() -> float:
        began = time.thread_time()
        for _ in range(STEPS):
            step()
        return 1000 * (time.thread_time() - began) / STEPS

    return run


def _noise() -> bytes:
    draw = np.random.default_rng(0)
    return bytes(draw.integers(-9_000, 9_000, FRAME_SAMPLES).astype("<i2").tobytes())


@contextlib.contextmanager
def _engine() -> Iterator[Callable[[], object]]:
    """A tick of an engine whose slots are all taken."""
    engine = MoshiEngine(lambda: tiny(0), Knobs(slots=SLOTS, measure=False))
    engine.load()
    engine.prepare()
    noise = _noise()
    told: list[object] = []
    calls = [engine.open({}, told.append) for _ in range(SLOTS)]

    def step() -> None:
        told.clear()
        for call in calls:
            call.hear(noise)
        engine.tick()

    yield step
    engine.close()


@contextlib.contextmanager
def _bare() -> Iterator[Callable[[], object]]:
    """Codec, Moshi and STT for as many callers who all come and go at once."""
    models = tiny(0)
    gen: Any = LMGen(models.lm, use_sampling=False)
    stt: Any = LMGen(models.stt, use_sampling=False)
    pcm = torch.from_numpy(np.frombuffer(_noise(), "<i2").astype(np.float32) / 32768)
    batch = pcm.expand(SLOTS, 1, -1).contiguous()

    def step() -> None:
        with torch.inference_mode():
            codes = models.mimi.encode(batch)
            tokens = gen.step(codes)
            stt.step_with_extra_heads(codes)
            if tokens is not None:
                models.mimi.decode(tokens[:, 1:]).numpy()

    with contextlib.ExitStack() as streams:
        streams.enter_context(torch.inference_mode())
        for module in (models.mimi, gen, stt):
            streams.enter_context(module.streaming(SLOTS))
        yield step


def _pings(seconds: float) -> list[report.Row]:
    """How late a timer of the worker's event loop is, beside a stepping engine and without one."""
    engine = MoshiEngine(lambda: tiny(0), Knobs(slots=8, measure=False))
    engine.load()
    calm = 1000 * p99(uvloop.run(_late(seconds)))
    engine.resume()
    late = 1000 * p99(uvloop.run(_late_beside(engine, seconds)))
    engine.close()
    what = "event loop late beside 8 calls that are stepped, p99"
    return [
        report.Row(
            what=what,
            against="10 ms",
            unit="ms",
            ours=[late],
            theirs=[PING_LIMIT_MS],
            floor=1,
            at_most=True,
        ),
        report.Row(
            what=what,
            against="the same loop without an engine",
            unit="ms",
            ours=[late],
            theirs=[calm],
        ),
    ]


async def _late_beside(engine: MoshiEngine, seconds: float) -> list[float]:
    loop = asyncio.get_running_loop()
    told: list[object] = []

    def emit(event: object) -> None:
        loop.call_soon_threadsafe(told.append, event)

    calls = [engine.open({}, emit) for _ in range(8)]
    late = await _late(seconds)
    for call in calls:
        call.close()
    return late


async def _late(seconds: float) -> list[float]:
    loop = asyncio.get_running_loop()
    late = []
    end = loop.time() + seconds
    while loop.time() < end:
        due = loop.time() + PING_SECONDS
        await asyncio.sleep(PING_SECONDS)
        late.append(loop.time() - due)
    return late


if __name__ == "__main__":
    report.main("engine", measure)
