"""Many requests at once: exact counts, bounded threads and files, the queue, and stopping in the midst of it all."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import pytest
from support import (
    Balancer,
    BalancerProcess,
    Served,
    Start,
    StartProcess,
    connect,
    exchange,
    fetch,
    fetch_json,
    get,
    wait_until,
)
from wire import LARGE, large

REQUEST = b"GET %s HTTP/1.1\r\nHost: test\r\n\r\n"
DRAINING = ("--drain-timeout=600",)  # no end comes by itself that should have another reason
CLOSING = b"%s HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"


class AsyncBackend:
    """Answers after `/SECONDS` of its path, thousands at a time, from one thread. Health checks are answered at once.

    `active` is how many requests it is working on, `most` the highest that was.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.active = self.most = self.served = 0
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._working: set[asyncio.Timeout] = set()
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name=f"async-backend-{name}")
        self._thread.start()
        self.url = f"http://127.0.0.1:{started.result(60)}"

    def _run(self, started: Future[int]) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=4096)
            started.set_result(server.sockets[0].getsockname()[1])
            self._stopped = asyncio.Event()
            await self._stopped.wait()
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._loop.run_until_complete(serve())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(60)

    def finish(self) -> None:
        """Answer what it is working on."""

        def now() -> None:
            for limit in self._working:
                limit.reschedule(self._loop.time())

        self._loop.call_soon_threadsafe(now)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
                while True:
                    await self._one(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1]
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line[15:]))
        if path != b"/health":
            await self._work(reader, float(path.strip(b"/").partition(b"?")[0] or 0))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(self.name), self.name.encode()))
        await writer.drain()

    async def _work(self, reader: asyncio.StreamReader, seconds: float) -> None:
        """Sleep; stop at once if the balancer closes the connection, which is how it says that nobody waits."""
        self.active += 1
        self.most = max(self.most, self.active)
        limit = asyncio.timeout(seconds)
        self._working.add(limit)
        try:
            with suppress(TimeoutError):
                async with limit:
                    if not await reader.read(1):
                        raise asyncio.IncompleteReadError(b"", 1)
            self.served += 1
        finally:
            self._working.discard(limit)
            self.active -= 1


@pytest.fixture
def backends() -> Iterator[list[AsyncBackend]]:
    made = [AsyncBackend(name) for name in ("a", "b", "c")]
    yield made
    for backend in made:
        backend.close()


Backends = list[AsyncBackend]
Kind = TypeVar("Kind", Balancer, BalancerProcess)


def starter(kind: Callable[..., Kind], backends: Backends) -> Iterator[Callable[..., Kind]]:
    """Starts balancers in front of `backends`; patient health checks, for they are not what is tested here."""
    with ExitStack() as started:

        def begin(*arguments: str, count: int = 3) -> Kind:
            flags = [f"--backend={backend.name}={backend.url}" for backend in backends[:count]]
            balancer = kind(*flags, "--health-timeout=5", "--expose-backend", *DRAINING, *arguments)
            started.callback(balancer.stop)
            return balancer

        yield begin


@pytest.fixture
def start(backends: Backends) -> Iterator[Start]:
    yield from starter(Balancer, backends)


@pytest.fixture
def start_process(backends: Backends) -> Iterator[StartProcess]:
    """For what is about signals, threads and files, of which a thousand clients need many."""
    yield from starter(BalancerProcess, backends)


# Raw asyncio clients: a thousand of them cost less than the balancer's share of the machine.


async def ask(port: int, target: str, method: str = "GET", body: bytes = b"") -> tuple[int, str]:
    """(status, who served); status 0 if the connection broke before a whole head was here."""
    with suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = CLOSING % f"{method} {target}".encode()
            writer.write(head + (b"Content-Length: %d\r\n" % len(body) if body else b"") + b"\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.read()
            lines = answer.decode("latin-1").split("\r\n")
            served = [line[13:].strip() for line in lines if line.lower().startswith("x-served-by:")]
            return int(lines[0].split(" ")[1]), (served or [""])[0]
        finally:
            writer.close()
    return 0, ""


async def leave(port: int, target: str, rng: random.Random) -> None:
    """Send a request, or a part of one, and go before the answer."""
    with suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        data = REQUEST % target.encode()
        if rng.random() < 0.5:
            data = b"POST " + data[4:-2] + b"Content-Length: 100000\r\n\r\n" + b"x" * rng.randrange(90000)
        writer.write(data)
        await asyncio.sleep(rng.random() * 0.05)
        writer.transport.abort() if rng.random() < 0.5 else writer.close()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def statistics(balancer: Served) -> dict[str, Any]:
    found: dict[str, Any] = balancer.status()["statistics"]
    return found


def wait_idle(balancer: Served) -> dict[str, Any]:
    """The status once nothing is in flight any more."""
    wait_until(lambda: statistics(balancer)["active_requests"] == 0, "no request is in flight")
    found: dict[str, Any] = balancer.status(100)
    return found


def assert_sums(status: dict[str, Any]) -> None:
    """The books balance, and nobody holds a place."""
    whole, servers = status["statistics"], status["backend_servers"]
    assert whole["total_requests"] == whole["successful_requests"] + whole["failed_requests"]
    assert whole["total_requests"] == sum(whole["codes"].values()) + whole["aborted_requests"]
    assert whole["active_requests"] == whole["queued_requests"] == 0
    assert whole["unassigned_requests"] >= 0
    assert sum(server["total_requests"] for server in servers) + whole["unassigned_requests"] == whole["total_requests"]
    for server in servers:
        assert server["total_requests"] == server["successful_requests"] + server["failed_requests"]
        assert server["active_connections"] == 0


def threads_of(balancer: BalancerProcess) -> int:
    return len(os.listdir(f"/proc/{balancer.pid}/task"))


def files_of(balancer: BalancerProcess) -> int:
    return len(os.listdir(f"/proc/{balancer.pid}/fd"))


# A thousand at once.


def test_a_thousand_requests_in_flight_at_once_all_succeed(backends: Backends, start_process: StartProcess) -> None:
    """Each waits until all of them are at a backend."""
    balancer = start_process()

    async def all_of_them() -> list[tuple[int, str]]:
        waiting = asyncio.gather(*(ask(balancer.port, "/600") for _ in range(1000)))
        await asyncio.to_thread(wait_until, lambda: sum(backend.active for backend in backends) == 1000)
        for backend in backends:
            backend.finish()
        return await waiting

    answers = run(all_of_them())
    assert Counter(status for status, _ in answers) == {200: 1000}
    status = wait_idle(balancer)
    assert_sums(status)
    assert status["statistics"]["successful_requests"] == 1000
    assert status["statistics"]["unassigned_requests"] == 0
    counted = {server["id"]: server["total_requests"] for server in status["backend_servers"]}
    assert counted == Counter(served for _, served in answers)


def test_more_requests_than_threads_wait_their_turn(backends: Backends, start_process: StartProcess) -> None:
    balancer = start_process("--max-threads=20", "--max-queued=1000")

    async def all_of_them() -> list[tuple[int, str]]:
        return await asyncio.gather(*(ask(balancer.port, "/0.05", "PUT", LARGE) for _ in range(300)))

    assert Counter(status for status, _ in run(all_of_them())) == {200: 300}
    assert_sums(wait_idle(balancer))
    assert sum(backend.most for backend in backends) <= 3 * 20


# Everything together.


async def storm(balancer: BalancerProcess, extra: str, seconds: float) -> tuple[Counter[int], Counter[str], int]:
    """Mixed traffic while the operator changes things: (statuses, who served, requests that were left)."""
    rng = random.Random(7)
    statuses: Counter[int] = Counter()
    served: Counter[str] = Counter()
    left = 0
    end = time.monotonic() + seconds

    async def asking(method: str) -> None:
        while time.monotonic() < end:
            body = b"x" * rng.randrange(1, 100_000) if method != "GET" else b""
            status, who = await ask(balancer.port, f"/{rng.random() * 0.05:.3f}", method, body)
            statuses[status] += 1
            served[who] += 1

    async def leaving() -> None:
        nonlocal left
        while time.monotonic() < end:
            left += 1
            await leave(balancer.port, "/0.2", rng)

    async def operating(*steps: tuple[str, Any, str]) -> None:
        loop = asyncio.get_running_loop()
        while time.monotonic() < end:
            for path, body, method in steps:
                code = (await loop.run_in_executor(None, fetch, balancer.url + path, body, method))[0]
                assert code < 500, path
                await asyncio.sleep(0.02)

    algorithms = ("round_robin", "weighted", "least_connections", "power_of_two", "least_response_time", "peak_ewma")
    await asyncio.gather(
        *(asking(method) for method in ("GET", "POST", "PUT", "DELETE") for _ in range(6)),
        *(leaving() for _ in range(6)),
        operating(*(("/algorithm", {"algorithm": name}, "POST") for name in algorithms)),
        operating(("/backends", {"id": "extra", "url": extra}, "POST"), ("/backends/extra", None, "DELETE")),
        operating(("/backends/a", {"weight": 0}, "PATCH"), ("/backends/a", {"weight": 3}, "PATCH")),
        operating(*(("/backends/b", {"admin_state": s}, "PATCH") for s in ("drain", "ready", "maint", "ready"))),
        operating(("/status?recent=100", None, "GET"), ("/events", None, "GET"), ("/backends", None, "GET")),
    )
    return statuses, served, left


def test_after_a_storm_the_books_balance_and_nothing_is_left_over(
    backends: Backends, start_process: StartProcess
) -> None:
    balancer = start_process("--max-threads=64", "--thread-idle-timeout=1", "--pool-idle-timeout=1")
    assert fetch(f"{balancer.url}/0")[0] == 200
    threads, files = threads_of(balancer), files_of(balancer)
    most_threads: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            most_threads.append(threads_of(balancer))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        statuses, served, left = run(storm(balancer, backends[0].url, 2))
    finally:
        ended.set()
        watcher.join()
    status = wait_idle(balancer)
    assert_sums(status)
    assert set(statuses) == {200}, statuses
    whole = status["statistics"]
    assert 1 + statuses[200] <= whole["total_requests"] <= 1 + statuses[200] + left
    assert whole["successful_requests"] >= 1 + statuses[200]
    assert 0 < whole["aborted_requests"] <= whole["failed_requests"] <= left
    for server in status["backend_servers"]:
        assert server["total_requests"] >= served[server["id"]]
    assert [entry for entry in status["recent_requests"] if entry["status"] == 500] == []
    assert "Traceback" not in balancer.output

    assert max(most_threads) <= threads + 64 + 8 + 64  # workers, those kept for control, probes
    wait_until(lambda: threads_of(balancer) <= threads + 8, f"threads end, there were {threads}")
    wait_until(lambda: files_of(balancer) <= files + 4, f"files are closed, there were {files}")
    assert sum(backend.active for backend in backends) == 0


# The queue: two threads, two places to wait.


class Held:
    """Requests sent one after another, each on a connection of its own, whose answers are read at the end."""

    def __init__(self, balancer: Served) -> None:
        self.balancer = balancer
        self.sockets: list[socket.socket] = []

    def send(self, data: bytes, in_flight: int) -> socket.socket:
        """Send, and wait until the balancer has taken it in."""
        sock = socket.create_connection(("127.0.0.1", self.balancer.port), timeout=60)
        self.sockets.append(sock)
        sock.sendall(data)
        wait_until(lambda: self.in_flight() == in_flight, what=f"{in_flight} requests in flight")
        return sock

    def in_flight(self) -> int:
        return int(statistics(self.balancer)["active_requests"])  # those in the queue among them

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def narrow(start: Start) -> Balancer:
    return start("--max-threads=2", "--max-queued=2", count=1)


def test_when_threads_and_queue_are_full_the_rest_is_told_to_come_again(backends: Backends, narrow: Balancer) -> None:
    with ThreadPoolExecutor(10) as threads:
        first = [threads.submit(exchange, narrow.port, large(b"/600")) for _ in range(2)]
        wait_until(lambda: backends[0].active == 2)
        waiting = [threads.submit(exchange, narrow.port, large(b"/0")) for _ in range(2)]
        wait_until(lambda: statistics(narrow)["queued_requests"] == 2)
        for method, body in (("GET", None), ("POST", b"{}")):
            status, headers, data = fetch(f"{narrow.url}/0", body, method)
            assert (status, statistics(narrow)["queued_requests"]) == (503, 2), "told at once: none has moved up"
            assert int(headers["retry-after"]) >= 1
            assert json.loads(data)["error"] and headers["x-request-id"]
        unread = b"POST /0 HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\n"  # whose body never comes
        refused = exchange(narrow.port, unread)  # read to the end of the connection
        assert refused.startswith(b"HTTP/1.1 503 ") and b"\r\nconnection: close\r\n" in refused.lower()
        backends[0].finish()
        answers = [result.result() for result in (*first, *waiting)]
    assert [answer.split(b" ", 2)[1] for answer in answers] == [b"200"] * 4
    status = wait_idle(narrow)
    assert_sums(status)
    assert status["statistics"]["unassigned_requests"] == status["statistics"]["failed_requests"] == 3


def test_a_request_that_waited_too_long_for_a_thread_is_not_sent(backends: Backends, start: Start) -> None:
    """Nor is a backend blamed for it."""
    balancer = start("--max-threads=1", "--max-queued=10", "--request-timeout=1", count=1)
    with (
        ThreadPoolExecutor(4) as threads,
        socket.create_connection(("127.0.0.1", balancer.port)) as slow,  # holds the thread, and sends no body
    ):
        slow.sendall(b"POST /0 HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\n")
        wait_until(lambda: statistics(balancer)["active_requests"] == 1)
        post = get(b"/0", b"Content-Length: 1", method=b"POST") + b"x"
        began = time.monotonic()
        waiting = [threads.submit(exchange, balancer.port, data) for data in (get(b"/0"), post, get(b"/0"), post)]
        wait_until(lambda: statistics(balancer)["queued_requests"] == 4)
        wait_until(lambda: time.monotonic() > began + 1.5)  # request_timeout is over
        slow.close()
        assert [answer.result()[:12] for answer in waiting] == [b"HTTP/1.1 503"] * 4
    status = wait_idle(balancer)
    assert backends[0].served == 0
    (server,) = status["backend_servers"]
    assert (server["ejection"]["consecutive_failures"], server["total_requests"]) == (0, 1)  # the upload
    assert_sums(status)


def test_a_client_that_leaves_the_queue_frees_its_place(backends: Backends, narrow: Balancer) -> None:
    with Held(narrow) as held:
        busy = [held.send(large(b"/8"), 1), held.send(large(b"/8"), 2)]
        queued = [held.send(get(b"/8"), 3), held.send(get(b"/8"), 4)]
        assert fetch(f"{narrow.url}/0")[0] == 503
        queued[0].close()
        wait_until(lambda: statistics(narrow)["queued_requests"] == 1, what="the place is free")
        queued[1].close()
        wait_until(lambda: statistics(narrow)["queued_requests"] == 0, what="the place is free")
        assert backends[0].served == 0
        for sock in busy:
            sock.close()
        wait_until(lambda: backends[0].active == 0)
        assert fetch(f"{narrow.url}/0")[0] == 200
    status = wait_idle(narrow)
    assert_sums(status)
    assert status["statistics"]["aborted_requests"] == 4
    assert backends[0].served == 1


# Stopping.


def test_a_client_that_has_not_asked_anything_yet_does_not_hold_up_the_end(start_process: StartProcess) -> None:
    """Browsers open connections in advance, and nothing is in flight on them."""
    balancer = start_process()
    with connect(balancer.port), connect(balancer.port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHo")
        assert fetch(f"{balancer.url}/health")[0] == 200  # accepted after the other one
        balancer.send(signal.SIGTERM)
        assert balancer.wait() == 0
    assert "Traceback" not in balancer.output


def test_sigint_is_quick_and_quiet(backends: Backends, start_process: StartProcess) -> None:
    balancer = start_process()
    with ExitStack() as clients:
        for _ in range(500):
            clients.enter_context(connect(balancer.port)).sendall(REQUEST % b"/600")
        wait_until(lambda: sum(backend.active for backend in backends) == 500)
        balancer.send(signal.SIGINT)
        assert balancer.wait() == 130
    assert "Traceback" not in balancer.output and "KeyboardInterrupt" not in balancer.output


def test_the_line_that_says_it_listens_is_true() -> None:
    """A script that waits for the line and then connects must not be refused."""
    with BalancerProcess("--backend=none=http://127.0.0.1:9", wait_ready=False) as balancer:
        assert fetch_json(f"{balancer.url}/health")["status"] == "healthy"
