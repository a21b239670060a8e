"""The threads that send: one per connection, watched over by the thread that started them."""

import contextlib
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from loadtest.connection import CONNECT, Connection, clock
from loadtest.interrupt import Interrupt
from loadtest.latencies import Latencies
from loadtest.options import Options
from loadtest.problems import EXIT_USAGE, Problem
from loadtest.recording import Recording, Row, Run
from loadtest.schedule import ClosedLoop, Load, OpenLoop, Schedule, longer
from loadtest.target import Target, identities

GRACE = 1.0  # seconds that an interrupted run waits for the answers under way
TICK = 0.05  # seconds between looks at the workers
INTERRUPTED = "interrupted"  # reason of a request that was cut off: neither good nor failed
SPARE_FILES = 64
SWITCH = 0.2  # seconds between demands for the interpreter lock
Watch = Callable[[Sequence[Recording], float], None]  # told what there is so far, and the seconds since the begin


class Worker(threading.Thread):
    """Sends over its connection for as long as the schedule gives it something to send."""

    def __init__(self, number: int, engine: "Engine", schedule: Schedule, recording: Recording) -> None:
        super().__init__(name=f"client-{number}", daemon=True)  # daemon: connect() cannot be interrupted
        self._index = number - 1
        self._engine, self._schedule = engine, schedule
        self.recording = recording
        self.connection = engine.connection(self._index)
        self.cut_off = 0
        self.crash: Exception | None = None

    def run(self) -> None:
        people, connection, recording = self._engine.identities, self.connection, self.recording
        many, pause = len(people), 0.0
        try:
            while ticket := self._schedule.take(self._index, pause):
                who = ticket.number % many
                sample = connection.exchange(people[who], ticket.due)
                pause = longer(pause) if sample.reason in CONNECT else 0.0
                if sample.reason == INTERRUPTED:
                    self.cut_off += 1
                else:
                    recording.add(sample, ticket.number, who if people[who].keeps_cookies else None)
        except Exception as error:  # a fault of this program: raised again where it is seen
            self.crash = error


class Engine:
    """Connections and clients that outlast a run, so that a warm-up warms what is measured after it."""

    def __init__(self, options: Options, target: Target, interrupt: Interrupt, watch: Watch) -> None:
        self._options, self._target = options, target
        self.interrupt, self.watch = interrupt, watch
        self._connections: list[Connection] = []
        self.identities = identities(options, target)
        self.by_second = options.timeline
        self.rows: deque[Row] | None = deque() if options.output == "csv" else None

    def connection(self, index: int) -> Connection:
        while len(self._connections) <= index:
            self._connections.append(Connection(self._options, self._target))
        return self._connections[index]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def warm_up(self, load: Load, requests: int) -> int:
        """Send some requests that are not counted; returns how many."""
        if not requests:
            return 0
        return _Race(self, Load(requests, min(load.concurrency, requests))).run().recording.requests

    def run(self, load: Load, since: float | None = None) -> Run:
        """Send the load; offsets of requests are counted from `since`, a clock value, or from now."""
        return _Race(self, load, clock() if since is None else since).run()


class _Race:
    """One run: its workers and its end."""

    def __init__(self, engine: Engine, load: Load, since: float | None = None) -> None:
        raise_file_limit(load.concurrency + SPARE_FILES)
        self._engine, self._load = engine, load
        self._counts = since is not None  # a warm-up does not
        self._since = since or 0.0
        self._interrupt = engine.interrupt
        self._workers: list[Worker] = []
        self._growing = threading.Lock()  # guards _workers
        self._closed = False
        self._wakeups = Latencies()  # how late this thread, which does nothing, came to its turns
        self._begin = clock()
        self._schedule: Schedule
        if load.rate is None:
            self._schedule = ClosedLoop(load, self._begin, self._is_over)
        else:
            self._schedule = OpenLoop(load, self._begin, self._is_over, self._grow)

    def run(self) -> Run:
        load, cpu = self._load, time.process_time()
        wanted = 1 if load.rate is not None else min(load.concurrency, load.requests or load.concurrency)
        for _ in range(wanted):
            self._grow()
        self._supervise()
        by_second = self._engine.by_second
        run = Run(Recording(self._since, load.rate is not None, by_second=by_second), planned=load.requests)
        run.seconds, run.cpu = clock() - self._begin, time.process_time() - cpu
        self._collect(run)
        return run

    def _is_over(self) -> bool:
        return self._interrupt.code != 0 or self._closed

    def _grow(self) -> bool:
        """Start one more worker; False if there may be no more."""
        with self._growing:
            number = len(self._workers) + 1
            if number > self._load.concurrency:
                return False
            engine = self._engine
            rows = engine.rows if self._counts else None
            by_second = engine.by_second and self._counts
            recording = Recording(self._since, self._load.rate is not None, rows, number, by_second)
            worker = Worker(number, engine, self._schedule, recording)
            try:
                worker.start()
            except RuntimeError:  # the machine gives no more threads: go on with those there are
                if not self._workers:
                    raise
                return False
            self._workers.append(worker)
            return True

    def _alive(self) -> list[Worker]:
        with self._growing:
            return [worker for worker in self._workers if worker.is_alive()]

    def _supervise(self) -> None:
        """Join the workers; end answers that come byte by byte for ever, and whatever outlives the end."""
        leave, give_up = math.inf, math.inf
        if self._load.seconds is not None and not self._load.waits:
            leave = self._begin + self._load.seconds
        while alive := self._alive():
            asleep = clock()
            alive[0].join(TICK)
            now = clock()
            if now > asleep + TICK:
                self._wakeups.exact.append(now - asleep - TICK)
            self._closed = self._closed or any(worker.crash for worker in alive)
            if self._interrupt.code:
                leave = min(leave, now + GRACE)
            give_up = min(give_up, max(leave, now) + GRACE) if now > leave else give_up
            if now > give_up:
                return  # still in connect(), which nothing wakes; a daemon thread ends with the program
            for worker in alive:
                deadline = worker.connection.deadline
                if deadline < math.inf and now > min(leave, deadline + TICK):
                    worker.connection.cut(INTERRUPTED if now > leave else "timeout")
            self._engine.watch([worker.recording for worker in self._workers], now - self._begin)

    def _collect(self, run: Run) -> None:
        self._closed = True  # whoever is left takes no more
        with self._growing:
            workers = list(self._workers)
        if crash := next((worker.crash for worker in workers if worker.crash), None):
            raise crash
        for worker in workers:
            run.recording.merge(worker.recording)
            run.cut_off += worker.cut_off + worker.is_alive()
            run.stale_retries += worker.connection.stale_retries
            worker.connection.stale_retries = 0
        run.connections = len(workers)
        run.wakeup_lag = self._wakeups
        run.interrupted = self._interrupt.is_set()
        if isinstance(self._schedule, OpenLoop):
            run.lag, run.overdue = self._schedule.lag, self._schedule.overdue
            run.pace = self._schedule.pace()


def tune_interpreter() -> None:
    """Threads that hand the interpreter lock around on one CPU cost half of what they cost across two: take one that
    this process may use, not the last, as the balancer does. And whoever waits for that lock wakes up again and again
    to ask for it, 200000 times a second with 1000 threads; here its holder gives it up soon by itself."""
    sys.setswitchinterval(SWITCH)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {allowed[os.getpid() % max(len(allowed) - 1, 1)]})


def raise_file_limit(wanted: int) -> None:
    """Room for a file descriptor per connection. Raises Problem if the system does not allow so many."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        need = f"so many connections need {wanted} open files, and the limit is {hard}"
        raise Problem(f"{need}: raise it with ulimit -n, or lower --concurrency", EXIT_USAGE) from None
