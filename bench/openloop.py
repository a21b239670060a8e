"""Open-loop traffic, and the search for stalls: requests leave at their times, answered or not.

A closed loop (wrk) waits for an answer before it asks again, so that while a proxy stands still it asks nothing, and
all that is recorded of the standstill is one slow request per connection. Here a latency is counted from the moment at
which the request was due, as a client would feel it, the generator's own lateness included.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import resource
import time
from dataclasses import dataclass

import uvloop
from backends import Backends, fast_backends, meter
from contenders import Contender, started
from processes import progress, raise_file_limit
from results import DIRECT_LATE_SECONDS, STALL_SECONDS, Figures, Sample
from speed import Load, run_wrk

DIRECT_RATE = 100.0  # requests/s past a contender, to tell when the machine stood still
MAX_CONNECTIONS = 4000  # to one target; no contender is configured for more than 4096
MAX_RATE = 5_000.0  # what the generator sends at without being late itself
CAPACITY_LOAD = Load("capacity", "what it can do", 32)
CAPACITY_SECONDS = 2
WARMUP_SECONDS = 1.0


@dataclass(slots=True)
class Shot:
    """One request: when it was due (seconds from the start), and how long after that its answer was complete, or it was
    given up. Held: all connections were busy, and it left when one became free."""

    due: float
    latency: float = 0.0
    is_good: bool = False
    was_held: bool = False


@dataclass(frozen=True)
class Aim:
    port: int
    path: str
    due: list[float]  # seconds from the start, ascending


class Target:
    """A port under fire, and the connections to it that are kept and idle; the one used last is used next."""

    def __init__(self, aim: Aim, most: int) -> None:
        self.shots = [Shot(seconds) for seconds in aim.due]
        self._port, self._free = aim.port, asyncio.Semaphore(most)
        self._request = f"GET {aim.path} HTTP/1.1\r\nHost: 127.0.0.1:{aim.port}\r\n\r\n".encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def fire(self, started: float, patience: float) -> list[Shot]:
        waiting: set[asyncio.Task[None]] = set()
        for shot in self.shots:
            await asyncio.sleep(started + shot.due - time.monotonic())
            waiting.add(task := asyncio.create_task(self._send(shot, started + shot.due)))
            task.add_done_callback(waiting.discard)
        late = (await asyncio.wait(waiting, timeout=patience))[1] if waiting else ()
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for _, writer in self._idle:
            writer.transport.abort()
        return self.shots

    async def _send(self, shot: Shot, due: float) -> None:
        shot.was_held = self._free.locked()
        try:
            async with self._free:
                shot.is_good = await self._exchange()
        except (OSError, asyncio.IncompleteReadError):
            pass  # it has failed
        finally:
            shot.latency = time.monotonic() - due

    async def _exchange(self) -> bool:
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        is_good = False
        try:
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            # Every good answer of the benchmark's backends has a length.
            length = head.lower().partition(b"\r\ncontent-length:")[2].split(b"\r\n")[0]
            await reader.readexactly(int(length or b"0"))
            is_good = head.startswith(b"HTTP/1.1 200")
        finally:
            if is_good:
                self._idle.append((reader, writer))
            else:
                writer.transport.abort()
        return is_good


async def _fire(aims: list[Aim], patience: float, most: int) -> list[list[Shot]]:
    targets, started = [Target(aim, most) for aim in aims], time.monotonic() + 0.05
    found = await asyncio.gather(*(target.fire(started, patience) for target in targets))
    await asyncio.sleep(0)  # connections end in the next turn
    return found


def fire(aims: list[Aim], patience: float = 10.0, most: int = MAX_CONNECTIONS) -> list[list[Shot]]:
    """Send all of it at the same time; returns when everything was answered, or `patience` seconds after the last.
    `most`: connections to one target at a time."""
    gc.collect()
    gc.disable()  # a pause of ours would be taken for one of the contender's
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # raised for a time only: contenders keep what they are given
    raise_file_limit()
    try:
        return uvloop.run(_fire(aims, patience, most))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        gc.enable()


def steady(rate: float, seconds: float) -> list[float]:
    return [number / rate for number in range(int(rate * seconds))]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Independent clients: the same times for the same seed."""
    chance, due, now = random.Random(seed), [], 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        due.append(now)
    return due


def figures(shots: list[Shot], failed_seconds: float = 0.0) -> Figures:
    """What both kinds of open-loop runs tell. Held requests count as slow and not as failed; failed ones as slow as
    this at least."""
    times = sorted((shot.latency if shot.is_good else max(shot.latency, failed_seconds)) * 1e3 for shot in shots)
    found: Figures = {
        "requests": len(shots),
        "failed": sum(not shot.is_good for shot in shots),
        "held": sum(shot.was_held for shot in shots),
    }
    return found | {f"p{share} ms": percentile(times, share / 100) for share in (50, 99, 99.9)}


def worst_ms(shots: list[Shot]) -> float:
    return max(shot.latency for shot in shots) * 1e3


def percentile(ordered: list[float], share: float) -> float:
    """Nearest rank; of one value at least."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# Does a contender stand still now and then? Half of what it can do, for a while; beside that requests go to the backend
# itself: when they are late too, generator, backend or machine stood still, and the contender is not to blame.


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
    with started(contender, backends.ports) as (service, place):
        result = run_wrk(place.port, CAPACITY_LOAD, CAPACITY_SECONDS)
        rate = min(MAX_RATE, result["requests"] / result["seconds"] / 2)
        fire([Aim(place.port, path, steady(rate, WARMUP_SECONDS))])
        spent = meter(service, backends)
        direct = Aim(backends.ports[0], path, steady(DIRECT_RATE, seconds))
        found = summarise(*fire([Aim(place.port, path, steady(rate, seconds)), direct]))
        others = spent().others_percent
    return {"requests/s": rate, "seconds": float(seconds)} | found | {"others %": others}


def summarise(shots: list[Shot], direct: list[Shot]) -> Figures:
    windows = late_windows(shots)
    own = sum(not was_direct_late(window, direct) for window in windows)
    stalls: Figures = {"stalls": len(windows), "of its own": own}
    return figures(shots) | stalls | {"worst ms": worst_ms(shots), "worst direct ms": worst_ms(direct)}


def late_windows(shots: list[Shot]) -> list[tuple[float, float]]:
    """From when a late request was due until its answer, overlapping ones joined."""
    joined: list[tuple[float, float]] = []
    for shot in shots:  # in the order in which they were due
        if shot.latency <= STALL_SECONDS:
            continue
        start, end = shot.due, shot.due + shot.latency
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def was_direct_late(window: tuple[float, float], direct: list[Shot]) -> bool:
    """By more than the limit, while a window was open."""
    start, end = window
    late = [shot for shot in direct if shot.latency > DIRECT_LATE_SECONDS]
    return any(shot.due <= end and start <= shot.due + shot.latency for shot in late)
