"""What a choice costs the balancer with few backends and with many, for every algorithm.

A minute; exit 1 if one costs more than MOST times as much with 500 backends as with 3.

Measured is the pool alone, as requests use it: take a place, give it back, 32 in flight; CPU time of the thread. Both
pools take turns in short rounds, so that a slow moment hits both, and the least of all rounds counts. The instructions
beside it are those of one request (see guard.py), which no busy machine changes; what C code does they do not show.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable

from guard import count_instructions
from script import Parser

from balancer.balancing.backends import Backend, LastCheck
from balancer.balancing.members import PoolChanges
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool, Lease
from balancer.balancing.strategies import REGISTRY, create
from balancer.config.settings import Settings
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

FEW, MANY = 3, 500
MOST = 1.2
IN_FLIGHT = 32
ROUNDS, REQUESTS = 100, 500


def pool_of(size: int, algorithm: str) -> BackendPool:
    """Weights 3, 2 and 1 in turn; all of them up."""
    pool = BackendPool(create(algorithm, rng=random.Random(1)), Settings().options(PoolOptions))
    backends = [
        Backend(f"b{number}", Origin("http", "127.0.0.1", 1 + number), 3 - number % 3) for number in range(size)
    ]
    pool.apply(PoolChanges(add=backends))
    for backend in backends:
        pool.record_check(backend, LastCheck(0.0, 0.0, 200, None))
    return pool


def traffic(pool: BackendPool) -> Callable[[], None]:
    """One request: it gets a place, and the oldest of those in flight gives its own back."""
    chance = random.Random(2)
    requests = deque(
        Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", f"192.0.2.{number % 256}", [(b"host", b"a")])
        for number in range(100)
    )
    times = deque(0.001 * chance.randint(1, 100) for _ in range(1009))
    held: deque[Lease] = deque()

    def one() -> None:
        requests.rotate()
        lease = pool.lease_now(requests[0])
        assert lease is not None
        held.append(lease)
        if len(held) > IN_FLIGHT:
            times.rotate()
            held.popleft().release(times[0])

    return one


def seconds(one: Callable[[], None], times: int) -> float:
    started = time.thread_time()
    for _ in range(times):
        one()
    return (time.thread_time() - started) / times


def measure(algorithm: str, rounds: int = ROUNDS, requests: int = REQUESTS) -> list[tuple[float, int]]:
    """Seconds and instructions of one request, with FEW and with MANY backends."""
    loads = [traffic(pool_of(size, algorithm)) for size in (FEW, MANY)]
    for one in loads:
        seconds(one, requests)
    took = [min(each) for each in zip(*([seconds(one, requests) for one in loads] for _ in range(rounds)), strict=True)]
    return [
        (least, sorted(count_instructions(one) for _ in range(101))[50]) for least, one in zip(took, loads, strict=True)
    ]


def main() -> int:
    print(f"{'algorithm':22}{f'us, {FEW}':>9}{f'us, {MANY}':>9}{'ratio':>7}{'instructions':>16}{'ratio':>7}")
    worst = 0.0
    for algorithm in REGISTRY:
        (few, few_steps), (many, many_steps) = measure(algorithm)
        worst = max(worst, many / few)
        times = f"{few * 1e6:9.2f}{many * 1e6:9.2f}{many / few:7.2f}"
        print(f"{algorithm:22}{times}{f'{few_steps} {many_steps}':>16}{many_steps / few_steps:7.2f}", flush=True)
    return 1 if worst > MOST else 0


if __name__ == "__main__":
    Parser(__doc__).start(main)
