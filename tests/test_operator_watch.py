"""A watch of pods: whatever happens to its connection, each event is told, and what cannot be told is listed."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from api_relay import ApiRelay, Request
from test_operator_cluster import kubeconfig, says, troubled

from trunkline_dev.kube import Api
from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.watch import LONGEST_LINE, PART, PAUSES, Course, Watch
from trunkline_runtime.contract import LABEL_AGENT

Json = dict[str, Any]

LABEL = {LABEL_AGENT: "a"}


@dataclass
class Heard:
    """What a watch has told, and how often it had to list."""

    events: list[tuple[str, str]] = field(default_factory=list)
    lists: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, kind: str, pod: listed.Pod) -> None:
        self.events.append((kind, pod["metadata"]["name"]))
        self.changed.set()

    def listed(self) -> None:
        self.lists += 1
        self.changed.set()

    async def until(self, holds: Callable[["Heard"], bool], seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not holds(self):
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def relay(api: Api) -> AsyncIterator[ApiRelay]:
    async with ApiRelay(api).serving() as relay:
        yield relay


@pytest.fixture
def pods(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods"


@pytest.fixture
async def watch(
    relay: ApiRelay, heard: Heard, pods: str, tmp_path: Path
) -> AsyncIterator[Watch[listed.Pod]]:
    """One through the relay, of a cluster that it lists as the mirror does."""
    async with await Cluster.connect({"KUBECONFIG": str(relay.kubeconfig(tmp_path))}) as cluster:
        yield watching(cluster, pods, heard)


def watching(cluster: Cluster, pods: str, heard: Heard) -> Watch[listed.Pod]:
    async def lists() -> int:
        pages = [page async for page in cluster.pages(pods, listed.pods, 500, LABEL_AGENT)]
        heard.listed()
        return pages[-1].version

    return Watch(
        cluster=cluster,
        path=pods,
        label=LABEL_AGENT,
        read=listed.pod,
        lists=lists,
        hear=heard.hear,
    )


@contextlib.asynccontextmanager
async def followed(watch: Watch[listed.Pod], version: int = 0) -> AsyncIterator[None]:
    task = asyncio.create_task(watch.follow(version))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def pod(name: str, labels: Json = LABEL) -> Json:
    spec = {"containers": [{"name": "worker", "image": "i"}]}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec}


def begun(relay: ApiRelay) -> bool:
    return sum(relay.watches.values()) == 1


# --- when it goes on ------------------------------------------------------------------------------------


def test_pauses_grow_to_their_bound_and_end_with_the_first_event() -> None:
    first, longest = PAUSES
    course = Course(7)
    pauses = []
    for _ in range(100):
        pauses.append(course.pause(1.0))
        assert course.pause(0.0) == pauses[-1] / 2
        course.lost()
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (first, longest)
    assert course.pause(0.5, asked=30) == 30
    assert course.version == 7
    course.heard(8)
    assert (course.version, course.pause(1.0)) == (8, first)
    course.lost(forgotten=True)
    assert course.version == 0


# --- on a real API server ---------------------------------------------------------------------------------


async def test_it_tells_what_happens_after_a_list(
    api: Api, relay: ApiRelay, watch: Watch[listed.Pod], heard: Heard, pods: str
) -> None:
    await api.create(pods, pod("before"))
    version = int((await api.get(pods))["metadata"]["resourceVersion"])
    # Between the list and the watch.
    await api.create(pods, pod("one"))
    async with followed(watch, version):
        await api.create(pods, pod("stranger", {}))
        await api.patch(f"{pods}/one", {"metadata": {"annotations": {"a": "b"}}})
        await api.delete(f"{pods}/before")
        await api.patch(f"{pods}/one", {"metadata": {"labels": {LABEL_AGENT: None}}})
        await heard.until(lambda it: ("DELETED", "one") in it.events)
    assert heard.events == [
        ("ADDED", "one"),
        ("MODIFIED", "one"),
        ("MODIFIED", "before"),
        ("DELETED", "before"),
        ("DELETED", "one"),  # it has no such label any more
    ]
    assert heard.lists == 0
    # Whoever is cancelled leaves no connection.
    await relay.until(lambda it: sum(it.watches.values()) == 0)


async def test_after_a_lost_connection_it_goes_on_without_a_list(
    api: Api, relay: ApiRelay, watch: Watch[listed.Pod], heard: Heard, pods: str
) -> None:
    async with followed(watch):
        await relay.until(begun)
        await api.create(pods, pod("one"))
        await heard.until(lambda it: len(it.events) == 1)
        relay.away()
        await relay.until(lambda it: sum(it.watches.values()) == 0)
        await api.create(pods, pod("two"))
        await api.delete(f"{pods}/one")
        tried = len(relay.seen)
        await relay.until(lambda it: len(it.seen) >= tried + 3)
        relay.back()
        await heard.until(lambda it: len(it.events) == 4)
    assert heard.events[1:] == [("ADDED", "two"), ("MODIFIED", "one"), ("DELETED", "one")]
    assert heard.lists == 1


async def test_a_version_that_the_api_server_has_forgotten_asks_for_a_list(
    api: Api, relay: ApiRelay, watch: Watch[listed.Pod], heard: Heard, pods: str
) -> None:
    """As the API server says it: in place of a watch, and in one that has begun."""
    refusals = iter([410])

    async def before(_: Request) -> web.Response | None:
        status = next(refusals, None)
        return web.json_response({"reason": "Expired"}, status=status) if status else None

    relay.before_watch = before
    async with followed(watch, 1):
        await heard.until(lambda it: it.lists == 1)
        await relay.until(lambda it: len(it.watched) == 2 and begun(it))
        gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
        await relay.say({"type": "ERROR", "object": gone})
        await heard.until(lambda it: it.lists == 2)
        await relay.until(lambda it: len(it.watched) == 3 and begun(it))
        await api.create(pods, pod("one"))
        await heard.until(lambda it: it.events == [("ADDED", "one")])


async def test_one_that_is_silent_begins_anew_and_misses_nothing(
    api: Api, relay: ApiRelay, watch: Watch[listed.Pod], heard: Heard, pods: str
) -> None:
    async with followed(replace(watch, silence=0.5)):
        await relay.until(begun)
        relay.muted = True
        await api.create(pods, pod("one"))
        began = len(relay.watched)
        await relay.until(lambda it: len(it.watched) > began)
        assert heard.events == []
        relay.muted = False
        await heard.until(lambda it: it.events == [("ADDED", "one")])
    assert heard.lists == 1


async def test_throttled_it_waits_as_it_is_told(
    api: Api, relay: ApiRelay, watch: Watch[listed.Pod], heard: Heard, pods: str
) -> None:
    refusals = iter([429, 503, 403])
    moments: list[float] = []

    async def before(_: Request) -> web.Response | None:
        moments.append(time.monotonic())
        if status := next(refusals, None):
            wait = {"Retry-After": "1"} if status == 429 else {}
            return web.json_response({"reason": "Because"}, status=status, headers=wait)
        return None

    relay.before_watch = before
    async with followed(watch):
        await relay.until(begun)
        await api.create(pods, pod("one"))
        await heard.until(lambda it: len(it.events) == 1)
    assert moments[1] - moments[0] >= 1
    assert len(moments) == 4
    assert heard.lists == 1


async def test_a_list_that_is_refused_is_asked_for_again(
    api: Api, relay: ApiRelay, watch: Watch[listed.Pod], heard: Heard, pods: str
) -> None:
    refusals = iter([403, 410])

    async def before(_: Request) -> web.Response | None:
        status = next(refusals, None)
        return web.json_response({"reason": "Because"}, status=status) if status else None

    relay.before = before
    async with followed(watch):
        await relay.until(begun)
        await api.create(pods, pod("one"))
        await heard.until(lambda it: len(it.events) == 1)
    assert heard.lists == 1


async def test_an_event_that_cannot_be_taken_in_keeps_no_other_back(
    api: Api,
    relay: ApiRelay,
    watch: Watch[listed.Pod],
    heard: Heard,
    pods: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def hear(kind: str, pod: listed.Pod) -> None:
        if pod["metadata"]["name"] == "strange":
            raise KeyError("strange")
        heard.hear(kind, pod)

    async with followed(replace(watch, hear=hear)):
        await relay.until(begun)
        await api.create(pods, pod("strange"))
        await api.create(pods, pod("one"))
        await heard.until(lambda it: it.events == [("ADDED", "one")])
    assert heard.lists == len(relay.watched) == 1
    assert [line for line in caplog.messages if "an event cannot be taken in" in line]


# --- on an answer that is broken ----------------------------------------------------------------------------


def event(name: str, version: int, length: int = 0) -> bytes:
    metadata = {"name": name, "resourceVersion": str(version), "annotations": {"a": "x" * length}}
    return json.dumps({"type": "ADDED", "object": {"metadata": metadata}}).encode() + b"\n"


async def answered(heard: Heard, folder: Path, *answers: list[bytes]) -> list[web.Request]:
    """What a server was asked for that gives these answers to watches, in these parts, and then is silent."""
    left = iter(answers)
    done = asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "50"}, "items": []})
        stream = web.StreamResponse()
        await stream.prepare(request)
        parts = next(left, None)
        if parts is None:
            done.set()
            await asyncio.Event().wait()
        for part in parts or []:
            await stream.write(part)
        await stream.write_eof()
        return stream

    async with troubled(*[serve] * 9) as (url, asked):
        env = {"KUBECONFIG": str(kubeconfig(folder, url))}
        async with (
            await Cluster.connect(env) as cluster,
            followed(watching(cluster, "/api/v1/pods", heard), 1),
            asyncio.timeout(20),
        ):
            await done.wait()
    return [request for request in asked if "watch" in request.query]


async def test_watches_of_many_namespaces_leave_room_for_requests(tmp_path: Path) -> None:
    """More of them than the client's pool has connections by itself, 100."""

    async def silent(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse()
        await stream.prepare(request)
        await asyncio.Event().wait()
        return stream

    async with troubled(*[silent] * 120, says(200)) as (url, asked):
        env = {"KUBECONFIG": str(kubeconfig(tmp_path, url))}
        async with await Cluster.connect(env) as cluster, contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(20):
                for _ in range(120):
                    await stack.enter_async_context(cluster.watching("/w", {}, 30))
                assert await cluster.list("/x") == []
    assert len(asked) == 121


async def test_half_an_event_is_told_as_a_whole_later(heard: Heard, tmp_path: Path) -> None:
    one, two = event("one", 7, length=2 * PART), event("two", 8)  # of several reads
    asked = await answered(heard, tmp_path, [one + two[:20]], [two])
    assert heard.events == [("ADDED", "one"), ("ADDED", "two")]
    assert [it.query["resourceVersion"] for it in asked] == ["1", "7", "8"]
    assert heard.lists == 0


async def test_a_bookmark_moves_it_on(heard: Heard, tmp_path: Path) -> None:
    mark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}
    asked = await answered(heard, tmp_path, [json.dumps(mark).encode() + b"\n"])
    assert heard.events == []
    assert [it.query["resourceVersion"] for it in asked] == ["1", "9"]
    assert {it.query["allowWatchBookmarks"] for it in asked} == {"true"}
    assert {240 <= int(it.query["timeoutSeconds"]) <= 300 for it in asked} == {True}


@pytest.mark.parametrize(
    "broken",
    [
        b"<html>\n",
        b'{"type":"ADDED","object":{}}\n',
        b'{"type":"ERROR","object":{"code":500,"message":"etcd is away"}}\n',
        b"x" * (LONGEST_LINE + PART + 1),
    ],
    ids=["no JSON", "no object", "an error", "no end"],
)
async def test_what_is_no_event_asks_for_a_list(
    heard: Heard, tmp_path: Path, broken: bytes
) -> None:
    asked = await answered(heard, tmp_path, [event("one", 7), broken])
    assert heard.events == [("ADDED", "one")]
    assert heard.lists == 1
    assert [it.query["resourceVersion"] for it in asked] == ["1", "50"]
