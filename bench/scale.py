"""What many balancers in front of many backends make of what each of them knows: a simulation on a clock of its own.

python bench/scale.py            under a minute; the same figures on any machine; docs/scale.md explains them

The strategies and the limits are the real ones, and so are Backend and its Speed; requests, queues at the backends and
news of the others are simulated. With news every so many seconds, each balancer goes by what it has in flight itself,
and by what all others had in flight when the news came.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate
from pathlib import Path
from statistics import fmean, quantiles
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer.balancing.backends import Backend  # noqa: E402
from balancer.balancing.counts import BackendCounts  # noqa: E402
from balancer.balancing.speed import Speed  # noqa: E402
from balancer.balancing.strategies import Indexed, create  # noqa: E402
from balancer.filters.limit import SECOND, LimitOptions  # noqa: E402
from balancer.filters.sharedlimit import ACTIVE_SECONDS, Charge, Settled, SharedLimit  # noqa: E402
from balancer.protocol.origin import Origin  # noqa: E402
from balancer.protocol.request import Request  # noqa: E402
from balancer.protocol.requestheads import RequestHeads  # noqa: E402

BALANCERS, BACKENDS = 50, 1000
PLACES = 4  # of a backend: it works on so many requests at a time, the others wait there
SERVICE_SECONDS = 0.5  # mean; exponential
LOAD = 0.6  # share of what all backends can do together
SLOW_SHARE, SLOW_FACTOR = 0.1, 3.0
WARMUP_SECONDS, SECONDS = 3.0, 10.0  # the first are a part of all
CLIENTS = 5000
LOOK_SECONDS = 0.1
ALGORITHMS = ("round_robin", "random", "least_connections", "power_of_two", "peak_ewma", "consistent_hash")
BLIND = ALGORITHMS[:2]  # to loads: news change nothing
NEWS = (None, 0.1, 1.0, 3.0)  # seconds from one to the next


class Shot(NamedTuple):
    """A request: when, at which balancer, of whom, and what share of the mean it takes."""

    at: float
    balancer: int
    client: int
    work: float


class Result(NamedTuple):
    """Milliseconds until the answer; requests in flight on the busiest backend, and on the mean one."""

    p50: float
    p99: float
    busiest: float
    mean: float


class Balancer:
    """One strategy and what it knows: `others` has what it was told of each backend."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.backends = backends
        self.others = [0] * len(backends)

    def begin(self, strategy: Indexed) -> None:
        for backend in self.backends:
            backend.active, backend.speed, backend.counts = 0, Speed(), BackendCounts()
        self.others = [0] * len(self.backends)
        self.strategy = strategy
        strategy.prepare({backend.id: backend.weight for backend in self.backends})
        strategy.gather(self.backends)

    def hear(self, in_flight: Sequence[int]) -> None:
        for place, (backend, total) in enumerate(zip(self.backends, in_flight, strict=True)):
            own = backend.active - self.others[place]
            self.others[place] = total - own
            backend.active = total
        self.strategy.gather(self.backends)


class Fleet:
    """So many balancers in front of so many backends, each with objects of its own for them."""

    def __init__(self, balancers: int = BALANCERS, backends: int = BACKENDS) -> None:
        self.size = backends
        made = [[_backend(number) for number in range(backends)] for _ in range(balancers)]
        self.balancers = [Balancer(each) for each in made]
        self.requests = [_request(client) for client in range(CLIENTS)]

    def simulate(
        self, name: str, news: float | None, is_unequal: bool = False, seconds: float = SECONDS, seed: int = 1
    ) -> Result:
        now, chance = 0.0, random.Random(seed)
        for number, each in enumerate(self.balancers):
            strategy = create(name, clock=lambda: now, rng=random.Random(seed * 1000 + number))
            assert isinstance(strategy, Indexed)
            each.begin(strategy)
        pace = [SLOW_FACTOR if is_unequal and number < SLOW_SHARE * self.size else 1.0 for number in range(self.size)]
        places = [[0.0] * PLACES for _ in range(self.size)]  # when each is free
        in_flight = [0] * self.size
        running: list[tuple[float, int, int, float]] = []  # end, balancer, backend, begin
        told = [(number + 1) / len(self.balancers) * (news or 0.0) for number in range(len(self.balancers))]
        times, busiest, means, look = [], [], [], WARMUP_SECONDS
        for shot in self._shots(chance, pace, seconds):
            while running and running[0][0] <= shot.at:
                now, number, place, began = heappop(running)
                balancer = self.balancers[number]
                backend = balancer.backends[place]
                in_flight[place] -= 1
                backend.active -= 1
                backend.speed.answered(now - began, now)
                balancer.strategy.changed(backend)
            now = shot.at
            if now >= look:
                busiest.append(max(in_flight))
                means.append(fmean(in_flight))
                look += LOOK_SECONDS
            balancer = self.balancers[shot.balancer]
            if news is not None and now >= told[shot.balancer]:
                balancer.hear(in_flight)
                told[shot.balancer] += news * (1 + (now - told[shot.balancer]) // news)
            chosen = balancer.strategy.choose(self.requests[shot.client])
            assert chosen is not None
            place = int(chosen.id)
            chosen.active += 1
            chosen.speed.sent(now)
            balancer.strategy.taken(chosen)
            in_flight[place] += 1
            end = max(now, places[place][0]) + shot.work * SERVICE_SECONDS * pace[place]
            heapreplace(places[place], end)
            heappush(running, (end, shot.balancer, place, now))
            if now >= WARMUP_SECONDS:
                times.append(1000 * (end - now))
        cuts = quantiles(times, n=100)
        return Result(cuts[49], cuts[98], fmean(busiest), fmean(means))

    def _shots(self, chance: random.Random, pace: Sequence[float], seconds: float) -> list[Shot]:
        rate = LOAD * PLACES / SERVICE_SECONDS * sum(1 / each for each in pace)
        arrivals = accumulate(chance.expovariate(rate) for _ in range(round(rate * seconds)))
        many, clients = len(self.balancers), len(self.requests)
        return [Shot(at, chance.randrange(many), chance.randrange(clients), chance.expovariate(1)) for at in arrivals]


def _backend(number: int) -> Backend:
    return Backend(str(number), Origin("http", "127.0.0.1", 1 + number))


def _request(client: int) -> Request:
    peer = f"10.0.{client // 256}.{client % 256}"
    return Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", peer, [(b"host", b"a")])


# Limits.

LIMIT = LimitOptions("l", rate="100/s", burst=20)
OFFERED = 4.0  # times the rate, of all together


class Ledger:
    """As the script of balancer/cluster/link."""

    def __init__(self) -> None:
        self._clear = 0
        self._taken_at: dict[int, int] = {}

    def charge(self, member: int, charge: Charge, now: int) -> Settled:
        self._clear = min(max(self._clear, now) + charge.price * charge.taken, now + charge.most)
        if charge.taken:
            self._taken_at[member] = now
        active = {name for name, at in self._taken_at.items() if at > now - ACTIVE_SECONDS * SECOND}
        return Settled(self._clear - now, len(active | {member}))


class Passed(NamedTuple):
    """How many requests passed, in percent of rate and burst; and how many there were above these at the worst."""

    percent: float
    excess: float


def limit(
    balancers: int, every: float, seconds: float = 5.0, only: int = 0, knows: bool = True, seed: int = 1
) -> Passed:
    """One key at all balancers at once, or at the first `only`. `every` so many seconds each says what was taken; if it
    knows of nobody, each goes by its own part, as without a store."""
    chance, ledger = random.Random(seed), Ledger()
    limits = [SharedLimit(LIMIT) for _ in range(balancers)]
    for each in limits:
        each.share(balancers, is_lost=not knows)
    busy = only or balancers
    due = [(number + 1) / balancers * every for number in range(balancers)]
    now, passed, excess, rate, burst = 0.0, 0, 0.0, 100.0, 20
    while (now := now + chance.expovariate(OFFERED * rate)) < seconds:
        for number in range(balancers):
            while due[number] <= now and knows:
                at = round(due[number] * SECOND)
                for charge in limits[number].charges():
                    limits[number].settle(charge, ledger.charge(number, charge, at), at)
                due[number] += every
        asked, at = limits[chance.randrange(busy)], round(now * SECOND)
        if asked.wait("key", at) <= 0:
            asked.take("key", at)
            passed += 1
            excess = max(excess, passed - burst - rate * now)
    return Passed(100 * passed / (burst + rate * seconds), excess)


def main() -> None:
    fleet = Fleet()
    for is_unequal in (False, True):
        print("one in ten backends takes three times as long" if is_unequal else "equal backends")
        print(
            f"{'':20}" + "".join(f"{'own counts' if news is None else f'news every {news:g} s':>28}" for news in NEWS)
        )
        for name in ALGORITHMS:
            found = [fleet.simulate(name, news, is_unequal) for news in (NEWS[:1] if name in BLIND else NEWS)]
            cells = [f"p50 {r.p50:5.0f} p99 {r.p99:5.0f} most {r.busiest:4.1f}" for r in found]
            print(f"{name:20}" + "".join(f"{cell:>28}" for cell in cells), flush=True)
        print(f"in flight on the mean backend: {found[0].mean:.1f}")
    for balancers, only, every in ((2, 0, 0.05), (2, 1, 0.05), (50, 0, 0.05), (50, 1, 0.05), (50, 0, 1.0)):
        found_limit = limit(balancers, every, only=only)
        where = f"{only or balancers} of {balancers} balancers, settled every {every:g} s"
        print(
            f"limit 100/s, {where}: {found_limit.percent:.0f} % passed, {found_limit.excess:.0f} too many at the worst"
        )
    alone = limit(50, 1.0, only=1, knows=False)
    print(f"limit 100/s, 1 of 50 balancers without a store: {alone.percent:.0f} % passed")


if __name__ == "__main__":
    main()
