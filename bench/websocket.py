"""What a round trip over a WebSocket costs this balancer, nginx and Caddy: CPU, as of /proc, in one run.

python bench/websocket.py            three rounds of 3 s for each size of message and each contender

Some connections send a message, wait for one of the same size from the backend, and go on. Frames have the same size
on both sides of a proxy, so neither end parses any: both count bytes, in one thread of this process.
"""

from __future__ import annotations

import argparse
import select
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # its other modules import each other by their plain names

from contenders import CONTENDERS, Contender, Place, nginx, started  # noqa: E402
from processes import Service  # noqa: E402

from balancer.protocol.websocket import accept_of, handshake, new_key  # noqa: E402

SIZES = (32, 65536)
CONNECTIONS = 16
PATH, BODY = "/plain", b"here\n"


def frame(size: int, *, is_masked: bool) -> bytes:
    """Binary, with a mask that changes nothing (RFC 6455 section 5.2)."""
    head = b"\x82" + (struct.pack("!B", size) if size < 126 else struct.pack("!BQ", 127, size))
    if is_masked:
        head = bytes([head[0], head[1] | 0x80]) + head[2:] + b"\0\0\0\0"
    return head + b"x" * size


class Echo:
    """A backend that sends a message for each that has come, of the size that is `expected` at the time."""

    def __init__(self) -> None:
        self.expected = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, sock.makefile("rb") as stream:
            lines = list(iter(stream.readline, b"\r\n"))
            keys = [line.split(b": ")[1].strip() for line in lines if line.lower().startswith(b"sec-websocket-key")]
            if not keys:
                sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\n" + BODY)
                return
            told = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: " + accept_of(keys[0])
            sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\n" + told + b"\r\n\r\n")
            wanted, answer = len(frame(self.expected, is_masked=True)), frame(self.expected, is_masked=False)
            with suppress(ConnectionResetError):
                while stream.read(wanted):
                    sock.sendall(answer)


@contextmanager
def connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [(b"host", b"bench.example"), *handshake(new_key())]
        sock.sendall(b"GET /ws HTTP/1.1\r\n" + b"".join(b"%s: %s\r\n" % line for line in lines) + b"\r\n")
        answer = sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 101"), answer
        yield sock


def cost(service: Service, port: int, size: int, seconds: float) -> float:
    """Microseconds of CPU that a round trip takes."""
    sent, wanted, trips = frame(size, is_masked=True), len(frame(size, is_masked=False)), 0
    with ExitStack() as stack, select.epoll() as poller:
        socks = [stack.enter_context(connection(port)) for _ in range(CONNECTIONS)]
        missing = {sock.fileno(): wanted for sock in socks}
        by_descriptor = {sock.fileno(): sock for sock in socks}
        for sock in socks:
            poller.register(sock, select.EPOLLIN)
            sock.sendall(sent)
        began, cpu = time.monotonic(), service.cpu_seconds()
        while time.monotonic() < began + seconds:
            for descriptor, _ in poller.poll():
                missing[descriptor] -= len(by_descriptor[descriptor].recv(1 << 20))
                if not missing[descriptor]:
                    trips, missing[descriptor] = trips + 1, wanted
                    by_descriptor[descriptor].sendall(sent)
        return (service.cpu_seconds() - cpu) / trips * 1e6


def nginx_command(place: Place) -> list[str]:
    return nginx(place, "nginx-websocket.conf", backend=place.backends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    contenders: list[Contender] = [
        CONTENDERS["balancer"],
        replace(CONTENDERS["nginx"], command=nginx_command),
        CONTENDERS["caddy"],
    ]
    echo, found = Echo(), dict[tuple[str, int], list[float]]()
    for _ in range(options.rounds):
        for contender in contenders:
            with started(contender, [echo.port], PATH, BODY) as (service, place):
                for size in SIZES:
                    echo.expected = size
                    measure = partial(cost, service, place.port, size)
                    measure(options.seconds / 4)
                    found.setdefault((contender.name, size), []).append(measure(options.seconds))
    print(f"{'us of CPU a round trip':24}{'':>6}{'32 B':>12}{'64 KiB':>12}{'of Caddy':>18}")
    for contender in contenders:
        medians = [statistics.median(found[contender.name, size]) for size in SIZES]
        ratios = [own / statistics.median(found["caddy", size]) for own, size in zip(medians, SIZES, strict=True)]
        print(f"{contender.name:30}{medians[0]:12.0f}{medians[1]:12.0f}{ratios[0]:10.2f}{ratios[1]:8.2f}")


if __name__ == "__main__":
    main()
