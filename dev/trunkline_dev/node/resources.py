"""Resources of pods and nodes, and what is missing for a pod to fit. Pure."""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final

Json = dict[str, Any]
Amounts = Mapping[str, Decimal]

_SUFFIXES: Final = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}
_QUANTITY: Final = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(n|u|m|k|[KMGTPE]i?|)", re.ASCII
)


def quantity(text: str) -> Decimal:
    """An amount as Kubernetes writes it: "500m", "32Gi", "1e3"; ValueError for anything else."""
    found = _QUANTITY.fullmatch(text)
    if not found or found[2] not in _SUFFIXES:
        raise ValueError(f'{text!r} is no quantity such as "2", "500m" or "32Gi"')
    return Decimal(found[1]) * _SUFFIXES[found[2]]


def demand(pod: Json) -> dict[str, Decimal]:
    """What a pod asks of its node: the sum of its containers' requests, and one of "pods"."""
    total = {"pods": Decimal(1)}
    for container in pod["spec"]["containers"]:
        for resource, amount in container.get("resources", {}).get("requests", {}).items():
            total[resource] = total.get(resource, Decimal(0)) + quantity(amount)
    return total


def shortfall(capacity: Amounts, placed: Iterable[Amounts], wanted: Amounts) -> list[str]:
    """Why `wanted` does not fit beside what is placed, in the scheduler's words; empty if it fits."""
    used: dict[str, Decimal] = {}
    for amounts in placed:
        for resource, amount in amounts.items():
            used[resource] = used.get(resource, Decimal(0)) + amount
    return [
        "Too many pods" if resource == "pods" else f"Insufficient {resource}"
        for resource, amount in wanted.items()
        if amount > 0
        and used.get(resource, Decimal(0)) + amount > capacity.get(resource, Decimal(0))
    ]
