"""The models of other autoscalers reproduce the worked examples of those autoscalers' own documentation."""

from collections import deque
from typing import Any

import pytest

from trunkline_operator.agent.spec import Warm
from trunkline_operator.simulation.model import Seen
from trunkline_operator.simulation.peers import (
    Hpa,
    Knative,
    Kpa,
    knative,
    pods_replicas,
    ratio_replicas,
)

WARM = Warm(slots_per_pod=4, min_pods=1, max_pods=100)


def seen(loads: list[int], *, starting: int = 0, burst: int = 0) -> Seen:
    return Seen(
        busy=sum(loads),
        burst=burst,
        active=len(loads) + starting,
        serving=len(loads),
        loads=tuple(loads),
    )


# --- HorizontalPodAutoscaler: kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale ----


@pytest.mark.parametrize("current", [1, 2, 7, 40])
def test_a_metric_of_twice_the_target_doubles_and_of_half_halves(current: int) -> None:
    """200m against 100m: twice the replicas. 50m against 100m: half."""
    assert ratio_replicas(current, 200 / 100) == 2 * current
    assert ratio_replicas(current, 50 / 100) == -(-current // 2)


def test_fifty_replicas_at_ninety_percent_of_a_target_of_seventy_five_become_sixty() -> None:
    """The example of Kubernetes 1.33's announcement of a configurable tolerance."""
    assert ratio_replicas(50, 90 / 75) == 60
    assert pods_replicas(50, [0.90] * 50, 0, 0.75) == 60


def test_within_a_tenth_of_the_target_nothing_is_done() -> None:
    for ratio in (0.9, 0.95, 1.0, 1.05, 1.1):
        assert ratio_replicas(30, ratio) == 30
        assert pods_replicas(30, [ratio] * 30, 0, 1.0) == 30
    assert ratio_replicas(30, 1.11) == 34
    assert ratio_replicas(30, 0.89) == 27


def test_pods_that_are_not_ready_dampen_an_increase_as_if_they_used_nothing() -> None:
    assert pods_replicas(4, [2.0] * 4, 0, 1.0) == 8
    assert pods_replicas(6, [2.0] * 4, 2, 1.0) == 8  # 4 x 2 over 6 pods is 1.33 of the target
    assert pods_replicas(8, [2.0] * 4, 4, 1.0) == 8  # exactly the target: nothing is done
    assert pods_replicas(8, [2.1] * 4, 4, 1.0) == 8  # within the tolerance of it: nothing is done
    assert pods_replicas(8, [2.4] * 4, 4, 1.0) == 10
    assert (
        pods_replicas(12, [2.0] * 4, 8, 1.0) == 12
    )  # it would turn the direction: nothing is done


def test_the_highest_recommendation_of_five_minutes_is_kept() -> None:
    hpa = Hpa(WARM, 0.5)
    wanted = [hpa.asked(seen([4, 4, 4, 4]), 0.0)[0]]
    # What it asked for is there, and then all calls end.
    wanted += [hpa.asked(seen([0] * 8), float(now))[0] for now in (15, 150, 299, 300)]
    assert wanted == [8, 8, 8, 8, 1]


def test_it_grows_by_four_pods_or_to_the_double_in_one_period() -> None:
    assert Hpa(WARM, 0.1).asked(seen([4]), 0.0)[0] == 5
    assert Hpa(WARM, 0.1).asked(seen([4] * 8), 0.0)[0] == 16


def test_a_metric_of_pods_knows_nothing_of_calls_that_found_no_slot() -> None:
    full = seen([4] * 10, burst=100)
    assert Hpa(WARM, 0.7).asked(full, 0.0)[0] == 15
    assert Hpa(WARM, 0.7, whole=True).asked(full, 0.0)[0] == 20  # it would want 50, and doubles


def test_bounds_are_kept() -> None:
    narrow = Warm(slots_per_pod=4, min_pods=3, max_pods=5)
    assert Hpa(narrow, 0.5).asked(seen([4] * 5), 0.0)[0] == 5
    assert Hpa(narrow, 0.5).asked(seen([0] * 3), 0.0)[0] == 3


# --- Knative: docs/serving/autoscaling (autoscale-go, kpa-specific), and its unit tests ---------------------


def test_fifty_calls_at_a_target_of_ten_are_five_pods() -> None:
    """autoscale-go: 50 concurrent requests / target of 10 = 5 pods."""
    assert Kpa(10.0).desired(50, 50, ready=5, now=0.0) == 5


def test_a_hundred_calls_at_seventy_percent_of_ten_are_fifteen_pods() -> None:
    """containerConcurrency 10, target utilization 70 %: 100 / (10 x 0.7), rounded up."""
    assert Kpa(7.0).desired(100, 100, ready=15, now=0.0) == 15


def test_twice_the_target_in_six_seconds_is_panic() -> None:
    """autoscale-go: panic mode begins when the panic window reaches 2 x the target."""
    calm, panic = Kpa(10.0), Kpa(10.0)
    assert calm.desired(10, 90, ready=5, now=0.0) == 2
    assert panic.desired(10, 100, ready=5, now=0.0) == 10


def test_panic_ends_a_stable_window_after_its_cause() -> None:
    """Knative's TestAutoscalerUnpanicAfterSlowIncrease."""
    kpa = Kpa(1.0)
    assert kpa.desired(11, 25, ready=10, now=0.0) == 25
    assert kpa.panic_since == 0.0
    assert kpa.desired(30, 41, ready=40, now=30.0) == 41
    assert kpa.panic_since == 0.0
    assert kpa.desired(50, 56, ready=55, now=62.0) == 50
    assert kpa.panic_since is None


def test_a_surge_that_goes_on_extends_the_panic() -> None:
    """Knative's TestAutoscalerExtendPanicWindow."""
    kpa = Kpa(1.0)
    assert kpa.desired(11, 25, ready=10, now=0.0) == 25
    assert kpa.desired(30, 80, ready=40, now=30.0) == 80
    assert kpa.panic_since == 30.0


def test_a_calm_decrease_follows_the_minute_but_at_most_halves() -> None:
    """Knative's TestAutoscalerStableModeDecrease, and max-scale-down-rate 2."""
    kpa = Kpa(10.0)
    assert kpa.desired(100, 100, ready=8, now=0.0) == 10
    assert kpa.desired(50, 50, ready=8, now=2.0) == 5
    assert kpa.desired(0, 0, ready=8, now=4.0) == 4


def test_in_panic_nothing_is_taken_away() -> None:
    kpa = Kpa(10.0)
    assert kpa.desired(100, 100, ready=2, now=0.0) == 10
    assert kpa.desired(10, 10, ready=10, now=30.0) == 10


def test_its_windows_are_a_minute_and_six_seconds() -> None:
    subject = Knative(WARM, Kpa(4.0))
    facts: dict[str, Any] = {"active": 10, "serving": 10, "loads": ()}
    for tick in range(31):
        subject.asked(Seen(busy=40 if tick < 28 else 0, **facts), tick * 2.0)
    # Ticks of the minute are those after second 0; three of them are in the last six seconds.
    assert subject.seen == deque((tick * 2.0, 40 if tick < 28 else 0) for tick in range(1, 31))
    assert subject.asked(Seen(busy=0, **facts), 62.0)[0] == 9  # 26 of 30 ticks with 40 calls
    assert knative(WARM).kpa.target == pytest.approx(2.8)
