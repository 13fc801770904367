"""`trunkline dev` and `trunkline demo`. Imports stay inside the functions: `trunkline --help` is quick."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from trunkline_runtime.contract import CALLS_PORT

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def _fail(sentence: str, code: int) -> typer.Exit:
    typer.secho(f"trunkline: {sentence}", err=True, fg=typer.colors.RED)
    return typer.Exit(code)


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Runs until done; what a user can mend is told in a sentence, and Ctrl-C takes everything down."""
    from trunkline_dev.binaries import NoBinaries
    from trunkline_dev.controlplane import ControlPlaneError
    from trunkline_dev.processes import ProcessFailed
    from trunkline_runtime.process import CannotListen

    async def until_told() -> int:
        task = asyncio.current_task()
        assert task is not None
        # Whoever ends us, nothing is left behind. Ctrl-C is taken here too: a shell starts its
        # background jobs with SIGINT ignored, and asyncio would leave it so.
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(until_told())
    except asyncio.CancelledError:
        return INTERRUPTED
    except (NoBinaries, CannotListen) as error:
        raise _fail(str(error), MISUSED) from error
    except (ControlPlaneError, ProcessFailed) as error:
        raise _fail(str(error), FAILED) from error


def _require_extra() -> None:
    try:
        import aiohttp  # noqa: F401 - stands for the whole extra
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise _fail(f"{error.name} is missing: pip install 'trunkline[dev]'", MISUSED) from error


def demo(
    out: Annotated[Path, typer.Option(help="Where demo.json, demo.png and the WAVs go.")] = Path(
        "build"
    ),
) -> None:
    """Tells the whole story on this machine and checks every promise; exit status 0 only if all held.

    Example: `trunkline demo --out build`
    """
    _require_extra()

    async def work() -> int:
        from trunkline_dev.demo import PULL_SECONDS, run
        from trunkline_dev.machine import MachineConfig
        from trunkline_dev.story import Story

        story = Story()
        report = await run(out, story, MachineConfig(pull_seconds=PULL_SECONDS))
        story.table()
        story.line(f"{out}/demo.json, {out}/demo.png, {out}/question.wav, {out}/answer.wav")
        return 0 if report.ok else FAILED

    raise typer.Exit(_run(work()))


def dev(
    host: Annotated[str, typer.Option(help="Where callers connect.")] = "127.0.0.1",
    port: int = CALLS_PORT,
    gpus: Annotated[int, typer.Option(help="How many GPUs the node pretends to have.")] = 8,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only fetch or compile the control plane's programs.")
    ] = False,
) -> None:
    """Brings up a whole Trunkline on this machine and keeps it until Ctrl-C, which leaves nothing behind.

    Example: `trunkline dev --port 8080`
    """
    _require_extra()

    async def work() -> int:
        from trunkline_dev.machine import Machine, MachineConfig
        from trunkline_dev.machine import prepare as prepare_programs
        from trunkline_dev.story import Story

        story = Story()
        with story.step("Control plane's programs"):
            prepare_programs(story.note)
        if prepare:
            return 0
        config = MachineConfig(host=host, port=port, gpus=gpus)
        async with contextlib.AsyncExitStack() as stack:
            with story.step("A machine: API server, node, local Modal, gateway, operator"):
                machine = await stack.enter_async_context(Machine(config, say=story.note))
            stack.callback(story.line, "taking everything down")
            await _introduce(machine, story)
            await asyncio.Event().wait()
        return 0

    status = _run(work())
    # Ctrl-C is how it is meant to end.
    raise typer.Exit(0 if status == INTERRUPTED else status)


async def _introduce(machine: Any, story: Any) -> None:
    """Applies the examples and prints what to try."""
    from trunkline_dev.demo import AGENTS, FRONT_DESK, READY_SECONDS, SPIKE, api_key, example
    from trunkline_dev.kube import is_true
    from trunkline_dev.spoken import write_question

    await machine.modal_credentials()
    for name in (FRONT_DESK, SPIKE):
        for document in example(name):
            await machine.apply(document)
    with story.step(f"Agents {FRONT_DESK} and {SPIKE}"):
        await machine.api.wait_for_one(
            f"{AGENTS}/{FRONT_DESK}", lambda agent: is_true(agent, "Ready"), READY_SECONDS
        )
    question = machine.root / "question.wav"
    with story.step("A question to ask"):
        await asyncio.to_thread(write_question, question)
    url, key = machine.gateway_url(), api_key(example(FRONT_DESK))
    story.console.print(
        f"\nexport KUBECONFIG={machine.kubeconfig}\n"
        f"gateway    {url}\n"
        f"Modal API  {machine.modal_url}   (MODAL_SERVER_URL)\n"
        f"Modal      {machine.modal_local_url}/_local/containers   (and faults: docs/local-modal.md)\n"
        f"logs       {machine.logs}\n\n"
        "Try, in another terminal:\n"
        f"  kubectl --kubeconfig {machine.kubeconfig} get va\n"
        f"  trunkline call --gateway {url} --key {key} --agent {FRONT_DESK} {question} --out answer.wav\n"
        "\nCtrl-C ends it all.",
        markup=False,
        soft_wrap=True,
    )
