"""The ledger in a file, for whoever collects files. Rotation is the system's: a file that was moved is left."""

import logging
import os
from pathlib import Path

from trunkline_runtime.contract import CallRecord
from trunkline_runtime.gateway.accounts.record import as_line

log = logging.getLogger("trunkline.ledger")
calls = logging.getLogger("trunkline.calls")


class LedgerFileError(OSError):
    """The ledger's file cannot be written; the text says which and why."""


def to_log(record: CallRecord) -> None:
    """The record as a line of the gateway's log, which brings its own message and time."""
    fields = {key: value for key, value in record.items() if key not in ("message", "time")}
    calls.info(record["message"], extra=fields)


class LedgerFile:
    """Appends a line a call. What cannot be written goes to the log instead, and is told of once.

    One write is a few microseconds into the page cache, so the event loop does it. Raises LedgerFileError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = False
        try:
            self._descriptor = self._opened()
        except OSError as error:
            raise LedgerFileError(f"{path} cannot be written: {error.strerror}") from error
        self._identity = _identity(os.fstat(self._descriptor))

    def __repr__(self) -> str:
        return f"<LedgerFile {self._path}>"

    def keep(self, record: CallRecord) -> None:
        """Writes one record."""
        line = as_line(record)
        try:
            self._follow()
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, line) != len(line):
                os.ftruncate(self._descriptor, size)
                raise OSError("there is no room")
        except OSError as error:
            to_log(record)
            if not self._told:
                self._told = True
                log.error(
                    "the ledger's file cannot be written: calls are logged instead",
                    extra={"path": str(self._path), "why": error.strerror or str(error)},
                )
            return
        self._told = False

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _follow(self) -> None:
        """Opens the path anew where another file stands there, or none."""
        try:
            there = _identity(os.stat(self._path))
        except FileNotFoundError:
            there = None
        if there != self._identity:
            fresh = self._opened()
            os.close(self._descriptor)
            self._descriptor = fresh
            self._identity = _identity(os.fstat(fresh))

    def _opened(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(self._path, flags, 0o640)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
