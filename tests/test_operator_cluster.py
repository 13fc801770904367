"""The client of the Kubernetes API, against a real API server, and against one that has troubles."""

import base64
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from trunkline_dev.controlplane import ControlPlane
from trunkline_operator.cluster.client import ApiError, Cluster, asked_wait, path, retry_delay
from trunkline_operator.config import ConfigError


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    env = {"KUBECONFIG": str(control_plane.kubeconfig)}
    async with await Cluster.connect(env) as cluster:
        yield cluster


def secret(name: str, text: str = "x", **labels: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": labels},
        "data": {"text": base64.b64encode(text.encode()).decode()},
    }


async def test_an_object_is_created_once(cluster: Cluster, namespace: str) -> None:
    secrets = path("Secret", namespace)
    made = await cluster.create(secrets, secret("a"))
    assert made is not None
    assert await cluster.create(secrets, secret("a", "another")) is None
    assert (await cluster.get(f"{secrets}/a"))["data"] == made["data"]
    assert await cluster.find(f"{secrets}/b") is None
    with pytest.raises(ApiError, match='404 NotFound: secrets "b" not found'):
        await cluster.get(f"{secrets}/b")


async def test_a_list_keeps_to_its_labels(cluster: Cluster, namespace: str) -> None:
    secrets = path("Secret", namespace)
    for name, agent in (("a", "x"), ("b", "y"), ("c", "x")):
        await cluster.create(secrets, secret(name, agent=agent))
    found = await cluster.list(secrets, {"agent": "x"})
    assert [item["metadata"]["name"] for item in found] == ["a", "c"]
    assert len(await cluster.list(secrets)) == 3


async def test_a_patch_merges_into_what_it_expects(cluster: Cluster, namespace: str) -> None:
    secrets = path("Secret", namespace)
    made = await cluster.create(secrets, secret("a", agent="x"))
    assert made is not None
    metadata = made["metadata"]
    note = {"annotations": {"note": "1"}}
    patched = await cluster.patch(f"{secrets}/a", {"metadata": {**note, "uid": metadata["uid"]}})
    assert patched["metadata"]["labels"] == {"agent": "x"}
    stale = {"resourceVersion": metadata["resourceVersion"]}
    for wrong in (stale, {"uid": "00000000-0000-0000-0000-000000000000"}):
        with pytest.raises(ApiError, match="409 Conflict"):
            await cluster.patch(f"{secrets}/a", {"metadata": {**note, **wrong}})


async def test_apply_makes_it_so_and_at_rest_changes_nothing(
    cluster: Cluster, namespace: str
) -> None:
    where = path("Secret", namespace, "a")
    first = await cluster.apply(where, secret("a", "one"))
    again = await cluster.apply(where, secret("a", "one"))
    assert first["metadata"]["resourceVersion"] == again["metadata"]["resourceVersion"]
    assert first["metadata"]["managedFields"][0]["manager"] == "trunkline-operator"
    other = await cluster.apply(where, secret("a", "two"))
    assert base64.b64decode(other["data"]["text"]) == b"two"


async def test_only_that_very_object_is_deleted(cluster: Cluster, namespace: str) -> None:
    where = path("Secret", namespace, "a")
    made = await cluster.create(path("Secret", namespace), secret("a"))
    assert made is not None
    assert not await cluster.delete(where, "00000000-0000-0000-0000-000000000000")
    assert await cluster.find(where)
    assert await cluster.delete(where, made["metadata"]["uid"])
    assert not await cluster.delete(where, made["metadata"]["uid"])


async def test_nothing_is_written_without_the_lease(cluster: Cluster, namespace: str) -> None:
    where = path("Secret", namespace, "a")
    made = await cluster.create(path("Secret", namespace), secret("a"))
    assert made is not None
    cluster.may_write = lambda: False
    for work in (
        cluster.create(path("Secret", namespace), secret("b")),
        cluster.patch(where, {"metadata": {"labels": {"a": "b"}}}),
        cluster.apply(where, secret("a", "two")),
        cluster.delete(where, made["metadata"]["uid"]),
    ):
        with pytest.raises(ApiError, match="nothing is written without the Lease"):
            await work
    left = await cluster.list(path("Secret", namespace))
    assert [it["metadata"] for it in left] == [made["metadata"]]


# --- an API server with troubles --------------------------------------------------------------------------

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def troubled(*answers: Answer) -> AsyncIterator[tuple[str, list[web.Request]]]:
    """A server that gives these answers one after another; its URL and what it was asked."""
    asked: list[web.Request] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(request)
        return await answers[len(asked) - 1](request)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


def kubeconfig(folder: Path, server: str, **user: str) -> Path:
    file = folder / "kubeconfig"
    file.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": server}}],
                "users": [{"name": "c", "user": user}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
            }
        )
    )
    return file


def says(status: int, reason: str = "", **headers: str) -> Answer:
    body = {"kind": "Status", "reason": reason, "message": f"it is {reason}", "items": []}

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return answer


async def hangs_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def page(_: web.Request) -> web.StreamResponse:
    return web.Response(status=503, text="<html>busy</html>")


async def test_passing_troubles_pass(tmp_path: Path) -> None:
    async with troubled(page, hangs_up, says(429, "TooManyRequests"), says(200)) as (url, asked):
        env = {"KUBECONFIG": str(kubeconfig(tmp_path, url, token="t"))}
        async with await Cluster.connect(env) as cluster:
            assert await cluster.list("/api/v1/pods") == []
    assert [request.headers["Authorization"] for request in asked] == ["Bearer t"] * 4


async def test_a_server_that_asks_for_time_gets_it(tmp_path: Path) -> None:
    answers = says(429, "TooManyRequests", **{"Retry-After": "1"}), says(200)
    async with troubled(*answers) as (url, _):
        env = {"KUBECONFIG": str(kubeconfig(tmp_path, url))}
        async with await Cluster.connect(env) as cluster:
            began = time.monotonic()
            await cluster.list("/api/v1/pods")
            assert time.monotonic() - began >= 1


def test_no_server_may_ask_for_too_much_time() -> None:
    assert retry_delay(0, asked_wait("3600")) == 5
    assert retry_delay(0, asked_wait("Wed, 21 Oct 2015 07:28:00 GMT")) < 1


async def test_lasting_troubles_end_as_an_error(tmp_path: Path) -> None:
    async with troubled(*[says(500, "InternalError")] * 4, says(403, "Forbidden")) as (url, asked):
        env = {"KUBECONFIG": str(kubeconfig(tmp_path, url))}
        async with await Cluster.connect(env) as cluster:
            with pytest.raises(ApiError, match="500 InternalError: it is InternalError"):
                await cluster.get("/x")
            with pytest.raises(ApiError, match="403 Forbidden"):
                await cluster.get("/x")
    assert len(asked) == 5


async def test_an_expired_token_is_read_anew(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")

    async def expired(request: web.Request) -> web.StreamResponse:
        token.write_text("new")
        return await says(401, "Unauthorized")(request)

    async with troubled(expired, says(200)) as (url, asked):
        file = kubeconfig(tmp_path, url, tokenFile=str(token))
        async with await Cluster.connect({"KUBECONFIG": str(file)}) as cluster:
            await cluster.list("/api/v1/pods")
    assert [request.headers["Authorization"] for request in asked] == ["Bearer old", "Bearer new"]


async def test_credentials_that_cannot_be_read_just_now_are_an_answer_like_others(
    tmp_path: Path,
) -> None:
    """Whoever asks tries again after an ApiError: somebody may be writing the file at this moment."""
    file = tmp_path / "kubeconfig"

    async def expired(request: web.Request) -> web.StreamResponse:
        file.write_text("")
        return await says(401, "Unauthorized")(request)

    async with troubled(expired, says(200)) as (url, _):
        kubeconfig(tmp_path, url)
        text = file.read_text()
        async with await Cluster.connect({"KUBECONFIG": str(file)}) as cluster:
            with pytest.raises(ApiError, match="cannot read how to reach the cluster") as refused:
                await cluster.list("/api/v1/pods")
            assert refused.value.status == 401
            file.write_text(text)
            await cluster.list("/api/v1/pods")


async def test_nobody_there_is_said_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        env = {"KUBECONFIG": str(kubeconfig(tmp_path, url))}
        async with await Cluster.connect(env) as cluster:
            with pytest.raises(ApiError, match=f"^cannot reach the Kubernetes API at {url}: "):
                await cluster.get("/x")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read how to reach the cluster from"),
        ("nonsense: [", "cannot read how to reach the cluster from"),
        ("clusters: []", "cannot read how to reach the cluster from"),
    ],
)
async def test_a_kubeconfig_that_says_nothing(
    tmp_path: Path, text: str | None, sentence: str
) -> None:
    file = tmp_path / "kubeconfig"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        await Cluster.connect({"KUBECONFIG": str(file)})


async def test_no_cluster_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set KUBECONFIG, or start one with `trunkline dev`"):
        await Cluster.connect({"HOME": str(tmp_path)})
