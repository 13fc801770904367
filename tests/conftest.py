"""What several test modules share: one real control plane a session, started by the first that asks."""

import itertools
import os
from collections.abc import AsyncIterator, Iterator

import pytest
from burst_rig import GOOD
from hypothesis import settings
from tls_rig import Links, Pki

from trunkline_dev import binaries
from trunkline_dev.controlplane import ControlPlane, to_stderr
from trunkline_dev.kube import Api
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config

# moshi reads it when it is imported, by whichever test comes first: without it a first step compiles for 20 s.
os.environ.setdefault("NO_TORCH_COMPILE", "1")

# How long an example takes is a matter of what else the machine does.
settings.register_profile("trunkline", deadline=None)
settings.load_profile("trunkline")

_numbers = itertools.count(1)

LONGEST = (
    "test_demo",
    "test_machine",
    "test_tls_machine",
    "test_machine_moshi",
    "test_burst_scenario",
    "test_moshi_slots",
    "test_bench_gateway",
    "test_bench_reconcile",
    "test_operator_kill",
    "test_operator_random",
    "test_operator_trouble",
    "test_moshi_bench",
    "test_gateway_rush",
    "test_gateway_decisions",
)
"""Files that take a minute and more, begun first: else the last minutes wait for one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepares the control plane's programs outside of any test's time: a compilation takes minutes."""
    wanted = any("control_plane" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        try:
            binaries.prepare(say=reporter.write_line if reporter else to_stderr)
        except binaries.NoBinaries as error:
            raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """A control plane without controllers; nothing in it is deleted unless a test does so."""
    with ControlPlane() as plane:
        yield plane


@pytest.fixture
async def api(control_plane: ControlPlane) -> AsyncIterator[Api]:
    async with Api(control_plane.kubeconfig) as client:
        yield client


@pytest.fixture
async def namespace(api: Api) -> AsyncIterator[str]:
    """The name of a new namespace; its pods go at once when the test ends."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    await api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    await api.delete(f"/api/v1/namespaces/{name}/pods", {"gracePeriodSeconds": 0})


@pytest.fixture
async def modal(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LocalModal]:
    """A local Modal that knows the good credentials of burst_rig and forks nothing; SDKs in here and below speak to it."""
    tokens = {GOOD.token_id: GOOD.token_secret}
    config = Config(clones=0, api_tokens=tokens, proxy_tokens={"wk-1": "ws-1"})
    async with LocalModal(config) as modal:
        monkeypatch.setenv("MODAL_SERVER_URL", modal.server_url)
        yield modal


@pytest.fixture
def addresses() -> str:
    """A loopback network for a node's pods that no other test has, nor one that runs beside this."""
    number = os.getpid() * 8 + next(_numbers) % 8
    return f"127.{100 + number // 256 % 100}.{number % 256}.0/24"


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """The CA of an installation, and what it has signed."""
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["plain", "tls"])
def links(request: pytest.FixtureRequest, pki: Pki) -> Iterator[None]:
    """For tests of what must be the same on plain links and on TLS."""
    Links.pki = pki if request.param == "tls" else None
    yield
    Links.pki = None
