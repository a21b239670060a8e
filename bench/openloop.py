"""Open-loop traffic: requests leave at their times, whether earlier ones were answered or not.

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
from typing import Any

import uvloop
from processes import raise_file_limit
from results import Figures

TICK_SECONDS = 0.001  # due requests are looked for this often
DIRECT_RATE = 100.0  # requests/s past a contender, to tell when the machine stood still
MAX_CONNECTIONS = 4000  # to one target; no contender is configured for more than 4096


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

    def __init__(self) -> None:
        self._data = bytearray()
        self._length = -1
        self._answer: asyncio.Future[bool] | None = None  # None between requests
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[bool]:
        """Whether the answer is a good one."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._length < 0 and (end := self._data.find(b"\r\n\r\n")) >= 0:
            rest = bytes(self._data[:end]).lower().partition(b"\r\ncontent-length:")[2]
            # Every answer of the benchmark's backends, and every refusal of a contender, has a length or ends it all.
            self._length = end + 4 + int(rest.split(b"\r\n")[0]) if rest else 1 << 62
        if 0 <= self._length <= len(self._data):
            self._finish(self._data.startswith(b"HTTP/1.1 200"))

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(False)

    def _finish(self, is_good: bool) -> None:
        answer, self._answer, self._length = self._answer, None, -1
        self._data.clear()
        if answer is not None and not answer.done():
            answer.set_result(is_good)


class Target:
    """A port under fire, and the connections to it; the one used last is used next."""

    def __init__(self, aim: Aim, started: float, most: int) -> None:
        self.shots = [Shot(seconds) for seconds in aim.due]
        self.tasks: set[asyncio.Task[None]] = set()  # a request each
        self._aim = aim
        self._request = f"GET {aim.path} HTTP/1.1\r\nHost: 127.0.0.1:{aim.port}\r\n\r\n".encode()
        self._started = started
        self._fired = 0
        self._free = asyncio.Semaphore(most)
        self._idle: list[Wire] = []

    def fire_due(self) -> bool:
        """Whether more is to come."""
        now = time.monotonic() - self._started
        while self._fired < len(self.shots) and self.shots[self._fired].due <= now:
            task = asyncio.create_task(self._fire(self.shots[self._fired]))
            self._fired += 1
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        return self._fired < len(self.shots)

    async def _fire(self, shot: Shot) -> None:
        shot.was_held = self._free.locked()
        wire: Wire | None = None
        try:
            async with self._free:
                wire = await self._wire()
                shot.is_good = await wire.ask(self._request)
                if shot.is_good:
                    self._idle.append(wire)
        except OSError:
            pass  # refused
        finally:
            shot.latency = time.monotonic() - self._started - shot.due
            if wire and not shot.is_good:
                wire.transport.abort()

    async def _wire(self) -> Wire:
        while self._idle:
            if not (wire := self._idle.pop()).transport.is_closing():
                return wire
        return (await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", self._aim.port))[1]

    async def close(self) -> None:
        """What is not answered by now has failed after all this time."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for wire in self._idle:
            wire.transport.abort()


async def _fire(aims: list[Aim], patience: float, most: int) -> list[list[Shot]]:
    started = time.monotonic() + 0.05
    targets = [Target(aim, started, most) for aim in aims]
    while any([target.fire_due() for target in targets]):
        await asyncio.sleep(TICK_SECONDS)
    if tasks := [task for target in targets for task in target.tasks]:
        await asyncio.wait(tasks, timeout=patience)
    for target in targets:
        await target.close()
    await asyncio.sleep(TICK_SECONDS)  # each connection is told of its end
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
