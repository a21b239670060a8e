"""Does a contender stand still now and then? Open loop at half of what it can do, for a while.

Requests to the backend itself go out beside those to the contender. When they are late too, the generator, the backend
or the machine stood still, and the contender is not to blame.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from backends import Backends, fast_backends
from contenders import BODY, Contender, Place
from loads import Load
from meter import read_meter
from openloop import DIRECT_RATE, Aim, Shot, figures, fire, steady, worst_ms
from processes import await_answer, free_ports, running
from results import DIRECT_LATE_SECONDS, STALL_SECONDS, StallRun
from speed import progress, run_wrk

MAX_RATE = 10_000.0  # what the generator sends at without being late itself
CAPACITY_LOAD = Load("capacity", "what it can do", 32)
CAPACITY_SECONDS = 2
WARMUP_SECONDS = 1.0
Window = tuple[float, float]


def measure_stalls(chosen: list[Contender], seconds: float) -> list[StallRun]:
    runs = []
    with fast_backends() as backends:
        for contender in chosen:
            progress(f"{contender.name} at half load for {seconds:g} s")
            runs.append(measure_one(contender, backends, seconds))
    progress("")
    return runs


def measure_one(contender: Contender, backends: Backends, seconds: float) -> StallRun:
    path = CAPACITY_LOAD.path
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Place(free_ports(1)[0], backends.ports, Path(name))
        with running(contender.name, contender.command(place), place.directory, contender.cpus) as service:
            await_answer(service, place.port, path, BODY)
            result = run_wrk(place, CAPACITY_LOAD, CAPACITY_SECONDS)
            rate = min(MAX_RATE, result["requests"] / result["seconds"] / 2)
            fire([Aim(place.port, path, steady(rate, WARMUP_SECONDS))])
            before = read_meter(service, backends)
            ours, direct = fire(
                [
                    Aim(place.port, path, steady(rate, seconds)),
                    Aim(backends.ports[0], path, steady(DIRECT_RATE, seconds)),
                ]
            )
            others = read_meter(service, backends).others_share(before)
    return summarise(contender.name, rate, seconds, ours, direct, others)


def summarise(
    name: str, rate: float, seconds: float, ours: list[Shot], direct: list[Shot], others_share: float
) -> StallRun:
    windows = late_windows(ours)
    return StallRun(
        name,
        rate,
        seconds,
        **figures(ours),
        worst=worst_ms(ours),
        stalls=len(windows),
        own_stalls=sum(not was_direct_late(window, direct) for window in windows),
        direct_worst=worst_ms(direct),
        others_share=others_share,
    )


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
    start, end = window
    return any(
        shot.latency > DIRECT_LATE_SECONDS and shot.due <= end and start <= shot.due + shot.latency for shot in direct
    )
