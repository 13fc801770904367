"""How a worker is asked to take a call: where it is, what is said at its door, and how its answer is read."""

import base64
import functools
import re
import secrets
import ssl
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from websockets.datastructures import Headers
from websockets.headers import build_host
from websockets.utils import accept_key

from trunkline_runtime import __version__
from trunkline_runtime.contract import ACCOUNT_HEADER, SEQ_HEADER, START_HEADER
from trunkline_runtime.upgrade import HEAD_END, fields_of

MAX_HEAD_BYTES: Final = 16 * 2**10  # of a request or a response
USER_AGENT: Final = f"trunkline/{__version__}"
STARTED: Final = re.compile(r"(cold|restored) ([0-9]+[.][0-9]+)")
WHOLE: Final = re.compile(r"[0-9]{1,18}")
PRINTABLE: Final = re.compile(r"[ -~]+")  # what no worker's ticket can end a line with
# The 101 of a pod's worker, as `Upgrade.response` writes it. All of it is read at once, for a caller waits.
OF_A_POD: Final = re.compile(
    rb"HTTP/1\.1 101 Switching Protocols\r\nDate: [ -~]{1,64}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    rb"Sec-WebSocket-Accept: ([!-~]+)\r\n%b: 1\r\n(?:Sec-WebSocket-Protocol: ([!-~]+)\r\n)?%b: ([0-9]{1,18})\r\n\r\n"
    % (ACCOUNT_HEADER.encode(), SEQ_HEADER.encode())
)
SWITCHING: Final = re.compile(r"HTTP/1\.1 101( [\t -~\x80-\xff]*)?")


# It takes addresses apart to see what they are, and there are no more than workers.
_host = functools.lru_cache(maxsize=1024)(build_host)


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


class Key(NamedTuple):
    """What a worker proves with that it has read our request, and the proof."""

    sent: str
    proof: str

    @classmethod
    def fresh(cls) -> "Key":
        """One that nobody knows, for one request."""
        sent = base64.b64encode(secrets.token_bytes(16)).decode()
        return cls(sent, accept_key(sent))


class Handshake:
    """Our half of the upgrade, RFC 6455 section 4.1.

    Written by hand, for a caller waits for it: `websockets` takes five times as long to write the request and to check
    the response. A test holds it against theirs. Raises ValueError for what would be more than a line.
    """

    def __init__(self, address: Address, door: Door, key: Key | None = None) -> None:
        key = key or Key.fresh()
        host = _host(address.host, address.port, address.tls is not None)
        fields = list(door.headers)
        if door.subprotocol:
            fields.append(("Sec-WebSocket-Protocol", door.subprotocol))
        more = [f"{name}: {value}" for name, value in fields]
        if not PRINTABLE.fullmatch("".join((door.target, host, *more))):
            raise ValueError("a request's line may have printable characters alone")
        written = (
            f"GET {door.target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {USER_AGENT}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key.sent}\r\nSec-WebSocket-Version: 13"
        )
        self.request = "\r\n".join([written, *more, "", ""]).encode("ascii")
        self.opening = door.opening
        self._accept = key.proof
        self._offered, self._ours = door.subprotocol, door.ours
        self._response = b""
        self._status = ""
        self._switched = False
        self.subprotocol: str | None = None
        self.tells = False  # whether this worker gives an account of its calls
        self.started: tuple[str, float] | None = None
        """How a burst worker's container came up, and for how many seconds it has been; None = it does not say."""
        self.seq: int | None = None  # of a pod's worker: its slots' state right after this answer

    def receive(self, data: bytes) -> bytes | None:
        """What came behind the response; None until all of it is there."""
        self._response += data
        if (found := OF_A_POD.match(self._response)) and self._takes(found):
            return self._response[found.end() :]
        end = self._response.find(HEAD_END)
        if end < 0 or end + 4 > MAX_HEAD_BYTES:
            return None if len(self._response) <= MAX_HEAD_BYTES else b""
        first, *lines = self._response[:end].decode("latin-1").split("\r\n")
        self._status = first
        self._read(fields_of(lines))
        return self._response[end + 4 :]

    @property
    def refusal(self) -> str | None:
        """Why the worker did not switch protocols."""
        if self._switched:
            return None
        status = self._status.split(" ")[1:2]
        if status and status[0].isascii() and status[0].isdigit() and status[0] != "101":
            return f"refused its data link with HTTP {status[0]}"
        return "gave an answer to its data link that is no WebSocket handshake"

    def _takes(self, found: re.Match[bytes]) -> bool:
        """Whether this is the answer to our request."""
        accept, protocol, seq = found[1].decode(), found[2], found[3]
        subprotocol = None if protocol is None else protocol.decode()
        if accept != self._accept or subprotocol not in (None, self._offered):
            return False
        self._switched, self.subprotocol, self.tells = True, subprotocol, self._ours
        self.seq = int(seq)
        return True

    def _read(self, fields: Headers | None) -> None:
        """Judges a response whose status line is known; None: it has a line that is no field."""
        if fields is None:
            return
        if WHOLE.fullmatch(seq := "".join(fields.get_all(SEQ_HEADER))):
            self.seq = int(seq)
        if not SWITCHING.fullmatch(self._status):
            return
        connection = ",".join(fields.get_all("Connection")).split(",")
        protocols = fields.get_all("Sec-WebSocket-Protocol")
        self._switched = (
            [each.lower() for each in fields.get_all("Upgrade")] == ["websocket"]
            and "upgrade" in (token.strip(" \t").lower() for token in connection)
            and fields.get_all("Sec-WebSocket-Accept") == [self._accept]
            and not fields.get_all("Sec-WebSocket-Extensions")  # we offer none
            and (not protocols or protocols == [self._offered])
        )
        self.subprotocol = protocols[0] if protocols and self._switched else None
        self.tells = self._ours and ACCOUNT_HEADER in fields
        if found := STARTED.fullmatch("".join(fields.get_all(START_HEADER))):
            self.started = found[1], float(found[2])
