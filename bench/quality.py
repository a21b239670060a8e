"""How good is a choice? Unequal backends, the same open-loop traffic, every way to choose in turn.

One backend is fast, one takes five times as long, one is as fast as the first but stands still for 2 s now and then.
Nobody is told which is which. The rate is a share of what all three can do together.

`simulate` does the same to our own strategies without processes, sockets and health checks, on a clock of its own: the
real pool and the same backends, so that what comes out is the choice alone, and the same on any machine.
"""

from __future__ import annotations

import heapq
import random
from itertools import count

from backends import Backends, count_at, meter, slow_backends
from contenders import CONTENDERS, OURS, WAIT_PATH, started
from openloop import DIRECT_RATE, Aim, Shot, figures, fire, poisson, steady, worst_ms
from processes import get, interleaved
from results import Figures, Sample
from slow_backend import parse

from balancer.balancing.backends import LastCheck
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool, Lease
from balancer.balancing.strategies import REGISTRY, create
from balancer.config.settings import Settings
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

FAST_SECONDS = 0.04
SLOTS = 8
SLOW_FACTOR = 5
STALL_EVERY_SECONDS = 15.0
STALL_SECONDS = 2.0
RATE = 0.6 * SLOTS / FAST_SECONDS * (1 + 1 / SLOW_FACTOR + 1 - STALL_SECONDS / STALL_EVERY_SECONDS)
WARMUP_SECONDS = 2.0
SIMULATED_SECONDS = 300.0
FAILED_SECONDS = 10.0  # what a failed request counts as: a quick 503 is no fast answer
SPECIFICATIONS = {
    "fast": f"{FAST_SECONDS:g}:{SLOTS}",
    "slow": f"{FAST_SECONDS * SLOW_FACTOR:g}:{SLOTS}",
    "stalling": f"{FAST_SECONDS:g}:{SLOTS}:{STALL_EVERY_SECONDS:g}:{STALL_SECONDS:g}",
}
AT_ONCE = "0"  # the backend that requests past the contender go to
OTHERS = (("nginx", "least_conn"), ("haproxy", "leastconn"), ("caddy", "least_conn"))
# They look at neither load nor time, so that the queue at the slow backend grows for as long as the run is: simulated
# alone.
BLIND_STRATEGIES = ("round_robin", "weighted")


def methods(contenders: list[str]) -> list[tuple[str, str]]:
    own = [(OURS, name) for name in REGISTRY if name not in BLIND_STRATEGIES]
    return [(who, method) for who, method in (*own, *OTHERS) if who in contenders]


def measure_quality(rounds: int, seconds: float, chosen: list[tuple[str, str]]) -> list[Sample]:
    samples = []
    with slow_backends(*SPECIFICATIONS.values(), AT_ONCE) as backends:
        for number, (name, method) in interleaved(rounds, chosen, lambda way: " ".join(way)):
            figures = measure(number, name, method, backends, seconds)
            samples.append(Sample("choice", "", name, method, number, figures))
    return samples


def measure(number: int, name: str, method: str, backends: Backends, seconds: float, *, rate: float = RATE) -> Figures:
    *ports, at_once = backends.ports
    with started(CONTENDERS[name], ports, WAIT_PATH, method=method) as (service, place):
        restart(ports)
        fire([Aim(place.port, WAIT_PATH, poisson(rate, WARMUP_SECONDS, seed=0))])
        restart(ports)
        spent, counts = meter(service, backends), [count_at(port) for port in ports]
        traffic = Aim(place.port, WAIT_PATH, poisson(rate, seconds, seed=number + 1))
        shots, direct = fire([traffic, Aim(at_once, WAIT_PATH, steady(DIRECT_RATE, seconds))], FAILED_SECONDS)
        others = spent().others_percent
        counts = [count_at(port) - count for port, count in zip(ports, counts, strict=True)]
    return summarise(shots, counts) | {"worst direct ms": worst_ms(direct), "others %": others}


def restart(ports: list[int]) -> None:
    for port in ports:
        get(port, "/restart")


def summarise(shots: list[Shot], counts: list[int]) -> Figures:
    shares = [100 * count / max(1, sum(counts)) for count in counts]
    extra: Figures = {"extra %": 100 * (sum(counts) / len(shots) - 1)}  # requests, for those that went to two
    return (
        figures(shots, FAILED_SECONDS)
        | extra
        | {f"to {kind} %": s for kind, s in zip(SPECIFICATIONS, shares, strict=True)}
    )


def simulate_all(rounds: int) -> list[Sample]:
    every = [(number, name) for number in range(rounds) for name in REGISTRY]
    return [Sample("simulation", "", "simulated", name, n, simulate(n, name, SIMULATED_SECONDS)) for n, name in every]


CLIENTS = 250  # that differ in their address
CHECK_SECONDS = 0.5
COMES, LATE = "comes", "is late"
LOOK_SECONDS = 0.02  # between two looks for a second place


def asked(client: int) -> Request:
    return Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", f"192.0.2.{client}", [(b"host", b"a")])


def simulate(number: int, name: str, seconds: float, *, hedge: str = "off", rate: float = RATE) -> Figures:
    """One strategy under the traffic of round `number`."""
    now = 0.0
    strategy, settings = create(name, clock=lambda: now, rng=random.Random(number)), Settings(hedge=hedge)
    pool = BackendPool(strategy, settings.options(PoolOptions), clock=lambda: now)
    backends = {kind: parse(text) for kind, text in SPECIFICATIONS.items()}
    for backend_id, backend in backends.items():
        backend.restart(now)
        pool.record_check(pool.add(backend_id, Origin("http", "127.0.0.1", 1)), LastCheck(now, 0.0, 200, None))
    shots = [Shot(due) for due in poisson(rate, seconds, seed=number + 1)]
    requests = [asked(client) for client in range(CLIENTS)]
    sent: dict[int, dict[Lease, float]] = {}  # the attempts of each request in flight, and since when
    # What will happen to a request, by its time: it comes, it is late, it is answered by the backend of a lease.
    coming: list[tuple[float, int, int, str | Lease]] = [(shot.due, n, n, COMES) for n, shot in enumerate(shots)]

    def happens(due: float, index: int, what: str | Lease) -> None:
        heapq.heappush(coming, (due, len(shots) + next(serials), index, what))

    def ask(index: int, lease: Lease) -> None:
        chosen = backends[lease.backend.id]
        chosen.requests += 1
        sent[index][lease] = now
        happens(chosen.due(now), index, lease)

    serials = count()
    checked = 0.0
    while coming:
        now, _, index, what = heapq.heappop(coming)
        if now - checked >= CHECK_SECONDS:  # of those that stand still, nobody is told
            checked = now
            for backend_id, backend in backends.items():
                if backend.after(now, 0.0) == now and (known := pool.get(backend_id)) is not None:
                    pool.record_check(known, LastCheck(now, 0.0, 200, None))
        request, shot = requests[index % len(requests)], shots[index]
        if what == COMES:
            sent[index] = {}
            pool.hedging.count()
            ask(index, pool.lease(request))
            if (late := pool.hedging.late()) is not None:
                happens(now + late, index, LATE)
        elif index not in sent:
            continue  # it was answered by another backend
        elif isinstance(what, Lease):
            first, *_ = attempts = sent.pop(index)
            pool.hedging.answered(now - attempts[first])
            what.release(now - attempts.pop(what))
            for dropped in attempts:
                dropped.drop(is_late=dropped is first)
            shot.latency, shot.is_good = now - shot.due, True
        elif (second := hedged(pool, request, next(iter(sent[index])))) is not None:
            ask(index, second)
        else:
            happens(now + LOOK_SECONDS, index, LATE)
    return summarise(shots, [backend.requests for backend in backends.values()])


def hedged(pool: BackendPool, request: Request, first: Lease) -> Lease | None:
    """A second place, as `Race` takes it."""
    if not pool.hedging.spend(first.is_silent(pool.hedging.late() or 0.0)):
        return None
    lease = pool.lease_beside(first, request)
    if lease is None:
        pool.hedging.refund()
    return lease
