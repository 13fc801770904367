"""`trunkline-operator release` as a process, on a real API server and a local Modal that the real SDK speaks to."""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from operator_rig import NAME, SPEC, World, operated
from ports import free_port

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config
from trunkline_operator.release import claim
from trunkline_runtime.contract import ENV_OPERATOR_TOKEN, FINALIZER, GROUP, VERSION

Json = dict[str, Any]
TOKENS = {"token-id": "ak-good", "token-secret": "as-good-and-secret"}
DEPLOYMENT = "trunkline-operator"
LABELS = {"app.kubernetes.io/component": "operator"}
FOREIGN = "example.com/keep"


def burst(secret: str = "modal", **more: Any) -> Json:
    modal = {"credentialsSecretRef": {"name": secret}, "gpu": [], **more}
    return {**SPEC, "burst": {"modal": modal}}


@dataclass(frozen=True, slots=True)
class Told:
    """How the command ended."""

    status: int
    text: str
    seconds: float

    def line(self, what: str) -> str:
        (found,) = [line for line in self.text.splitlines() if what in line]
        return found


async def release(world: World, *flags: str, everywhere: bool = False, **env: str) -> Told:
    """Runs the command; without Modal unless `env` says where it is."""
    nowhere = {"MODAL_SERVER_URL": f"http://127.0.0.1:{free_port()}"}
    env = {name: text for name, text in world.env.items() if name != ENV_OPERATOR_TOKEN} | (
        nowhere | env
    )
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "trunkline_operator", "release"),
        *([] if everywhere else [f"--namespace={world.namespace}"]),
        *flags,
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(90):
        output, _ = await process.communicate()
    assert process.returncode is not None
    text = output.decode()
    print(text)
    assert "secret" not in text.replace("Secret", "").replace("token-secret", "")
    return Told(process.returncode, text, time.monotonic() - began)


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


async def agent(
    world: World, name: str, spec: Json = SPEC, *, app: str = "", finalizers: Sequence[str] = ()
) -> str:
    """An agent as an operator that is no more has left it; its path."""
    where = f"{world.agents}/{name}"
    metadata = {"name": name, "finalizers": [FINALIZER, *finalizers]}
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "VoiceAgent", "metadata": metadata}
    await world.api.apply(where, body | {"spec": spec})
    if app:
        status = {"status": {"burst": {"app": app, "url": "https://gone.example", "calls": 0}}}
        await world.api.patch(f"{where}/status", status)
    return where


async def finalizers(world: World, where: str) -> list[str]:
    return list((await world.api.get(where))["metadata"].get("finalizers") or [])


async def deployment(world: World, *pods: str) -> str:
    """The operator's Deployment with its pods, which no controller touches here; its path."""
    where = f"/apis/apps/v1/namespaces/{world.namespace}/deployments/{DEPLOYMENT}"
    spec = {"containers": [{"name": "operator", "image": "i"}]}
    template = {"metadata": {"labels": LABELS}, "spec": spec}
    body = {"replicas": 2, "selector": {"matchLabels": LABELS}, "template": template}
    head = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": DEPLOYMENT}}
    await world.api.apply(where, head | {"spec": body})
    for pod in pods:
        metadata = {"name": pod, "labels": LABELS}
        await world.api.create(world.pods, {"metadata": metadata, "spec": spec})
    return where


# --- with a Modal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespaced", [True, False])
async def test_the_operator_ends_and_then_its_apps_with_the_rights_that_the_chart_gives(
    world: World, tmp_path: Path, namespaced: bool
) -> None:
    values = {"watchNamespaces": [world.namespace]} if namespaced else {}
    flags = "--deadline=60", f"--scale-down={world.namespace}/{DEPLOYMENT}"
    config = Config(clones=1, api_tokens={TOKENS["token-id"]: TOKENS["token-secret"]})
    async with LocalModal(config) as modal, world.charted(values, "uninstall.yaml"):
        env = {"MODAL_SERVER_URL": modal.server_url}
        operator = await world.start(env=env)
        await world.secret("modal", **TOKENS)
        await world.apply(burst())
        await world.condition("BurstReady", "BurstReady")
        (app,) = modal.state.apps.values()
        await agent(world, "plain", finalizers=[FOREIGN])
        await world.api.wait_for(world.pods, lambda pods: len(pods) == 2)
        where = await deployment(world, "operator-0", "operator-1")
        await world.api.patch(f"{world.pods}/operator-1/status", {"status": {"phase": "Failed"}})

        rights = {"KUBECONFIG": str(await world.kubeconfig_of("trunkline-release", tmp_path))}
        asked = asyncio.create_task(
            release(world, *flags, everywhere=not namespaced, **env, **rights)
        )
        await world.api.wait_for_one(where, lambda it: it["spec"]["replicas"] == 0)
        assert app.deployed  # it waits for the operator's end
        assert await operator.stop() == 0
        await world.api.delete(f"{world.pods}/operator-0", {"gracePeriodSeconds": 0})
        told = await asked
        assert told.status == 0
        assert told.text.splitlines()[0] == f"operator {world.namespace}/{DEPLOYMENT}: stopped"
        assert (
            told.line(world.key) == f"{world.key}: stopped {app.name} at Modal; finalizer removed"
        )
        assert told.line(f"{world.namespace}/plain").endswith(
            "/plain: it has nothing at Modal; finalizer removed"
        )
        # Without namespaces it releases what other tests have left, too.
        found = re.fullmatch(
            r"released (\d+) of \1 agents; they and their pods stay", told.line("released ")
        )
        assert found
        assert int(found[1]) == 2 if namespaced else int(found[1]) >= 2
        assert not app.deployed
        assert await finalizers(world, world.agent_path) == []
        assert await finalizers(world, f"{world.agents}/plain") == [FOREIGN]
        names = [pod["metadata"]["name"] for pod in await world.api.list(world.pods)]
        assert {f"{NAME}-0", "plain-0"} <= set(names)

        again = await release(world, *flags, everywhere=not namespaced, **env, **rights)
        assert again.status == 0
        assert again.line(world.key) == f"{world.key}: stopped {app.name} at Modal"

        # Trunkline is installed again: the status still tells of an app, which is no more.
        await world.start(env=env)
        await world.agent(lambda it: it["metadata"].get("finalizers") == [FINALIZER])
        await world.condition("BurstReady", "BurstReady")
        assert [it.name for it in modal.state.apps.values() if it.deployed] == [app.name]


async def test_credentials_that_modal_refuses_are_not_tried_again(world: World) -> None:
    config = Config(clones=0, api_tokens={"ak-good": "another-one"})
    async with LocalModal(config) as modal:
        await world.secret("modal", **TOKENS)
        where = await agent(world, NAME, burst(environment="staging"), app="trunkline-x")
        told = await release(world, "--deadline=60", MODAL_SERVER_URL=modal.server_url)
    assert told.status == 1
    assert told.seconds < 30
    line = told.line(world.key)
    assert line.startswith(
        f"LEFT: {world.key}: trunkline-x may still run at Modal: CredentialsRefused: "
    )
    assert line.endswith(": modal app stop trunkline-x --env staging")
    assert await finalizers(world, where) == [FINALIZER]


# --- without -------------------------------------------------------------------------------------------------


async def test_what_cannot_be_stopped_is_named_in_time(world: World) -> None:
    await world.secret("modal", **TOKENS)
    away = await agent(world, "away", burst(), app="trunkline-away")
    plain = await agent(world, "plain")
    told = await release(world, "--deadline=12", f"--scale-down={world.namespace}/{DEPLOYMENT}")
    assert told.status == 1
    assert 6 < told.seconds < 12
    assert "there is no such Deployment" in told.line(DEPLOYMENT)
    line = told.line("/away")
    assert "trunkline-away may still run at Modal: ModalUnreachable: " in line
    assert line.endswith(": modal app stop trunkline-away")
    assert told.text.splitlines()[-1] == (
        "released 1 of 2 agents; see above what is left, then run this again"
    )
    assert await finalizers(world, away) == [FINALIZER]
    assert await finalizers(world, plain) == []


async def test_credentials_that_are_gone(world: World) -> None:
    """Only for an app that is known of is it worth asking a person."""
    await world.secret("half", **{"token-id": "ak-good"})
    known = await agent(world, "known", burst(), app="trunkline-known")
    half = await agent(world, "half", burst("half"), app="trunkline-half")
    unsaid = await agent(world, "unsaid", SPEC, app="trunkline-unsaid")
    never = await agent(world, "never", burst())
    told = await release(world, "--deadline=30")
    assert told.status == 1
    assert told.seconds < 15
    missing = "Secret modal of burst.modal.credentialsSecretRef does not exist"
    assert f"trunkline-known may run at Modal: {missing}: create it; then run" in told.line(
        "/known"
    )
    assert "modal app stop trunkline-known" in told.line("/known")
    assert f"kubectl edit voiceagent known -n {world.namespace}" in told.line("/known")
    assert "lacks token-secret" in told.line("/half")
    assert "names no credentials any more: modal app stop trunkline-unsaid" in told.line("/unsaid")
    assert f"no app of it is known ({missing})" in told.line("/never")
    for where, left in ((known, 1), (half, 1), (unsaid, 1), (never, 0)):
        assert len(await finalizers(world, where)) == left


async def test_an_operator_that_does_not_end(world: World) -> None:
    await deployment(world, "operator-0")
    plain = await agent(world, "plain")
    told = await release(world, "--deadline=8", f"--scale-down={world.namespace}/{DEPLOYMENT}")
    assert told.status == 1
    assert told.seconds < 8
    line = told.line("LEFT")
    assert "operator-0 did not end in time" in line
    assert f"kubectl delete pod -n {world.namespace} operator-0" in line
    assert await finalizers(world, plain) == []


async def test_an_agent_that_is_being_deleted_goes(world: World) -> None:
    where = await agent(world, "plain")
    await world.api.delete(where)
    assert (await release(world)).status == 0
    await world.api.wait_gone(where)


async def test_nothing_there(world: World) -> None:
    told = await release(world)
    assert (told.status, told.text) == (0, "released 0 of 0 agents; they and their pods stay\n")


async def test_a_cluster_that_is_away(world: World, tmp_path: Path) -> None:
    file = tmp_path / "away"
    config = Path(world.env["KUBECONFIG"]).read_text()
    file.write_text(re.sub(r"https://127.0.0.1:\d+", f"https://127.0.0.1:{free_port()}", config))
    told = await release(
        world, f"--scale-down={world.namespace}/{DEPLOYMENT}", KUBECONFIG=str(file)
    )
    assert told.status == 1
    assert "cannot be scaled to 0: cannot reach the Kubernetes API at" in told.line(DEPLOYMENT)
    assert "LEFT: all agents: they cannot be listed: cannot reach" in told.line("all agents")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--deadline=0",), "--deadline must be a number of seconds above 0"),
        (("--deadline=nan",), "--deadline must be a number of seconds above 0"),
        (("--scale-down=operator",), "--scale-down: 'operator' is not namespace/name"),
    ],
)
async def test_flags_that_make_no_sense(
    world: World, flags: tuple[str, ...], sentence: str
) -> None:
    told = await release(world, *flags)
    assert (told.status, told.text) == (2, f"trunkline-operator: {sentence}\n")


# --- what an agent may have ----------------------------------------------------------------------------------


def described(spec: Json, **status: Any) -> Json:
    metadata = {"namespace": "sales", "name": "desk", "uid": "0123456789"}
    return {"metadata": metadata, "spec": spec, "status": status}


def test_an_agent_whose_spec_is_refused_is_claimed_all_the_same() -> None:
    engine = {"type": "loopback", "replies": [{"match": "(", "say": "hm"}]}
    it = claim(described({**burst(environment="e"), "engine": engine}))
    assert it.app == "trunkline-sales-desk-01234567"
    assert not it.deployed
    assert it.by_hand == "modal app stop trunkline-sales-desk-01234567 --env e"


def test_what_the_status_says_is_believed_first() -> None:
    it = claim(described(burst(), burst={"app": "trunkline-other", "calls": 0}))
    assert (it.app, it.deployed) == ("trunkline-other", True)


def test_an_agent_without_burst_claims_nothing() -> None:
    it = claim(described(SPEC))
    assert (it.app, it.burst, it.finalizer) == ("", None, False)


async def test_the_operators_own_copies_are_used_and_emptied(world: World) -> None:
    """An agent whose Secret is gone, and one that is gone itself."""
    here = await agent(world, "here", burst(), app="trunkline-here")
    uid = (await world.api.get(here))["metadata"]["uid"]
    copy = {"environment": "", **TOKENS}
    entries = {
        who: json.dumps({"agent": f"{world.namespace}/a", "app": app, **copy})
        for who, app in ((uid, "trunkline-here"), ("torn-out", "trunkline-lost"))
    }
    await world.secret("copies", **entries)
    config = Config(clones=0, api_tokens={TOKENS["token-id"]: TOKENS["token-secret"]})
    async with LocalModal(config) as local:
        flags = ("--deadline=60", f"--burst-secret={world.namespace}/copies")
        told = await release(world, *flags, MODAL_SERVER_URL=local.server_url)
    assert told.status == 0, told.text
    assert "stopped trunkline-here at Modal" in told.line("/here")
    assert await finalizers(world, here) == []
    assert not (await world.api.get(f"{world.secrets}/copies")).get("data")
