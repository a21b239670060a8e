"""What TLS towards clients costs here, with nginx and with Caddy: CPU time of the proxy per request, in one run.

python bench/tls.py [ROUNDS]     needs nginx, caddy, h2load and openssl; prints the medians and their ratios to Caddy's
"""

from __future__ import annotations

import re
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from backends import fast_backends
from contenders import BODY, CONTENDERS, OURS, Place
from processes import START_TIMEOUT_SECONDS, BenchError, free_ports, running, wait_until
from speed import settle

NAMES = (OURS, "nginx", "caddy")
PATH = "/api/process"
REQUEST = f"GET {PATH} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode()


def h2load(port: int, count: int, *options: str) -> None:
    command = ["h2load", "-n", str(count), *options, f"https://127.0.0.1:{port}{PATH}"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    if not re.search(rf"status codes: {count} 2xx", said):
        raise BenchError(f"h2load: {said[-300:]}")


def connect(port: int, count: int, is_resumed: bool = False) -> None:
    """A new connection for each request."""
    context, session = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), None
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for number in range(count):
        with socket.create_connection(("127.0.0.1", port)) as raw, context.wrap_socket(raw, session=session) as client:
            client.sendall(REQUEST)
            received = b"".join(iter(lambda client=client: client.recv(65536), b""))  # type: ignore[misc]
            if not received.endswith(BODY) or client.session_reused != (is_resumed and number > 0):
                raise BenchError(f"resumed: {client.session_reused}, answered: {received[:80]!r}")
            session = client.session if is_resumed else None


LOADS: dict[str, tuple[int, Callable[[int, int], None]]] = {
    "kept HTTP/1.1, 32 connections": (20_000, lambda port, count: h2load(port, count, "--h1", "-c32")),
    "HTTP/2, 100 streams of one connection": (20_000, lambda port, count: h2load(port, count, "-c1", "-m100")),
    "a new connection each, P-256": (1_500, connect),
    "a new connection each, resumed": (1_500, lambda port, count: connect(port, count, is_resumed=True)),
}


def measure(name: str, backends: list[int], pair: tuple[Path, Path]) -> dict[str, float]:
    """CPU us per request of each load."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Place(free_ports(1)[0], backends, Path(folder), pair=pair)
        with running(name, CONTENDERS[name].command(place), place.directory, CONTENDERS[name].cpus) as service:

            def answers() -> bool:
                with suppress(OSError, BenchError):
                    connect(place.port, 1)
                    return True
                return False

            if not wait_until(answers, START_TIMEOUT_SECONDS):
                raise BenchError(f"{name} does not answer: {service.last_words()}")
            for load, (count, send) in LOADS.items():
                send(place.port, count // 10)
                settle(service)
                before = service.cpu_seconds()
                send(place.port, count)
                settle(service)
                found[load] = (service.cpu_seconds() - before) * 1e6 / count
    return found


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, fast_backends() as backends:
        pair = Path(folder, "cert.pem"), Path(folder, "key.pem")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", pair[1], "-out", pair[0]]
        names = ["-subj", "/CN=bench", "-addext", "subjectAltName=DNS:bench,IP:127.0.0.1"]
        subprocess.run(["openssl", "req", "-x509", *key, *names], check=True, capture_output=True)
        found = {name: [] for name in NAMES}  # type: dict[str, list[dict[str, float]]]
        for _ in range(rounds):
            for name in NAMES:
                found[name].append(measure(name, backends.ports, pair))
    for load in LOADS:
        us = {name: statistics.median(one[load] for one in found[name]) for name in NAMES}
        print(f"{load:40}", *(f"{name} {us[name]:6.0f} us ({us[name] / us['caddy']:.2f})" for name in NAMES), sep="  ")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
