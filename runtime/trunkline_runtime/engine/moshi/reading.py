"""Safetensors files to a device, as fast as the machine reads.

Several threads read pieces of the file at once, straight into the memory where the tensors will live (CPU),
or through pinned buffers from which the GPU takes one piece while the next is read (CUDA). The
header is checked first, and against the file's size, so that a bad file is refused before any byte is read.

Format: https://huggingface.co/docs/safetensors: eight bytes that say how long the header is, the header as
JSON, the tensors without gaps.
"""

import bisect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from trunkline_runtime.engine.moshi.models import ModelError

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the format's own library
PIECE_BYTES: Final = (
    8 * 2**20
)  # long enough to hide a system call, short enough to spread over threads
# More threads than that saturate no bus; fewer would leave a network volume idle between answers.
MIN_THREADS: Final = 4
MAX_THREADS: Final = 16

Arrived = Callable[[int], None]
"""Is told how many bytes have arrived, from any thread."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of a file: bytes `start` to `end` of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file holds, in the order of the file."""

    path: Path
    tensors: tuple[Placed, ...]

    @property
    def start(self) -> int:
        return self.tensors[0].start

    @property
    def end(self) -> int:
        return self.tensors[-1].end

    @property
    def bytes(self) -> int:
        return self.end - self.start


def layout(path: Path) -> Layout:
    """Reads the header alone. Raises `ModelError` for a file that is missing, cut off or something else."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _not_ours(path, size)
            header = json.loads(file.read(length))
            found = Layout(path, _placed(header, 8 + length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise _not_ours(path, size) from error
    if found.end != size:
        raise ModelError(
            f"{path} is {'cut off' if size < found.end else 'too long'}: its header speaks of"
            f" {found.end} bytes and it has {size}; copy or download it again"
        )
    return found


class Destination:
    """Where the tensors of one file will live, with the types of the file; `tensors` holds them by name.

    On a CPU they share one piece of memory, into which files are read without a copy in between. On another
    device each has its own, so that it can be given up alone. Raises `ModelError` where there is no room.
    """

    def __init__(self, found: Layout, device: torch.device | str = "cpu") -> None:
        self.layout = found
        self.device = torch.device(device)
        try:
            if self.device.type == "cpu":
                self.arena = torch.empty(found.bytes, dtype=torch.uint8)
                self.tensors = {p.name: _shaped(self._part(p), p) for p in found.tensors}
            else:
                self.tensors = {
                    p.name: torch.empty(p.shape, dtype=p.dtype, device=self.device)
                    for p in found.tensors
                }
        except (MemoryError, RuntimeError) as error:
            raise _no_room(found, str(device)) from error

    def raw(self) -> list[tuple[Placed, torch.Tensor]]:
        """The bytes of each tensor that has any."""
        return [
            (placed, self.tensors[placed.name].view(-1).view(torch.uint8))
            for placed in self.layout.tensors
            if placed.start < placed.end
        ]

    def _part(self, placed: Placed) -> torch.Tensor:
        return self.arena[placed.start - self.layout.start : placed.end - self.layout.start]


def read(
    found: Layout, device: torch.device | str = "cpu", *, arrived: Arrived = lambda _: None
) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, on the device. Raises `ModelError`, as `fill` does."""
    destination = Destination(found, device)
    fill(destination, arrived=arrived)
    return destination.tensors


def fill(
    destination: Destination,
    *,
    arrived: Arrived = lambda _: None,
    threads: int | None = None,
    staged: bool | None = None,
) -> None:
    """Reads a file into its destination. `staged` says whether buffers stand between: where the device
    cannot be read to, they must. Raises `ModelError` for a file that ends early or cannot be read."""
    found = destination.layout
    if not found.bytes:
        return  # tensors without a number
    if threads is None:
        threads = max(MIN_THREADS, min(MAX_THREADS, len(os.sched_getaffinity(0))))
    if staged is None:
        staged = destination.device.type != "cpu"
    try:
        descriptor = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, found.start, found.bytes, os.POSIX_FADV_WILLNEED)
            (_fill_staged if staged else _fill_arena)(descriptor, destination, arrived, threads)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"{found.path} cannot be read: {error.strerror or error}") from error


# --- to memory -----------------------------------------------------------------------------------------


def _fill_arena(descriptor: int, destination: Destination, arrived: Arrived, threads: int) -> None:
    found = destination.layout
    with memoryview(destination.arena.numpy()) as whole, ThreadPoolExecutor(threads) as pool:

        def piece(start: int, end: int) -> None:
            with whole[start - found.start : end - found.start] as target:
                _fill(descriptor, found.path, target, start)
            arrived(end - start)

        _finish([pool.submit(piece, start, end) for start, end in _pieces(found)])


def _shaped(raw: torch.Tensor, placed: Placed) -> torch.Tensor:
    return raw.view(placed.dtype).view(placed.shape)


# --- to a device, through staging buffers --------------------------------------------------------------


def _fill_staged(descriptor: int, destination: Destination, arrived: Arrived, threads: int) -> None:
    found, targets = destination.layout, destination.raw()
    pieces = list(_pieces(found))
    threads = min(threads, len(pieces))

    def share(first: int) -> None:
        lane = _Lane(destination.device)
        for start, end in pieces[first::threads]:
            buffer = lane.next_buffer()
            with memoryview(buffer.numpy())[: end - start] as view:
                _fill(descriptor, found.path, view, start)
            lane.send(buffer, start, end, targets)
            arrived(end - start)
        lane.wait()

    with ThreadPoolExecutor(threads) as pool:
        _finish([pool.submit(share, first) for first in range(threads)])


class _Lane:
    """One reading thread's way to the device: two buffers, of which one fills while the other empties.

    They are pinned where the device is a GPU, which takes from no other memory while the thread goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self._buffers = [
            torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)
        ]
        self._events = [torch.cuda.Event() for _ in range(2)] if self._cuda else []
        self._turn = 0

    def next_buffer(self) -> torch.Tensor:
        """The buffer whose last content has left."""
        self._turn = 1 - self._turn
        if self._cuda:
            self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def send(
        self,
        buffer: torch.Tensor,
        start: int,
        end: int,
        targets: Sequence[tuple[Placed, torch.Tensor]],
    ) -> None:
        """Copies bytes `start` to `end` of the file to the tensors that they belong to."""
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            for placed, target in _touched(targets, start, end):
                low, high = max(start, placed.start), min(end, placed.end)
                target[low - placed.start : high - placed.start].copy_(
                    buffer[low - start : high - start], non_blocking=True
                )
            if self._cuda:
                self._events[self._turn].record()

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _touched(
    targets: Sequence[tuple[Placed, torch.Tensor]], start: int, end: int
) -> Sequence[tuple[Placed, torch.Tensor]]:
    """Those of the targets that a part of the file touches; they are in the order of the file."""
    first = bisect.bisect_right(targets, start, key=lambda target: target[0].end)
    after = bisect.bisect_left(targets, end, key=lambda target: target[0].start)
    return targets[first:after]


# --- both ----------------------------------------------------------------------------------------------


def _pieces(found: Layout) -> Iterator[tuple[int, int]]:
    for start in range(found.start, found.end, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, found.end)


def _fill(descriptor: int, path: Path, target: memoryview, offset: int) -> None:
    """Reads until the target is full; a read may give less than was asked for."""
    filled = 0
    while filled < len(target):
        with target[filled:] as rest:
            count = os.preadv(descriptor, [rest], offset + filled)
        if count == 0:
            raise ModelError(f"{path} became shorter while it was read: copy or download it again")
        filled += count


def _finish(futures: Sequence[Any]) -> None:
    """Waits for all; after a failure nothing that has not begun is begun."""
    try:
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _placed(header: dict[str, Any], data: int) -> tuple[Placed, ...]:
    """The header's tensors; raises what a header that is no header makes Python raise."""
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(side) for side in entry["shape"])
        count = 1
        for side in shape:
            count *= side
        if end - start != count * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{name} does not fill its place")
        if start % dtype.itemsize:
            raise ValueError(f"{name} begins between two words")  # no writer does that
        tensors.append(Placed(name, dtype, shape, data + start, data + end))
    tensors.sort(key=lambda placed: (placed.start, placed.end))
    ends = [data, *(placed.end for placed in tensors)]
    if any(placed.start != end for placed, end in zip(tensors, ends, strict=False)):
        raise ValueError("the tensors overlap or leave gaps")
    if ends[-1] == data:
        raise ValueError("no tensor")
    return tuple(tensors)


def _not_ours(path: Path, size: int) -> ModelError:
    return ModelError(
        f"{path} ({size} bytes) is no safetensors file that can be loaded: its header makes no sense."
        " Was it downloaded whole, and is it no pointer of Git LFS?"
    )


def _no_room(found: Layout, device: str) -> ModelError:
    return ModelError(
        f"{device} is out of memory: {found.path.name} takes {found.bytes / 1e9:.2f} GB there."
        " Take a larger GPU, fewer slots, or int8 weights"
    )
