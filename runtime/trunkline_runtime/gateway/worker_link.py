"""One worker's control link to this gateway: what the worker says of itself, and the tickets of the calls it is to have."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from websockets.asyncio.server import ServerConnection, broadcast

from trunkline_runtime.contract import AGENT_HEADER, WORKER_PROTOCOL_VERSION, ticket
from trunkline_runtime.gateway.doors import warm_address
from trunkline_runtime.gateway.handshake import Address
from trunkline_runtime.gateway.routes import Route
from trunkline_runtime.gateway.standby import Standby
from trunkline_runtime.gateway.table import Row, Table

MAX_SLOTS: Final = 256  # as in the VoiceAgent


class Malformed(ValueError):
    """A message that no worker of ours sends; the text says what is wrong with it."""


class WorkerLink:
    """One control link and the row it feeds."""

    def __init__(
        self, connection: ServerConnection, row: Row, hello: "Hello", table: Table
    ) -> None:
        self.connection = connection
        self.row = row
        self.host: str = connection.remote_address[0]
        self.port = hello.port
        self.seen = asyncio.get_running_loop().time()
        self.late = 0.0  # as told last
        self.left = False  # it has said goodbye
        self.standby = Standby()
        self._link, self._key = hello.link, hello.ticket_key
        self._asked = 0
        self._table = table
        self._address: tuple[Route, Address] | None = None

    def __repr__(self) -> str:
        return f"<WorkerLink {self.row.agent} {self.row.worker} asked={self._asked}>"

    def ticket(self, call: str) -> str:
        """What opens one data link to the worker, for this call."""
        self._asked += 1
        return ticket(self._link, self._key, self._asked, call)

    def address(self, route: Route) -> Address:
        """Where it is dialled, the same object as long as the route is."""
        if self._address is None or self._address[0] is not route:
            self._address = route, warm_address(route, self.host, self.port)
        return self._address[1]

    def send(self, **message: object) -> None:
        """Does not wait: a worker that does not read is dropped after three silent seconds."""
        broadcast([self.connection], json.dumps(message))

    def bar(self, barred: bool) -> None:
        """The route's drain list names the worker, or no longer does."""
        if barred != self.row.barred:
            self._table.bar(self.row, barred)
            self.send(type="drain" if barred else "undrain")

    def heard(self, message: Mapping[str, Any]) -> None:
        """Acts on one message. Raises `Malformed`.

        After its goodbye a worker's word counts for nothing.
        """
        match message["type"]:
            case _ if self.left:
                pass
            case "free":
                self._report(message)
            case "bye":
                self.left = True
                self._table.report(
                    self.row, free=0, busy=self.row.busy, draining=True, seq=self.row.seq
                )

    def _report(self, message: Mapping[str, Any]) -> None:
        match message:
            case {"n": int(n), "busy": int(busy), "draining": bool(draining), "seq": int(seq)}:
                if not 0 <= n <= self.row.slots or not 0 <= busy <= self.row.slots:
                    raise Malformed("free and busy slots must lie between 0 and the slots of hello")
                self.late = _share(message.get("late", 0.0))
                self._table.report(self.row, free=n, busy=busy, draining=draining, seq=seq)
            case _:
                raise Malformed("free lacks a key or has one of the wrong type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    agent: str
    worker: str
    boot: str
    slots: int
    port: int
    link: int
    ticket_key: str = field(repr=False)


def hello_from(text: str | bytes, agent: str) -> Hello:
    match message_from(text):
        case {"type": "hello", "version": int(version)} if version != WORKER_PROTOCOL_VERSION:
            raise Malformed(f"this gateway speaks version {WORKER_PROTOCOL_VERSION}, not {version}")
        case {
            "type": "hello",
            "version": int(),
            "agent": str(named),
            "worker": str(worker),
            "boot": str(boot),
            "slots": int(slots),
            "port": int(port),
            "link": int(link),
            "ticketKey": str(ticket_key),
        }:
            if named != agent:
                raise Malformed(f"hello names another agent than {AGENT_HEADER}")
            if not worker or not 1 <= slots <= MAX_SLOTS or not 1 <= port <= 65535:
                raise Malformed("hello needs a worker, 1 to 256 slots and a port")
            if link < 1 or not ticket_key:
                raise Malformed("hello needs the number of its link and a key for tickets")
            return Hello(
                agent=agent,
                worker=worker,
                boot=boot,
                slots=slots,
                port=port,
                link=link,
                ticket_key=ticket_key,
            )
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
