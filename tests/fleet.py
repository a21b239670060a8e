"""Balancers in front of several backends, all in this process; a backend is killed without a signal."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from support import PAGE_TOKEN, Balancer, RawRequest
from wire import Script, WireBackend, hang_up

OPEN = threading.Event()
OPEN.set()
READABLE = b"Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: X-Served-By, X-Request-ID\r\n"


class DemoBackend(WireBackend):
    """Answers like `backend_server.py`, each request after `delay` seconds, and once the `gate` is open that was there
    when it came; can be killed and started again."""

    def __init__(self, backend_id: str, delay: float = 0.0) -> None:
        self.id, self.delay, self.gate = backend_id, delay, OPEN
        self._killed = threading.Event()
        super().__init__()
        self.script = self._process

    def _process(self, sock: socket.socket, request: RawRequest) -> None:
        self.gate.wait(60)
        if self._killed.wait(self.delay):
            hang_up(sock)
        body = json.dumps({"message": "ok", "server_id": self.id}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + READABLE
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        if not request.head.startswith(b"HEAD "):
            sock.sendall(body)

    def kill(self) -> None:
        """What `kill -9` does to those who talk to it: connections end, and its port refuses new ones."""
        self._killed.set()
        self.close()

    def start(self) -> None:
        self._killed.clear()
        self.listen()


@dataclass
class Demo:
    """Backends with weights 3, 2, 1, as `start_all` starts them."""

    balancer: Balancer
    backends: list[DemoBackend]

    @property
    def url(self) -> str:
        return self.balancer.url

    def stop(self) -> None:
        self.balancer.stop()
        for backend in self.backends:
            backend.kill()


def start_demo(*arguments: str) -> Demo:
    backends = [DemoBackend(f"backend_{number}") for number in (1, 2, 3)]
    flags = [f"--backend={backend.id}={backend.url}@{4 - n}" for n, backend in enumerate(backends, start=1)]
    try:
        balancer = Balancer(*flags, "--expose-backend", *arguments, env={"LB_PAGE_TOKEN": PAGE_TOKEN})
    except BaseException:
        for backend in backends:
            backend.kill()
        raise
    return Demo(balancer, backends)


class Pair:
    """Two backends behind one balancer: long time limits, no body limit, a trusted client, X-Served-By on."""

    def __init__(self) -> None:
        self.backends = {"a": WireBackend(), "b": WireBackend()}
        self.balancer = Balancer(
            *(f"--backend={name}={backend.url}" for name, backend in self.backends.items()),
            "--algorithm=round_robin",
            "--eject-after=0",  # many tests make a backend fail
            "--response-timeout=60",
            "--idle-timeout=60",
            "--max-header-bytes=131072",
            "--trusted-proxies=127.0.0.0/8",
            "--control-reads=open",
            "--expose-backend",
        )
        self.port = self.balancer.port

    def reset(self) -> None:
        for name, backend in self.backends.items():
            backend.reset()
            self.balancer.wait_healthy(name)

    def script(self, script: Script) -> None:
        for backend in self.backends.values():
            backend.script = script

    def on_head(self, handler: Callable[[socket.socket, RawRequest], bool]) -> None:
        for backend in self.backends.values():
            backend.on_head = handler

    @property
    def requests(self) -> list[RawRequest]:
        return [request for backend in self.backends.values() for request in backend.requests]

    @property
    def seen(self) -> int:
        return sum(backend.seen for backend in self.backends.values())

    def close(self) -> None:
        self.balancer.stop()
        for backend in self.backends.values():
            backend.close()
