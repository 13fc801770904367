"""The server's half of a WebSocket's opening, RFC 6455 section 4.2: from the head of a request to its 101.

A caller waits for it twice, at a gateway and at its worker. So the request that nearly every client sends is read by
hand. Whatever is out of the ordinary in any way is left to `websockets`, which also has the words of all refusals:
nothing is believed here that it would not believe, and a test holds the two against each other.
"""

import email.utils
import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from websockets.datastructures import Headers
from websockets.http11 import MAX_LINE_LENGTH, MAX_NUM_HEADERS, Request
from websockets.server import ServerProtocol
from websockets.utils import accept_key

from trunkline_runtime.process import QUIET

HEAD_END: Final = b"\r\n\r\n"
_FIELD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")  # RFC 9110, section 5
_ASKED: Final = re.compile(r"GET ([!-~]+) HTTP/1\.1")
_KEY: Final = re.compile(r"[0-9A-Za-z+/]{22}==")  # 16 bytes
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_TOKENS: Final = re.compile(rf"{_TOKEN}(?:, ?{_TOKEN})*")
_CONNECTIONS: Final = frozenset({"upgrade", "keep-alive, upgrade"})
_BODY: Final = ("Content-Length", "Transfer-Encoding")


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A valid request. `accept` is the proof that it was read."""

    request: Request
    accept: str

    @property
    def subprotocols(self) -> list[str]:
        """What the client offers."""
        return offered(self.request.headers)

    def response(self, *fields: tuple[str, str]) -> bytes:
        """The 101; the values of `fields` are ours, so they are lines of printable characters."""
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            f"Date: {_date(int(time.time()))}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Accept: {self.accept}",
            *(f"{name}: {value}" for name, value in fields),
            "",
            "",
        ]
        return "\r\n".join(lines).encode("ascii")


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that no WebSocket begins with, and the plain answer to it."""

    answer: bytes  # b"": whoever speaks no HTTP is not spoken to in HTTP by `websockets`


def upgrade(head: bytes) -> Upgrade | Refused:
    """What the head of a request asks for, its last empty line included."""
    return _ordinary(head) or _any(head)


def offered(headers: Headers) -> list[str]:
    """The subprotocols that a client offers."""
    lines = headers.get_all("Sec-WebSocket-Protocol")
    return [name.strip(" \t") for line in lines for name in line.split(",")]


def fields_of(lines: Sequence[str]) -> Headers | None:
    """The fields of a head that was read as ISO-8859-1; None where a line is none, or there are more than anybody sends."""
    if len(lines) > MAX_NUM_HEADERS:
        return None
    found = Headers()
    for line in lines:
        if _FIELD.fullmatch(line) is None or len(line) + 2 > MAX_LINE_LENGTH:
            return None
        name, _, value = line.partition(":")
        found.set_insecure(name, value.strip(" \t"))  # both have just been looked at
    return found


def _ordinary(head: bytes) -> Upgrade | None:
    """The request as nearly all clients write it."""
    first, *lines = head.removesuffix(HEAD_END).decode("latin-1").split("\r\n")
    asked = _ASKED.fullmatch(first)
    if asked is None or len(first) + 2 > MAX_LINE_LENGTH:
        return None
    headers = fields_of(lines)
    if headers is None or any(name in headers for name in _BODY):
        return None
    match [
        headers.get_all(name)
        for name in ("Connection", "Upgrade", "Sec-WebSocket-Version", "Sec-WebSocket-Key")
    ]:
        case [[connection], [protocol], ["13"], [key]] if (
            connection.lower() in _CONNECTIONS
            and protocol.lower() == "websocket"
            and _KEY.fullmatch(key)
            and len(headers.get_all("Origin")) < 2
            and all(map(_TOKENS.fullmatch, headers.get_all("Sec-WebSocket-Protocol")))
        ):
            return Upgrade(Request(asked[1], headers), accept_key(key))
    return None


def _any(head: bytes) -> Upgrade | Refused:
    """What `websockets` makes of it."""
    protocol = ServerProtocol(logger=QUIET)
    protocol.receive_data(head)
    request = next(iter(protocol.events_received()), None)
    written = b"".join(protocol.data_to_send())
    protocol.parser.close()  # its frame refers to the protocol: one cycle less
    if not isinstance(request, Request):
        return Refused(written)
    response = protocol.accept(request)
    if response.status_code != 101:
        return Refused(response.serialize())
    return Upgrade(request, response.headers["Sec-WebSocket-Accept"])


@functools.lru_cache(maxsize=1)
def _date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)
