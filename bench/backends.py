"""What stands behind the contenders: one fast backend on some ports, or slow ones of several kinds. And the meter that
reads, before and after a measurement, what everybody who took part spent."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contenders import BODY, FILES, HERE, STUB_STATUS_PATH, UPLOAD_PATH, write_nginx
from processes import Service, await_answer, free_ports, get, machine_busy_seconds, running

BACKEND_COUNT = 3


@dataclass(frozen=True)
class Backends:
    """Some ports of one process, and those of them to ask for the number of requests: one if it counts for all."""

    service: Service
    ports: list[int]
    counters: list[int]


@contextmanager
def fast_backends() -> Iterator[Backends]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory, ports = Path(name), free_ports(BACKEND_COUNT)
        with running("the fast backend", fast_backend_command(directory, ports), directory) as service:
            await_answer(service, ports[-1], "/", BODY)
            yield Backends(service, ports, ports[:1])


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


def fast_backend_command(directory: Path, ports: list[int]) -> list[str]:
    """One nginx worker that answers at once on each port, and counts what it was asked.

    An upload is answered when it has been read whole: `mirror` reads it before the static module refuses the POST.
    """
    for path, content in FILES.items():
        (directory / path.strip("/")).write_bytes(content)
    listen = " ".join(f"listen 127.0.0.1:{port} backlog=4096;" for port in ports)
    files = "\n".join(f"        location = {path} {{ }}" for path in FILES)
    body = BODY.decode().replace('"', '\\"').replace("\n", "\\n")
    return write_nginx(
        directory,
        f"""
    server {{
        {listen}
        default_type application/json;
        root {directory};
        client_max_body_size 0;
        client_body_buffer_size {max(map(len, FILES.values()))};
        location / {{ return 200 "{body}"; }}
        location = {UPLOAD_PATH} {{ mirror /sink; error_page 404 405 =200 /done; }}
        location = /sink {{ internal; return 204; }}
{files}
        location = {STUB_STATUS_PATH} {{ stub_status; }}
    }}""",
    )


@dataclass(frozen=True)
class Meter:
    """Readings that only ever rise; two of them make a measurement."""

    contender_cpu: float
    known_cpu: float  # of contender, backend, this script and its finished children: wrk
    machine_cpu: float
    backend_requests: int
    at: float  # seconds

    @classmethod
    def read(cls, service: Service | None, backends: Backends) -> Meter:
        cpu = service.cpu_seconds() if service else 0.0
        known = cpu + backends.service.cpu_seconds() + sum(os.times()[:4])
        return cls(cpu, known, machine_busy_seconds(), sum(map(count_at, backends.counters)), time.monotonic())

    def others_percent(self, before: Meter) -> float:
        """Of the machine's CPU time since then, what neither contender, backend nor generator spent."""
        others = (self.machine_cpu - before.machine_cpu) - (self.known_cpu - before.known_cpu)
        return 100 * max(0.0, others) / ((self.at - before.at) * (os.cpu_count() or 1))
