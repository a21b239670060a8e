"""How good is a choice? Unequal backends, the same open-loop traffic, every way to choose in turn.

One backend is fast, one takes five times as long, one is as fast as the first but stands still for 2 s now and then.
Nobody is told which is which. The rate is a share of what all three can do together.

`simulate` does the same to our own strategies without processes, sockets and health checks, on a clock of its own: the
real pool and the same backends, so that what comes out is the choice alone, and the same on any machine.
"""

from __future__ import annotations

import heapq
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from backends import Backends, count_at, delay_backends
from contenders import BODY, CONTENDERS, HERE, Place
from delay_backend import parse
from loads import WAIT_PATH
from meter import read_meter
from openloop import DIRECT_RATE, Aim, Shot, figures, fire, poisson, steady, worst_ms
from processes import await_answer, free_ports, get, running
from report import OURS
from results import ChoiceRun
from speed import progress

sys.path.insert(0, str(HERE.parent))

from balancer.balancing.backends import LastCheck  # noqa: E402
from balancer.balancing.pool import BackendPool, Lease  # noqa: E402
from balancer.balancing.strategies import REGISTRY, create  # noqa: E402
from balancer.protocol.origin import Origin  # noqa: E402

FAST_SECONDS = 0.04
SLOTS = 8
SLOW_FACTOR = 5
STALL_EVERY_SECONDS = 15.0
STALL_SECONDS = 2.0
LOAD_SHARE = 0.6
WARMUP_SECONDS = 2.0
FAILED_SECONDS = 10.0  # what a failed request counts as: a quick 503 is no fast answer
SPECIFICATIONS = (
    f"{FAST_SECONDS:g}:{SLOTS}",
    f"{FAST_SECONDS * SLOW_FACTOR:g}:{SLOTS}",
    f"{FAST_SECONDS:g}:{SLOTS}:{STALL_EVERY_SECONDS:g}:{STALL_SECONDS:g}",
)
OTHERS = (("nginx", "least_conn"), ("haproxy", "leastconn"), ("caddy", "least_conn"))
# They look at neither load nor time, so that the queue at the slow backend grows for as long as the run is: measured
# with --full only, otherwise simulated.
BLIND_STRATEGIES = ("round_robin", "weighted")
AT_ONCE = "0"  # the backend that requests past the contender go to


def capacity() -> float:
    """Requests/s that the three can do together."""
    fast = SLOTS / FAST_SECONDS
    return fast + fast / SLOW_FACTOR + fast * (1 - STALL_SECONDS / STALL_EVERY_SECONDS)


def methods(contenders: list[str], quick: bool) -> list[tuple[str, str]]:
    own = [(OURS, name) for name in REGISTRY if not quick or name not in BLIND_STRATEGIES]
    return [(who, method) for who, method in (*own, *OTHERS) if who in contenders]


def measure_quality(rounds: int, seconds: float, chosen: list[tuple[str, str]]) -> list[ChoiceRun]:
    runs = []
    with delay_backends(*SPECIFICATIONS, AT_ONCE) as backends:
        for number in range(rounds):
            shift = number % len(chosen)
            for contender, method in chosen[shift:] + chosen[:shift]:
                progress(f"round {number + 1}/{rounds}: {contender} {method} on unequal backends for {seconds:g} s")
                runs.append(measure_one(number, contender, method, backends, seconds))
    progress("")
    return runs


def measure_one(number: int, name: str, method: str, backends: Backends, seconds: float) -> ChoiceRun:
    contender, rate = CONTENDERS[name], LOAD_SHARE * capacity()
    *ports, at_once = backends.ports
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        place = Place(free_ports(1)[0], ports, Path(directory), method)
        with running(contender.name, contender.command(place), place.directory, contender.cpus) as service:
            await_answer(service, place.port, WAIT_PATH, BODY)
            restart(ports)
            fire([Aim(place.port, WAIT_PATH, poisson(rate, WARMUP_SECONDS, seed=0))])
            restart(ports)
            before, counts = read_meter(service, backends), [count_at(port) for port in ports]
            traffic = Aim(place.port, WAIT_PATH, poisson(rate, seconds, seed=number + 1))
            shots, direct = fire([traffic, Aim(at_once, WAIT_PATH, steady(DIRECT_RATE, seconds))], FAILED_SECONDS)
            others = read_meter(service, backends).others_share(before)
            counts = [count_at(port) - count for port, count in zip(ports, counts, strict=True)]
    return replace(summarise(number, name, method, shots, counts, others), direct_worst=worst_ms(direct))


def restart(ports: list[int]) -> None:
    for port in ports:
        get(port, "/restart")


def summarise(
    number: int, contender: str, method: str, shots: list[Shot], counts: list[int], others: float
) -> ChoiceRun:
    shares = [count / max(1, sum(counts)) for count in counts]
    return ChoiceRun(number, contender, method, **figures(shots, FAILED_SECONDS), shares=shares, others_share=others)


# Simulated.

SIMULATED = "simulated"
SIMULATED_SECONDS = 300.0


def simulate_all(rounds: int) -> list[ChoiceRun]:
    return [simulate(number, name, SIMULATED_SECONDS) for number in range(rounds) for name in REGISTRY]


def simulate(number: int, name: str, seconds: float) -> ChoiceRun:
    """One strategy under the traffic of round `number`."""
    now = 0.0
    pool = BackendPool(create(name, clock=lambda: now, rng=random.Random(number)), clock=lambda: now)
    backends = {str(index): parse(text) for index, text in enumerate(SPECIFICATIONS)}
    for backend_id, backend in backends.items():
        backend.restart(now)
        pool.record_check(pool.add(backend_id, Origin("http", "127.0.0.1", 1)), LastCheck(now, 0.0, 200, None))
    shots = [Shot(due) for due in poisson(LOAD_SHARE * capacity(), seconds, seed=number + 1)]
    running: list[tuple[float, int, Lease]] = []  # by the time of the answer
    for index, shot in enumerate(shots):
        while running and running[0][0] <= shot.due:
            now, ended, lease = heapq.heappop(running)
            lease.release(shots[ended].latency)
        now = shot.due
        lease = pool.lease(None)
        backends[lease.backend.id].requests += 1
        answered = backends[lease.backend.id].due(now)
        shot.latency, shot.is_good = answered - now, True
        heapq.heappush(running, (answered, index, lease))
    return summarise(number, SIMULATED, name, shots, [backend.requests for backend in backends.values()], 0.0)
