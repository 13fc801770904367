"""`trunkline explain` and `trunkline top`. Imports stay inside the functions: `trunkline --help` is quick."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TextIO

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trunkline_runtime.insight.board import Board
    from trunkline_runtime.insight.explanation import Explanation

FAILED, MISUSED = 1, 2
ERROR_CHARS: Final = 60  # of a burst's failure, in a table


def explain(
    call: Annotated[
        str, typer.Argument(help="The call's id, from the header Trunkline-Call, or how it begins.")
    ],
    ledger: Annotated[
        str, typer.Option(help="A ledger or a gateway's log; - is standard input.")
    ] = "-",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record and the verdict as JSON.")
    ] = False,
) -> None:
    """Says why a call went where it went: each rung, its reason, its time, and what one more pod would have changed.

    Exit status: 0 found, 1 not found, 2 misused.

    Examples:

    `trunkline explain 3f9c1e22 --ledger /var/log/trunkline/calls.ndjson`

    `kubectl logs -l app.kubernetes.io/component=gateway --tail=-1 --prefix | trunkline explain 3f9c1e22`
    """
    import json

    from trunkline_runtime.insight.explanation import NotFound, explained, found

    with _reading(ledger) as lines:
        try:
            explanation = explained(found(lines, call))
        except NotFound as error:
            _fail(str(error))
    if as_json:
        typer.echo(json.dumps(explanation.as_json(), indent=2))
        return
    for line in told(explanation):
        typer.echo(line)


@contextmanager
def _reading(ledger: str) -> Iterator[TextIO]:
    if ledger == "-":
        if sys.stdin.isatty():
            _fail("give --ledger FILE, or a gateway's log on standard input", MISUSED)
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIOWrapper here
        yield sys.stdin
        return
    try:
        with open(ledger, encoding="utf-8", errors="replace") as file:
            yield file
    except OSError as error:
        _fail(f"{ledger} cannot be read: {error.strerror}", MISUSED)


def told(explanation: "Explanation") -> Iterator[str]:
    """An explanation in lines for people."""
    from trunkline_runtime.insight.explanation import WARM

    record, what = explanation.record, explanation.what
    who = [f"call {record['call']}", str(record.get("agent", "")), *_named(record, "tenant")]
    yield " · ".join([*who, *_named(record, "gateway")])
    ms = record.get("admission_ms", 0.0)
    match what:
        case "ended":
            lost = ", lost with its worker" if record.get("lost") else ""
            yield (
                f"answered after {ms} ms; ended after {record.get('seconds')} s by the"
                f" {record.get('by')}, code {record.get('code')}{lost}"
            )
        case "live":
            yield f"answered after {ms} ms; not over when this was written"
        case "refused":
            yield f"refused with 503 after {ms} ms"
        case _:
            yield f"left after {ms} ms, while it was being placed"
    yield ""
    yield f"{'rung':<20} {'worker':<32} {'ms':>9}  what it said"
    yield f"{'(before the ladder)':<20} {'':<32} {explanation.before:>9.1f}  who calls, and their limits"
    for rung in explanation.rungs:
        yield f"{rung.rung:<20} {rung.worker or '-':<32} {rung.ms:>9.1f}  {rung.said}"
    if warm := record.get("warm"):
        counts = (f"{key} {warm[key]}" for key in (*WARM, "aside") if key in warm)
        yield f"{'':<20} warm pods then: {', '.join(counts)}"
    yield ""
    verdict = explanation.one_more_pod
    yield f"with one more pod: {verdict.would} ({verdict.because})"
    yield f"cost: {_cost(record)}"
    if what == "ended":
        yield f"talk: {_talk(record)}"


def _cost(record: dict[str, object]) -> str:
    cost, price = record.get("cost"), record.get("price")
    if isinstance(cost, int | float):
        return f"${cost:.4f}" + (f" ({price})" if price else "")
    return "not in the record, for no price was known; `trunkline simulate` prices a whole log"


def _talk(record: dict[str, object]) -> str:
    """What the worker has told of the conversation."""
    said = {
        "{} s of audio from the caller": record.get("audio_seconds_up"),
        "{} s to it": record.get("audio_seconds_down"),
        "the first after {} ms": record.get("first_audio_ms"),
        "{} turns": record.get("turns"),
        "{} gaps": record.get("gaps"),
    }
    parts = [words.format(value) for words, value in said.items() if value is not None]
    return ", ".join(parts) or "not known: the worker told nothing, as one that died or is not ours"


def _named(record: dict[str, object], key: str) -> list[str]:
    return [f"{key} {record[key]}"] if record.get(key) else []


def top(
    gateway_health: Annotated[
        list[str],
        typer.Option(help="URL of a gateway's health port; repeat it for each gateway."),
    ],
    once: Annotated[bool, typer.Option(help="Look once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each look.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")
    ] = 2.0,
) -> None:
    """Shows agents, pods, slots, calls and burst as the gateways see them, until Ctrl-C.

    Plain lines where standard output is no terminal. Each worker counts once, calls of all gateways are
    added. Exit status: 0, or 1 when no gateway answered the only or the first look.

    Examples:

    `kubectl port-forward deploy/trunkline-gateway 9090 &` and then
    `trunkline top --gateway-health http://127.0.0.1:9090`

    `trunkline top --gateway-health http://10.0.0.7:9090 --gateway-health http://10.0.0.8:9090 --once --json`
    """
    import asyncio
    import contextlib

    for url in gateway_health:
        if not url.startswith(("http://", "https://")):
            _fail(f"--gateway-health {url} is no URL: give http://HOST:PORT", MISUSED)
    live = sys.stdout.isatty() and not once and not as_json
    with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(_watch(gateway_health, None if once else interval, as_json, live))


async def _watch(urls: list[str], interval: float | None, as_json: bool, live: bool) -> None:
    import asyncio
    import contextlib
    import json
    import signal

    from rich.live import Live

    from trunkline_runtime.insight.asking import states
    from trunkline_runtime.insight.board import board

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    if live:
        # A shell starts its background jobs with SIGINT ignored, and asyncio would leave it so.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
    now = loop.time
    seen: Board | None = None
    with Live(auto_refresh=False) if live else contextlib.nullcontext() as screen:
        while True:
            first = seen is None
            seen = board(await states(urls), now(), seen)
            if screen is not None:
                screen.update(table(seen), refresh=True)
            elif as_json:
                typer.echo(json.dumps(seen.as_json()))
            else:
                typer.echo("\n".join(plain(seen)))
            if first and seen.blind:
                raise typer.Exit(FAILED)
            if interval is None:
                return
            await asyncio.sleep(interval)


def plain(seen: "Board") -> Iterator[str]:
    """A look in lines: one for each gateway and each agent, `key=value` throughout."""
    for gateway in seen.gateways:
        trouble = f" trouble={gateway.trouble!r}" if gateway.trouble else ""
        name = f" name={gateway.name} calls={gateway.calls}" if gateway.name else ""
        yield f"gateway url={gateway.url}{name}{trouble}"
    for row in seen.agents:
        pace = "-" if row.arrivals_a_minute is None else f"{row.arrivals_a_minute:g}"
        error = f" burst_error={row.burst_error!r}" if row.burst_error else ""
        shut = f" shut={','.join(row.shut)}" if row.shut else ""
        spent = "-" if row.spent is None else f"{row.spent:.4f}"
        yield (
            f"agent name={row.agent} pods={row.pods} draining={row.draining} slots={row.slots}"
            f" busy={row.busy} free={row.free} calls={row.calls} burst={row.burst} per_minute={pace}"
            f" refused={row.refused} lost={row.lost} waiting={row.waiting} aside={row.aside}"
            f" spent={spent}{shut}{error}"
        )


def table(seen: "Board") -> "Table":
    """A look for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    caption = "; ".join(
        f"{gateway.name or gateway.url}: {gateway.trouble or f'{gateway.calls} calls'}"
        for gateway in seen.gateways
    )
    made = Table("agent", caption=escape(caption), caption_justify="left")
    for heading in (
        "pods",
        "slots",
        "busy",
        "free",
        "calls",
        "burst",
        "a minute",
        "waiting",
        "refused",
        "lost",
        "$ burst",
    ):
        made.add_column(heading, justify="right")
    made.add_column("trouble")
    for row in seen.agents:
        notes = {"draining": row.draining, "aside": row.aside}
        marks = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
        pods = f"{row.pods} ({marks})" if marks else str(row.pods)
        trouble = "; ".join(filter(None, [*(f"{rung} shut" for rung in row.shut), row.burst_error]))
        pace = "" if row.arrivals_a_minute is None else f"{row.arrivals_a_minute:g}"
        numbers = (row.slots, row.busy, row.free, row.calls, row.burst)
        made.add_row(
            escape(row.agent),
            pods,
            *map(str, numbers),
            pace,
            str(row.waiting),
            str(row.refused),
            str(row.lost),
            "" if row.spent is None else f"{row.spent:.2f}",
            escape(trouble[:ERROR_CHARS]),
        )
    return made


def _fail(sentence: str, code: int = FAILED) -> NoReturn:
    """Ends the program with a sentence on standard error."""
    typer.secho(f"trunkline: {sentence}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)
