"""A whole namespace is deleted, by Kubernetes' own namespace controller, and nothing that is paid for is left.

The controller deletes what there is of every kind, Secrets among them, forbids new objects, and lets the namespace go
once the last finalizer has gone: ours, after the agent's app is stopped.
"""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from burst_rig import joined, until
from operator_rig import World, operated
from test_operator_orphans import BURSTING, deployed

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_dev.modal.server import LocalModal

CONTROLLERS = "namespace-controller", "serviceaccount-controller"


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane(CONTROLLERS) as plane:
        yield plane


@asynccontextmanager
async def a_shop(plane: ControlPlane, modal: LocalModal, logs: Path) -> AsyncIterator[World]:
    """A namespace with an agent whose app is deployed, and an operator at home in another."""
    shop, home = (f"{name}-{uuid.uuid4().hex[:8]}" for name in ("shop", "home"))
    async with Api(plane.kubeconfig) as api:
        for name in shop, home:
            await api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        await api.wait_for_one(f"/api/v1/namespaces/{shop}/serviceaccounts/default", bool)
        async with operated(api, plane, shop, logs) as world:
            world.flags = (f"--burst-secret={home}/trunkline-burst",)
            await joined(world, modal)
            await world.start()
            await world.apply(BURSTING)
            await world.condition("BurstReady", "BurstReady")
            await world.pod_count(1)
            await world.serve_calls()
            (app,) = deployed(modal)
            assert app.version == 1
            yield world
            # The operator's copy of what stopped the app has gone, too.
            copies = f"/api/v1/namespaces/{home}/secrets/trunkline-burst"
            await api.wait_for_one(copies, lambda secret: not secret.get("data"))


async def test_with_an_operator_that_is_there(
    plane: ControlPlane, modal: LocalModal, tmp_path: Path
) -> None:
    async with a_shop(plane, modal, tmp_path) as world:
        where = f"/api/v1/namespaces/{world.namespace}"
        await world.api.delete(where)
        await world.api.wait_gone(where, 60)
        assert not deployed(modal)


async def test_with_an_operator_that_was_away_until_all_but_the_agent_had_gone(
    plane: ControlPlane, modal: LocalModal, tmp_path: Path
) -> None:
    async with a_shop(plane, modal, tmp_path) as world:
        where = f"/api/v1/namespaces/{world.namespace}"
        world.processes.pop().kill()
        await world.api.delete(where)
        for gone in f"{world.secrets}/modal", f"{world.secrets}/front-desk-trunkline":
            await world.api.wait_gone(gone, 60)
        await world.api.wait_for(world.pods, lambda pods: not pods)
        await world.agent(lambda it: "deletionTimestamp" in it["metadata"])
        assert deployed(modal), "its finalizer keeps the agent until an operator comes"
        await world.start()
        await world.gateway.until(lambda it: bool(it.told))
        await world.serve_calls()
        await world.api.wait_gone(where, 60)
        await until(lambda: not deployed(modal))
