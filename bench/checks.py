"""Checks of behaviour under load: flat memory on large bodies, and many requests in flight at once."""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contenders import BODY, HERE, Contender, Place
from processes import BenchError, Service, await_answer, free_ports, get, raise_file_limit, running
from report import MIB
from slow_backend import blocks
from tables import Table

READ_SIZE = 1 << 18
TRANSFER_TIMEOUT_SECONDS = 60  # without one byte of progress
BURST_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Received:
    """What came through, as the receiving side saw it."""

    length: int
    checksum: int


@dataclass(frozen=True)
class Transfer:
    direction: str
    chunked: bool


TRANSFERS = [Transfer(direction, chunked) for direction in ("upload", "download") for chunked in (False, True)]


@contextmanager
def before_slow_backend(contender: Contender) -> Iterator[tuple[Service, Place]]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        root = Path(name)
        (root / "backend").mkdir()
        (root / contender.name).mkdir()
        port, *ports = free_ports(4)
        place = Place(port, ports, root / contender.name)
        command = [sys.executable, str(HERE / "slow_backend.py"), *map(str, ports)]
        with running("the slow backend", command, root / "backend") as backend:
            await_answer(backend, ports[-1], "/", BODY)
            with running(contender.name, contender.command(place), place.directory, contender.cpus) as service:
                await_answer(service, port, "/", BODY)
                yield service, place


def check_transfer(contender: Contender, size: int, allowed_growth: int) -> list[str]:
    """Send the bytes each way, print the growth of the resident set; returns what was wrong."""
    expected = checksum_of(size)
    rows, faults = [], []
    with before_slow_backend(contender) as (service, place):
        start_size = service.memory_bytes()
        for transfer in TRANSFERS:
            name = f"{transfer.direction}, {'chunked' if transfer.chunked else 'Content-Length'}"
            service.forget_memory_peak()
            started = time.monotonic()
            received = run_transfer(transfer, place.port, size)
            rate = size / MIB / (time.monotonic() - started)
            growth = service.memory_bytes("VmHWM") - start_size
            rows.append([name, f"{received.length / MIB:.1f}", f"{rate:.0f}", f"{growth / MIB:.1f}"])
            if received != expected:
                faults.append(f"{name}: {received.length} bytes came through of {size}, or other bytes than were sent")
            if growth > allowed_growth:
                faults.append(f"{name}: grew by {growth / MIB:.1f} MiB, allowed {allowed_growth / MIB:.1f}")
        print(f"{contender.name}: resident {start_size / MIB:.1f} MiB before the first transfer")
    print(Table(["transfer", "MiB through", "MiB/s", "peak growth MiB"], rows).text())
    return faults


def checksum_of(size: int) -> Received:
    checksum = 0
    for block in blocks(size):
        checksum = zlib.crc32(block, checksum)
    return Received(size, checksum)


def run_transfer(transfer: Transfer, port: int, size: int) -> Received:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TRANSFER_TIMEOUT_SECONDS)
    try:
        return (upload if transfer.direction == "upload" else download)(connection, transfer.chunked, size)
    except (OSError, http.client.HTTPException) as error:
        print(f"{transfer.direction}: {error!r}", file=sys.stderr)
        return Received(0, 0)
    finally:
        connection.close()


def upload(connection: http.client.HTTPConnection, chunked: bool, size: int) -> Received:
    framing = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}
    connection.request("PUT", "/upload", body=blocks(size), headers=framing, encode_chunked=chunked)
    answer = connection.getresponse()
    if answer.status != 200:
        raise http.client.HTTPException(f"status {answer.status}")
    return Received(**json.loads(answer.read()))


def download(connection: http.client.HTTPConnection, chunked: bool, size: int) -> Received:
    connection.request("GET", f"/download/{size}" + ("/chunked" if chunked else ""))
    answer = connection.getresponse()
    length, checksum = 0, 0
    while piece := answer.read(READ_SIZE):
        length, checksum = length + len(piece), zlib.crc32(piece, checksum)
    return Received(length, checksum)


def check_concurrency(contender: Contender, count: int, delay: float) -> list[str]:
    """Open the connections, send on all at once, print how many good answers came; returns what was wrong."""
    with before_slow_backend(contender) as (service, place):
        raise_file_limit()  # after the contender's start: it must manage with the limit it was given
        good, seconds = asyncio.run(burst(place.port, count, f"/delay/{delay:g}"))
        _, peak = get(place.backends[0], "/peak")
        memory = service.memory_bytes("VmHWM") / MIB
    row = [contender.name, f"{good}/{count}", f"{seconds:.2f}", str(json.loads(peak)), f"{memory:.1f}"]
    print(Table(["contender", "succeeded", "seconds", "most at a backend at once", "peak MiB"], [row]).text())
    return [] if good == count else [f"{contender.name}: {count - good} of {count} requests failed"]


async def burst(port: int, count: int, path: str) -> tuple[int, float]:
    """How many of the requests got the right answer, and how long the last one took."""
    opened = await asyncio.gather(
        *(asyncio.open_connection("127.0.0.1", port) for _ in range(count)), return_exceptions=True
    )
    connections = [pair for pair in opened if not isinstance(pair, BaseException)]
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
    started = time.monotonic()
    answers = await asyncio.gather(*(ask(request, *connection) for connection in connections))
    return sum(answers), time.monotonic() - started


async def ask(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    try:
        async with asyncio.timeout(BURST_TIMEOUT_SECONDS):
            writer.write(request)
            answer = await reader.read(-1)
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
    return answer.split(b" ", 2)[1:2] == [b"200"] and BODY.strip() in answer


def parse_size(text: str) -> int:
    """`1GiB`, `32MiB`, `4096`."""
    units = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
    number, unit = (text[:-3], units[text[-3:]]) if text[-3:] in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError:
        raise BenchError(f"not a size: {text!r} (for example 1GiB)") from None
