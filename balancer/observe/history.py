"""The past behind the charts: what happened in each second of the last five minutes, and each ten of the last hour.

A thread looks at the counts just after each whole second and keeps the differences; the data path pays nothing. Counts
are those that never fall, so a reset makes no negative number. A slot starts at a whole multiple of its length by the
wall clock, and only one that is over is shown. What a look finds belongs to the slot that was open since the last look:
if a look comes late (the process was stopped, the machine slept, the clock was set forward), the slots in between are
missing rather than made up. When the clock is set back, slots that now lie in the future go.

Memory: 660 slots of about 200 bytes, and 120 more for each backend that had requests in it: 5 MB with 50 busy backends;
and 31 copies of all counts, from which the windows are made: 3 MB with 50 busy backends.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import NamedTuple

from typing_extensions import TypedDict

from balancer.observe.statistics import Counters, Lifetime

log = logging.getLogger("balancer.history")

SLOTS = {1: 300, 10: 360}  # seconds per slot: how many are kept
WINDOWS = (10, 60, 300)  # seconds
MARKS = 10  # seconds from one to the next: so much longer a window may be
NO_COUNTS = Counters()


@dataclass(frozen=True, slots=True)
class Reading:
    """One look: counts that never fall, and what is going on at this moment."""

    counts: Lifetime
    in_flight: Mapping[str, int]  # per backend
    waiting: int  # for a place on a backend


class Figures(TypedDict):
    """What a time came to. Percentiles in seconds, None without a whole answer of a backend."""

    requests: int
    failed: int
    p50: float | None
    p95: float | None
    p99: float | None


class Traffic(Figures):
    """One slot of a backend. `in_flight` is the most at any look."""

    in_flight: int


class Slot(Traffic):
    """One slot of the whole balancer. `at` is the epoch second at which it starts. `times` are bounds in seconds, and
    how many answers of backends took up to that, and more than the one before."""

    at: int
    times: list[tuple[float, int]]
    retries: int
    waiting: int
    backends: dict[str, Traffic]


@dataclass(slots=True)
class Peaks:
    """The most that was going on at any look at the open slot."""

    active: int = 0
    waiting: int = 0
    in_flight: dict[str, int] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        self.active = max(self.active, reading.counts.active)
        self.waiting = max(self.waiting, reading.waiting)
        for backend_id, active in reading.in_flight.items():
            self.in_flight[backend_id] = max(self.in_flight.get(backend_id, 0), active)


class Added:
    """What came between two looks: of all, and by backend of those that had requests."""

    __slots__ = ("before", "retries", "whole", "backends")

    def __init__(self, before: Lifetime, after: Lifetime) -> None:
        self.before = before
        self.retries = after.retries - before.retries
        self.whole = Counters()
        self.backends: dict[str, Counters] = {}
        for backend_id, counters in after.counters.items():
            earlier = before.counters.get(backend_id, NO_COUNTS)
            if counters.total > earlier.total:
                new = counters.since(earlier)
                self.whole += new
                if backend_id is not None:
                    self.backends[backend_id] = new


class Mark(NamedTuple):
    """A moment: counts by backend, and those of all since the first look."""

    at: float
    counts: Lifetime
    whole: Counters


class Window:
    """The last `seconds`, of all and by backend; percentiles cannot be made of those of slots. Worked out when somebody
    asks: 500 backends are more than anybody looks at."""

    def __init__(self, before: Mark, after: Mark) -> None:
        self.seconds = round(after.at - before.at)
        self.whole = _figures(after.whole.since(before.whole))
        self._before, self._after = before.counts.counters, after.counts.counters

    def of(self, backend_id: str, with_times: bool = True) -> Figures | None:
        """None without a request."""
        after, before = self._after.get(backend_id, NO_COUNTS), self._before.get(backend_id, NO_COUNTS)
        requests = after.total - before.total
        if not requests:
            return None
        if with_times:
            return _figures(after.since(before))
        return {"requests": requests, "failed": after.failed - before.failed, "p50": None, "p95": None, "p99": None}


class Series:
    """Slots of one length. Not locked; the owner's lock guards it."""

    def __init__(self, step: int, kept: int) -> None:
        self.step = step
        self.slots: deque[Slot] = deque(maxlen=kept)
        self._open: int | None = None
        self._before: Lifetime | None = None  # counts when the open slot began
        self._peaks = Peaks()

    def take(self, added: Added, reading: Reading, second: int) -> None:
        """`added` since the last look; `second` is the one that runs now. The first look only starts the first slot."""
        opens = second - second % self.step
        self._before = self._before or reading.counts
        self._peaks.add(reading)
        if self._open is not None and opens > self._open:
            whole = added if added.before is self._before else Added(self._before, reading.counts)
            self.slots.append(self._slot(self._open, whole))
            self._before, self._peaks = reading.counts, Peaks()
        elif self._open is not None and opens < self._open:
            while self.slots and self.slots[-1]["at"] >= opens:
                self.slots.pop()
        self._open = opens

    def _slot(self, at: int, added: Added) -> Slot:
        peaks = self._peaks
        backends: dict[str, Traffic] = {
            backend_id: {**_figures(counters), "in_flight": peaks.in_flight.get(backend_id, 0)}
            for backend_id, counters in added.backends.items()
        }
        for backend_id, active in peaks.in_flight.items():
            if active and backend_id not in backends:
                backends[backend_id] = {**_figures(NO_COUNTS), "in_flight": active}
        return {
            **_figures(added.whole),
            "in_flight": peaks.active,
            "times": added.whole.latency.outline(),
            "at": at,
            "retries": added.retries,
            "waiting": peaks.waiting,
            "backends": backends,
        }


def _figures(counters: Counters) -> Figures:
    return {"requests": counters.total, "failed": counters.failed, **counters.latency.summary()}


class History:
    """Takes a look every second. `start` and `stop` once each.

    `_lock` guards `_series`, `_marks`, `_latest` and `_windows`. One thread alone takes looks (`start` before that one
    runs), so that they come in order.
    """

    def __init__(
        self,
        read: Callable[[], Reading],
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._wall_clock = wall_clock
        self._clock = clock
        self._lock = Lock()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="history", daemon=True)
        self.clear()

    def clear(self) -> None:
        """Forget all slots, the open ones too: what comes next counts from the next look."""
        with self._lock:
            self._series = {step: Series(step, kept) for step, kept in SLOTS.items()}
            self._marks: deque[Mark] = deque(maxlen=max(WINDOWS) // MARKS + 1)
            self._latest: Mark | None = None
            self._windows: dict[int, Window] = {}  # as they were at the latest look

    def window(self, seconds: int) -> Window | None:
        """The last `seconds`, one of WINDOWS, or what there is of them; None before the first look."""
        with self._lock:
            if self._latest is None:
                return None
            if seconds not in self._windows:
                old_enough = [mark for mark in self._marks if self._latest.at - mark.at >= seconds]
                self._windows[seconds] = Window(old_enough[-1] if old_enough else self._marks[0], self._latest)
            return self._windows[seconds]

    def since(self, step: int, at: int) -> list[Slot]:
        """Slots of `step` seconds that are over and start after `at`, oldest first. `step` is one of SLOTS."""
        with self._lock:
            return [slot for slot in self._series[step].slots if slot["at"] > at]

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Stop and join."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> float:
        """Take one look; returns the seconds until the next is due."""
        now = self._wall_clock()
        reading = self._read()
        with self._lock:
            before = self._latest or Mark(0.0, reading.counts, NO_COUNTS)
            added = Added(before.counts, reading.counts)
            for series in self._series.values():
                series.take(added, reading, int(now))
            added.whole += before.whole
            self._latest, self._windows = Mark(self._clock(), reading.counts, added.whole), {}
            if not self._marks or self._latest.at - self._marks[-1].at >= MARKS:
                self._marks.append(self._latest)
        return int(now) + 1 - self._wall_clock()

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            try:
                wait = min(1.0, max(0.0, self.look()))  # whatever the clock says
            except Exception:  # the thread must outlive any surprise, or the charts would silently stand still
                log.exception("no history for this second")
                wait = 1.0
