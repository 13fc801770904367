"""The one client of the Kubernetes API: raw JSON in and out, a verb a method.

Every verb may be sent twice without harm (creates have fixed names, patches and deletes carry what they
expect to find), so all of them are tried again after 429, a server's error or a broken connection.
"""

import asyncio
import contextlib
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlencode

import aiohttp
import msgspec
import yaml
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from trunkline_operator.cluster.listed import Item, Page, Reader
from trunkline_operator.config import ConfigError
from trunkline_operator.metrics import REQUESTS
from trunkline_runtime.contract import GROUP, PLURAL, VERSION

Json = dict[str, Any]
Answer = TypeVar("Answer")

FIELD_MANAGER: Final = "trunkline-operator"
# A healthy API server answers in milliseconds, and a list of 10,000 pods in seconds.
TIMEOUT: Final = aiohttp.ClientTimeout(total=20, connect=5)
# 0.1 + 0.2 + 0.4 s: over a restart of one of several API servers. Whoever asked tries again later.
TRIES: Final = 4
FIRST_DELAY: Final = 0.1
LONGEST_RETRY_AFTER: Final = 5.0
TRANSIENT: Final = frozenset({429, 500, 502, 503, 504})

MERGE: Final = "application/merge-patch+json"
APPLY: Final = "application/apply-patch+yaml"

COLLECTIONS: Final = {
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Event": "/api/v1/namespaces/{}/events",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Service": "/api/v1/namespaces/{}/services",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "VoiceAgent": f"/apis/{GROUP}/{VERSION}/namespaces/{{}}/{PLURAL}",
}
"""Where the objects of a kind are."""

AGENTS: Final = f"/apis/{GROUP}/{VERSION}/{PLURAL}"
"""All agents of all namespaces."""

REVIEWS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
NODES: Final = "/api/v1/nodes"
PODS: Final = "/api/v1/pods"
"""All pods of all namespaces."""


class ApiError(Exception):
    """What the API server answered instead. Status 0: nothing answered.

    `reason` is a word of the API ("NotFound", "Conflict", "Invalid", …), `message` its sentence, `wait` the seconds
    that it asks to be left alone for.
    """

    def __init__(self, status: int, reason: str, message: str, wait: float = 0.0) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status = status
        self.reason = reason
        self.message = message
        self.wait = wait

    @property
    def lasting(self) -> bool:
        """The same request would be answered so again: somebody must act (a quota, a right, a value)."""
        return 400 <= self.status < 500 and self.status not in (409, 429)


def path(kind: str, namespace: str, name: str | None = None) -> str:
    """The path of an object, or of all of its kind in a namespace."""
    collection = COLLECTIONS[kind].format(namespace)
    return collection if name is None else f"{collection}/{name}"


def retry_delay(attempt: int, asked: float) -> float:
    """Seconds before the next try, where the server asks for so many."""
    return max(FIRST_DELAY * 2.0**attempt * random.uniform(0.5, 1.5), asked)


def asked_wait(retry_after: str | None) -> float:
    """The seconds that a server asks for, up to a bound."""
    # The other form of the header is a date, which the API server never sends.
    asked = float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
    return min(asked, LONGEST_RETRY_AFTER)


class Cluster:
    """A connection to the API server; an asynchronous context manager."""

    def __init__(self, configuration: Any, env: Mapping[str, str]) -> None:
        self._configuration = configuration
        self._env = env
        # Like kopf, heed only the kubeconfig's proxy: a proxy from the environment would also get
        # requests to loopback, which no other client of Kubernetes sends there.
        configuration.client_session_kwargs = {"trust_env": False}
        # Each watch keeps a connection, one for each namespace; how many requests there are is bounded by who asks.
        configuration.connection_pool_maxsize = 0
        self._rest = RESTClientObject(configuration)
        self.may_write: Callable[[], bool] = lambda: True
        """Asked before each request that changes something; see `trunkline_operator.cluster.leader`."""

    @classmethod
    async def connect(cls, env: Mapping[str, str] = os.environ) -> Self:
        """The cluster of $KUBECONFIG, else the one this runs in, else the one of ~/.kube/config."""
        return cls(await load_configuration(env), env)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._rest.close()

    @property
    def server(self) -> str:
        return str(self._configuration.host)

    @property
    def configuration(self) -> Any:
        """Where the server is and how to reach it, as the Kubernetes client keeps it."""
        return self._configuration

    async def authorization(self) -> str | None:
        """The value of the header, from a token file that is read anew each minute."""
        header: str | None = await self._configuration.get_api_key_with_prefix("BearerToken")
        return header

    async def log_in_again(self) -> None:
        """Renews a credential that expired, for example one from a plug-in of the kubeconfig.

        Raises ApiError with status 401 where it cannot be read, as it may not be while somebody writes it.
        """
        try:
            self._configuration.api_key = (await load_configuration(self._env)).api_key
        except ConfigError as error:
            raise ApiError(401, "Unauthorized", str(error)) from error

    # --- the verbs ----------------------------------------------------------------------------------

    async def get(self, path: str) -> Json:
        return await self._request("GET", path)

    async def find(self, path: str) -> Json | None:
        """The object, or None if there is none."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, path: str, labels: Mapping[str, str] | None = None) -> "list[Json]":
        selector = ",".join(f"{name}={value}" for name, value in (labels or {}).items())
        answer = await self._request(
            "GET", path, params={"labelSelector": selector} if selector else {}
        )
        items: list[Json] = answer["items"]
        return items

    async def some(self, path: str, fields: Mapping[str, str], most: int) -> Sequence[Json]:
        """At most so many objects that have these fields."""
        selector = ",".join(f"{name}={value}" for name, value in fields.items())
        params = {"fieldSelector": selector, "limit": str(most)}
        answer = await self._request("GET", path, params=params)
        items: Sequence[Json] = answer["items"]
        return items

    async def pages(
        self, path: str, read: Reader[Item], size: int, label: str = ""
    ) -> AsyncIterator[Page[Item]]:
        """All objects that have that label, page by page.

        Raises ApiError 410 if it takes so long that the API server has forgotten that version.
        """
        params = {"limit": str(size)} | ({"labelSelector": label} if label else {})
        while True:
            page = await self._answered(read, "GET", path, params=params)
            yield page
            if not page.rest:
                return
            params["continue"] = page.rest

    async def create(self, path: str, body: Json) -> Json | None:
        """The new object, or None if that name is taken. A field that the server does not know is an error."""
        try:
            # Left to itself the server drops it, and a misspelt affinity would be none.
            return await self._request("POST", path, body, params={"fieldValidation": "Strict"})
        except ApiError as error:
            if error.reason == "AlreadyExists":
                return None
            raise

    async def patch(self, path: str, body: Json) -> Json:
        """Merges. `metadata.resourceVersion` or `.uid` in the body must be what is there, else Conflict."""
        try:
            return await self._request("PATCH", path, body, media=MERGE)
        except ApiError as error:
            # Said of a uid as of any field that never changes; it means that another has the name.
            if error.reason == "Invalid" and "metadata.uid" in error.message:
                raise ApiError(409, "Conflict", error.message) from error
            raise

    async def apply(self, path: str, body: Json) -> Json:
        """Makes the object so, and takes over fields that others hold (server-side apply)."""
        params = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._request("PATCH", path, body, media=APPLY, params=params)

    async def delete(self, path: str, uid: str) -> Json | None:
        """Deletes that very object; what the API says of it, or None if it is gone, or another has its name by now."""
        try:
            return await self._request("DELETE", path, {"preconditions": {"uid": uid}})
        except ApiError as error:
            if error.status in (404, 409):
                return None
            raise

    async def may(self, verb: str, resource: str, *, group: str = "", namespace: str = "") -> bool:
        """Whether this client has a right on a resource, of the core group and in all namespaces unless others are named."""
        attributes = {"verb": verb, "resource": resource, "group": group, "namespace": namespace}
        body = {"spec": {"resourceAttributes": attributes}}
        answer = await self._request("POST", REVIEWS, body)
        return answer["status"]["allowed"] is True

    # --- one request --------------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        media: str = "application/json",
        params: Mapping[str, str] | None = None,
    ) -> Json:
        return await self._answered(_json, method, path, body, media=media, params=params)

    async def _answered(
        self,
        read: Callable[[bytes], Answer],
        method: str,
        path: str,
        body: Json | None = None,
        *,
        media: str = "application/json",
        params: Mapping[str, str] | None = None,
    ) -> Answer:
        url = f"{self.server}{path}?{urlencode(params)}" if params else self.server + path
        renewed = False
        for attempt in range(TRIES):
            if method != "GET" and not self.may_write():
                raise ApiError(0, "NotLeader", "nothing is written without the Lease")
            try:
                response = await self._send(method, url, body, media)
                status, text = response.status, await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as failure:
                error = unreachable(self.server, failure)
                REQUESTS.labels(verb(method, media), resource(path), "0").inc()
            else:
                REQUESTS.labels(verb(method, media), resource(path), str(status)).inc()
                if status < 400:
                    try:
                        return read(text)
                    except (ValueError, msgspec.MsgspecError) as failure:
                        raise ApiError(status, "Unreadable", f"{path}: {failure}") from failure
                error = refused(response, text)
                if status == 401 and not renewed:
                    renewed = True
                    await self.log_in_again()
                    continue
                if status not in TRANSIENT:
                    raise error
            if attempt + 1 < TRIES:
                await asyncio.sleep(retry_delay(attempt, error.wait))
        raise error

    @contextlib.asynccontextmanager
    async def watching(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """An answer that goes on until the server ends it. Raises ApiError, also for one that is silent for so many seconds."""
        url = f"{self.server}{path}?{urlencode(params)}"
        limits = aiohttp.ClientTimeout(connect=TIMEOUT.connect, sock_read=silence)
        try:
            response = await self._send("GET", url, None, "application/json", limits)
            if response.status == 401:
                response.close()
                await self.log_in_again()
                response = await self._send("GET", url, None, "application/json", limits)
            REQUESTS.labels("watch", resource(path), str(response.status)).inc()
            try:
                if response.status >= 400:
                    raise refused(response, await response.read())
                yield response.content
            finally:
                # TLS would say goodbye to a server that goes on to send, and wait for its answer.
                if response.connection and response.connection.transport:
                    response.connection.transport.abort()
                response.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            REQUESTS.labels("watch", resource(path), "0").inc()
            raise unreachable(self.server, failure) from failure

    async def _send(
        self,
        method: str,
        url: str,
        body: Json | None,
        media: str,
        limits: aiohttp.ClientTimeout = TIMEOUT,
    ) -> aiohttp.ClientResponse:
        # The API server compresses answers above 128 KiB for whoever takes that. Between machines of one
        # cluster that costs more time than it saves, as client-go's controllers found (DisableCompression).
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Content-Type": media,
            "User-Agent": "trunkline-operator",  # audit logs and managed fields name us so
        }
        if authorization := await self.authorization():
            headers["Authorization"] = authorization
        answer = await self._rest.request(
            method, url, headers=headers, body=body, _request_timeout=limits
        )
        response: aiohttp.ClientResponse = answer.response
        return response


def _json(text: bytes) -> Json:
    answer: Json = msgspec.json.decode(text)  # in a third of json's time
    return answer


def ended(deleted: Json) -> bool:
    """Whether the API's answer to a delete says that the object is gone: nobody had to be waited for.

    So it is with a pod that has no node. Its grace is then 0, and with finalizers it would still be there
    (k8s.io/apiserver pkg/registry/generic/registry/store.go, `Store.Delete`).
    """
    metadata = deleted.get("metadata") or {}
    return metadata.get("deletionGracePeriodSeconds") == 0 and not metadata.get("finalizers")


VERBS: Final = {"GET": "get", "POST": "create", "DELETE": "delete", "PATCH": "patch"}


def verb(method: str, media: str) -> str:
    return "apply" if media == APPLY else VERBS[method]


def resource(path: str) -> str:
    """ "pods", "voiceagents/status": what a path is about, without names."""
    parts = path.partition("/namespaces/")[2].split("/")[1:] or path.split("/")[-1:]
    return "/".join(parts[::2])


def refused(response: aiohttp.ClientResponse, text: bytes) -> ApiError:
    try:
        answer = json.loads(text)
    except ValueError:  # a load balancer's page
        answer = {"message": text[:200].decode(errors="replace")}
    status, wait = response.status, asked_wait(response.headers.get("Retry-After"))
    return ApiError(status, answer.get("reason") or str(status), answer.get("message") or "", wait)


def unreachable(server: str, failure: Exception) -> ApiError:
    why = str(failure) or type(failure).__name__
    return ApiError(0, "Unreachable", f"cannot reach the Kubernetes API at {server}: {why}")


async def load_configuration(env: Mapping[str, str]) -> Any:
    """Reads how to reach the API server; ConfigError says what to set."""
    configuration = Configuration()
    home = Path(env.get("HOME", "/")) / ".kube" / "config"
    try:
        if files := env.get("KUBECONFIG"):
            await load_kube_config(config_file=files, client_configuration=configuration)
        elif env.get("KUBERNETES_SERVICE_HOST"):
            load_incluster_config(client_configuration=configuration)
        elif home.exists():
            await load_kube_config(config_file=str(home), client_configuration=configuration)
        else:
            raise ConfigError(
                "no Kubernetes cluster is known: set KUBECONFIG, or start one with `trunkline dev`"
            )
    except (ConfigException, yaml.YAMLError, OSError, TypeError, ValueError) as error:
        where = files or ("the service account" if env.get("KUBERNETES_SERVICE_HOST") else home)
        raise ConfigError(f"cannot read how to reach the cluster from {where}: {error}") from error
    return configuration
