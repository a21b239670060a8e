"""Backends that take their time, each on a port of its own.

SECONDS is what one `GET /wait` takes. With SLOTS that is the mean of an exponential distribution, and no more of them
than that are worked on at a time; the others wait, first come first served. Every STALL_EVERY seconds the backend stops
for STALL_SECONDS, as in a garbage collection: it reads, works on nothing, and answers neither /wait nor /health.

GET /peak                      the most /wait requests that were open at one time
GET /restart                   sets clock and chance back, so that every contender meets the same backends
GET /download/<bytes>          a body of that many bytes, never held whole, with Content-Length
GET /download/<bytes>/chunked  the same, chunked
PUT /upload                    answers length and checksum of the body
anything else                  the body that the benchmark's fast backend gives, at once
"""

from __future__ import annotations

import asyncio
import heapq
import json
import math
import random
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial

import uvloop
from contenders import BODY
from processes import raise_file_limit
from script import Parser, at_least

FIRST_STALL_SECONDS = 4.0  # after the restart
SEED = 7
# Odd length and random content: a lost, repeated or swapped piece changes the checksum of the whole.
BLOCK = random.Random(1).randbytes(65521)


@dataclass
class Backend:
    """One port. When an answer is due is settled when its request comes, so that a busy machine may delay this answer
    but not those behind it: the capacity stays what it is."""

    seconds: float
    slots: int = 0  # 0: as many as come
    stall_every: float = 0.0
    stall_seconds: float = 0.0
    requests: int = 0  # to /wait
    open: int = 0  # of those, and the most at one time
    peak: int = 0
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


async def answer(backend: Backend, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection; its requests come one after the other."""
    clock = asyncio.get_running_loop().time
    with suppress(OSError, asyncio.IncompleteReadError), closing(writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            sent = await read_body(reader, head.lower())
            said = BODY
            match head.split(b" ", 2)[1].decode("latin-1").strip("/").split("/"):
                case ["wait"]:
                    backend.requests, backend.open = backend.requests + 1, backend.open + 1
                    backend.peak = max(backend.peak, backend.open)
                    await asyncio.sleep(backend.due(clock()) - clock())
                    backend.open -= 1
                case ["bench-stub-status"]:  # as nginx words it
                    said = b"\n\n %d %d %d\n" % ((backend.requests,) * 3)
                case ["health"]:
                    await asyncio.sleep(backend.after(clock(), 0.0) - clock())
                case ["restart"]:
                    backend.restart(clock())
                case ["peak"]:
                    said = b"%d" % backend.peak
                case ["upload"]:
                    said = json.dumps(sent).encode()
                case ["download", size, *chunked]:
                    for piece in download(int(size), bool(chunked)):
                        writer.write(piece)
                        await writer.drain()
                    continue
            writer.write(head_of(b"Content-Length: %d" % len(said)) + said)


async def read_body(reader: asyncio.StreamReader, head: bytes) -> tuple[int, int]:
    """Its length and checksum."""
    length = checksum = 0
    is_chunked = b"\r\ntransfer-encoding: chunked" in head
    left = int(head.partition(b"\r\ncontent-length:")[2].split(b"\r\n")[0] or b"0")
    while is_chunked or length < left:
        size = int(await reader.readline(), 16) if is_chunked else min(left - length, 1 << 16)
        piece = await reader.readexactly(size)
        length, checksum = length + size, zlib.crc32(piece, checksum)
        if is_chunked:
            await reader.readline()
            is_chunked = size > 0
    return length, checksum


def head_of(framing: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%s\r\n\r\n" % framing


def download(size: int, is_chunked: bool) -> Iterator[bytes]:
    yield head_of(b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % size)
    for block in blocks(size):
        yield b"%x\r\n%s\r\n" % (len(block), block) if is_chunked else block
    if is_chunked:
        yield b"0\r\n\r\n"


def blocks(size: int) -> Iterator[bytes]:
    for start in range(0, size, len(BLOCK)):
        yield BLOCK[: size - start]


def parse(text: str) -> Backend:
    """`SECONDS[:SLOTS[:STALL_EVERY:STALL_SECONDS]]`"""
    seconds, slots, every, stall = (*text.split(":"), "0", "0", "0")[:4]
    return Backend(float(seconds), int(slots), float(every), float(stall))


def backend(text: str) -> tuple[int, Backend]:
    port, _, rest = text.partition(":")
    return at_least(1, 65535)(port), parse(rest)


async def serve(backends: list[tuple[int, Backend]]) -> None:
    loop, servers = asyncio.get_running_loop(), []
    for port, each in backends:
        each.restart(loop.time())
        servers.append(await asyncio.start_server(partial(answer, each), "127.0.0.1", port, backlog=4096))
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("backends", metavar="PORT:SECONDS[:SLOTS[:STALL_EVERY:STALL_SECONDS]]", type=backend, nargs="+")
    backends = parser.parse_args().backends
    raise_file_limit()
    uvloop.run(serve(backends))
