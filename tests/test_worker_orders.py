"""What gateways say, parsed: what makes no sense is refused in words, and never raises anything else."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline_runtime.worker.orders import (
    MAX_HOOK_SECONDS,
    DrainOrder,
    GatewaysOrder,
    Heartbeat,
    Malformed,
    opening_from,
    order_from,
)

SETTINGS: dict[str, Any] = {
    "greeting": "Hello.",
    "replies": [{"match": "a", "say": "b"}],
    "idleSeconds": 30,
}
HOOK: dict[str, Any] = {
    "url": "https://a.example/",
    "token": "",
    "deadlineSeconds": 0.5,
    "onFailure": "closed",
}


def told(**settings: Any) -> str:
    return json.dumps({"type": "trunkline.settings", "settings": settings})


def test_a_policy_travels_whole_and_what_is_not_known_is_left_out() -> None:
    policy = {
        "bannedWords": ["darn"],
        "bargeIn": True,
        "guards": [{"match": "a", "do": "hangUp", "say": ""}],
        "hook": HOOK,
    }
    sent = {"policy": policy | {"later": 1}, "call": "another's"}
    assert opening_from(told(**sent)) == {"policy": policy}
    slow = {"policy": {"hook": HOOK | {"deadlineSeconds": 1e9}}}
    hook = opening_from(told(**slow))["policy"]["hook"]
    assert hook["deadlineSeconds"] == MAX_HOOK_SECONDS


def test_orders() -> None:
    assert order_from('{"type": "drain"}') == DrainOrder(draining=True)
    assert order_from('{"type": "undrain"}') == DrainOrder(draining=False)
    assert order_from('{"type": "beat"}') == Heartbeat()
    hosts = '{"type": "gateways", "hosts": ["10.0.0.1", "fd00::0001"]}'
    assert order_from(hosts) == GatewaysOrder(frozenset({"10.0.0.1", "fd00::1"}))
    assert order_from('{"type": "of a newer gateway"}') is None


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"type": 1}, "a string as its type"),
        ({"type": "gateways"}, "hosts must be a list of 256"),
        ({"type": "gateways", "hosts": ["10.0.0.1"] * 257}, "hosts must be a list of 256"),
        ({"type": "gateways", "hosts": ["gateway.example"]}, "hosts must be IP addresses"),
        ({"type": "gateways", "hosts": [1]}, "host"),
    ],
)
def test_an_order_that_makes_no_sense(order: dict[str, Any], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        order_from(json.dumps(order))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"idleSeconds": "long"}, "idleSeconds must be a number"),
        ({"replies": [1]}, "replies must be a list of objects"),
        ({"replies": [{"match": "a"}]}, "say must be a string"),
        ({"replies": [{"match": "", "say": ""}] * 65}, "65 replies and 64"),
        ({"policy": []}, "policy must be an object"),
        ({"policy": {"bannedWords": ["a"] * 65}}, "65 bannedWords and 64"),
        ({"policy": {"bannedWords": [""]}}, "bannedWords must have 1 to 64"),
        ({"policy": {"bannedWords": "a"}}, "bannedWords must be a list"),
        ({"policy": {"bargeIn": 1}}, "bargeIn must be true or false"),
        ({"policy": {"guards": [1]}}, "guards must be a list of objects"),
        ({"policy": {"guards": [{"do": "x"}]}}, "do must be say, mute or hangUp"),
        ({"policy": {"hook": 1}}, "hook must be an object"),
        ({"policy": {"hook": HOOK | {"onFailure": "ajar"}}}, "open or closed"),
        ({"policy": {"hook": HOOK | {"url": ""}}}, "url must have 1 to 1024"),
        ({"policy": {"hook": HOOK | {"deadlineSeconds": 0}}}, "above 0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        opening_from(told(**SETTINGS | change))


def test_the_first_message_of_a_data_link() -> None:
    sent = {"fallback": "What?", "x": 1, "transcripts": False}
    assert opening_from(told(**sent)) == {"fallback": "What?", "transcripts": False}
    assert opening_from(told(**SETTINGS)) == SETTINGS
    with pytest.raises(Malformed, match=r"the type trunkline\.settings"):
        opening_from('{"type": "session.update"}')
    with pytest.raises(Malformed, match="settings must be an object"):
        opening_from('{"type": "trunkline.settings", "settings": []}')


POLICY = ("policy", "guards", "do", "hook", "bannedWords", "url", "onFailure", "deadlineSeconds")
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["settings", *SETTINGS, "match", "say", "replies", *POLICY]), inner
        )
    ),
    max_leaves=8,
)


@given(kind=st.sampled_from(["trunkline.settings", "drain", "beat", "x"]), value=JSON)
def test_nothing_but_malformed_is_raised(kind: str, value: object) -> None:
    message = {**value, "type": kind} if isinstance(value, dict) else value
    for parse in (order_from, opening_from):
        with contextlib.suppress(Malformed):
            parse(json.dumps(message))


@given(st.text() | st.binary())
def test_bytes_of_a_stranger_raise_nothing_else(text: str | bytes) -> None:
    with contextlib.suppress(Malformed):
        order_from(text)


def test_nesting_too_deep_is_malformed() -> None:
    with pytest.raises(Malformed, match="must be JSON"):
        order_from("[" * 100_000)
