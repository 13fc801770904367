"""What each side of a call is told when the other one ends it, and what may still be done about it. One table, no I/O.

Codes are those of RFC 6455 section 7.4 and IANA's registry. 1005 stands for a Close without a code and 1006 for none
at all; neither is ever sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from websockets.frames import Close

from trunkline_runtime.contract import Close as Code

GOING_AWAY: Final = 1001
NO_CODE: Final = 1005
NO_CLOSE: Final = 1006

WORKER_LOST: Final = Close(Code.LOST, "worker lost: call again")
NOBODY_ELSE: Final = Close(
    Code.TRY_LATER, "worker lost, and no other has room: call again after a while"
)
MOVED: Final = Close(GOING_AWAY, "the call goes to another worker")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a worker's end means for its call."""

    told: Close | None = None  # to the caller; None: what the worker said
    lost: bool = False  # the call is counted as lost
    again: bool = False  # another worker may have it, if the caller has heard nothing yet


# A worker's end by its code. What is not in the table was meant for the caller: it is passed on as it is.
_WORKERS: Final[Mapping[int, Rule]] = {
    NO_CLOSE: Rule(told=WORKER_LOST, lost=True, again=True),  # it died, or broke the protocol
    GOING_AWAY: Rule(told=WORKER_LOST, lost=True, again=True),  # it leaves, and has not waited
    Code.LOST: Rule(lost=True, again=True),  # its engine failed; its reason says so
    Code.RESTART: Rule(lost=True, again=True),  # its grace is over
    Code.TRY_LATER: Rule(again=True),  # it has no room after all
}
_AS_SAID: Final = Rule()


def of_worker(code: int) -> Rule:
    """What is to be done when a worker ends with this code."""
    return _WORKERS.get(code, _AS_SAID)


# What a worker is told when its call ends elsewhere, by the code of that end; a gateway's own faults with a caller
# are none of the worker's. What is not in the table is passed on as it is.
_CALLERS: Final[Mapping[int, Close]] = {
    NO_CLOSE: Close(GOING_AWAY, "the caller is gone"),
}
_GATEWAYS: Final[Mapping[int, Close]] = {
    Code.PROTOCOL_ERROR: Close(GOING_AWAY, "the caller broke the protocol"),
    Code.TOO_BIG: Close(GOING_AWAY, "the caller broke the protocol"),
}


def for_worker(close: Close, *, by_gateway: bool) -> Close:
    """What a worker is told when its caller, or the gateway, ends the call with `close`."""
    return (_GATEWAYS if by_gateway else _CALLERS).get(close.code, close)
