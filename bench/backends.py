"""What stands behind the contenders: one fast backend on some ports, or slow ones of several kinds. And the meter that
reads, before and after a measurement, what everybody who took part spent."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from contenders import BODY, FILES, HERE, STUB_STATUS_PATH, Place, nginx
from processes import TICK_SECONDS, Service, await_answer, free_ports, get, running

BACKEND_COUNT = 3


@dataclass(frozen=True)
class Backends:
    """Some ports of one process, and those of them to ask for the number of requests: one if it counts for all."""

    service: Service
    ports: list[int]
    counters: list[int]


@contextmanager
def fast_backends() -> Iterator[Backends]:
    """One nginx worker."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Place(0, free_ports(BACKEND_COUNT), Path(name))
        for path, content in FILES.items():
            (place.directory / path.strip("/")).write_bytes(content)
        listen, body = place.listed("listen 127.0.0.1:{1} backlog=4096; "), BODY.decode().replace("\n", "\\n")
        command = nginx(place, "nginx-backend.conf", listen=listen, body=body, root=place.directory)
        with running("the fast backend", command, place.directory) as service:
            await_answer(service, place.backends[-1], "/", BODY)
            yield Backends(service, place.backends, place.backends[:1])


@contextmanager
def slow_backends(*specifications: str) -> Iterator[Backends]:
    """One backend per specification (see slow_backend.py), without the port."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        ports = free_ports(len(specifications))
        arguments = [f"{port}:{text}" for port, text in zip(ports, specifications, strict=True)]
        command = [sys.executable, str(HERE / "slow_backend.py"), *arguments]
        with running("the slow backend", command, Path(name)) as service:
            await_answer(service, ports[-1], "/", BODY)
            yield Backends(service, ports, ports)


def count_at(port: int) -> int:
    """Requests so far, in the words of nginx's stub_status; health checks count only there."""
    return int(get(port, STUB_STATUS_PATH)[1].splitlines()[2].split()[2])


class Spent(NamedTuple):
    """By contender, in requests at its backends, and by others: in percent of the machine's CPU time, what neither
    contender, backend nor generator spent."""

    cpu_seconds: float
    requests: int
    others_percent: float


def meter(service: Service, backends: Backends) -> Callable[[], Spent]:
    """It reads now; called, it says what was spent since."""

    def read() -> tuple[float, float, float, float]:
        cpu = service.cpu_seconds()
        known = cpu + backends.service.cpu_seconds() + sum(os.times()[:4])  # ours, and finished children: wrk
        # Of the whole machine on anything: user, nice, system, irq, softirq, and what its host stole (proc(5)).
        fields = Path("/proc/stat").read_text().split()
        machine = sum(int(fields[index]) for index in (1, 2, 3, 6, 7, 8)) * TICK_SECONDS
        return cpu, sum(map(count_at, backends.counters)), machine - known, time.monotonic()

    before = read()

    def spent() -> Spent:
        cpu, requests, others, seconds = (now - then for now, then in zip(read(), before, strict=True))
        return Spent(cpu, int(requests), 100 * max(0.0, others) / (seconds * (os.cpu_count() or 1)))

    return spent
