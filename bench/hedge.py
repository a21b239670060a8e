"""What hedged requests do for the tail, and what they cost.

12 minutes with 30 s for each figure; exit 1 if one of the goals below is missed.

Unequal backends as in `quality`, one of which stands still for 2 s every 15 s, with `hedge` off and auto: simulated and
measured, at the rate of that benchmark and at half of it, where the other two have room while one stands still. Beside
it, what comes out if each request goes to whichever backend will have answered it first, stalls to come included. No
chooser can know that.

Then equal healthy backends that take 10 ms: latency and CPU time with hedging must be those without.
"""

from __future__ import annotations

import heapq
import random
import sys
from itertools import product
from statistics import median

import quality
from backends import Backends, meter, slow_backends
from contenders import CONTENDERS, OURS, WAIT_PATH, started
from openloop import Aim, Shot, figures, fire, poisson, steady
from processes import interleaved, progress
from results import Figures
from script import Parser, at_least
from slow_backend import parse

METHODS = ("least_response_time", "peak_ewma", "least_connections")
RATES = {"quality": quality.RATE, "half of it": quality.RATE / 2}
HEDGES = ("off", "auto")
SHOWN = ("p50 ms", "p99 ms", "p99.9 ms", "extra %")
DIRECT = "worst direct ms"  # of requests past the balancer: when they are late, machine or generator stood still
EQUAL, EQUAL_RATE, EQUAL_ROUNDS = ("0.01", "0.01", "0.01"), 500.0, 9
# The goals: milliseconds, requests of 100, and per cent that off and auto may differ with equal backends.
GOALS = {"p99 ms": 200.0, "p99.9 ms": 250.0, "extra %": 5.0}
SAME = 2.0


def main(seconds: float) -> int:
    missed = unequal(seconds) + equal(seconds)
    for fault in missed:
        print(f"hedge: missed: {fault}", file=sys.stderr)
    return 1 if missed else 0


def unequal(seconds: float) -> list[str]:
    """Goals that no method has reached."""
    names = "".join(f"{name:>9}" for name in SHOWN) + "  "
    print(f"{'':39}{'simulated':^36}  {'measured':^36}")
    print(f"{'rate':11} {'method':20} {'hedge':6}{names}{names}{DIRECT:>16}")
    missed = []
    with slow_backends(*quality.SPECIFICATIONS.values(), quality.AT_ONCE) as backends:
        for name, rate in RATES.items():
            print(f"{name:11} {'who knows beforehand':26} {told(foreseen(rate))}")
            hedged = []
            for method, hedge in product(METHODS, HEDGES):
                progress(f"{method}, hedge {hedge}, {rate:.0f} requests/s")
                simulated = quality.simulate(0, method, quality.SIMULATED_SECONDS, hedge=hedge, rate=rate)
                found = quality.measure(0, OURS, f"{method} --hedge={hedge}", backends, seconds, rate=rate)
                hedged += [found] if hedge != "off" else []
                progress("")
                figures = f"{told(simulated)}  {told(found)}{found[DIRECT]:18.0f}"
                print(f"{name:11} {method:20} {hedge:6}{figures}", flush=True)
            for goal, most in GOALS.items():
                if (best := min(figures[goal] for figures in hedged)) > most:
                    missed.append(f"{goal}, {name}: {best:.4g} instead of {most:g}")
    return missed


def foreseen(rate: float) -> Figures:
    """The traffic of the simulation, each request sent to whoever will have answered it first."""
    backends, chance = [parse(text) for text in quality.SPECIFICATIONS.values()], random.Random(1)
    shots = [Shot(due) for due in poisson(rate, quality.SIMULATED_SECONDS, seed=1)]
    for backend in backends:
        backend.restart(0.0)
    for shot in shots:
        work = chance.expovariate(1)
        ends = [each.after(max(shot.due, each._free_at[0]), work * each.seconds) for each in backends]
        answered = min(ends)
        heapq.heapreplace(backends[ends.index(answered)]._free_at, answered)
        shot.latency, shot.is_good = answered - shot.due, True
    return figures(shots) | {"extra %": 0.0}


def equal(seconds: float) -> list[str]:
    """Goals that are missed. Off and auto take turns, so that a slow minute hits both."""
    rounds: dict[str, list[Figures]] = {hedge: [] for hedge in HEDGES}
    with slow_backends(*EQUAL) as backends:
        for _, hedge in interleaved(EQUAL_ROUNDS, HEDGES, lambda hedge: f"equal backends, hedge {hedge}"):
            rounds[hedge].append(measure_equal(hedge, backends, seconds / 5))
    missed = []
    for name in ("p50 ms", "CPU us/req"):
        off, auto = ([figures[name] for figures in rounds[hedge]] for hedge in HEDGES)
        more = 100 * (median(one / other for one, other in zip(auto, off, strict=True)) - 1)
        medians = f"{median(off):.4g} off, {median(auto):.4g} auto, {more:+.1f} %"
        print(f"equal backends, {EQUAL_RATE:.0f} requests/s: {name} {medians}")
        if more > SAME:
            missed.append(f"{name} with equal backends: {more:+.1f} % instead of {SAME:g}")
    print(f"equal backends: {median(each['extra %'] for each in rounds['auto']):.2f} % extra requests")
    return missed


def measure_equal(hedge: str, backends: Backends, seconds: float) -> Figures:
    method = f"round_robin --hedge={hedge}"
    with started(CONTENDERS[OURS], backends.ports, WAIT_PATH, method=method) as (service, place):
        fire([Aim(place.port, WAIT_PATH, steady(EQUAL_RATE, 2.0))])
        meter_now = meter(service, backends)
        (shots,) = fire([Aim(place.port, WAIT_PATH, poisson(EQUAL_RATE, seconds, seed=1))])
        spent = meter_now()
    cpu, extra = spent.cpu_seconds / len(shots) * 1e6, 100 * (spent.requests / len(shots) - 1)
    return figures(shots) | {"CPU us/req": cpu, "extra %": extra}


def told(found: Figures) -> str:
    return "".join(f"{found[name]:9.1f}" for name in SHOWN)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("seconds", type=at_least(5.0), nargs="?", default=30.0, help="for each figure; default 30")
    parser.start(main)
