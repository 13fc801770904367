"""Workers with the Moshi engine on tiny models: calls over Realtime, and a worker whose engine breaks."""

import asyncio
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from moshi_rig import CONTEXT_FRAMES, models
from test_worker_process import outcome, pod, process
from worker_rig import (
    PATIENCE,
    FakeGateway,
    append,
    closed,
    next_message,
    refusal,
    worker,
    worker_config,
)

from trunkline_runtime import contract
from trunkline_runtime.contract import Close
from trunkline_runtime.engine import EngineError
from trunkline_runtime.engine.moshi.checkpoint import write_tiny
from trunkline_runtime.engine.moshi.configured import moshi_engine
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.moshi.models import ModelError
from trunkline_runtime.engine.moshi.tiny import tiny
from trunkline_runtime.worker.config import ConfigError, MoshiConfig
from trunkline_runtime.worker.host import WorkerHost, make_engine

PATIENCE_WITH_TORCH = 90.0  # its import alone takes seconds, and many where others are at work


async def test_a_worker_process_holds_a_call_on_the_tiny_model() -> None:
    environment = {contract.ENV_ENGINE: "moshi", contract.ENV_MODEL: "tiny"}
    gateway = FakeGateway()
    async with gateway.serving(), process(**pod(gateway), **environment) as child:
        await gateway.until(lambda: bool(gateway.free), PATIENCE_WITH_TORCH)
        async with gateway.call("call-1", greeting="hello how are you") as caller:
            await next_message(caller, "session.created")
            await next_message(caller, "response.created")
            await next_message(caller, "response.output_audio_transcript.delta")
            for _ in range(3):
                await caller.send(append())
                await next_message(caller, "response.output_audio.delta")
            await caller.send(json.dumps({"type": "input_audio_buffer.commit"}))
            await next_message(caller, "conversation.item.input_audio_transcription.completed")
        child.terminate()
        status, out, err = await outcome(child)
    assert status == 0, err
    logged = [json.loads(line)["message"] for line in out.splitlines()]
    assert any(message.startswith("memory: weights") for message in logged)
    assert any("p99 of a step by slots" in message for message in logged)


async def test_a_broken_engine_closes_its_calls_with_1011_and_ends_the_worker() -> None:
    own = tiny(0, context_frames=CONTEXT_FRAMES)
    engine = MoshiEngine(lambda: own, Knobs(slots=2, measure=False))
    engine.load()
    engine.resume()
    async with FakeGateway().serving() as gateway:
        stop, listening = asyncio.Event(), asyncio.Event()
        host = WorkerHost(worker_config(gateway), engine)
        running = asyncio.create_task(host.run(stop, listening.set))
        await gateway.until(lambda: bool(gateway.free))
        async with gateway.call("call-1") as caller:
            await next_message(caller, "response.output_audio.delta")
            assert host.why_unready() is None
            with torch.inference_mode():
                own.lm.text_linear.weight.fill_(torch.nan)
            assert await closed(caller) == (Close.LOST, "the engine failed: call again")
            assert "the Moshi engine is broken" in (host.why_unready() or "")
        with pytest.raises(EngineError, match="not finite"):
            async with asyncio.timeout(PATIENCE):
                await running
        assert gateway.heard("bye")
    engine.close()


async def test_weights_that_are_not_there_end_the_process_with_a_sentence() -> None:
    environment = {contract.ENV_ENGINE: "moshi", contract.ENV_MODEL: "/no/such/folder"}
    environment |= {contract.ENV_DEVICE: "cpu", contract.ENV_GATEWAYS: "127.0.0.1:1"}
    async with process(**environment, TRUNKLINE_WORKER_KEY="key") as child:
        async with asyncio.timeout(PATIENCE_WITH_TORCH):
            _, told = await child.communicate()
    status, err = child.returncode, told.decode()
    assert status == 1
    assert "no folder /no/such/folder" in err.replace("\n", " ")
    assert "Traceback" not in err


async def test_a_slow_engine_takes_no_call_until_it_is_fast_again() -> None:
    engine = MoshiEngine(models, Knobs(slots=2, measure=False))
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        await gateway.until(lambda: gateway.free["n"] == 2)
        engine._room(0)
        await gateway.until(lambda: gateway.free["n"] == 0)
        assert await refusal(running.dial(gateway.ticket("a"))) == (503, "no slot is free\n")
        engine._room(1)
        await gateway.until(lambda: gateway.free["n"] == 1)
        async with running.dial(gateway.ticket("b")) as caller:
            await next_message(caller, "session.created")


async def test_readiness_tells_how_far_the_loading_is() -> None:
    engine = MoshiEngine(models, Knobs(slots=1), lambda: "loading 43 %")
    host = WorkerHost(worker_config(slots=1), engine)
    assert host.why_unready() == "loading 43 %"


async def test_metrics_tell_how_long_each_phase_of_loading_took(tmp_path: Path) -> None:
    write_tiny(tmp_path, 1)
    engine = moshi_engine(1, model=str(tmp_path / "moshi"), device="cpu")
    async with (
        FakeGateway().serving() as gateway,
        worker(gateway, engine=engine, slots=1) as running,
    ):
        _, metrics = await running.health(contract.METRICS_PATH)
    for phase in ("build", "read", "finish", "verify"):
        assert f'trunkline_engine_load_seconds{{phase="{phase}"}}' in metrics


def test_the_environment_of_the_engine() -> None:
    assert MoshiConfig.from_environment({}) == MoshiConfig()
    named = MoshiConfig.from_environment(
        {
            contract.ENV_MODEL: "kyutai/moshiko-pytorch-bf16@abc",
            contract.ENV_STT_MODEL: "/weights/stt",
            contract.ENV_DEVICE: "cuda:1",
            contract.ENV_INT8: "1",
            contract.ENV_CONTEXT_SECONDS: "120",
            contract.ENV_CONTEXT_END: "refresh",
        }
    )
    assert named == MoshiConfig(
        model="kyutai/moshiko-pytorch-bf16@abc",
        stt="/weights/stt",
        device="cuda:1",
        int8=True,
        context_seconds=120,
        refresh=True,
    )
    for name, value in (
        (contract.ENV_DEVICE, "tpu"),
        (contract.ENV_INT8, "yes"),
        (contract.ENV_CONTEXT_SECONDS, "long"),
        (contract.ENV_CONTEXT_END, "jump"),
    ):
        with pytest.raises(ConfigError, match=name):
            MoshiConfig.from_environment({name: value})


def test_a_model_that_names_nothing_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ModelError, match="names no weights"):
        make_engine(worker_config(engine="moshi", moshi=MoshiConfig(model="moshi!")))
    with closing(make_engine(worker_config(engine="moshi", slots=3))) as engine:
        assert engine.slots == 3
