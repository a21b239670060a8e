"""What happens in the workers reaches the master: each has a ring, and what it would count it writes there.

So the master's counts are those of all, and exact: what was written is not lost with whoever wrote it. A worker that is
killed takes with it what it had in flight.
"""

from __future__ import annotations

import logging
import marshal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields
from operator import attrgetter
from threading import Event, Lock, Thread
from typing import Any, cast

from balancer.balancing.backends import Backend, Choice, ChoiceView
from balancer.observe.canary import Canaries
from balancer.observe.record import Attempt, Record
from balancer.observe.refusals import Refusals, Why
from balancer.observe.ring import Ring
from balancer.observe.routecounts import Mirrored, RouteCounts
from balancer.observe.statistics import Statistics
from balancer.observe.websockets import WebSocketRecord, WebSockets

log = logging.getLogger("balancer.reports")

QUEUED = 10_000  # messages that wait in a worker for room in its ring
LARGEST = 2**18  # bytes of a message; a larger one goes without why each attempt went where it did
EXPLAINED = 100  # records of each tenth of a second that tell why; so do all of requests that were tried more than once
TAKE_SECONDS = 0.1  # from one look at the rings to the next
ABNORMAL = 1006  # RFC 6455 section 7.4.1: what a connection that just ended is told as

BEGUN, DROPPED = 0, 1  # places in `Ring.counts`: requests that have begun; those of them whose records were dropped

RECORD = tuple(each.name for each in fields(Record) if each.name not in ("attempts", "websocket", "excluded"))
ATTEMPT = tuple(each.name for each in fields(Attempt) if each.name != "choice")
SOCKET = tuple(each.name for each in fields(WebSocketRecord))
record_values, attempt_values, socket_values = attrgetter(*RECORD), attrgetter(*ATTEMPT), attrgetter(*SOCKET)

Tell = Callable[..., None]  # a kind of message, and its values


# In a worker.


class Reports(Statistics):
    """In place of Statistics: keeps nothing, and tells all.

    `_lock` guards the ring's writing end and `_queue`: what it had no room for.
    """

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self.websockets = self._sockets = ReportedWebSockets(self.tell)
        self.refusals: Refusals = ReportedRefusals(self.tell)
        self.routes: RouteCounts = ReportedRoutes(self.tell)
        self._ring = ring
        self._counts = ring.counts
        self._queue: deque[bytes] = deque()
        self._moment = 0  # tenth of a second in which `_explained` were
        self._explained = 0

    def begin(self, count: int = 1) -> None:
        with self._lock:
            self._counts[BEGUN] += count

    def record(self, record: Record, *, is_sample: bool = True) -> None:
        moment = int(record.timestamp * 10)
        if moment != self._moment:
            self._moment, self._explained = moment, 0
        self._explained += 1
        is_explained = self._explained <= EXPLAINED or len(record.attempts) > 1 or record.failed
        try:
            message = _message(record, is_explained)
        except ValueError:  # a strategy of somebody's explains itself in values that are none of Python's own
            message = _message(record, False)
        if len(message) > LARGEST:
            message = _message(record, False)
        with self._lock:
            self._send(message, is_record=True)

    def retried(self) -> None:
        self.tell("retried")

    def tell(self, kind: str, *values: Any) -> None:
        with self._lock:
            self._send(marshal.dumps((kind, *values)))

    def flush(self) -> None:
        """What had no room, and how far open WebSockets are. Call about once a second."""
        self._sockets.tell_open()
        with self._lock:
            self._flush()

    def _send(self, message: bytes, *, is_record: bool = False) -> None:
        self._flush()
        if not self._queue and self._ring.write(message):
            return
        if len(self._queue) < QUEUED:
            self._queue.append(message)
        elif is_record:
            self._counts[DROPPED] += 1

    def _flush(self) -> None:
        while self._queue and self._ring.write(self._queue[0]):
            self._queue.popleft()


def _message(record: Record, is_explained: bool) -> bytes:
    attempts = [
        (attempt_values(each), each.backend, each.choice.algorithm, each.choice.describe() if is_explained else None)
        for each in record.attempts
    ]
    socket = record.websocket and socket_values(record.websocket)
    excluded = record.excluded and dict(record.excluded)
    message: tuple[Any, ...] = "record", record_values(record), attempts, socket, excluded
    return marshal.dumps(message)


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
    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def count(self, name: str, why: Why) -> None:
        self._tell("refused", name, why)


class ReportedRoutes(RouteCounts):
    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def add(self, route: str, record: Record) -> None:
        """The record tells its route."""

    def mirrored(self, route: str, outcome: Mirrored) -> None:
        self._tell("mirrored", route, outcome)


# In the master.


class Told(Choice):
    """A choice that another process has made: what it says of it."""

    __slots__ = ("_algorithm", "_view")

    def __init__(self, backend: Named, algorithm: str, view: ChoiceView | None) -> None:
        self.backend = cast(Backend, backend)  # of which a record needs no more than the id
        self._algorithm = algorithm
        self._view = view

    @property
    def algorithm(self) -> str:
        return self._algorithm

    def describe(self) -> ChoiceView:
        return self._view or {"algorithm": self._algorithm, "candidates": [], "excluded": {}}


class Named:
    __slots__ = ("id",)

    def __init__(self, backend_id: str) -> None:
        self.id = backend_id


class Collector:
    """Counts what the workers tell. `start` and `stop` once each; `take` for who wants to know at once.

    `_lock` guards all of it, and the reading end of every ring.
    """

    def __init__(self, statistics: Statistics, routes: RouteCounts, canaries: Canaries) -> None:
        self._statistics = statistics
        self._routes = routes
        self._canaries = canaries
        self._lock = Lock()
        self._sources: dict[Ring, Source] = {}
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and join; take what is there until then."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self.take()

    def _run(self) -> None:
        while not self._stopping.wait(TAKE_SECONDS):
            self.take()

    def add(self, ring: Ring) -> None:
        """Of a worker that begins."""
        with self._lock:
            self._sources[ring] = Source(ring, self._statistics, self._routes, self._canaries)

    def end(self, ring: Ring) -> int:
        """Its worker is dead: how many requests it had in flight."""
        with self._lock:
            source = self._sources.pop(ring)
            source.take()
            return source.end()

    def take(self) -> None:
        with self._lock:
            for source in self._sources.values():
                source.take()

    @property
    def dropped(self) -> int:
        """Finished requests of workers that are there whose records were dropped: too many for a master that stood
        still."""
        with self._lock:
            return sum(source.dropped for source in self._sources.values())


class Source:
    """One worker, as its ring tells of it."""

    def __init__(self, ring: Ring, statistics: Statistics, routes: RouteCounts, canaries: Canaries) -> None:
        self._ring = ring
        self._statistics = statistics
        self._routes = routes
        self._canaries = canaries
        self._begun = self._ended = self.dropped = 0
        self._sockets: dict[int, WebSocketRecord] = {}
        self._hear: Mapping[str, Callable[..., None]] = {
            "record": self._record,
            "retried": statistics.retried,
            "refused": statistics.refusals.count,
            "mirrored": routes.mirrored,
            "socket": self._socket,
            "closed": self._closed,
        }

    def take(self) -> None:
        messages = self._ring.read()
        begun, dropped = self._ring.counts[BEGUN], self._ring.counts[DROPPED]  # after it: who has ended has begun
        self._statistics.begin(begun - self._begun)
        self._statistics.lost(dropped - self.dropped)
        self._begun, self.dropped = begun, dropped
        for message in messages:
            try:
                kind, *values = marshal.loads(message)
                self._hear[kind](*values)
            except Exception:  # nothing that a worker tells may keep us from the rest
                log.exception("a message of a worker was not understood")

    def end(self) -> int:
        lost = self._begun - self._ended - self.dropped
        self._statistics.lost(lost)
        for record in self._sockets.values():
            record.code = ABNORMAL
            self._statistics.websockets.closed(record)
        return lost

    def _record(
        self, values: tuple[Any, ...], attempts: list[Any], socket: tuple[Any, ...] | None, excluded: dict[str, str]
    ) -> None:
        self._ended += 1
        record = Record.__new__(Record)  # without its constructor: each request of each worker comes here
        record.__dict__.update(zip(RECORD, values, strict=True))
        record.attempts = [_attempt(*each) for each in attempts]
        record.websocket = None if socket is None else WebSocketRecord(*socket)
        record.excluded = excluded
        if record.route is not None:
            self._routes.add(record.route, record)
            canary = self._canaries.of(record.route)
            if canary is not None:
                canary.add(record)
        self._statistics.record(record, is_sample=all(view for *_, view in attempts))

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


def _attempt(values: tuple[Any, ...], backend: str, algorithm: str, view: ChoiceView | None) -> Attempt:
    attempt = Attempt.__new__(Attempt)
    attempt.__dict__.update(zip(ATTEMPT, values, strict=True))
    attempt.choice = Told(Named(backend), algorithm, view)
    return attempt
