"""What capacity costs, and what the autoscaler makes of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from worlds import a_pod, a_world, an_agent

from trunkline_operator.__main__ import configured
from trunkline_operator.agent.policy import front
from trunkline_operator.agent.spec import Burst, Gpu, Policy, Region, Warm
from trunkline_operator.assembly import known_prices
from trunkline_operator.burst.standby import Standing
from trunkline_operator.config import ConfigError
from trunkline_operator.decisions.routes import Keys, route
from trunkline_operator.decisions.spending import terms
from trunkline_operator.scaling.advice import Day, advice, watched
from trunkline_operator.scaling.decision import Decision, Memory
from trunkline_operator.scaling.prices import (
    GpuPrice,
    Prices,
    PricesError,
    Stakes,
    container_rate,
    read,
    stakes,
)
from trunkline_operator.simulation.settings import price_of

L4 = Prices(gpus={"L4": GpuPrice(cluster=0.70, modal=0.80)})
WARM = Warm(slots_per_pod=4, gpu=Gpu(count=1))
BURST = Burst(credentials_secret="modal", slots_per_container=4, scaledown_window_seconds=180)


def test_the_shipped_prices_can_be_read_and_overridden() -> None:
    shipped = read()
    assert shipped.gpus["L4"].modal == 0.80
    found = read("gpus: {L4: {cluster: 0.2, modal: 0.5}, Own: {cluster: 1, modal: 2}}")
    assert found.gpus["L4"] == GpuPrice(cluster=0.2, modal=0.5)
    assert found.gpus["Own"].modal == 2.0
    assert found.gpus["H100"] == shipped.gpus["H100"]
    assert found.region_factors == shipped.region_factors


def test_a_container_costs_by_where_it_is_bound() -> None:
    """Anywhere, in a part of the world, in a region of it, and in a place that is named."""
    prices = read("modalRegionFactors: {broad: 1.25, sa: 2.5}")
    factors = [prices.factor(place) for place in ("", "eu", "eu-west", "sa", "sa-east")]
    assert factors == [1.0, 1.25, 1.75, 2.5, 1.75]
    assert Prices().factor("eu") == 1.0
    free, bound = (container_rate(BURST, prices, place) for place in ("", "eu"))
    assert free
    assert bound
    assert bound.second == pytest.approx(1.25 * free.second)
    assert free.basis == (
        "(1 L4 $0.800 + 1 cores $0.047 + 4 GiB $0.032) × 1 = $0.879 an hour / 4 slots"
    )
    assert "× 1.25 in eu = $1.099 an hour" in bound.basis


def test_budgets_ledger_autoscaler_and_simulation_reckon_with_one_price() -> None:
    """An agent whose residency binds one region to a part of the world, and the other to itself."""
    burst = replace(
        BURST, gpu=("L4", "A10"), regions=(Region.US_EAST, Region.EU_WEST), max_containers=3
    )
    policy = Policy(residency=("us", "eu-west"))
    agent = replace(an_agent(), warm=WARM, burst=burst, policy=policy)
    prices = read("modalEgressGib: 0.04")
    near, far = (container_rate(burst, prices, place) for place in ("us", "eu-west"))
    assert near
    assert far
    assert near.second < far.second
    agreed = terms(agent, burst, prices, Standing())
    assert agreed
    assert agreed.rates == {"us-east": near.second, "eu-west": far.second}
    assert agreed.container_second == far.second  # what may come is reckoned with the dearest
    urls = {"us-east": "http://u", "eu-west": "http://e"}
    made = route(agent, Keys(worker="w", ticket="t"), urls, (), prices=prices)
    told = [rung["price"] for rung in made["rungs"] if rung["kind"] == "burst"]
    assert [price["basis"] for price in told] == [near.basis, far.basis]
    assert [price["callSecond"] for price in told] == [near.second / 4, far.second / 4]
    simulated = price_of(agent, prices)
    assert simulated
    assert simulated.container == near.hour  # where calls are tried first
    assert stakes(WARM, burst, prices, front(agent, burst)).container_hour == near.hour


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: {L4: {cluster: 1}}", "gpus.L4 needs cluster and modal"),
        ("gpus: {L4: {cluster: 1, modal: -1}}", "gpus.L4.modal must be a number from 0"),
        ("gpus: {L4: {cluster: cheap, modal: 1}}", "gpus.L4.cluster must be a number"),
        ("gpus: [L4]", "gpus must name GPUs"),
        ("warmAnswer: true", "warmAnswer must be a number"),
        ("modalRegion: 1", "prices have no entry modalRegion: remove it"),
        (
            "modalRegionFactors: 1.5",
            "modalRegionFactors must name anywhere, broad, narrow or places",
        ),
        ("modalRegionFactors: {EU: 1.5}", "modalRegionFactors must name anywhere, broad"),
        ("modalRegionFactors: {eu: dear}", "modalRegionFactors.eu must be a number from 0"),
        ("[1]", "prices must be a mapping"),
        ("a: b: c", "prices are no YAML"),
    ],
)
def test_what_is_wrong_with_prices_is_told(text: str, said: str) -> None:
    with pytest.raises(PricesError, match=said):
        read(text)
    with pytest.raises(ConfigError, match=f"TRUNKLINE_PRICES: {said}"):
        known_prices(text)


def test_the_operator_takes_prices_from_a_file_or_else_from_its_environment(tmp_path: Path) -> None:
    own = tmp_path / "prices.yaml"
    own.write_text("warmAnswer: 1")
    needed = ["--gateways=g", "--worker-image=w"]
    env = {"TRUNKLINE_OPERATOR_TOKEN": "t", "TRUNKLINE_PRICES": "warmAnswer: 2"}
    assert configured([*needed, f"--prices={own}"], env).prices == "warmAnswer: 1"
    assert configured(needed, env).prices == "warmAnswer: 2"
    assert configured(needed, env | {"TRUNKLINE_PRICES": ""}).prices == ""
    with pytest.raises(ConfigError, match=r"--prices: .* No such file"):
        configured([*needed, "--prices=/nowhere/prices.yaml"], env)


def test_the_reserve_follows_the_newsvendor() -> None:
    """A free slot is worth 0.175 $/h; a call at Modal with its idle window 1.60 $/h: 89 % are covered."""
    found = stakes(WARM, BURST, L4)
    assert found.pays
    assert found.z == pytest.approx(
        1.2299, abs=0.0001
    )  # of the normal distribution, 1 - 0.175 / 1.6
    assert found.words == "a warm slot costs $0.17 an hour, and its call at Modal would $0.20"
    assert (found.pod_hour, found.container_hour) == (0.70, 0.80)


def test_the_dearer_an_overflow_the_larger_the_reserve_up_to_a_bound() -> None:
    found = [stakes(WARM, BURST, replace(L4, warm_answer=worth)).z for worth in (0, 0.05, 0.5, 50)]
    assert found == sorted(found)
    assert found[-1] == 3.0
    assert stakes(WARM, BURST, replace(L4, region_factors={"eu": 1.75}), "eu").z > found[0]
    assert stakes(WARM, BURST, replace(L4, region_factors={"eu": 1.75})).z == found[0]
    assert stakes(WARM, BURST, replace(L4, container_cpu=2, modal_cpu_core=0.05)).z > found[0]


def test_a_pod_that_costs_more_than_modal_does_not_pay() -> None:
    dear = Prices(gpus={"L4": GpuPrice(cluster=0.90, modal=0.80)})
    assert not stakes(WARM, BURST, dear).pays
    assert stakes(WARM, BURST, replace(dear, region_factors={"anywhere": 1.5})).pays
    for cluster in (4.0, 90.0):  # a slot for 1 $/h, and for more than its call at Modal
        dearest = Prices(gpus={"L4": GpuPrice(cluster=cluster, modal=0.80)})
        assert stakes(WARM, BURST, dearest).z == 0


def test_what_is_not_known_decides_nothing() -> None:
    for warm, burst, prices in (
        (WARM, None, L4),
        (WARM, replace(BURST, gpu=()), L4),
        (WARM, replace(BURST, gpu=("T4",)), L4),
        (replace(WARM, gpu=Gpu(count=0)), BURST, L4),
        (WARM, BURST, Prices()),
    ):
        assert stakes(warm, burst, prices) == Stakes()


def test_modals_ways_to_name_a_gpu_are_understood() -> None:
    for name in ("L4", "L4:2", "L4!"):
        assert stakes(WARM, replace(BURST, gpu=(name,)), L4).pod_hour == 0.70


# --- advice ------------------------------------------------------------------------------------------------

PRICED = Stakes(pod_hour=0.50, container_hour=2.0, slots_per_container=4)


def a_day(burst_hours: int, *, calls: int = 4, full: bool = False, hours: int = 24) -> Day:
    """So many hours, the first ones with burst, looked at each minute, and the first look after them."""
    day = Day()
    for minute in range(hours * 60 + 2):
        burst = calls if minute < burst_hours * 60 else 0
        day = watched(day, WARM, PRICED, burst, full, minute * 60.0)
    return day


def test_burst_that_costs_more_than_a_pod_is_told_of() -> None:
    assert advice(a_day(8), PRICED) == (
        "8 h of burst a day: one more warm pod saves $4 a day, so raise warm.minPods"
    )


def test_where_max_pods_is_the_limit_it_is_what_to_raise() -> None:
    assert advice(a_day(8, full=True), PRICED) == (
        "8 h of burst a day: one more warm pod saves $12 a day, so raise warm.maxPods"
    )


def test_no_advice_without_gain_prices_or_enough_hours() -> None:
    assert advice(a_day(5), PRICED) == ""
    assert advice(a_day(0), PRICED) == ""
    assert advice(a_day(24), Stakes()) == ""
    assert advice(a_day(5, hours=5), PRICED) == ""
    assert advice(Day(), PRICED) == ""


def test_a_day_is_bounded_and_a_late_look_counts_for_an_hour() -> None:
    day = a_day(101, hours=100)
    assert len(day.hours) == 25
    late = watched(day, WARM, PRICED, 0, False, (day.at or 0) + 50 * 3600)
    assert late.hours[-1].burst == 1.0
    assert len(late.hours) == 25
    assert watched(late, WARM, PRICED, 3, False, (late.at or 0)).hours == late.hours


def test_calls_share_a_container_as_far_as_it_has_slots() -> None:
    spread = replace(PRICED, slots_per_container=1)
    day = Day()
    for minute in range(2):
        day = watched(day, WARM, spread, 9, False, minute * 60.0)
    assert day.hours[-1].containers == pytest.approx(4 / 60)  # one more pod would spare four


def test_the_advice_stands_in_the_condition() -> None:
    from trunkline_operator.decisions.plan import Plan
    from trunkline_operator.decisions.status import reported

    agent = an_agent()
    scaling = Decision(pods=1, reason="", memory=Memory(), look_again=None, advice="do this")
    plan = Plan(steps=(), scaling=scaling, memory=Memory(), draining=())
    status = reported(agent, a_world([a_pod(agent, 0)]), plan, {}, 0.0)
    warm = next(c for c in status["conditions"] if c["type"] == "WarmReady")
    assert warm["message"] == "1 of 1 pods are ready; do this"
