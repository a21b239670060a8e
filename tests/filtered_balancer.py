"""`python filtered_balancer.py BACKEND_URL KIND`: a balancer whose filter tells what it sees, and fails if asked to.

It prints a line for each request that is done; the answer tells which thread has called a hook.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer.balancing.backends import Backend  # noqa: E402
from balancer.commandline import run  # noqa: E402
from balancer.config.settings import BackendSettings, Settings  # noqa: E402
from balancer.errors import ClientError  # noqa: E402
from balancer.forwarding.answer import Answer, whole  # noqa: E402
from balancer.forwarding.filter import Filter  # noqa: E402
from balancer.loadbalancer import LoadBalancer  # noqa: E402
from balancer.observe.record import Record  # noqa: E402
from balancer.protocol.messages import Line  # noqa: E402
from balancer.protocol.request import Request  # noqa: E402
from balancer.strategies import Strategy, strategy  # noqa: E402
from balancer.upstream.outgoing import OutgoingRequest  # noqa: E402


class Telling(Filter):
    """Every hook fails on the path /fail-HOOK."""

    def admit(self, request: Request) -> Answer | None:
        self._fail("admit", request)
        if request.path == "/error":
            raise ClientError("not this one")
        return whole(403, b"no entry", (b"content-type", b"text/plain")) if request.path == "/no-entry" else None

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        self._fail("send", request)
        sender = threading.current_thread().name.partition("-")[0].encode()
        outgoing.lines = [*outgoing.lines, (b"x-sender", sender)]

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        self._fail("answer", request)
        return [*lines, (b"x-told", f"{record.status} {record.backend} {threading.current_thread().name}".encode())]

    def done(self, request: Request, record: Record) -> None:
        print(f"done {request.version} {request.method} {request.path} {record.status}", flush=True)
        self._fail("done", request)

    def _fail(self, hook: str, request: Request) -> None:
        if request.path == f"/fail-{hook}":
            raise RuntimeError(f"{hook} fails")


class Waiting(Telling):
    waits = True


class Unused(Filter):
    """No hook, so it is never called."""


@strategy("by_header")
class ByHeader(Strategy):
    """The backend that X-Wanted names."""

    def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
        asked = (request.method, request.path, request.headers.get("X-Wanted"), request.headers["X-Forwarded-For"])
        return next(backend for backend in candidates if asked == ("GET", "/by-header", backend.id, "127.0.0.1"))


def main(url: str, kind: str) -> int:
    names = ("one", "two") if kind == "by_header" else ("one",)
    # With room for one request: a place that is not given back is noticed by the next.
    backends = tuple(BackendSettings(id=name, url=url, max_connections=1) for name in names)
    filters: dict[str, list[Filter]] = {"telling": [Telling(), Unused()], "waiting": [Unused(), Waiting()]}
    algorithm = kind if kind == "by_header" else "weighted"
    settings = Settings(port=0, backends=backends, algorithm=algorithm, queue_timeout=5, expose_backend=True)
    return run(LoadBalancer(config=settings, filters=filters.get(kind, [])))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
