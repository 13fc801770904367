"""The environment of a container, from its spec, its pod and the cluster's Secrets and ConfigMaps."""

import base64
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp

from trunkline_dev.kube import Api, ApiError, Json

# What an image would bring along. Programs installed beside this Python are found first.
INHERITED: Final = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
PATH: Final = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))

_SOURCES: Final = {
    "configMapRef": "configmaps",
    "configMapKeyRef": "configmaps",
    "secretRef": "secrets",
    "secretKeyRef": "secrets",
}
_FIELDS: Final = {
    "metadata.name", "metadata.namespace", "metadata.uid",
    "spec.nodeName", "spec.serviceAccountName",
    "status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs",
}  # fmt: skip


class Misconfigured(Exception):
    """A container cannot be started as its pod describes it; the text says why."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replaces $(NAME) where NAME is known, and $$(NAME) by $(NAME), as Kubernetes does."""

    def replaced(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        return variables.get(match[2], match[0])

    return re.sub(r"(\$?)\$\(([-\w.]+)\)", replaced, text)


class Environment:
    """Resolves the environment of a pod's containers; one object per start of a container."""

    def __init__(self, api: Api, pod: Json, address: str, host: str) -> None:
        self._api, self._pod = api, pod
        self._status = {
            "podIP": address,
            "podIPs": address,
            "hostIP": host,
            "hostIPs": host,
        }
        self._found: dict[str, dict[str, str] | None] = {}

    async def of(self, container: Json) -> dict[str, str]:
        """All variables of the container; raises Misconfigured."""
        variables = {**INHERITED, "PATH": PATH, "HOSTNAME": self._pod["metadata"]["name"]}
        for source in container.get("envFrom") or []:
            kind = next((kind for kind in _SOURCES if kind in source), "")
            if not kind:
                raise Misconfigured(f"envFrom {', '.join(source)} is not known here")
            entries = await self._entries(kind, source[kind])
            variables |= {source.get("prefix", "") + key: text for key, text in entries.items()}
        for entry in container.get("env") or []:
            value = await self._value(entry, variables)
            if value is not None:
                variables[entry["name"]] = value
        return variables

    async def _value(self, entry: Json, variables: Mapping[str, str]) -> str | None:
        source = entry.get("valueFrom")
        if not source:
            return expand(entry.get("value") or "", variables)
        if "fieldRef" in source:
            return self._field(source["fieldRef"]["fieldPath"])
        for kind in ("secretKeyRef", "configMapKeyRef"):
            if reference := source.get(kind):
                entries = await self._entries(kind, reference)
                if reference["key"] in entries:
                    return entries[reference["key"]]
                if reference.get("optional"):
                    return None
                where = f"{_SOURCES[kind]} {reference['name']}"
                raise Misconfigured(f"env {entry['name']}: {where} has no key {reference['key']}")
        raise Misconfigured(f"env {entry['name']}: {', '.join(source)} is not known here")

    async def _entries(self, kind: str, reference: Json) -> dict[str, str]:
        """The entries of a Secret or ConfigMap; {} for an optional one that is not there."""
        home = f"/api/v1/namespaces/{self._pod['metadata']['namespace']}"
        path = f"{home}/{_SOURCES[kind]}/{reference['name']}"
        if path not in self._found:
            self._found[path] = await self._read(path)
        entries = self._found[path]
        if entries is None and not reference.get("optional"):
            raise Misconfigured(
                f"there is no {_SOURCES[kind]} {reference['name']} in the namespace"
            )
        return entries or {}

    async def _read(self, path: str) -> dict[str, str] | None:
        try:
            found: Json = (await self._api.get(path)).get("data") or {}
        except ApiError as error:
            if error.status == 404:
                return None
            raise Misconfigured(f"{path}: {error}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Misconfigured(f"{path} cannot be read: {error!r}") from error
        if "/secrets/" not in path:
            return found
        try:
            return {key: base64.b64decode(text).decode() for key, text in found.items()}
        except UnicodeDecodeError as error:
            raise Misconfigured(
                f"{path} holds bytes that are no text, so no environment"
            ) from error

    def _field(self, path: str) -> str:
        if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return str(self._pod["metadata"].get(match[1], {}).get(match[2], ""))
        if path not in _FIELDS:
            raise Misconfigured(f"fieldRef {path} is not known here")
        value: Any = {**self._pod, "status": self._status}
        for key in path.split("."):
            value = value.get(key, "")
        return str(value)
