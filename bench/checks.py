"""Checks of behaviour under load: flat memory on large bodies, and many requests in flight at once."""

from __future__ import annotations

import http.client
import json
import sys
import time
import zlib
from collections.abc import Iterable

from backends import BACKEND_COUNT, slow_backends
from contenders import WAIT_PATH, Contender, started
from openloop import Aim, fire
from processes import get
from render import Table
from slow_backend import blocks
from speed import MIB

READ_SIZE = 1 << 18
TRANSFER_TIMEOUT_SECONDS = 60  # without one byte of progress
BURST_TIMEOUT_SECONDS = 60.0
Received = tuple[int, int]  # length and checksum of what came through, as the receiving side saw it


def check_transfer(contender: Contender, size: int, allowed_growth: int) -> list[str]:
    """Send the bytes each way, print the growth of the resident set; returns what was wrong."""
    expected = received(blocks(size))
    rows, faults = [], []
    with slow_backends(*["0"] * BACKEND_COUNT) as backends:
        with started(contender, backends.ports) as (service, place):
            start_size = service.memory_bytes()
            for is_upload in (True, False):
                for is_chunked in (False, True):
                    name = f"{'upload' if is_upload else 'download'}, {'chunked' if is_chunked else 'Content-Length'}"
                    service.forget_memory_peak()
                    begun = time.monotonic()
                    found = transfer(place.port, is_upload, is_chunked, size)
                    rate = size / MIB / (time.monotonic() - begun)
                    growth = service.memory_bytes("VmHWM") - start_size
                    rows.append([name, f"{found[0] / MIB:.1f}", f"{rate:.0f}", f"{growth / MIB:.1f}"])
                    if found != expected:
                        faults.append(f"{name}: {found[0]} bytes came through of {size}, or other bytes than were sent")
                    if growth > allowed_growth:
                        faults.append(f"{name}: grew by {growth / MIB:.1f} MiB, allowed {allowed_growth / MIB:.1f}")
    print(f"{contender.name}: resident {start_size / MIB:.1f} MiB before the first transfer")
    print(Table(["transfer", "MiB through", "MiB/s", "peak growth MiB"], rows).text())
    return faults


def received(pieces: Iterable[bytes]) -> Received:
    length = checksum = 0
    for piece in pieces:
        length, checksum = length + len(piece), zlib.crc32(piece, checksum)
    return length, checksum


def transfer(port: int, is_upload: bool, is_chunked: bool, size: int) -> Received:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TRANSFER_TIMEOUT_SECONDS)
    try:
        if is_upload:
            framing = {"Transfer-Encoding": "chunked"} if is_chunked else {"Content-Length": str(size)}
            connection.request("PUT", "/upload", body=blocks(size), headers=framing, encode_chunked=is_chunked)
        else:
            connection.request("GET", f"/download/{size}" + ("/chunked" if is_chunked else ""))
        answer = connection.getresponse()
        if answer.status != 200:
            raise http.client.HTTPException(f"status {answer.status}")
        length, checksum = (
            json.loads(answer.read()) if is_upload else received(iter(lambda: answer.read(READ_SIZE), b""))
        )
        return length, checksum
    except (OSError, http.client.HTTPException) as error:
        print(f"bench: {error!r}", file=sys.stderr)
        return 0, 0
    finally:
        connection.close()


def check_concurrency(contender: Contender, count: int, delay: float) -> list[str]:
    """Send all at once, each on a connection of its own; returns what was wrong."""
    with slow_backends(*[f"{delay:g}"] * BACKEND_COUNT) as backends:
        with started(contender, backends.ports) as (service, place):
            (shots,) = fire([Aim(place.port, WAIT_PATH, [0.0] * count)], BURST_TIMEOUT_SECONDS, most=count)
            peaks = [get(port, "/peak")[1].decode() for port in backends.ports]
            memory = service.memory_bytes("VmHWM") / MIB
    good, last = sum(shot.is_good for shot in shots), max(shot.latency for shot in shots)
    row = [contender.name, f"{good}/{count}", f"{last:.2f}", "+".join(peaks), f"{memory:.1f}"]
    print(Table(["contender", "succeeded", "seconds", "most at the backends at once", "peak MiB"], [row]).text())
    return [] if good == count else [f"{contender.name}: {count - good} of {count} requests failed"]
