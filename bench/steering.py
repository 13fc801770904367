"""What the operator's link costs a gateway with 1,000 agents, while its calls wait: for one agent that changes.

    python bench/steering.py [--quick] [--json FILE]

A gateway in a process of its own, and a link over which the benchmark speaks as the operator does, with the operator's
own texts. What differs is pushed in turns with everything, as an operator or a gateway of a version before does it. A
cost is the gateway's CPU time until it has answered: nothing else happens there meanwhile, and no call's frame goes on.
"""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import report
from load.relays import OPERATOR_TOKEN, Callers, Gateway, Stand, gateway
from load.rig import Places, free_ports, tell
from websockets.asyncio.client import ClientConnection, connect

from trunkline_operator.gateways.bulletin import RouteBulletin
from trunkline_runtime.contract import (
    CHANGES_HEADER,
    MAX_CONTROL_BYTES,
    OPERATOR_PATH,
    Allowances,
    Route,
)

EPOCH: Final = 3
AGENT: Final = "bench/agent-0007"

Once = Callable[[ClientConnection, int], Awaitable[None]]


def measure(quick: bool) -> list[report.Row]:
    agents, rounds, times = (50, 1, 5) if quick else (1000, 7, 20)
    with tempfile.TemporaryDirectory() as name:
        stand = Stand(
            folder=Path(name),
            places=Places.of_this_machine(urgent=False),
            worker_port=free_ports(1)[0],
        )
        with gateway(stand, Callers(stand.folder)) as subject:
            return asyncio.run(_measure(subject, agents, rounds, times))


async def _measure(subject: Gateway, agents: int, rounds: int, times: int) -> list[report.Row]:
    bulletin = RouteBulletin(EPOCH)
    for number in range(agents):
        bulletin.put(f"bench/agent-{number:04}", _route(number, answer_seconds=8.0))
    bulletin.publish(1)

    async def changes(link: ClientConnection, _: int) -> None:
        before = _edit(bulletin)
        await link.send(bulletin.since(before))
        await (await link.ping())

    async def everything(link: ClientConnection, _: int) -> None:
        _edit(bulletin)
        await link.send(bulletin.whole())
        await (await link.ping())

    pushed: tuple[list[float], list[float]] = [], []
    told: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        for which, once in enumerate((changes, everything)):
            async with _linked(subject, bulletin, reads_changes=True) as link:
                spent = await _cpu(subject, link, times, once)
            async with _linked(subject, bulletin, reads_changes=once is changes) as link:
                answered = await _cpu(subject, link, times, _news)
            if number:
                pushed[which].append(spent)
                told[which].append(answered)
        tell(f"round {number} of {rounds}")
    found = (
        (
            "one's route changes: CPU of a gateway until it acts on it",
            "all routes told anew",
            pushed,
        ),
        ("one has news: CPU of a gateway until the operator knows", "all agents' loads told", told),
    )
    return [
        report.Row(
            what=f"{agents:,} agents, {what}",
            against=against,
            unit="ms",
            ours=ours,
            theirs=theirs,
            at_most=True,
        )
        for what, against, (ours, theirs) in found
    ]


async def _news(link: ClientConnection, turn: int) -> None:
    """An agent may spend another sum, and what it spends is told at once."""
    agents = {AGENT: 1.0 + turn}
    await link.send(json.dumps(Allowances(type="allowances", epoch=EPOCH, agents=agents)))
    while True:
        said = json.loads(await link.recv())
        spend = said.get("agents", {}).get(AGENT, {}).get("spend") or {}
        if spend.get("ceiling") == agents[AGENT]:
            return


async def _cpu(subject: Gateway, link: ClientConnection, times: int, once: Once) -> float:
    """Milliseconds of the gateway for each."""
    before = subject.process.cpu()
    for turn in range(times):
        await once(link, turn)
    return (subject.process.cpu() - before) * 1e3 / times


@contextlib.asynccontextmanager
async def _linked(
    subject: Gateway, bulletin: RouteBulletin, *, reads_changes: bool
) -> AsyncIterator[ClientConnection]:
    """A link whose gateway has all routes."""
    headers = {"Authorization": f"Bearer {OPERATOR_TOKEN}"}
    async with connect(
        f"ws://127.0.0.1:{subject.control_port}{OPERATOR_PATH}",
        additional_headers=headers | ({CHANGES_HEADER: "1"} if reads_changes else {}),
        max_size=MAX_CONTROL_BYTES,
        max_queue=None,  # what it says meanwhile need not be read
        compression=None,
        ping_interval=None,
        proxy=None,
    ) as link:
        await link.send(bulletin.whole())
        while json.loads(await link.recv()).get("epoch") != EPOCH:
            pass
        yield link


def _edit(bulletin: RouteBulletin) -> int:
    """Another route of one agent; the revision before it."""
    before = bulletin.revision
    bulletin.put(AGENT, _route(7, answer_seconds=9.0 + before % 100))
    bulletin.publish(1)
    return before


def _route(number: int, *, answer_seconds: float) -> Route:
    """Of an agent as users write it first: keys, no burst."""
    keys: dict[str, Any] = {"public": False, "apiKeys": {"app": f"{number:064x}"}, "origins": []}
    return Route(
        agent=f"bench/agent-{number:04}",
        hash=f"{number:016x}",
        workerKey=f"{number:043}",
        access=keys,  # type: ignore[typeddict-item]  # without what has a default
        answerSeconds=answer_seconds,
        maxSeconds=1800.0,
        admissionMs=500.0,
        settings={"greeting": "Hello, how can I help you?", "idleSeconds": 60.0},
        rungs=[{"kind": "warm"}],
        draining=[],
    )


if __name__ == "__main__":
    report.main("steering", measure)
