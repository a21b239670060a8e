"""Backends that take their time: each argument is one of them, `PORT:SECONDS[:SLOTS[:STALL_EVERY:STALL_SECONDS]]`.

SECONDS is what one request takes. With SLOTS that is the mean of an exponential distribution, and no more requests than
that are worked on at a time; the others wait, first come first served. Every STALL_EVERY seconds the backend stops for
STALL_SECONDS, as in a garbage collection: it accepts and reads, works on nothing and answers nothing, not even its
health check. `POST /restart` sets its clock and its chance back, so that every contender meets the same backends.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import sys
from dataclasses import dataclass, field

from contenders import BODY, STUB_STATUS_PATH
from processes import raise_file_limit

FIRST_STALL_SECONDS = 4.0  # after the restart
SEED = 7


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@dataclass
class Backend:
    """One port. When an answer is due is settled when its request comes, so that a busy machine may delay this answer
    but not those behind it: the capacity stays what it is."""

    seconds: float
    slots: int = 0  # 0: as many as come
    stall_every: float = 0.0
    stall_seconds: float = 0.0
    requests: int = 0
    _free_at: list[float] = field(default_factory=list)  # when each slot has done what it was given; a heap
    _chance: random.Random = field(default_factory=lambda: random.Random(SEED))
    _started: float = 0.0

    def restart(self, now: float) -> None:
        self._chance.seed(SEED)
        self._started = now
        self._free_at = [now] * self.slots

    def due(self, now: float) -> float:
        """When a request that comes now will be answered."""
        if not self._free_at:
            return self.after(now, self.seconds)
        start = max(now, self._free_at[0])
        end = self.after(start, self._chance.expovariate(1 / self.seconds))
        heapq.heapreplace(self._free_at, end)
        return end

    def after(self, start: float, work: float) -> float:
        """When work begun at `start` is done: it rests while the backend stalls."""
        if not self.stall_every:
            return start + work
        first = self._started + FIRST_STALL_SECONDS
        while True:
            past = max(0, math.floor((start - first) / self.stall_every))
            stall = first + past * self.stall_every
            if stall <= start < stall + self.stall_seconds:
                start = stall + self.stall_seconds
            coming = stall if start < stall else stall + self.stall_every
            if start + work <= coming:
                return start + work
            work -= coming - start
            start = coming


class Client(asyncio.Protocol):
    """One connection; requests have no body and come one after the other."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, self._data = self._data.partition(b"\r\n\r\n")
            self._serve(head.split(b" ", 2)[1].decode("latin-1"))

    def _serve(self, path: str) -> None:
        loop, backend = asyncio.get_running_loop(), self._backend
        now = loop.time()
        if path == "/restart":
            backend.restart(now)
            self.write(answer(b"{}"))
        elif path == STUB_STATUS_PATH:  # as nginx words it
            self.write(answer(b"\n\n %d %d %d\n" % (backend.requests, backend.requests, backend.requests)))
        elif path == "/health":
            loop.call_at(backend.after(now, 0.0), self.write, answer(b"{}"))
        else:
            backend.requests += 1
            loop.call_at(backend.due(now), self.write, answer(BODY))

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def parse(text: str) -> Backend:
    """`SECONDS[:SLOTS[:STALL_EVERY:STALL_SECONDS]]`"""
    seconds, slots, every, stall = (*text.split(":"), "0", "0", "0")[:4]
    return Backend(float(seconds), int(slots), float(every), float(stall))


async def serve(arguments: list[str]) -> None:
    loop = asyncio.get_running_loop()
    servers = []
    for argument in arguments:
        port, _, text = argument.partition(":")
        backend = parse(text)
        backend.restart(loop.time())

        def client(backend: Backend = backend) -> Client:
            return Client(backend)

        servers.append(await loop.create_server(client, "127.0.0.1", int(port), backlog=4096))
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    raise_file_limit()
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(sys.argv[1:]))
    else:
        uvloop.run(serve(sys.argv[1:]))


if __name__ == "__main__":
    main()
