"""A balancer in front of three backends, as the demo has them, all in this process and killed without a signal."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import dataclass

from support import PAGE_TOKEN, Balancer, RawRequest
from wire import WireBackend, hang_up

READABLE = b"Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: X-Served-By, X-Request-ID\r\n"


class DemoBackend(WireBackend):
    """Answers like `backend_server.py`, each request after `delay` seconds; can be killed and started again."""

    def __init__(self, backend_id: str, delay: float = 0.0) -> None:
        self.id, self.delay = backend_id, delay
        self._killed = threading.Event()
        super().__init__()
        self.script = self._process

    def _process(self, sock: socket.socket, request: RawRequest) -> None:
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
