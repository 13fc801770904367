"""One worker's control link to this gateway: what is asked on it, and what the worker says."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from websockets.asyncio.server import ServerConnection, broadcast

from trunkline_runtime.contract import (
    AGENT_HEADER,
    PROTOCOL_VERSION,
    Settings,
)
from trunkline_runtime.gateway.dialling import Failed
from trunkline_runtime.gateway.table import Row, Table

MAX_SLOTS: Final = 256  # as in the VoiceAgent


class Malformed(ValueError):
    """A message that no worker of ours sends; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The worker holds a slot; the ticket opens one data link."""

    ticket: str


class WorkerLink:
    """One control link and the row it feeds."""

    def __init__(self, connection: ServerConnection, row: Row, port: int, table: Table) -> None:
        self.connection = connection
        self.row = row
        self.host: str = connection.remote_address[0]
        self.port = port
        self.seen = asyncio.get_running_loop().time()
        self.late = 0.0  # share of frames that came late, as told last
        self.left = False  # it has said goodbye
        self._table = table
        self._pending: dict[str, asyncio.Future[Granted | Failed]] = {}

    def __repr__(self) -> str:
        return f"<WorkerLink {self.row.agent} {self.row.worker} pending={len(self._pending)}>"

    def send(self, **message: object) -> None:
        """Does not wait: a worker that does not read is dropped after three silent seconds."""
        broadcast([self.connection], json.dumps(message))

    async def reserve(
        self, call: str, settings: Settings, by: float, hold: float, *, held: bool = False
    ) -> Granted | Failed:
        """A grant that is held for `hold` seconds, or why there is none by `by`, a time of the loop.

        With `held` the table counts a slot for this call already.
        """
        answered: asyncio.Future[Granted | Failed] = asyncio.get_running_loop().create_future()
        self._pending[call] = answered
        if not held:
            self._table.ask(self.row)
        self.send(type="reserve", call=call, agent=self.row.agent, settings=settings, deadline=hold)
        try:
            async with asyncio.timeout_at(by):
                return await answered
        except TimeoutError:
            return (
                Failed("did not answer a reserve in time")
                if answered.cancelled()
                else answered.result()
            )
        except asyncio.CancelledError:
            # The caller left, perhaps in the very turn in which the slot was granted.
            if not answered.cancelled() and isinstance(granted := answered.result(), Granted):
                self.release(granted.ticket)
            raise
        finally:
            if self._pending.pop(call, None) is not None:
                self._table.settle(self.row, granted=False)

    def release(self, ticket: str) -> None:
        self.send(type="release", ticket=ticket)

    def bar(self, barred: bool) -> None:
        """The route's drain list names the worker, or no longer does."""
        if barred != self.row.barred:
            self._table.bar(self.row, barred)
            self.send(type="drain" if barred else "undrain")

    def heard(self, message: Mapping[str, Any]) -> None:
        """Acts on one message. Raises `Malformed`.

        After its goodbye a worker's word counts for nothing: a grant that crossed with it is given back.
        """
        match message:
            case {"type": "granted", "call": str(), "ticket": str(ticket)} if self.left:
                self.release(ticket)
            case _ if self.left:
                pass
            case {"type": "free", "n": int(free), "busy": int(busy), "draining": bool(draining)}:
                if not 0 <= free <= self.row.slots or not 0 <= busy <= self.row.slots:
                    raise Malformed("free and busy slots must lie between 0 and the slots of hello")
                self._table.report(self.row, free=free, busy=busy, draining=draining)
                self.late = _share(message.get("late", 0.0))
            case {"type": "granted", "call": str(call), "ticket": str(ticket)}:
                self._granted(call, ticket)
            case {"type": "full", "call": str(call)}:
                self._settle(call, Failed("full", full=True))
            case {"type": "bye"}:
                self.left = True
                self._table.report(self.row, free=0, busy=self.row.busy, draining=True)
                for call in list(self._pending):
                    self._settle(call, Failed("left", full=True))
            case {"type": "free" | "granted" | "full" as kind}:
                raise Malformed(f"{kind} lacks a key or has one of the wrong type")

    def lost(self) -> None:
        """The link is gone, and with it all that was asked on it."""
        for call in list(self._pending):
            self._settle(call, Failed("lost its control link", full=True))

    def _granted(self, call: str, ticket: str) -> None:
        if not self._settle(call, Granted(ticket)):
            self.release(ticket)  # nobody waits for it any more

    def _settle(self, call: str, outcome: Granted | Failed) -> bool:
        answered = self._pending.pop(call, None)
        if answered is None:
            return False
        granted = isinstance(outcome, Granted)
        self._table.settle(self.row, granted=granted, full=not granted)
        if answered.done():
            return False
        answered.set_result(outcome)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    agent: str
    worker: str
    boot: str
    slots: int
    port: int


def hello_from(text: str | bytes, agent: str) -> Hello:
    match message_from(text):
        case {
            "type": "hello",
            "version": int(version),
            "agent": str(named),
            "worker": str(worker),
            "boot": str(boot),
            "slots": int(slots),
            "port": int(port),
        }:
            if version != PROTOCOL_VERSION:
                raise Malformed(f"this gateway speaks version {PROTOCOL_VERSION}, not {version}")
            if named != agent:
                raise Malformed(f"hello names another agent than {AGENT_HEADER}")
            if not worker or not 1 <= slots <= MAX_SLOTS or not 1 <= port <= 65535:
                raise Malformed("hello needs a worker, 1 to 256 slots and a port")
            return Hello(agent=agent, worker=worker, boot=boot, slots=slots, port=port)
    raise Malformed("a link begins with a hello that has all its keys")


def _share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Malformed("late must be a number from 0 to 1")
    return float(value)


def message_from(text: str | bytes) -> Mapping[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed("a message must be JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Malformed("a message must be a JSON object with a type")
    return message
