"""Events, so that `kubectl describe` says why a pod waits."""

import logging

import aiohttp

from trunkline_dev.kube import Api, ApiError, Json
from trunkline_dev.node.container import timestamp

log = logging.getLogger("trunkline.dev.node")


async def warn(api: Api, pod: Json, reason: str, message: str) -> None:
    """Posts a warning about a pod; if that fails, a line in the log must do."""
    metadata, now = pod["metadata"], timestamp()
    event = {
        "metadata": {"generateName": f"{metadata['name']}-"},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            **{key: metadata[key] for key in ("name", "namespace", "uid")},
        },
        "type": "Warning",
        "reason": reason,
        "message": message,
        "source": {"component": "trunkline-dev-node"},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    try:
        await api.create(f"/api/v1/namespaces/{metadata['namespace']}/events", event)
    except (aiohttp.ClientError, TimeoutError, ApiError) as error:
        log.warning(
            "%s/%s: %s: %s (%r)", metadata["namespace"], metadata["name"], reason, message, error
        )
