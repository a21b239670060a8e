"""What happens in the workers reaches the master: what a worker would count it counts in memory that both have.

So the master's counts are those of all, and exact: what is counted is not lost with whoever counted it. A worker that
is killed takes with it what it had in flight. What was tried for a request, and why, is told of the newest, through a
ring.
"""

from __future__ import annotations

import logging
import marshal
import mmap
import os
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import fields
from operator import attrgetter
from threading import Lock
from typing import Any, cast

from balancer.balancing.backends import Backend, Choice, ChoiceView
from balancer.observe.canary import Canaries
from balancer.observe.cells import Added, Cells, size
from balancer.observe.histogram import Histogram
from balancer.observe.record import Attempt, Record
from balancer.observe.refusals import Refusals, Why
from balancer.observe.ring import Ring
from balancer.observe.routecounts import Mirrored, RouteCounts
from balancer.observe.statistics import Statistics
from balancer.observe.totals import KNOWN, OTHER
from balancer.observe.websockets import WebSocketRecord, WebSockets

log = logging.getLogger("balancer.reports")

CELLS, RING = 4096, 2**20  # kinds of requests that are counted apart; bytes for messages
HEAD = 4096
QUEUED = 1000  # messages that wait in a worker for room in its ring
LARGEST = 2**18  # bytes that say why the attempts of a request went where they did
# Requests that are told whole in a time, and as many that were refused, failed or were tried again.
SHOWN, SHOWN_SECONDS = 100, 1.0
ABNORMAL = 1006  # RFC 6455 section 7.4.1: what a connection that just ended is told as

BEGUN, RETRIED, DROPPED = range(3)  # places of numbers: requests that have begun; retries; messages without room

RECORD = tuple(each.name for each in fields(Record) if each.name not in ("attempts", "websocket", "excluded"))
ATTEMPT = tuple(each.name for each in fields(Attempt) if each.name != "choice")
SOCKET = tuple(each.name for each in fields(WebSocketRecord))
record_values, attempt_values, socket_values = attrgetter(*RECORD), attrgetter(*ATTEMPT), attrgetter(*SOCKET)

Tell = Callable[..., None]  # what has happened, and its values: all of them Python's own


class Ledger:
    """The memory of one worker and its master: `Ledger()` makes it, `Ledger(fd)` is the other's. What nobody has
    touched takes no room."""

    def __init__(self, fd: int | None = None, *, cells: int = CELLS, ring: int = RING) -> None:
        whole = HEAD + ring + size(cells)
        self.fd = os.memfd_create("ledger") if fd is None else fd
        if fd is None:
            os.truncate(self.fd, whole)
        memory = memoryview(mmap.mmap(self.fd, whole))
        self.counts = memory[:HEAD].cast("q")
        self.ring = Ring(memory[HEAD : HEAD + ring])
        self.cells = Cells(memory[HEAD + ring :])

    def close(self) -> None:
        """The descriptor; the memory stays as long as it is used."""
        os.close(self.fd)


# In a worker.


class Reports(Statistics):
    """In place of Statistics: counts what its master reads, and tells of the newest requests.

    `_lock` guards the writing end of the ledger, and `_queue`: what it had no room for.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.websockets = self._sockets = ReportedWebSockets(self._tell)
        self.refusals: Refusals = ReportedRefusals(self._count)
        self.routes: RouteCounts = ReportedRoutes(self._count)
        self._counts, self._cells, self._ring = ledger.counts, ledger.cells, ledger.ring
        self._queue: deque[bytes] = deque()
        self._began = 0.0  # the second, by the wall clock, for which these are left:
        self._to_show = self._troubled_to_show = 0

    def begin(self, count: int = 1) -> None:
        with self._lock:
            self._counts[BEGUN] += count

    def record(self, record: Record, *, is_counted: bool = False) -> None:
        attempts, method, reason = record.attempts, record.method, record.reason
        kind = (
            "record",
            record.route,
            record.pool,
            record.backend,
            record.status,
            method if method in KNOWN else OTHER,
            reason,
            record.complete,
            tuple([(each.choice.backend.id, each.outcome, each.connect is None, each.hedge) for each in attempts]),
        )
        ended = record.timestamp + record.seconds
        with self._lock:
            is_counted = self._cells.add(kind, record.seconds, record.bytes_in, record.bytes_out)
            if is_counted and record.queued:
                self._cells.add(("waited",), record.queued)
            if not self._began <= ended < self._began + SHOWN_SECONDS:
                self._began, self._to_show, self._troubled_to_show = ended, SHOWN, SHOWN
            if reason is not None or len(attempts) > 1:
                self._troubled_to_show -= 1
                is_shown = self._troubled_to_show >= 0
            else:
                self._to_show -= 1
                is_shown = self._to_show >= 0
        if is_shown or not is_counted:
            self._tell("record", is_counted, *_told(record))

    def retried(self, count: int = 1) -> None:
        with self._lock:
            self._counts[RETRIED] += count

    def flush(self) -> None:
        """What had no room, and how far open WebSockets are. Call about once a second."""
        self._sockets.tell_open()
        with self._lock:
            self._flush()

    def _count(self, *kind: str) -> None:
        with self._lock:
            self._cells.add(kind)

    def _tell(self, *told: Any) -> None:
        message = marshal.dumps(told)
        with self._lock:
            self._flush()
            if not self._queue and self._ring.write(message):
                return
            if len(self._queue) < QUEUED:
                self._queue.append(message)
            else:
                self._counts[DROPPED] += 1

    def _flush(self) -> None:
        while self._queue and self._ring.write(self._queue[0]):
            self._queue.popleft()


def _told(record: Record) -> tuple[Any, ...]:
    """All of it, and why each attempt went where it did."""
    socket = None if record.websocket is None else socket_values(record.websocket)
    excluded = None if record.excluded is None else dict(record.excluded)
    attempts = [(attempt_values(each), each.backend, each.choice.algorithm) for each in record.attempts]
    views: bytes | None = None
    with suppress(Exception):  # a strategy of somebody's fails at that, or has values that are none of Python's own
        views = marshal.dumps([each.choice.describe() for each in record.attempts])
    if views is not None and len(views) > LARGEST:
        views = None
    return record_values(record), attempts, views, socket, excluded


class ReportedWebSockets(WebSockets):
    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def opened(self, record: WebSocketRecord) -> None:
        super().opened(record)
        self._tell("socket", id(record), socket_values(record))

    def closed(self, record: WebSocketRecord) -> None:
        super().closed(record)
        self._tell("closed", id(record), socket_values(record))

    def tell_open(self) -> None:
        """How far they are."""
        for record in self.all_open():
            self._tell("socket", id(record), socket_values(record))


class ReportedRefusals(Refusals):
    def __init__(self, count: Tell) -> None:
        super().__init__()
        self._count = count

    def count(self, name: str, why: Why, count: int = 1) -> None:
        self._count("refused", name, why)


class ReportedRoutes(RouteCounts):
    def __init__(self, count: Tell) -> None:
        super().__init__()
        self._count = count

    def add(self, route: str, record: Record) -> None:
        """The record tells its route."""

    def mirrored(self, route: str, outcome: Mirrored, count: int = 1) -> None:
        self._count("mirrored", route, outcome)


# In the master.


class Named:
    """What a record needs of a backend."""

    __slots__ = ("id",)

    def __init__(self, backend_id: str) -> None:
        self.id = backend_id


class Told(Choice):
    """A choice that another process has made: what it says of it."""

    __slots__ = ("_algorithm", "_view")

    def __init__(self, backend_id: str, algorithm: str, view: ChoiceView | None) -> None:
        self.backend = cast(Backend, Named(backend_id))
        self._algorithm = algorithm
        self._view = view

    @property
    def algorithm(self) -> str:
        return self._algorithm

    def describe(self) -> ChoiceView:
        return self._view or {"algorithm": self._algorithm, "candidates": [], "excluded": {}}


class Collector:
    """Counts what the workers tell: `take` before anybody reads the counts, and about once a second.

    `_lock` guards all of it, and the reading end of every ledger.
    """

    def __init__(self, statistics: Statistics, routes: RouteCounts, canaries: Canaries) -> None:
        self._statistics = statistics
        self._parts = statistics, routes, canaries
        self._lock = Lock()
        self._sources: dict[Ledger, Source] = {}

    def add(self, ledger: Ledger) -> None:
        """Of a worker that begins."""
        with self._lock:
            self._sources[ledger] = Source(ledger, *self._parts)

    def end(self, ledger: Ledger) -> int:
        """Its worker is dead: how many requests it had in flight."""
        with self._lock:
            source = self._sources.pop(ledger)
            self._take([source], at_all=True)
            return source.end()

    def take(self) -> None:
        with self._lock:
            self._take(self._sources.values())

    def _take(self, sources: Collection[Source], *, at_all: bool = False) -> None:
        """The newest of all come in the order in which they ended."""
        told = [record for source in sources for record in source.take(at_all=at_all)]
        for record in sorted(told, key=lambda record: record.timestamp + record.seconds):
            self._statistics.record(record, is_counted=True)


class Source:
    """One worker, as its ledger has it."""

    def __init__(self, ledger: Ledger, statistics: Statistics, routes: RouteCounts, canaries: Canaries) -> None:
        self._ledger = ledger
        self._statistics = statistics
        self._routes = routes
        self._canaries = canaries
        self._begun = self._ended = self._retried = 0
        self._told: list[Record] = []
        self._sockets: dict[int, WebSocketRecord] = {}
        self._hear: Mapping[str, Callable[..., None]] = {
            "record": self._record,
            "socket": self._socket,
            "closed": self._closed,
        }

    def take(self, *, at_all: bool) -> list[Record]:
        """Count what was counted; `at_all` as `Cells.look` has it. Returns what it has told of these."""
        messages, added = self._ledger.ring.read(), [*self._ledger.cells.look(at_all=at_all)]
        counts = self._ledger.counts
        begun, retried = counts[BEGUN], counts[RETRIED]  # after these: who has ended has begun
        self._statistics.begin(begun - self._begun)
        self._statistics.retried(retried - self._retried)
        self._begun, self._retried = begun, retried
        for each in added:
            self._count(each)
        for message in messages:
            try:
                what, *values = marshal.loads(message)
                self._hear[what](*values)
            except Exception:  # nothing that a worker tells may keep us from the rest
                log.exception("a message of a worker was not understood")
        told, self._told = self._told, []
        return told

    def end(self) -> int:
        lost = self._begun - self._ended
        self._statistics.lost(lost)
        for record in self._sockets.values():
            record.code = ABNORMAL
            self._statistics.websockets.closed(record)
        return lost

    # What it has counted.

    def _count(self, added: Added) -> None:
        what, *values = added.kind
        count = added.times.total
        if what == "record":
            record = _example(*values)
            record.bytes_in, record.bytes_out = added.sums
            self._ended += count
            self._statistics.count(record, added.times)
            self._count_by_route(record, added.times)
        elif what == "waited":
            self._statistics.waited(added.times)
        elif what == "refused":
            self._statistics.refusals.count(values[0], values[1], count)
        else:
            self._routes.mirrored(values[0], values[1], count)

    def _count_by_route(self, record: Record, times: Histogram) -> None:
        if record.route is not None:
            self._routes.count(record.route, record, times)
            canary = self._canaries.of(record.route)
            if canary is not None:
                canary.count(record, times)

    # What it has told.

    def _record(
        self,
        is_counted: bool,
        values: tuple[Any, ...],
        attempts: list[Any],
        views: bytes | None,
        socket: tuple[Any, ...] | None,
        excluded: dict[str, str] | None,
    ) -> None:
        record = Record(0.0, "", "", "")
        record.__dict__.update(zip(RECORD, values, strict=True))
        told = [None] * len(attempts) if views is None else marshal.loads(views)
        for (tried, backend_id, algorithm), view in zip(attempts, told, strict=True):
            attempt = Attempt(Told(backend_id, algorithm, view), 0.0)
            attempt.__dict__.update(zip(ATTEMPT, tried, strict=True))
            record.attempts.append(attempt)
        record.websocket = None if socket is None else WebSocketRecord(*socket)
        record.excluded = excluded
        if is_counted:
            self._told.append(record)
        else:
            self._statistics.record(record)
            self._ended += 1
            times = Histogram()
            times.add(record.seconds)
            self._count_by_route(record, times)

    def _socket(self, key: int, values: tuple[Any, ...]) -> None:
        """One that is open: it may have been told of before."""
        record = self._sockets.get(key)
        if record is None:
            record = self._sockets[key] = WebSocketRecord(*values)
            self._statistics.websockets.opened(record)
        else:
            _fill(record, values)

    def _closed(self, key: int, values: tuple[Any, ...]) -> None:
        record = self._sockets.pop(key)
        _fill(record, values)
        self._statistics.websockets.closed(record)


def _fill(record: WebSocketRecord, values: tuple[Any, ...]) -> None:
    for name, value in zip(SOCKET, values, strict=True):
        setattr(record, name, value)


def _example(
    route: str | None,
    pool: str | None,
    backend: str | None,
    status: int,
    method: str,
    reason: str | None,
    complete: bool,
    tried: tuple[tuple[str, str, bool, bool], ...],
) -> Record:
    """What those have in common that are counted together."""
    record = Record(0.0, method, "", "")
    record.route, record.pool, record.backend = route, pool, backend
    record.status, record.reason, record.complete = status, reason, complete
    for backend_id, outcome, is_kept, is_hedge in tried:
        attempt = Attempt(Told(backend_id, "", None), 0.0)
        attempt.outcome, attempt.connect, attempt.hedge = outcome, None if is_kept else 0.0, is_hedge
        record.attempts.append(attempt)
    return record
