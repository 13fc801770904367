"""How full a Trunkline is, put together from what its gateways say of themselves.

Every worker dials every gateway, so its pods and slots are the same in all of their states and count once; calls
and totals are each gateway's own, and are added.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from trunkline_runtime.contract import State, WorkerLoad

SECONDS_A_MINUTE: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRow:
    """One gateway that was asked."""

    url: str
    name: str = ""
    calls: int = 0
    epoch: int = 0
    trouble: str = ""  # why callers should not come, or why it could not be asked


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRow:
    """One agent, at all gateways that answered."""

    agent: str
    pods: int
    draining: int  # of the pods
    slots: int
    busy: int
    free: int
    calls: int
    burst: int
    arrivals: int  # since each gateway's start, as are the next two
    refused: int
    lost: int
    arrivals_a_minute: float | None  # None where there was no look before
    burst_error: str
    waiting: int = 0  # callers in line for a slot
    aside: int = 0  # pods that some gateway gives no call, for they failed those before
    shut: tuple[str, ...] = ()  # rungs that some gateway passes over, for they failed too often
    spent: float | None = (
        None  # US dollars of burst since each gateway's start; None: no price is known
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One look at `at` seconds of any steady clock."""

    at: float
    gateways: tuple[GatewayRow, ...]
    agents: tuple[AgentRow, ...]
    arrivals: Mapping[tuple[str, str], int]  # by boot of a gateway and agent, for the next look

    @property
    def blind(self) -> bool:
        """No gateway has answered."""
        return not any(row.name for row in self.gateways)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "gateways": [asdict(row) for row in self.gateways],
            "agents": [asdict(row) for row in self.agents],
        }


def board(answers: Mapping[str, State | str], at: float, before: Board | None = None) -> Board:
    """Puts one look together: by URL the state of a gateway, or why there is none."""
    states = [answer for answer in answers.values() if not isinstance(answer, str)]
    arrivals = {
        (state["boot"], agent): load["arrivals"]
        for state in states
        for agent, load in state["agents"].items()
    }
    agents = sorted({agent for state in states for agent in state["agents"]})
    return Board(
        at=at,
        gateways=tuple(_gateway(url, answer) for url, answer in answers.items()),
        agents=tuple(_agent(agent, states, _pace(agent, arrivals, at, before)) for agent in agents),
        arrivals=arrivals,
    )


def _gateway(url: str, answer: State | str) -> GatewayRow:
    if isinstance(answer, str):
        return GatewayRow(url=url, trouble=answer)
    return GatewayRow(
        url=url,
        name=answer["gateway"],
        calls=sum(load["calls"] for load in answer["agents"].values()),
        epoch=answer["epoch"],
        trouble=answer["unready"] or "",
    )


def _agent(agent: str, states: Iterable[State], pace: float | None) -> AgentRow:
    loads = [state["agents"][agent] for state in states if agent in state["agents"]]
    workers = dict[tuple[str, str], WorkerLoad]()
    for load in loads:
        for name, worker in load["workers"].items():
            process = name, worker["boot"]
            if process not in workers or "aside" in worker:  # one gateway's mark is the one to show
                workers[process] = worker
    known = [load["spend"]["spent"] for load in loads if "spend" in load]
    return AgentRow(
        agent=agent,
        pods=len(workers),
        draining=sum(worker["draining"] for worker in workers.values()),
        slots=sum(worker["slots"] for worker in workers.values()),
        busy=sum(worker["busy"] for worker in workers.values()),
        free=sum(worker["free"] for worker in workers.values()),
        calls=sum(load["calls"] for load in loads),
        burst=sum(load["burst"] for load in loads),
        arrivals=sum(load["arrivals"] for load in loads),
        refused=sum(load["refused"] for load in loads),
        lost=sum(load["lost"] for load in loads),
        arrivals_a_minute=pace,
        burst_error=next((load["burstError"] for load in loads if load["burstError"]), ""),
        waiting=sum(load.get("waiting", 0) for load in loads),
        aside=sum(worker.get("aside", False) for worker in workers.values()),
        shut=tuple(sorted({rung for load in loads for rung in load.get("shut", ())})),
        spent=round(sum(known), 4) if known else None,
    )


def _pace(
    agent: str, arrivals: Mapping[tuple[str, str], int], at: float, before: Board | None
) -> float | None:
    """Arrivals a minute since the look before, at gateways that were there then and did not start anew."""
    if before is None or at <= before.at:
        return None
    came = [
        total - before.arrivals[key]
        for key, total in arrivals.items()
        if key[1] == agent and key in before.arrivals
    ]
    return round(sum(came) * SECONDS_A_MINUTE / (at - before.at), 1) if came else None
