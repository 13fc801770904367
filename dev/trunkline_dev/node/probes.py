"""What the probes of a container make of it, as the kubelet counts."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

import aiohttp

from trunkline_dev.kube import Json

EAGER_SECONDS: Final = 0.1
"""Between probes of what is not healthy yet; the kubelet waits a whole period, and so would every test."""


async def verdicts(
    prober: aiohttp.ClientSession, container: Json, probe: Json, address: str, *, healthy: bool
) -> AsyncGenerator[bool, None]:
    """Yields whether the container is healthy, whenever that changes from `healthy`."""
    await asyncio.sleep(probe.get("initialDelaySeconds", 0))
    streak = 0
    while True:
        passed = await _passes(prober, container, probe, address)
        streak = streak + 1 if passed != healthy else 0
        if streak >= probe.get("successThreshold" if passed else "failureThreshold", 1):
            healthy, streak = passed, 0
            yield healthy
        await asyncio.sleep(probe.get("periodSeconds", 10) if healthy else EAGER_SECONDS)


async def _passes(
    prober: aiohttp.ClientSession, container: Json, probe: Json, address: str
) -> bool:
    get = probe["httpGet"]
    ports = {port.get("name"): port["containerPort"] for port in container.get("ports") or []}
    port, host = ports.get(get["port"], get["port"]), get.get("host") or address
    url = f"{get.get('scheme', 'HTTP').lower()}://{host}:{port}{get.get('path') or '/'}"
    headers = {header["name"]: header["value"] for header in get.get("httpHeaders") or []}
    timeout = aiohttp.ClientTimeout(total=probe.get("timeoutSeconds", 1))
    try:
        async with prober.get(
            url, headers=headers, timeout=timeout, ssl=False, allow_redirects=False
        ) as response:
            return 200 <= response.status < 400
    except (aiohttp.ClientError, TimeoutError):
        return False
