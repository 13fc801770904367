"""The operator as a process, against a real API server, with a gateway and a node that the test plays."""

import asyncio
import base64
import hashlib
import hmac
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import yaml
from fake_gateway import TOKEN, FakeGateway
from node_cast import bind
from operator_rig import NAME, SPEC, World, operated, stranger_of
from operator_ward import leaving
from ports import free_port
from websockets.asyncio.server import serve

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, condition, is_true
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config, Kind
from trunkline_dev.processes import base_environment
from trunkline_runtime.contract import (
    ANNOTATION_DRAINING,
    ENV_OPERATOR_TOKEN,
    GROUP,
    VERSION,
)


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


async def test_an_agent_becomes_pods_a_secret_a_route_and_a_status(world: World) -> None:
    operator = await world.start()
    await world.apply()
    (pod,) = await world.pod_count(1)
    agent = await world.agent(lambda it: bool(it.get("status")))
    assert "finalizers" not in agent["metadata"]
    assert pod["metadata"]["name"] == f"{NAME}-0"
    assert pod["metadata"]["ownerReferences"][0]["uid"] == agent["metadata"]["uid"]
    assert pod["spec"]["containers"][0]["image"] == "trunkline/worker:test"
    (secret,) = await world.api.list(world.secrets)
    assert secret["metadata"]["name"] == f"{NAME}-trunkline"
    assert set(secret["data"]) == {"worker-key", "ticket-key"}
    await world.gateway.until(lambda it: world.key in it.routes)
    assert world.gateway.routes[world.key]["rungs"] == [{"kind": "warm"}]
    await world.condition("WarmReady", "PodsStarting")
    await world.gateway.until(lambda it: it.runways and world.key in it.runways[-1])
    (starting,) = world.gateway.runways[-1][world.key]
    assert starting["slots"] == 4

    await world.make_ready(f"{NAME}-0")
    await world.serve_calls(0)
    agent = await world.agent(lambda it: is_true(it, "Ready"))
    await world.gateway.until(lambda it: world.key not in it.runways[-1])
    await world.serve_calls(1)
    agent = await world.agent(lambda it: it["status"]["slots"]["busy"] == 1)
    assert agent["status"]["slots"] == {"total": 4, "busy": 1, "free": 3}
    assert agent["status"]["pods"] == {"ready": 1, "starting": 0, "draining": 0}
    status = [each for each in agent["metadata"]["managedFields"] if each.get("subresource")]
    assert [each["manager"] for each in status] == ["trunkline-operator"]

    async with httpx.AsyncClient(trust_env=False) as client:
        metrics = (await client.get(f"{world.health}/metrics")).text
    series = (
        f'trunkline_operator_pods{{agent="{NAME}",namespace="{world.namespace}",state="ready"}} 1'
    )
    assert series in metrics.replace(" 1.0", " 1")
    assert "trunkline_operator_gateway_links 1.0" in metrics
    assert 'trunkline_operator_api_requests_total{resource="pods",status="201",verb="create"}' in (
        metrics
    )
    began = time.monotonic()
    assert await operator.stop() == 0
    assert time.monotonic() - began < 8  # 1 s on an idle machine


async def test_an_agent_takes_over_the_secret_of_the_one_that_had_its_name(world: World) -> None:
    """Kubernetes collects what belongs to an agent that is gone: a Secret with its pods' keys, a moment too late."""
    name, other = f"{NAME}-trunkline", "8d5c3dd6-4bd1-4a3e-9a2a-4c1d58d0c9a0"
    owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "VoiceAgent", "name": NAME, "uid": other}
    keys = {"worker-key": "of-before", "ticket-key": "of-before-too"}
    metadata = {"name": name, "ownerReferences": [owner]}
    await world.api.create(world.secrets, {"metadata": metadata, "stringData": keys})
    await world.start()
    await world.apply()
    await world.pod_count(1)
    agent = await world.agent(lambda it: bool(it.get("status")))
    kept = await world.api.get(f"{world.secrets}/{name}")
    (now,) = kept["metadata"]["ownerReferences"]
    assert now["uid"] == agent["metadata"]["uid"]
    assert kept["data"]["worker-key"] == base64.b64encode(b"of-before").decode()


async def test_keys_that_nobody_knows_any_more_take_no_new_call_and_end_none(world: World) -> None:
    """An agent and its own Secret were deleted while no operator was there."""
    world.kept = True
    await world.start()
    await world.one_ready_pod()
    await world.serve_calls(1)
    await world.gateway.until(lambda it: world.key in it.routes)
    world.processes.pop().kill()
    await world.api.delete(f"{world.secrets}/{NAME}-trunkline")
    await world.api.delete(world.agent_path)
    await world.start()
    await world.gateway.until(lambda it: it.routes == {})
    await world.condition("WarmReady", "Deleting")
    await world.pod_count(1)
    assert "lacks" not in (world.logs / "operator.log").read_text()


async def test_pods_follow_the_load_and_none_goes_with_a_call_on_it(world: World) -> None:
    await world.start()
    await world.one_ready_pod()
    await world.serve_calls(4)
    await world.pod_count(2)
    await world.make_ready(f"{NAME}-1")
    await world.serve_calls(4, 1)
    await world.agent(lambda it: it["status"]["readyReplicas"] == 2)

    await world.serve_calls(2, 1)
    victim = await world.api.wait_for_one(
        f"{world.pods}/{NAME}-1",
        lambda pod: ANNOTATION_DRAINING in (pod["metadata"].get("annotations") or {}),
    )
    await world.gateway.until(lambda it: it.routes[world.key]["draining"] == [f"{NAME}-1"])
    # Its worker has not heard of it yet: it says so, without a call, and must not lose its pod.
    await world.serve_calls(2, 0)
    await world.agent(lambda it: it["status"]["slots"]["busy"] == 2)
    await world.serve_calls(2, 1, draining=(1,))
    await world.agent(lambda it: it["status"]["slots"]["busy"] == 3)
    assert (await world.api.get(f"{world.pods}/{NAME}-1"))["metadata"]["uid"] == (
        victim["metadata"]["uid"]
    )
    await world.serve_calls(2, 0, draining=(1,))
    await world.pod_count(1)
    await world.serve_calls(2)
    await world.gateway.until(lambda it: it.routes[world.key]["draining"] == [])
    assert [step for step in world.steps() if "Pod" in step or "Drain" in step] == [
        f"CreatePod {NAME}-0",
        f"CreatePod {NAME}-1",
        f"Drain {NAME}-1",
        f"DeletePod {NAME}-1",
    ]
    told = [
        line for line in (world.logs / "operator.log").read_text().splitlines() if "wanted" in line
    ]
    assert any(
        "2 pods are wanted: 4 warm and 0 burst calls and 1 spare slots" in one for one in told
    )


async def test_a_crashed_operator_that_comes_back_changes_nothing(world: World) -> None:
    flag = f"--routes-secret={world.namespace}/routes"
    operator = await world.start(flag)
    await world.one_ready_pod()
    await world.serve_calls(2)
    await world.agent(lambda it: it["status"]["slots"]["busy"] == 2)
    kept = await world.api.wait_for_one(f"{world.secrets}/routes")

    async def versions() -> dict[str, str]:
        found = [
            *await world.api.list(world.pods),
            *await world.api.list(world.agents),
            await world.api.get(f"{world.secrets}/{NAME}-trunkline"),
        ]
        return {it["metadata"]["name"]: it["metadata"]["resourceVersion"] for it in found}

    before, routes, links = await versions(), world.gateway.routes, world.gateway.links
    operator.kill()
    await world.start(flag)
    await world.gateway.until(
        lambda it: it.links > links and it.told[-1]["epoch"] > it.told[0]["epoch"]
    )
    assert world.gateway.routes == routes
    # It has looked, and looked again after the gateway spoke.
    await world.serve_calls(3)
    await world.agent(lambda it: it["status"]["slots"]["busy"] == 3)
    after = await versions()
    del before[NAME], after[NAME]  # its status says 3 now
    assert before == after
    await world.api.wait_for_one(
        f"{world.secrets}/routes", lambda it: it["data"] != kept["data"]
    )  # the new epoch


async def test_a_deleted_agent_that_is_kept_is_drained_and_leaves_nothing(world: World) -> None:
    world.kept = True
    await world.start()
    await world.one_ready_pod()
    await world.serve_calls(1)
    await world.agent(lambda it: it["status"]["slots"]["busy"] == 1)
    await world.api.delete(world.agent_path)
    await world.gateway.until(lambda it: it.routes[world.key]["rungs"] == [])
    await world.gateway.until(lambda it: it.routes[world.key]["draining"] == [f"{NAME}-0"])
    await world.serve_calls(1, draining=(0,))
    await world.condition("Ready", "Deleting")
    assert len(await world.api.list(world.pods)) == 1
    await world.serve_calls(0, draining=(0,))
    await world.api.wait_gone(world.agent_path)
    assert await world.api.list(world.pods) == []
    await world.gateway.until(lambda it: it.routes == {})


async def test_a_deleted_agent_without_burst_goes_at_once_and_its_pods_after_their_calls(
    world: World,
) -> None:
    """An agent of the same name may be there before they have gone."""
    await world.start()
    await world.one_ready_pod()
    await bind(world, f"{NAME}-0", "a-node")
    await world.serve_calls(1)
    agent = await world.agent(lambda it: it["status"]["slots"]["busy"] == 1)
    session = agent["spec"]["session"]
    await world.api.delete(world.agent_path)
    assert await world.api.list(world.agents) == []
    await world.gateway.until(lambda it: it.routes == {})
    pod = await world.api.wait_for_one(f"{world.pods}/{NAME}-0", leaving)
    # A worker that is told to end has that long for its calls.
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert pod["metadata"]["deletionGracePeriodSeconds"] == grace > session["maxSeconds"]
    await world.apply()
    await world.api.wait_for_one(f"{world.pods}/{NAME}-1")
    assert leaving(await world.api.get(f"{world.pods}/{NAME}-0"))


async def test_pods_whose_agent_went_while_no_operator_was_there_go_too(world: World) -> None:
    await world.start()
    await world.one_ready_pod()
    await bind(world, f"{NAME}-0", "a-node")
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "other", "uid": "another"}
    stranger = stranger_of(NAME, ownerReferences=[{**owner, "controller": True}])
    await world.api.create(world.pods, stranger)
    world.processes.pop().kill()
    await world.api.delete(world.agent_path)
    await world.start()
    await world.api.wait_for_one(f"{world.pods}/{NAME}-0", leaving)
    assert not leaving(await world.api.get(f"{world.pods}/{NAME}-stranger"))
    assert not [line for line in world.log if line["level"] in ("WARNING", "ERROR")]


async def test_an_agent_whose_finalizer_was_torn_off_leaves_the_routes(world: World) -> None:
    world.kept = True
    await world.start()
    await world.one_ready_pod()
    await bind(world, f"{NAME}-0", "a-node")
    await world.serve_calls(1)
    await world.api.delete(world.agent_path)
    await world.api.patch(world.agent_path, {"metadata": {"finalizers": None}})
    await world.gateway.until(lambda it: it.routes == {})
    await world.api.wait_for_one(f"{world.pods}/{NAME}-0", leaving)


async def test_missing_secrets_are_told_and_used_once_they_are_there(world: World) -> None:
    keyed = {**SPEC, "access": {"apiKeysSecretRef": {"name": "callers"}}}
    await world.start()
    await world.apply(keyed)
    told = await world.condition("Accepted", "KeysMissing")
    assert "Secret callers of access.apiKeysSecretRef does not exist: create it" in told["message"]
    await world.gateway.until(lambda it: world.key in it.routes)
    access = world.gateway.routes[world.key]["access"]
    assert (access["public"], access["apiKeys"]) == (False, {})
    await world.secret("callers", alice="sk-alice")
    await world.condition("Accepted", "Accepted", timeout=20)
    await world.gateway.until(
        lambda it: list(it.routes[world.key]["access"]["apiKeys"]) == ["alice"]
    )
    modal = {"credentialsSecretRef": {"name": "modal"}, "gpu": []}
    await world.apply({**keyed, "burst": {"modal": modal}})
    told = await world.condition("BurstReady", "CredentialsMissing")
    assert "Secret modal of burst.modal.credentialsSecretRef does not exist" in told["message"]
    await world.secret("modal", **{"token-id": "ak-x"})
    await world.agent(lambda it: "lacks token-secret" in condition(it, "BurstReady")["message"])
    assert "sk-alice" not in (world.logs / "operator.log").read_text()


async def test_twilios_token_becomes_digests_in_the_route_and_stays_with_the_operator(
    world: World,
) -> None:
    url = "wss://calls.example/desk"
    signed = {"authTokenSecretRef": {"name": "twilio"}, "publicUrl": url}
    await world.start()
    await world.apply({**SPEC, "access": {"twilio": signed}})
    told = await world.condition("Accepted", "KeysMissing")
    assert "Secret twilio of access.twilio.authTokenSecretRef does not exist" in told["message"]
    await world.secret("twilio", main="auth-token-of-main")
    await world.condition("Accepted", "Accepted", timeout=20)
    await world.gateway.until(lambda it: bool(it.routes[world.key]["access"].get("twilio")))
    (digest, _) = world.gateway.routes[world.key]["access"]["twilio"]["main"]
    signature = base64.b64encode(hmac.digest(b"auth-token-of-main", url.encode(), "sha1"))
    assert digest == hashlib.sha256(signature).hexdigest()
    assert "auth-token-of-main" not in str(world.gateway.routes)
    assert "auth-token-of-main" not in (world.logs / "operator.log").read_text()


async def test_missing_tokens_of_an_engine_are_told_and_used_once_they_are_there(
    world: World,
) -> None:
    hook = {"url": "https://policy.example/v1", "tokenSecretRef": {"name": "hook"}}
    engine = {"type": "moshi", "model": "tiny", "policy": {"hook": hook}}
    engine |= {"tokenSecretRef": {"name": "hub"}}
    await world.start()
    await world.apply({**SPEC, "engine": engine})
    told = await world.condition("Accepted", "TokenMissing")
    for name in ("hub of engine.tokenSecretRef", "hook of engine.policy.hook.tokenSecretRef"):
        assert f"Secret {name} does not exist: create it" in told["message"]
    assert (await world.condition("Ready", "TokenMissing"))["message"] == told["message"]
    await world.secret("hub", token="hf_of_this_test")
    await world.secret("hook", token="two words")
    await world.agent(lambda it: "is no bearer token" in condition(it, "Accepted")["message"])

    def bearer(it: FakeGateway) -> str:
        return str(it.routes[world.key]["settings"]["policy"]["hook"]["token"])

    assert bearer(world.gateway) == ""
    await world.secret("hook", token="hook-of-this-test")
    await world.condition("Accepted", "Accepted", timeout=20)
    await world.gateway.until(lambda it: bearer(it) == "hook-of-this-test")
    log = (world.logs / "operator.log").read_text()
    assert not [word for word in ("hf_of", "two words", "hook-of") if word in log]


async def test_an_app_at_modal_is_deployed_warmed_up_kept_and_stopped(world: World) -> None:
    tokens = {"token-id": "ak-good", "token-secret": "as-good-and-secret"}
    config = Config(clones=1, api_tokens={tokens["token-id"]: tokens["token-secret"]})
    async with LocalModal(config) as modal:
        env = {"MODAL_SERVER_URL": modal.server_url}
        operator = await world.start(env=env)
        await world.secret(
            "modal", **tokens, **{"proxy-token-id": "wk-1", "proxy-token-secret": "ws-1"}
        )
        await world.apply(
            {**SPEC, "burst": {"modal": {"credentialsSecretRef": {"name": "modal"}, "gpu": []}}}
        )
        await world.condition("BurstReady", "BurstReady")
        assert [boot.kind for boot in modal.boots] == [Kind.COLD]  # the snapshot is there
        await world.gateway.until(lambda it: len(it.routes[world.key]["rungs"]) == 2)
        warm, burst = world.gateway.routes[world.key]["rungs"]
        assert burst["kind"] == "burst"
        assert (burst["name"], burst["proxyToken"]) == ("us-east", "wk-1.ws-1")
        own = await world.api.get(f"{world.secrets}/{NAME}-trunkline")
        assert base64.b64decode(own["data"]["ticket-key"]).decode() == burst["ticketKey"]
        status = (await world.api.get(world.agent_path))["status"]["burst"]
        assert status["url"] == burst["url"]
        (app,) = modal.state.apps.values()
        assert status["appId"] == app.app_id

        operator.kill()
        links = world.gateway.links
        await world.start(env=env)
        await world.gateway.until(lambda it: it.links > links and it.told[-1] != it.told[0])
        assert world.gateway.routes[world.key]["rungs"] == [warm, burst]
        assert app.version == 1

        # Its Secret goes first, as in a namespace that is deleted.
        await world.api.delete(f"{world.secrets}/modal")
        await world.api.delete(world.agent_path)
        await world.gateway.until(lambda it: it.routes[world.key]["rungs"] == [])
        await world.api.wait_gone(world.agent_path)
        assert not app.deployed
    log = (world.logs / "operator.log").read_text()
    assert not [
        secret for secret in (tokens["token-secret"], "ws-1", burst["ticketKey"]) if secret in log
    ]


@pytest.mark.timeout(240)
async def test_workers_and_gateways_that_do_not_reach_each_other_are_told_of(world: World) -> None:
    """Kubernetes sees nothing wrong in either case."""
    await world.start()
    await world.apply()
    await world.pod_count(1)
    await world.make_ready(f"{NAME}-0")
    told = await world.condition("WarmReady", "PodUnlinked", timeout=90)
    assert told["message"].startswith(f"0 of 1 pods take calls; {NAME}-0: it runs, and no gateway")
    assert condition(await world.agent(lambda _: True), "Ready")["status"] == "False"
    await world.serve_calls(0)
    await world.condition("WarmReady", "PodsReady")
    await world.condition("Ready", "Answering")

    token, world.gateway.token = world.gateway.token, "another"
    await world.gateway.cut()
    assert (await world.condition("Ready", "GatewaysSilent", timeout=90))["status"] == "Unknown"
    world.gateway.token = token
    await world.condition("Ready", "Answering")


async def test_a_wrong_edit_is_told_and_touches_nothing(world: World) -> None:
    await world.start()
    await world.one_ready_pod()
    await world.gateway.until(lambda it: world.key in it.routes)
    route = world.gateway.routes[world.key]
    replies = [{"match": "(", "say": "hm"}]
    await world.apply({**SPEC, "engine": {"type": "loopback", "replies": replies}})
    told = await world.condition("Accepted", "SpecInvalid")
    assert "engine.replies[0].match is not a regular expression" in told["message"]
    await world.pod_count(1)
    assert world.gateway.routes[world.key] == route


async def test_live_numbers_are_written_seldom_and_conditions_at_once(world: World) -> None:
    await world.start("--status-seconds=3600")
    await world.apply()
    await world.pod_count(1)
    await world.make_ready(f"{NAME}-0")
    await world.serve_calls(0)
    agent = await world.agent(lambda it: is_true(it, "Ready") and it["status"]["slots"]["total"])
    told = agent["metadata"]["resourceVersion"]
    writes = 'trunkline_operator_api_requests_total{resource="voiceagents/status"'
    before = await counted(world, writes)
    for calls in (1, 2, 3):
        looks = await counted(world, LOOKS)
        await world.serve_calls(calls)
        async with asyncio.timeout(20):
            while await counted(world, LOOKS) == looks:
                await asyncio.sleep(0.02)
    assert await counted(world, writes) == before
    # Four calls want a second pod, and a pod is no live number.
    await world.serve_calls(4)
    agent = await world.agent(lambda it: it["status"]["pods"]["starting"] == 1)
    assert agent["status"]["slots"]["busy"] == 4
    assert told != agent["metadata"]["resourceVersion"]


LOOKS = 'trunkline_operator_reconcile_seconds_count{outcome="done"'


async def counted(world: World, series: str) -> float:
    """The sum of all metrics that begin so."""
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"{world.health}/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series))


@pytest.mark.parametrize("namespaced", [False, True])
async def test_the_rights_that_the_chart_gives_are_enough(
    world: World, tmp_path: Path, namespaced: bool
) -> None:
    values = {"watchNamespaces": [world.namespace]} if namespaced else {}
    world.kept = True
    async with world.charted(values, "rbac.yaml", "operator.yaml"):
        file = await world.kubeconfig_of("trunkline-operator", tmp_path)
        flags = (
            f"--routes-secret={world.namespace}/trunkline-routes",
            f"--burst-secret={world.namespace}/trunkline-burst",
            f"--lease={world.namespace}/trunkline-operator",
        )
        operator = await world.start(
            *flags, everywhere=not namespaced, env={"KUBECONFIG": str(file), "POD_ID": "mine"}
        )
        lease = (
            f"/apis/coordination.k8s.io/v1/namespaces/{world.namespace}/leases/trunkline-operator"
        )
        first = await world.api.wait_for_one(lease)
        assert first["spec"]["holderIdentity"].startswith("mine_")
        await world.one_ready_pod()
        await world.api.wait_for_one(f"{world.secrets}/trunkline-routes")
        await world.api.delete(world.agent_path)
        await world.gateway.until(lambda it: it.routes[world.key]["draining"] == [f"{NAME}-0"])
        await world.serve_calls(0, draining=(0,))
        await world.api.wait_gone(world.agent_path)
        renewed = first["spec"]["renewTime"]
        await world.api.wait_for_one(lease, lambda it: it["spec"]["renewTime"] > renewed)
        assert await operator.stop() == 0
        assert (await world.api.get(lease))["spec"]["holderIdentity"] == ""
        assert [line for line in world.log if line["level"] in ("WARNING", "ERROR")] == []


# --- started wrongly -----------------------------------------------------------------------------------------


async def started_wrongly(*flags: str, **env: str) -> str:
    """The one sentence with which an operator ends that was started wrongly."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "trunkline_operator"),
        *("--gateways=127.0.0.1:9", "--worker-image=i", "--host=127.0.0.1", *flags),
        env=base_environment() | {ENV_OPERATOR_TOKEN: TOKEN} | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode == 2, errors.decode()
    (line,) = errors.decode().splitlines()
    return line


async def test_an_operator_without_a_token() -> None:
    assert "TRUNKLINE_OPERATOR_TOKEN is not set" in await started_wrongly(
        **{ENV_OPERATOR_TOKEN: ""}
    )


async def test_an_operator_with_flags_that_make_no_sense() -> None:
    assert "--gateways: 'host:http' is not host:port" in await started_wrongly(
        "--gateways=host:http"
    )
    assert "--routes-secret: 'routes' is not namespace/name" in await started_wrongly(
        "--routes-secret=routes"
    )
    assert "--lease: 'a/b/c' is not namespace/name" in await started_wrongly("--lease=a/b/c")
    assert "--region: 'EU' is not a region's name" in await started_wrongly("--region=EU")


async def test_an_operator_without_a_cluster(tmp_path: Path) -> None:
    told = await started_wrongly(HOME=str(tmp_path))
    assert "set KUBECONFIG, or start one with `trunkline dev`" in told


async def test_an_operator_whose_cluster_is_away(tmp_path: Path) -> None:
    told = await started_wrongly(KUBECONFIG=str(kubeconfig(tmp_path, free_port())))
    assert "cannot reach the Kubernetes API at http://127.0.0.1:" in told


async def test_an_operator_whose_cluster_knows_no_agents(tmp_path: Path) -> None:
    """As the API server does where there is no such group: 404."""
    async with serve(
        lambda _: asyncio.sleep(0),
        "127.0.0.1",
        0,
        process_request=lambda connection, _: connection.respond(404, "404 page not found\n"),
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        told = await started_wrongly(KUBECONFIG=str(kubeconfig(tmp_path, port)))
    assert "kubectl apply -f crds/voiceagents.yaml" in told


async def test_an_operator_whose_lease_cannot_be(world: World) -> None:
    told = await started_wrongly(
        "--lease=nowhere/operator", "--health-port=0", KUBECONFIG=world.env["KUBECONFIG"]
    )
    assert "the Lease nowhere/operator of --lease cannot be used" in told
    assert 'namespaces "nowhere" not found' in told


async def test_an_operator_whose_port_is_taken(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = await started_wrongly(f"--health-port={port}", KUBECONFIG=world.env["KUBECONFIG"])
    assert f"cannot listen on 127.0.0.1:{port} for health checks" in told
    assert "--health-port" in told


def kubeconfig(folder: Path, port: int) -> Path:
    file = folder / "kubeconfig"
    entry = {"name": "c"}
    config = {
        "current-context": "c",
        "clusters": [{**entry, "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{**entry, "user": {}}],
        "contexts": [{**entry, "context": {"cluster": "c", "user": "c"}}],
    }
    file.write_text(yaml.safe_dump(config))
    return file
