"""What came of the requests of a run: each worker writes its own Recording, merged when all have ended."""

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field

from loadtest.connection import CONNECT, Sample
from loadtest.latencies import EXACT_SAMPLES, Latencies
from loadtest.schedule import Pace

CONDENSE_EVERY = 1000  # samples of a worker, once a run has more than EXACT_SAMPLES
SLOWEST = 5
MAX_BACKENDS = 1000  # names come from outside; those that are too many share one
OTHERS = "others"
Row = tuple[float, float, float | None, int | None, str | None, str | None, int, int]  # a line of the CSV output


@dataclass(slots=True, order=True)
class Slow:
    """One of the slowest requests."""

    latency: float
    offset: float = field(compare=False)
    status: int = field(compare=False)
    backend: str | None = field(compare=False)
    request_id: str | None = field(compare=False)


@dataclass(slots=True)
class Tally:
    """What one backend, or nobody known, answered."""

    count: int = 0
    errors: int = 0
    latency: Latencies = field(default_factory=Latencies)

    def merge(self, other: "Tally") -> None:
        self.count += other.count
        self.errors += other.errors
        self.latency.merge(other.latency)


class Recording:
    """Latencies are of complete good answers only: failures are often the fastest."""

    def __init__(
        self,
        begin: float = 0.0,
        corrects: bool = False,
        rows: deque[Row] | None = None,
        worker: int = 0,
        by_second: bool = False,
    ) -> None:
        self.begin = begin  # clock value that offsets are counted from
        self.backends: dict[str | None, Tally] = {}
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[tuple[str, str, str | None]] = Counter()  # reason, detail, backend
        self.raw = Latencies() if corrects else None  # from the real send time, if latency is from the intended one
        self.first_byte, self.connect = Latencies(), Latencies()
        self.requests = self.bytes = self.unsent = 0
        self.slowest: list[Slow] = []
        self.identities: dict[int, Counter[str | None]] = {}
        self.timeline: dict[int, Tally] | None = {} if by_second else None  # by the second in which it ended
        self._rows, self._worker = rows, worker

    def add(self, sample: Sample, number: int, identity: int | None = None) -> None:
        """`number` is the sample's in the whole run, `identity` that of the client it was sent for, if any."""
        self.requests += 1
        self.bytes += sample.size
        tally = self.backends.get(sample.backend)
        if tally is None:
            tally = self._new_tally(sample)
        tally.count += 1
        latency = sample.end - sample.due
        if sample.status is not None:
            self.statuses[sample.status] += 1
        if sample.reason is None:
            self._add_times(sample, tally, latency)
        else:
            tally.errors += 1
            self.errors[sample.reason, sample.detail, sample.backend] += 1
            self.unsent += sample.reason in CONNECT
        if self.timeline is not None:
            self._add_second(self.timeline.setdefault(int(sample.end - self.begin), Tally()), sample, latency)
        if identity is not None and sample.status is not None:
            self.identities.setdefault(identity, Counter())[sample.backend] += 1
        if self._rows is not None:
            self._rows.append(self._row(sample, latency))
        if number > EXACT_SAMPLES and self.requests % CONDENSE_EVERY == 0:
            self.condense()

    def _add_second(self, tally: Tally, sample: Sample, latency: float) -> None:
        tally.count += 1
        if sample.reason is None:
            tally.latency.exact.append(latency)
        else:
            tally.errors += 1

    def _new_tally(self, sample: Sample) -> Tally:
        if len(self.backends) >= MAX_BACKENDS:
            sample.backend = OTHERS
        return self.backends.setdefault(sample.backend, Tally())

    def _add_times(self, sample: Sample, tally: Tally, latency: float) -> None:
        tally.latency.exact.append(latency)
        self.first_byte.exact.append(sample.first_byte - sample.due)
        if self.raw is not None:
            self.raw.exact.append(sample.end - sample.begin)
        if sample.connect:
            self.connect.exact.append(sample.connect)
        if len(self.slowest) < SLOWEST or latency > self.slowest[0].latency:
            request_id = sample.headers.get("X-Request-ID") if sample.headers else None
            offset = sample.due - self.begin
            self._keep_slow(Slow(latency, offset, sample.status or 0, sample.backend, request_id))

    def _keep_slow(self, slow: Slow) -> None:
        if len(self.slowest) < SLOWEST:
            heapq.heappush(self.slowest, slow)
        else:
            heapq.heappushpop(self.slowest, slow)

    def _row(self, sample: Sample, latency: float) -> Row:
        first_byte = sample.first_byte - sample.due if sample.first_byte else None
        error = None if sample.reason is None else f"{sample.reason} {sample.detail}".rstrip()
        times = (sample.due - self.begin, latency, first_byte)
        return (*times, sample.status, sample.backend, error, sample.size, self._worker)

    @property
    def failed(self) -> int:
        return self.errors.total()

    def latency(self) -> Latencies:
        """Of all backends together."""
        together = Latencies()
        for tally in self.backends.values():
            together.merge(tally.latency)
        return together

    def times(self) -> list[Latencies]:
        tallies = [*self.backends.values(), *(self.timeline or {}).values()]
        found = [tally.latency for tally in tallies] + [self.first_byte, self.connect]
        return found if self.raw is None else [*found, self.raw]

    def condense(self) -> None:
        for latencies in self.times():
            latencies.condense()

    def merge(self, other: "Recording") -> None:
        for name, theirs in other.backends.items():
            self.backends.setdefault(name, Tally()).merge(theirs)
        for second, theirs in (other.timeline or {}).items():
            self.timeline = {} if self.timeline is None else self.timeline
            self.timeline.setdefault(second, Tally()).merge(theirs)
        self.statuses.update(other.statuses)
        self.errors.update(other.errors)
        if other.raw is not None:
            self.raw = self.raw or Latencies()
            self.raw.merge(other.raw)
        self.first_byte.merge(other.first_byte)
        self.connect.merge(other.connect)
        self.requests += other.requests
        self.bytes += other.bytes
        self.unsent += other.unsent
        for slow in other.slowest:
            self._keep_slow(slow)
        for identity, names in other.identities.items():
            self.identities.setdefault(identity, Counter()).update(names)


@dataclass(slots=True)
class Run:
    """A Recording with what else a run came to. Times in seconds."""

    recording: Recording
    seconds: float = 0.0
    cpu: float = 0.0  # of this whole process
    planned: int | None = None  # requests, if that was the limit
    connections: int = 0
    cut_off: int = 0  # requests under way that were given up, by Ctrl-C or --no-wait: neither good nor failed
    stale_retries: int = 0
    warmup: int = 0  # requests sent before, not in the recording
    interrupted: bool = False
    lag: Latencies | None = None  # of the client alone, with a schedule: due and a connection free, but not sent
    wakeup_lag: Latencies = field(default_factory=Latencies)  # of a thread that only waits
    overdue: int = 0  # requests that had to wait for a free connection
    pace: Pace | None = None  # with a schedule; of several runs that which fell furthest behind

    def merge(self, other: "Run") -> None:
        self.recording.merge(other.recording)
        self.seconds += other.seconds
        self.cpu += other.cpu
        self.planned = None if self.planned is None or other.planned is None else self.planned + other.planned
        self.connections = max(self.connections, other.connections)
        self.cut_off += other.cut_off
        self.stale_retries += other.stale_retries
        self.warmup += other.warmup
        self.interrupted |= other.interrupted
        self.overdue += other.overdue
        self.pace = max(filter(None, (self.pace, other.pace)), key=lambda pace: pace.behind, default=None)
        self.wakeup_lag.merge(other.wakeup_lag)
        if other.lag is not None:
            self.lag = self.lag or Latencies()
            self.lag.merge(other.lag)
