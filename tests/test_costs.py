"""What calls cost and what their containers cost, on the local Modal: real containers, real sessions, real counts."""

import asyncio
import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from gateway_rig import AGENT, a_gateway, a_route, call, on_uvloop, until
from test_modal_gateway import APP, GOOD, live, modal, rung

from trunkline_operator.burst.client import Place
from trunkline_operator.gateways.loads import Loads, parse_load
from trunkline_operator.scaling import spend
from trunkline_operator.scaling.spend import Account, Terms
from trunkline_runtime.contract import Price
from trunkline_runtime.gateway.accounts.books import Books
from trunkline_runtime.gateway.accounts.files import LedgerFile

COUNT_SECONDS = 1.0  # between counts; the operator takes ten
TERMS = Terms(container_second=0.01, slots=2, call_seconds=620.0, linger_seconds=2.0, most=8)


def test_calls_and_idle_are_what_the_containers_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The sum of the ledger and idle is container-seconds × price, to two counts for each container."""
    file = tmp_path / "calls"

    @on_uvloop
    async def run() -> None:
        async with modal(monkeypatch) as (local, burst):
            app = replace(APP, slots=2, scaledown_window=2, snapshot="none")
            near = await rung(burst, app)
            near["price"] = Price(callSecond=TERMS.call_second, basis="a test's")
            account, longest = Account(at=local.boots[0].t), 0.0
            place = Place(app=app.name, environment="", credentials=GOOD)
            loads = Loads()

            async def count(account: Account) -> Account:
                """What the operator does each 10 s, and each second."""
                nonlocal longest
                await asyncio.sleep(COUNT_SECONDS)
                now = time.time()
                starts = await burst.starts(place, app.regions, account.at, now)
                longest = max(longest, now - account.at)
                account = spend.counted(account, TERMS, starts.alive, now)
                load = parse_load(json.dumps(gateway.gateway.load()))
                assert load
                loads.hear(load, now)
                return spend.heard(account, loads.spending(AGENT), now)

            books = Books(file=LedgerFile(file))
            async with a_gateway(a_route(rungs=[near]), books=books) as gateway:
                async with contextlib.AsyncExitStack() as calls:
                    for _ in range(3):  # on two containers
                        await live(await calls.enter_async_context(call(gateway)))
                    for _ in range(3):
                        account = await count(account)
                await until(lambda: not gateway.gateway.load()["agents"][AGENT]["burst"])
                while any(boot.end_t is None for boot in local.boots):
                    account = await count(account)
                account = await count(account)
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            ledger = sum(line["cost"] for line in lines)
            paid = sum(
                ((boot.end_t or 0.0) - boot.t) * TERMS.container_second for boot in local.boots
            )
            assert len(lines) == 3
            assert ledger > 3 * 3 * COUNT_SECONDS * TERMS.call_second
            assert account.calls == pytest.approx(ledger, abs=1e-5)
            assert account.paid == pytest.approx(account.calls + account.idle)
            # A container is charged for the whole of the intervals in which it came and went.
            tolerance = 2 * longest * TERMS.container_second * len(local.boots)
            assert paid <= ledger + account.idle + 1e-6
            assert ledger + account.idle <= paid + tolerance
            assert account.idle > 0

    run()
