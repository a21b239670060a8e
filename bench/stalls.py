"""Does a contender stand still now and then? Open loop at half of what it can do, for a while.

Requests to the backend itself go out beside those to the contender. When they are late too, the generator, the backend
or the machine stood still, and the contender is not to blame.
"""

from __future__ import annotations

from backends import Backends, Meter, fast_backends
from contenders import BODY, Contender, started
from loads import Load
from openloop import DIRECT_RATE, Aim, Shot, figures, fire, steady, worst_ms
from processes import progress
from results import DIRECT_LATE_SECONDS, STALL_SECONDS, Figures, Sample
from speed import run_wrk

MAX_RATE = 10_000.0  # what the generator sends at without being late itself
CAPACITY_LOAD = Load("capacity", "what it can do", 32)
CAPACITY_SECONDS = 2
WARMUP_SECONDS = 1.0
Window = tuple[float, float]


def measure_stalls(chosen: list[Contender], seconds: float) -> list[Sample]:
    samples = []
    with fast_backends() as backends:
        for contender in chosen:
            progress(f"{contender.name} at half load for {seconds:g} s")
            samples.append(Sample("stalls", "", contender.name, "", 0, measure(contender, backends, seconds)))
    progress("")
    return samples


def measure(contender: Contender, backends: Backends, seconds: float) -> Figures:
    path = CAPACITY_LOAD.path
    with started(contender, backends.ports, path, BODY) as (service, place):
        result = run_wrk(place.port, CAPACITY_LOAD, CAPACITY_SECONDS)
        rate = min(MAX_RATE, result["requests"] / result["seconds"] / 2)
        fire([Aim(place.port, path, steady(rate, WARMUP_SECONDS))])
        before = Meter.read(service, backends)
        direct = Aim(backends.ports[0], path, steady(DIRECT_RATE, seconds))
        found = summarise(*fire([Aim(place.port, path, steady(rate, seconds)), direct]))
        others = Meter.read(service, backends).others_percent(before)
    return {"requests/s": rate, "seconds": float(seconds)} | found | {"others %": others}


def summarise(shots: list[Shot], direct: list[Shot]) -> Figures:
    windows = late_windows(shots)
    own = sum(not was_direct_late(window, direct) for window in windows)
    stalls: Figures = {"stalls": len(windows), "of its own": own}
    return figures(shots) | stalls | {"worst ms": worst_ms(shots), "worst direct ms": worst_ms(direct)}


def late_windows(shots: list[Shot]) -> list[Window]:
    """From when a late request was due until its answer, overlapping ones joined."""
    joined: list[Window] = []
    for shot in shots:  # in the order in which they were due
        if shot.latency <= STALL_SECONDS:
            continue
        start, end = shot.due, shot.due + shot.latency
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def was_direct_late(window: Window, direct: list[Shot]) -> bool:
    """By more than the limit, while a window was open."""
    start, end = window
    late = [shot for shot in direct if shot.latency > DIRECT_LATE_SECONDS]
    return any(shot.due <= end and start <= shot.due + shot.latency for shot in late)
