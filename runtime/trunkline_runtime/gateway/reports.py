"""What a gateway tells the operator of one agent."""

from trunkline_runtime.contract import AgentLoad, WorkerLoad
from trunkline_runtime.gateway.accounts.cashier import Cashier
from trunkline_runtime.gateway.ledger import Ledger
from trunkline_runtime.gateway.line import Lines
from trunkline_runtime.gateway.table import Row, Table


def agent_load(
    agent: str, table: Table, ledger: Ledger, lines: Lines, cashier: Cashier
) -> AgentLoad:
    tally = ledger.tally(agent)
    load = AgentLoad(
        workers={row.worker: _worker_load(row) for row in table.rows(agent)},
        calls=tally.calls,
        burst=tally.burst,
        waiting=lines.waiting(agent),
        shut={rung: state.value for rung, state in tally.shut.items()},
        arrivals=tally.arrivals,
        refused=tally.refused,
        lost=tally.lost,
        burstFailures=tally.burst_failures,
        burstSlow=tally.burst_slow,
        burstLimited=tally.burst_limited,
        burstError=tally.burst_error,
    )
    if (spend := cashier.load(agent)) is not None:
        load["spend"] = spend
    return load


def _worker_load(row: Row) -> WorkerLoad:
    load = WorkerLoad(
        boot=row.boot, slots=row.slots, busy=row.busy, free=row.free, draining=row.draining
    )
    if row.aside:
        load["aside"] = True
    return load
