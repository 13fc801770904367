"""What callers meet when a part of a whole Trunkline dies or is taken away: real processes, a real API server."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from machine_rig import SOON, agent, answered, calling, pods_of, running, still_echoed, truth, until

from trunkline_dev.accounts import account
from trunkline_dev.callers import Holder, slot_records, spike
from trunkline_dev.demo import AGENTS, PODS, example
from trunkline_dev.kube import condition, is_true
from trunkline_dev.machine import Machine, MachineConfig
from trunkline_dev.slot_log import SlotRecord
from trunkline_dev.spoken import question as spoken_question
from trunkline_runtime import contract
from trunkline_runtime.audio.wav import write_wav
from trunkline_runtime.caller import EndedBy, Line

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]
TRUNKLINE = str(Path(sys.executable).with_name("trunkline"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    """One machine for the module; each test makes its own agent and takes it away."""
    async with Machine(MachineConfig(gateways=2, cold_seconds=0.5, restore_seconds=0.2)) as up:
        await up.modal_credentials()
        yield up


async def lost_calls(machine: Machine, name: str) -> float:
    """What the gateways have counted as lost."""
    total = 0.0
    async with httpx.AsyncClient(trust_env=False) as client:
        for number in range(machine.config.gateways):
            host = machine.gateway_address(number)
            text = (await client.get(f"http://{host}:{contract.HEALTH_PORT}/metrics")).text
            for line in text.splitlines():
                if line.startswith("trunkline_lost_calls_total{") and f"default/{name}" in line:
                    total += float(line.rpartition(" ")[2])
    return total


async def worker_process(machine: Machine, name: str) -> int:
    """The pid behind an agent's first pod."""
    pod = (await machine.api.list(PODS, **pods_of(name)))[0]
    container: str = pod["status"]["containerStatuses"][0]["containerID"]
    return int(container.rpartition("/")[2])


async def test_a_worker_that_dies_in_a_call(machine: Machine) -> None:
    """The caller gets a close code, the pod restarts, the loss is counted, and the next call is answered."""
    async with running(machine, agent("mortal")) as name:
        async with calling(machine, name) as (caller, task):
            os.kill(await worker_process(machine, name), signal.SIGKILL)
            log = await asyncio.wait_for(task, SOON)
        assert log.ended_by is EndedBy.CLOSED
        assert log.close_code == contract.Close.LOST
        assert "call again" in log.close_reason
        assert caller.log().call == log.call
        assert await lost_calls(machine, name) == 1
        await machine.api.wait_for(
            PODS,
            lambda pods: any(
                is_true(pod, "Ready") and pod["status"]["containerStatuses"][0]["restartCount"] == 1
                for pod in pods
            ),
            SOON,
            **pods_of(name),
        )
        # Ready is the kubelet's word; the worker dials the gateways at the same moment.
        await until(lambda: answered(machine, name))


async def test_the_operator_dies_and_comes_back(machine: Machine) -> None:
    """Calls go on, new ones are placed, and the restarted operator touches no pod."""
    async with running(machine, agent("steady")) as name, calling(machine, name) as (caller, _):
        before = (await machine.api.list(PODS, **pods_of(name)))[0]
        machine.operator.kill()
        assert await answered(machine, name)
        await still_echoed(caller)
        machine.operator = machine.start_operator()
        await machine.operator.ready(machine.operator_health, SOON)
        await still_echoed(caller)
        after = (await machine.api.list(PODS, **pods_of(name)))[0]
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        assert after["spec"] == before["spec"]
        assert after["metadata"].get("annotations") == before["metadata"].get("annotations")
        assert await answered(machine, name, gateway=1)


async def test_a_pod_is_deleted_in_a_call(machine: Machine) -> None:
    """As a node drain does: SIGTERM. The call goes on, a new pod takes the next ones, and the old one
    leaves when the call has ended."""
    async with running(machine, agent("evicted")) as name:
        first = (await machine.api.list(PODS, **pods_of(name)))[0]["metadata"]
        async with calling(machine, name) as (caller, task):
            await machine.api.delete(f"{PODS}/{first['name']}")
            await machine.api.wait_for(
                PODS,
                lambda pods: any(
                    is_true(pod, "Ready") and pod["metadata"]["uid"] != first["uid"] for pod in pods
                ),
                SOON,
                **pods_of(name),
            )
            await until(lambda: answered(machine, name))
            await still_echoed(caller)
            assert not task.done()
        await machine.api.wait_for(
            PODS,
            lambda pods: first["uid"] not in {pod["metadata"]["uid"] for pod in pods},
            SOON,
            **pods_of(name),
        )
        assert await lost_calls(machine, name) == 0


async def test_an_agent_is_deleted_in_a_call(machine: Machine) -> None:
    """It is gone at once. The call there goes on, and nothing is left once that has ended."""
    async with running(machine, agent("leaving")) as name:
        async with calling(machine, name) as (caller, task):
            await machine.api.delete(f"{AGENTS}/{name}")
            await machine.api.wait_gone(f"{AGENTS}/{name}", SOON)

            async def refused() -> bool:
                return not await answered(machine, name)

            await until(refused)
            await still_echoed(caller)
            assert not task.done()
            assert await machine.api.list(PODS, **pods_of(name))
        await machine.api.wait_for(PODS, lambda pods: not pods, SOON, **pods_of(name))
        assert await lost_calls(machine, name) == 0


async def test_scale_down_drains_a_busy_pod(machine: Machine) -> None:
    """With a call in each of two pods and room for one, a pod drains: its call goes on to its end."""
    warm = {"slotsPerPod": 1, "minPods": 2, "maxPods": 2, "bufferSlots": 0, "gpu": {"count": 0}}
    body = agent("shrinking", warm=warm)
    async with running(machine, body) as name:
        async with calling(machine, name) as (one, _), calling(machine, name, 1) as (other, _):
            fewer = warm | {"minPods": 1, "maxPods": 1}
            await machine.apply(agent("shrinking", warm=fewer | {"scaleDown": {"delaySeconds": 0}}))
            await machine.api.wait_for(
                PODS,
                lambda pods: any(
                    contract.ANNOTATION_DRAINING in pod["metadata"].get("annotations", {})
                    for pod in pods
                ),
                SOON,
                **pods_of(name),
            )
            await still_echoed(one)
            await still_echoed(other)
            assert len(await machine.api.list(PODS, **pods_of(name))) == 2
        await machine.api.wait_for(PODS, lambda pods: len(pods) == 1, SOON, **pods_of(name))
        assert await lost_calls(machine, name) == 0


async def test_two_gateways_and_more_callers_than_slots(machine: Machine) -> None:
    """30 callers at once, through both gateways, on 12 slots of 3 workers; no burst."""
    warm = {"slotsPerPod": 4, "minPods": 3, "maxPods": 3, "bufferSlots": 0, "gpu": {"count": 0}}
    async with running(machine, agent("crowded", warm=warm)) as name:
        began = time.time()
        halves = await asyncio.gather(
            *(spike(machine.gateway_url(number), name, 15, 0.2) for number in range(2))
        )
        holders = [holder for half in halves for holder in half]
        try:
            outcomes = [holder.outcome for holder in holders]

            async def written() -> list[SlotRecord]:
                return [record for record in machine.slot_log() if record.t >= began]

            found = account(outcomes, await slot_records(outcomes, written))
            assert (found.warm, found.refused) == (12, 18), found
            assert found.kept, found
        finally:
            await asyncio.gather(*(holder.hang_up() for holder in holders))


async def test_modal_is_down(machine: Machine) -> None:
    """The call past warm capacity is told 503 in time, and the condition says why; calls go on."""
    modal = {
        "credentialsSecretRef": {"name": "modal"},
        "gpu": [],
        "slotsPerContainer": 2,
        "maxContainers": 2,
        "scaledownWindowSeconds": 2,
        "startDeadlineSeconds": 2,
    }
    body = agent("stranded", burst={"modal": modal}, session={"answerSeconds": 4})
    await machine.apply(body)
    name = "stranded"
    try:
        await machine.api.wait_for_one(
            f"{AGENTS}/{name}", lambda found: is_true(found, "BurstReady"), SOON
        )
        async with calling(machine, name) as (one, _), calling(machine, name, 1) as (other, _):
            os.kill(machine.modal.pid, signal.SIGSTOP)  # as a provider that answers nothing
            try:
                began = time.monotonic()
                holder = Holder(Line(url=machine.gateway_url(), model=name))
                await holder.settled()
                assert holder.outcome.status == 503
                assert time.monotonic() - began < 6
                found = await machine.api.wait_for_one(
                    f"{AGENTS}/{name}", lambda found: not is_true(found, "BurstReady"), SOON
                )
                assert condition(found, "BurstReady")["message"]
                await still_echoed(one)
                await still_echoed(other)
            finally:
                os.kill(machine.modal.pid, signal.SIGCONT)
        # Modal answers again: so does the agent, without anybody's help.
        async with calling(machine, name), calling(machine, name, 1):
            await until(lambda: answered(machine, name))
    finally:
        await machine.api.delete(f"{AGENTS}/{name}")
        await machine.api.wait_gone(f"{AGENTS}/{name}", SOON)
    assert [app for app in await machine.local_modal("apps") if app["state"] == "deployed"] == []


async def test_trunkline_probe(machine: Machine) -> None:
    """Answered, refused, and where nothing listens."""

    async def probe(*arguments: str) -> tuple[int, str]:
        child = await asyncio.create_subprocess_exec(
            TRUNKLINE, "probe", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        out, _ = await child.communicate()
        return child.returncode or 0, out.decode()

    gateway = ("--gateway", machine.gateway_url())
    async with running(machine, agent("probed")) as name:
        code, out = await probe("--agent", name, *gateway)
        assert (code, f"{name} answered after" in out) == (0, True), out
    code, out = await probe("--agent", "nobody", *gateway)
    assert (code, "refused with 401" in out) == (1, True), out
    code, out = await probe("--agent", "nobody", *gateway, "--expect-refusal")
    assert (code, "answers: 401" in out) == (0, True), out
    code, out = await probe("--agent", "nobody", "--gateway", "http://127.0.0.1:1")
    assert (code, "cannot reach" in out) == (1, True), out


async def test_trunkline_call(machine: Machine, tmp_path: Path) -> None:
    """The command line against a speaking agent: right, with a wrong key, and with no file."""
    from trunkline_runtime.engine.speech import Synthesiser

    question, answer = tmp_path / "question.wav", tmp_path / "answer.wav"
    write_wav(question, Synthesiser()(spoken_question("4271")))
    secret, body = example("front-desk")
    await machine.apply(secret)
    key = secret["stringData"]["demo"]
    async with running(machine, body) as name:

        async def call(*arguments: str) -> tuple[int, str, str]:
            child = await asyncio.create_subprocess_exec(
                TRUNKLINE, "call", "--gateway", machine.gateway_url(), "--agent", name, *arguments,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            out, err = await child.communicate()
            return child.returncode or 0, out.decode(), err.decode()

        code, out, err = await call(
            "--key", key, "--after-greeting", "--json", "--out", str(answer), str(question)
        )
        assert code == 0, err
        record = json.loads(out)
        assert record["said"][-1] == "It is 4, then 2, then 7, then 1. Is that right?"
        assert record["response_seconds"] > 0
        assert answer.stat().st_size > 24_000
        code, _, err = await call("--key", "sk-wrong", str(question))
        assert (code, "401" in err) == (1, True), err
        code, _, err = await call("--key", key, str(tmp_path / "none.wav"))
        assert (code, "there is no file" in err) == (2, True), err


@pytest.mark.asyncio(loop_scope="function")
async def test_trunkline_dev(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It comes up, the call that it says to try is answered, it refuses a second one on its port, and Ctrl-C leaves nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [TRUNKLINE, "dev", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    log, answer = tmp_path / "dev.log", tmp_path_factory.mktemp("call") / "answer.wav"
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        await until(lambda: truth("Ctrl-C" in log.read_text() or child.poll() is not None))
        assert child.poll() is None, log.read_text()
        (told,) = (line for line in log.read_text().splitlines() if "trunkline call" in line)
        called = await asyncio.to_thread(
            subprocess.run,
            [TRUNKLINE, *shlex.split(told)[1:-1], str(answer)],
            capture_output=True, text=True, timeout=SOON, check=False,
        )  # fmt: skip
        assert called.returncode == 0, called.stderr
        assert "Is that right?" in called.stdout
        second = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=SOON, check=False
        )
        assert second.returncode == 2
        assert "the port is in use" in second.stderr
        child.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(child.wait, SOON) == 0
    finally:
        child.kill()
        child.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["dev.log"]
    assert processes_with(f"TMPDIR={tmp_path}") == []


def processes_with(setting: str) -> list[str]:
    """Command lines of living processes that have this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and setting.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found
