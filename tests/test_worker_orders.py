"""What gateways say, parsed: what makes no sense is refused in words, and never raises anything else."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline_runtime.worker.orders import (
    MAX_HOOK_SECONDS,
    MAX_RESERVE_SECONDS,
    DrainOrder,
    Heartbeat,
    Malformed,
    ReleaseOrder,
    ReserveOrder,
    burst_settings_from,
    order_from,
)

RESERVE: dict[str, Any] = {
    "type": "reserve",
    "call": "c1",
    "agent": "default/echo",
    "settings": {"greeting": "Hello.", "replies": [{"match": "a", "say": "b"}], "idleSeconds": 30},
    "deadline": 5,
}
HOOK: dict[str, Any] = {
    "url": "https://a.example/",
    "token": "",
    "deadlineSeconds": 0.5,
    "onFailure": "closed",
}


def test_a_policy_travels_whole_and_what_is_not_known_is_left_out() -> None:
    policy = {
        "bannedWords": ["darn"],
        "bargeIn": True,
        "guards": [{"match": "a", "do": "hangUp", "say": ""}],
        "hook": HOOK,
    }
    sent = {"policy": policy | {"later": 1}, "call": "another's"}
    order = order_from(json.dumps({**RESERVE, "settings": sent}))
    assert isinstance(order, ReserveOrder)
    assert order.settings == {"policy": policy}
    slow = {"policy": {"hook": HOOK | {"deadlineSeconds": 1e9}}}
    order = order_from(json.dumps({**RESERVE, "settings": slow}))
    assert isinstance(order, ReserveOrder)
    assert order.settings["policy"]["hook"]["deadlineSeconds"] == MAX_HOOK_SECONDS


def test_orders() -> None:
    order = order_from(json.dumps({**RESERVE, "later": True}))
    assert order == ReserveOrder(
        call="c1",
        agent="default/echo",
        settings={
            "greeting": "Hello.",
            "replies": [{"match": "a", "say": "b"}],
            "idleSeconds": 30.0,
        },
        seconds=5.0,
    )
    assert order_from('{"type": "release", "ticket": "t"}') == ReleaseOrder("t")
    assert order_from('{"type": "drain"}') == DrainOrder(draining=True)
    assert order_from('{"type": "undrain"}') == DrainOrder(draining=False)
    assert order_from('{"type": "beat"}') == Heartbeat()
    assert order_from('{"type": "of a newer gateway"}') is None


def test_a_grant_cannot_be_held_for_long() -> None:
    order = order_from(json.dumps({**RESERVE, "deadline": 1e9}))
    assert isinstance(order, ReserveOrder)
    assert order.seconds == MAX_RESERVE_SECONDS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": 1}, "a string as its type"),
        ({"call": ""}, "call must have 1 to 128 characters"),
        ({"call": "c" * 129}, "call must have 1 to 128 characters"),
        ({"agent": None}, "agent must be a string"),
        ({"deadline": 0}, "deadline must be above 0"),
        ({"deadline": float("inf")}, "deadline must be a number"),
        ({"deadline": True}, "deadline must be a number"),
        ({"settings": []}, "settings must be an object"),
        ({"settings": {"idleSeconds": "long"}}, "idleSeconds must be a number"),
        ({"settings": {"replies": [1]}}, "replies must be a list of objects"),
        ({"settings": {"replies": [{"match": "a"}]}}, "say must be a string"),
        ({"settings": {"replies": [{"match": "", "say": ""}] * 65}}, "65 replies and 64"),
        ({"settings": {"policy": []}}, "policy must be an object"),
        ({"settings": {"policy": {"bannedWords": ["a"] * 65}}}, "65 bannedWords and 64"),
        ({"settings": {"policy": {"bannedWords": [""]}}}, "bannedWords must have 1 to 64"),
        ({"settings": {"policy": {"bannedWords": "a"}}}, "bannedWords must be a list"),
        ({"settings": {"policy": {"bargeIn": 1}}}, "bargeIn must be true or false"),
        ({"settings": {"policy": {"guards": [1]}}}, "guards must be a list of objects"),
        ({"settings": {"policy": {"guards": [{"do": "x"}]}}}, "do must be say, mute or hangUp"),
        ({"settings": {"policy": {"hook": 1}}}, "hook must be an object"),
        ({"settings": {"policy": {"hook": HOOK | {"onFailure": "ajar"}}}}, "open or closed"),
        ({"settings": {"policy": {"hook": HOOK | {"url": ""}}}}, "url must have 1 to 1024"),
        ({"settings": {"policy": {"hook": HOOK | {"deadlineSeconds": 0}}}}, "above 0"),
    ],
)
def test_a_reserve_that_makes_no_sense(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        order_from(json.dumps({**RESERVE, **change}))


def test_the_first_message_of_a_burst_link() -> None:
    said = json.dumps({"type": "trunkline.settings", "settings": {"fallback": "What?", "x": 1}})
    assert burst_settings_from(said) == {"fallback": "What?"}
    with pytest.raises(Malformed, match=r"the type trunkline\.settings"):
        burst_settings_from('{"type": "session.update"}')


POLICY = ("policy", "guards", "do", "hook", "bannedWords", "url", "onFailure", "deadlineSeconds")
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*RESERVE, "ticket", "match", "say", "replies", *POLICY]), inner
        )
    ),
    max_leaves=8,
)


@given(kind=st.sampled_from(["reserve", "release", "drain", "beat", "x"]), value=JSON)
def test_nothing_but_malformed_is_raised(kind: str, value: object) -> None:
    message = {**value, "type": kind} if isinstance(value, dict) else value
    for parse in (order_from, burst_settings_from):
        with contextlib.suppress(Malformed):
            parse(json.dumps(message))


@given(st.text() | st.binary())
def test_bytes_of_a_stranger_raise_nothing_else(text: str | bytes) -> None:
    with contextlib.suppress(Malformed):
        order_from(text)


def test_nesting_too_deep_is_malformed() -> None:
    with pytest.raises(Malformed, match="must be JSON"):
        order_from("[" * 100_000)
