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
from collections import deque
from dataclasses import dataclass
from typing import Any

import uvloop
from backends import Backends, Meter, fast_backends
from contenders import BODY, Contender, started
from processes import progress, raise_file_limit
from results import DIRECT_LATE_SECONDS, STALL_SECONDS, Figures, Sample
from speed import Load, run_wrk

TICK_SECONDS = 0.001  # due requests are looked for this often
DIRECT_RATE = 100.0  # requests/s past a contender, to tell when the machine stood still
MAX_CONNECTIONS = 4000  # to one target; no contender is configured for more than 4096
MAX_RATE = 10_000.0  # what the generator sends at without being late itself
CAPACITY_LOAD = Load("capacity", "what it can do", 32)
CAPACITY_SECONDS = 2
WARMUP_SECONDS = 1.0


@dataclass(slots=True)
class Shot:
    """One request: when it was due (seconds from the start), and how long after that its answer was complete, or it was
    given up (finite after `fire`). Held: all connections were busy, and it left when one became free."""

    due: float
    latency: float = math.inf
    is_good: bool = False
    was_held: bool = False


@dataclass(frozen=True)
class Aim:
    port: int
    path: str
    due: list[float]  # seconds from the start, ascending


class Wire(asyncio.Protocol):
    """One kept connection with at most one request in flight."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._data = bytearray()
        self._length = -1
        self.shot: Shot | None = None
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._target.wires.add(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._length < 0 and (end := self._data.find(b"\r\n\r\n")) >= 0:
            rest = bytes(self._data[:end]).lower().partition(b"\r\ncontent-length:")[2]
            # Every answer of the benchmark's backends, and every refusal of a contender, has a length or ends it all.
            self._length = end + 4 + int(rest.split(b"\r\n")[0]) if rest else 1 << 62
        if 0 <= self._length <= len(self._data):
            is_good = self._data.startswith(b"HTTP/1.1 200")
            self._data.clear()
            self._length = -1
            self._target.answered(self, is_good)

    def connection_lost(self, error: Exception | None) -> None:
        self._target.lost(self)


class Target:
    """A port under fire, and the connections to it; the one used last is used next. Callbacks, and no task for each
    request: the generator shares the machine with what it measures."""

    def __init__(self, aim: Aim, started: float, most: int) -> None:
        self.shots = [Shot(seconds) for seconds in aim.due]
        self.left = len(self.shots)
        self.wires: set[Wire] = set()  # all that are open
        self._aim = aim
        self._request = f"GET {aim.path} HTTP/1.1\r\nHost: 127.0.0.1:{aim.port}\r\n\r\n".encode()
        self._started = started
        self._most = most
        self._coming = deque(self.shots)
        self._due: deque[Shot] = deque()
        self._idle: list[Wire] = []
        self._tasks: set[asyncio.Task[None]] = set()  # that connect

    def fire_due(self) -> bool:
        """Whether more is to come."""
        now = self._now()
        while self._coming and self._coming[0].due <= now:
            shot = self._coming.popleft()
            self._due.append(shot)
            self._send_due()
            shot.was_held = bool(self._due)  # and it is the last of them
        return bool(self._coming)

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _send_due(self) -> None:
        while self._due and self._idle:
            self._send(self._idle.pop(), self._due.popleft())
        while self._due and len(self.wires) + len(self._tasks) < self._most:
            self._tasks.add(asyncio.create_task(self._connect(self._due.popleft())))

    def _send(self, wire: Wire, shot: Shot) -> None:
        if wire.transport.is_closing():  # the other side has hung up since
            self._end(shot, False)
        else:
            wire.shot = shot
            wire.transport.write(self._request)

    async def _connect(self, shot: Shot) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, wire = await loop.create_connection(lambda: Wire(self), "127.0.0.1", self._aim.port)
            self._send(wire, shot)
        except OSError:
            self._end(shot, False)
        finally:
            self._tasks.discard(asyncio.current_task())
            self._send_due()

    def answered(self, wire: Wire, is_good: bool) -> None:
        shot, wire.shot = wire.shot, None
        if shot is not None:
            self._end(shot, is_good)
        if is_good and not wire.transport.is_closing():
            self._idle.append(wire)
            self._send_due()
        else:
            wire.transport.abort()

    def lost(self, wire: Wire) -> None:
        self.wires.discard(wire)
        if wire in self._idle:
            self._idle.remove(wire)
        if wire.shot is not None:
            self._end(wire.shot, False)
        self._send_due()

    def _end(self, shot: Shot, is_good: bool) -> None:
        shot.latency, shot.is_good = self._now() - shot.due, is_good
        self.left -= 1

    async def close(self) -> None:
        """What is not answered by now has failed after all this time."""
        self._due.clear()
        for task in self._tasks:
            task.cancel()
        for wire in self.wires:
            wire.transport.abort()
        while self.wires or self._tasks:  # each is told of its end
            await asyncio.sleep(TICK_SECONDS)
        for shot in self.shots:
            shot.latency = min(shot.latency, self._now() - shot.due)


async def _fire(aims: list[Aim], patience: float, most: int) -> list[list[Shot]]:
    started = time.monotonic() + 0.05
    targets = [Target(aim, started, most) for aim in aims]
    while any([target.fire_due() for target in targets]):
        await asyncio.sleep(TICK_SECONDS)
    deadline = time.monotonic() + patience
    while any(target.left for target in targets) and time.monotonic() < deadline:
        await asyncio.sleep(TICK_SECONDS)
    for target in targets:
        await target.close()
    return [target.shots for target in targets]


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
