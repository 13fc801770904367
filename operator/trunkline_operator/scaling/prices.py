"""What warm and burst capacity cost, and what follows for the autoscaler: pure, but for `read`.

The economic rule. A slot is worth keeping free while the chance that a caller needs it, times what that
caller costs at Modal, is more than the slot costs in the cluster (the newsvendor's rule). With calls that
wander as a normal distribution that is a number of standard deviations, z. And a whole pod is worth it only
while its slots cost less than the same slots at Modal.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from statistics import NormalDist
from typing import Any, Final

import yaml

from trunkline_operator.agent.spec import Burst, Warm
from trunkline_operator.scaling.staffing import USUAL_Z

HOUR: Final = 3600.0
# A call of a help desk; the few calls that overflow have their containers almost to themselves.
USUAL_CALL_SECONDS: Final = 180.0
# One free slot more than 3 deviations is used in one of 700 pod starts.
MOST_Z: Final = 3.0
MOST_DOLLARS: Final = 10_000.0
# What the factors of places that have none of their own are called. A part of the world ("eu") is broad, a region
# in one ("eu-west") narrow: Modal asks more for that, because fewer machines will do.
ANYWHERE, BROAD, NARROW = "anywhere", "broad", "narrow"
PLACE: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# The most that a call sends its caller in a second: PCM16 at 24 kHz, in base64.
CALL_BYTES: Final = 64 * 2**10
GIB: Final = 2**30
NUMBERS: Final[Mapping[str, str]] = {
    "warmAnswer": "warm_answer",
    "modalCpuCore": "modal_cpu_core",
    "modalMemoryGib": "modal_memory_gib",
    "modalEgressGib": "modal_egress_gib",
    "containerCpu": "container_cpu",
    "containerMemoryGib": "container_memory_gib",
}
"""Entries of the file that are one number, and their fields."""
GPUS, FACTORS = "gpus", "modalRegionFactors"


class PricesError(ValueError):
    """The file of prices makes no sense; the message says which entry and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPrice:
    """Dollars for an hour of one GPU."""

    cluster: float
    modal: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    gpus: Mapping[str, GpuPrice] = field(default_factory=dict)
    region_factors: Mapping[str, float] = field(default_factory=dict)  # by place, or kind of it
    warm_answer: float = 0.0  # dollars a call
    modal_cpu_core: float = 0.0  # dollars an hour, as the next
    modal_memory_gib: float = 0.0
    modal_egress_gib: float = 0.0  # dollars
    container_cpu: float = 0.0  # cores that a container at Modal uses
    container_memory_gib: float = 0.0

    def factor(self, place: str) -> float:
        """What Modal multiplies a container's price with that is bound to a place; "" = it is not bound."""
        kind = (NARROW if "-" in place else BROAD) if place else ANYWHERE
        return self.region_factors.get(place, self.region_factors.get(kind, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stakes:
    """What is at stake for one agent. Without prices a usual reserve is kept, and every pod is worth it."""

    z: float = USUAL_Z
    pays: bool = True  # a pod whose slots are all used costs less than those calls at Modal
    pod_hour: float | None = None  # dollars; None = not known
    container_hour: float | None = None  # at Modal
    slots_per_container: int = 1
    words: str = ""


def read(own: str = "") -> Prices:
    """The prices that come with Trunkline, with those of a YAML text laid over them."""
    shipped = _parsed((files("trunkline_operator.scaling") / "prices.yaml").read_text(), Prices())
    return _parsed(own, shipped)


def _parsed(text: str, below: Prices) -> Prices:
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise PricesError(f"prices are no YAML: {error}") from error
    if not isinstance(found, dict):
        raise PricesError("prices must be a mapping with " + ", ".join((GPUS, FACTORS, *NUMBERS)))
    if strange := sorted(map(str, found.keys() - {GPUS, FACTORS, *NUMBERS})):
        raise PricesError(f"prices have no entry {strange[0]}: remove it")
    gpus, factors = found.get(GPUS) or {}, found.get(FACTORS) or {}
    if not isinstance(gpus, dict):
        raise PricesError("gpus must name GPUs, each with cluster and modal")
    if not isinstance(factors, dict) or not all(PLACE.fullmatch(str(place)) for place in factors):
        words = f"{FACTORS} must name {ANYWHERE}, {BROAD}, {NARROW} or places such as eu-west"
        raise PricesError(f"{words}, each with a number")
    return replace(
        below,
        gpus={**below.gpus, **{str(name): _gpu(str(name), price) for name, price in gpus.items()}},
        region_factors={
            **below.region_factors,
            **{str(place): _dollars(factors, place, 1.0, f"{FACTORS}.") for place in factors},
        },
        **{field: _dollars(found, name, getattr(below, field)) for name, field in NUMBERS.items()},
    )


def _gpu(name: str, price: Any) -> GpuPrice:
    if not isinstance(price, dict) or price.keys() != {"cluster", "modal"}:
        raise PricesError(f"gpus.{name} needs cluster and modal, in dollars an hour, and no more")
    return GpuPrice(
        cluster=_dollars(price, "cluster", 0.0, f"gpus.{name}."),
        modal=_dollars(price, "modal", 0.0, f"gpus.{name}."),
    )


def _dollars(place: Mapping[str, Any], name: str, default: float, within: str = "") -> float:
    value = place.get(name, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= MOST_DOLLARS
    ):
        raise PricesError(f"{within}{name} must be a number from 0 to {MOST_DOLLARS:.0f}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What a second of something costs, in dollars, and what that is reckoned from, in words."""

    second: float
    basis: str

    @property
    def hour(self) -> float:
        return self.second * HOUR


def container_rate(burst: Burst, prices: Prices, place: str) -> Rate | None:
    """A container that Modal binds to a place ("" = to none), with the dearest of the GPUs that it may get.

    The one price of a container: of budgets, the ledger, the autoscaler and `trunkline simulate`. None where the
    price of a GPU is not known.
    """
    kinds = [(gpu_kind(name), _count(name)) for name in burst.gpu]
    if any(kind not in prices.gpus for kind, _ in kinds):
        return None
    hours = [(prices.gpus[kind].modal * count, kind, count) for kind, count in kinds]
    gpu, kind, count = max(hours, default=(0.0, "", 0))
    parts = [f"{count} {kind} ${gpu:.3f}"] if kind else []
    cpu = prices.container_cpu * prices.modal_cpu_core
    memory = prices.container_memory_gib * prices.modal_memory_gib
    parts += [f"{prices.container_cpu:g} cores ${cpu:.3f}"] if cpu else []
    parts += [f"{prices.container_memory_gib:g} GiB ${memory:.3f}"] if memory else []
    factor = prices.factor(place)
    sent = CALL_BYTES * HOUR / GIB * prices.modal_egress_gib * burst.slots_per_container
    total = (gpu + cpu + memory) * factor + sent
    bound = f" in {place}" if place else ""
    egress = f" + egress ${sent:.3f}" if sent else ""
    basis = f"({' + '.join(parts)}) × {factor:g}{bound}{egress} = ${total:.3f} an hour"
    return Rate(second=total / HOUR, basis=f"{basis} / {burst.slots_per_container} slots")


def pod_rate(warm: Warm, burst: Burst | None, prices: Prices) -> Rate | None:
    """A warm pod, taken to have the GPU that burst names first; None where its price is not known."""
    name = gpu_kind(burst.gpu[0]) if burst and burst.gpu else ""
    price = prices.gpus.get(name)
    if price is None or not warm.gpu.count:
        return None
    hour = price.cluster * warm.gpu.count
    return Rate(
        second=hour / HOUR,
        basis=f"{warm.gpu.count} {name} = ${hour:.3f} an hour / {warm.slots_per_pod} slots",
    )


def gpu_kind(gpu: str) -> str:
    """The GPU that a name of Modal's means: "H100!" and "L4:2" are an H100 and an L4."""
    return gpu.partition(":")[0].rstrip("!+")


def _count(gpu: str) -> int:
    """How many of a kind: "L4:2" is two."""
    _, _, count = gpu.partition(":")
    return int(count) if count else 1


def stakes(warm: Warm, burst: Burst | None, prices: Prices, place: str = "") -> Stakes:
    """What is at stake for an agent whose overflow may go to this burst, if to any.

    `place` is where the containers of its first region are bound to, where calls are tried first.
    """
    pod = pod_rate(warm, burst, prices)
    at_modal = container_rate(burst, prices, place) if burst else None
    if burst is None or pod is None or at_modal is None:
        return Stakes()
    container, slot = at_modal.hour, pod.hour / warm.slots_per_pod
    # A container lingers after its last call, and that is paid too.
    linger = 1 + burst.scaledown_window_seconds / USUAL_CALL_SECONDS
    call = container * linger + prices.warm_answer * HOUR / USUAL_CALL_SECONDS
    full = container / burst.slots_per_container + prices.warm_answer * HOUR / USUAL_CALL_SECONDS
    chance = min(slot / call, 1.0) if call else 1.0
    return Stakes(
        z=_deviations(1 - chance),
        pays=slot <= full,
        pod_hour=pod.hour,
        container_hour=container,
        slots_per_container=burst.slots_per_container,
        words=f"a warm slot costs ${slot:.2f} an hour, and its call at Modal would ${full:.2f}",
    )


def _deviations(share: float) -> float:
    """z of a normal distribution: so many deviations cover that share; none for less than half."""
    if share <= 0.5:
        return 0.0
    return min(NormalDist().inv_cdf(min(share, 1 - 1e-9)), MOST_Z)
