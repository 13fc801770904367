"""What a development node is started with."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from trunkline_dev.node.resources import quantity


class NodeConfigError(ValueError):
    """A setting that makes no sense; the text says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """`images` maps an image to the command that stands for its entry point.

    `addresses` is a network in 127.0.0.0/8; every pod gets a host address of it. `binds` is False
    where a real scheduler runs. With a `namespace` the node sees no pods but those in it. A pod's
    containers start `pull_seconds` after it was bound, as where an image must be fetched first.
    """

    logs: Path
    name: str = "dev"
    capacity: Mapping[str, str] = field(
        default_factory=lambda: {
            "cpu": "8",
            "memory": "32Gi",
            "pods": "110",
            "nvidia.com/gpu": "8",
        }
    )
    addresses: str = "127.77.3.0/24"
    images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    binds: bool = True
    namespace: str = ""
    pull_seconds: float = 0.0

    def __post_init__(self) -> None:
        hosts, pods = len(self.hosts()), self.amounts().get("pods", Decimal(0))
        if pods > hosts:
            raise NodeConfigError(
                f"addresses {self.addresses} are {hosts}, too few for a capacity of {pods} pods; "
                "give the node a larger network or fewer pods"
            )
        if self.pull_seconds < 0:
            raise NodeConfigError(f"pull_seconds {self.pull_seconds:g} is negative; give 0 or more")
        for image, command in self.images.items():
            if not command:
                raise NodeConfigError(f"image {image} has an empty command")

    def hosts(self) -> list[str]:
        try:
            network = ipaddress.IPv4Network(self.addresses)
        except ValueError as error:
            raise NodeConfigError(f"addresses {self.addresses}: {error}") from error
        if not network.is_loopback:
            raise NodeConfigError(f"addresses {self.addresses} are not within 127.0.0.0/8")
        return [str(host) for host in network.hosts()]

    def amounts(self) -> dict[str, Decimal]:
        try:
            return {resource: quantity(amount) for resource, amount in self.capacity.items()}
        except ValueError as error:
            raise NodeConfigError(f"capacity: {error}") from error
