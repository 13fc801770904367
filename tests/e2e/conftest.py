"""One cluster for the session: the real node of this machine, or the one that TRUNKLINE_E2E_KUBECONFIG names.

For another cluster, TRUNKLINE_E2E_VALUES may name a file of Helm values (its registry, for instance).
Exit status 3: it cannot run here, and the last line says why.
"""

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import pytest
import pytest_asyncio
import yaml
from e2e.rig import AGENTS, HOME, ROOT, Json, Kubectl, LocalModal, Refused, Site, merged

from trunkline_dev import binaries
from trunkline_dev.cluster import Cluster, ClusterError, default_folder, usable
from trunkline_dev.cluster.cluster import PROGRAMS
from trunkline_dev.cluster.host import link_owner

CANNOT_RUN: Final = 3
ARCHIVES: Final = ROOT / "build/images"
IMAGES: Final = ("gateway", "operator", "worker-cpu")
STORY_SECONDS: Final = 600
EVIDENCE: Final = (
    ("get", "pods", "-A", "-o", "wide"),
    ("describe", "va", "-A"),
    ("get", "events", "-A", "--sort-by=.lastTimestamp"),
    *(
        ("logs", "-n", HOME, "-l", f"app.kubernetes.io/component={it}", "--prefix", "--tail=60")
        for it in ("gateway", "operator")
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A cluster that is up and holds nothing of Trunkline's."""

    kubectl: Kubectl
    cluster: Cluster | None
    """None where it is not ours."""
    values: Json


def say(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)


def cannot(why: str) -> NoReturn:
    pytest.exit(f"e2e cannot run here: {why}", CANNOT_RUN)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(STORY_SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes minutes, once, is no test's time."""
    if session.config.option.collectonly:
        return
    if os.environ.get("TRUNKLINE_E2E_KUBECONFIG"):
        return
    if reason := usable():
        cannot(reason)
    if missing := [str(it) for it in archives() if not it.exists()]:
        cannot(f"there is no {', no '.join(missing)}; `make images` builds them")
    try:
        binaries.prepare((*PROGRAMS, "kubectl"), say=say)
    except binaries.NoBinaries as error:
        cannot(str(error))


def archives() -> list[Path]:
    return [ARCHIVES / f"{name}.tar" for name in IMAGES]


FAILED: Final = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def evidence(request: pytest.FixtureRequest, site: Site) -> AsyncIterator[None]:
    """Shows what the cluster looked like when a test failed: soon it is gone."""
    yield
    if request.node.stash.get(FAILED, False):
        for words in EVIDENCE:
            try:
                say(f"$ kubectl {' '.join(words)}\n{await site.kubectl(*words)}")
            except Refused as error:
                say(str(error))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if kubeconfig := os.environ.get("TRUNKLINE_E2E_KUBECONFIG"):
        yield elsewhere(Path(kubeconfig))
        return
    folder = default_folder()  # Always the same: what a killed run left there goes at the next one.
    try:
        with Cluster(folder, say=say) as cluster:
            cluster.import_images(archives())
            yield Place(
                kubectl=Kubectl(
                    program=binaries.prepare(("kubectl",), say=say) / "kubectl",
                    kubeconfig=cluster.kubeconfig,
                ),
                cluster=cluster,
                values={"image": {"pullPolicy": "Never"}},
            )
    except ClusterError as error:
        pytest.exit(str(error), 1)
    assert link_owner() != str(folder)


def elsewhere(kubeconfig: Path) -> Place:
    program = shutil.which("kubectl")
    if program is None:
        cannot("kubectl is not installed")
    values: Json = {}
    if name := os.environ.get("TRUNKLINE_E2E_VALUES"):
        values = yaml.safe_load(Path(name).read_text())
    kubectl = Kubectl(program=Path(program), kubeconfig=kubeconfig)
    return Place(kubectl=kubectl, cluster=None, values=values)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(place: Place, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """The cluster with a local Modal beside it, and a namespace for agents. Nothing is installed yet."""
    node = await node_address(place.kubectl)
    address = place.cluster.host_address if place.cluster else address_towards(node)
    folder = tmp_path_factory.mktemp("site")
    async with LocalModal(address, folder).running() as modal:
        site = Site(
            kubectl=place.kubectl,
            values=merged(values(modal.url, address), place.values),
            modal=modal,
            node_address=node,
            gpus=gpus(place.cluster),
        )
        await place.kubectl("create", "namespace", AGENTS)
        yield site
        if place.cluster is None:  # Ours goes as a whole.
            for name in (AGENTS, HOME):
                await place.kubectl(
                    "delete", "namespace", name, "--wait=false", "--ignore-not-found"
                )


def gpus(cluster: Cluster | None) -> Callable[[int], Awaitable[None]] | None:
    if cluster is None:
        return None

    async def change(count: int) -> None:
        await asyncio.to_thread(cluster.set_gpus, count)

    return change


def values(modal_url: str, address: str) -> Json:
    """What a test of minutes needs: callers from outside, the local Modal, and short graces."""
    return {
        "gateway": {
            "service": {"type": "NodePort"},
            "defaultNamespace": AGENTS,
            "resources": {"requests": {"cpu": "100m"}},  # up to five at once on two processors
        },
        "operator": {"modalServerUrl": modal_url},
        "networkPolicy": {
            "agentNamespaces": [AGENTS],
            "modal": {"peers": [{"ipBlock": {"cidr": f"{address}/32"}}], "ports": []},
        },
        "uninstall": {"deadlineSeconds": 90},
    }


async def node_address(kubectl: Kubectl) -> str:
    try:
        nodes = await kubectl.items("nodes")
    except Refused as error:
        cannot(str(error))
    addresses = [it for node in nodes for it in node["status"]["addresses"]]
    return next(f"{it['address']}" for it in addresses if it["type"] == "InternalIP")


def address_towards(other: str) -> str:
    """This machine's address on the way to another; nothing is sent."""
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as it:
        it.connect((other, 9))
        host, *_ = it.getsockname()
    return f"{host}"
