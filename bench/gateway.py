"""The gateway: what a relayed message, a live call and an admission cost, beside what else relays calls.

    python bench/gateway.py [--quick] [--only admission|memory] [--json FILE]
    python bench/gateway.py --soak MINUTES [--calls N] [--lasting SECONDS] [--rate N] [--json FILE]

All on loopback. What is measured has one core; a load generator in C (bench/load/load.c), which is the callers and
the worker behind the relay, has the other. Costs are CPU time and memory as the kernel counts them, delays are between
the generator's send and receive. A message has 120 bytes, and 50 go each way in a second, as speech in frames of 20 ms.

The generator looks at its sockets once in a millisecond, except where delays are measured: waking a process on the
same machine costs a relay as much as its own work does, and over a network it wakes nobody.

A capacity is the most calls with which 98 % of all messages arrive and the 99th percentile of both directions stays
below 5 ms, on steps of 10 %. `against` the same numbers, "the load generator alone" speaks to its own worker with no
relay between: what it reaches is the most that can be measured here.

A soak (bench/load/soak.py) ends with status 1 if anything went wrong. Its calls send frames of 80 ms, as Moshi's do:
300 calls with frames of 20 ms fill 0.7 of a core, and what else the machine does would be counted as a fault.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import report
from load import relays
from load.relays import ASYNCIO, HAPROXY, NGINX, TRUNKLINE, UVLOOP, Relay, Stand
from load.rig import (
    ANSWER_SECONDS,
    BenchError,
    Generator,
    Load,
    Places,
    awake,
    build,
    free_ports,
    loading,
    tell,
)
from load.soak import Churn, soak

ALONE: Final = "the load generator alone"
RATE: Final = 50  # messages a second and direction
LATE_US: Final = 5_000
ARRIVED: Final = 0.98
STEP: Final = 1.1  # from one number of calls to the next that is tried
FEWEST: Final = 16
MOST_CALLS: Final = 4_000
TRIES: Final = 2  # a machine that stands still for a moment says nothing about a relay

Start = Callable[[], AbstractContextManager[Relay]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is done."""

    rounds: int
    calls: int
    holding: int  # calls, for the memory of one
    seconds: float  # of one measurement
    warm_up: float
    capacity_rounds: int
    admission_rounds: int  # more: a 99th percentile differs more from one to the next than the rest
    at_once: int  # callers that keep coming, for the cost of an admission


FULL: Final = Effort(
    rounds=5,
    calls=150,
    holding=500,
    seconds=1.5,
    warm_up=0.4,
    capacity_rounds=3,
    admission_rounds=11,
    at_once=32,
)
QUICK: Final = Effort(
    rounds=1,
    calls=8,
    holding=16,
    seconds=0.3,
    warm_up=0.1,
    capacity_rounds=0,
    admission_rounds=1,
    at_once=4,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement of a relay under load."""

    us: float  # CPU time a message, of the relay; 0 without one
    generator_us: float  # likewise, of the load generator
    p50: float  # microseconds from send to receive, the mean of both directions
    p99: float  # of the worse direction
    arrived: float  # share of the messages that should have
    faults: int  # messages missing, and calls that failed


Samples = dict[str, list[Sample]]


class Bench:
    """The stand, the generator and the peers that could be started."""

    def __init__(
        self, stand: Stand, callers: relays.Callers, generator: Generator, effort: Effort
    ) -> None:
        self.stand = stand
        self.callers = callers
        self.generator = generator
        self.effort = effort
        self.missing: dict[str, str] = {}  # peer: why it is not there

    @property
    def starts(self) -> dict[str, Start]:
        """How each relay is started, by name."""
        return {
            TRUNKLINE: partial(relays.before_workers, self.stand, self.callers),
            ASYNCIO: partial(relays.by_websockets, self.stand, on_uvloop=False),
            UVLOOP: partial(relays.by_websockets, self.stand, on_uvloop=True),
            NGINX: partial(relays.nginx, self.stand),
            HAPROXY: partial(relays.haproxy, self.stand),
        }

    def all_started(self, stack: contextlib.ExitStack) -> dict[str, Relay]:
        """Those that are installed, in the order in which they take turns."""
        started = {}
        for name, start in self.starts.items():
            try:
                started[name] = stack.enter_context(start())
            except relays.NotInstalled as error:
                self.missing[name] = str(error)
        return started

    def loading(
        self, relay: Relay | None, *, rate: float = RATE, awake: bool = False
    ) -> AbstractContextManager[Load]:
        """Callers of a relay, or of nobody between them and the worker. `awake`: each byte is read at once."""
        port = relay.port if relay else self.stand.worker_port
        options: list[object] = [] if awake else ["-w"]
        options += ["-p", port, "-b", self.stand.worker_port, "-r", rate]
        options += ["-t", self.callers.keys]
        if self.stand.certificates:
            options += ["-c", self.stand.certificates.certificate]
            options += ["-k", self.stand.certificates.key]
        return loading(self.generator, self.stand.places.load, *options)

    def sample(self, load: Load, relay: Relay | None, calls: int) -> Sample:
        """So many calls for a while."""
        load.calls(calls)
        time.sleep(self.effort.warm_up)
        load.reset()
        before = relay.process.cpu() if relay else 0.0
        time.sleep(self.effort.seconds)
        used = relay.process.cpu() - before if relay else 0.0
        found = load.report()
        return Sample(
            us=used / found["received"] * 1e6,
            generator_us=found["cpu"] / found["received"] * 1e6,
            p50=(found["up"]["p50"] + found["down"]["p50"]) / 2,
            p99=max(found["up"]["p99"], found["down"]["p99"]),
            arrived=found["received"] / (2 * RATE * calls * found["seconds"]),
            faults=sum(found[key] for key in ("gaps", "lost", "stuck", "refused")),
        )


# --- messages ---


def _messages(bench: Bench) -> Samples:
    """Each relay under the same load, in turn."""
    with contextlib.ExitStack() as stack:
        started = bench.all_started(stack)
        return _in_turn(bench, started, bench.effort.rounds, awake=False)


def _delays(bench: Bench) -> Samples:
    """The same with a generator that reads at once, and the generator alone: what of a delay is its own."""
    with contextlib.ExitStack() as stack:
        turns: dict[str, Relay | None] = {**bench.all_started(stack), ALONE: None}
        return _in_turn(bench, turns, min(3, bench.effort.rounds), awake=True)


def _in_turn(
    bench: Bench, turns: Mapping[str, Relay | None], rounds: int, *, awake: bool
) -> Samples:
    found: Samples = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, relay in turns.items():
            with bench.loading(relay, awake=awake) as load:
                sample = bench.sample(load, relay, bench.effort.calls)
            if sample.faults:
                raise BenchError(f"{name} failed {bench.effort.calls} calls: {sample}")
            if number:  # the first round warms up
                found[name].append(sample)
        tell(f"{'delays' if awake else 'messages'}, round {number} of {rounds}")
    return found


def _message_rows(
    bench: Bench, found: Samples, link: str, bounds: Mapping[str, tuple[float, float]]
) -> list[report.Row]:
    """CPU time a message against each peer. `bounds` are floor and target, by peer."""
    rows = []
    for peer in (ASYNCIO, UVLOOP, NGINX, HAPROXY):
        floor, target = bounds.get(peer, (None, None))
        rows.append(
            report.Row(
                what=f"relay, {link}: CPU a message",
                against=bench.missing.get(peer, peer),
                unit="µs",
                ours=[each.us for each in found[TRUNKLINE]],
                theirs=[each.us for each in found.get(peer, ())],
                floor=floor,
                target=target,
                at_most=True,
            )
        )
    return rows


def _delay_rows(bench: Bench, found: Samples) -> list[report.Row]:
    """What a relay adds to the delay of a message, at the median."""
    without = statistics.median(each.p50 for each in found[ALONE])
    added = {name: [each.p50 - without for each in samples] for name, samples in found.items()}
    return [
        report.Row(
            what=f"relay, plain TCP: delay added at the median, {bench.effort.calls} calls",
            against=bench.missing.get(peer, peer),
            unit="µs",
            ours=added[TRUNKLINE],
            theirs=added.get(peer, ()),
            at_most=True,
        )
        for peer in (ASYNCIO, UVLOOP, NGINX, HAPROXY)
    ]


def _generator_row(found: Samples) -> report.Row:
    """Whether the generator is leaner than the leanest of what it measures."""
    leanest = min(found, key=lambda name: statistics.median(each.us for each in found[name]))
    return report.Row(
        what="load generator: CPU a message",
        against=f"the leanest relay, {leanest}",
        unit="µs",
        ours=[each.generator_us for each in found[leanest]],
        theirs=[each.us for each in found[leanest]],
        target=1,
        at_most=True,
    )


# --- capacity ---


def _capacities(bench: Bench, found: Samples) -> dict[str, list[float]]:
    """Calls that one core carries, several times for each relay; `found` says where to begin to look."""
    most: dict[str, list[float]] = {}
    if not bench.effort.capacity_rounds:
        return most
    with contextlib.ExitStack() as stack:
        turns: dict[str, Relay | None] = {**bench.all_started(stack), ALONE: None}
        for number in range(bench.effort.capacity_rounds):
            for name, relay in turns.items():
                costs = [max(each.us, each.generator_us) for each in found[name]]
                likely = 0.9e6 / (2 * RATE * statistics.median(costs))
                with bench.loading(relay) as load:
                    held = partial(_held, bench, load, relay)
                    most.setdefault(name, []).append(_most(held, likely))
                tell(f"capacity, round {number + 1}: {name} {most[name][-1]:.0f} calls")
    return most


def _held(bench: Bench, load: Load, relay: Relay | None, calls: int) -> bool:
    """Whether so many calls are carried in one of some tries."""
    for _ in range(TRIES):
        sample = bench.sample(load, relay, calls)
        if sample.p99 < LATE_US and sample.arrived >= ARRIVED and not sample.faults:
            return True
    return False


def _most(held: Callable[[int], bool], likely: float) -> float:
    """The most calls that are held, looked for from a likely number upwards or downwards."""
    calls = min(max(likely, FEWEST), MOST_CALLS)
    if held(round(calls)):
        while calls * STEP <= MOST_CALLS and held(round(calls * STEP)):
            calls *= STEP
        return round(calls)
    while calls > FEWEST:
        calls /= STEP
        if held(round(calls)):
            return round(calls)
    return 0.0


def _capacity_rows(bench: Bench, most: Mapping[str, Sequence[float]]) -> list[report.Row]:
    if not most:
        return []
    return [
        report.Row(
            what="relay, plain TCP: calls on one core, p99 below 5 ms",
            against=bench.missing.get(peer, peer),
            unit="calls",
            ours=most[TRUNKLINE],
            theirs=most.get(peer, ()),
        )
        for peer in (ASYNCIO, UVLOOP, NGINX, HAPROXY, ALONE)
    ]


# --- memory ---


def _memory_rows(bench: Bench) -> list[report.Row]:
    """Memory of a call, in relays that have just been started."""
    found: dict[str, list[float]] = {}
    for number in range(1 if bench.effort is QUICK else 3):
        for name, start in bench.starts.items():
            try:
                with start() as relay, bench.loading(relay, rate=1) as load:
                    before = relay.process.memory()
                    load.calls(bench.effort.holding)
                    time.sleep(bench.effort.warm_up)
                    grown = relay.process.memory() - before
            except relays.NotInstalled as error:
                bench.missing[name] = str(error)
                continue
            found.setdefault(name, []).append(grown / bench.effort.holding)
        tell(f"memory, round {number + 1}")
    bounds = {ASYNCIO: (1 / 4, 1 / 10)}
    return [
        report.Row(
            what=f"relay, plain TCP: memory a call, {bench.effort.holding} calls",
            against=bench.missing.get(peer, peer),
            unit="KB",
            ours=found[TRUNKLINE],
            theirs=found.get(peer, ()),
            floor=bounds[peer][0] if peer in bounds else None,
            target=bounds[peer][1] if peer in bounds else None,
            at_most=True,
        )
        for peer in (ASYNCIO, UVLOOP, NGINX, HAPROXY)
    ]


# --- admission ---

API_KEY: Final = "API key"
SEEN: Final = "a token seen before"
NEW: Final = "a token never seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What it took from a connection to its 101."""

    p50: float  # ms, one caller after the other
    p99: float
    us: float  # CPU time of the gateway for one, many callers at once


def _admissions(bench: Bench) -> dict[str, list[Admission]]:
    """A gateway before a real worker process, and bare handshakes, in turn."""
    bench.callers.sign(relays.TOKENS if bench.effort is FULL else 8, time.time())
    found: dict[str, list[Admission]] = {}
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(relays.before_a_real_worker(bench.stand, bench.callers))
        bare = [
            stack.enter_context(relays.echo(bench.stand, on_uvloop=uvloop))
            for uvloop in (False, True)
        ]
        turns = {
            API_KEY: (gateway, bench.callers.keys),
            SEEN: (gateway, bench.callers.token),
            NEW: (gateway, bench.callers.tokens),
        } | {relay.name: (relay, bench.callers.keys) for relay in bare}
        stack.enter_context(awake())
        for number in range(bench.effort.admission_rounds + 1):
            for name, (relay, bearers) in turns.items():
                admission = _admission(bench, relay, bearers)
                if number:
                    found.setdefault(name, []).append(admission)
            tell(f"admission, round {number} of {bench.effort.admission_rounds}")
    return found


def _admission(bench: Bench, relay: Relay, bearers: Path) -> Admission:
    options = ("-p", relay.port, "-t", bearers, "-a")
    with loading(bench.generator, bench.stand.places.load, *options) as load:
        alone, _ = _coming(bench, load, relay, 1)
        many, used = _coming(bench, load, relay, bench.effort.at_once)
    return Admission(
        p50=alone["p50"] / 1e3,
        p99=alone["p99"] / 1e3,
        us=used / many["count"] * 1e6,
    )


def _coming(bench: Bench, load: Load, relay: Relay, callers: int) -> tuple[dict[str, Any], float]:
    """The delays of so many callers that keep coming, and the CPU time of the relay in seconds."""
    load.admit(callers)
    time.sleep(bench.effort.warm_up)
    load.reset()
    before = relay.process.cpu()
    time.sleep(bench.effort.seconds)
    found, end = load.report(), time.monotonic() + ANSWER_SECONDS
    while not found["admission"]["count"] and time.monotonic() < end:  # on a machine with no time
        time.sleep(bench.effort.seconds)
        found = load.report()
    used = relay.process.cpu() - before
    if not found["admission"]["count"]:
        raise BenchError(f"no caller of {relay.name} was answered in {ANSWER_SECONDS:g} s: {found}")
    if found["refused"] or found["lost"] or found["stuck"]:
        raise BenchError(f"callers of {relay.name} were not admitted: {found}")
    delays: dict[str, Any] = found["admission"]
    return delays, used


def _admission_rows(found: Mapping[str, Sequence[Admission]]) -> list[report.Row]:
    rows = []
    for shown in (API_KEY, SEEN, NEW):
        ours, bare = found[shown], found[UVLOOP]
        bound = shown == API_KEY
        rows += [
            report.Row(
                what=f"admission by {shown}, p50",
                against="1 ms",
                unit="ms",
                ours=[each.p50 for each in ours],
                theirs=[1.0],
                floor=2 if bound else None,
                target=1 if bound else None,
                at_most=True,
            ),
            report.Row(
                what=f"admission by {shown}, p99",
                against="a bare handshake of websockets on uvloop",
                unit="ms",
                ours=[each.p99 for each in ours],
                theirs=[each.p99 for each in bare],
                floor=3 if bound else None,
                target=2 if bound else None,
                at_most=True,
            ),
            report.Row(
                what=f"admission by {shown}, a second and core",
                against="a bare handshake of websockets on uvloop",
                unit="calls",
                ours=[1e6 / each.us for each in ours],
                theirs=[1e6 / each.us for each in bare],
            ),
        ]
    return rows


# --- all of it ---


@contextlib.contextmanager
def _bench(quick: bool) -> Iterator[Bench]:
    effort = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stand = Stand(
            folder=folder,
            places=Places.of_this_machine(urgent=not quick),
            worker_port=free_ports(1)[0],
        )
        yield Bench(stand, relays.Callers(folder), build(folder), effort)


def measure(quick: bool) -> list[report.Row]:
    with _bench(quick) as bench:
        plain = _messages(bench)
        rows = _message_rows(
            bench,
            plain,
            "plain TCP",
            {ASYNCIO: (1 / 3, 1 / 4), UVLOOP: (1 / 2.2, 1 / 3), NGINX: (1.6, 1.2)},
        )
        rows += _with_tls(bench)
        delays = _delays(bench)
        rows += _delay_rows(bench, delays)
        rows += _capacity_rows(bench, _capacities(bench, delays | plain))
        rows += _memory_rows(bench)
        rows += _admission_rows(_admissions(bench))
        return [*rows, _generator_row(plain)]


def _measure_admission(quick: bool) -> list[report.Row]:
    with _bench(quick) as bench:
        return _admission_rows(_admissions(bench))


def _measure_memory(quick: bool) -> list[report.Row]:
    with _bench(quick) as bench:
        return _memory_rows(bench)


ONLY: Final = {"admission": _measure_admission, "memory": _measure_memory}


def _with_tls(bench: Bench) -> list[report.Row]:
    """The same with TLS to the worker, which is how a gateway speaks to pods with certificates and to Modal."""
    what = "TLS to the worker"
    if not bench.generator.tls:
        why = "not measured: the load generator needs OpenSSL, as root: apt-get install libssl-dev"
        return [report.Row(what=f"relay, {what}", against=why, unit="µs", ours=[0.0], theirs=[])]
    certificates = relays.Certificates.made(bench.stand.folder)
    stand = Stand(
        folder=bench.stand.folder,
        places=bench.stand.places,
        worker_port=bench.stand.worker_port,
        certificates=certificates,
    )
    secure = Bench(stand, bench.callers, bench.generator, bench.effort)
    return _message_rows(secure, _messages(secure), what, {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="gateway", add_help=False)
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--lasting", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=12.5, metavar="N")  # messages a second
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", choices=ONLY, help="measure nothing else")
    options, others = parser.parse_known_args()
    try:
        if options.only:
            others += ["--json", str(options.json)] if options.json else []
            given = f" --only {options.only}"
            report.main("gateway", ONLY[options.only], arguments=others, given=given)
        elif options.soak is None:
            report.main("gateway", measure)
        else:
            calls = Churn(calls=options.calls, lasting=options.lasting, rate=options.rate)
            sys.exit(soak(options.soak, calls, options.json))
    except BenchError as error:
        sys.exit(f"gateway: {error}")


if __name__ == "__main__":
    main()
