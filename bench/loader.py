"""Weights: how fast a file becomes tensors, and a model becomes modules to put them in.

    python bench/loader.py [--quick] [--json FILE]

The file lies in memory (`/dev/shm`), so that no disk is measured. It is read into memory that is there already,
as the staging buffers of a GPU are, and into fresh memory, which the kernel must first hand over and clear: in a
child process each time, for what a process has freed is not fresh. The limit is one thread that does nothing but
read the file into one piece of memory; several may pass it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from trunkline_runtime.engine.moshi import loading, reading
from trunkline_runtime.engine.moshi.reading import Destination, Layout

torch.set_num_threads(1)

TENSORS = 128
ROUNDS = 15


def measure(quick: bool) -> list[report.Row]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "weights.safetensors"
        _write(path, 64 * 2**20 if quick else 2**30)
        rows = _reading(path, 3 if quick else ROUNDS)
    return [*rows, _building(3 if quick else 5)]


def _write(path: Path, size: int) -> None:
    each = torch.randn(size // TENSORS // 2).bfloat16()
    save_file({f"layers.{i}.weight": each + i for i in range(TENSORS)}, path)


def _reading(path: Path, count: int) -> list[report.Row]:
    found = reading.layout(path)
    fresh = {
        "ours, fresh": lambda: reading.read(found),
        "load_file, fresh": lambda: {k: v.clone() for k, v in load_file(path).items()},
    }
    # Before there is memory to read into: a fork would have the kernel share it, and unshare each page.
    children = {name: partial(_in_child, _speed(found, run)) for name, run in fresh.items()}
    speeds = report.rounds(count, children)
    there = Destination(found)
    runs = {
        "ours": lambda: reading.fill(there),
        "load_file": lambda: _copied(path, there.tensors),
        "readinto": lambda: _readinto(found, there.arena),
    }
    speeds |= report.rounds(count, {name: _speed(found, run) for name, run in runs.items()})
    bounds: dict[str, Any] = {"unit": "GB/s", "floor": 1.3, "target": 1.7}
    return [
        report.Row(
            what="weights file to memory that is there",
            against="safetensors.load_file and a copy",
            ours=speeds["ours"],
            theirs=speeds["load_file"],
            **bounds,
        ),
        report.Row(
            what="weights file to memory that is there, as a share of the limit",
            against="readinto, one thread",
            unit="GB/s",
            ours=speeds["ours"],
            theirs=speeds["readinto"],
            target=0.9,
        ),
        report.Row(
            what="weights file to fresh memory",
            against="safetensors.load_file and a clone",
            ours=speeds["ours, fresh"],
            theirs=speeds["load_file, fresh"],
            **bounds,
        ),
    ]


def _copied(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """load_file gives views of the mapped file, of which no byte has been read yet."""
    for name, tensor in load_file(path).items():
        tensors[name].copy_(tensor)


def _readinto(found: Layout, arena: torch.Tensor) -> None:
    with found.path.open("rb", buffering=0) as file, memoryview(arena.numpy()) as target:
        file.seek(found.start)
        filled = 0
        while filled < len(target):
            filled += file.readinto(target[filled : filled + reading.PIECE_BYTES])


def _speed(found: Layout, run: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        began = time.perf_counter()
        run()
        return found.bytes / (time.perf_counter() - began) / 1e9

    return timed


def _in_child(timed: Callable[[], float]) -> float:
    """What a run measures in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, repr(timed()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as told:
        value = float(told.read())
    os.waitpid(child, 0)
    return value


def _building(count: int) -> report.Row:
    """Moshi 7B as its own loader builds it to be filled: on the meta device. Its imports are not counted."""

    def seconds(build: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            began = time.perf_counter()
            build()
            return time.perf_counter() - began

        return timed

    def stock() -> object:
        return loaders.get_moshi_lm(None, device="meta", dtype=torch.bfloat16)

    times = report.rounds(
        count,
        {
            "ours": seconds(lambda: loading.hollow_lm(None, torch.bfloat16)),
            "theirs": seconds(stock),
        },
    )
    return report.Row(
        what="Moshi 7B as modules without memory",
        against="moshi's loader",
        unit="s",
        ours=times["ours"],
        theirs=times["theirs"],
        at_most=True,
    )


if __name__ == "__main__":
    report.main("loader", measure)
