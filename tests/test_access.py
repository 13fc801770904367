"""Routes are taken whole or not at all, and a caller's request leads to one of them or to a plain no."""

import asyncio
import base64
import copy
import hashlib
import json
from typing import Any

import pytest
from gateway_rig import AGENT, KEY, a_route, routes_text
from websockets.datastructures import Headers
from websockets.http11 import Request

from trunkline_runtime.contract import MOSHI_PATH, REALTIME_PATH
from trunkline_runtime.gateway.access.answers import Admitted, Denied
from trunkline_runtime.gateway.access.caller import Via, Why
from trunkline_runtime.gateway.access.door import Door
from trunkline_runtime.gateway.access.issuers import Pulse
from trunkline_runtime.gateway.routes import BurstRung, Routes, WarmRung
from trunkline_runtime.gateway.routes_reader import RouteError, parse_routes

PATH = f"{REALTIME_PATH}?model=echo"
BURST = {
    "kind": "burst",
    "name": "us-east",
    "url": "https://example.modal.direct/",
    "proxyToken": "wk-a.ws-b",
    "ticketKey": "secret",
    "deadlineSeconds": 7,
}


def ask(
    path: str = PATH,
    *,
    key: str | None = KEY,
    routes: Routes | None = None,
    holder: str = "",
    **headers: str,
) -> Admitted | Denied:
    lines = Headers()
    if key is not None:
        lines["Authorization"] = f"Bearer {key}"
    for name, value in headers.items():
        lines[name.replace("_", "-")] = value
    routes = routes or parse_routes(routes_text(a_route()))
    door = Door(Pulse(), lambda _, why: whys.append(why))
    whys: list[Why] = []
    decision = asyncio.run(
        door.admit(Request(path, lines), holder, routes.by_agent, "default", 0.0)
    )
    assert bool(whys) == (isinstance(decision, Denied) and decision.status == 401)
    return decision


def denied(decision: Admitted | Denied) -> Denied:
    assert isinstance(decision, Denied), decision
    return decision


def admitted(decision: Admitted | Denied) -> Admitted:
    assert isinstance(decision, Admitted), decision
    return decision


@pytest.mark.parametrize("model", ["echo", "default/echo", "default%2Fecho"])
def test_a_bare_name_stands_for_an_agent_of_the_default_namespace(model: str) -> None:
    path = f"{REALTIME_PATH}?intent=x&model={model}&y"
    found = admitted(ask(path))
    assert found.route.agent == AGENT
    assert found.target == path


def test_a_bare_name_is_not_looked_up_elsewhere() -> None:
    routes = parse_routes(routes_text(a_route("other/echo")))
    assert denied(ask(routes=routes)).status == 401
    assert admitted(ask(f"{REALTIME_PATH}?model=other/echo", routes=routes)).route


def test_a_stranger_cannot_tell_an_unknown_agent_from_a_wrong_key() -> None:
    unknown = denied(ask(f"{REALTIME_PATH}?model=nobody"))
    wrong = denied(ask(key="wrong"))
    missing = denied(ask(key=None))
    assert unknown.status == wrong.status == missing.status == 401
    assert unknown.text == wrong.text == missing.text
    assert unknown.headers == wrong.headers == (("WWW-Authenticate", 'Bearer realm="trunkline"'),)


@pytest.mark.parametrize(
    "value", [KEY, f"Basic {KEY}", f"Bearer{KEY}", "Bearer ", f"Bearer {KEY}x", "Bearer \xe9"]
)
def test_what_is_no_bearer_of_the_right_key_does_not_open(value: str) -> None:
    assert denied(ask(key=None, Authorization=value)).status == 401


def test_a_scheme_is_read_without_regard_to_case() -> None:
    assert admitted(ask(key=None, Authorization=f"bearer  {KEY} "))


def test_browsers_bring_the_key_as_a_subprotocol_that_is_never_selected() -> None:
    offers = f"realtime, openai-insecure-api-key.{KEY}, openai-beta.realtime-v1"
    found = admitted(ask(key=None, Sec_WebSocket_Protocol=offers))
    assert found.subprotocol == "realtime"
    alone = admitted(ask(key=None, Sec_WebSocket_Protocol=f"openai-insecure-api-key.{KEY}"))
    assert alone.subprotocol is None


def test_a_public_agent_asks_for_no_key() -> None:
    public = {"public": True, "apiKeys": {}, "origins": []}
    routes = parse_routes(routes_text(a_route(access=public)))
    assert admitted(ask(key=None, routes=routes))
    assert admitted(ask(key="anything", routes=routes))


def test_origins_are_checked_after_the_key_and_an_absent_one_is_no_browser() -> None:
    access = {**a_route()["access"], "origins": ["https://good.example"]}
    routes = parse_routes(routes_text(a_route(access=access)))
    assert admitted(ask(routes=routes))
    assert admitted(ask(routes=routes, Origin="https://good.example"))
    assert denied(ask(routes=routes, Origin="https://bad.example")).status == 403
    assert denied(ask(routes=routes, key="wrong", Origin="https://bad.example")).status == 401
    assert admitted(ask(Origin="https://anywhere.example"))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/v1/realtime/", 404),
        (REALTIME_PATH, 400),
        (f"{REALTIME_PATH}?model=a&model=b", 400),
        (f"{REALTIME_PATH}?model=", 400),
        (f"{REALTIME_PATH}?model=echo\rX", 400),
        (f"{REALTIME_PATH}?model=echo\x00", 400),
        (f"{REALTIME_PATH}?{'a=b&' * 100}model=echo", 400),
        (f"{REALTIME_PATH}?model=a/b/c", 401),
        (f"/a/b/c{MOSHI_PATH}", 404),
        (f"//evil.example{MOSHI_PATH}", 404),
        (f"/echo{MOSHI_PATH}/", 404),
        (f"/echo{REALTIME_PATH}", 404),
        (f"/echo{MOSHI_PATH}?model=echo", 400),
        (f"/other{MOSHI_PATH}", 401),
        (f"{REALTIME_PATH}?model=/echo", 401),
    ],
)
def test_a_path_that_names_no_agent_is_refused(path: str, status: int) -> None:
    assert denied(ask(path)).status == status


@pytest.mark.parametrize(
    ("protocols", "path", "fine"),
    [
        (["moshi"], MOSHI_PATH, True),
        (["moshi"], f"{REALTIME_PATH}?model=echo", False),
        (["realtime"], f"{REALTIME_PATH}?model=echo", True),
        (["realtime"], f"/echo{MOSHI_PATH}?text_seed=1", False),
        (["realtime", "moshi"], MOSHI_PATH, True),
        ([], MOSHI_PATH, True),
    ],
)
def test_an_agent_may_take_calls_in_some_protocols_alone(
    protocols: list[str], path: str, fine: bool
) -> None:
    routes = parse_routes(routes_text(a_route(protocols=protocols)))
    if fine:
        assert admitted(ask(path, routes=routes))
        return
    refused = denied(ask(path, routes=routes))
    assert (refused.status, refused.agent) == (403, AGENT)
    assert "session.protocols leaves it out" in refused.text
    # Who may not call at all learns nothing of it.
    assert denied(ask(path, routes=routes, key="wrong")).status == 401


# --- Moshi's own protocol, whose client can say little ---------------------------------------------------


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (f"/echo{MOSHI_PATH}", MOSHI_PATH),
        (f"/default/echo{MOSHI_PATH}?text_seed=1", f"{MOSHI_PATH}?text_seed=1"),
        (f"{MOSHI_PATH}?model=echo", f"{MOSHI_PATH}?model=echo"),
        (MOSHI_PATH, MOSHI_PATH),
    ],
)
def test_its_agent_stands_in_the_path_or_is_the_only_one(path: str, target: str) -> None:
    found = admitted(ask(path))
    assert (found.route.agent, found.target) == (AGENT, target)


def test_of_several_agents_one_must_be_named_and_a_stranger_learns_nothing() -> None:
    routes = parse_routes(routes_text(a_route(), a_route("default/other")))
    none, wrong = denied(ask(MOSHI_PATH, routes=routes)), denied(ask(f"/none{MOSHI_PATH}"))
    assert (none.status, none.text, none.agent) == (401, wrong.text, "")


@pytest.mark.parametrize(
    ("user_and_password", "opens"),
    [(f"me:{KEY}", True), (f":{KEY}", True), (KEY, False), (f"{KEY}:", False), ("me:wrong", False)],
)
def test_a_password_in_the_url_is_a_key(user_and_password: str, opens: bool) -> None:
    value = base64.b64encode(user_and_password.encode()).decode()
    decision = ask(f"/echo{MOSHI_PATH}", key=None, Authorization=f"Basic {value}")
    assert isinstance(decision, Admitted) is opens


def test_what_is_no_user_and_password_opens_nothing() -> None:
    for value in ("Basic", "Basic ???", f"Basic {KEY}"):
        assert denied(ask(f"/echo{MOSHI_PATH}", key=None, Authorization=value)).status == 401


# --- routes --------------------------------------------------------------------------------------------


def test_a_route_is_read_with_its_rungs() -> None:
    text = routes_text(a_route(rungs=[{"kind": "warm"}, BURST], draining=["echo-1"]), epoch=7)
    routes = parse_routes(text)
    route = routes.by_agent[AGENT]
    assert routes.epoch == 7
    assert route.draining == {"echo-1"}
    warm, burst = route.rungs
    assert warm == WarmRung()
    assert isinstance(burst, BurstRung)
    assert burst.url == "https://example.modal.direct"
    assert "wk-a" not in repr(routes)
    assert "worker-key" not in repr(routes)


def changed(path: str, value: Any) -> str:
    message = json.loads(routes_text(a_route(rungs=[{"kind": "warm"}, BURST])))
    target = message
    *parents, last = path.split(".")
    for parent in parents:
        target = target[int(parent)] if parent.isdigit() else target[parent]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return json.dumps(message)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("type", "load", 'routes.type must be "routes"'),
        ("version", 2, "routes.version must be 1"),
        ("epoch", -1, "routes.epoch must be a whole number from 0"),
        ("epoch", True, "routes.epoch must be a whole number from 0"),
        ("routes", {}, "routes.routes must be a list"),
        ("routes", [3], "routes.routes[0] must be an object"),
        ("routes.0.agent", "echo", "routes.routes[0].agent must be namespace/name, not 'echo'"),
        ("routes.0.agent", None, "routes.routes[0].agent is missing"),
        ("routes.0.workerKey", "", "routes.routes[0].workerKey must not be empty"),
        ("routes.0.access.public", "no", "routes.routes[0].access.public must be true or false"),
        ("routes.0.access.apiKeys", {"a": "ab"}, "routes.routes[0].access.apiKeys must map names"),
        (
            "routes.0.access.apiKeys",
            {"a": "é" * 64},
            "routes.routes[0].access.apiKeys must map names",
        ),
        ("routes.0.answerSeconds", 0, "routes.routes[0].answerSeconds must be above 0"),
        ("routes.0.maxSeconds", "1", "routes.routes[0].maxSeconds must be a number"),
        ("routes.0.admissionMs", -1, "routes.routes[0].admissionMs must not be negative"),
        ("routes.0.maxSeconds", float("inf"), "routes.routes[0].maxSeconds must be a number"),
        (
            "routes.0.rungs.0.kind",
            "cold",
            "routes.routes[0].rungs[0].kind must be warm, burst, upstream or wait",
        ),
        ("routes.0.rungs.1.url", "ftp://x", "routes.routes[0].rungs[1].url must be https://"),
        ("routes.0.rungs.1.url", "http://", "routes.routes[0].rungs[1].url must be https://"),
        ("routes.0.rungs.1.url", "http://x:99999", "routes.routes[0].rungs[1].url must be"),
        ("routes.0.rungs.1.ticketKey", "", "routes.routes[0].rungs[1].ticketKey must not be empty"),
        ("routes.0.draining", [1], "routes.routes[0].draining must be a list of strings"),
    ],
)
def test_routes_that_make_no_sense_are_refused_with_the_place(
    path: str, value: Any, sentence: str
) -> None:
    with pytest.raises(RouteError) as caught:
        parse_routes(changed(path, value))
    assert str(caught.value).startswith(sentence)


def test_an_agent_may_not_stand_twice() -> None:
    with pytest.raises(RouteError, match="twice"):
        parse_routes(routes_text(a_route(), copy.deepcopy(a_route())))


@pytest.mark.parametrize("text", ["", "[]", "nonsense", b"\xff", "[" * 100_000])
def test_what_is_no_json_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(RouteError):
        parse_routes(text)


# --- Twilio's signature, and certificates ----------------------------------------------------------------

SIGNED = "RSOYDt4T1cUTdK1PDd93/VVr8B8="


def signed_access(**changes: Any) -> Routes:
    """An agent that Twilio may call, and nobody else."""
    digest = hashlib.sha256(SIGNED.encode()).hexdigest()
    access: dict[str, Any] = {"public": False, "apiKeys": {}, "origins": [], "mintKey": "m" * 64}
    access["twilio"] = {"main": [digest, "0" * 64]}
    return parse_routes(routes_text(a_route(access=access | changes)))


def test_a_call_that_twilio_has_signed_is_the_accounts() -> None:
    caller = admitted(ask(key=None, routes=signed_access(), X_Twilio_Signature=SIGNED)).caller
    assert (caller.tenant, caller.via, caller.identity) == ("main", Via.TWILIO, "")
    assert SIGNED not in repr(caller)


@pytest.mark.parametrize(
    "shown",
    [
        {"X_Twilio_Signature": SIGNED[:-2] + "9="},
        {"X_Twilio_Signature": ""},
        {"X_Twilio_Signature": "é" * 40},
        {"Authorization": f"Bearer {SIGNED}"},
        {},
    ],
)
def test_what_twilio_has_not_signed_opens_nothing(shown: dict[str, str]) -> None:
    assert denied(ask(key=None, routes=signed_access(), **shown)).status == 401


def test_a_signature_counts_only_where_the_agent_says_so() -> None:
    assert denied(ask(key=None, X_Twilio_Signature=SIGNED)).status == 401
    assert admitted(ask(X_Twilio_Signature="wrong")).caller.via is Via.KEY


@pytest.mark.parametrize(
    ("holders", "holder", "status"),
    [(["a"], "a", 0), ([], "a", 0), (["a"], "b", 401), ([], "", 401), (None, "a", 401)],
)
def test_whose_certificate_opens_a_call(
    holders: list[str] | None, holder: str, status: int
) -> None:
    changes: dict[str, Any] = {} if holders is None else {"holders": holders}
    found = ask(key=None, holder=holder, routes=signed_access(**changes))
    assert (found.status if isinstance(found, Denied) else 0) == status


@pytest.mark.parametrize("twilio", [{"main": "x"}, {"main": ["x"]}, []])
def test_digests_of_signatures_that_are_none_are_refused(twilio: Any) -> None:
    with pytest.raises(RouteError, match="twilio"):
        signed_access(twilio=twilio)
