"""Counters, latency histograms, and the bounded rings of recent requests.

A request is recorded once, when its answer is complete or has failed, under one lock, so that at any moment
total = successful + failed, and a request is counted for the backend that answered or was tried last, or for none.
Failed means that the client got no complete answer, or one of 500 and above.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from threading import Lock
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from balancer.balancing.counts import FORMER_KEPT
from balancer.observe.histogram import Histogram, Percentiles
from balancer.observe.plain import fill, plain, with_bounds, without_bounds
from balancer.observe.rate import Rate
from balancer.observe.record import HEDGED, RecentView, Record
from balancer.observe.refusals import Refusals
from balancer.observe.totals import Totals
from balancer.observe.websockets import WebSockets

# Finished requests that `/requests/<id>` can still explain: all of the newest, and the first of each second for longer.
# To keep every one of thousands would cost each of them a tenth of its time: what is kept does not stay in the cache.
RECENT_KEPT = 100
SAMPLED_KEPT, SAMPLED_PER_SECOND = 900, 100
TROUBLED_KEPT = 200  # those that failed or were tried more than once stay longer: they are the ones people ask about
Codes = TypedDict("Codes", {"1xx": int, "2xx": int, "3xx": int, "4xx": int, "5xx": int})
CODE_CLASSES = tuple(Codes.__annotations__)
WHOLE = ("start_time", "retries", "retries_before")  # numbers of the whole that are kept over restarts


class CountersView(TypedDict):
    """What requests came to. Times and codes are left out of backends that are not `timed`, and then of the whole."""

    total_requests: int
    successful_requests: int
    failed_requests: int
    aborted_requests: int
    avg_response_time: NotRequired[float]
    latency: NotRequired[Percentiles]
    codes: NotRequired[Codes]


class StatisticsView(CountersView):
    start_time: float
    active_requests: int
    retries: int
    requests_per_second: float


class Counters:
    """Totals of the whole balancer or of one backend. Not locked; the owner's lock guards it."""

    __slots__ = ("failed", "aborted", "statuses", "latency", "other")

    def __init__(self) -> None:
        self.failed = self.aborted = 0
        self.statuses: defaultdict[int, int] = defaultdict(int)  # of those that were not aborted
        self.latency = Histogram()  # of whole answers of backends
        self.other = Histogram()  # of answers of our own, which would make an outage look fast, and of what broke off

    @property
    def total(self) -> int:
        return self.aborted + sum(self.statuses.values())

    @property
    def times(self) -> Histogram:
        """Of all requests, whoever answered them."""
        times = self.latency.copy()
        times += self.other
        return times

    def __iadd__(self, other: Counters) -> Counters:
        self.add_numbers(other)
        self.add_times(other)
        return self

    def add_numbers(self, other: Counters) -> None:
        self.failed += other.failed
        self.aborted += other.aborted
        for status, count in other.statuses.items():
            self.statuses[status] += count

    def add_times(self, other: Counters) -> None:
        self.latency += other.latency
        self.other += other.other

    def copy(self) -> Counters:
        copied = Counters()
        copied.failed, copied.aborted, copied.statuses = self.failed, self.aborted, self.statuses.copy()
        copied.latency, copied.other = self.latency.copy(), self.other.copy()
        return copied

    def since(self, earlier: Counters) -> Counters:
        """What was added after `earlier`, an older copy of these."""
        added = Counters()
        added.failed, added.aborted = self.failed - earlier.failed, self.aborted - earlier.aborted
        for status, count in self.statuses.items():
            added.statuses[status] = count - earlier.statuses.get(status, 0)
        added.latency, added.other = self.latency.since(earlier.latency), self.other.since(earlier.other)
        return added

    def add(self, record: Record) -> bool:
        """True if it failed."""
        (self.latency if record.reason is None and record.backend else self.other).add(record.seconds)
        status = record.status
        if record.complete and status < 500:  # by far the most
            self.statuses[status] += 1
            return False
        if record.aborted:
            self.aborted += 1
        else:
            self.statuses[status] += 1
        self.failed += 1
        return True

    def count(self, record: Record, times: Histogram) -> None:
        """As many as there are `times`, all of its kind."""
        one, count = Counters(), times.total
        one.add(record)
        histogram = self.latency if one.latency.counts else self.other
        histogram += times
        self.failed += count * one.failed
        self.aborted += count * one.aborted
        for status in one.statuses:
            self.statuses[status] += count

    def codes(self) -> Codes:
        found = dict.fromkeys(CODE_CLASSES, 0)
        for status, count in self.statuses.items():
            found[CODE_CLASSES[min(status // 100, 5) - 1]] += count  # above 599 is as good as 5xx (RFC 9110 section 15)
        return cast(Codes, found)

    def numbers(self) -> CountersView:
        total = self.total
        return {
            "total_requests": total,
            "successful_requests": total - self.failed,
            "failed_requests": self.failed,
            "aborted_requests": self.aborted,
        }

    def describe(self) -> CountersView:
        return {
            **self.numbers(),
            "avg_response_time": self.latency.seconds / (self.latency.total or 1),
            "latency": self.latency.summary(),
            "codes": self.codes(),
        }


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Copies of counts that only ever grow: per backend id, or None for no backend; and the gauge `active`."""

    active: int
    retries: int
    counters: dict[str | None, Counters]
    totals: Totals


class Statistics:
    """What happened since the start or the last reset, and since the start of the process, or what was before it, if
    that is kept.

    `_lock` guards everything: `_counters` (per backend id, or None for no backend), `_forgotten` (of former backends),
    `_before` (what resets and removals took out of `_counters`), `_totals`, `_recent`, `_sampled`, `_to_sample`,
    `_troubled`, `_arrivals`, `_retries`, `_retries_before`, `_active` and `_start_time`; `websockets` lock themselves.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.websockets = WebSockets()
        self.refusals = Refusals()
        self._lock = Lock()
        self._wall_clock = wall_clock
        self._active = 0
        self._to_sample = 0  # of this second
        self._arrivals = Rate(clock)
        self._counters: defaultdict[str | None, Counters] = defaultdict(Counters)
        self._before: dict[str | None, Counters] = {}
        self._totals = Totals()
        self._retries = self._retries_before = 0
        self._clear()

    def _clear(self) -> None:
        for backend_id, counters in self._counters.items():
            self._keep(backend_id, counters)
        self._start_time = self._wall_clock()
        self._counters = defaultdict(Counters, {None: Counters()})
        self._forgotten = Counters()
        self._retries_before += self._retries
        self._retries = 0
        self._recent: deque[Record] = deque(maxlen=RECENT_KEPT)
        self._sampled: deque[Record] = deque(maxlen=SAMPLED_KEPT)
        self._troubled: deque[Record] = deque(maxlen=TROUBLED_KEPT)

    def begin(self, count: int = 1) -> None:
        """A request has arrived; exactly one `record` follows."""
        with self._lock:
            self._active += count
            if self._arrivals.add(count):
                self._to_sample = SAMPLED_PER_SECOND

    def lost(self, count: int) -> None:
        """So many have begun of which no `record` follows: they are gone with a process."""
        with self._lock:
            self._active -= count

    def record(self, record: Record, *, is_counted: bool = False) -> None:
        """A request has ended, one way or another. `is_counted`: by `count`."""
        with self._lock:
            if is_counted:
                failed = record.failed
            else:
                self._active -= 1
                failed = self._counters[record.backend].add(record)
                self._totals.add(record)
            self._recent.append(record)
            if self._to_sample:
                self._to_sample -= 1
                self._sampled.append(record)
            if failed or (len(record.attempts) > 1 and record.retried()):
                self._troubled.append(record)

    def count(self, record: Record, times: Histogram) -> None:
        """As many as there are `times` have ended in another process, all of its kind; the bytes are those of all."""
        with self._lock:
            self._active -= times.total
            self._counters[record.backend].count(record, times)
            self._totals.add(record, times.total)

    def waited(self, times: Histogram) -> None:
        """So long some of these had waited for a place."""
        with self._lock:
            self._totals.waits += times

    def find(self, request_id: str) -> Record | None:
        """The newest finished request of this id that is still kept; clients may send the same id twice."""
        with self._lock:
            for record in chain(reversed(self._recent), reversed(self._sampled), reversed(self._troubled)):
                if record.request_id == request_id:
                    return record
        return None

    def newest(self, count: int) -> list[Record]:
        """The newest finished requests, newest first."""
        with self._lock:
            return list(islice(reversed(self._recent), count))

    def retried(self, count: int = 1) -> None:
        """A request is tried once more."""
        with self._lock:
            self._retries += count

    def forget(self, backend_id: str) -> None:
        """A backend was removed: its requests stay in the total, and a later backend of that id starts at 0."""
        with self._lock:
            former = self._counters.pop(backend_id, None)
            if former is not None:
                self._forgotten += former
                self._keep(backend_id, former)

    def keep(self, backends: Collection[str]) -> None:
        """There are no others any more; what was recorded of one after it was removed is forgotten too."""
        with self._lock:
            former = self._counters.keys() - {None, *backends}
        for backend_id in former:
            self.forget(cast(str, backend_id))

    def _keep(self, backend_id: str | None, counters: Counters) -> None:
        """For `lifetime`. Who has been gone the longest counts for nobody in particular when there are too many."""
        total = self._before.pop(backend_id, None) or Counters()
        total += counters
        self._before[backend_id] = total
        if len(self._before) > FORMER_KEPT:
            oldest = next(key for key in self._before if key is not None)
            nobody = self._before.setdefault(None, Counters())
            nobody += self._before.pop(oldest)
            self._totals.forget(oldest)

    def reset(self) -> None:
        """Zero everything but what is in flight."""
        with self._lock:
            self._clear()

    def hedges(self) -> Mapping[str, dict[str, int]]:
        """What came of second attempts beside first ones since the start of the process, by pool."""
        with self._lock:
            counted = list(self._totals.hedges.items())
        found: defaultdict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(HEDGED, 0))
        for (pool, result), count in counted:
            found[pool][result] = count
        return found

    def lifetime(self) -> Lifetime:
        """Counts since the start of the process, whatever was reset or removed; for differences over time."""
        with self._lock:
            active, retries, totals = self._active, self._retries_before + self._retries, self._totals.copy()
            total = {backend_id: counters.copy() for backend_id, counters in self._before.items()}
            current = [(backend_id, counters.copy()) for backend_id, counters in self._counters.items()]
        for backend_id, counters in current:
            if backend_id in total:
                total[backend_id] += counters
            else:
                total[backend_id] = counters
        return Lifetime(active, retries, total, totals)

    # Over restarts.

    def kept(self) -> dict[str, Any]:
        """All counts as plain values: `since BACKEND` and `before BACKEND` of the last reset, without an id for no
        backend, `attempts BACKEND`, and `whole`."""
        with self._lock:
            copies = [(f"since {key or ''}", counters.copy()) for key, counters in self._counters.items()]
            copies += [(f"before {key or ''}", counters.copy()) for key, counters in self._before.items()]
            totals, forgotten = self._totals.copy(), self._forgotten.copy()
            whole = {name: getattr(self, f"_{name}") for name in WHOLE}
        attempts = {f"attempts {key}": plain(each) for key, each in totals.backends.items()}
        totals.backends.clear()
        whole |= {"totals": plain(totals), "forgotten": plain(forgotten)}
        return with_bounds({"whole": whole, **attempts, **{key: plain(counters) for key, counters in copies}})

    def restore(self, kept: Mapping[str, Any], backends: Collection[str]) -> None:
        """Go on from there, before the first request; `backends` are those that there are. Raises as `fill`."""
        kept = without_bounds(kept)
        counted: dict[str, dict[str | None, Counters]] = {"since": {None: Counters()}, "before": {}}
        whole = kept["whole"]
        totals, forgotten = fill(Totals(), whole["totals"]), fill(Counters(), whole["forgotten"])
        for name, value in kept.items():
            when, _, backend = name.partition(" ")
            if when == "attempts":
                fill(totals.backends[backend], value)
            elif when in counted:
                counted[when][backend or None] = fill(Counters(), value)
        numbers = {name: fill(getattr(self, f"_{name}"), whole[name]) for name in WHOLE}
        with self._lock:
            self._counters, self._before = defaultdict(Counters, counted["since"]), counted["before"]
            self._totals, self._forgotten = totals, forgotten
            for name, number in numbers.items():
                setattr(self, f"_{name}", number)
        self.keep(backends)

    def snapshot(
        self, recent: int = 20, timed: Container[str | None] | None = None
    ) -> tuple[StatisticsView, dict[str | None, CountersView], list[RecentView]]:
        """(whole, per backend id or None, newest `recent` requests first), all of one moment. If `timed` is given, only
        the backends in it have times and codes: those of 500, and of all of them together, take long."""
        with self._lock:
            nobody = self._forgotten.copy()
            nobody += self._counters[None]
            counted = self._counters | {None: nobody}
            total = Counters()
            for counters in counted.values():
                total.add_numbers(counters)
                if timed is None:
                    total.add_times(counters)
            whole: StatisticsView = {
                **(total.describe() if timed is None else total.numbers()),
                "start_time": self._start_time,
                "active_requests": self._active,
                "retries": self._retries,
                "requests_per_second": self._arrivals.per_second(),
            }
            backends = {
                key: counters.describe() if timed is None or key in timed else counters.numbers()
                for key, counters in counted.items()
            }
            newest = list(islice(reversed(self._recent), recent))
        return whole, backends, [record.describe() for record in newest]


NO_REQUESTS = Counters().describe()  # what `/status` shows for a backend that has had none
