"""`kubectl describe va` alone says what is wrong and what happens next, in every case of failure."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from described import CASES, FOLDER, MISTAKES, described
from operator_rig import NAME, SPEC, World, operated

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_operator.decisions.conditions import LONGEST_MESSAGE

Json = dict[str, Any]


@pytest.mark.parametrize("case", [*CASES, *MISTAKES])
def test_what_is_told_is_as_it_was_read(case: str) -> None:
    told = (FOLDER / f"{case}.txt").read_text()
    assert described(case) == told, "run `python tests/described.py` and read the difference"
    # Every case fits, and a cut message would lose what happens next.
    assert max(map(len, told.splitlines())) < LONGEST_MESSAGE


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == {*CASES, *MISTAKES}


# --- on a real API server --------------------------------------------------------------------------------


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


@pytest.mark.parametrize(
    ("warm", "said"),
    [
        (
            {"template": {"affinity": {"nodeAffinity": {"requierd": {}}}}},
            'unknown field "spec.affinity.nodeAffinity.requierd"',
        ),
        (
            {"template": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}},
            "value must be empty when `operator` is 'Exists'",
        ),
        ({"template": {"priorityClassName": "gold"}}, "no PriorityClass with name gold was found"),
        (
            {"resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}},
            "must be less than or equal to cpu limit of 1",
        ),
    ],
)
async def test_a_template_that_the_api_rejects_is_told_in_its_words_and_mended_by_an_edit(
    world: World, warm: Json, said: str
) -> None:
    await world.start()
    await world.apply({**SPEC, "warm": {**SPEC["warm"], **warm}})
    told = await world.condition("WarmReady", "TemplateRejected")
    assert told["message"].startswith("0 of 1 pods are ready; the API takes no such pod: ")
    assert said in told["message"]
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "template": {}, "resources": {}}})
    await world.pod_count(1)
    await world.condition("WarmReady", "PodsStarting")


async def test_an_operator_of_a_region_keeps_the_pods_of_that_region(world: World) -> None:
    await world.start("--region=eu-west")
    regions = [{"name": "us", "minPods": 2}]
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "regions": regions}})
    await world.condition("Ready", "NotServedHere")
    assert await world.api.list(world.pods) == []
    regions = [{"name": "us", "minPods": 2}, {"name": "eu-west", "minPods": 3}]
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "regions": regions}})
    await world.pod_count(3)


async def test_a_quota_is_told_in_the_apis_words_and_mended_by_its_end(world: World) -> None:
    quota = f"/api/v1/namespaces/{world.namespace}/resourcequotas/few"
    hard = {"pods": "1"}
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}}
    await world.api.apply(quota, {**body, "spec": {"hard": hard}})
    # What its controller would count.
    await world.api.patch(f"{quota}/status", {"status": {"hard": hard, "used": {"pods": "0"}}})
    await world.start()
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "minPods": 2}})
    told = await world.condition("WarmReady", "PodsRefused")
    assert told["message"].startswith("0 of 2 pods are ready; no pod can be made: ")
    words = f'pods "{NAME}-1" is forbidden: exceeded quota: few, requested: pods=1, used: pods=1, '
    assert words in told["message"]
    await world.pod_count(1)
    await world.api.delete(quota)
    await world.pod_count(2)
    await world.condition("WarmReady", "PodsStarting")
