"""Which addresses stand behind a Service, from its EndpointSlices.

DNS says the same of a headless Service, but where it is cached (CoreDNS with `ttl 30`, NodeLocal DNSCache) up to half a
minute later.
"""

from collections.abc import Callable
from typing import Final

from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.mirror import DELETED
from trunkline_operator.cluster.watch import Watch

# A slice has 100 endpoints at most as the control plane makes it, and 1,000 as the API allows.
PAGE: Final = 100
LABEL: Final = "kubernetes.io/service-name"  # of a slice


def service_of(host: str) -> tuple[str, str] | None:
    """Namespace and name of the Service whose DNS name in the cluster this is; None where it is none of one."""
    match host.rstrip(".").split("."):
        case [name, namespace, "svc", *_]:
            return namespace, name
    return None


class Endpoints:
    """Of one Service.

    `changed` is called with all its addresses, first when they have been listed. With None where it has no slice: the
    control plane makes one for each Service that has a selector, though there be no pod.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        changed: Callable[[frozenset[str] | None], None],
    ) -> None:
        self._cluster = cluster
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._label = f"{LABEL}={name}"
        self._changed = changed
        self._slices: dict[str, frozenset[str]] = {}
        self._said: list[frozenset[str] | None] = []  # the last

    def __repr__(self) -> str:
        return f"Endpoints({self._label}: {self._said})"

    async def follow(self) -> None:
        """Lists and watches until cancelled."""
        await Watch(
            cluster=self._cluster,
            path=self._path,
            label=self._label,
            read=listed.endpoint_slice,
            lists=self._list,
            hear=self._hear,
        ).follow()

    async def _list(self) -> int:
        found, version = dict[str, frozenset[str]](), 0
        async for page in self._cluster.pages(self._path, listed.slices, PAGE, self._label):
            version = page.version
            found |= {item["metadata"]["name"]: addresses_in(item) for item in page.items}
        self._slices = found
        self._tell()
        return version

    def _hear(self, kind: str, item: listed.Slice) -> None:
        if kind == DELETED:
            self._slices.pop(item["metadata"]["name"], None)
        else:
            self._slices[item["metadata"]["name"]] = addresses_in(item)
        self._tell()

    def _tell(self) -> None:
        now = frozenset[str]().union(*self._slices.values()) if self._slices else None
        if self._said != [now]:
            self._said = [now]
            self._changed(now)


def addresses_in(item: listed.Slice) -> frozenset[str]:
    """Ready or not: a headless Service that publishes those, too, is how gateways are found before they are ready."""
    return frozenset(
        address for endpoint in item.get("endpoints") or () for address in endpoint["addresses"]
    )
