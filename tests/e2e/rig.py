"""A cluster as an administrator and a caller see it: kubectl, Helm, a local Modal beside it, and sockets."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from helm_python import Chart, Config

from trunkline_dev.accounts import Account, account
from trunkline_dev.callers import Holder, slot_records
from trunkline_dev.processes import Process, base_environment
from trunkline_dev.slot_log import SlotRecord, parse_slot_log, read_slot_log
from trunkline_runtime import contract
from trunkline_runtime.caller import Line

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts/trunkline"
RELEASE, HOME = "trunkline", "trunkline-system"
AGENTS: Final = "e2e-agents"
SOON: Final = 120.0
"""For whatever a cluster does by itself. A bound, not an expectation: a busy machine takes its time."""
POLL_SECONDS: Final = 0.25
PROXY_TOKEN: Final = ("wk-e2e", "ws-e2e")
RESTORE_SECONDS, COLD_SECONDS = 1.0, 2.0

Json = dict[str, Any]


class Refused(Exception):
    """A command failed; the text is what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubectl:
    """The real kubectl, with one kubeconfig."""

    program: Path
    kubeconfig: Path

    async def __call__(
        self, *words: str, stdin: str | None = None, within: float = SOON, namespace: str = ""
    ) -> str:
        """What it printed; raises Refused with what it complained about."""
        where = ("--namespace", namespace) if namespace else ()
        child = await asyncio.create_subprocess_exec(
            str(self.program),
            *("--kubeconfig", str(self.kubeconfig), *where, *words),
            env=os.environ | {"NO_PROXY": "*"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(within):
                out, err = await child.communicate(None if stdin is None else stdin.encode())
        except TimeoutError:
            raise Refused(f"kubectl {' '.join(words)} took more than {within:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode:
            raise Refused(f"kubectl {' '.join(words)}: {err.decode().strip()}")
        return out.decode()

    async def get(self, *words: str, namespace: str = "") -> Json:
        found: Json = json.loads(await self("get", *words, "-o", "json", namespace=namespace))
        return found

    async def items(self, *words: str, namespace: str = "") -> list[Json]:
        found: list[Json] = (await self.get(*words, namespace=namespace))["items"]
        return found

    async def apply(self, *bodies: Mapping[str, Any], namespace: str = "") -> str:
        text = yaml.safe_dump_all([dict(body) for body in bodies])
        return await self("apply", "-f", "-", stdin=text, namespace=namespace)

    async def condition(
        self, agent: str, kind: str, status: str = "True", within: float = SOON
    ) -> Json:
        """Waits until an agent's condition is so, and returns it."""
        kinds = f"--for=condition={kind}={status}"
        try:
            await self(
                *("wait", f"va/{agent}", kinds, f"--timeout={within:g}s"),
                namespace=AGENTS,
                within=within + 10,
            )
        except Refused as error:
            told = await self("describe", f"va/{agent}", namespace=AGENTS)
            pods = await self("get", "pods", "-A", "-o", "wide")
            raise AssertionError(f"{error}\n{told}\n{pods}") from error
        found = await self.get(f"va/{agent}", namespace=AGENTS)
        return condition_of(found, kind)


def condition_of(thing: Json, kind: str) -> Json:
    conditions: list[Json] = thing.get("status", {}).get("conditions") or []
    return next((it for it in conditions if it["type"] == kind), {})


async def until(holds: Callable[[], Awaitable[object]], what: str, within: float = SOON) -> None:
    """Asks until the answer is true; raises AssertionError, which says what was waited for."""
    deadline = time.monotonic() + within
    while not (last := await holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s: {what} (last: {last!r})")
        await asyncio.sleep(POLL_SECONDS)


class LocalModal:
    """A local Modal, as a process beside the cluster that pods reach by its URL."""

    def __init__(self, address: str, folder: Path) -> None:
        self.logs = folder / "containers"
        self.logs.mkdir(parents=True)
        self._process = Process(
            "modal",
            (
                *(sys.executable, "-m", "trunkline_dev.modal", f"--host={address}"),
                *(f"--cold-seconds={COLD_SECONDS}", f"--restore-seconds={RESTORE_SECONDS}"),
                *(f"--proxy-token={':'.join(PROXY_TOKEN)}", f"--logs={self.logs}"),
            ),
            folder / "modal.log",
            base_environment(),
        )
        self.url = self._local_url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["LocalModal"]:
        self._process.start()
        try:
            ready = json.loads(await self._process.first_line(SOON))
            self.url, self._local_url = ready["server_url"], ready["local_url"]
            yield self
        finally:
            await self._process.stop()

    async def ask(self, what: str) -> list[Json]:
        """`apps` or `containers`."""
        async with httpx.AsyncClient(trust_env=False, timeout=10.0) as client:
            answer = await client.get(f"{self._local_url}/_local/{what}")
            found: list[Json] = answer.raise_for_status().json()
            return found

    async def deployed(self) -> list[str]:
        return [app["name"] for app in await self.ask("apps") if app["state"] == "deployed"]

    async def containers(self) -> int:
        return sum(it["end_t"] is None for it in await self.ask("containers"))


@dataclass(slots=True, kw_only=True)
class Site:
    """A cluster with Trunkline's chart in it, or about to be."""

    kubectl: Kubectl
    values: Json
    """For Helm: what a cluster needs, such as another registry."""
    modal: LocalModal
    node_address: str
    gpus: Callable[[int], Awaitable[None]] | None
    """Makes the node claim so many GPUs; None where it has real ones."""
    gateway_url: str = ""
    helm: Config = field(init=False)

    def __post_init__(self) -> None:
        self.helm = Config(namespace=HOME, kubeconfig_path=str(self.kubectl.kubeconfig))

    async def install(self, name: str = RELEASE, **values: Any) -> None:
        chart = Chart.load(str(CHART))
        await asyncio.to_thread(
            self.helm.install,
            chart,
            name,
            merged(self.values, values),
            create_namespace=True,
            wait="watcher",
            timeout=int(SOON),
        )
        if name == RELEASE:
            await self.find_gateway()

    async def upgrade(self, **values: Any) -> None:
        chart = Chart.load(str(CHART))
        await asyncio.to_thread(
            self.helm.upgrade, chart, RELEASE, merged(self.values, values), timeout=int(SOON)
        )

    async def find_gateway(self) -> None:
        service = await self.kubectl.get(f"service/{RELEASE}-gateway", namespace=HOME)
        port = next(it["nodePort"] for it in service["spec"]["ports"] if it["name"] == "calls")
        self.gateway_url = f"http://{self.node_address}:{port}"

    async def agent(self, name: str, namespace: str = AGENTS, **spec: Any) -> None:
        """Applies a loopback agent, open to all, with these groups of its spec."""
        body = {
            "apiVersion": f"{contract.GROUP}/{contract.VERSION}",
            "kind": contract.KIND,
            "metadata": {"name": name},
            "spec": {"engine": {"type": "loopback"}, "access": {"public": True}} | spec,
        }
        await self.kubectl.apply(body, namespace=namespace)

    async def modal_credentials(self, namespace: str) -> None:
        """The Secret `modal` that agents with burst name."""
        entries = {"token-id": "ak-e2e", "token-secret": "as-e2e"}
        entries |= {"proxy-token-id": PROXY_TOKEN[0], "proxy-token-secret": PROXY_TOKEN[1]}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "modal"}}
        await self.kubectl.apply(body | {"stringData": entries}, namespace=namespace)

    async def call(self, agent: str, namespace: str = AGENTS) -> Holder:
        """A caller who is answered, or the test fails."""
        line = Line(url=self.gateway_url, model=f"{namespace}/{agent}")
        holder = await Holder(line).settled()
        outcome = holder.outcome
        assert outcome.answered is not None, outcome
        return holder

    async def pods(self, agent: str, namespace: str = AGENTS) -> list[Json]:
        return await self.kubectl.items(
            "pods", "-l", f"{contract.LABEL_AGENT}={agent}", namespace=namespace
        )

    async def component(self, name: str) -> list[Json]:
        """The release's pods of a component that are not on their way out."""
        label = f"app.kubernetes.io/component={name}"
        found = await self.kubectl.items("pods", "-l", label, namespace=HOME)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    async def accounts(self, agent: str, holders: list[Holder]) -> Account:
        """The callers' own logs joined with what workers wrote about their slots."""
        outcomes = [holder.outcome for holder in holders]

        async def written() -> list[SlotRecord]:
            records = read_slot_log(self.modal.logs, "burst")
            for pod in await self.pods(agent):
                log = await self.kubectl("logs", pod["metadata"]["name"], namespace=AGENTS)
                records += parse_slot_log(log, "warm")
            return records

        return account(outcomes, await slot_records(outcomes, written))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Json:
    """Helm's way with values: maps are merged, all else is replaced."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found


def ready(pod: Json) -> bool:
    return condition_of(pod, "Ready").get("status") == "True"


@contextlib.asynccontextmanager
async def undisturbed(holders: list[Holder]) -> AsyncIterator[None]:
    """Whatever happens inside, the calls go on: each hears a second of audio that came after it."""
    yield
    heard = await asyncio.gather(*(holder.hears(holder.frames + 12) for holder in holders))
    lost = [holder.outcome for holder, alive in zip(holders, heard, strict=True) if not alive]
    assert not lost, lost


async def hang_up(holders: list[Holder]) -> None:
    await asyncio.gather(*(holder.hang_up() for holder in holders))
    assert not [holder.outcome for holder in holders if holder.outcome.dropped]
