"""The slot table: the workers of each agent as this gateway sees them, in buckets by free view.

A row's view is what its worker last reported as free, less the calls that it has been asked to take and has not
answered. It is a hint; the worker's 101 is the truth. Adding, moving and picking are O(1), or O(tries) where rows were
tried already. Nothing here has a clock, a socket or randomness of its own.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """One worker. Compared by identity: a worker that started again is another row."""

    agent: str
    worker: str
    boot: str
    slots: int
    free: int = 0  # as reported
    busy: int = 0
    draining: bool = False  # as reported
    barred: bool = False  # the route's own list says that it drains
    aside: bool = False  # it failed calls: it gets none for a while
    asked: int = 0  # calls that it was asked to take, or that are held for it: it has not answered
    seq: int = 0  # of the last report
    _bucket: int = field(default=0, init=False, repr=False)
    _index: int = field(default=0, init=False, repr=False)

    @property
    def view(self) -> int:
        if self.barred or self.draining or self.aside:
            return 0
        return max(0, self.free - self.asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """An agent's workers at one moment, in sum."""

    pods: int
    slots: int
    busy: int
    free: int  # that a call might have found
    draining: int  # pods
    aside: int = 0  # pods


class _Pool:
    """One agent's rows. Bucket n holds those with n free slots; those with none are in no bucket."""

    __slots__ = ("buckets", "rows")

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.buckets: list[list[Row]] = [[]]

    def place(self, row: Row, view: int) -> None:
        if view == row._bucket:
            return
        if row._bucket:
            bucket = self.buckets[row._bucket]
            last = bucket.pop()
            if last is not row:
                bucket[row._index], last._index = last, row._index
        while len(self.buckets) <= view:
            self.buckets.append([])
        row._bucket = view
        if view:
            row._index = len(self.buckets[view])
            self.buckets[view].append(row)


class Table:
    """All rows. A row is changed by `update` alone, so that it always lies in its bucket."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}
        self.risen: Callable[[str], None] = _nobody
        """Called with an agent when one of its workers has more room than before."""

    def __repr__(self) -> str:
        pools = {
            agent: {name: row.view for name, row in pool.rows.items()}
            for agent, pool in self._pools.items()
        }
        return f"<Table {pools}>"

    def add(self, row: Row) -> Row | None:
        """Takes a row in; returns the one of the same agent and worker that it replaces."""
        pool = self._pools.setdefault(row.agent, _Pool())
        old = pool.rows.get(row.worker)
        if old is not None:
            self.remove(old)
            pool = self._pools.setdefault(row.agent, pool)
        pool.rows[row.worker] = row
        pool.place(row, row.view)
        return old

    def remove(self, row: Row) -> bool:
        """Takes a row out; false when another has replaced it already."""
        pool = self._pools.get(row.agent)
        if pool is None or pool.rows.get(row.worker) is not row:
            return False
        pool.place(row, 0)
        del pool.rows[row.worker]
        if not pool.rows:
            del self._pools[row.agent]
        return True

    def report(self, row: Row, *, free: int, busy: int, draining: bool, seq: int) -> None:
        """What the worker says of itself; not what it said before the last report."""
        if seq < row.seq:
            return
        row.free, row.busy, row.draining, row.seq = free, busy, draining, seq
        self._moved(row)

    def bar(self, row: Row, barred: bool) -> None:
        """Whether the route's drain list names the worker."""
        row.barred = barred
        self._moved(row)

    def set_aside(self, row: Row, aside: bool) -> None:
        """Whether the worker gets no call for a while."""
        row.aside = aside
        self._moved(row)

    def ask(self, row: Row) -> None:
        """The worker is asked to take a call, or will be in this turn."""
        row.asked += 1
        self._moved(row)

    def settle(self, row: Row, *, taken: bool, full: bool = False, seq: int | None = None) -> None:
        """The worker has answered, or nobody waits for the answer any more.

        `seq` is of its state right after that. A report of that state or a later one knows of a call that was taken; and
        of one that was not, a later one. Else the row counts what the answer says, until the next report.
        """
        row.asked -= 1
        if taken and (seq is None or seq > row.seq):
            row.free, row.busy = max(0, row.free - 1), min(row.busy + 1, row.slots)
        elif full and (seq is None or seq >= row.seq):
            row.free = 0
        self._moved(row)

    def pick(self, agent: str, tried: Collection[Row], draw: Callable[[int], int]) -> Row | None:
        """The fullest worker that still has a free slot, so that others can empty.

        `draw(n)` is a random number from 0 to n - 1 and decides between equals, so that gateways do
        not march in step.
        """
        pool = self._pools.get(agent)
        if pool is None:
            return None
        for bucket in pool.buckets[1:]:
            if not bucket:
                continue
            start = draw(len(bucket)) if len(bucket) > 1 else 0
            for offset in range(len(bucket)):
                row = bucket[(start + offset) % len(bucket)]
                if row not in tried:
                    return row
        return None

    def free(self, agent: str) -> int:
        """Free slots of an agent's workers, as they reported them or gave them away since."""
        return sum(row.free for row in self.rows(agent))

    def view(self, agent: str) -> int:
        """Slots that calls could be placed on now."""
        return sum(row.view for row in self.rows(agent))

    def census(self, agent: str) -> Census:
        """An agent's workers in sum."""
        rows = self.rows(agent)
        return Census(
            pods=len(rows),
            slots=sum(row.slots for row in rows),
            busy=sum(row.busy for row in rows),
            free=sum(row.view for row in rows),
            draining=sum(row.draining or row.barred for row in rows),
            aside=sum(row.aside for row in rows),
        )

    def rows(self, agent: str) -> tuple[Row, ...]:
        pool = self._pools.get(agent)
        return tuple(pool.rows.values()) if pool else ()

    def agents(self) -> Iterable[str]:
        return tuple(self._pools)

    def _moved(self, row: Row) -> None:
        pool = self._pools.get(row.agent)
        if pool is None or pool.rows.get(row.worker) is not row:
            return
        before = row._bucket
        pool.place(row, row.view)
        if row._bucket > before:
            self.risen(row.agent)


def _nobody(agent: str) -> None:
    """Where nobody waits for room."""
