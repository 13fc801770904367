"""`trunkline simulate`. Imports stay inside the functions: `trunkline --help` is quick."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from trunkline_operator.agent.spec import VoiceAgent
    from trunkline_operator.scaling.prices import Prices
    from trunkline_operator.simulation.model import Conditions
    from trunkline_operator.simulation.settings import Bill, Setting
    from trunkline_operator.simulation.traces import Trace

MISUSED: Final = 2
CENT: Final = 0.01
# Shorter runs need no bar.
PATIENCE_SECONDS: Final = 2.0

EXAMPLES = """
Examples:

`trunkline simulate calls.csv --agent agent.yaml` with lines such as `2026-11-27T08:00:00Z,184`

`kubectl logs -l app.kubernetes.io/component=gateway --tail=-1 > calls.log` and then
`trunkline simulate calls.log --agent agent.yaml --plot calls.png`

`trunkline simulate flash-crowd --agent agent.yaml` for a built-in trace: diurnal, spike, flash-crowd,
slow-ramp or weekend
"""


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            help="A CSV with the columns arrival (seconds or ISO 8601) and duration (seconds), a"
            " gateway's log, or the name of a built-in trace."
        ),
    ],
    agent: Annotated[Path, typer.Option(help="The VoiceAgent, as you would apply it.")],
    name: Annotated[
        str, typer.Option(help="Which VoiceAgent of the file, if it has several.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a PNG of these settings and the two cheapest others.")
    ] = None,
    draw: Annotated[
        list[str] | None,
        typer.Option(help="A setting to draw instead, as the table names it; repeatable."),
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="Your prices of GPUs.")] = None,
    gpu: Annotated[
        str, typer.Option(help="The GPU to price, where burst names none: L4, H100, …")
    ] = "",
    pod_start_seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="From a pod's creation until it is ready.")
    ] = 60.0,
    boot_seconds: Annotated[
        float, typer.Option(min=0, max=600, help="Until a new container at Modal takes a call.")
    ] = 5.0,
    scale: Annotated[
        float, typer.Option(min=0.01, max=100, help="Load of a built-in trace, as a factor.")
    ] = 1.0,
) -> None:
    """Plays calls against an agent's settings and others, with the decider of production.

    Prints how many calls would have found no warm slot, the hours of pods and containers, and their price.
    """
    _require("yaml", "cronsim", extra="trunkline[operator]")
    from trunkline_operator.scaling.prices import PricesError, read
    from trunkline_operator.simulation.model import Conditions
    from trunkline_operator.simulation.reading import TraceError
    from trunkline_operator.simulation.reading import trace as read_trace

    subject = declared(agent, name)
    try:
        known = read(prices.read_text() if prices else "")
        calls = read_trace(trace, subject.name, scale)
    except (TraceError, PricesError, OSError) as error:
        raise _fail(str(error)) from error
    if plot is not None:
        _require("matplotlib", extra="matplotlib")
    conditions = Conditions(pod_start_seconds=pod_start_seconds, boot_seconds=boot_seconds)
    bills = priced(calls, subject, known, conditions, gpu)
    typer.echo(table(calls, subject, bills))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(calls, subject, bills), indent=1) + "\n")
    if plot is not None:
        from trunkline_operator.simulation.plot import plotted

        panels = [bills[0], *(named(bills, draw) if draw else best(bills)[:2])]
        plotted(plot, calls, [(bill.setting, bill.outcome) for bill in panels])


simulate.__doc__ = f"{simulate.__doc__}\n{EXAMPLES}"


def _fail(sentence: str) -> typer.Exit:
    typer.secho(f"trunkline: {sentence}", err=True, fg=typer.colors.RED)
    return typer.Exit(MISUSED)


def _require(*modules: str, extra: str) -> None:
    """Ends the program if a module is not installed, with what to install."""
    for module in modules:
        if find_spec(module) is None:
            raise _fail(f"{module} is missing: pip install '{extra}'")


def declared(path: Path, name: str) -> "VoiceAgent":
    """The VoiceAgent of a file, with the rungs that policy allows; ends the program if there is none."""
    from dataclasses import replace

    import yaml

    from trunkline_operator.agent.parsing import parsed
    from trunkline_operator.agent.policy import ladder
    from trunkline_operator.agent.spec import SpecError
    from trunkline_runtime.contract import KIND

    try:
        documents = [one for one in yaml.safe_load_all(path.read_text()) if isinstance(one, dict)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _fail(f"{path} cannot be read: {error}") from error
    agents = {
        str(_mapping(one, "metadata").get("name")): one
        for one in documents
        if one.get("kind") == KIND and (not name or _mapping(one, "metadata").get("name") == name)
    }
    if len(agents) != 1:
        found = f"has {len(agents)} of kind {KIND}" + (f" and name {name}" if name else "")
        raise _fail(f"{path} {found}: give one, or its --name")
    ((called, found_agent),) = agents.items()
    metadata = {"name": called, "namespace": "default", "uid": "simulated"}
    try:
        agent = parsed({"metadata": metadata, "spec": _mapping(found_agent, "spec")})
    except SpecError as error:
        raise _fail(f"{path}: {error}") from error
    return replace(agent, burst=ladder(agent).burst)


def _mapping(place: dict[str, Any], key: str) -> dict[str, Any]:
    value = place.get(key)
    return value if isinstance(value, dict) else {}


def priced(
    trace: "Trace", agent: "VoiceAgent", prices: "Prices", conditions: "Conditions", gpu: str = ""
) -> "list[Bill]":
    """The bill of the agent as given, then those of other settings."""
    from trunkline_operator.simulation.settings import billed, given, others, price_of

    price = price_of(agent, prices, gpu)
    settings: list[Setting] = [
        given(agent, prices, conditions, trace),
        *others(agent, prices, conditions, trace),
    ]
    bills = []
    with _progress(len(settings)) as advance:
        for number, setting in enumerate(settings):

            def told(share: float, number: int = number, name: str = setting.name) -> None:
                advance(number + share, name)

            bills.append(billed(trace, setting, conditions, price, told))
    return bills


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float, str], None]]:
    """A bar on standard error, once two seconds have passed."""
    from rich.console import Console
    from rich.progress import Progress

    began = time.monotonic()
    console = Console(stderr=True)
    # Where nobody watches, an empty bar would still leave an empty line.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, visible=False)

        def advance(done: float, name: str) -> None:
            visible = time.monotonic() - began > PATIENCE_SECONDS
            bar.update(task, completed=done, description=name, visible=visible)

        yield advance


def named(bills: "Sequence[Bill]", names: Sequence[str]) -> "list[Bill]":
    """The bills of these settings; ends the program if there is no such setting."""
    known = {bill.setting: bill for bill in bills}
    if unknown := [name for name in names if name not in known]:
        raise _fail(f"--draw: there is no setting {unknown[0]!r}, only: {', '.join(known)}")
    return [known[name] for name in names]


def best(bills: "Sequence[Bill]") -> "list[Bill]":
    """The others that refuse no more calls and cost less than the first, the cheapest first."""
    own, others = bills[0], bills[1:]
    if own.dollars is None:
        return []
    cheaper = [
        (bill.dollars, bill)
        for bill in others
        if bill.dollars is not None
        and bill.dollars < own.dollars - CENT
        and bill.outcome.refused <= own.outcome.refused
    ]
    return [bill for _, bill in sorted(cheaper, key=lambda pair: pair[0])]


def table(trace: "Trace", agent: "VoiceAgent", bills: "Sequence[Bill]") -> str:
    """For people, as Markdown."""
    from trunkline_operator.simulation.settings import floor_hours
    from trunkline_operator.simulation.traces import HOUR

    width = max(len(bill.setting) for bill in bills)
    lines = [
        f"{len(trace.calls)} calls in {trace.seconds / HOUR:.1f} h of {trace.name}, for {agent.name}",
        "",
        f"| {'setting':{width}} | overflow | refused | GPU-hours | burst hours |   dollars |",
        f"|{'-' * (width + 2)}|---------:|--------:|----------:|------------:|----------:|",
    ]
    for bill in bills:
        outcome = bill.outcome
        dollars = "unknown" if bill.dollars is None else f"{bill.dollars:.2f}"
        lines.append(
            f"| {bill.setting:{width}} | {outcome.overflow:8.2%} | {outcome.refused:7} "
            f"| {bill.gpu_hours:9.1f} | {outcome.burst_hours:11.1f} | {dollars:>9} |"
        )
    lines += [
        "",
        f"Packed without a gap, the calls need {floor_hours(trace, agent):.1f} GPU-hours.",
    ]
    if cheapest := best(bills)[:1]:
        saved = (bills[0].dollars or 0.0) - (cheapest[0].dollars or 0.0)
        lines.append(f"Cheapest without more refusals: {cheapest[0].setting}, by ${saved:.2f}.")
    return "\n".join(lines)


def as_json(trace: "Trace", agent: "VoiceAgent", bills: "Sequence[Bill]") -> dict[str, Any]:
    """For programs."""
    from trunkline_operator.simulation.settings import floor_hours

    return {
        "trace": {"name": trace.name, "calls": len(trace.calls), "seconds": trace.seconds},
        "agent": agent.name,
        "packedGpuHours": floor_hours(trace, agent),
        "settings": [
            {
                "setting": bill.setting,
                "overflow": bill.outcome.overflow,
                "warm": bill.outcome.warm,
                "burst": bill.outcome.burst,
                "refused": bill.outcome.refused,
                "gpuHours": bill.gpu_hours,
                "podHours": bill.outcome.pod_hours,
                "podsCreated": bill.outcome.created,
                "burstHours": bill.outcome.burst_hours,
                "burstCallHours": bill.outcome.burst_call_hours,
                "warmDollars": bill.warm_dollars,
                "burstDollars": bill.burst_dollars,
                "dollars": bill.dollars,
            }
            for bill in bills
        ],
    }
