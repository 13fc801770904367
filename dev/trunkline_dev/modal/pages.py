"""What people and tests ask of a running local Modal: what there is, and what shall go wrong."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Final, Protocol

from trunkline_dev.modal.faults import FaultError, Plan, described, parse
from trunkline_dev.modal.http import Request, Response, page, text
from trunkline_dev.modal.rpc import Tally
from trunkline_dev.modal.state import AppRecord, State

MAX_BODY: Final = 64 * 2**10  # bytes of faults: 100 rules have room
NAMES: Final = ("containers", "apps", "processes", "faults", "calls")


class Shown(Protocol):
    """What the local Modal shows beside its state."""

    @property
    def pids(self) -> list[int]: ...

    def describe_server(self, function_id: str) -> dict[str, Any]: ...


class Pages:
    """Answers below /_local."""

    def __init__(
        self, state: State, shown: Shown, inject: Callable[[Plan], Awaitable[None]]
    ) -> None:
        self._state, self._shown, self._inject = state, shown, inject

    async def answer(self, request: Request) -> Response:
        match request.method, request.path:
            case "GET", "/_local/containers":
                return page([asdict(boot) for boot in self._state.boots])
            case "GET", "/_local/apps":
                return page([self._app(app) for app in self._state.apps.values()])
            case "GET", "/_local/processes":
                return page(self._shown.pids)
            case "GET", "/_local/calls":
                sdk, containers = self._state.sdk_calls, self._state.container_calls
                return page({"sdk": _tally(sdk), "containers": _tally(containers)})
            case "GET", "/_local/faults":
                return page(described(self._state.faults))
            case "PUT", "/_local/faults":
                return await self._set_faults(request.body)
            case "DELETE", "/_local/faults":
                return await self._set_faults(b"[]")
        return text(404, "there are " + ", ".join(f"/_local/{name}" for name in NAMES))

    async def _set_faults(self, body: bytes) -> Response:
        try:
            plan = parse(json.loads(body))
        except FaultError as error:
            return text(400, str(error))
        except ValueError as error:
            return text(400, f"the body is no JSON: {error}")
        await self._inject(plan)
        return page(described(self._state.faults))

    def _app(self, app: AppRecord) -> dict[str, Any]:
        return {
            "app_id": app.app_id,
            "name": app.name,
            "environment": app.environment,
            "state": "deployed" if app.deployed else "stopped",
            "version": app.version,
            "tags": app.tags,
            "servers": [
                self._shown.describe_server(function_id) for function_id in app.functions.values()
            ],
        }


def _tally(tally: Tally) -> dict[str, dict[str, int]]:
    return {"served": dict(tally.served), "unimplemented": dict(tally.unimplemented)}
