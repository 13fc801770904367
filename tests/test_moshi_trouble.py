"""What goes wrong with a Moshi worker, on real processes: it is not ready, says one clear line, closes its calls
with 1011, and ends with a status on which Kubernetes restarts it.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from hub_rig import REPOSITORY, TOKEN, hub
from ports import free_port
from safetensors.torch import load_file, save_file
from test_moshi_weights import MIMI, MODEL, TOKENIZER, another_model, cut, with_config
from test_worker_process import MAIN, pod, process
from websockets.asyncio.client import ClientConnection
from worker_rig import FakeGateway, closed, got, next_message

from trunkline_runtime import contract
from trunkline_runtime.contract import Close
from trunkline_runtime.engine.moshi.checkpoint import MOSHI_FOLDER, write_tiny

PATIENCE_WITH_TORCH = 90.0  # its import alone takes seconds, and many where others are at work
HUGE = 2**33  # words; a model of them takes terabytes


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, 3)
    (folder / MOSHI_FOLDER / "SHA256SUMS").unlink()
    return folder / MOSHI_FOLDER


def model(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a worker for the weights in a folder."""
    environment = {contract.ENV_ENGINE: "moshi", contract.ENV_MODEL: str(folder)}
    # The speech engine sets it to 1 in a process where it runs, which other tests of this one may have done.
    environment |= {contract.ENV_DEVICE: "cpu", "HF_HUB_OFFLINE": "0"}
    return environment | more


async def ended(**environment: str) -> tuple[int | None, str]:
    """Exit status and standard error of a worker that cannot start."""
    gateway = {contract.ENV_GATEWAYS: "127.0.0.1:1", contract.ENV_WORKER_KEY: "key"}
    async with process(**gateway, **environment) as child:
        async with asyncio.timeout(PATIENCE_WITH_TORCH):
            _, told = await child.communicate()
    return child.returncode, told.decode()


def too_large(folder: Path) -> None:
    """A file with a hole of terabytes, and a config that fits it."""
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder / MODEL).items()}
    for name, more in (("text_emb", 1), ("text_linear", 0), ("depformer_text_emb", 1)):
        shapes[f"{name}.weight"][0] = HUGE + more
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(torch.tensor(shape, dtype=torch.float64).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / MODEL).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / MODEL, 8 + len(text) + end)
    with_config(text_card=HUGE)(folder)


def no_numbers(folder: Path) -> None:
    state = load_file(folder / MODEL)
    state["text_linear.weight"].fill_(torch.nan)
    save_file(state, folder / MODEL)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (cut, "model.safetensors is cut off: its header speaks of"),
        (another_model, "is not a checkpoint of"),
        (too_large, "cpu is out of memory: model.safetensors takes"),
        (no_numbers, "the model's logits are not finite in slots [0, 1]"),
    ],
)
async def test_weights_that_cannot_be_used_end_the_process_with_one_line(
    written: Path, tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    shutil.copytree(written, tmp_path / "moshi")
    spoil(tmp_path / "moshi")
    status, said = await ended(**model(tmp_path / "moshi"))
    assert status == 1
    assert sentence in " ".join(said.split())
    assert said.startswith("trunkline: ")
    assert "Traceback" not in said


async def test_a_revision_that_is_not_there_and_a_gpu_that_is_not_there(
    written: Path, tmp_path: Path
) -> None:
    """Two processes at once, for most of their time is the import of torch."""
    with hub(written) as served:
        wrong = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
        (status, said), (alone, without) = await asyncio.gather(
            ended(**model(written, **wrong) | {contract.ENV_MODEL: f"{REPOSITORY}@v9"}),
            # Where there is a GPU, the process is shown none.
            ended(**model(written, CUDA_VISIBLE_DEVICES="") | {contract.ENV_DEVICE: "cuda"}),
        )
    assert (status, alone) == (1, 1)
    assert "has no revision 'v9': give a branch, a tag or a commit" in " ".join(said.split())
    assert "no CUDA device is visible: ask for a GPU" in " ".join(without.split())
    assert "Traceback" not in said + without


async def test_while_it_loads_a_worker_says_how_far_it_is_and_takes_no_call(
    written: Path, tmp_path: Path
) -> None:
    gateway = FakeGateway()
    sizes = {
        path.name: path.stat().st_size for path in written.iterdir() if path.name != "config.json"
    }
    there = sizes[MODEL] + sizes[MIMI]
    waiting = f"503 downloading {there * 100 // sum(sizes.values())} %"
    with hub(written) as served:
        served.stops_in = TOKENIZER
        port = free_port()
        environment = model(written, HF_ENDPOINT=served.url, HF_HOME=str(tmp_path), HF_TOKEN=TOKEN)
        environment |= {contract.ENV_MODEL: REPOSITORY, contract.ENV_HEALTH_PORT: str(port)}
        async with gateway.serving(), process(**pod(gateway), **environment) as child:
            try:
                async with asyncio.timeout(PATIENCE_WITH_TORCH):
                    while (told := await readiness(port)) != waiting:
                        assert told.startswith(("503 loading", "503 downloading", "nobody"))
                        assert child.returncode is None
                        await asyncio.sleep(0.1)
                assert gateway.hellos == [], "no gateway is told of it yet"
                assert (await got(port, contract.HEALTHZ_PATH))[0] == 200, "it is alive"
            finally:
                served.goes_on.set()
            await gateway.until(lambda: bool(gateway.free), PATIENCE_WITH_TORCH)
            assert (await readiness(port)).startswith("200")


async def readiness(port: int) -> str:
    """Status and sentence of /readyz."""
    try:
        status, sentence = await got(port, contract.READYZ_PATH)
    except OSError:
        return "nobody listens"
    return f"{status} {sentence.strip()}"


# --- in the middle of calls ------------------------------------------------------------------------------

# The worker's own program; on a signal something happens to its models.
SPOILT = """
import signal, torch
from trunkline_runtime.engine.moshi import configured
made = configured.tiny
def keeping(seed):
    global models
    models = made(seed)
    return models
configured.tiny = keeping
def spoil(*_):
    with torch.inference_mode():
        {what}
signal.signal(signal.SIGUSR1, spoil)
"""


@contextlib.asynccontextmanager
async def calls(gateway: FakeGateway, count: int) -> AsyncIterator[list[ClientConnection]]:
    async with contextlib.AsyncExitStack() as stack:
        links = []
        for number in range(count):
            link = await stack.enter_async_context(gateway.call(f"call-{number}"))
            await next_message(link, "session.created")
            links.append(link)
        yield links


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("models.lm.text_linear.weight.fill_(torch.nan)", "logits are not finite"),
        ("models.mimi = None", "the Moshi engine is broken"),  # its thread dies of it
    ],
)
async def test_an_engine_that_breaks_in_calls_closes_them_and_ends_the_process(
    what: str, sentence: str
) -> None:
    gateway = FakeGateway()
    environment = {contract.ENV_ENGINE: "moshi", contract.ENV_MODEL: "tiny"}
    program = SPOILT.format(what=what) + MAIN
    async with gateway.serving(), process(program, **pod(gateway), **environment) as child:
        await gateway.until(lambda: bool(gateway.free), PATIENCE_WITH_TORCH)
        async with calls(gateway, 2) as links:
            for link in links:
                await next_message(link, "response.output_audio.delta")
            child.send_signal(signal.SIGUSR1)
            for link in links:
                assert await closed(link) == (Close.LOST, "the engine failed: call again")
        async with asyncio.timeout(PATIENCE_WITH_TORCH):
            _, told = await child.communicate()
        assert gateway.heard("bye")
    said = told.decode()
    assert child.returncode == 1
    assert said.startswith("trunkline: the Moshi engine is broken")
    assert sentence in " ".join(said.split())
    assert "Traceback" not in said
