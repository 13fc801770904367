"""What warm and burst capacity cost, and what follows for the autoscaler: pure, but for `read`.

The economic rule. A slot is worth keeping free while the chance that a caller needs it, times what that
caller costs at Modal, is more than the slot costs in the cluster (the newsvendor's rule). With calls that
wander as a normal distribution that is a number of standard deviations, z. And a whole pod is worth it only
while its slots cost less than the same slots at Modal.
"""

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
    modal_region_factor: float = 1.0
    warm_answer: float = 0.0  # dollars a call


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
        raise PricesError("prices must be a mapping with gpus, modalRegionFactor and warmAnswer")
    if strange := sorted(map(str, found.keys() - {"gpus", "modalRegionFactor", "warmAnswer"})):
        raise PricesError(f"prices have no entry {strange[0]}: remove it")
    gpus = found.get("gpus") or {}
    if not isinstance(gpus, dict):
        raise PricesError("gpus must name GPUs, each with cluster and modal")
    return replace(
        below,
        gpus={**below.gpus, **{str(name): _gpu(str(name), price) for name, price in gpus.items()}},
        modal_region_factor=_dollars(found, "modalRegionFactor", below.modal_region_factor),
        warm_answer=_dollars(found, "warmAnswer", below.warm_answer),
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


def stakes(warm: Warm, burst: Burst | None, prices: Prices) -> Stakes:
    """What is at stake for an agent whose overflow may go to this burst, if to any.

    Warm pods are taken to have the GPU that burst names first, because nothing else says which they have.
    """
    price = (
        prices.gpus.get(burst.gpu[0].partition(":")[0].rstrip("!+"))
        if burst and burst.gpu
        else None
    )
    if burst is None or price is None or not warm.gpu.count:
        return Stakes()
    pod = price.cluster * warm.gpu.count
    container = price.modal * prices.modal_region_factor
    slot = pod / warm.slots_per_pod
    # A container lingers after its last call, and that is paid too.
    linger = 1 + burst.scaledown_window_seconds / USUAL_CALL_SECONDS
    call = container * linger + prices.warm_answer * HOUR / USUAL_CALL_SECONDS
    full = container / burst.slots_per_container + prices.warm_answer * HOUR / USUAL_CALL_SECONDS
    chance = min(slot / call, 1.0) if call else 1.0
    return Stakes(
        z=_deviations(1 - chance),
        pays=slot <= full,
        pod_hour=pod,
        container_hour=container,
        slots_per_container=burst.slots_per_container,
        words=f"a warm slot costs ${slot:.2f} an hour, and its call at Modal would ${full:.2f}",
    )


def _deviations(share: float) -> float:
    """z of a normal distribution: so many deviations cover that share; none for less than half."""
    if share <= 0.5:
        return 0.0
    return min(NormalDist().inv_cdf(min(share, 1 - 1e-9)), MOST_Z)
