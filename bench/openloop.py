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
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import uvloop
from processes import raised_file_limit

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
        with suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._length < 0:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._data[:end]).lower()
            _, _, rest = head.partition(b"\r\ncontent-length:")
            # Every answer of the benchmark's backends, and every refusal of a contender, has a length or ends it all.
            self._length = end + 4 + int(rest.split(b"\r\n")[0]) if rest else 1 << 62
        if len(self._data) >= self._length:
            self._finish(self._data.startswith(b"HTTP/1.1 200"))

    def connection_lost(self, error: Exception | None) -> None:
        self._target.lost(self)
        if self.shot is not None:
            self._finish(False)

    def _finish(self, is_good: bool) -> None:
        shot, self.shot = self.shot, None
        self._data.clear()
        self._length = -1
        if shot is not None:
            self._target.finished(self, shot, is_good)


class Target:
    """A port under fire, and the connections to it; the one used last is used next."""

    def __init__(self, port: int, path: str, due: list[float], started: float, most: int) -> None:
        self.shots = [Shot(seconds) for seconds in due]
        self._port = port
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
        self._started = started
        self._most = most
        self._next = 0
        self._open = 0
        self._idle: list[Wire] = []  # empty while something is held
        self._held: deque[Shot] = deque()
        self._wires: set[Wire] = set()  # all that are open
        self._loop = asyncio.get_running_loop()
        self._left = len(due)
        self._tasks: set[asyncio.Task[None]] = set()
        self.done = asyncio.Event()

    @property
    def has_more(self) -> bool:
        return self._next < len(self.shots)

    def fire_due(self) -> None:
        now = time.monotonic() - self._started
        while self.has_more and self.shots[self._next].due <= now:
            shot = self.shots[self._next]
            self._next += 1
            if self._idle:
                self._send(self._idle.pop(), shot)
            elif self._open < self._most:
                self._open_for(shot)
            else:
                shot.was_held = True
                self._held.append(shot)

    def _open_for(self, shot: Shot) -> None:
        self._open += 1
        task = self._loop.create_task(self._connect(shot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, shot: Shot) -> None:
        try:
            _, wire = await self._loop.create_connection(lambda: Wire(self), "127.0.0.1", self._port)
        except OSError:
            self._end(shot, False)
            self._closed()
        else:
            self._wires.add(wire)
            self._send(wire, shot)

    def _send(self, wire: Wire, shot: Shot) -> None:
        wire.shot = shot
        wire.transport.write(self._request)

    def lost(self, wire: Wire) -> None:
        self._wires.discard(wire)
        if wire in self._idle:
            self._idle.remove(wire)
        self._closed()

    def _closed(self) -> None:
        self._open -= 1
        if self._held:
            self._open_for(self._held.popleft())

    def finished(self, wire: Wire, shot: Shot, is_good: bool) -> None:
        self._end(shot, is_good)
        if not is_good or wire.transport.is_closing():
            wire.transport.close()
        elif self._held:
            self._send(wire, self._held.popleft())
        else:
            self._idle.append(wire)

    def _end(self, shot: Shot, is_good: bool) -> None:
        shot.latency = time.monotonic() - self._started - shot.due
        shot.is_good = is_good
        self._left -= 1
        if not self._left:
            self.done.set()

    async def close(self) -> None:
        """What is not answered by now counts as failed after all this time."""
        now = time.monotonic() - self._started
        self._held.clear()
        for task in self._tasks:
            task.cancel()
        for wire in self._wires:
            wire.shot = None
            wire.transport.abort()
        while self._wires:  # each is told of its end
            await asyncio.sleep(TICK_SECONDS)
        for shot in self.shots:
            if shot.latency == math.inf:
                shot.latency = now - shot.due


@dataclass(frozen=True)
class Aim:
    port: int
    path: str
    due: list[float]  # seconds from the start, ascending


async def _fire(aims: list[Aim], patience: float, most: int) -> list[list[Shot]]:
    started = time.monotonic() + 0.05
    targets = [Target(aim.port, aim.path, aim.due, started, most) for aim in aims]
    while any(target.has_more for target in targets):
        for target in targets:
            target.fire_due()
        await asyncio.sleep(TICK_SECONDS)
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            await asyncio.gather(*(target.done.wait() for target in targets))
    for target in targets:
        await target.close()
    return [target.shots for target in targets]


def fire(aims: list[Aim], patience: float = 10.0, most: int = MAX_CONNECTIONS) -> list[list[Shot]]:
    """Send all of it at the same time; returns when everything was answered, or `patience` seconds after the last.
    `most`: connections to one target at a time."""
    gc.collect()
    gc.disable()  # a pause of ours would be taken for one of the contender's
    try:
        with raised_file_limit():
            return uvloop.run(_fire(aims, patience, most))
    finally:
        gc.enable()


def steady(rate: float, seconds: float) -> list[float]:
    return [number / rate for number in range(int(rate * seconds))]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Independent clients: the same times for the same seed."""
    chance, due, now = random.Random(seed), [], 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        due.append(now)
    return due


def figures(shots: list[Shot], failed_seconds: float = 0.0) -> dict[str, Any]:
    """What both kinds of open-loop runs tell: how many, how many failed, how many left late because the generator had
    no connection free (they count as slow, not as failed), and percentiles in milliseconds, with a failed request
    counted as slow as this at least."""
    times = [(shot.latency if shot.is_good else max(shot.latency, failed_seconds)) * 1e3 for shot in shots]
    return {
        "requests": len(shots),
        "failed": sum(not shot.is_good for shot in shots),
        "held": sum(shot.was_held for shot in shots),
        "p50": percentile(times, 0.50),
        "p99": percentile(times, 0.99),
        "p999": percentile(times, 0.999),
    }


def worst_ms(shots: list[Shot]) -> float:
    return max(shot.latency for shot in shots) * 1e3


def percentile(values: list[float], share: float) -> float:
    """Nearest rank. `values` need not be sorted; never empty."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
