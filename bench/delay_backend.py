"""Backends that take their time: each argument is one of them, `PORT:SECONDS[:SLOTS[:STALL_EVERY:STALL_SECONDS]]`.

SECONDS is what one request takes. With SLOTS that is the mean of an exponential distribution, and no more requests than
that are worked on at a time; the others wait, first come first served. Every STALL_EVERY seconds the backend stops for
STALL_SECONDS, as in a garbage collection: it accepts and reads, works on nothing and answers nothing, not even its
health check. `POST /restart` sets its clock and its chance back, so that every contender meets the same backends.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import deque
from dataclasses import dataclass, field

from contenders import BODY, STUB_STATUS_PATH
from processes import raise_file_limit

FIRST_STALL_SECONDS = 4.0  # after the restart
SEED = 7


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@dataclass
class Backend:
    """One port. Work is measured on the backend's own clock, which stands still while it stalls."""

    seconds: float
    slots: int | None = None
    stall_every: float = 0.0
    stall_seconds: float = 0.0
    requests: int = 0
    _busy: int = 0
    _queue: deque[Client] = field(default_factory=deque)
    _chance: random.Random = field(default_factory=lambda: random.Random(SEED))
    _started: float = 0.0

    def restart(self) -> None:
        self._chance.seed(SEED)
        self._started = asyncio.get_running_loop().time()

    def accept(self, client: Client) -> None:
        if self.slots is not None and self._busy >= self.slots:
            self._queue.append(client)
        else:
            self._work(client)

    def _work(self, client: Client) -> None:
        self._busy += 1
        seconds = self.seconds if self.slots is None else self._chance.expovariate(1 / self.seconds)
        asyncio.get_running_loop().call_later(self.until_done(seconds), self._done, client)

    def _done(self, client: Client) -> None:
        self._busy -= 1
        client.write(answer(BODY))
        if self._queue:
            self._work(self._queue.popleft())

    def until_done(self, work: float) -> float:
        """Seconds from now until that much work is done, stalls included."""
        if not self.stall_every:
            return work
        awake = self.stall_every - self.stall_seconds
        age = asyncio.get_running_loop().time() - self._started - FIRST_STALL_SECONDS
        phase = age % self.stall_every  # a stall is the first part of each period
        asleep = max(0.0, self.stall_seconds - phase) if age >= 0 else 0.0
        left = (awake - max(0.0, phase - self.stall_seconds)) if age >= 0 else -age
        while work > left:
            work -= left
            asleep += left + self.stall_seconds
            left = awake
        return asleep + work


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
        backend = self._backend
        if path == "/restart":
            backend.restart()
            self.write(answer(b"{}"))
        elif path == STUB_STATUS_PATH:  # as nginx words it
            self.write(answer(b"\n\n %d %d %d\n" % (backend.requests, backend.requests, backend.requests)))
        elif path == "/health":
            asyncio.get_running_loop().call_later(backend.until_done(0.0), self.write, answer(b"{}"))
        else:
            backend.requests += 1
            backend.accept(self)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def parse(text: str) -> tuple[int, Backend]:
    port, seconds, slots, every, stall = (*text.split(":"), "0", "0", "0")[:5]
    return int(port), Backend(float(seconds), int(slots) or None, float(every), float(stall))


async def serve(arguments: list[str]) -> None:
    loop = asyncio.get_running_loop()
    servers = []
    for port, backend in map(parse, arguments):
        backend.restart()

        def client(backend: Backend = backend) -> Client:
            return Client(backend)

        servers.append(await loop.create_server(client, "127.0.0.1", port, backlog=4096))
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
