"""A list is read without what no look sees; what a look sees of it is the same as of the whole objects."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import ApiError, Cluster, ended
from trunkline_operator.decisions.world import PodFacts
from trunkline_runtime.contract import (
    ANNOTATION_CA,
    ANNOTATION_DRAINING,
    ANNOTATION_TEMPLATE,
    GROUP,
    KIND,
    VERSION,
)

Json = dict[str, Any]

CONTAINERS = [{"name": "worker", "image": "i", "env": [{"name": "SECRETIVE", "value": "x"}]}]
LABELS = {"part": "listed"}


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with await Cluster.connect({"KUBECONFIG": str(control_plane.kubeconfig)}) as cluster:
        yield cluster


@pytest.fixture
def pods(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods"


def body(name: str, node: str = "", **metadata: Any) -> Json:
    spec = {"containers": CONTAINERS} | ({"nodeName": node} if node else {})
    return {"metadata": {"name": name, "labels": LABELS, **metadata}, "spec": spec}


async def listing(cluster: Cluster, pods: str) -> list[listed.Pod]:
    return [pod async for page in cluster.pages(pods, listed.pods, 2, "part") for pod in page.items]


async def test_a_look_sees_the_same_of_a_listed_pod_as_of_the_whole_one(
    api: Api, cluster: Cluster, pods: str
) -> None:
    owner: Json = {"kind": KIND, "name": "x", "uid": "u", "controller": True}
    owner |= {"apiVersion": f"{GROUP}/{VERSION}"}
    stranger: Json = {"apiVersion": "v1", "kind": "X", "name": "x", "uid": "v", "controller": True}
    notes = {
        ANNOTATION_DRAINING: "2026-11-27T08:00:00Z",
        ANNOTATION_TEMPLATE: "t",
        ANNOTATION_CA: "c",
    }
    await api.create(pods, body("plain-0", ownerReferences=[stranger]))
    await api.create(pods, body("full-1", "n", ownerReferences=[owner], annotations=notes))
    await api.create(pods, body("going-2", "n"))
    await api.delete(f"{pods}/going-2")
    state = {"name": "worker", "image": "i", "imageID": "", "restartCount": 2, "ready": False}
    ran = {"terminated": {"exitCode": 3, "reason": "Error", "message": "out of memory"}}
    status = {
        "phase": "Running",
        "conditions": [
            {"type": "Ready", "status": "False", "lastTransitionTime": "2026-11-27T09:00:00Z"},
            {"type": "PodScheduled", "status": "False", "message": "no room"},
        ],
        "containerStatuses": [
            {
                **state,
                "started": True,
                "state": {"running": {"startedAt": "2026-11-27T08:30:00Z"}},
                "lastState": ran,
            }
        ],
    }
    await api.patch(f"{pods}/full-1/status", {"status": status})
    found = await listing(cluster, pods)
    whole = await cluster.list(pods)
    facts = [PodFacts.of(pod) for pod in found]
    assert facts == [PodFacts.of(pod) for pod in whole]
    assert [it.terminating for it in facts] == [False, True, False]
    assert facts[0].draining
    assert [it.owner for it in facts] == ["u", "", ""]
    assert "out of memory" in facts[0].trouble
    assert facts[0].unready


async def test_what_no_look_sees_is_passed_over(api: Api, cluster: Cluster, pods: str) -> None:
    made = await api.create(pods, body("one"))
    assert made["metadata"]["managedFields"]
    (pod,) = await listing(cluster, pods)
    assert pod["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    assert "SECRETIVE" not in json.dumps(pod)
    assert "managedFields" not in json.dumps(pod)


def test_an_agent_is_text_with_a_name() -> None:
    whole = {
        "metadata": {"namespace": "ns", "name": "desk", "uid": "u", "resourceVersion": "7"},
        "spec": {"x": [1, {"y": "}"}]},
    }
    text = json.dumps(
        {"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [whole, whole]}
    )
    page = listed.agents(text.encode())
    assert (page.version, page.rest) == (9, "more")
    one = page.items[0]
    assert (one.name.key, one.name.uid, one.name.version) == ("ns/desk", "u", "7")
    assert json.loads(bytes(one.text)) == whole
    assert listed.agents(b'{"metadata":{"resourceVersion":"9"},"items":null}').items == []


@pytest.mark.parametrize("text", [b"<html>", b"{}", b'{"metadata":{},"items":[]}'])
def test_what_is_no_list_is_not_taken_for_an_empty_one(text: bytes) -> None:
    for read in (listed.pods, listed.agents):
        with pytest.raises(msgspec.MsgspecError):
            read(text)


async def test_an_answer_that_is_no_list_is_an_error_of_the_api(
    cluster: Cluster, namespace: str
) -> None:
    with pytest.raises(ApiError, match="200 Unreadable: /api/v1/namespaces/"):
        async for _ in cluster.pages(f"/api/v1/namespaces/{namespace}", listed.pods, 2):
            pass


async def test_the_answer_to_a_delete_tells_whether_the_pod_is_gone(
    api: Api, cluster: Cluster, pods: str
) -> None:
    """Taken for gone too early a pod's name would be used twice, or an agent let go before its calls."""
    await api.create(pods, body("waits-for-a-node"))
    await api.create(pods, body("has-a-node", "n"))
    await api.create(pods, body("is-held", finalizers=["x.example/y"]))
    said = {}
    for pod in await cluster.list(pods):
        name = pod["metadata"]["name"]
        answer = await cluster.delete(f"{pods}/{name}", pod["metadata"]["uid"])
        assert answer is not None
        said[name] = ended(answer)
    left = {pod["metadata"]["name"] for pod in await api.list(pods)}
    assert said == {name: name not in left for name in said}
    assert left == {"has-a-node", "is-held"}
    await api.patch(f"{pods}/is-held", {"metadata": {"finalizers": None}})
