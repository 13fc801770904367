"""Where to call, how a call is to go, and what it was."""

import ssl
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from trunkline_runtime.contract import REALTIME_PATH


class CallError(Exception):
    """A call that could not be placed. The text says what was tried and what to do."""


class EndedBy(StrEnum):
    """Who or what ended a call."""

    REPLY = "reply"  # the question is answered, and the caller hung up
    HANG_UP = "hang_up"  # the caller was asked to
    TIMEOUT = "timeout"  # the caller's patience ended
    REFUSED = "refused"  # no 101 came, but a plain HTTP answer
    CLOSED = "closed"  # the other side closed, or the link broke (1006)
    NONSENSE = "nonsense"  # the other side does not speak Realtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Where to call, and as whom."""

    url: str  # ws://HOST:PORT, or http(s)://; with a path of its own or without
    model: str = ""  # [namespace/]agent
    key: str = ""
    tls: ssl.SSLContext | None = field(default=None, repr=False)  # None: the system's authorities
    server_name: str = ""  # in the gateway's certificate; "" is the URL's host

    def address(self) -> str:
        """The WebSocket URL; raises `CallError` for one that cannot be called."""
        parts = urlsplit(self.url if "://" in self.url else f"ws://{self.url}")
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        try:
            callable_ = scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number
            callable_ = False
        if not callable_:
            raise CallError(f"cannot call {self.url!r}: give ws://HOST:PORT or wss://HOST")
        path = REALTIME_PATH if parts.path.rstrip("/") in ("", "/v1") else parts.path
        query = parts.query or (urlencode({"model": self.model}, safe="/") if self.model else "")
        return urlunsplit((scheme, parts.netloc, path, query, ""))

    def security(self) -> dict[str, Any]:
        """What `connect` is told beside the address of a wss URL."""
        named = {"server_hostname": self.server_name} if self.server_name else {}
        trusted = {} if self.tls is None else {"ssl": self.tls}
        return {**named, **trusted}

    def headers(self) -> dict[str, str]:
        """Raises `CallError` for a key that no header can hold."""
        if not self.key:
            return {}
        if not (self.key.isascii() and self.key.isprintable()):
            raise CallError(
                "the key has characters that a header cannot hold: is it the whole key?"
            )
        return {"Authorization": f"Bearer {self.key}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a call goes, and when it is over."""

    chunk_ms: int = 20  # of audio in one message; browsers and phones send 20
    after_greeting: bool = False  # speak only after the first reply has been played
    replies: int = 1  # to the question, then hang up; 0 waits for `hang_up` or the timeout
    timeout_seconds: float = 60.0  # of the whole call, from the 101 on
    dial_seconds: float = 15.0  # a gateway answers within session.answerSeconds, 8 by default


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLog:
    """What one call was, as its caller saw it.

    All times are of the caller's clock, seconds since the epoch unless told otherwise, so that the logs of
    several processes can be joined; None where the moment never came.
    """

    call: str  # the call's id, "" where none was told
    started: float | None  # dialled
    answered: float | None  # the 101
    first_message: float | None
    first_audio: float | None  # its arrival
    spoke_until: float | None  # when the last audible sample of the question was sent
    answer_heard: float | None  # when the first audible sample of the answer is played
    ended: float | None  # hung up, or found the call gone
    ended_by: EndedBy | None
    status: int | None  # HTTP, of a refusal
    refusal: str  # its body
    retry_after: float | None
    close_code: int | None
    close_reason: str
    frames_sent: int
    frames_received: int
    audio_frames_received: int
    bytes_sent: int  # of messages, without what carries them
    bytes_received: int
    max_gap: float  # the longest between two audio frames of one reply
    underruns: int  # how often the player of a reply ran dry
    heard: tuple[str, ...]  # what the agent understood
    said: tuple[str, ...]  # what the agent answered
    answer: bytes  # the audio of the replies to the question, PCM16 at 24 kHz

    @property
    def response_seconds(self) -> float | None:
        """From the end of the question to the first audible sample of the answer."""
        if self.answer_heard is None or self.spoke_until is None:
            return None
        return self.answer_heard - self.spoke_until

    def record(self) -> dict[str, Any]:
        """For JSON: all but the audio."""
        fields = asdict(self)
        del fields["answer"]
        return {**fields, "response_seconds": self.response_seconds}
