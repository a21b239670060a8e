"""What many balancers in front of many backends make of what each of them knows: a simulation on a clock of its own.

Under a minute of CPU; the same figures on any machine; docs/scale.md explains them. The strategies and the limits are
the real ones, and so are Backend and its Speed; requests, queues at the backends and news of the others are simulated.
With news every so many seconds, each balancer goes by what it has in flight itself, and by what all others had in
flight when the news came.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate
from statistics import fmean, quantiles
from typing import NamedTuple, cast

from script import Parser

from balancer.balancing.backends import Backend
from balancer.balancing.options import StrategyOptions
from balancer.balancing.speed import Speed
from balancer.balancing.strategies import Indexed, create
from balancer.filters.limit import SECOND, LimitOptions
from balancer.filters.sharedlimit import Accounts, SharedLimit
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

BALANCERS, BACKENDS = 50, 1000
PLACES = 4  # of a backend: it works on so many requests at a time, the others wait there
SERVICE_SECONDS = 0.5  # mean; exponential
LOAD = 0.6  # share of what all backends can do together
SLOW_SHARE, SLOW_FACTOR = 0.1, 3.0
WARMUP_SECONDS, SECONDS = 2.0, 3.0  # the first ones are not looked at; they last until the first news at least
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
    """Requests that had to wait at their backend, in percent; the time that 1 % of all waited at least, in seconds; in
    flight on the busiest backend, and on the mean one."""

    waited: float
    p99: float
    busiest: float
    mean: float


class Balancer:
    """One strategy and what it knows: `others` has what it was told of each backend."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.backends = backends
        self.others = [0] * len(backends)

    def begin(self, strategy: Indexed, alike: Indexed) -> None:
        """`alike` has prepared: what came of it is the same for all."""
        for backend in self.backends:
            backend.active, backend.speed = 0, Speed()
        self.others = [0] * len(self.backends)
        self.strategy = strategy
        vars(strategy).update({name: value for name, value in vars(alike).items() if name == "_ring"})
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
        self,
        name: str,
        news: float | None = None,
        *,
        is_unequal: bool = False,
        in_step: bool = False,
        seconds: float = SECONDS,
        seed: int = 1,
    ) -> Result:
        """`in_step`: all have the same order, and begin at the same moment."""
        now, chance, warm = 0.0, random.Random(seed), WARMUP_SECONDS + (news or 0.0)
        options = StrategyOptions(is_member=not in_step)
        made = [
            cast(Indexed, create(name, options, clock=lambda: now, rng=random.Random(seed * 1000 + number)))
            for number in range(len(self.balancers))
        ]
        made[0].prepare({backend.id: backend.weight for backend in self.balancers[0].backends})
        for each, strategy in zip(self.balancers, made, strict=True):
            each.begin(strategy, made[0])
        pace = [SLOW_FACTOR if is_unequal and number < SLOW_SHARE * self.size else 1.0 for number in range(self.size)]
        places = [[0.0] * PLACES for _ in range(self.size)]  # when each is free
        in_flight = [0] * self.size
        running: list[tuple[float, int, int, float]] = []  # end, balancer, backend, begin
        told = [(number + 1) / len(self.balancers) * (news or 0.0) for number in range(len(self.balancers))]
        waits, busiest, means, look = [], [], [], warm
        for shot in self._shots(chance, pace, seconds + warm):
            while running and running[0][0] <= shot.at:
                now, number, place, sent = heappop(running)
                balancer = self.balancers[number]
                backend = balancer.backends[place]
                in_flight[place] -= 1
                backend.active -= 1
                backend.speed.answered(now - sent, now)
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
            began = max(now, places[place][0])
            end = began + shot.work * SERVICE_SECONDS * pace[place]
            heapreplace(places[place], end)
            heappush(running, (end, shot.balancer, place, now))
            if now >= warm:
                waits.append(began - now)
        waited = 100 * sum(wait > 0 for wait in waits) / len(waits)
        return Result(waited, quantiles(waits, n=100)[98], fmean(busiest), fmean(means))

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


class Passed(NamedTuple):
    """How many requests passed, in percent of rate and burst; and how many there were above these at the worst."""

    percent: float
    excess: float


def limit(
    balancers: int, every: float, seconds: float = 5.0, only: int = 0, knows: bool = True, seed: int = 1
) -> Passed:
    """One key at all balancers at once, or at the first `only`. `every` so many seconds each says what was taken; if it
    knows of nobody, each goes by its own part, as without a store."""
    chance, accounts = random.Random(seed), Accounts()
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
                charges = limits[number].charges()
                for charge, settled in zip(charges, accounts.charge(number, charges, at), strict=True):
                    limits[number].settle(charge, settled, at)
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
        about = "one in ten backends takes three times as long" if is_unequal else "equal backends"
        print(f"{about}: share that waited, how long 1 % did, in flight on the busiest and on the mean one")
        columns = (None, 1.0) if is_unequal else NEWS
        print(" " * 20 + "".join(f"{'own counts' if n is None else f'news every {n:g} s':>32}" for n in columns))
        for name in ALGORITHMS:
            found = [fleet.simulate(name, n, is_unequal=is_unequal) for n in columns if n is None or name not in BLIND]
            print(f"{name:20}" + "".join(f"{_cell(each):>32}" for each in found), flush=True)
    print(f"least_connections, all begin in step: {_cell(fleet.simulate('least_connections', in_step=True))}")
    for balancers, only, every in ((2, 0, 0.05), (2, 1, 0.05), (50, 0, 0.05), (50, 1, 0.05), (50, 0, 1.0)):
        passed = limit(balancers, every, only=only)
        where = f"{only or balancers} of {balancers} balancers, settled every {every:g} s"
        print(f"limit 100/s, {where}: {passed.percent:.0f} % passed, {passed.excess:.0f} too many at the worst")
    alone = limit(50, 1.0, only=1, knows=False)
    print(f"limit 100/s, 1 of 50 balancers without a store: {alone.percent:.0f} % passed")


def _cell(found: Result) -> str:
    return f"{found.waited:.0f} %, p99 {found.p99:.2f} s, {found.busiest:.0f} of {found.mean:.1f}"


if __name__ == "__main__":
    Parser(__doc__).start(main)
