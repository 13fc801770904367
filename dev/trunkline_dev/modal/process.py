"""One run of the SDK's own container entrypoint, and the calls that it makes.

A memory snapshot is played by processes that stand at the snapshot point: the entrypoint asks for its
checkpoint, drops its connections and waits for a file; it then takes the name that the file gives it and
goes on as a restored container does. Such a process is stopped (SIGSTOP) while it waits, and so costs
nothing but its memory.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modal_proto import api_pb2

from trunkline_dev.leash import leashed
from trunkline_dev.modal.rpc import Message, Service, Tally, service
from trunkline_dev.modal.state import new_id
from trunkline_runtime.contract import ENV_HOST, ENV_PORT

# What a container sees of this machine; all else comes from the app's secrets.
INHERITED: Final = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "OMP_NUM_THREADS")
MAX_LINE: Final = 1000  # bytes of a log that tell why a container ended
PROBE_SECONDS: Final = 0.02  # between tries of a container's port


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What all containers of one deployed server have in common."""

    python: str
    function_id: str
    app_id: str
    environment: str
    definition: Message  # api_pb2.Function
    layout: Message  # api_pb2.AppLayout
    secrets: dict[str, str]
    tally: Tally  # of the containers' calls
    root: Path  # holds the uploaded files as a container would see them
    scratch: Path  # for sockets and arguments
    logs: Path

    @property
    def port(self) -> int:
        return int(self.definition.http_config.port)


class ContainerProcess:
    """The process, its socket and its log. `name` is the container's; a clone gets one at `restore`."""

    def __init__(self, launch: Launch, address: str, name: str, *, snapshot: bool) -> None:
        self.address, self.name = address, name
        self.at_snapshot = asyncio.Event()  # enter(snap=True) has run
        self.lifecycle_ready = asyncio.Event()  # enter(snap=False) has run
        self.ended = asyncio.Event()
        self.exit_code: int | None = None
        self.error = ""  # what a hook raised
        self._launch, self.snapshot = launch, snapshot
        self._folder = launch.scratch / new_id("p")
        self._restore_file = self._folder / "restore.json"
        self._process: asyncio.subprocess.Process | None = None
        self._service: Service | None = None
        self._reaper: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The process, while it lives."""
        return self._process.pid if self._process and not self.ended.is_set() else None

    @property
    def started(self) -> bool:
        return self._service is not None

    async def start(self) -> None:
        self._folder.mkdir(parents=True)
        socket = self._folder / "s"  # a socket's path has room for 107 bytes
        self._service = service([_Calls(self)], self.name, self._launch.tally)
        await self._service.start_at(str(socket))
        arguments = self._folder / "arguments"
        arguments.write_bytes(self._arguments().SerializeToString())
        with self._log_file(self.name).open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *leashed([self._launch.python, "-m", "modal._container_entrypoint"]),
                env=self._environment(socket, arguments),
                cwd=self._launch.root / "root",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        self._reaper = asyncio.create_task(self._reap(self._process))

    def _log_file(self, name: str) -> Path:
        return self._launch.logs / f"{name}.log"

    def _arguments(self) -> Message:
        definition = api_pb2.Function()
        definition.CopyFrom(self._launch.definition)
        definition.is_checkpointing_function = self.snapshot
        definition._experimental_enable_gpu_snapshot = False  # would want gVisor's /proc files
        return api_pb2.ContainerArguments(
            task_id=self.name,
            function_id=self._launch.function_id,
            app_id=self._launch.app_id,
            function_def=definition,
            environment_name=self._launch.environment,
            app_layout=self._launch.layout,
            checkpoint_id=new_id("ch") if self.snapshot else "",
        )

    def _environment(self, socket: Path, arguments: Path) -> dict[str, str]:
        launch = self._launch
        return {
            **{name: os.environ[name] for name in INHERITED if name in os.environ},
            **launch.secrets,
            "PYTHONPATH": str(launch.root / "root"),
            "PYTHONUNBUFFERED": "1",
            "MODAL_SERVER_URL": f"unix://{socket}",
            "MODAL_TASK_ID": self.name,
            "MODAL_IS_REMOTE": "1",
            "MODAL_ENVIRONMENT": launch.environment,
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
            "MODAL_RESTORE_STATE_PATH": str(self._restore_file),
            "MODAL_ENABLE_SNAP_RESTORE": "1" if self.snapshot else "0",
            # Containers here share one network, so each has an address of its own.
            ENV_HOST: self.address,
            ENV_PORT: str(launch.port),
        }

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        self.exit_code = await process.wait()
        if self.exit_code and not self.error:
            self.error = last_line(self._log_file(self.name))
        await self._clear()

    async def _clear(self) -> None:
        if self._service:
            await self._service.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.ended.set()

    def freeze(self) -> None:
        """Stops a process that waits at the snapshot point."""
        self._stopped = True
        self._signal(signal.SIGSTOP)

    def restore(self, name: str) -> None:
        """Lets a process at the snapshot point go on under this name."""
        if name != self.name:
            self._log_file(self.name).rename(self._log_file(name))
            self.name = name
        half = self._restore_file.with_suffix(".half")
        half.write_text(json.dumps({"task_id": name, "function_id": self._launch.function_id}))
        half.rename(self._restore_file)
        self._thaw()

    def _thaw(self) -> None:
        if self._stopped:
            self._stopped = False
            self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: the exit hooks run."""
        self._signal(signal.SIGTERM)

    async def kill(self) -> None:
        self._signal(signal.SIGKILL)
        # Shielded: whoever waits here may be cancelled, and what the process held must be cleared all the same.
        await (asyncio.shield(self._reaper) if self._reaper else self._clear())

    async def discard(self) -> None:
        """Kills a process that never was a container; nothing of it is kept."""
        await self.kill()
        self._log_file(self.name).unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        """To the process and what it started: it leads a group of its own."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


class _Calls:
    """What a container calls. Who calls is known from the socket alone."""

    def __init__(self, process: ContainerProcess) -> None:
        self._process = process

    def ContainerCheckpoint(self, _: Message) -> None:
        self._process.at_snapshot.set()

    def ContainerServerLifecycleReady(self, _: Message) -> None:
        self._process.lifecycle_ready.set()

    def TaskResult(self, request: Message) -> None:
        self._process.error = request.result.exception

    def VolumeCommit(self, _: Message) -> Message:
        return api_pb2.VolumeCommitResponse()


async def reached(process: ContainerProcess, event: asyncio.Event) -> bool:
    """Waits for the event; False when the process ends first."""
    waits = [asyncio.create_task(event.wait()), asyncio.create_task(process.ended.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return event.is_set() and not process.ended.is_set()


async def listening(process: ContainerProcess, port: int) -> None:
    """Returns when the process accepts connections, or has ended."""
    while process.pid is not None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(process.address, port)
            writer.close()
            return
        await asyncio.sleep(PROBE_SECONDS)


def last_line(log: Path) -> str:
    """The end of a log: of a Python program that failed, the exception."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_LINE))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:  # a clone's log goes with it
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
