"""Where a gateway's ledger goes: its log or a file, and a collector beside it."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from trunkline_runtime.contract import CallRecord
from trunkline_runtime.gateway.accounts.courier import Collector, Courier
from trunkline_runtime.gateway.accounts.files import LedgerFile, LedgerFileError, to_log
from trunkline_runtime.gateway.accounts.spool import DiskSpool, MemorySpool, Spool, SpoolError

log = logging.getLogger("trunkline.ledger")

Keep = Callable[[CallRecord], None]
"""Takes a record and is done with it at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What was chosen. Without a file, records are lines of the log."""

    file: LedgerFile | None = None
    collector: Collector | None = None
    spool: Spool | None = None  # for the collector; None where there is none


class BooksError(ValueError):
    """The ledger cannot be kept as it was asked for; the text says which option is to be mended."""


def books_of(*, file: Path | None, url: str, token: str, folder: Path | None, most: int) -> Books:
    """What the command line asks for: opened, so that a mistake is told before the first call.

    `folder` is for at most so many bytes of records; without it they wait in memory. Raises BooksError.
    """
    if folder is not None and not url:
        raise BooksError("--ledger-spool is for what --ledger-url has not taken: give both")
    try:
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise BooksError("--ledger-url must be a URL, such as https://ledger.example/calls")
        if parts.username or parts.password:
            raise BooksError("--ledger-url must hold no password: set TRUNKLINE_LEDGER_TOKEN")
        kept = None if file is None else LedgerFile(file)
        if not url:
            return Books(file=kept)
        spool: Spool = (
            MemorySpool(most, _name) if folder is None else DiskSpool(folder, most, _name)
        )
    except LedgerFileError as error:
        raise BooksError(f"--ledger: {error}") from error
    except SpoolError as error:
        raise BooksError(f"--ledger-spool: {error}") from error
    return Books(file=kept, collector=Collector(url=url, token=token), spool=spool)


def _name() -> str:
    return secrets.token_hex(8)


@contextlib.asynccontextmanager
async def keeping(books: Books, registry: CollectorRegistry) -> AsyncIterator[Keep]:
    """What takes records; on the way out, those that wait are sent."""
    here = to_log if books.file is None else books.file.keep
    async with contextlib.AsyncExitStack() as stack:
        if books.file is not None:
            stack.callback(books.file.close)
        if books.collector is None:
            yield here
            return
        assert books.spool is not None, "a collector has a spool"
        courier = Courier(books.collector, books.spool, registry)
        running = asyncio.create_task(courier.run())
        running.add_done_callback(_report)
        stack.push_async_callback(_finished, courier, running)

        def both(record: CallRecord) -> None:
            here(record)
            courier.keep(record)

        yield both


async def _finished(courier: Courier, running: "asyncio.Task[None]") -> None:
    running.cancel()
    await asyncio.wait([running])
    await courier.close()


def _report(task: "asyncio.Task[None]") -> None:
    """It runs for ever; where it fails that is a bug, and must not end in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("records are no longer sent", exc_info=error)
