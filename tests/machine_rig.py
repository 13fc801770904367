"""What tests on a whole machine share: an agent that runs, calls that are answered, and who is behind them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from trunkline_dev.callers import Holder
from trunkline_dev.demo import AGENTS
from trunkline_dev.kube import Json, is_true
from trunkline_dev.machine import Machine
from trunkline_runtime import contract
from trunkline_runtime.caller import Caller, CallLog, Line

SOON = 60.0  # a bound, not an expectation


def agent(name: str, **spec: Any) -> Json:
    warm = {"slotsPerPod": 2, "minPods": 1, "maxPods": 1, "bufferSlots": 0, "gpu": {"count": 0}}
    body = {"engine": {"type": "loopback"}, "access": {"public": True}, "warm": warm}
    return {
        "apiVersion": f"{contract.GROUP}/{contract.VERSION}",
        "kind": contract.KIND,
        "metadata": {"name": name},
        "spec": body | spec,
    }


@contextlib.asynccontextmanager
async def running(machine: Machine, body: Json, seconds: float = SOON) -> AsyncIterator[str]:
    """An agent that is Ready within so many seconds, and known to all gateways; deleted, and waited for, at the end.

    It is Ready when one gateway knows a pod, and the others may learn of it a moment later.
    """
    name = body["metadata"]["name"]
    await machine.apply(body)
    try:
        await machine.api.wait_for_one(
            f"{AGENTS}/{name}",
            lambda found: (
                is_true(found, "Ready")
                and ("burst" not in body["spec"] or is_true(found, "BurstReady"))
            ),
            seconds,
        )
        if body["spec"].get("warm", {}).get("minPods"):
            await until(lambda: known_everywhere(machine, name))
        yield name
    finally:
        await machine.api.delete(f"{AGENTS}/{name}")
        await machine.api.wait_gone(f"{AGENTS}/{name}", SOON)


async def known_everywhere(machine: Machine, name: str) -> bool:
    """Whether each gateway has a free slot of the agent."""
    async with httpx.AsyncClient(trust_env=False) as client:
        for number in range(machine.config.gateways):
            address = f"http://{machine.gateway_address(number)}:{contract.HEALTH_PORT}"
            state = (await client.get(address + contract.STATE_PATH)).json()
            workers = state["agents"].get(f"default/{name}", {}).get("workers", {})
            if not any(worker["free"] for worker in workers.values()):
                return False
    return True


@contextlib.asynccontextmanager
async def calling(
    machine: Machine, name: str, gateway: int = 0
) -> AsyncIterator[tuple[Caller, "asyncio.Task[CallLog]"]]:
    """A call that is answered and echoed."""
    caller = Caller.holding(Line(url=machine.gateway_url(gateway), model=name))
    task = asyncio.create_task(caller.run())
    try:
        await until(lambda: truth(caller.log().audio_frames_received > 0 or task.done()))
        assert caller.log().answered is not None, caller.log()
        yield caller, task
    finally:
        caller.hang_up()
        await asyncio.gather(task, return_exceptions=True)


async def truth(value: bool) -> bool:
    return value


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Waits for another process's state, which nothing announces."""
    async with asyncio.timeout(SOON):
        while not await holds():
            await asyncio.sleep(0.05)


async def still_echoed(caller: Caller) -> None:
    """Twelve further frames come back: the call lives."""
    wanted = caller.log().audio_frames_received + 12
    await until(lambda: truth(caller.log().audio_frames_received >= wanted))


def pods_of(name: str) -> dict[str, str]:
    return {"labelSelector": f"{contract.LABEL_AGENT}={name}"}


async def answered(machine: Machine, name: str, gateway: int = 0) -> bool:
    """Whether a call now is answered."""
    holder = Holder(Line(url=machine.gateway_url(gateway), model=name))
    await holder.settled()
    await holder.hang_up()
    return holder.outcome.answered is not None
