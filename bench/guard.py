"""What one proxied request costs in counts that no busy machine changes, compared with a committed budget.

Prints the counts; exit 1 if one is more than 10 % above bench/budget.json.

A request goes the whole way from `Bridge.accept` through the parts as `create_app` wires them to a real backend on a
loopback socket and back, in one thread and without Granian, which is not ours to count. Counted are bytecode
instructions, calls of Python and of C functions, those of them that go to a socket, and the bytes allocated at the
highest point. Python versions compile differently, so each has a budget of its own.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import socket
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from backends import slow_backends
from contenders import BODY
from script import Parser

from balancer.balancing.backends import LastCheck
from balancer.config.settings import Settings
from balancer.config.values import BackendSettings
from balancer.edge.bridge import Bridge
from balancer.edge.express import Express
from balancer.edge.listener import ClientLimits
from balancer.loadbalancer import create_app

BUDGET = Path(__file__).with_name("budget.json")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
ALLOWED_GROWTH = 0.10
WARMUP_REQUESTS = 200  # the newest requests are full then and the sample of this second is taken, buckets are there
# A second that turns over, or a collection that wants to run, adds to one request; the least of some has neither.
MEASURED_REQUESTS = 10
MOST_POLLS = 200  # of 50 ms each; one is enough unless the machine is busy
_serial = itertools.count()


@dataclass(frozen=True)
class Cost:
    """Of one request."""

    instructions: int
    python_calls: int
    c_calls: int
    socket_calls: int
    peak_bytes: int


@dataclass(frozen=True)
class Kind:
    """A request as a client may send it."""

    method: str = "GET"
    body: bytes = b""
    more_headers: int = 0
    is_varied: bool = False  # no two requests have the same header section
    path: str = "/api/process"
    answer: bytes | None = BODY  # None: whatever comes

    def scope(self) -> dict[str, Any]:
        """As Granian gives it."""
        headers = [(b"host", b"bench.example"), (b"user-agent", b"bench/1"), (b"accept", b"*/*")]
        headers += [(b"x-bench-%d" % number, b"v" * 24) for number in range(self.more_headers)]
        if self.is_varied:
            headers.append((b"cookie", b"id=%d" % next(_serial)))
        if self.body:
            headers.append((b"content-length", b"%d" % len(self.body)))
        return {
            "type": "http",
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"id=1",
            "headers": headers,
            "client": ("127.0.0.1", 40000),
            "server": ("127.0.0.1", 9000),
        }


KINDS = {
    "get": Kind(),
    "headers": Kind(more_headers=20),
    "varied": Kind(more_headers=8, is_varied=True),
    "post": Kind("POST", b"x" * 1024),
}


# In place of Granian: what `Bridge` uses of it, answering at once.


class Finished:
    """An awaitable that was done when it was made."""

    def __init__(self, value: Any = None) -> None:
        self._value = value

    def __iter__(self) -> Finished:
        return self

    def __next__(self) -> Any:
        raise StopIteration(self._value)


class Client:
    """One request's protocol and watcher in one."""

    def __init__(self, kind: Kind) -> None:
        self.scope = kind.scope()
        self.proto = self
        self.status: int | None = None
        self.received = b""
        self._message = {"type": "http.request", "body": kind.body, "more_body": False}

    def receive(self) -> Finished:
        return Finished(self._message)

    def send(self, message: dict[str, Any]) -> Finished:
        self.status = message.get("status", self.status)
        self.received += message.get("body", b"")
        return Finished()

    def done(self) -> None:
        pass


class SameThread:
    """A worker pool without threads."""

    queued = 0

    def submit(self, call: Any, is_control: bool, *, is_under_way: bool = False) -> bool:
        call.run()
        return True

    def withdraw(self, call: Any) -> bool:
        return False


# Counting.


def measure_all(
    kinds: Iterable[str] = KINDS, wrap: Callable[[Bridge], None] = lambda bridge: None, **changes: Any
) -> dict[str, Cost]:
    """Counts by kind of request, with `changes` of the settings. `wrap` may change the bridge first."""
    with slow_backends("0") as backends, balancer(backends.ports[0], **changes) as bridge:
        wrap(bridge)
        return {name: measure(bridge, KINDS[name]) for name in kinds}


def serve(bridge: Bridge, kind: Kind) -> None:
    """One request, from its client and back."""
    client = Client(kind)
    bridge.accept(client)
    if bridge.express is not None:
        for _ in range(MOST_POLLS):
            if client.status is not None:
                break
            bridge.express.run_once()
    if client.status != 200 or kind.answer not in (None, client.received):
        raise RuntimeError(f"the request failed: {client.status} {client.received[:200]!r}")


def measure(bridge: Bridge, kind: Kind) -> Cost:
    one = partial(serve, bridge, kind)

    for _ in range(WARMUP_REQUESTS):
        one()
    count_instructions(one)  # Python 3.12 counts none the first time
    gc.collect()
    gc.disable()
    try:
        samples = [Cost(count_instructions(one), *count_calls(one), count_bytes(one)) for _ in range(MEASURED_REQUESTS)]
    finally:
        gc.enable()
    return Cost(**{field.name: min(getattr(sample, field.name) for sample in samples) for field in fields(Cost)})


def count_instructions(one: Callable[[], None]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        one()
    finally:
        sys.settrace(before)
    return count


def count_calls(one: Callable[[], None]) -> tuple[int, int, int]:
    """Calls of Python functions, of C functions, and those of the latter that a socket got."""
    python = c = to_socket = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal python, c, to_socket
        if event == "call":
            python += 1
        elif event == "c_call":
            c += 1
            to_socket += isinstance(getattr(argument, "__self__", None), socket.socket)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        one()
    finally:
        sys.setprofile(before)
    return python, c, to_socket


def count_bytes(one: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        one()
        return tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def balancer(port: int, **changes: Any) -> Iterator[Bridge]:
    """The app with default settings but for `min_body_rate` and `changes`; one backend, which is up; no health checks,
    no threads."""
    backend = BackendSettings(id="only", url=f"http://127.0.0.1:{port}")
    settings = Settings(backends=(backend,), min_body_rate=0, **changes)
    app = create_app(settings)
    parts = app.extensions["balancer"]
    for each in parts.control.pool.backends():
        parts.control.pool.record_check(each, LastCheck(0.0, 0.0, 200, None))
    workers: Any = SameThread()
    express = Express(workers)
    limits = settings.options(ClientLimits)
    try:
        yield Bridge(
            app.wsgi_app, workers, limits, is_control=parts.proxy.is_control, proxy=parts.proxy, express=express
        )
    finally:
        express.stop()
        parts.pools.close()


# The budget.


def read_budget() -> dict[str, dict[str, dict[str, int]]]:
    """Per Python version and kind of request."""
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else {}


def exceeded(budget: dict[str, dict[str, int]], measured: dict[str, Cost]) -> list[str]:
    """What grew by more than is allowed, in words; also what has no budget."""
    faults = []
    for kind, cost in measured.items():
        for name, count in asdict(cost).items():
            allowed = budget.get(kind, {}).get(name)
            if allowed is None:
                faults.append(f"{kind}: no budget for {name}; python bench/guard.py --renew")
            elif count > allowed * (1 + ALLOWED_GROWTH):
                growth = (count / allowed - 1) * 100
                faults.append(f"{kind}: {count} {name}, {growth:.0f} % above the {allowed} of the budget")
    return faults


def renew(measured: dict[str, Cost]) -> None:
    budget = read_budget() | {VERSION: {kind: asdict(cost) for kind, cost in measured.items()}}
    BUDGET.write_text(json.dumps(dict(sorted(budget.items())), indent=1) + "\n")
    print(f"written: {BUDGET}")


def main(is_renewed: bool = False) -> int:
    measured = measure_all()
    budget = read_budget().get(VERSION, {})
    for kind, cost in measured.items():
        counts = (
            f"{count} {name} (budget {budget.get(kind, {}).get(name, '-')})" for name, count in asdict(cost).items()
        )
        print(f"{kind}: {', '.join(counts)}")
    if is_renewed:
        renew(measured)
        return 0
    faults = exceeded(budget, measured)
    for fault in faults:
        print(f"guard: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument(
        "--renew", dest="is_renewed", action="store_true", help="they are the budget of this Python version now"
    )
    parser.start(main)
