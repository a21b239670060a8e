"""What TLS towards clients costs here, with nginx and with Caddy: CPU time of the proxy per request, in one run.

Needs nginx, caddy, h2load and openssl; prints the medians and their ratios to Caddy's.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from backends import fast_backends
from contenders import BODY, CONTENDERS, OURS, Pair, started
from processes import TRUSTING, BenchError, medians
from script import Parser, at_least
from speed import cost, h2load

NAMES = (OURS, "nginx", "caddy")
REQUEST = b"GET /api/process HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"


def kept(*options: str) -> Callable[[int, int], object]:
    return lambda port, count: h2load("https", port, count, *options)


def connect(port: int, count: int, *, is_resumed: bool = False) -> None:
    """A new connection for each request."""
    session = None
    for number in range(count):
        with socket.create_connection(("127.0.0.1", port)) as raw, TRUSTING.wrap_socket(raw, session=session) as client:
            client.sendall(REQUEST)
            received = b"".join(iter(partial(client.recv, 65536), b""))
            if not received.endswith(BODY) or client.session_reused != (is_resumed and number > 0):
                raise BenchError(f"resumed: {client.session_reused}, answered: {received[:80]!r}")
            session = client.session if is_resumed else None


LOADS: dict[str, tuple[int, Callable[[int, int], object]]] = {
    "kept HTTP/1.1, 32 connections": (20_000, kept("--h1", "-c32")),
    "HTTP/2, 100 streams of one connection": (20_000, kept("-c1", "-m100")),
    "a new connection each, P-256": (1_500, connect),
    "a new connection each, resumed": (1_500, partial(connect, is_resumed=True)),
}


def measure(name: str, backends: list[int], pair: Pair) -> dict[str, float]:
    """CPU us per request of each load."""
    with started(CONTENDERS[name], backends, pair=pair) as (service, place):
        return {load: cost(service, count, partial(send, place.port))[1] for load, (count, send) in LOADS.items()}


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, fast_backends() as backends:
        pair = Path(folder, "cert.pem"), Path(folder, "key.pem")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", pair[1], "-out", pair[0]]
        names = ["-subj", "/CN=bench", "-addext", "subjectAltName=DNS:bench,IP:127.0.0.1"]
        subprocess.run(["openssl", "req", "-x509", *key, *names], check=True, capture_output=True)
        found = medians(rounds, NAMES, lambda name: measure(name, backends.ports, pair))
    for load in LOADS:
        us = {name: figures[load] for name, figures in found.items()}
        print(f"{load:40}", *(f"{name} {us[name]:6.0f} us ({us[name] / us['caddy']:.2f})" for name in NAMES), sep="  ")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("rounds", type=at_least(1), nargs="?", default=3, help="default 3")
    parser.start(main, "nginx", "caddy", "h2load", "openssl")
