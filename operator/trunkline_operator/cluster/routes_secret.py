"""The routes in a Secret, which gateways mount: one that starts while no operator runs has them too."""

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Final

from trunkline_operator import parts
from trunkline_operator.agent.spec import Json
from trunkline_operator.cluster.client import ApiError, Cluster, path
from trunkline_operator.gateways.fleet import Fleet
from trunkline_runtime.contract import Routes

KEY: Final = "routes.json"
# A kubelet brings a changed Secret into pods within a minute, so haste would gain nothing.
GAP_SECONDS: Final = 1.0

log = logging.getLogger("trunkline.routes")


class RoutesSecret:
    """The Secret of that name."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name

    async def earlier(self) -> Routes | None:
        """What an earlier operator wrote; None if nothing can be read."""
        secret = await self._cluster.find(path("Secret", self._namespace, self._name))
        text = ((secret or {}).get("data") or {}).get(KEY)
        if not text:
            return None
        try:
            routes: Routes = json.loads(base64.b64decode(text))
            [(route["agent"], route["rungs"]) for route in routes["routes"]]
            return routes if routes["epoch"] >= 0 else None
        except (KeyError, TypeError, ValueError) as error:
            log.warning("Secret %s/%s has no routes: %r", self._namespace, self._name, error)
            return None

    @contextlib.asynccontextmanager
    async def kept(self, fleet: Fleet) -> AsyncIterator[None]:
        """Keeps the Secret equal to the fleet's routes."""
        async with parts.running(self._keep(fleet), name="the keeping of the routes Secret"):
            yield

    async def _keep(self, fleet: Fleet) -> None:
        failed = ""
        while True:
            await fleet.published.wait()
            fleet.published.clear()
            try:
                await self._write(fleet.document)
                failed = ""
            except ApiError as error:
                fleet.published.set()
                if str(error) != failed:
                    failed = str(error)
                    log.error("cannot keep the routes in a Secret: %s", error)
            await asyncio.sleep(GAP_SECONDS)

    async def _write(self, routes: Routes) -> None:
        await self._cluster.apply(
            path("Secret", self._namespace, self._name), routes_secret(self._name, routes)
        )


def routes_secret(name: str, routes: Routes) -> Json:
    """The Secret's body. No labels: those are Helm's, which refuses an upgrade over fields of another's."""
    document = json.dumps(routes, separators=(",", ":"))
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "data": {KEY: base64.b64encode(document.encode()).decode()},
    }
