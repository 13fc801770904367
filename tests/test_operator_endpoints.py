"""Which addresses stand behind a Service, as the API server tells them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_relay import ApiRelay

from trunkline_dev.kube import Api
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.endpoints import LABEL, Endpoints, service_of

Json = dict[str, Any]


@pytest.mark.parametrize(
    ("host", "service"),
    [
        ("gateways.here.svc", ("here", "gateways")),
        ("gateways.here.svc.cluster.local", ("here", "gateways")),
        ("gateways.here.svc.cluster.local.", ("here", "gateways")),
        ("gateways.here", None),
        ("svc", None),
        ("gateway-0.gateways.here.svc.cluster.local", None),
        ("gateways.example.com", None),
        ("10.0.0.1", None),
        ("fd00::1", None),
    ],
)
def test_which_names_are_a_services(host: str, service: tuple[str, str] | None) -> None:
    assert service_of(host) == service


class Service:
    """One whose EndpointSlices the test makes, as the control plane would, and what is heard of it."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self.said: list[frozenset[str] | None] = []
        self._news = asyncio.Event()

    def hear(self, hosts: frozenset[str] | None) -> None:
        self.said.append(hosts)
        self._news.set()

    async def until(self, *hosts: str, known: bool = True) -> None:
        wanted = set(hosts) if known else None
        async with asyncio.timeout(20):
            while not self.said or self.said[-1] != wanted:
                self._news.clear()
                await self._news.wait()

    async def put(self, name: str, *hosts: str, service: str = "gateways", **more: Any) -> None:
        """Its conditions say that none is ready: gateways are dialled before they are."""
        endpoints = [{"addresses": [host], "conditions": {"ready": False}} for host in hosts]
        body = {"metadata": {"name": name, "labels": {LABEL: service}}, "addressType": "IPv4"}
        await self._api.create(self._path, body | {"endpoints": endpoints} | more)

    async def change(self, name: str, *hosts: str) -> None:
        endpoints = [{"addresses": [host]} for host in hosts]
        await self._api.patch(f"{self._path}/{name}", {"endpoints": endpoints})

    async def delete(self, name: str) -> None:
        await self._api.delete(f"{self._path}/{name}")


@pytest.fixture
async def relay(api: Api) -> AsyncIterator[ApiRelay]:
    async with ApiRelay(api).serving() as relay:
        yield relay


@pytest.fixture
async def service(
    api: Api, relay: ApiRelay, namespace: str, tmp_path: Path
) -> AsyncIterator[Service]:
    service = Service(api, namespace)
    async with await Cluster.connect({"KUBECONFIG": str(relay.kubeconfig(tmp_path))}) as cluster:
        endpoints = Endpoints(cluster, namespace, "gateways", service.hear)
        following = asyncio.create_task(endpoints.follow())
        try:
            yield service
        finally:
            following.cancel()
            await asyncio.wait({following})


async def test_what_is_there_first_and_then_each_change(service: Service) -> None:
    await service.until(known=False)
    await service.put("a")
    await service.until()
    await service.change("a", "10.0.0.1")
    await service.until("10.0.0.1")
    await service.put("others", "10.9.9.9", service="others")
    await service.put("b", "fd00::1", addressType="IPv6")
    await service.until("10.0.0.1", "fd00::1")
    await service.change("a", "10.0.0.1", "10.0.0.2")
    await service.until("10.0.0.1", "10.0.0.2", "fd00::1")
    await service.change("a", "10.0.0.2", "10.0.0.1")  # no news
    await service.change("a")
    await service.until("fd00::1")
    await service.delete("b")
    await service.until()
    await service.delete("a")
    await service.until(known=False)
    assert not any("10.9.9.9" in (said or ()) for said in service.said)
    assert all(one != other for one, other in zip(service.said, service.said[1:], strict=False))


async def test_what_was_deleted_while_nothing_could_be_heard_is_gone(
    service: Service, relay: ApiRelay
) -> None:
    await service.put("a", "10.0.0.1")
    await service.put("b", "10.0.0.2")
    await service.until("10.0.0.1", "10.0.0.2")
    await relay.until(lambda it: any(it.watches.values()))
    relay.muted = True
    await service.delete("b")
    await relay.say({"type": "ERROR", "object": {"code": 410, "reason": "Expired"}})
    await service.until("10.0.0.1")
