"""How a worker is asked to take a call: where it is, what is said at its door, and how its answer is read."""

import re
import ssl
from dataclasses import dataclass, field
from typing import Final

from websockets.client import ClientProtocol
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from trunkline_runtime.contract import ACCOUNT_HEADER, START_HEADER
from trunkline_runtime.process import QUIET

MAX_HEAD_BYTES: Final = 16 * 2**10  # of a request or a response
HEAD_END: Final = b"\r\n\r\n"
STARTED: Final = re.compile(r"(cold|restored) ([0-9]+[.][0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a worker is dialled."""

    host: str
    port: int
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    server_name: str = ""  # in its certificate, where that is not `host`


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """How the worker there is asked to take one call."""

    target: str  # path and query
    subprotocol: str | None
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    opening: bytes = field(default=b"", repr=False)  # frames that go before anything of the caller
    ours: bool = True  # a worker, whose account of the call is believed


class Handshake:
    """Our half of the upgrade: `websockets` writes the request and checks the response."""

    def __init__(self, address: Address, door: Door) -> None:
        path, _, query = door.target.partition("?")
        self._protocol = ClientProtocol(
            WebSocketURI(address.tls is not None, address.host, address.port, path, query),
            subprotocols=[Subprotocol(door.subprotocol)] if door.subprotocol else None,
            max_size=None,
            logger=QUIET,
        )
        request = self._protocol.connect()
        for name, value in door.headers:
            request.headers[name] = value
        self._protocol.send_request(request)
        self.opening = door.opening
        self.request = b"".join(self._protocol.data_to_send())
        self._response = b""
        self._ours = door.ours
        self.tells = False  # whether this worker gives an account of its calls
        self.started: tuple[str, float] | None = None
        """How a burst worker's container came up, and for how many seconds it has been; None = it does not say."""

    def receive(self, data: bytes) -> bytes | None:
        """What came behind the response; None until all of it is there."""
        self._response += data
        end = self._response.find(HEAD_END)
        if end < 0 and len(self._response) <= MAX_HEAD_BYTES:
            return None
        head, rest = self._response[: end + 4], self._response[end + 4 :]
        self._response = head if end >= 0 else b""
        self._protocol.receive_data(self._response)
        events = self._protocol.events_received()
        for response in (event for event in events if isinstance(event, Response)):
            self.tells = self._ours and ACCOUNT_HEADER in response.headers
            if found := STARTED.fullmatch(response.headers.get(START_HEADER, "")):
                self.started = found[1], float(found[2])
        self._protocol.parser.close()  # its frame refers to the protocol: one cycle less to collect
        return rest

    @property
    def subprotocol(self) -> str | None:
        return self._protocol.subprotocol

    @property
    def refusal(self) -> str | None:
        """Why the worker did not switch protocols."""
        if self._protocol.state is State.OPEN:
            return None
        status = self._response.partition(b"\r\n")[0].split(b" ")[1:2]
        if status and status[0].isdigit() and status[0] != b"101":
            return f"refused its data link with HTTP {status[0].decode()}"
        return "gave an answer to its data link that is no WebSocket handshake"
