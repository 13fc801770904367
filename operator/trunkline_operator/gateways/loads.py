"""What all gateways say of an agent, put together: pure, the time is an argument.

Gateways are told apart by their boot, so that one that is linked twice counts once and a restarted one
starts anew. A gateway that has been silent for DEAD_AFTER_SECONDS is gone, with its workers and live calls.
Totals stay: a sum over gateways never falls, whoever restarts.

Where two gateways differ about a worker, the cautious one counts: it drains only if all say so, its busiest
and its fewest free slots are believed. A worker that no gateway speaks of is unknown.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, cast

from trunkline_operator.scaling.spend import Said
from trunkline_runtime.contract import (
    DEAD_AFTER_SECONDS,
    AgentLoad,
    Load,
    LoadChanges,
    SpendLoad,
    WorkerLoad,
)

TOTALS: Final = ("arrivals", "refused", "lost", "burstFailures", "burstSlow", "burstLimited")
# Boots whose totals are remembered, so that a gateway that comes back is not counted again.
MOST_BOOTS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReport:
    """One agent at all gateways together. Totals never fall while the operator runs."""

    workers: Mapping[str, WorkerLoad] = field(default_factory=dict)
    calls: int = 0
    burst: int = 0
    arrivals: int = 0
    refused: int = 0
    waiting: int = 0
    lost: int = 0
    burst_failures: int = 0
    burst_slow: int = 0
    burst_limited: int = 0
    burst_error: str = ""
    shut: Mapping[str, str] = field(
        default_factory=dict
    )  # rungs that all of them pass over, and why
    gateways: int = 0  # that have a word about this agent


@dataclass(slots=True)
class _Gateway:
    name: str
    epoch: int
    agents: Mapping[str, AgentLoad]
    heard: float


class Loads:
    """The last word of each gateway."""

    def __init__(self) -> None:
        self._gateways: dict[str, _Gateway] = {}
        self._counted: dict[str, dict[str, dict[str, int]]] = {}
        self._sums: dict[str, dict[str, int]] = {}

    def __repr__(self) -> str:
        return f"Loads({ {gateway.name: sorted(gateway.agents) for gateway in self._gateways.values()} })"

    def __len__(self) -> int:
        return len(self._gateways)

    def hear(self, load: Load | LoadChanges, now: float) -> set[str]:
        """Takes a gateway's word; the agents for which it said something new.

        Changes of a gateway that is not known are not taken: it says everything within a second.
        """
        boot, agents = load["boot"], load["agents"]
        known = self._gateways.get(boot)
        if load["type"] == "loadChanges":
            if known is None:
                return set()
            touched, said = set(agents), {**known.agents, **agents}
        else:
            touched, said = {*agents, *(known.agents if known else ())}, agents
        before = {agent: self.report(agent) for agent in touched}
        self._count(boot, agents)
        self._gateways[boot] = _Gateway(load["gateway"], load["epoch"], said, now)
        return {agent for agent in touched if self.report(agent) != before[agent]}

    def beat(self, boot: str, now: float) -> None:
        """A sign of life without news."""
        if gateway := self._gateways.get(boot):
            gateway.heard = now

    def expire(self, now: float) -> set[str]:
        """Forgets silent gateways; the agents that they spoke of."""
        gone = [boot for boot, it in self._gateways.items() if now - it.heard > DEAD_AFTER_SECONDS]
        return {agent for boot in gone for agent in self._gateways.pop(boot).agents}

    def forget(self, agent: str) -> None:
        """Drops the sums of an agent that is no more."""
        self._sums.pop(agent, None)
        for counted in self._counted.values():
            counted.pop(agent, None)

    def spending(self, agent: str) -> dict[str, Said]:
        """What each gateway that is here says of the agent's burst, by its boot."""
        return {
            boot: _said(gateway.agents[agent].get("spend"))
            for boot, gateway in self._gateways.items()
            if agent in gateway.agents
        }

    def report(self, agent: str) -> AgentReport:
        told = [
            (gateway.heard, gateway.agents[agent])
            for gateway in self._gateways.values()
            if agent in gateway.agents
        ]
        told.sort(key=lambda pair: pair[0])
        loads = [load for _, load in told]
        sums = self._sums.get(agent, {})
        return AgentReport(
            workers=merged_workers(loads),
            calls=sum(load["calls"] for load in loads),
            burst=sum(load["burst"] for load in loads),
            arrivals=sums.get("arrivals", 0),
            refused=sums.get("refused", 0),
            waiting=sum(load.get("waiting", 0) for load in loads),
            lost=sums.get("lost", 0),
            burst_failures=sums.get("burstFailures", 0),
            burst_slow=sums.get("burstSlow", 0),
            burst_limited=sums.get("burstLimited", 0),
            burst_error=next((load["burstError"] for load in loads if load["burstError"]), ""),
            shut=_shut(loads),
            gateways=len(loads),
        )

    def _count(self, boot: str, agents: Mapping[str, AgentLoad]) -> None:
        counted = self._counted.pop(boot, {})
        self._counted[boot] = counted  # the newest is last
        for agent, load in agents.items():
            last = counted.setdefault(agent, dict.fromkeys(TOTALS, 0))
            sums = self._sums.setdefault(agent, dict.fromkeys(TOTALS, 0))
            for total in TOTALS:
                value = cast(dict[str, int], load).get(total, 0)
                sums[total] += max(value - last[total], 0)
                last[total] = max(value, last[total])
        for oldest in list(self._counted)[:-MOST_BOOTS]:
            if oldest not in self._gateways:
                del self._counted[oldest]


def _said(spend: SpendLoad | None) -> Said:
    if spend is None:
        return Said()
    return Said(
        spent=spend["spent"],
        reserved=spend["reserved"],
        ceiling=spend["ceiling"],
        starts=spend["starts"],
    )


def merged_workers(loads: list[AgentLoad]) -> dict[str, WorkerLoad]:
    """The workers of an agent; `loads` are in the order in which they were heard."""
    merged: dict[str, WorkerLoad] = {}
    for load in loads:
        for name, said in load["workers"].items():
            known = merged.get(name)
            # A pod that was restarted under its name is another worker: the last word counts alone.
            same = known is not None and known["boot"] == said["boot"]
            merged[name] = cautious(known, said) if known is not None and same else said
    return merged


def _shut(loads: list[AgentLoad]) -> dict[str, str]:
    """The rungs that no gateway tries now."""
    said = [load.get("shut", {}) for load in loads]
    return (
        {rung: why for rung, why in said[0].items() if all(rung in s for s in said)} if said else {}
    )


def cautious(one: WorkerLoad, other: WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        boot=other["boot"],
        slots=other["slots"],
        busy=max(one["busy"], other["busy"]),
        free=min(one["free"], other["free"]),
        draining=one["draining"] and other["draining"],
    )


def parse_load(text: str | bytes) -> Load | LoadChanges | None:
    """A gateway's message, or None if it is of another type; ValueError if it is not as agreed."""
    try:
        message = json.loads(text)
        agents = message["agents"] if message["type"] in ("load", "loadChanges") else None
        if agents is None:
            return None
        return cast(
            "Load | LoadChanges",
            {
                "type": message["type"],
                "gateway": str(message["gateway"]),
                "boot": str(message["boot"]),
                "epoch": _count(message["epoch"]),
                "agents": {str(agent): _agent(load) for agent, load in agents.items()},
            },
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a message of a gateway: {error!r}") from error


def _agent(load: Mapping[str, Any]) -> AgentLoad:
    agent = AgentLoad(
        workers={str(name): _worker(worker) for name, worker in load["workers"].items()},
        calls=_count(load["calls"]),
        burst=_count(load["burst"]),
        arrivals=_count(load["arrivals"]),
        refused=_count(load["refused"]),
        lost=_count(load["lost"]),
        burstFailures=_count(load["burstFailures"]),
        burstSlow=_count(load.get("burstSlow", 0)),
        burstLimited=_count(load.get("burstLimited", 0)),
        burstError=str(load["burstError"]),
    )
    if "waiting" in load:
        agent["waiting"] = _count(load["waiting"])
    if "shut" in load:
        agent["shut"] = {str(rung): str(state) for rung, state in load["shut"].items()}
    if (spend := load.get("spend")) is not None:
        ceiling = spend["ceiling"]
        agent["spend"] = SpendLoad(
            spent=_dollars(spend["spent"]),
            reserved=_dollars(spend["reserved"]),
            ceiling=None if ceiling is None else _dollars(ceiling),
            starts=_count(spend["starts"]),
        )
    return agent


def _worker(worker: Mapping[str, Any]) -> WorkerLoad:
    return WorkerLoad(
        boot=str(worker["boot"]),
        slots=_count(worker["slots"]),
        busy=_count(worker["busy"]),
        free=_count(worker["free"]),
        draining=worker["draining"] is True,
    )


def _dollars(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
        raise TypeError(f"{value!r} is no sum of dollars")
    return float(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value
