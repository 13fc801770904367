"""What docs/gateway.md says is so: its examples let callers in, its commands run, and its tables are whole."""

import ast
import asyncio
import json
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from access_rig import PRIVATE, jwk, jwks, jwt_access, token
from gateway_rig import KEY, FakeWorker, a_gateway, a_route, on_uvloop, routes_text
from jwt import encode
from websockets.datastructures import Headers
from websockets.http11 import Request
from worlds import an_agent

from trunkline_operator.decisions.routes import Keys, route
from trunkline_runtime.contract import REALTIME_PATH, Close
from trunkline_runtime.gateway.access.answers import Admitted, Away, Denied
from trunkline_runtime.gateway.access.caller import Why
from trunkline_runtime.gateway.access.door import Door
from trunkline_runtime.gateway.access.issuers import Pulse
from trunkline_runtime.gateway.access.jwks import parse_jwks
from trunkline_runtime.gateway.routes_reader import parse_routes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/gateway.md").read_text()
GATEWAY = ROOT / "runtime/trunkline_runtime/gateway"


def between(name: str) -> str:
    _, _, rest = PAGE.partition(f"<!-- {name} -->\n")
    assert rest, name
    return rest.partition("<!--")[0]


def numbers(table: str) -> set[int]:
    """Those in the first column of a table."""
    return {
        int(found)
        for row in table.splitlines()
        for found in re.findall(r"\b\d{3,4}\b", row.split("|")[1])
    }


# --- examples --------------------------------------------------------------------------------------------


def examples() -> list[dict[str, Any]]:
    """The `access` of each example that is whole."""
    texts = re.findall(r"^ *```yaml\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    bodies = [yaml.safe_load(textwrap.dedent(text)) for text in texts if "access:" in text]
    return [body["access"] for body in bodies if "jwt" in body["access"]]


def decision(access: dict[str, Any], token: str, keys: str) -> Admitted | Denied:
    """What a gateway says to a token of an issuer with these keys."""
    made = route(an_agent(access=access), Keys(worker="w", ticket="t"), {})
    made["access"]["jwt"].pop("jwksUri", None)
    made["access"]["jwt"]["jwks"] = keys
    routes = parse_routes(routes_text(made))
    head = Headers({"Authorization": f"Bearer {token}"})
    request = Request(f"{REALTIME_PATH}?model={made['agent']}", head)

    async def ask() -> Admitted | Denied:
        door = Door(Pulse(), lambda *_: None)
        return await door.admit(request, "", routes.by_agent, "default", 1.0)

    return asyncio.run(ask())


# As these two providers make them, shortened.
KEYCLOAK = {
    "exp": 4102444800,
    "iat": 1,
    "jti": "onrtac:1",
    "iss": "https://keycloak.example/realms/shop",
    "aud": ["front-desk", "account"],
    "sub": "f3a1c0de-0000-4000-8000-000000000001",
    "typ": "Bearer",
    "azp": "shop-web",
    "acr": "1",
    "realm_access": {"roles": ["offline_access"]},
    "scope": "openid profile",
    "organization": "acme",
}
AUTH0 = {
    "https://shop.example/tenant": "acme",
    "iss": "https://shop.eu.auth0.com/",
    "sub": "auth0|1",
    "aud": ["https://calls.shop.example", "https://shop.eu.auth0.com/userinfo"],
    "iat": 1,
    "exp": 4102444800,
    "azp": "client",
    "scope": "openid",
}


@pytest.mark.parametrize("said", [KEYCLOAK, AUTH0], ids=["keycloak", "auth0"])
def test_a_token_as_the_provider_makes_it_opens_the_agent_of_its_example(
    said: dict[str, Any],
) -> None:
    (access,) = (each for each in examples() if each["jwt"]["issuer"] == said["iss"])
    # Both publish an encryption key beside, and Auth0 a certificate chain.
    encryption = jwk(kid="enc") | {"use": "enc", "alg": "RSA-OAEP"}
    keys = jwks(encryption, jwk(kid="2026", x5c=["MIIC"], x5t="x"))

    def shown(**changes: Any) -> str:
        return encode(said | changes, PRIVATE["RS256"], "RS256", {"kid": "2026", "typ": "JWT"})

    found = decision(access, shown(), keys)
    assert isinstance(found, Admitted)
    assert found.caller.tenant == "acme"
    for wrong in ({"aud": "account"}, {"iss": str(said["iss"]) + "x"}, {"exp": 1}):
        assert isinstance(decision(access, shown(**wrong), keys), Denied)


def test_the_commands_for_keys_of_ones_own_make_a_document_and_a_good_token(tmp_path: Path) -> None:
    (script,) = re.findall(r"```bash\n(.*?)```", between("own keys"), re.DOTALL)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    keys, token = ran.stdout.splitlines()
    assert len(parse_jwks(keys).keys) == 1
    access = {"jwt": {"issuer": "shop-backend", "audience": "front-desk", "jwks": keys}}
    found = decision(access, token, keys)
    assert isinstance(found, Admitted)
    assert found.caller.tenant == "user-7"


# --- tables ----------------------------------------------------------------------------------------------


def statuses() -> set[int]:
    """Every status that the gateway's code answers callers with, as its source says it."""
    found = set()
    for file in [GATEWAY / "intake.py", GATEWAY / "gateway.py", *(GATEWAY / "access").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                given = [word.value for word in node.keywords if word.arg == "status"]
                given += node.args if _name(node) in ("_refuse", "answer", "invalid") else []
                found |= {
                    value.value
                    for value in given
                    if isinstance(value, ast.Constant) and isinstance(value.value, int)
                }
    return found - {200}


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


# What the libraries that read heads answer by themselves: websockets 400, 405, 426, 431 and 505, h11 besides 501.
BY_LIBRARIES = {405, 426, 431, 505}


def test_every_status_that_a_caller_can_meet_is_in_the_table_and_no_other() -> None:
    assert {400, 401, 403, 404, 408, 413, 429, 500, 501, 503} <= statuses()
    assert numbers(between("statuses")) == statuses() | BY_LIBRARIES


def test_every_close_code_that_a_caller_can_meet_is_in_the_table_and_no_other() -> None:
    assert numbers(between("codes")) == {*map(int, Close), 1006}


def test_every_reason_of_the_metrics_is_named() -> None:
    for reason in (*Why, *Away):
        assert f"`{reason.value}`" in PAGE, reason


def test_every_option_of_a_gateway_about_callers_is_named() -> None:
    command = (ROOT / "runtime/trunkline_runtime/cli.py").read_text()
    signature = command.partition("def gateway(")[2].partition(") -> None:")[0]
    for name in ("tls", "client_ca", "client_certificates", "trusted_proxies", "proxy_protocol"):
        assert re.search(rf"^    {name}: ", signature, re.MULTILINE), name
        assert f"--{name.replace('_', '-')}" in PAGE, name


# --- commands against a gateway --------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """Each curl of the page, as one line, and what the page says of its answer."""
    blocks = re.findall(r"```console\n(\$ curl.*?)```", PAGE, re.DOTALL)
    pairs = [re.sub(r" *\\\n *", " ", block).split("\n", 1) for block in blocks]
    return [(command.removeprefix("$ "), answer) for command, answer in pairs]


@on_uvloop
async def test_the_commands_of_the_page_get_the_answers_of_the_page() -> None:
    keyed = a_route("default/front-desk")["access"]
    both = {**jwt_access(), "apiKeys": keyed["apiKeys"]}
    route = a_route("default/front-desk", access=both)
    async with (
        a_gateway(route) as gateway,
        FakeWorker().serving() as worker,
        worker.linked(gateway, "default/front-desk"),
    ):
        asked = commands()
        assert len(asked) == 2
        for command, answer in asked:
            found = await asyncio.create_subprocess_shell(
                command.replace("https://calls.example", f"http://127.0.0.1:{gateway.port}"),
                env={"PATH": os.environ["PATH"], "KEY": KEY, "TOKEN": token()},
                stdout=asyncio.subprocess.PIPE,
            )
            said = (await found.communicate())[0].decode()
            if answer.startswith("{"):
                assert json.loads(said).keys() == json.loads(answer).keys()
                assert json.loads(said)["session"] == json.loads(answer)["session"]
            else:
                assert said.strip() == answer.strip()
