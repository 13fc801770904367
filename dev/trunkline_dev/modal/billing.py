"""What the local Modal would bill: the seconds of its own containers, at the list prices of Modal.

It reckons by itself, from what containers asked for and how long they were there, and knows nothing of Trunkline's
prices: so whoever compares both finds out where they differ. A container pays for its GPUs, and for the cores and
the memory that it asked for; what it used beyond is not measured here.
"""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from trunkline_dev.modal.rpc import Message
from trunkline_dev.modal.state import Boot, State, now

# Dollars a second, modal.com/pricing in autumn 2026.
GPUS: Final = {
    "T4": 0.000164,
    "L4": 0.000222,
    "A10": 0.000306,
    "A10G": 0.000306,
    "L40S": 0.000542,
    "A100": 0.000583,
    "A100-40GB": 0.000583,
    "A100-80GB": 0.000694,
    "RTX-PRO-6000": 0.000842,
    "H100": 0.001097,
    "H200": 0.001261,
    "B200": 0.001736,
}
CORE, GIB = 0.0000131, 0.00000222
# What a container has that asks for nothing.
LEAST_CORES, LEAST_GIB = 0.125, 0.125
# For a container that is bound to a part of the world, or to a region in it.
BROAD, NARROW = 1.5, 1.75
LENGTHS: Final = {"d": 86_400, "h": 3_600}
ALL_TAGS: Final = "*"


class Billing:
    """One method per call; the names are Modal's."""

    def __init__(self, state: State) -> None:
        self._state = state

    def WorkspaceBillingReport(self, request: Message) -> list[Message]:
        """What each app cost in each whole interval; the one that runs is left out, as at Modal."""
        length = LENGTHS.get(request.resolution)
        if length is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "resolution must be 'd' or 'h'")
        start = request.start_timestamp.ToSeconds() // length * length
        end = int(min(request.end_timestamp.ToSeconds(), now())) // length * length
        costs: dict[tuple[str, int], dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
        for boot in self._state.boots:
            for begins, seconds in shares(boot, start, end, length):
                for resource, price in self._prices(boot).items():
                    costs[boot.app_id, begins][resource] += Decimal(str(price)) * Decimal(seconds)
        return [
            self._item(app_id, begins, cost, request.tag_names)
            for (app_id, begins), cost in sorted(costs.items(), key=lambda pair: pair[0][::-1])
        ]

    def _prices(self, boot: Boot) -> dict[str, float]:
        """Dollars a second of each of a container's resources."""
        definition = self._state.servers[boot.function_id].definition
        asked = definition.resources
        regions = definition.scheduler_placement.regions
        factor = min((NARROW if "-" in each else BROAD for each in regions), default=1.0)
        prices = {
            "CPU": max(asked.milli_cpu / 1000, LEAST_CORES) * CORE,
            "Memory": max(asked.memory_mb / 1024, LEAST_GIB) * GIB,
        }
        if boot.gpu:
            count = asked.gpu_config.count or 1
            prices[boot.gpu] = GPUS[boot.gpu.rstrip("!+")] * count
        return {resource: price * factor for resource, price in prices.items()}

    def _item(
        self, app_id: str, begins: int, cost: dict[str, Decimal], tag_names: list[str]
    ) -> Message:
        app = self._state.apps[app_id]
        item = api_pb2.WorkspaceBillingReportItem(
            object_id=app_id,
            description=app.name,
            environment_name=app.environment,
            cost=str(sum(cost.values())),
            cost_by_resource={resource: str(dollars) for resource, dollars in cost.items()},
            tags={
                name: value
                for name, value in app.tags.items()
                if name in tag_names or ALL_TAGS in tag_names
            },
        )
        item.interval.FromDatetime(datetime.fromtimestamp(begins, UTC))
        return item


def shares(boot: Boot, start: int, end: int, length: int) -> Iterator[tuple[int, float]]:
    """The intervals between two moments in which a container was there: when each begins, and its seconds."""
    until = min(boot.end_t or now(), end)
    begins = int(max(boot.t, start)) // length * length
    while begins < until:
        seconds = min(until, begins + length) - max(boot.t, begins)
        if seconds > 0:
            yield begins, seconds
        begins += length
