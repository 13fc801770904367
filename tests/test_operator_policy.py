"""What policy allows, and the arithmetic that it says."""

from typing import Any

import pytest
from worlds import BURST, an_agent

from trunkline_operator.agent.policy import elsewhere, here, ladder, resident

UPSTREAM: dict[str, Any] = {"upstream__url": "wss://calls.example"}


@pytest.mark.parametrize(
    ("changes", "warm", "burst", "words"),
    [
        ({}, True, False, "at most 4 × 4 warm = 16 calls"),
        (BURST, True, True, "at most 4 × 4 warm + 10 × 4 burst = 56 calls"),
        (BURST | {"warm": {"minPods": 0, "maxPods": 0}}, False, True, "at most 10 × 4 burst = 40 calls"),
        (BURST | {"policy__dataClass": "phi"}, True, False, "at most 4 × 4 warm = 16 calls"),
        (
            BURST | {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
            False,
            False,
            "no rung: no call is taken",
        ),
    ],
)  # fmt: skip
def test_the_ladder(changes: dict[str, Any], warm: bool, burst: bool, words: str) -> None:
    allowed = ladder(an_agent(**changes))
    assert (allowed.warm, allowed.burst is not None, allowed.words) == (warm, burst, words)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (BURST | {"policy__dataClass": "phi"}, "phi keeps calls in the cluster"),
        (BURST | {"policy": {"dataClass": "phi", "baa": {"acknowledged": True}}}, "no snapshot"),
        (
            BURST | {"policy__residency": ["eu"], "warm": {"minPods": 0, "maxPods": 0}},
            "leaves out us-east of burst.modal.regions",
        ),
        (
            BURST | {"burst__modal__budget": {"perDay": 0}},
            "budget is 0, so burst.modal is not used",
        ),
        (
            UPSTREAM | {"policy__dataClass": "phi"},
            "upstream.dataClasses does not name phi, so upstream is not used",
        ),
        ({"warm__minPods": 0}, "set it to 0 to let all pods go"),
        ({"warm": {"minPods": 0, "bufferSlots": 0}}, "the first call is refused"),
        (
            BURST
            | {
                "engine": {
                    "type": "moshi",
                    "model": "tiny",
                    "policy": {"hook": {"url": "http://p.ns.svc/"}},
                }
            },
            "a Service of the cluster, which calls at Modal cannot reach",
        ),
        ({"policy__residency": ["eu"]}, "this operator was told no region"),
        (BURST | {"warm__bufferSlots": 17}, "bufferSlots 17 is more than all 16 warm slots"),
    ],
)
def test_what_may_surprise_is_said(changes: dict[str, Any], said: str) -> None:
    assert [warning for warning in ladder(an_agent(**changes)).warnings if said in warning]


TWO = {"regions": [{"name": "eu", "minPods": 2, "maxPods": 3}, {"name": "us-east-1"}]}


@pytest.mark.parametrize(
    ("region", "changes", "bounds", "said"),
    [
        ("", {}, (1, 4), ""),
        ("eu", {}, (1, 4), ""),
        ("eu", {"warm": TWO}, (2, 3), ""),
        ("us-east-1", {"warm": TWO}, (1, 4), ""),
        ("us", {"warm": TWO}, (0, 0), "for eu, us-east-1 and this operator is in us, so there are no pods"),
        ("", {"warm": TWO}, (0, 0), "was told no region (--region, the chart's region), so there are no pods"),
        ("us-east-1", {"policy__residency": ["eu"]}, (0, 0), "leaves out us-east-1, where this operator is"),
        ("eu-west-1", {"policy__residency": ["eu"]}, (1, 4), ""),
        ("", {"policy__residency": ["eu"]}, (1, 4), ""),
    ],
)  # fmt: skip
def test_an_operator_serves_its_own_region(
    region: str, changes: dict[str, Any], bounds: tuple[int, int], said: str
) -> None:
    agent = here(an_agent(**changes), region)
    assert (agent.warm.min_pods, agent.warm.max_pods) == bounds
    assert ladder(agent).warm is (bounds != (0, 0))
    assert said in elsewhere(agent)
    assert bool(said) is bool(elsewhere(agent))
    assert (elsewhere(agent) in ladder(agent).warnings) is bool(said)


@pytest.mark.parametrize(
    ("region", "residency", "fine"),
    [
        ("eu-west", (), True),
        ("eu-west", ("us", "eu"), True),
        ("eu-west", ("eu-west",), True),
        ("eu-west", ("eu-west-1",), False),
        ("eu-west", ("e", "eu-w", "west"), False),
        ("europe", ("eu",), False),
    ],
)
def test_residency_goes_by_whole_parts_of_a_name(
    region: str, residency: tuple[str, ...], fine: bool
) -> None:
    assert resident(region, residency) is fine


CONTAINERS: dict[str, Any] = {
    "burst__modal": {
        "credentialsSecretRef": {"name": "modal"},
        "minContainers": 4,
        "bufferContainers": 6,
        "slotsPerContainer": 1,
        "maxContainers": 200,
    }
}
PODS: dict[str, Any] = {"warm": {"minPods": 3, "maxPods": 3, "slotsPerPod": 2}}


@pytest.mark.parametrize(
    ("changes", "expected", "never", "words"),
    [
        (PODS | CONTAINERS, 16, False, ""),
        (
            PODS | CONTAINERS,
            200,
            False,
            ("3 pods × 2 + 10 containers × 1 = 16 at once, 200 expected: raise warm.minPods or "
            "burst.modal.minContainers"),
        ),
        (
            PODS | CONTAINERS,
            207,
            True,
            ("never more than 3 pods × 2 + 200 containers × 1 = 206 calls, 207 expected: raise "
            "warm.maxPods or burst.modal.maxContainers"),
        ),
        (PODS, 7, True, "never more than 3 pods × 2 = 6 calls, 7 expected: raise warm.maxPods"),
        # A slot that is kept free is a pod that is there.
        ({"warm": {"minPods": 0, "bufferSlots": 5}}, 8, False, ""),
        ({"warm": {"minPods": 0, "bufferSlots": 4}}, 8, False, "1 pods × 4 = 4 at once, 8 expected: raise "),
        # What policy forbids is not counted.
        (PODS | CONTAINERS | {"policy__dataClass": "phi"}, 7, True, "never more than 3 pods × 2 = 6 calls"),
        (
            CONTAINERS | {"warm": {"minPods": 0, "maxPods": 0}, "policy__residency": ["eu"]},
            1,
            True,
            "never more than no rung = 0 calls, 1 expected",
        ),
        ({}, 0, False, ""),
    ],
)  # fmt: skip
def test_what_is_promised_is_held_against_what_is_there(
    changes: dict[str, Any], expected: int, never: bool, words: str
) -> None:
    short = ladder(an_agent(**changes, slo={"callsAtOnce": expected})).short
    if not words:
        assert short is None
    else:
        assert short is not None
        assert short.never is never
        assert short.words.startswith(words)


def test_an_ordinary_agent_has_no_warning() -> None:
    assert ladder(an_agent()).warnings == ()
    assert ladder(an_agent(**BURST, warm={"minPods": 0, "bufferSlots": 0})).warnings == ()


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({}, True),
        ({"policy__dataClass": "phi"}, False),
        ({"policy__dataClass": "phi", "upstream__dataClasses": ["standard", "phi"]}, True),
        ({"upstream__dataClasses": ["phi"]}, False),
        ({"policy__residency": ["eu"]}, False),
        ({"policy__residency": ["eu"], "upstream__region": "eu-west"}, True),
        ({"policy__residency": ["eu"], "upstream__region": "us-east"}, False),
        ({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, False),
    ],
)
def test_what_may_leave_the_cluster_for_an_upstream(changes: dict[str, Any], allowed: bool) -> None:
    agent = an_agent(**UPSTREAM | changes)
    assert (ladder(agent).upstream is not None) == allowed
    told = [words for words in ladder(agent).warnings if "upstream is not used" in words]
    assert bool(told) == (not allowed and agent.deleted_at is None)
