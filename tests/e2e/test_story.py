"""From nothing to an answered call in a pod, through everything that a cluster does to it, and back to nothing.

The tests are one story and run in this order: each finds the release as the one before left it.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from e2e.conftest import Place
from e2e.rig import (
    AGENTS,
    HOME,
    RELEASE,
    ROOT,
    SOON,
    Json,
    Site,
    condition_of,
    hang_up,
    ready,
    undisturbed,
    until,
)
from helm_python import HelmError

from trunkline_dev.callers import spike
from trunkline_dev.spoken import ask
from trunkline_runtime import contract

pytestmark = pytest.mark.asyncio(loop_scope="session")

ECHO: Final = "echo"
"""A loopback agent of one to three pods with four slots each, without burst."""
GPUS: Final = 3
TRUNK: Final = "trunk"
"""A loopback agent of one pod with two slots, and containers of four."""
SMALL: Final = {"resources": {"requests": {"cpu": "100m"}}}
"""Of a worker that echoes, on a node of two processors."""
NOBODY: Final = SMALL | {"gpu": {"count": 0}}


# --- in


async def test_install(site: Site) -> None:
    """Two operators, of which one acts, and two gateways; nothing waits for an agent to exist."""
    await site.install()
    assert [ready(pod) for pod in await site.component("operator")] == [True, True]
    assert [ready(pod) for pod in await site.component("gateway")] == [True, True]
    lease = await site.kubectl.get(f"lease/{RELEASE}-operator", namespace=HOME)
    names = [pod["metadata"]["name"] for pod in await site.component("operator")]
    assert any(lease["spec"]["holderIdentity"].startswith(name) for name in names)


async def test_helm_test(site: Site) -> None:
    """Without an agent it proves that a gateway answers; it leaves no pod."""
    told = await asyncio.to_thread(site.helm.test, RELEASE, logs=True, timeout=int(SOON))
    assert "answers" in str(told["logs"]), told
    assert await site.component("test") == []


async def test_processes_run_with_no_rights(site: Site) -> None:
    """As the processes themselves see it: another user than root, no capability, a file system to read."""
    script = "import os; print(os.getuid(), open('/proc/self/status').read()); open('/x', 'w')"
    for name in ("operator", "gateway"):
        pod = (await site.component(name))[0]["metadata"]["name"]
        told = await site.kubectl(
            *("exec", pod, "--", "sh", "-c", f'python3 -c "{script}" 2>&1 || true'), namespace=HOME
        )
        assert not told.startswith("0 "), told
        assert re.search(r"CapEff:\s*0+\n", told), told
        assert "Read-only file system" in told


async def test_a_spoken_call(site: Site, tmp_path: Path) -> None:
    """examples/front-desk.yaml as it is: the answer says the digits of the question."""
    documents = list(yaml.safe_load_all((ROOT / "examples/front-desk.yaml").read_text()))
    await site.kubectl.apply(*documents, namespace=AGENTS)
    await site.kubectl.condition("front-desk", "Ready")
    key = next(iter(documents[0]["stringData"].values()))
    # A bare name is one of the gateway's default namespace.
    spoken = await ask(site.gateway_url, key, "front-desk", tmp_path)
    assert spoken.answered_digits == spoken.digits, spoken
    await site.kubectl("delete", "va/front-desk", namespace=AGENTS)
    await until(lambda: no_pods(site, "front-desk"), "front-desk's pods are gone")


async def no_pods(site: Site, agent: str) -> bool:
    return not await site.pods(agent)


# --- up


async def test_scale_up(site: Site) -> None:
    """Calls that take the last free slots bring pods with GPUs, as many as the agent may have."""
    if site.gpus:
        await site.gpus(GPUS)
    gpu = {"count": 1 if site.gpus else 0}  # Another cluster may have none.
    warm = {"slotsPerPod": 4, "minPods": 1, "maxPods": GPUS, "bufferSlots": 1, "gpu": gpu}
    await site.agent(ECHO, warm=SMALL | warm | {"scaleDown": {"delaySeconds": 5}})
    await site.kubectl.condition(ECHO, "Ready")
    assert len(await site.pods(ECHO)) == 1
    held = [await site.call(ECHO) for _ in range(4)]
    await until(lambda: ready_pods(site, ECHO, 2), "a second pod is ready")
    held += [await site.call(ECHO) for _ in range(4)]
    await until(lambda: ready_pods(site, ECHO, GPUS), "a third pod is ready")
    async with undisturbed(held):
        pass
    found = await site.accounts(ECHO, held)
    assert (found.warm, found.kept) == (8, True), found
    await hang_up(held)
    await until(lambda: ready_pods(site, ECHO, 1), "pods are at the floor again")


async def ready_pods(site: Site, agent: str, count: int) -> bool:
    pods = await site.pods(agent)
    return len(pods) == count and all(map(ready, pods))


async def test_overflow(site: Site) -> None:
    """Two calls find warm slots; six more are answered at Modal, which is reached from inside the pods."""
    await site.modal_credentials(AGENTS)
    await site.agent(TRUNK, warm=NOBODY | {"slotsPerPod": 2, "maxPods": 1}, burst=burst())
    await site.kubectl.condition(TRUNK, "BurstReady")
    await site.kubectl.condition(TRUNK, "Ready")
    await until(lambda: no_containers(site), "the snapshot's container is gone")
    held = await spike(site.gateway_url, f"{AGENTS}/{TRUNK}", 8, 1.0)
    async with undisturbed(held):
        pass
    found = await site.accounts(TRUNK, held)
    assert (found.warm, found.burst, found.kept) == (2, 6, True), found
    await hang_up(held)
    await until(lambda: no_containers(site), "burst is at zero again")


def burst() -> Json:
    modal = {"credentialsSecretRef": {"name": "modal"}, "gpu": [], "slotsPerContainer": 4}
    limits = {"maxContainers": 4, "scaledownWindowSeconds": 3, "startDeadlineSeconds": 7}
    return {"modal": modal | limits}


async def no_containers(site: Site) -> bool:
    return await site.modal.containers() == 0


# --- disturbed, with calls in progress


async def test_operators_are_replaced(site: Site) -> None:
    held = [await site.call(ECHO)]
    async with undisturbed(held), calls_all_the_time(site):
        await site.kubectl("rollout", "restart", f"deployment/{RELEASE}-operator", namespace=HOME)
        await rolled_out(site, "operator")
        held.append(await site.call(ECHO))  # also while nobody or somebody new is in charge
        await site.kubectl("annotate", f"va/{ECHO}", "note=1", namespace=AGENTS)
    await hang_up(held)


async def rolled_out(site: Site, component: str) -> None:
    await site.kubectl(
        *("rollout", "status", f"deployment/{RELEASE}-{component}", f"--timeout={SOON:g}s"),
        namespace=HOME,
        within=SOON + 10,
    )


async def test_gateways_are_replaced(site: Site) -> None:
    """The old ones keep their calls, and go when those have ended. The new ones have workers before DNS knows them."""
    old = {pod["metadata"]["name"] for pod in await site.component("gateway")}
    held = [await site.call(ECHO) for _ in range(2)]
    async with undisturbed(held), calls_all_the_time(site):
        await site.kubectl("rollout", "restart", f"deployment/{RELEASE}-gateway", namespace=HOME)
        await rolled_out(site, "gateway")
        new = await site.call(ECHO)
    new_ones = {pod["metadata"]["name"] for pod in await site.component("gateway")}
    assert not old & new_ones
    await hang_up([*held, new])
    await until(lambda: gone_pods(site, old), "the old gateways are gone")


@contextlib.asynccontextmanager
async def calls_all_the_time(site: Site) -> AsyncIterator[None]:
    """One short call after the other, each of which must be answered; ECHO has no burst to help out."""
    over = asyncio.Event()

    async def call() -> None:
        while not over.is_set():
            await hang_up([await site.call(ECHO)])
            await asyncio.sleep(0.2)  # for both gateways to hear that the slot is free

    calling = asyncio.create_task(call())
    try:
        yield
    finally:
        over.set()
        await calling


async def gone_pods(site: Site, names: set[str]) -> bool:
    return not names & {
        pod["metadata"]["name"] for pod in await site.kubectl.items("pods", namespace=HOME)
    }


async def test_upgrade_and_rollback(site: Site) -> None:
    """Every process is replaced twice, and neither workers nor calls are touched."""
    # The calls of the test before may have brought a pod, which goes by itself.
    await until(lambda: ready_pods(site, ECHO, 1), "pods are at the floor again")
    workers = await templates(site)
    held = [await site.call(ECHO), await site.call(TRUNK)]
    async with undisturbed(held), calls_all_the_time(site):
        await site.upgrade(gateway={"logLevel": "DEBUG"}, operator={"logLevel": "DEBUG"})
        await asyncio.gather(rolled_out(site, "gateway"), rolled_out(site, "operator"))
        held.append(await site.call(ECHO))
        await asyncio.to_thread(site.helm.rollback, RELEASE)
        await asyncio.gather(rolled_out(site, "gateway"), rolled_out(site, "operator"))
    after = await templates(site)
    # More pods may have come meanwhile, for the calls; they are of the same template.
    assert workers.items() <= after.items()
    assert set(workers.values()) == set(after.values())
    await hang_up(held)
    await hang_up([await site.call(ECHO)])
    assert workers.items() <= (await templates(site)).items()


async def templates(site: Site) -> dict[str, str]:
    """What each worker was made from, by its pod's uid."""
    pods = [*await site.pods(ECHO), *await site.pods(TRUNK)]
    return {
        pod["metadata"]["uid"]: pod["metadata"]["annotations"][contract.ANNOTATION_TEMPLATE]
        for pod in pods
    }


async def test_the_node_is_drained(site: Site) -> None:
    """kubectl drain evicts all pods; the calls on them end when their callers hang up, not before."""
    held = [await site.call(ECHO), await site.call(TRUNK)]
    nodes = await site.kubectl.items("nodes")
    name = nodes[0]["metadata"]["name"]
    if len(nodes) > 1:
        pods = await site.pods(ECHO)
        name = pods[0]["spec"]["nodeName"]
    evicted = {pod["metadata"]["uid"] for pod in await site.pods(ECHO)}
    selector = f"--pod-selector={contract.LABEL_AGENT}"
    drain = asyncio.create_task(
        # Workers' /tmp is an empty folder, for which a drain asks to be told.
        site.kubectl(
            "drain", name, selector, "--force", "--delete-emptydir-data", "--timeout=5m", within=310
        )
    )
    async with undisturbed(held):
        await until(lambda: all_leaving(site, evicted), "every worker is told to go")
    assert not drain.done()
    await hang_up(held)
    await drain
    await site.kubectl("uncordon", name)
    await until(lambda: ready_pods(site, ECHO, 1), "a new pod is ready")
    await until(lambda: ready_pods(site, TRUNK, 1), "a new pod is ready")
    assert not evicted & {pod["metadata"]["uid"] for pod in await site.pods(ECHO)}
    await hang_up([await site.call(ECHO)])


async def all_leaving(site: Site, uids: set[str]) -> bool:
    pods = [pod for pod in await site.pods(ECHO) if pod["metadata"]["uid"] in uids]
    return bool(pods) and all("deletionTimestamp" in pod["metadata"] for pod in pods)


# --- forbidden


async def test_the_network_lets_only_trunkline_in(site: Site) -> None:
    """A stranger's pod may call a gateway, and reaches neither its control port nor a worker's slots."""
    gateway = (await site.component("gateway"))[0]["status"]["podIP"]
    worker = (await site.pods(ECHO))[0]["status"]["podIP"]
    asked = {"calls": (gateway, 8080), "control": (gateway, 8081), "worker": (worker, 8000)}
    # A policy holds a second after the pod has its address, and refuses or is silent.
    script = f"""
import socket, time
for _ in range(20):
    found = {{}}
    for name, address in {asked!r}.items():
        try:
            socket.create_connection(address, timeout=1).close()
            found[name] = "open"
        except OSError:
            found[name] = "closed"
    if list(found.values()).count("open") == 1:
        break
    time.sleep(0.5)
print(found)
"""
    image = (await site.component("gateway"))[0]["spec"]["containers"][0]["image"]
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "stranger"},
        "spec": {
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": site.values["image"].get("pullPolicy", "IfNotPresent"),
                    "command": ["python3", "-c", script],
                }
            ],
        },
    }
    await site.kubectl.apply(body, namespace="default")
    try:
        await site.kubectl(
            *("wait", "pod/stranger", "--for=jsonpath={.status.phase}=Succeeded"),
            f"--timeout={SOON:g}s",
            namespace="default",
            within=SOON + 10,
        )
        told = await site.kubectl("logs", "stranger", namespace="default")
    finally:
        await site.kubectl(
            "delete", "pod/stranger", "--grace-period=0", "--force", namespace="default"
        )
    assert told.strip() == "{'calls': 'open', 'control': 'closed', 'worker': 'closed'}"


# --- wrong


async def test_an_image_that_is_not_there(site: Site) -> None:
    """The condition says so in the node's words, within seconds of them."""
    image = "registry.invalid/none:1"
    await site.agent("mislaid", warm=NOBODY | {"image": image, "maxPods": 1})
    told = await says(site, "mislaid", "WarmReady", image)
    assert told["status"] == "False"
    await site.kubectl("delete", "va/mislaid", namespace=AGENTS)


async def test_gpus_that_are_not_there(site: Site) -> None:
    await site.agent("greedy", warm={"maxPods": 1, "gpu": {"count": 8}})
    told = await says(site, "greedy", "WarmReady", "nvidia.com/gpu")
    assert told["status"] == "False"
    await site.kubectl("delete", "va/greedy", namespace=AGENTS)


async def test_a_namespace_that_lets_nothing_out(site: Site) -> None:
    """Its pod is ready, and cannot reach the gateways: that is said, and mended without a new pod."""
    shut = "e2e-shut"
    await site.kubectl("create", "namespace", shut)
    policy: Json = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "nothing-out"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"]},
    }
    await site.kubectl.apply(policy, namespace=shut)
    await site.agent("till", shut, warm=NOBODY | {"minPods": 1, "maxPods": 1})
    told = await says(site, "till", "WarmReady", "no gateway has a link from it", shut)
    assert told["reason"] == "PodUnlinked"
    (pod,) = await site.pods("till", shut)
    assert ready(pod), "Kubernetes sees nothing wrong"
    await site.kubectl("delete", "networkpolicy/nothing-out", namespace=shut)
    await says(site, "till", "Ready", "calls are answered", shut)
    await hang_up([await site.call("till", shut)])
    assert [it["metadata"]["uid"] for it in await site.pods("till", shut)] == [
        pod["metadata"]["uid"]
    ]
    await site.kubectl("delete", "namespace", shut, within=SOON)


async def says(site: Site, agent: str, kind: str, words: str, namespace: str = AGENTS) -> Json:
    """Waits until a condition's message holds the words, and returns the condition."""
    found: Json = {}

    async def told() -> bool:
        nonlocal found
        found = condition_of(await site.kubectl.get(f"va/{agent}", namespace=namespace), kind)
        return words in found.get("message", "")

    await until(told, f"{kind} of {agent} speaks of {words}")
    return found


async def test_a_second_release(site: Site) -> None:
    with pytest.raises(HelmError, match=f"{HOME}/{RELEASE}"):
        await site.install("another")


# --- out


async def test_a_namespace_is_deleted(site: Site) -> None:
    """Its agent's app at Modal goes too, though the Secret with the credentials went first."""
    shop = "e2e-shop"
    await site.kubectl("create", "namespace", shop)
    await site.modal_credentials(shop)
    before = set(await site.modal.deployed())
    body: Json = {
        "apiVersion": f"{contract.GROUP}/{contract.VERSION}",
        "kind": contract.KIND,
        "metadata": {"name": "till"},
        "spec": {
            "engine": {"type": "loopback"},
            "access": {"public": True},
            "warm": NOBODY | {"minPods": 1, "maxPods": 1},
            "burst": burst(),
        },
    }
    await site.kubectl.apply(body, namespace=shop)
    await site.kubectl(
        *("wait", "va/till", "--for=condition=BurstReady", f"--timeout={SOON:g}s"),
        namespace=shop,
        within=SOON + 10,
    )
    assert set(await site.modal.deployed()) - before
    await site.kubectl("delete", "namespace", shop, within=SOON)
    assert set(await site.modal.deployed()) == before


async def test_uninstall(site: Site) -> None:
    """Modal apps are stopped first. Agents stay, and nothing holds them."""
    assert await site.modal.deployed()
    await asyncio.to_thread(site.helm.uninstall, RELEASE, wait="watcher", timeout=int(SOON))
    assert await site.modal.deployed() == []
    await until(lambda: only_the_operators_own(site), "what the chart made is gone")
    for name in (ECHO, TRUNK):
        agent = await site.kubectl.get(f"va/{name}", namespace=AGENTS)
        assert "finalizers" not in agent["metadata"]
    await site.kubectl("delete", "va", "--all", namespace=AGENTS)
    await until(lambda: nothing_left(site), "workers go with their agents")


async def only_the_operators_own(site: Site) -> bool:
    """Gateways take their leave; the Lease and the Secret of routes are no objects of the chart's."""
    left = await site.kubectl.items("all,secrets,leases,networkpolicies,roles", namespace=HOME)
    names = {f"{it['kind']}/{it['metadata']['name']}" for it in left}
    return names <= {f"Lease/{RELEASE}-operator", f"Secret/{RELEASE}-routes"}


async def nothing_left(site: Site) -> bool:
    return not await site.kubectl.items("pods", namespace=AGENTS)


async def test_nothing_is_left(site: Site, place: Place) -> None:
    await site.kubectl("delete", "namespace", HOME, AGENTS)
    await site.kubectl("delete", "crd", f"{contract.PLURAL}.{contract.GROUP}")
    found: list[Any] = []
    for kind in ("clusterroles", "clusterrolebindings", "customresourcedefinitions"):
        found += [it["metadata"]["name"] for it in await place.kubectl.items(kind)]
    assert [name for name in found if "trunkline" in name] == []
    assert await site.modal.containers() == 0
