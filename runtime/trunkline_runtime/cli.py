"""The `trunkline` command. Each subcommand imports what it needs only when it runs."""

import asyncio
import json
import os
import socket
from collections.abc import Coroutine
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trunkline_runtime import __version__, contract
from trunkline_runtime.insight.commands import explain, top

if TYPE_CHECKING:
    from trunkline_runtime.caller import CallLog
    from trunkline_runtime.gateway.access.caller_tls import CallersTls

COMMANDS = "trunkline.commands"  # entry points of packages that add subcommands
FAILED, MISUSED = 1, 2

app = typer.Typer(
    help="Voice agents on Kubernetes: warm GPU slots for live calls, and Modal for the calls past them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def fail(sentence: str, code: int = FAILED) -> NoReturn:
    """Ends the program with a sentence on standard error."""
    typer.secho(f"trunkline: {sentence}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def run_process(name: str, process: Coroutine[Any, Any, None]) -> None:
    """Runs a long-lived process on uvloop, with JSON logs, until it ends or cannot start."""
    import uvloop

    from trunkline_runtime.engine import EngineError
    from trunkline_runtime.process import CannotListen, configure_logging

    configure_logging(name, os.environ.get("TRUNKLINE_LOG_LEVEL", "INFO"))
    try:
        uvloop.run(process)
    except (CannotListen, EngineError) as error:
        fail(str(error))


@app.command()
def gateway(
    host: Annotated[str, typer.Option(help="Where callers connect.")] = "0.0.0.0",
    port: int = contract.CALLS_PORT,
    tls: Annotated[
        Path | None,
        typer.Option(
            envvar="TRUNKLINE_TLS",
            help=f"Folder with {contract.TLS_CERT_FILE} and {contract.TLS_KEY_FILE}: callers must come by TLS,"
            " 1.2 or later. Read again when it changes.",
        ),
    ] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="TRUNKLINE_CLIENT_CA",
            help="File with the authorities whose certificates callers may show. Needs --tls.",
        ),
    ] = None,
    client_certificates: Annotated[
        str,
        typer.Option(
            envvar="TRUNKLINE_CLIENT_CERTIFICATES",
            help="With --client-ca: required, or optional for agents that ask for another proof.",
        ),
    ] = "optional",
    trusted_proxies: Annotated[
        str,
        typer.Option(
            envvar="TRUNKLINE_TRUSTED_PROXIES",
            help="Networks of proxies, as CIDRs between commas, whose X-Forwarded-For is believed.",
        ),
    ] = "",
    proxy_protocol: Annotated[
        bool,
        typer.Option(
            envvar="TRUNKLINE_PROXY_PROTOCOL",
            help="Connections from --trusted-proxies begin with a PROXY header, version 1 or 2.",
        ),
    ] = False,
    control_host: Annotated[
        str, typer.Option(help="Where workers and the operator dial in.")
    ] = "0.0.0.0",
    control_port: int = contract.CONTROL_PORT,
    control_tls: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder with {contract.TLS_CERT_FILE} and {contract.TLS_KEY_FILE}: workers and the"
            " operator must dial in by TLS. Read again when it changes."
        ),
    ] = None,
    health_host: str = "0.0.0.0",
    health_port: int = contract.HEALTH_PORT,
    name: Annotated[str, typer.Option(help="This gateway's name in loads and logs.")] = "",
    routes_file: Annotated[
        Path | None, typer.Option(help="Routes to start from while no operator is connected.")
    ] = None,
    default_namespace: Annotated[
        str, typer.Option(help="Where an agent without a namespace is looked up.")
    ] = "default",
    grace_seconds: Annotated[
        float, typer.Option(help="How long live calls may go on after SIGTERM.")
    ] = 1860.0,
    address_waiting: Annotated[
        int,
        typer.Option(
            envvar="TRUNKLINE_ADDRESS_WAITING",
            min=0,
            help="Connections without an answer yet that one address may have. 0: as many as it likes.",
        ),
    ] = 1024,
    address_per_second: Annotated[
        float,
        typer.Option(
            envvar="TRUNKLINE_ADDRESS_PER_SECOND",
            min=0,
            help="Connections that one address may open in a second. 0: as many as it likes.",
        ),
    ] = 500.0,
    audio_times_real: Annotated[
        float,
        typer.Option(
            envvar="TRUNKLINE_AUDIO_TIMES_REAL",
            min=0,
            help="How much faster than speech a caller may send for long. 0: as it likes.",
        ),
    ] = 1.5,
    ledger: Annotated[
        Path | None,
        typer.Option(
            envvar="TRUNKLINE_LEDGER",
            help="A file that gets a line of JSON for each call. Without, they are lines of the log."
            " The file may be moved away at any time.",
        ),
    ] = None,
    ledger_url: Annotated[
        str,
        typer.Option(
            envvar="TRUNKLINE_LEDGER_URL",
            help="Where these lines are sent besides, by POST. A bearer for it comes from"
            f" {contract.ENV_LEDGER_TOKEN}.",
        ),
    ] = "",
    ledger_spool: Annotated[
        Path | None,
        typer.Option(
            envvar="TRUNKLINE_LEDGER_SPOOL",
            help="Folder for lines that --ledger-url has not taken yet. Without, they wait in memory.",
        ),
    ] = None,
    ledger_spool_mib: Annotated[
        int,
        typer.Option(
            envvar="TRUNKLINE_LEDGER_SPOOL_MIB",
            min=1,
            max=65536,
            help="MiB of lines that may wait; beyond that the oldest are dropped.",
        ),
    ] = 64,
) -> None:
    """Admits, places and relays calls.

    The operator's bearer comes from TRUNKLINE_OPERATOR_TOKEN.

    Examples:

    `TRUNKLINE_OPERATOR_TOKEN=… trunkline gateway --port 8080 --control-port 8081`

    `… trunkline gateway --ledger-url https://ledger.example/calls --ledger-spool /var/spool/trunkline`
    """
    from trunkline_runtime.gateway.access.doorstep import Bounds
    from trunkline_runtime.gateway.access.proxies import Proxies, ProxiesError
    from trunkline_runtime.gateway.accounts.books import BooksError, books_of
    from trunkline_runtime.gateway.process import GatewayConfig, run
    from trunkline_runtime.tls import MountedIdentity, TlsError

    token = os.environ.get(contract.ENV_OPERATOR_TOKEN, "")
    if not token:
        fail(f"set {contract.ENV_OPERATOR_TOKEN}: the operator proves itself with it", MISUSED)
    try:
        identity = None if control_tls is None else MountedIdentity(control_tls)
    except TlsError as error:
        fail(f"--control-tls: {error}", MISUSED)
    calls_tls = _calls_tls(tls, client_ca, client_certificates)
    try:
        proxies = Proxies.parse(trusted_proxies)
    except ProxiesError as error:
        fail(f"--trusted-proxies: {error}", MISUSED)
    if proxy_protocol and not proxies.networks:
        fail("--proxy-protocol needs --trusted-proxies: whose headers are to be believed", MISUSED)
    try:
        books = books_of(
            file=ledger,
            url=ledger_url,
            token=os.environ.get(contract.ENV_LEDGER_TOKEN, ""),
            folder=ledger_spool,
            most=ledger_spool_mib * 2**20,
        )
    except BooksError as error:
        fail(str(error), MISUSED)
    config = GatewayConfig(
        host=host,
        port=port,
        control_host=control_host,
        control_port=control_port,
        health_host=health_host,
        health_port=health_port,
        name=name or socket.gethostname(),
        operator_token=token,
        control_tls=identity,
        calls_tls=calls_tls,
        proxies=proxies,
        proxy_header=proxy_protocol,
        routes_file=routes_file,
        default_namespace=default_namespace,
        grace_seconds=grace_seconds,
        bounds=Bounds(waiting_per_address=address_waiting, per_second=address_per_second),
        audio_times_real=audio_times_real,
        books=books,
    )
    run_process("gateway", run(config))


def _calls_tls(folder: Path | None, client_ca: Path | None, clients: str) -> "CallersTls | None":
    """TLS for callers as the options of `gateway` say; ends the process where they make no sense."""
    from trunkline_runtime.gateway.access.caller_tls import CallersTls, ClientCertificates
    from trunkline_runtime.tls import TlsError

    if clients not in ("optional", "required"):
        fail(f"--client-certificates is optional or required, not {clients!r}", MISUSED)
    if folder is None:
        if client_ca is not None:
            fail("--client-ca needs --tls: certificates are shown in its handshake", MISUSED)
        return None
    asked = None
    if client_ca is not None:
        asked = ClientCertificates(ca=client_ca, required=clients == "required")
    elif clients == "required":
        fail("--client-certificates required needs --client-ca: whose are good", MISUSED)
    try:
        return CallersTls(folder, asked)
    except TlsError as error:
        fail(f"--tls: {error}", MISUSED)


@app.command()
def worker() -> None:
    """Owns an engine and its slots. Everything comes from TRUNKLINE_… variables, as in a pod.

    Example: `TRUNKLINE_AGENT=default/echo TRUNKLINE_ENGINE=loopback TRUNKLINE_SLOTS=4 … trunkline worker`
    """
    from trunkline_runtime.worker.host import ConfigError, WorkerConfig, run_worker

    try:
        config = WorkerConfig.from_environment(os.environ)
    except ConfigError as error:
        fail(str(error), MISUSED)
    run_process("worker", run_worker(config))


@app.command()
def call(
    question: Annotated[Path, typer.Argument(help="A WAV file of speech, any rate.")],
    agent: Annotated[str, typer.Option(help="[namespace/]name of the VoiceAgent.")],
    gateway: Annotated[
        str, typer.Option(envvar="TRUNKLINE_GATEWAY", help="Where a gateway answers callers.")
    ] = f"http://127.0.0.1:{contract.CALLS_PORT}",
    key: Annotated[
        str, typer.Option(envvar="TRUNKLINE_API_KEY", help="An API key of the agent's.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Where the answer's audio goes, as WAV.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest call, in seconds.")] = 60.0,
    after_greeting: Annotated[
        bool, typer.Option(help="Let the agent's greeting end first; without, speech cuts it off.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the call's record as JSON.")
    ] = False,
) -> None:
    """Calls an agent: says a WAV file, waits for the answer, and hangs up.

    Exit status: 0 answered, 1 refused, lost or without an answer, 2 misused.

    Example: `trunkline call --agent front-desk question.wav --out answer.wav`
    """
    from trunkline_runtime.audio.wav import WavError, read_wav, write_wav
    from trunkline_runtime.caller import CallError, EndedBy, Line, Plan, ask

    try:
        audio = read_wav(question)
    except WavError as error:
        fail(str(error), MISUSED)
    show = (lambda _: None) if as_json else _show
    plan = Plan(after_greeting=after_greeting, timeout_seconds=timeout)
    try:
        log = asyncio.run(ask(Line(url=gateway, model=agent, key=key), audio, plan, show))
    except CallError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(log.record(), indent=2))
    if out is not None and log.answer:
        write_wav(out, log.answer)
    match log.ended_by:
        case EndedBy.REPLY:
            if not as_json and log.response_seconds is not None:
                typer.echo(f"{'answered in':>11}  {log.response_seconds * 1000:.0f} ms")
        case EndedBy.REFUSED:
            again = f" (try again in {log.retry_after:g} s)" if log.retry_after else ""
            fail(f"refused with {log.status}: {log.refusal}{again}")
        case EndedBy.TIMEOUT:
            fail(f"no answer within {timeout:g} s; a longer --timeout may help")
        case EndedBy.CLOSED:
            fail(
                f"the call was closed with {log.close_code}: {log.close_reason or 'no reason given'}"
            )
        case _:
            fail(f"{gateway} does not speak OpenAI Realtime")


def _show(message: dict[str, Any]) -> None:
    """A line for each thing said."""
    match message:
        case {"type": "conversation.item.input_audio_transcription.completed", "transcript": heard}:
            typer.echo(f"{'it heard':>11}  {heard}")
        case {"type": "response.output_audio_transcript.done", "transcript": said}:
            typer.echo(f"{'it said':>11}  {said}")


@app.command()
def probe(
    agent: Annotated[str, typer.Option(help="[namespace/]name of the VoiceAgent.")],
    gateway: Annotated[
        str, typer.Option(envvar="TRUNKLINE_GATEWAY", help="Where a gateway answers callers.")
    ] = f"http://127.0.0.1:{contract.CALLS_PORT}",
    key: Annotated[
        str, typer.Option(envvar="TRUNKLINE_API_KEY", help="An API key of the agent's.")
    ] = "",
    expect_refusal: Annotated[
        bool, typer.Option(help="Take a plain refusal for success: the gateway is there.")
    ] = False,
    ca: Annotated[
        Path | None,
        typer.Option(help="Authorities, or the gateway's certificate itself, to trust for https."),
    ] = None,
    server_name: Annotated[
        str, typer.Option(help="Name in the gateway's certificate, where it is not the URL's host.")
    ] = "",
) -> None:
    """Calls an agent and hangs up at once: is it answered?

    Exit status: 0 answered (or refused, with --expect-refusal), 1 otherwise.

    Example: `trunkline probe --agent front-desk --gateway http://127.0.0.1:8080`
    """
    from trunkline_runtime.caller import Caller, CallError, Line
    from trunkline_runtime.tls import trusting

    try:
        tls = None if ca is None else trusting(ca.read_text())
    except (OSError, ValueError) as error:
        fail(f"--ca {ca}: {error}", MISUSED)
    line = Line(url=gateway, model=agent, key=key, tls=tls, server_name=server_name)

    async def place() -> "CallLog":
        caller = Caller.holding(line)
        running = asyncio.create_task(caller.run())
        await caller.settled.wait()
        caller.hang_up()
        return await running

    try:
        log = asyncio.run(place())
    except CallError as error:
        fail(str(error))
    if log.answered is not None and log.started is not None:
        typer.echo(f"{agent} answered after {(log.answered - log.started) * 1000:.0f} ms")
    elif expect_refusal:
        typer.echo(f"{gateway} answers: {log.status} {log.refusal}")
    else:
        fail(f"refused with {log.status}: {log.refusal}")


app.command()(explain)
app.command()(top)


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


def main() -> None:
    """The entry point: our commands and those that other packages add."""
    for point in sorted(entry_points(group=COMMANDS), key=lambda point: point.name):
        app.command(point.name)(point.load())
    app()
