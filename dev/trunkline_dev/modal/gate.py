"""Who may call the API, and which calls go wrong."""

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any, Final

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from trunkline_dev.modal.faults import Fault, Rule, Schedule
from trunkline_dev.modal.state import now

SUPPORTED: Final = "1.6."  # versions of the SDK that this was written against
HANG_SECONDS: Final = 3_600.0  # for a hang without an end: longer than anybody waits


class WrongModal(RuntimeError):
    """The installed `modal` is another than the local Modal speaks to."""


def refuse_version(version: str) -> None:
    """Raises WrongModal for a version of the SDK that was never tried here."""
    if not version.startswith(SUPPORTED):
        raise WrongModal(
            f"the local Modal speaks to modal {SUPPORTED}*, and {version} is installed: "
            f"pip install 'modal=={SUPPORTED}*'"
        )


class Gate:
    """Stands before every call of the SDK."""

    def __init__(self, api_tokens: Mapping[str, str] | None, faults: Schedule) -> None:
        self._api_tokens, self._faults = api_tokens, faults

    async def admit(self, name: str, metadata: Mapping[str, Any]) -> GRPCError | None:
        """Raises what the call fails with, or returns what it fails with once it has taken effect."""
        version = str(metadata.get("x-modal-client-version", ""))
        if version and not version.startswith(SUPPORTED):
            sentence = f"the local Modal speaks to modal {SUPPORTED}*, and this is {version}"
            raise GRPCError(Status.FAILED_PRECONDITION, sentence)
        self._authorize(metadata)
        if strike := self._faults.strike(Fault.RPC_HANGS, name, now()):
            await asyncio.sleep(HANG_SECONDS if strike.seconds is None else strike.seconds)
        strike = self._faults.strike(Fault.RPC_FAILS, name, now())
        if strike is None:
            return None
        error = failure(strike.rule)
        if not strike.rule.done:
            raise error
        return error

    def _authorize(self, metadata: Mapping[str, Any]) -> None:
        """Without a list of tokens any will do, as long as there is one."""
        token, secret = metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret")
        if not token or not secret:
            raise GRPCError(Status.UNAUTHENTICATED, "Token missing. Could not authenticate client.")
        known = self._api_tokens is None or hmac.compare_digest(
            self._api_tokens.get(token, "\0").encode(), secret.encode()
        )
        if not known or self._faults.holds(Fault.TOKEN_REVOKED, token, now()):
            raise GRPCError(Status.UNAUTHENTICATED, "Token validation failed")


def failure(rule: Rule) -> GRPCError:
    """What a call fails with; with `retry_after`, as Modal throttles: the SDK waits and tries again."""
    details = None
    if rule.retry_after is not None:
        details = [api_pb2.RPCRetryPolicy(retry_after_secs=rule.retry_after)]
    status = Status[rule.status or Status.UNAVAILABLE.name]
    return GRPCError(status, rule.message or "a fault of the local Modal", details)
