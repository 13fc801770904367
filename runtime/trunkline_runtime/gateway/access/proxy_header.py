"""The PROXY protocol, versions 1 and 2: what a load balancer says of a connection before its first byte.

Source: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, §2. The header is read from the socket before
anything else, TLS included, so a reader must never take more than the header: it says each time how much it may.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"  # of version 2
BEGINNING: Final = b"PROXY "  # of version 1
FIRST: Final = 12  # bytes that tell the versions apart; both are longer
MAX_LINE: Final = 107  # of version 1, as its text says
MAX_REST: Final = (
    2048  # of version 2 behind its 16 bytes: addresses are 36, what vendors add a few hundred
)
_FIXED: Final = 16
_LOCAL, _PROXY = 0x20, 0x21
_OWN: Final = frozenset({0x00, 0x31, 0x32})  # unspecified, and Unix sockets
_ADDRESSES: Final = {
    0x11: (4, 12),
    0x21: (16, 36),
}  # family → (bytes of one, of all): TCP over IPv4, IPv6


class ProxyHeaderError(ValueError):
    """No PROXY header; the text says why."""


@dataclass(frozen=True, slots=True)
class More:
    """The header goes on: so many bytes may be read, and no more."""

    count: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where the connection comes from; "" = from the proxy itself, a health check for instance."""

    address: str


def read(data: bytes) -> Source | More:
    """What the bytes so far say. Raises `ProxyHeaderError`."""
    if len(data) < FIRST:
        return More(FIRST - len(data))
    if data.startswith(SIGNATURE):
        return _binary(data)
    if data.startswith(BEGINNING):
        return _line(data)
    raise ProxyHeaderError("a trusted proxy sent no PROXY header")


def _line(data: bytes) -> Source | More:
    end = data.find(b"\r\n")
    if end < 0:
        if len(data) >= MAX_LINE:
            raise ProxyHeaderError("its line does not end")
        return More(1 if data.endswith(b"\r") else 2)
    words = data[:end].decode("latin-1").split(" ")
    if words[1] == "UNKNOWN":
        return Source("")
    if len(words) != 6 or words[1] not in ("TCP4", "TCP6"):
        raise ProxyHeaderError("its line is no PROXY TCP4 or TCP6 with two addresses and two ports")
    try:
        address = ip_address(words[2])
    except ValueError:
        raise ProxyHeaderError("its line holds something that is no address") from None
    if isinstance(address, IPv4Address) != (words[1] == "TCP4"):
        raise ProxyHeaderError("its line holds an address of the other family")
    return Source(str(address))


def _binary(data: bytes) -> Source | More:
    if len(data) < _FIXED:
        return More(_FIXED - len(data))
    command, family, rest = data[12], data[13], int.from_bytes(data[14:16])
    if command not in (_LOCAL, _PROXY):
        raise ProxyHeaderError("it is of a version or command that is not known")
    if rest > MAX_REST:
        raise ProxyHeaderError(f"it is longer than {MAX_REST} bytes")
    if len(data) < _FIXED + rest:
        return More(_FIXED + rest - len(data))
    if command == _LOCAL or family in _OWN:
        return Source("")
    if family not in _ADDRESSES:
        raise ProxyHeaderError("it is of no TCP connection")
    size, least = _ADDRESSES[family]
    if rest < least:
        raise ProxyHeaderError("it is too short for its addresses")
    packed = data[_FIXED : _FIXED + size]
    return Source(str(IPv4Address(packed) if size == 4 else IPv6Address(packed)))
