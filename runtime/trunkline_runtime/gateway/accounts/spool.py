"""Where records wait until a collector has taken them: in memory, or on disk to outlive the gateway.

A spool is bounded in bytes. When it is full the oldest records go: what happened last is what somebody who
mends the collector asks for first. Everything here may block and belongs on a thread.
"""

import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

BATCH_BYTES: Final = (
    256 * 2**10
)  # about 400 records: one request of a size that every collector takes
SPOOL_BYTES: Final = 64 * 2**20  # about 100,000 records: a collector may be down for a night
SUFFIX: Final = ".ndjson"


class SpoolError(OSError):
    """The spool's folder cannot be used; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that are sent together. The same `name` is always the same records."""

    name: str
    body: bytes  # lines

    @property
    def records(self) -> int:
        return self.body.count(b"\n")


class Spool(Protocol):
    """Batches in the order in which they came."""

    def append(self, lines: Sequence[bytes]) -> int:
        """Keeps records; returns how many, old or new, were lost for want of room."""

    def oldest(self) -> Batch | None:
        """What is to be sent next. It stays until `done`, and gets no more records."""

    def done(self, batch: Batch) -> None:
        """The batch is not needed any more."""

    def backlog(self) -> int:
        """Bytes that wait."""

    def close(self) -> None:
        """Lets go of what is held open. What waits on disk stays there."""


class MemorySpool:
    """Records that end with the process."""

    def __init__(self, most: int, name: Callable[[], str]) -> None:
        self._most = most
        self._name = name
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._batch: Batch | None = None

    def __repr__(self) -> str:
        return f"<MemorySpool {self.backlog()} of {self._most} bytes>"

    def append(self, lines: Sequence[bytes]) -> int:
        lost = 0
        self._lines.extend(lines)
        self._bytes += sum(map(len, lines))
        while self._lines and self.backlog() > self._most:
            self._bytes -= len(self._lines.popleft())
            lost += 1
        return lost

    def oldest(self) -> Batch | None:
        if self._batch is None and self._lines:
            taken: list[bytes] = []
            size = 0
            while self._lines and (not taken or size + len(self._lines[0]) <= BATCH_BYTES):
                taken.append(self._lines.popleft())
                size += len(taken[-1])
            self._bytes -= size
            self._batch = Batch(self._name(), b"".join(taken))
        return self._batch

    def done(self, batch: Batch) -> None:
        if batch == self._batch:
            self._batch = None

    def backlog(self) -> int:
        return self._bytes + (len(self._batch.body) if self._batch else 0)

    def close(self) -> None:
        return


class DiskSpool:
    """Records in files of one batch each, `000000000042-NAME.ndjson`, read again at the next start.

    Lines are written at once but not synced: they outlive the process, and a loss of power costs seconds.
    Raises SpoolError where the folder cannot be written, or another gateway has it.
    """

    def __init__(self, folder: Path, most: int, name: Callable[[], str]) -> None:
        self._folder = folder
        self._most = most
        self._batch = min(BATCH_BYTES, most // 8)  # a whole file goes where there is no room
        self._name = name
        self._open: int | None = None  # a descriptor of the last file
        self._sending = ""  # a file that `oldest` has given out
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SpoolError(f"{folder} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise SpoolError(f"{folder} belongs to another gateway: give each its own") from error
        files = sorted(file for file in folder.glob(f"*{SUFFIX}") if file.name[:12].isdigit())
        self._sizes = {file.name: file.stat().st_size for file in files}  # the oldest first
        self._bytes = sum(self._sizes.values())
        self._number = max((int(file.name[:12]) for file in files), default=0)

    def __repr__(self) -> str:
        return f"<DiskSpool {self.backlog()} of {self._most} bytes in {len(self._sizes)} files>"

    def append(self, lines: Sequence[bytes]) -> int:
        lost = 0
        for line in lines:
            while not self._written(line):
                gone = self._drop_oldest()
                lost += 1 if gone is None else gone
                if gone is None:
                    break
        return lost

    def oldest(self) -> Batch | None:
        while self._sizes:
            name = next(iter(self._sizes))
            if len(self._sizes) == 1:
                self._shut()
            try:
                body = (self._folder / name).read_bytes()
            except OSError:  # somebody removed it, or the disk has a fault there: the rest goes on
                self._bytes -= self._sizes.pop(name)
                continue
            body = body[
                : body.rfind(b"\n") + 1
            ]  # a machine that lost its power may have cut a line
            if body:
                self._sending = name
                return Batch(name.removesuffix(SUFFIX), body)
            self._remove(name)
        return None

    def done(self, batch: Batch) -> None:
        self._sending = ""
        self._remove(batch.name + SUFFIX)

    def backlog(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._shut()
        os.close(self._lock)

    def _written(self, line: bytes) -> bool:
        """Whether there was room for the line; else nothing of it is there."""
        if self.backlog() + len(line) > self._most:
            return False
        try:
            name, descriptor = self._last(len(line))
        except OSError:
            return False
        size = self._sizes[name]
        try:
            whole = os.write(descriptor, line) == len(line)
        except OSError:
            whole = False
        if whole:
            self._sizes[name] += len(line)
            self._bytes += len(line)
        else:
            os.ftruncate(descriptor, size)
        return whole

    def _last(self, size: int) -> tuple[str, int]:
        """The file that is being written, with room for so many bytes in its batch."""
        if self._open is not None:
            name = next(reversed(self._sizes))
            if self._sizes[name] + size <= self._batch or not self._sizes[name]:
                return name, self._open
            self._shut()
        self._number += 1
        name = f"{self._number:012d}-{self._name()}{SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._open = os.open(self._folder / name, flags, 0o600)
        self._sizes[name] = 0
        return name, self._open

    def _drop_oldest(self) -> int | None:
        """Makes room; returns how many records went, None where there is nothing that may go.

        What is being sent stays: it leaves by itself.
        """
        files = self._sizes.items()
        name = next((name for name, size in files if size and name != self._sending), None)
        if name is None:
            return None
        if name == next(reversed(self._sizes)):
            self._shut()
        records = 0
        with contextlib.suppress(OSError):
            records = (self._folder / name).read_bytes().count(b"\n")
        self._remove(name)
        return records

    def _remove(self, name: str) -> None:
        """A file that cannot be removed is sent again at the next start, which is allowed."""
        self._bytes -= self._sizes.pop(name, 0)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def _shut(self) -> None:
        if self._open is not None:
            os.close(self._open)
            self._open = None
