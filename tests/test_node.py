"""The development node against a real API server: pods' lives, from their placement to their last process."""

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, Json, condition, is_true
from trunkline_dev.node import Node, NodeConfig, NodeConfigError, running
from trunkline_dev.node.logs import CHUNK_BYTES, tail_offset
from trunkline_dev.node.placement import obstacles
from trunkline_dev.node.resources import quantity, shortfall

IMAGE = "example.com/server:1"

# Answers 200 unless a file named as the path's last part is in its folder, or else its text as status.
SERVER = """
import http.server, json, os, pathlib, signal, subprocess, sys, time

folder, stubborn = pathlib.Path(sys.argv[1]), "STUBBORN" in os.environ

def told(*_):
    print("told to end", flush=True)
    if not stubborn:
        sys.exit(0)

signal.signal(signal.SIGTERM, told)
child = subprocess.Popen(["sleep", "1000"])
print(json.dumps({"pid": os.getpid(), "child": child.pid, "env": dict(os.environ)}), flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/crash":
            os._exit(3)
        file = folder / (os.environ["HOSTNAME"] + self.path.replace("/", "-"))
        self.send_response(int(file.read_text()) if file.exists() else 200)
        self.end_headers()
    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer((os.environ["POD_IP"], 8000), Handler).serve_forever()
"""
POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
READINESS = {"httpGet": {"path": "/readyz", "port": "http"}, "failureThreshold": 1}


class World:
    """A node of its own for one namespace, and what a test asks about its pods."""

    def __init__(self, api: Api, namespace: str, folder: Path, addresses: str) -> None:
        self.api, self.namespace, self.folder = api, namespace, folder
        self.pods = f"/api/v1/namespaces/{namespace}/pods"
        (folder / "server.py").write_text(SERVER)
        self.config = NodeConfig(
            name=namespace,
            namespace=namespace,
            logs=folder / "logs",
            addresses=addresses,
            capacity={"cpu": "8", "memory": "8Gi", "pods": "20", "nvidia.com/gpu": "2"},
            images={IMAGE: (sys.executable, str(folder / "server.py"), str(folder))},
        )
        self.node: Node

    async def create(
        self,
        name: str,
        spec: Json | None = None,
        *,
        env: list[Json] | None = None,
        **container: Any,
    ) -> str:
        """Creates a pod that serves on port 8000, and returns its path."""
        main = {
            "name": "main",
            "image": IMAGE,
            "env": [POD_IP, *(env or [])],
            "ports": [{"name": "http", "containerPort": 8000}],
            "readinessProbe": READINESS,
            **container,
        }
        body = {"metadata": {"name": name}, "spec": {"containers": [main], **(spec or {})}}
        await self.api.create(self.pods, body)
        return f"{self.pods}/{name}"

    async def ready(self, path: str) -> Json:
        return await self.api.wait_for_one(path, lambda pod: is_true(pod, "Ready"))

    async def waits(self, path: str, reason: str) -> str:
        """Waits until the container waits for that reason, and returns the message."""

        def holds(pod: Json) -> bool:
            return waiting(pod).get("reason") == reason

        return str(waiting(await self.api.wait_for_one(path, holds)).get("message"))

    async def restarted(self, path: str, times: int) -> Json:
        def holds(pod: Json) -> bool:
            return is_true(pod, "Ready") and status_of_main(pod)["restartCount"] == times

        return await self.api.wait_for_one(path, holds)

    def log(self, name: str) -> list[str]:
        return (self.folder / "logs" / f"{self.namespace}_{name}_main.log").read_text().splitlines()

    def told(self, name: str) -> Json:
        """What the container of a pod said of itself when it started last."""
        said: Json = json.loads([line for line in self.log(name) if line.startswith("{")][-1])
        return said

    def answer(self, name: str, path: str, status: int) -> None:
        (self.folder / f"{name}-{path}").write_text(str(status))


def status_of_main(pod: Json) -> Json:
    statuses: list[Json] = pod.get("status", {}).get("containerStatuses") or [
        {"state": {}, "restartCount": 0}
    ]
    return statuses[0]


def waiting(pod: Json) -> Json:
    found: Json = status_of_main(pod)["state"].get("waiting", {})
    return found


async def ended(*pids: int) -> None:
    """Waits until the processes have ended, by whosever hand they are to be reaped."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(handle):
            readable, _, _ = await asyncio.to_thread(select.select, [handle], [], [], 20)
        assert readable, f"process {pid} still runs"


async def crash(pod: Json) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection(pod["status"]["podIP"], 8000)
        writer.write(b"GET /crash HTTP/1.0\r\n\r\n")
        await reader.read()
        writer.close()
        await writer.wait_closed()


@pytest.fixture
async def world(api: Api, namespace: str, tmp_path: Path, addresses: str) -> AsyncIterator[World]:
    made = World(api, namespace, tmp_path, addresses)
    async with running(api, made.config) as made.node:
        yield made


async def test_pods_that_fit_run_and_the_others_wait_for_room(world: World) -> None:
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    first, second, third = [await world.create(name, resources=gpu) for name in ("a", "b", "c")]
    running_pods = [await world.ready(first), await world.ready(second)]
    addresses = {pod["status"]["podIP"] for pod in running_pods}
    network = ipaddress.ip_network(world.config.addresses)
    assert len(addresses) == 2
    assert all(ipaddress.ip_address(address) in network for address in addresses)
    pending = await world.api.wait_for_one(third, lambda pod: bool(condition(pod, "PodScheduled")))
    told = condition(pending, "PodScheduled")
    assert (told["status"], told["reason"]) == ("False", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in told["message"]
    await world.api.wait_for(
        f"/api/v1/namespaces/{world.namespace}/events",
        lambda events: any(event["reason"] == "FailedScheduling" for event in events),
    )
    await world.api.delete(first)
    assert condition(await world.ready(third), "PodScheduled").get("reason") is None


async def test_a_cordoned_node_takes_no_pod_until_it_is_uncordoned(world: World) -> None:
    node = f"/api/v1/nodes/{world.namespace}"
    running_pod = await world.create("old")
    await world.ready(running_pod)
    await world.api.patch(node, {"spec": {"unschedulable": True}})
    path = await world.create("late")
    pending = await world.api.wait_for_one(path, lambda pod: bool(condition(pod, "PodScheduled")))
    assert "unschedulable" in condition(pending, "PodScheduled")["message"]
    assert is_true(await world.api.get(running_pod), "Ready")
    await world.api.patch(node, {"spec": {"unschedulable": None}})
    await world.ready(path)


async def test_the_environment_comes_from_the_pod_and_from_secrets_and_config_maps(
    world: World,
) -> None:
    home = f"/api/v1/namespaces/{world.namespace}"
    text = base64.b64encode(b"grey owl").decode()
    await world.api.create(f"{home}/secrets", {"metadata": {"name": "s"}, "data": {"KEY": text}})
    await world.api.create(
        f"{home}/configmaps", {"metadata": {"name": "c"}, "data": {"size": "XL", "form": "round"}}
    )
    env: list[Json] = [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "KEY"}}},
        {"name": "SIZE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "size"}}},
        {
            "name": "NOTHING",
            "valueFrom": {"secretKeyRef": {"name": "none", "key": "KEY", "optional": True}},
        },
        {"name": "ALL", "value": "$(NAME) at $(POD_IP):8000, $$(NAME), $(unknown), $(C_form)"},
    ]
    sources = [
        {"prefix": "C_", "configMapRef": {"name": "c"}},
        {"secretRef": {"name": "absent", "optional": True}},
    ]
    pod = await world.ready(await world.create("one", env=env, envFrom=sources))
    told = world.told("one")["env"]
    assert (told["NAME"], told["NODE"], told["HOSTNAME"]) == ("one", world.namespace, "one")
    assert (told["SECRET"], told["SIZE"], told["C_size"]) == ("grey owl", "XL", "XL")
    assert "NOTHING" not in told
    assert told["ALL"] == f"one at {pod['status']['podIP']}:8000, $(NAME), $(unknown), round"


async def test_a_pod_waits_for_a_secret_that_is_not_there_yet(world: World) -> None:
    env = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "late", "key": "k"}}}]
    path = await world.create("one", env=env)
    assert "no secrets late" in await world.waits(path, "CreateContainerConfigError")
    body = {"metadata": {"name": "late"}, "stringData": {"k": "v"}}
    await world.api.create(f"/api/v1/namespaces/{world.namespace}/secrets", body)
    assert status_of_main(await world.ready(path))["restartCount"] == 0


async def test_what_processes_cannot_do_is_said_and_not_ignored(world: World) -> None:
    spec = {
        "initContainers": [{"name": "first", "image": IMAGE}],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    }
    lifecycle = {"preStop": {"exec": {"command": ["true"]}}}
    liveness = {"tcpSocket": {"port": 8000}}
    path = await world.create("one", spec, lifecycle=lifecycle, livenessProbe=liveness)
    message = await world.waits(path, "CreateContainerConfigError")
    for field in (
        "spec.initContainers",
        "volumes[scratch]",
        "lifecycle",
        "livenessProbe.tcpSocket",
    ):
        assert field in message
    unknown = await world.create("two", image="example.com/other:1")
    assert "no command for image" in await world.waits(unknown, "CreateContainerConfigError")
    missing = await world.create("three", command=["no-such-program"])
    assert "no program no-such-program" in await world.waits(missing, "CreateContainerConfigError")
    elsewhere = await world.create("four", {"nodeSelector": {"disk": "ssd"}})
    pod = await world.api.wait_for_one(elsewhere, lambda pod: bool(condition(pod, "PodScheduled")))
    assert "node affinity/selector" in condition(pod, "PodScheduled")["message"]
    await world.api.delete(path)
    await world.api.wait_gone(path)
    assert not list((world.folder / "logs").iterdir())


async def test_an_empty_folder_may_be_mounted_as_tmp_and_nowhere_else(world: World) -> None:
    spec = {"volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}]}
    mounts = [{"name": "scratch", "mountPath": "/tmp"}]
    await world.ready(await world.create("one", spec, volumeMounts=mounts))
    mounts = [*mounts, {"name": "scratch", "mountPath": "/data"}]
    path = await world.create("two", spec, volumeMounts=mounts)
    message = await world.waits(path, "CreateContainerConfigError")
    assert "spec.volumes[scratch]" in message
    assert "volumeMounts[scratch]" in message


async def test_readiness_follows_the_probe(world: World) -> None:
    probe = {**READINESS, "periodSeconds": 1}
    path = await world.create("one", readinessProbe=probe)
    await world.ready(path)
    world.answer("one", "readyz", 503)
    unready = await world.api.wait_for_one(path, lambda pod: not is_true(pod, "Ready"))
    assert condition(unready, "Ready")["reason"] == "ContainersNotReady"
    assert unready["status"]["phase"] == "Running"
    world.answer("one", "readyz", 200)
    assert status_of_main(await world.ready(path))["restartCount"] == 0


async def test_a_container_that_is_not_alive_or_never_starts_is_started_again(world: World) -> None:
    alive = {"httpGet": {"path": "/livez", "port": 8000}, "periodSeconds": 1, "failureThreshold": 3}
    sick = await world.create("sick", livenessProbe=alive)
    await world.ready(sick)
    world.answer("sick", "livez", 500)
    await world.api.wait_for_one(sick, lambda pod: status_of_main(pod)["restartCount"] >= 1)
    world.answer("sick", "livez", 200)
    assert "terminated" in status_of_main(await world.ready(sick))["lastState"]

    started = {**alive, "httpGet": {"path": "/startup", "port": 8000}}
    world.answer("slow", "startup", 500)
    slow = await world.create("slow", startupProbe=started)
    await world.api.wait_for_one(slow, lambda pod: status_of_main(pod)["restartCount"] >= 1)
    assert not is_true(await world.api.get(slow), "Ready")
    world.answer("slow", "startup", 200)
    await world.ready(slow)


async def test_a_crashed_container_is_restarted_at_once_and_then_with_a_back_off(
    world: World,
) -> None:
    path = await world.create("one")
    await crash(await world.ready(path))
    pod = await world.restarted(path, 1)
    assert status_of_main(pod)["lastState"]["terminated"]["exitCode"] == 3
    await crash(pod)
    assert "back-off 1s" in await world.waits(path, "CrashLoopBackOff")
    await world.restarted(path, 2)
    assert len([line for line in world.log("one") if line.startswith("{")]) == 3


async def test_pods_that_run_to_an_end_say_how_it_was(world: World) -> None:
    spec = {"restartPolicy": "Never"}
    good = await world.create("good", spec, command=["true"], readinessProbe=None)
    bad = await world.create("bad", spec, command=["sh", "-c", "exit 7"], readinessProbe=None)
    await world.api.wait_for_one(good, lambda pod: pod["status"]["phase"] == "Succeeded")
    failed = await world.api.wait_for_one(bad, lambda pod: pod["status"]["phase"] == "Failed")
    assert status_of_main(failed)["state"]["terminated"]["exitCode"] == 7


async def test_a_deleted_pod_gets_its_grace_and_then_nothing_is_left_of_it(world: World) -> None:
    stubborn = [{"name": "STUBBORN", "value": "1"}]
    polite = await world.create("polite")
    slow = await world.create("slow", {"terminationGracePeriodSeconds": 600}, env=stubborn)
    address = (await world.ready(polite))["status"]["podIP"]
    await world.ready(slow)
    pids = [world.told(name)[who] for name in ("polite", "slow") for who in ("pid", "child")]
    await world.api.delete(polite)
    await world.api.delete(slow)
    await world.api.wait_gone(polite)
    assert world.log("polite")[-1] == "told to end"
    left = await world.api.get(slow)
    assert left["metadata"]["deletionGracePeriodSeconds"] == 600
    await world.api.delete(slow, {"gracePeriodSeconds": 1})
    await world.api.wait_gone(slow)
    assert world.log("slow")[-1] == "told to end"
    await ended(*pids)
    again = await world.ready(await world.create("polite"))
    assert again["status"]["podIP"] == address


async def test_a_pod_deleted_by_force_is_killed(world: World) -> None:
    path = await world.create("one", env=[{"name": "STUBBORN", "value": "1"}])
    await world.ready(path)
    told = world.told("one")
    await world.api.delete(path, {"gracePeriodSeconds": 0})
    await ended(told["pid"], told["child"])


async def test_logs_are_read_and_followed_through_the_api_server(world: World) -> None:
    path = await world.create("one")
    await world.ready(path)
    session = world.api.session
    async with session.get(f"{path}/log") as response:
        assert (await response.text()).splitlines() == world.log("one")
    async with session.get(f"{path}/log", params={"timestamps": "true"}) as response:
        assert (response.status, "no timestamps" in await response.text()) == (400, True)
    async with session.get(f"{path}/log", params={"follow": "true", "tailLines": "0"}) as response:
        await world.api.delete(path)
        assert await response.text() == "told to end\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_containers_end_with_the_process_of_the_node(
    control_plane: ControlPlane,
    api: Api,
    namespace: str,
    tmp_path: Path,
    addresses: str,
    number: signal.Signals,
) -> None:
    world = World(api, namespace, tmp_path, addresses)
    command = " ".join(world.config.images[IMAGE])
    node = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "trunkline_dev.node",
            "--name",
            namespace,
            "--namespace",
            namespace,
        ),
        *("--kubeconfig", str(control_plane.kubeconfig), "--addresses", addresses),
        *("--logs", str(tmp_path / "logs"), "--image", f"{IMAGE}={command}"),
    )
    try:
        await world.ready(await world.create("one"))
        told = world.told("one")
        node.send_signal(number)
        code = await node.wait()
    finally:
        if node.returncode is None:
            node.kill()
            await node.wait()
    await ended(told["pid"])
    if number == signal.SIGTERM:
        assert code == 0
        await ended(told["child"])
        ready = condition(await api.get(f"/api/v1/nodes/{namespace}"), "Ready")
        assert (ready["status"], ready["reason"]) == ("False", "NodeStopped")
    else:  # Killed, it cannot look after the processes that its containers made.
        os.kill(told["child"], signal.SIGKILL)


async def test_containers_start_when_the_image_would_be_there(
    api: Api, namespace: str, tmp_path: Path, addresses: str
) -> None:
    world = World(api, namespace, tmp_path, addresses)
    async with running(api, replace(world.config, pull_seconds=1.0)):
        path = await world.create("slow")
        began = time.monotonic()
        await world.waits(path, "ContainerCreating")
        await world.ready(path)
        assert time.monotonic() - began > 0.9
    async with running(api, replace(world.config, pull_seconds=1000.0)):
        path = await world.create("never")
        await world.waits(path, "ContainerCreating")
        await api.delete(path)  # It need not wait for its image.
        await api.wait_gone(path)
    with pytest.raises(NodeConfigError, match="pull_seconds -1 is negative"):
        replace(world.config, pull_seconds=-1.0)


async def test_a_node_that_comes_back_runs_its_pods_again(
    api: Api, namespace: str, tmp_path: Path, addresses: str
) -> None:
    world = World(api, namespace, tmp_path, addresses)
    async with running(api, world.config):
        other, path = await world.create("other"), await world.create("one")
        await world.ready(other)
        before = await world.ready(path)
        await api.delete(other)
        await api.wait_gone(other)
    await ended(world.told("one")["pid"])
    async with running(api, world.config):
        after = await world.restarted(path, 1)
    assert after["status"]["podIP"] == before["status"]["podIP"]
    starts = len(world.log("one"))
    await api.delete(path)  # With nobody there to end it.
    async with running(api, world.config):
        await api.wait_gone(path)
    assert len(world.log("one")) == starts


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--capacity", "cpu=lots"], "no quantity"),
        (["--capacity", "cpu"], "--capacity 'cpu': write NAME=VALUE"),
        (["--addresses", "10.0.0.0/24"], "not within 127.0.0.0/8"),
        (["--addresses", "127.77.3.0/29"], "too few for a capacity of 110 pods"),
        (["--image", "example.com/server:1"], "write NAME=VALUE"),
        (["--kubeconfig", "/nowhere"], "cannot read the kubeconfig /nowhere"),
    ],
)
def test_bad_flags_are_answered_with_a_sentence(flags: list[str], sentence: str) -> None:
    command = [
        sys.executable,
        "-m",
        "trunkline_dev.node",
        "--logs",
        "/tmp",
        "--kubeconfig",
        "/dev/null",
    ]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


NUMBERS = st.decimals(0, 10**6, places=3).map(str) | st.integers(0, 10**9).map(str)


@given(
    st.builds(
        "{}{}".format,
        NUMBERS,
        st.sampled_from(
            ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
        ),
    )
)
def test_quantities_mean_what_they_mean_to_the_official_client(text: str) -> None:
    assert quantity(text) == parse_quantity(text)


@pytest.mark.parametrize("text", ["", "Gi", "1 Gi", "-", "1KB", "1K", "0x10", "1.2.3"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        quantity(text)


AMOUNTS = st.dictionaries(st.sampled_from(["cpu", "gpu", "pods"]), st.integers(0, 4).map(Decimal))


@given(AMOUNTS, st.lists(AMOUNTS, max_size=4), AMOUNTS)
def test_a_pod_fits_exactly_if_no_resource_is_overdrawn_by_it(
    capacity: dict[str, Decimal], placed: list[dict[str, Decimal]], wanted: dict[str, Decimal]
) -> None:
    overdrawn = {
        resource
        for resource, amount in wanted.items()
        if amount
        and sum(other.get(resource, 0) for other in [wanted, *placed]) > capacity.get(resource, 0)
    }
    assert len(shortfall(capacity, placed, wanted)) == len(overdrawn)


@pytest.mark.parametrize(
    ("toleration", "placed"),
    [
        ({}, False),
        ({"key": "gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "gpu", "value": "l4", "effect": "NoSchedule"}, True),
        ({"key": "gpu", "value": "h100"}, False),
        ({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}, False),
    ],
)
def test_a_taint_keeps_pods_away_that_do_not_tolerate_it(toleration: Json, placed: bool) -> None:
    taint = {"key": "gpu", "value": "l4", "effect": "NoSchedule"}
    node = {"metadata": {"name": "n"}, "spec": {"taints": [taint]}}
    pod = {"spec": {"containers": [], "tolerations": [toleration] if toleration else []}}
    assert (not obstacles(pod, node, {"pods": Decimal(1)}, [])) is placed


LINES = st.lists(
    st.sampled_from([b"", b"x", b"y" * (CHUNK_BYTES // 2), b"z" * CHUNK_BYTES]), max_size=6
)


@given(LINES, st.booleans(), st.integers(-1, 8))
def test_a_tail_is_the_last_lines_of_a_file(lines: list[bytes], closed: bool, count: int) -> None:
    text = b"\n".join(lines) + (b"\n" if closed and lines else b"")
    whole = text.splitlines(keepends=True)
    expected = whole if count < 0 else whole[max(len(whole) - count, 0) :]
    file = io.BytesIO(text)
    file.seek(tail_offset(file, count))
    assert file.read() == b"".join(expected)


def test_a_node_wants_addresses_for_all_its_pods() -> None:
    with pytest.raises(NodeConfigError, match="too few"):
        NodeConfig(logs=Path("logs"), addresses="127.77.3.0/30")
