"""The route that gateways get: what is in it, what is not, and when its hash changes."""

import base64
import hashlib
import hmac
import json
from dataclasses import replace
from hashlib import sha256
from typing import Any, cast

import pytest
from worlds import BURST, an_agent

from trunkline_operator.decisions.routes import Keys, _signature, route
from trunkline_runtime.contract import BurstRung, Route
from trunkline_runtime.gateway.access.limits import Limits, Tenancy
from trunkline_runtime.gateway.access.tokens import Expected
from trunkline_runtime.gateway.routes import JwtAccess, UpstreamRung, WaitRung
from trunkline_runtime.gateway.routes_reader import routes_from
from trunkline_runtime.worker.orders import settings_from

KEYS = Keys(
    worker="worker-key-1",
    ticket="ticket-key-1",
    callers={"web": "sk-web", "phone": "sk-phone", "empty": ""},
    proxy_token="wk-1.ws-1",
)
KEYED: dict[str, Any] = {"access": {"apiKeysSecretRef": {"name": "callers"}}}
URL = "https://burst.example"
URLS = {"us-east": URL}


def made(
    url: str = URL, keys: Keys = KEYS, draining: tuple[str, ...] = (), **changes: Any
) -> Route:
    return route(an_agent(**BURST | changes), keys, {"us-east": url} if url else {}, draining)


def test_what_a_gateway_needs() -> None:
    one = made(
        engine={
            "type": "speech",
            "greeting": "Hello.",
            "replies": [{"match": "a", "say": "b"}],
            "fallback": "What?",
        },
        session={"maxSeconds": 600, "idleSeconds": 30, "answerSeconds": 9},
        slo={"admissionMs": 250},
        draining=("desk-2", "desk-1"),
    )
    assert one["agent"] == "ns/desk"
    assert one["workerKey"] == "worker-key-1"
    assert (one["answerSeconds"], one["maxSeconds"], one["admissionMs"]) == (9, 600, 250)
    assert one["settings"] == {
        "greeting": "Hello.",
        "replies": [{"match": "a", "say": "b"}],
        "fallback": "What?",
        "idleSeconds": 30,
    }
    assert one["rungs"] == [
        {"kind": "warm"},
        {
            "kind": "burst",
            "name": "us-east",
            "url": URL,
            "proxyToken": "wk-1.ws-1",
            "ticketKey": "ticket-key-1",
            "deadlineSeconds": 7,
        },
    ]
    assert one["draining"] == ["desk-1", "desk-2"]
    assert "defaultNamespace" not in one


def test_what_callers_may_speak_and_hear_travels() -> None:
    one = made(
        session={"protocols": ["moshi"]}, policy={"transcripts": "none"}, slo={"firstAudioMs": 700}
    )
    assert (one["protocols"], one["firstAudioMs"]) == (["moshi"], 700)
    assert one["settings"]["transcripts"] is False
    plain = made()
    assert not {"protocols", "firstAudioMs"} & plain.keys()
    assert "transcripts" not in plain["settings"]


def test_a_policy_travels_with_its_hooks_token() -> None:
    hook = {"url": "https://a.example/", "deadlineMilliseconds": 250, "onFailure": "closed"}
    guard = {"match": "a", "do": "hangUp"}
    policy = {"bannedWords": ["darn"], "bargeIn": True, "guards": [guard], "hook": hook}
    engine = {"type": "moshi", "model": "tiny", "policy": policy}
    one = made(engine=engine, keys=replace(KEYS, hook_token="of the hook"))
    assert one["settings"]["policy"] == {
        "bannedWords": ["darn"],
        "bargeIn": True,
        "guards": [{"match": "a", "do": "hangUp", "say": ""}],
        "hook": {
            "url": "https://a.example/",
            "token": "of the hook",
            "deadlineSeconds": 0.25,
            "onFailure": "closed",
        },
    }
    sent = json.loads(json.dumps(one["settings"]))
    assert settings_from(sent)["policy"] == one["settings"]["policy"], "a worker reads it"
    assert "of the hook" not in repr(replace(KEYS, hook_token="of the hook"))
    assert made(engine=engine)["hash"] != one["hash"]
    assert "policy" not in made()["settings"]


def test_callers_keys_travel_as_digests_and_an_empty_one_opens_nothing() -> None:
    access = made(**KEYED)["access"]
    assert access.pop("mintKey", None)
    digests = {name: hashlib.sha256(f"sk-{name}".encode()).hexdigest() for name in ("phone", "web")}
    assert access == {"public": False, "apiKeys": digests, "origins": []}
    assert "sk-web" not in json.dumps(made(**KEYED))


def test_a_missing_secret_lets_nobody_in() -> None:
    access = made(keys=Keys(worker="w", ticket="t"), **KEYED)["access"]
    assert access.pop("mintKey", None)
    assert access == {"public": False, "apiKeys": {}, "origins": []}


def test_a_public_agent_needs_no_keys() -> None:
    access = made(access={"public": True, "origins": ["https://a.example"]})["access"]
    assert access.pop("mintKey", None)
    assert access == {"public": True, "apiKeys": {}, "origins": ["https://a.example"]}


def test_an_issuer_and_tenants_travel_with_every_limit_resolved() -> None:
    jwt = {"issuer": "https://id.example/", "audience": "calls", "jwksUri": "https://id.example/k"}
    tenants = {
        "claim": "org",
        "limits": {"concurrentCalls": 5, "startsPerMinute": 60},
        "overrides": [
            {"tenant": "acme", "concurrentCalls": 50, "guaranteedSlots": 4, "burstShare": 30}
        ],
    }
    access = made(access={"jwt": jwt, "tenants": tenants})["access"]
    assert access["jwt"] == jwt
    everybody = {
        "concurrentCalls": 5,
        "startsPerMinute": 60,
        "minutesPerDay": 0,
        "guaranteedSlots": 0,
        "burstShare": 100,
    }
    acme = {**everybody, "concurrentCalls": 50, "guaranteedSlots": 4, "burstShare": 30}
    assert access["tenants"] == {"claim": "org", "limits": everybody, "overrides": {"acme": acme}}
    assert not {"jwt", "tenants"} & made(**KEYED)["access"].keys()


def test_a_gateway_reads_what_the_operator_writes() -> None:
    jwt = {"issuer": "https://id.example/", "audience": "calls", "jwksUri": "https://id.example/k"}
    tenants = {
        "claim": "org",
        "limits": {"concurrentCalls": 5, "burstShare": 50},
        "overrides": [{"tenant": "acme", "guaranteedSlots": 4, "burstShare": 0}],
    }
    more = {"twilio": TWILIO, "clientCertificates": {"names": ["spiffe://x/y"]}}
    written = made(
        keys=replace(KEYS, twilio={"main": TWILIO_TOKEN}),
        access={**KEYED["access"], **more, "jwt": jwt, "tenants": tenants},
    )
    read = routes_from({"type": "routes", "version": 1, "epoch": 1, "routes": [written]})
    access = read.by_agent["ns/desk"].access
    assert access.jwt == JwtAccess(
        expected=Expected(issuer="https://id.example/", audience="calls", claim="org"),
        source="https://id.example/k",
    )
    assert access.tenancy == Tenancy(
        limits=Limits(concurrent_calls=5, burst_share=50),
        overrides={"acme": Limits(concurrent_calls=5, guaranteed_slots=4, burst_share=0)},
        named=frozenset({"phone", "web"}),
    )
    assert access.holders == frozenset({"spiffe://x/y"})
    (digest, _) = access.twilio["main"]
    assert digest == sha256(signature(TWILIO["publicUrl"]).encode()).hexdigest()
    assert digest not in repr(read)
    assert access.mint_key not in repr(read)
    assert access.digests["web"] not in repr(read)


TWILIO_TOKEN = "12345678901234567890123456789012"
TWILIO: dict[str, Any] = {
    "authTokenSecretRef": {"name": "twilio"},
    "publicUrl": "wss://calls.example/v1/realtime?model=ns/desk",
}


def signature(url: str, token: str = TWILIO_TOKEN) -> str:
    """As Twilio describes it: the base64 of the HMAC-SHA1 of the URL, by the auth token."""
    return base64.b64encode(hmac.new(token.encode(), url.encode(), "sha1").digest()).decode()


def twilio_access(url: str, tokens: dict[str, str]) -> Any:
    keys = replace(KEYS, twilio=tokens)
    return made(keys=keys, access={"twilio": TWILIO | {"publicUrl": url}})["access"]


def test_of_twilio_gateways_get_only_digests_of_the_signatures_that_it_may_make() -> None:
    tokens = {"main": TWILIO_TOKEN, "sub": "f" * 32, "empty": ""}
    access = twilio_access(TWILIO["publicUrl"], tokens)
    port = "wss://calls.example:443/v1/realtime?model=ns/desk"
    expected = [signature(TWILIO["publicUrl"]), signature(port)]
    assert access["twilio"]["main"] == [sha256(each.encode()).hexdigest() for each in expected]
    assert access["twilio"].keys() == {"main", "sub"}
    text = json.dumps(access)
    assert not [secret for secret in (TWILIO_TOKEN, *expected) if secret in text]
    assert TWILIO_TOKEN not in repr(replace(KEYS, twilio=tokens))


def test_twilios_signature_is_the_one_of_its_own_documentation() -> None:
    """The worked example of https://www.twilio.com/docs/usage/security, of a POST: its parameters follow the URL."""
    signed = "https://mycompany.com/myapp.php?foo=1&bar=2"
    signed += "CallSidCA1234567890ABCDECaller+14158675309Digits1234From+14158675309To+18005551212"
    assert _signature(signed, "12345") == b"RSOYDt4T1cUTdK1PDd93/VVr8B8="


@pytest.mark.parametrize(
    ("url", "forms"),
    [
        ("wss://a.example/x", ["wss://a.example/x", "wss://a.example:443/x"]),
        ("wss://a.example:443/x", ["wss://a.example/x", "wss://a.example:443/x"]),
        ("wss://a.example:8443/x", ["wss://a.example:8443/x"]),
    ],
)
def test_a_standard_port_may_stand_in_the_signed_url_or_not(url: str, forms: list[str]) -> None:
    access = twilio_access(url, {"main": TWILIO_TOKEN})
    digests = [sha256(signature(form).encode()).hexdigest() for form in forms]
    assert access["twilio"]["main"] == digests


def test_holders_of_certificates_travel_by_name() -> None:
    assert made(access={"clientCertificates": {"names": ["a", "b"]}})["access"]["holders"] == [
        "a",
        "b",
    ]
    assert made(access={"clientCertificates": {}})["access"]["holders"] == []
    assert "holders" not in made(**KEYED)["access"]


def test_only_who_knows_both_keys_of_an_agent_could_mint() -> None:
    def key(worker: str, ticket: str) -> str:
        return made(keys=Keys(worker=worker, ticket=ticket))["access"]["mintKey"]

    assert key("w", "t") == key("w", "t")
    assert len({key("w", "t"), key("w", "other"), key("other", "t"), "w", "t"}) == 5


@pytest.mark.parametrize(
    ("url", "changes", "kinds"),
    [
        (URL, {}, ["warm", "burst"]),
        ("", {}, ["warm"]),
        (URL, {"warm": {"minPods": 0, "maxPods": 0}}, ["burst"]),
        (URL, {"policy": {"dataClass": "phi"}}, ["warm"]),
        (URL, {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, []),
    ],
)
def test_rungs_are_those_that_are_there_and_allowed(
    url: str, changes: dict[str, Any], kinds: list[str]
) -> None:
    assert [rung["kind"] for rung in made(url, **changes)["rungs"]] == kinds


def test_each_region_that_takes_calls_has_its_rung_in_the_agents_order() -> None:
    regions = ["eu-west", "us-east", "ap-south"]
    agent = an_agent(**BURST, burst__modal__regions=regions)
    urls = {"us-east": "https://us", "eu-west": "https://eu"}
    rungs = [rung for rung in route(agent, KEYS, urls)["rungs"] if rung["kind"] == "burst"]
    assert [(rung["name"], rung["url"]) for rung in rungs] == [
        ("eu-west", "https://eu"),
        ("us-east", "https://us"),
    ]


def test_a_rung_tells_what_is_a_slow_restore_where_something_is_restored() -> None:
    agent = an_agent(**BURST)
    slow = cast(BurstRung, route(agent, KEYS, URLS, slow_seconds=30.0)["rungs"][1])
    assert slow["slowSeconds"] == 30.0
    assert "slowSeconds" not in route(agent, KEYS, URLS)["rungs"][1]


def test_keys_are_not_shown() -> None:
    assert "key-1" not in repr(KEYS)
    assert "sk-" not in repr(KEYS)
    assert "ws-1" not in repr(KEYS)


def test_the_hash_is_of_all_the_rest() -> None:
    one = made(**KEYED)
    assert one["hash"] == made(**KEYED)["hash"]
    others = [
        made(**KEYED, engine={"type": "loopback", "greeting": "Hello."}),
        made(url="https://other.example", **KEYED),
        made(keys=Keys(worker="worker-key-2", ticket="t"), **KEYED),
        made(draining=("desk-0",), **KEYED),
        route(an_agent(**BURST, **KEYED), KEYS, URLS, default_namespace=True),
    ]
    assert len({one["hash"], *(other["hash"] for other in others)}) == 6


def test_a_route_is_json() -> None:
    one = made(**KEYED)
    assert json.loads(json.dumps(one)) == one
    assert type(cast(BurstRung, one["rungs"][1])["name"]) is str


def test_gateways_learn_the_ca_of_workers_and_plain_links_by_its_absence() -> None:
    agent = an_agent(**BURST)
    plain, secure = route(agent, KEYS, URLS), route(agent, KEYS, URLS, worker_ca="PEM")
    assert "workerTls" not in plain
    assert secure["workerTls"] == "PEM"
    assert secure["hash"] != plain["hash"]


UPSTREAM: dict[str, Any] = {
    "url": "wss://calls.example/base",
    "tokenSecretRef": {"name": "peer"},
    "deadlineSeconds": 4,
}


def test_an_upstream_and_the_line_come_last_and_gateways_read_them() -> None:
    keys = replace(KEYS, upstream_token="sk-peer")
    one = made(keys=keys, upstream=UPSTREAM, session={"waitingCallers": 20})
    assert [rung["kind"] for rung in one["rungs"]] == ["warm", "burst", "upstream", "wait"]
    read = routes_from({"type": "routes", "version": 1, "epoch": 1, "routes": [one]})
    *_, upstream, wait = read.by_agent["ns/desk"].rungs
    assert upstream == UpstreamRung(
        url="wss://calls.example/base", model="ns/desk", token="sk-peer", deadline=4.0
    )
    assert wait == WaitRung(20)
    assert "sk-peer" not in repr(read)


def test_an_upstream_without_its_token_or_against_the_policy_is_no_rung() -> None:
    assert "upstream" not in str(made(upstream=UPSTREAM)["rungs"])
    keys = replace(KEYS, upstream_token="sk-peer")
    phi = made(keys=keys, upstream=UPSTREAM, policy__dataClass="phi")
    assert "upstream" not in str(phi["rungs"])
    bare = made(keys=keys, upstream={"url": "wss://calls.example", "model": "gpt-realtime"})
    (rung,) = (rung for rung in bare["rungs"] if rung["kind"] == "upstream")
    assert (rung["model"], rung["token"]) == ("gpt-realtime", ""), (
        "it names no Secret, so it gets none"
    )


def test_nobody_waits_for_pods_that_there_never_are() -> None:
    one = made(warm={"minPods": 0, "maxPods": 0}, session={"waitingCallers": 20})
    assert [rung["kind"] for rung in one["rungs"]] == ["burst"]
