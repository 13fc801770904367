"""The node by itself, before Trunkline is on it: names, the ways in and out, and network policies.

A pod that should not be reached and is not proves something only if the same pod was reached before.
"""

import contextlib
import http.server
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
from e2e.conftest import Place
from e2e.rig import Kubectl, Refused, until

from trunkline_dev.cluster.images import BUSYBOX

pytestmark = pytest.mark.asyncio(loop_scope="session")

NAMESPACE: Final = "e2e-node"
SERVE: Final = "mkdir /www; echo hello > /www/index.html; exec httpd -f -p 8080 -h /www"

Json = dict[str, Any]


def pod(name: str, *command: str, **labels: str) -> Json:
    container = {"name": "main", "image": BUSYBOX, "command": list(command)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0},
    }


def service(name: str, **spec: Any) -> Json:
    ports = [{"port": 80, "targetPort": 8080}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": "server"}, "ports": ports, **spec},
    }


def policy(name: str, **spec: Any) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {}, **spec},
    }


class World:
    """Two servers behind a Service and a headless one, a friend and a stranger."""

    def __init__(self, kubectl: Kubectl) -> None:
        self.kubectl = kubectl
        self.address: dict[str, str] = {}

    async def build(self) -> None:
        await self.kubectl("create", "namespace", NAMESPACE)
        servers = [pod(f"server-{n}", "sh", "-c", SERVE, app="server") for n in range(2)]
        others = [pod(name, "sleep", "infinity", role=name) for name in ("friend", "stranger")]
        services = [service("plain"), service("headless", clusterIP="None")]
        await self.kubectl.apply(*servers, *others, *services, namespace=NAMESPACE)
        wait = ("wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s")
        await self.kubectl(*wait, namespace=NAMESPACE)
        for it in await self.kubectl.items("pods", namespace=NAMESPACE):
            self.address[it["metadata"]["name"]] = it["status"]["podIP"]
        plain = await self.kubectl.get("service/plain", namespace=NAMESPACE)
        self.address["plain"] = plain["spec"]["clusterIP"]

    async def run(self, name: str, command: str) -> str:
        with contextlib.suppress(Refused):
            return await self.kubectl("exec", name, "--", "sh", "-c", command, namespace=NAMESPACE)
        return ""

    async def reaches(self, name: str, address: str, port: int) -> bool:
        get = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 2 {address} {port}"
        return "hello" in await self.run(name, get)

    async def finds(self, name: str) -> str:
        return await self.run("friend", f"nslookup {name}.{NAMESPACE}.svc.cluster.local")

    async def policies(self, *bodies: Json) -> None:
        await self.kubectl.apply(*bodies, namespace=NAMESPACE)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(place: Place) -> AsyncIterator[World]:
    if place.cluster is None:
        pytest.skip("it is about the node of this machine")
    world = World(place.kubectl)
    await world.build()
    yield world
    await place.kubectl("delete", "namespace", NAMESPACE)


@contextlib.contextmanager
def beside(address: str) -> Iterator[int]:
    """A web server on this machine, beside the cluster; yields its port."""

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((address, 0), Hello) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


async def test_names(world: World) -> None:
    """A Service has its address, a headless one those of its pods, and the outside has none."""

    async def both() -> bool:
        told = await world.finds("headless")
        return world.address["server-0"] in told and world.address["server-1"] in told

    await until(both, "the headless name has both pods")
    assert world.address["plain"] in await world.finds("plain")
    assert "NXDOMAIN" in await world.run("friend", "nslookup example.com || true")


async def test_ways(world: World, place: Place) -> None:
    """Pods reach what listens at the host's address; this machine reaches Services and pods."""
    assert place.cluster is not None
    with beside(place.cluster.host_address) as port:
        assert await world.reaches("friend", place.cluster.host_address, port)
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        for address in (world.address["plain"], f"{world.address['server-0']}:8080"):
            assert (await client.get(f"http://{address}/")).text == "hello\n"


async def test_policies(world: World, place: Place) -> None:
    """Who is denied was let in before; who is allowed again comes in, and a stranger does not."""
    assert place.cluster is not None
    server, host = world.address["server-0"], place.cluster.host_address

    async def friend() -> bool:
        return await world.reaches("friend", server, 8080)

    async def no_friend() -> bool:
        return not await friend()

    assert await friend()
    assert await world.reaches("stranger", server, 8080)
    await world.policies(policy("deny", policyTypes=["Ingress"]))
    await until(no_friend, "the default deny holds")
    peer = {"podSelector": {"matchLabels": {"role": "friend"}}}
    allow = policy("allow", ingress=[{"from": [peer], "ports": [{"port": 8080}]}])
    await world.policies(allow)
    await until(friend, "the friend is let in")
    assert await world.reaches("friend", world.address["plain"], 80)
    for address, port in ((server, 8080), (world.address["plain"], 80)):
        assert not await world.reaches("stranger", address, port)
    with pytest.raises(httpx.ConnectError):  # Neither is this machine a friend.
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            await client.get(f"http://{world.address['plain']}/")

    with beside(host) as port:
        assert await world.reaches("friend", host, port)
        await world.policies(policy("out", policyTypes=["Egress"]))
        await until(no_friend, "no pod may call out")
        assert not await world.reaches("friend", host, port)
        block = {"ipBlock": {"cidr": f"{host}/32"}}
        await world.policies(policy("modal", egress=[{"to": [block], "ports": [{"port": port}]}]))

        async def out() -> bool:
            return await world.reaches("friend", host, port)

        await until(out, "pods may call the host's port")
        assert await no_friend()
