"""A small client of the Kubernetes API: raw JSON over one connection pool.

It has the verbs that the development node, the demo and the tests need, and a way to wait for the
cluster to be as it should be without asking again and again.
"""

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import yaml

Json = dict[str, Any]
Objects = list[Json]

JSON: Final = "application/json"
MERGE: Final = "application/merge-patch+json"
STRATEGIC: Final = "application/strategic-merge-patch+json"
APPLY: Final = "application/apply-patch+yaml"

FIELD_MANAGER: Final = "trunkline-dev"

RELIST_SECONDS: Final = 30
"""A watch ends after this long and starts with a fresh list, so that nothing stays missed."""
RETRY_SECONDS, RETRY_MAX_SECONDS = 0.2, 1.0
"""Doubling in between. Short, because people and tests wait for what a development cluster does next."""
REQUEST_SECONDS: Final = 30.0
# A watch sends an object a line, aiohttp takes lines of twice its buffer, and etcd holds at most
# 1.5 MB an object.
LINE_BYTES: Final = 2**20
# A new kind's storage answers 429 for some 20 ms; it is given this many times 50 ms.
STORAGE_TRIES, STORAGE_PAUSE = 100, 0.05

log = logging.getLogger("trunkline.dev.kube")


class KubeconfigError(ValueError):
    """A kubeconfig that this client cannot use; the text says why."""


class ApiError(Exception):
    """The API server said no; `reason` is its word for it, as in "NotFound" or "Conflict"."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(f"{status} {reason}: {message}" if reason else f"{status}: {message}")
        self.status, self.message, self.reason = status, message, reason


class Expired(TimeoutError):
    """The cluster did not become as expected in time; the text shows what was there instead."""


class Api:
    """The API server that a kubeconfig's current context names; an async context manager.

    Certificates must be files, as in the kubeconfig that `ControlPlane` writes.
    """

    def __init__(self, kubeconfig: Path) -> None:
        self.server, self.authority, self.certificate = _credentials(kubeconfig)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        tls = ssl.create_default_context(cafile=self.authority)
        tls.load_cert_chain(*self.certificate)
        self._session = aiohttp.ClientSession(
            self.server,
            connector=aiohttp.TCPConnector(ssl=tls, limit=0),
            read_bufsize=LINE_BYTES,
            timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        self._session = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use Api as an async context manager")
        return self._session

    async def request(
        self, method: str, path: str, body: Json | None = None, *, media: str = JSON, **params: str
    ) -> Json:
        """One request and its answer; raises ApiError for a refusal."""
        data = None if body is None else json.dumps(body)
        for _ in range(STORAGE_TRIES):
            async with self.session.request(
                method, path, data=data, headers={"Content-Type": media}, params=params
            ) as response:
                text = await response.text()
            if response.status < 400:
                answer: Json = json.loads(text)
                return answer
            error = _refusal(response.status, text)
            if "(re)initializing" not in error.message:
                break
            await asyncio.sleep(STORAGE_PAUSE)
        raise error

    async def get(self, path: str) -> Json:
        return await self.request("GET", path)

    async def list(self, path: str, **params: str) -> Objects:
        """The objects of a collection; `params` as in `labelSelector="a=b"`."""
        items: Objects = (await self.request("GET", path, None, **params))["items"]
        return items

    async def create(self, path: str, body: Json) -> Json:
        """Creates in the collection at `path`."""
        return await self.request("POST", path, body)

    async def patch(self, path: str, body: Json, *, media: str = MERGE) -> Json:
        return await self.request("PATCH", path, body, media=media)

    async def apply(self, path: str, manifest: Json, manager: str = FIELD_MANAGER) -> Json:
        """Server-side apply of the object at `path`, taking over what others own."""
        return await self.request(
            "PATCH", path, manifest, media=APPLY, fieldManager=manager, force="true"
        )

    async def delete(self, path: str, options: Json | None = None) -> None:
        """Deletes what is there; fine if nothing is, or (by a precondition) something else by now."""
        try:
            await self.request("DELETE", path, options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def follow(
        self, path: str, *, troubled: Callable[[str], None] = log.warning, **params: str
    ) -> AsyncGenerator[dict[str, Json], None]:
        """Yields the objects of a collection by uid: at once, after every change, and now and then.

        It goes on through every trouble (no such kind yet, a server that restarts, a version that is
        too old), tells `troubled`, and starts again with a fresh list. The dict is the caller's only
        until the next turn. Close it with `contextlib.aclosing`.
        """
        pause = RETRY_SECONDS
        while True:
            try:
                listing = await self.request("GET", path, None, **params)
                pause = RETRY_SECONDS
                objects = {item["metadata"]["uid"]: item for item in listing["items"]}
                yield objects
                version = listing["metadata"]["resourceVersion"]
                async with contextlib.aclosing(self._watch(path, version, params)) as events:
                    async for event in events:
                        item = event["object"]
                        if event["type"] == "DELETED":
                            objects.pop(item["metadata"]["uid"], None)
                        else:
                            objects[item["metadata"]["uid"]] = item
                        yield objects
            except (aiohttp.ClientError, TimeoutError, ApiError) as error:
                troubled(f"{path}: {error!r}" if not str(error) else f"{path}: {error}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX_SECONDS)

    async def _watch(
        self, path: str, version: str, params: dict[str, str]
    ) -> AsyncGenerator[Json, None]:
        query = {"watch": "1", "timeoutSeconds": str(RELIST_SECONDS), "resourceVersion": version}
        timeout = aiohttp.ClientTimeout(total=RELIST_SECONDS + REQUEST_SECONDS)
        async with self.session.get(path, params=params | query, timeout=timeout) as response:
            if response.status >= 400:
                raise _refusal(response.status, await response.text())
            try:
                async for line in response.content:
                    event: Json = json.loads(line)
                    if event["type"] == "ERROR":
                        if event["object"].get("code") == 410:  # Too old: a fresh list tells.
                            return
                        raise _refusal(500, json.dumps(event["object"]))
                    yield event
            finally:
                # A TLS connection that is closed while a watch goes on says goodbye and waits for an
                # answer, longer than the event loop may live.
                if response.connection and response.connection.transport:
                    response.connection.transport.abort()

    async def wait_for(
        self,
        path: str,
        predicate: Callable[[Objects], bool],
        timeout: float = 30.0,
        **params: str,
    ) -> Objects:
        """Waits until the objects of a collection (by name) are as wanted, and returns them.

        Raises Expired, whose text says what the objects looked like last.
        """
        found: Objects = []
        trouble = [""]

        def remember(text: str) -> None:
            trouble[0] = text

        changes = self.follow(path, troubled=remember, **params)
        try:
            async with asyncio.timeout(timeout), contextlib.aclosing(changes):
                async for objects in changes:
                    trouble[0] = ""
                    found = sorted(objects.values(), key=lambda item: str(item["metadata"]["name"]))
                    if predicate(found):
                        return found
        except TimeoutError:
            pass
        seen = "\n".join(filter(None, [*trouble, *map(summary, found)])) or "there was nothing"
        raise Expired(f"{path} was not as expected within {timeout:g} s:\n{seen}")

    async def wait_for_one(
        self, path: str, predicate: Callable[[Json], bool] = bool, timeout: float = 30.0
    ) -> Json:
        """Waits until the one object at `path` exists and is as wanted, and returns it."""
        collection, _, name = path.rpartition("/")
        selector = f"metadata.name={name}"

        def holds(items: Objects) -> bool:
            return any(predicate(item) for item in items)

        return (await self.wait_for(collection, holds, timeout, fieldSelector=selector))[0]

    async def wait_gone(self, path: str, timeout: float = 30.0) -> None:
        """Waits until there is no object at `path`."""
        collection, _, name = path.rpartition("/")
        selector = f"metadata.name={name}"
        await self.wait_for(collection, lambda items: not items, timeout, fieldSelector=selector)


def condition(thing: Json, kind: str) -> Json:
    """The condition of that type in an object's status, or {}; conditions may be null."""
    found: list[Json] = (thing.get("status") or {}).get("conditions") or []
    return next((entry for entry in found if entry["type"] == kind), {})


def is_true(thing: Json, kind: str) -> bool:
    """Whether an object's status has the condition, and has it true."""
    return condition(thing, kind).get("status") == "True"


def summary(thing: Json) -> str:
    """A line for people: name, and the status without the noise."""
    metadata, status = thing["metadata"], thing.get("status") or {}
    words = [f"{thing.get('kind', '')} {metadata['name']}".strip()]
    if "deletionTimestamp" in metadata:
        words.append("terminating")
    for key, value in status.items():
        if isinstance(value, str | int | float | bool):
            words.append(f"{key}={value}")
    for entry in status.get("conditions") or []:
        told = " ".join(filter(None, (entry.get("reason"), entry.get("message"))))
        words.append(f"{entry['type']}={entry['status']}" + (f" ({told})" if told else ""))
    containers = status.get("containerStatuses") or []
    words += [f"{container['name']}: {json.dumps(container['state'])}" for container in containers]
    return ", ".join(words)


def _refusal(status: int, text: str) -> ApiError:
    """The API server answers with a Status object, or, before it is ready, with plain text."""
    try:
        answer = json.loads(text)
        return ApiError(
            answer.get("code") or status, str(answer["message"]), str(answer.get("reason", ""))
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return ApiError(status, text.strip()[:500] or "no explanation")


def _credentials(kubeconfig: Path) -> tuple[str, str, tuple[str, str]]:
    """(server, authority's file, (certificate's file, key's file)) of the current context."""
    try:
        config = yaml.safe_load(kubeconfig.read_text())
        context = _named(config, "contexts", config["current-context"])["context"]
        cluster = _named(config, "clusters", context["cluster"])["cluster"]
        user = _named(config, "users", context["user"])["user"]
        files = user["client-certificate"], user["client-key"]
        return cluster["server"], cluster["certificate-authority"], files
    except OSError as error:
        raise KubeconfigError(f"cannot read the kubeconfig {kubeconfig}: {error}") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise KubeconfigError(
            f"{kubeconfig} is no kubeconfig of a development cluster (certificates as files): "
            f"{error!r}; start one with python -m trunkline_dev.controlplane"
        ) from error


def _named(config: Json, section: str, name: str) -> Json:
    entries: list[Json] = config[section]
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise KeyError(f"{section}: {name}")
