"""Who an operator works with, played: pods run and serve as soon as they exist, and drain when they are told to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fake_gateway import agent_load, worker_load
from node_cast import Nodes
from operator_rig import NAME, World

from trunkline_dev.kube import ApiError, is_true
from trunkline_runtime.contract import LABEL_AGENT


@contextlib.asynccontextmanager
async def played(world: World, nodes: Nodes | None = None) -> AsyncIterator[None]:
    """The nodes make each pod ready, or one that has no name; the gateway tells of a worker on each, without calls."""
    pods: set[str] = set()
    told: list[int] = [0]

    async def speak() -> None:
        route = world.gateway.routes.get(world.key)
        draining = set(route["draining"] if route else ())
        workers = {name: worker_load(draining=name in draining) for name in pods}
        await world.gateway.say(world.key, agent_load(workers))

    async def node() -> None:
        changes = world.api.follow(world.pods, labelSelector=f"{LABEL_AGENT}={NAME}")
        async with contextlib.aclosing(changes):
            async for found in changes:
                here = {pod["metadata"]["name"]: pod for pod in found.values()}
                for name, pod in here.items():
                    with contextlib.suppress(ApiError):  # it went meanwhile
                        if nodes:
                            await nodes.serve(pod)
                        elif not is_true(pod, "Ready"):
                            await world.make_ready(name)
                if here.keys() != pods:
                    pods.clear()
                    pods.update(here)
                    await speak()

    async def gateway() -> None:
        while True:
            await world.gateway.until(lambda it: len(it.told) != told[0], seconds=3600)
            told[0] = len(world.gateway.told)
            await speak()

    tasks = [asyncio.create_task(part()) for part in (node, gateway)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
