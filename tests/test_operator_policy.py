"""What policy allows, and the arithmetic that it says."""

from typing import Any

import pytest
from worlds import BURST, an_agent

from trunkline_operator.agent.policy import ladder


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
        (BURST | {"policy__residency": ["eu"]}, "leaves out us-east of burst.modal.regions"),
        (
            BURST | {"burst__modal__budget": {"perDay": 0}},
            "budget is 0, so burst.modal is not used",
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
        ({"warm__bufferSlots": 17}, "bufferSlots 17 is more than all 16 warm slots"),
    ],
)
def test_what_may_surprise_is_said(changes: dict[str, Any], said: str) -> None:
    (warning,) = ladder(an_agent(**changes)).warnings
    assert said in warning


def test_an_ordinary_agent_has_no_warning() -> None:
    assert ladder(an_agent()).warnings == ()
    assert ladder(an_agent(**BURST, warm={"minPods": 0, "bufferSlots": 0})).warnings == ()
