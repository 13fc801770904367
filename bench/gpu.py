"""The Moshi engine on one GPU: calls in real time, bandwidth, loading, starting, and what joins disturb.

    python bench/gpu.py [--device cuda] [--json FILE] [--quick]
    python bench/gpu.py --device cpu --tiny --quick    shows that it runs; claims nothing

Full-size models with random weights of N(0, 0.02): zeros would let caches and clocks look better than they are.
Limits are computed from what the same run measures: a step must read all weights once and the keys and values
of all slots, at the speed at which the device copies its own memory. `NO_CUDA_GRAPH=1` runs without graphs, as it does where they
fail.

It takes some five minutes on a GPU with 80 GB, and 32 GB of the host's memory. A part that fails is named at the
end, and the others are kept. What is measured later finds the memory of what came before given back.
"""

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import argparse
import gc
import io
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from moshi.models import LMGen, LMModel, loaders
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from trunkline_runtime.engine import FRAME_SAMPLES
from trunkline_runtime.engine.moshi import reading
from trunkline_runtime.engine.moshi.capacity import FRAME_SECONDS, Memory, p99
from trunkline_runtime.engine.moshi.checkpoint import MOSHI_FOLDER, write_tiny
from trunkline_runtime.engine.moshi.memory import memory_of
from trunkline_runtime.engine.moshi.models import Models, freeze
from trunkline_runtime.engine.moshi.source import CONFIG_NAME, DEFAULT_NAMES
from trunkline_runtime.engine.moshi.stepper import Stepper
from trunkline_runtime.engine.moshi.tiny import tiny, tokenizer_model

SLOTS = (1, 2, 4, 8, 16, 24, 32, 36, 40, 64, 72)
STREAMS = (64, 128, 256, 400, 600)
WARM_UP = 4
# Kyutai's stt-1b-en_fr: 16 layers of 2048, 60 s of context, no voice of its own.
STT_1B = {
    "dim": 2048,
    "text_card": 8000,
    "n_q": 32,
    "dep_q": 0,
    "num_heads": 16,
    "num_layers": 16,
    "context": 750,
    "max_period": 100_000,
    "delays": [0] * 33,
    "extra_heads_num_heads": 4,
    "extra_heads_dim": 6,
}
SHM = Path("/dev/shm")
NO_GRAPHS = "NO_CUDA_GRAPH"  # moshi's own name
CHECKPOINT_BYTES = 17 * 2**30  # Moshi 7B in bf16 and the codec, and a little more
Part = Callable[[Callable[[], Iterable[report.Row] | None]], bool]

log = logging.getLogger("gpu")

START = """
import time; began = time.perf_counter()
import json, sys; sys.path.insert(0, {here!r})
from pathlib import Path
import gpu
from trunkline_runtime.engine.moshi.loading import Wanted, load
from trunkline_runtime.engine.moshi.progress import Progress
from trunkline_runtime.engine.moshi.source import FolderSource
imported = time.perf_counter()
progress = Progress()
wanted = Wanted(moshi=FolderSource(Path({folder!r})), device={device!r})
models = load(wanted, progress)
loaded = time.perf_counter()
stepper = gpu.Stepper(models, 1)
streams = time.perf_counter()
for _ in range(2):
    stepper.step({{0: gpu.noise()}})
first = time.perf_counter()
print(json.dumps({{
    "imports": imported - began,
    **{{f"loading, {{phase}}": seconds for phase, seconds in progress.seconds.items()}},
    "loading, all of it": loaded - imported,
    "streams": streams - loaded,
    "the first two frames, of which the second captures CUDA graphs": first - streams,
}}))
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured, and how much of it."""

    device: str
    tiny: bool
    quick: bool

    @property
    def steps(self) -> int:
        return 10 if self.quick else 250

    def models(self) -> Models:
        """Moshi, the codec and STT-1B."""
        if self.tiny:
            return tiny(0)
        tokenizer = SentencePieceProcessor(model_proto=tokenizer_model())
        config = {k: v for k, v in loaders._lm_kwargs.items() if k != "depformer_layer_scale"}
        return Models(
            name="random",
            mimi=_randomised(loaders.get_mimi(None, None, device=self.device, num_codebooks=32)),
            lm=self._language_model(loaders._lm_kwargs),
            text_tokenizer=tokenizer,
            stt=self._language_model(config | STT_1B),
            stt_tokenizer=tokenizer,
        )

    def _language_model(self, config: dict[str, Any]) -> LMModel:
        # On the meta device nothing is initialised for nothing; then memory, then numbers.
        lm = loaders.get_moshi_lm(None, lm_kwargs=config, device="meta", dtype=torch.bfloat16)
        return _randomised(lm.to_empty(device=self.device))


def _randomised(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
        for part in module.modules():
            if type(part).__name__ == "EuclideanCodebook":
                part.embedding_sum.normal_(std=0.5)
                part.cluster_usage.fill_(1.0)
                part._initialized.fill_(1.0)
    freeze(module)
    return module


def noise(seed: int = 0) -> bytes:
    draw = np.random.default_rng(seed)
    return bytes(draw.integers(-9_000, 9_000, FRAME_SAMPLES).astype("<i2").tobytes())


def measure(setting: Setting) -> tuple[list[report.Row], bool]:
    """The rows, and whether all parts came to their end."""
    rows: list[report.Row] = []
    whole = True

    def part(made: Callable[[], Iterable[report.Row] | None]) -> bool:
        nonlocal whole
        done = False
        try:
            rows.extend(made() or ())
            done = True
        except Exception:  # the boundary of a part: what the others found is worth keeping
            log.exception("a part has failed")
            whole = False
        _give_back(setting)
        return done

    with tempfile.TemporaryDirectory(dir=_roomy()) as folder:
        _models_measured(setting, part, Path(folder))
        _give_back(setting)  # the device need not hold them twice
        checkpoint = Path(folder) / MOSHI_FOLDER
        part(lambda: _reading(setting, checkpoint / DEFAULT_NAMES["moshi_name"]))
        part(lambda: _start(setting, checkpoint))
    return rows, whole


def _models_measured(setting: Setting, part: Part, folder: Path) -> None:
    """All that is measured on models in the device's memory, which are written to the folder then."""
    copy = _copy_speed(setting)
    _give_back(setting)
    models = setting.models()
    if not part(lambda: _calls(setting, models, copy)) and _graphs(setting):
        # Numbers without graphs are worth more than none; the machine's entry tells of it.
        os.environ[NO_GRAPHS] = "1"
        part(lambda: _calls(setting, models, copy))
    part(lambda: [_disturbance(setting, models)])
    part(lambda: _streams(setting, models))
    part(lambda: _write(setting, models, folder))


def _graphs(setting: Setting) -> bool:
    """Whether steps are replayed from CUDA graphs."""
    return setting.device != "cpu" and not os.environ.get(NO_GRAPHS)


def _give_back(setting: Setting) -> None:
    """What nobody refers to any more goes back to the device, so that it counts as free."""
    gc.collect()
    if setting.device != "cpu":
        torch.cuda.empty_cache()


# --- calls in real time --------------------------------------------------------------------------------


def _copy_speed(setting: Setting) -> float:
    """Bytes a second that the device reads and writes when it copies its own memory."""
    size = 2**24 if setting.tiny else 2**31
    # Numbers, for zeros may be compressed on their way.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = [_on_device(setting, lambda: target.copy_(source)) for _ in range(12)]
    return 2 * size / min(seconds[2:])


def _calls(setting: Setting, models: Models, copy: float) -> Iterator[report.Row]:
    memory = memory_of(models)
    streamed = _streamed(models)
    most, fits = 0, _fitting(setting, memory)
    for slots in SLOTS:
        if slots > fits or (setting.quick and slots > 4):
            break
        seconds = _steps(setting, models, slots)
        least = (streamed + slots * memory.slot) / copy
        yield report.Row(
            what=f"step of {slots} slots, p99",
            against=f"reading weights and rings once at {copy / 1e9:.0f} GB/s",
            unit="ms",
            ours=[1000 * p99(seconds)],
            theirs=[1000 * least],
            target=1 / 0.75,
            at_most=True,
        )
        if p99(seconds) > FRAME_SECONDS:
            break
        most = slots
    limit = min(fits, math.floor((FRAME_SECONDS * copy - streamed) / memory.slot))
    yield report.Row(
        what="calls at p99 of a step ≤ 80 ms",
        against="the limit of memory and bandwidth",
        unit="calls",
        ours=[most],
        theirs=[limit],
        floor=0.67,
        target=0.9,
    )


def _streamed(models: Models) -> int:
    """Bytes of weights that a step reads: all but the tables, of which it reads rows."""
    parts = [models.mimi, models.lm, models.stt]
    tables = {
        id(m.weight) for part in parts for m in part.modules() if isinstance(m, torch.nn.Embedding)
    }
    weights = [p for part in parts for p in part.parameters() if id(p) not in tables]
    return sum(p.numel() * p.element_size() for p in weights)


def _fitting(setting: Setting, memory: Memory) -> int:
    return 4 if setting.device == "cpu" else _room(setting) // memory.slot


def _room(setting: Setting) -> int:
    """Bytes that are free on the device, without the tenth that the engine leaves free, too."""
    _give_back(setting)
    free, total = torch.cuda.mem_get_info(setting.device)
    return max(0, int(free - total // 10))


def _steps(setting: Setting, models: Models, slots: int) -> list[float]:
    """Seconds of each step, from the frames' upload to the answers' download."""
    frames = dict.fromkeys(range(slots), noise())
    with closing(Stepper(models, slots)) as stepper:
        seconds = [
            _timed(setting, lambda: stepper.step(frames)) for _ in range(WARM_UP + setting.steps)
        ]
    return seconds[WARM_UP:]


def _disturbance(setting: Setting, models: Models) -> report.Row:
    """Tokens of one call that change because another comes and goes beside it. None may."""
    alone, beside = (_said(setting, models, busy=busy) for busy in (False, True))
    return report.Row(
        what="tokens that change when a neighbour joins and leaves",
        against=f"the same call alone, {len(alone)} frames",
        unit="frames",
        ours=[sum(a != b for a, b in zip(alone, beside, strict=True))],
        theirs=[],
    )


def _said(setting: Setting, models: Models, *, busy: bool) -> list[list[int]]:
    generation = models.generation
    models.generation = type(generation)(use_sampling=False)
    said = []
    with closing(Stepper(models, 2)) as stepper:
        for number in range(setting.steps):
            frames = {0: noise(number)}
            if busy and number % 10 == 5:
                stepper.leave(1)
                stepper.join(1)
            if busy and number % 10 >= 5:
                frames[1] = noise(1_000 + number)
            said.append(stepper.step(frames).tokens[0].tolist())
    models.generation = generation
    return said


# --- transcripts, loading, starting --------------------------------------------------------------------


def _streams(setting: Setting, models: Models) -> Iterator[report.Row]:
    """How many streams STT-1B transcribes in real time; without the codec."""
    most, each = 0, memory_of(models).slot_fixed  # a little more than STT's own ring
    for streams in STREAMS[:1] if setting.quick else STREAMS:
        if setting.device != "cpu" and streams * each > _room(setting):
            break
        if p99(_stt_steps(setting, models.stt, streams)) > FRAME_SECONDS:
            break
        most = streams
    yield report.Row(
        what="STT-1B streams at p99 of a step ≤ 80 ms",
        against="400 on an H100, published by its makers",
        unit="streams",
        ours=[most],
        theirs=[400],
        floor=1.0,
        target=1.5,
    )


def _stt_steps(setting: Setting, stt: LMModel, streams: int) -> list[float]:
    codes = torch.randint(stt.card, (streams, stt.n_q, 1), device=setting.device)
    gen = LMGen(stt, use_sampling=False, support_out_of_sync=True)
    with torch.inference_mode(), gen.streaming(streams):
        seconds = [
            _timed(setting, lambda: gen.step_with_extra_heads(codes))
            for _ in range(WARM_UP + setting.steps)
        ]
    return seconds[WARM_UP:]


def _roomy() -> str | None:
    """Where a checkpoint has room: memory, or else the disk, whose pages stay in the cache where they fit."""
    there = SHM.is_dir() and shutil.disk_usage(SHM).free > CHECKPOINT_BYTES
    return str(SHM) if there else None


def _write(setting: Setting, models: Models, folder: Path) -> None:
    """Moshi and the codec as a checkpoint that the engine's own loader takes."""
    if setting.tiny:
        return write_tiny(folder, 0)
    (folder / MOSHI_FOLDER).mkdir()
    for module, name in ((models.lm, "moshi_name"), (models.mimi, "mimi_name")):
        state = {key: tensor.cpu() for key, tensor in module.state_dict().items()}
        save_file(state, folder / MOSHI_FOLDER / DEFAULT_NAMES[name])
    (folder / MOSHI_FOLDER / DEFAULT_NAMES["tokenizer_name"]).write_bytes(_words())
    (folder / MOSHI_FOLDER / CONFIG_NAME).write_text(json.dumps(loaders._lm_kwargs))
    return None


def _words() -> bytes:
    """A tokenizer of as many words as Moshi has text tokens; nobody reads what it says."""
    model, count = io.BytesIO(), loaders._lm_kwargs["text_card"]
    SentencePieceTrainer.train(
        sentence_iterator=(f"w{number}" for number in range(count)),
        model_writer=model,
        vocab_size=count,
        model_type="word",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _reading(setting: Setting, path: Path) -> Iterator[report.Row]:
    """A file in the page cache to the device."""
    size, device = path.stat().st_size, torch.device(setting.device)
    found = reading.layout(path)

    def speed(run: Callable[[], object]) -> Callable[[], float]:
        return lambda: size / _timed(setting, run) / 1e9

    speeds = report.rounds(
        2 if setting.quick else 5,
        {
            "ours": speed(lambda: reading.read(found, device)),
            "load_file": speed(lambda: load_file(path, device=setting.device)),
        },
    )
    yield report.Row(
        what="weights from the page cache to the device",
        against="safetensors.load_file",
        unit="GB/s",
        ours=speeds["ours"],
        theirs=speeds["load_file"],
        floor=2.0,
    )
    if setting.device != "cpu":
        yield report.Row(
            what="weights from the page cache to the device, as a share of the limit",
            against="a copy from pinned memory",
            unit="GB/s",
            ours=speeds["ours"],
            theirs=[_pinned_speed(setting)],
            target=0.85,
        )


def _pinned_speed(setting: Setting) -> float:
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=setting.device)
    copies = [
        _on_device(setting, lambda: target.copy_(source, non_blocking=True)) for _ in range(8)
    ]
    return len(source) / min(copies) / 1e9


def _start(setting: Setting, folder: Path) -> Iterator[report.Row]:
    """A new process from a checkpoint in the page cache to its first frame, by phases."""
    script = START.format(
        here=str(Path(__file__).parent), device=setting.device, folder=str(folder)
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    whole = time.perf_counter() - began
    phases: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    for what, seconds in phases.items():
        yield report.Row(
            what=f"process start: {what}", against="–", unit="s", ours=[seconds], theirs=[]
        )
    yield report.Row(
        what="process start to its end, after two frames",
        against="3 s",
        unit="s",
        ours=[whole],
        theirs=[3.0],
        target=1,
        at_most=True,
    )


def _on_device(setting: Setting, run: Callable[[], object]) -> float:
    """Seconds that the device itself takes, without those until it is told."""
    if setting.device == "cpu":
        return _timed(setting, run)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def _timed(setting: Setting, run: Callable[[], object]) -> float:
    """Seconds until the device is done."""
    began = time.perf_counter()
    run()
    if setting.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _claiming(setting: Setting, row: report.Row) -> report.Row:
    """A CPU and tiny models show that it runs; nothing is met or missed by them."""
    return replace(row, floor=None, target=None) if setting.tiny else row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to show that it runs")
    parser.add_argument("--quick", action="store_true", help="few steps and slots")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(torch.device(options.device).index or 0)
    setting = Setting(options.device, options.tiny, options.quick)
    measured, whole = measure(setting)
    rows = [_claiming(setting, row).as_json() for row in measured]
    name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
    if options.json is not None:
        command = f"python bench/gpu.py --device {options.device}"
        command += "".join(f" --{o}" for o in ("tiny", "quick") if getattr(options, o))
        machine = report.machine() | {"device": name, "torch": torch.__version__}
        machine["cuda_graphs"] = _graphs(setting)
        found = {"machine": machine, "command": command, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}, {'tiny' if options.tiny else 'full-size'} models\n\n{report.table(rows)}")
    if not whole:
        raise SystemExit("a part has failed, see above")


if __name__ == "__main__":
    main()
