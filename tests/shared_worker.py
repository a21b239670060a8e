"""A worker process as far as numbers are shared: a pool, and a ledger for records. Evaluates each line that it is sent.

python tests/shared_worker.py LOADS LEDGER ROW ALGORITHM LIMIT BACKEND...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

from balancer.balancing import pool
from balancer.balancing.backends import LastCheck
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool, Lease
from balancer.balancing.shared import PoolLoads, SharedLoads
from balancer.balancing.strategies import create
from balancer.config.settings import Settings
from balancer.observe.record import Record
from balancer.observe.reports import Ledger, Reports
from balancer.protocol.origin import Origin

GOOD = LastCheck(at=1.0, duration=0.001, status=200, error=None)


def make_pool(
    loads: PoolLoads | None, names: Sequence[str], algorithm: str = "least_connections", limit: int | None = None
) -> BackendPool:
    options = Settings(queue_timeout=60.0, queue_limit=1000, eject_after=0).options(PoolOptions)
    made = BackendPool(create(algorithm), options, loads=loads)
    for name in names:
        add(made, name, limit)
    return made


def add(to: BackendPool, name: str, limit: int | None = None) -> None:
    to.record_check(to.add(name, Origin("http", "127.0.0.1", 1), max_connections=limit), GOOD)


class Worker:
    """What the lines call."""

    def __init__(self, fd: int, ledger: int, row: int, algorithm: str, limit: int, names: Sequence[str]) -> None:
        self.pool = make_pool(SharedLoads(fd, row).of("default"), names, algorithm, limit or None)
        self.reports = Reports(Ledger(ledger))
        self.leases: list[Lease] = []
        self.most = 0  # in flight on one backend, as seen right after a lease

    def lease(self) -> str:
        self.leases.append(self.pool.lease(None))
        return self.leases[-1].backend.id

    def lease_later(self) -> None:
        Thread(target=self.lease, daemon=True).start()

    def release(self, seconds: float = 0.01) -> None:
        self.leases.pop(0).release(seconds)

    def active(self) -> list[int]:
        return [view["active_connections"] for view in self.pool.snapshot()]

    def storm(self, times: int, threads: int, hold: float = 0.0) -> None:
        """Requests, each recorded; some threads at once."""

        def run() -> None:
            for _ in range(times):
                self.request(lambda: time.sleep(hold))

        with ThreadPoolExecutor(threads) as executor:
            for future in [executor.submit(run) for _ in range(threads)]:
                future.result()

    def request(self, between: Callable[[], None]) -> None:
        self.reports.begin()
        lease = self.pool.lease(None)
        self.most = max(self.most, *self.active())
        between()
        lease.release(0.01)
        record = Record(time.time(), "GET", "/", "id-1")
        record.backend, record.status = lease.backend.id, 200
        self.reports.record(record)

    def requests(self) -> None:
        """One after another for ever; a line is printed for each that has ended."""
        while True:
            self.request(lambda: None)
            print("ended", flush=True)


def main() -> None:
    pool.LOOK_SECONDS = 0.0  # in step, half a millisecond is long
    fd, ledger, row = map(int, sys.argv[1:4])
    worker = Worker(fd, ledger, row, sys.argv[4], int(sys.argv[5]), sys.argv[6:])
    names = {name: getattr(worker, name) for name in dir(worker)} | {"add": add, "worker": worker}
    for line in sys.stdin:
        print(repr(eval(line, names)), flush=True)


if __name__ == "__main__":
    main()
