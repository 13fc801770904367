"""A whole Trunkline with TLS on every link inside it: calls, who is not believed, and what is replaced."""

import asyncio
import base64
import contextlib
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from machine_rig import SOON, agent, answered, calling, pods_of, running, still_echoed, until

from trunkline_dev.authority import Authority
from trunkline_dev.demo import AGENTS, PODS
from trunkline_dev.kube import Json, is_true
from trunkline_dev.machine import Machine, MachineConfig
from trunkline_runtime import contract

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    config = MachineConfig(gateways=2, tls=True, cold_seconds=0.5, restore_seconds=0.2)
    async with Machine(config) as up:
        await up.modal_credentials()
        yield up


async def certificate(machine: Machine, address: str, port: int, name: str) -> Json:
    """The server's, once it has proved the name by the machine's CA."""
    tls = ssl.create_default_context(cafile=machine.ca / "ca.crt")
    _, writer = await asyncio.open_connection(address, port, ssl=tls, server_hostname=name)
    found: Json = writer.get_extra_info("ssl_object").getpeercert()
    writer.close()
    await writer.wait_closed()
    return found


async def answer_in_plain(address: str, port: int) -> bytes:
    """What an HTTP request without TLS gets."""
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    try:
        async with asyncio.timeout(SOON):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def pod(machine: Machine, name: str) -> Json:
    found: list[Json] = await machine.api.list(PODS, **pods_of(name))
    return found[0]


async def secret(machine: Machine, name: str) -> dict[str, str]:
    found = await machine.api.get(f"/api/v1/namespaces/default/secrets/{name}-trunkline")
    return {entry: base64.b64decode(text).decode() for entry, text in found["data"].items()}


def says(machine: Machine, process: str, pattern: str) -> bool:
    """Whether a process, or the worker of a pod, has logged it."""
    files = [machine.logs / f"{process}.log", *(machine.logs / "pods").glob(f"*_{process}-*")]
    texts = [file.read_text() for file in files if file.exists()]
    return any(re.search(pattern, text) for text in texts)


async def test_a_call_in_a_pod_and_one_past_it(machine: Machine) -> None:
    """The data link is TLS to the agent's own name; Modal's links are what they were."""
    modal = {"credentialsSecretRef": {"name": "modal"}, "gpu": [], "slotsPerContainer": 2}
    warm = {"slotsPerPod": 1, "minPods": 1, "maxPods": 1, "bufferSlots": 0, "gpu": {"count": 0}}
    async with running(machine, agent("secret", warm=warm, burst={"modal": modal})) as name:
        async with calling(machine, name) as (one, _), calling(machine, name, 1) as (other, _):
            await still_echoed(one)
            await still_echoed(other)
            assert await machine.live_containers()
        address = (await pod(machine, name))["status"]["podIP"]
        proved = await certificate(
            machine, address, contract.WORKER_PORT, contract.worker_server_name(f"default/{name}")
        )
        assert proved["subjectAltName"] == (("DNS", "secret.default.worker.trunkline.internal"),)
        for where, port in (
            (address, contract.WORKER_PORT),
            (machine.gateway_address(0), contract.CONTROL_PORT),
        ):
            assert b"HTTP" not in await answer_in_plain(where, port)
    for process in ("operator", "gateway-0", name):
        assert not says(machine, process, "Traceback")


async def test_a_new_certificate_restarts_no_pod(machine: Machine) -> None:
    async with running(machine, agent("lasting")) as name:
        before, entries = await pod(machine, name), await secret(machine, name)
        path = f"/api/v1/namespaces/default/secrets/{name}-trunkline"
        await machine.api.patch(path, {"data": {"tls.crt": None}})
        # Secrets are not watched; whatever makes the operator look will do.
        await machine.api.patch(f"{AGENTS}/{name}", {"metadata": {"labels": {"look": "now"}}})

        async def anew() -> bool:
            return (await secret(machine, name)).get("tls.crt", "") not in ("", entries["tls.crt"])

        await until(anew)
        after = await secret(machine, name)
        assert after["worker-key"] == entries["worker-key"]
        assert after["ca.crt"] == entries["ca.crt"] == (machine.ca / "ca.crt").read_text()
        assert await answered(machine, name)
        now = await pod(machine, name)
        assert now["metadata"]["uid"] == before["metadata"]["uid"]
        assert now["status"]["containerStatuses"][0]["restartCount"] == 0


async def ready(machine: Machine, number: int) -> bool:
    url = f"http://{machine.gateway_address(number)}:{contract.HEALTH_PORT}{contract.READYZ_PATH}"
    async with httpx.AsyncClient(trust_env=False) as client:
        with contextlib.suppress(httpx.TransportError):
            return (await client.get(url)).status_code == 200
    return False


async def test_a_gateway_of_another_ca_is_told_and_mended_without_a_restart(
    machine: Machine, tmp_path: Path
) -> None:
    async with running(machine, agent("wary")) as name:
        mine = machine.control_tls(1)
        kept = shutil.copytree(mine, tmp_path / "kept")
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        Authority(stranger).issue("tls", "CN=gateway", names=[machine.gateway_address(1)])
        await machine.gateways[1].stop()
        for file in ("tls.crt", "tls.key"):
            shutil.copy(stranger / file, mine / file)
        machine.start_gateway(1)
        refused = "its certificate is not from the CA in "
        await until(lambda: truth(says(machine, "operator", f"{refused}the operator's --ca-dir")))
        await until(lambda: truth(says(machine, name, f"{refused}{contract.ENV_TLS_CA}")))
        assert not await ready(machine, 1)
        assert await answered(machine, name, gateway=0)
        for file in ("tls.crt", "tls.key"):
            shutil.copy(kept / file, mine / file)
        await until(lambda: ready(machine, 1))
        await until(lambda: answered(machine, name, gateway=1))
        assert not says(machine, "gateway-1", "Traceback")


async def truth(value: bool) -> bool:
    return value


async def test_pods_of_a_ca_that_was_replaced_drain_and_new_ones_take_the_calls(
    machine: Machine,
) -> None:
    warm = {"slotsPerPod": 1, "minPods": 1, "maxPods": 2, "bufferSlots": 0, "gpu": {"count": 0}}
    async with running(machine, agent("moved", warm=warm)) as name:
        old = (await pod(machine, name))["metadata"]
        await machine.operator.stop()
        machine.replace_ca()
        for number in range(2):
            await machine.gateways[number].stop()
            machine.start_gateway(number)
        machine.operator = machine.start_operator()
        await until(lambda: ready(machine, 0))
        await until(lambda: answered(machine, name))

        # A worker takes calls a moment before its kubelet says that it is ready, and the old one is told to drain then.
        def replaced(pods: list[Json]) -> bool:
            drained = [
                contract.ANNOTATION_DRAINING in one["metadata"]["annotations"]
                for one in pods
                if one["metadata"]["uid"] == old["uid"]
            ]
            new = [one for one in pods if one["metadata"]["uid"] != old["uid"]]
            return drained == [True] and any(is_true(one, "Ready") for one in new)

        await machine.api.wait_for(PODS, replaced, labelSelector=f"{contract.LABEL_AGENT}={name}")
        # Nobody can ask the old one whether it has calls, so it would be waited for; not by this test.
        await machine.api.delete(f"{PODS}/{old['name']}", {"gracePeriodSeconds": 0})
