"""A volume that is not there is told within seconds, in the words of whoever misses it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from operator_rig import NAME, SPEC, World, operated

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, condition, is_true

Json = dict[str, Any]

VOLUMES = [{"name": "phrases", "configMap": {"name": "phrases"}}]
MOUNTS = [{"name": "phrases", "mountPath": "/phrases"}]
MOUNTED = {
    **SPEC,
    "warm": {**SPEC["warm"], "template": {"volumes": VOLUMES, "volumeMounts": MOUNTS}},
}
# As kubelets write it.
WORDS = 'MountVolume.SetUp failed for volume "phrases" : configmap "phrases" not found'


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


async def stuck(world: World, words: str) -> None:
    """The agent's pod as it stays on a node where a volume is missing, and the Events about it."""
    await world.apply(MOUNTED)
    (pod,) = await world.pod_count(1)
    status = {
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp(pod)},
            {"type": "Ready", "status": "False", "lastTransitionTime": stamp(pod)},
        ],
        "containerStatuses": [
            {
                "name": "worker",
                "image": "i",
                "imageID": "",
                "restartCount": 0,
                "ready": False,
                "state": {"waiting": {"reason": "ContainerCreating"}},
            }
        ],
    }
    for number, (kind, reason, message) in enumerate(
        [
            ("Normal", "Scheduled", "Successfully assigned"),
            ("Warning", "DNSConfigForming", "Nameserver limits were exceeded"),
            ("Warning", "FailedMount", words),
        ]
    ):
        event = {
            "metadata": {"name": f"event-{number}"},
            "involvedObject": {
                "kind": "Pod",
                "name": f"{NAME}-0",
                "namespace": world.namespace,
                "uid": pod["metadata"]["uid"],
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "lastTimestamp": stamp(pod),
        }
        await world.api.create(f"/api/v1/namespaces/{world.namespace}/events", event)
    await world.api.patch(f"{world.pods}/{NAME}-0/status", {"status": status})


def stamp(pod: Json) -> str:
    return str(pod["metadata"]["creationTimestamp"])


async def test_a_volume_that_is_missing_is_told_in_the_kubelets_words_until_it_is_there(
    world: World, tmp_path: Path
) -> None:
    async with world.charted({"watchNamespaces": [world.namespace]}, "rbac.yaml", "operator.yaml"):
        file = await world.kubeconfig_of("trunkline-operator", tmp_path)
        await world.start(env={"KUBECONFIG": str(file)})
        await stuck(world, WORDS)
        told = await world.condition("WarmReady", "VolumeMissing", 10)
        assert told["message"] == (
            f"0 of 1 pods are ready; {NAME}-0: {WORDS}. "
            "It starts once that is there: see warm.template.volumes; calls are refused"
        )
        await world.make_ready(f"{NAME}-0")
        await world.serve_calls(0)
        agent = await world.agent(lambda it: is_true(it, "WarmReady"))
        assert condition(agent, "WarmReady")["reason"] == "PodsReady"


async def test_without_the_right_to_list_events_all_else_goes_on_and_it_complains_once(
    world: World, tmp_path: Path
) -> None:
    async with world.charted({"watchNamespaces": [world.namespace]}, "rbac.yaml", "operator.yaml"):
        role = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{world.namespace}/roles/trunkline-operator"
        rules = (await world.api.get(role))["rules"]
        kept = [rule for rule in rules if rule["resources"] != ["events"]]
        await world.api.patch(role, {"rules": kept})
        file = await world.kubeconfig_of("trunkline-operator", tmp_path)
        await world.start(env={"KUBECONFIG": str(file)})
        await stuck(world, WORDS)
        async with asyncio.timeout(20):
            while not complaints(world):
                await asyncio.sleep(0.1)
        await world.condition("WarmReady", "PodsStarting")
        await world.make_ready(f"{NAME}-0")
        await world.serve_calls(0)
        await world.agent(lambda it: is_true(it, "WarmReady"))
    (line,) = complaints(world)
    assert f"why {NAME}-0 waits is not known: 403 Forbidden: " in line


def complaints(world: World) -> list[str]:
    told = [line["message"] for line in world.log if line["logger"] == "trunkline.reconcile"]
    return [message for message in told if "is not known" in message]
