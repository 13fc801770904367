"""The routes in a Secret, which gateways mount: one that starts while no operator runs has them too."""

import asyncio
import base64
import binascii
import json
import logging
from typing import Final, Self

from trunkline_operator.cluster import ApiError, Cluster, path
from trunkline_operator.fleet import Fleet
from trunkline_runtime.contract import LABEL_MANAGED_BY, MANAGED_BY, Route

KEY: Final = "routes.json"
# A kubelet brings a changed Secret into pods within a minute, so haste would gain nothing.
GAP_SECONDS: Final = 1.0

log = logging.getLogger("trunkline.routes")


class RoutesSecret:
    """Keeps the Secret equal to the fleet's routes; an asynchronous context manager."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, fleet: Fleet) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._fleet = fleet
        self._task: asyncio.Task[None] | None = None

    async def earlier(self) -> list[Route]:
        """The routes that an earlier operator wrote, and none if they cannot be read."""
        secret = await self._cluster.find(path("Secret", self._namespace, self._name))
        try:
            text = base64.b64decode(((secret or {}).get("data") or {}).get(KEY, ""))
            routes: list[Route] = json.loads(text)["routes"] if text else []
            return [route for route in routes if route["agent"] and route["rungs"] is not None]
        except (binascii.Error, KeyError, TypeError, ValueError) as error:
            log.warning("Secret %s/%s has no routes: %r", self._namespace, self._name, error)
            return []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        failed = ""
        while True:
            await self._fleet.published.wait()
            self._fleet.published.clear()
            try:
                await self._write()
                failed = ""
            except ApiError as error:
                self._fleet.published.set()
                if str(error) != failed:
                    failed = str(error)
                    log.error("cannot keep the routes in a Secret: %s", error)
            await asyncio.sleep(GAP_SECONDS)

    async def _write(self) -> None:
        document = json.dumps(self._fleet.document, separators=(",", ":"))
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self._name, "labels": {LABEL_MANAGED_BY: MANAGED_BY}},
            "data": {KEY: base64.b64encode(document.encode()).decode()},
        }
        await self._cluster.apply(path("Secret", self._namespace, self._name), body)
