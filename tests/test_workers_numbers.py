"""What several worker processes count and share holds for all of them together."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from support import BalancerProcess, RawRequest, connect, fetch, fetch_json, ok, wait_until
from wire import WireBackend, read_response, request

NAMES = ("a", "b", "c")
WORKERS = 2


class Gated(WireBackend):
    """Answers once the gate is open; `most` were there at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.inside, self.most, self.lock = 0, 0, threading.Lock()
        super().__init__()
        self.script = self._process

    def _process(self, sock: socket.socket, request: RawRequest) -> None:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.gate.wait(60)
        with self.lock:
            self.inside -= 1
        sock.sendall(ok())


class Whole:
    """The balancer and its backends."""

    def __init__(self, stack: ExitStack) -> None:
        self.backends = {name: stack.enter_context(Gated()) for name in NAMES}
        backends = [f"--backend={name}={each.url}" for name, each in self.backends.items()]
        flags = (
            f"--workers={WORKERS}",
            "--access-log=false",
            "--log-level=warning",
            "--health-interval=1",
            "--queue-timeout=60",
        )
        self.process = stack.enter_context(BalancerProcess(*flags, *backends))
        self.url = self.process.url
        self.port = int(self.url.rpartition(":")[2])
        wait_until(self.is_running, "all workers run")

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = fetch_json(f"{self.url}/cluster")["workers"]
        return found

    def is_running(self) -> bool:
        with suppress(OSError):
            return [each["state"] for each in self.workers()] == ["running"] * WORKERS
        return False

    def use(self, algorithm: str, weights: Sequence[int] = (1, 1, 1), limit: int | None = None) -> None:
        assert fetch(f"{self.url}/algorithm", {"algorithm": algorithm})[0] == 200
        for name, weight in zip(NAMES, weights, strict=True):
            wanted = {"weight": weight, "max_connections": limit}
            assert fetch(f"{self.url}/backends/{name}", wanted, "PATCH")[0] == 200

    def status(self) -> Any:
        return fetch_json(f"{self.url}/status?recent=100")

    def in_flight(self) -> list[int]:
        return [each["active_connections"] for each in self.status()["backend_servers"]]


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    with ExitStack() as stack:
        yield Whole(stack)


@pytest.fixture(autouse=True)
def fresh(whole: Whole) -> Iterator[None]:
    for each in whole.backends.values():
        each.most = 0
    whole.use("round_robin")
    assert fetch(f"{whole.url}/reset", {})[0] == 200
    yield
    for each in whole.backends.values():
        each.gate.set()
    wait_until(lambda: whole.status()["statistics"]["active_requests"] == 0, "no request is in flight")


def send(port: int, count: int) -> list[int]:
    """Requests one after another on one connection."""
    with connect(port) as client, client.makefile("rb") as stream:
        statuses = []
        for _ in range(count):
            client.sendall(request())
            statuses.append(read_response(stream)[0])
        return statuses


def send_all(whole: Whole, connections: int, each: int) -> list[int]:
    """At once on so many connections, which the workers share."""
    with ThreadPoolExecutor(connections) as threads:
        found = [*threads.map(lambda _: send(whole.port, each), range(connections))]
    return [status for statuses in found for status in statuses]


@pytest.mark.parametrize(("algorithm", "weights"), [("round_robin", (1, 1, 1)), ("weighted", (5, 3, 2))])
def test_shares_are_exact_over_all(whole: Whole, algorithm: str, weights: tuple[int, ...]) -> None:
    whole.use(algorithm, weights)
    assert Counter(send_all(whole, 20, 50)) == {200: 1000}
    backends = whole.status()["backend_servers"]
    for backend, weight in zip(backends, weights, strict=True):
        assert backend["total_requests"] / 1000 == pytest.approx(weight / sum(weights), abs=0.02)
    assert sum(backend["total_requests"] for backend in backends) == 1000


def test_the_fewest_in_flight_over_all_get_the_next(whole: Whole) -> None:
    whole.use("least_connections")
    for each in whole.backends.values():
        each.gate.clear()
    with ThreadPoolExecutor(30) as threads:
        asked = [threads.submit(send, whole.port, 1) for _ in range(30)]
        wait_until(lambda: sum(whole.in_flight()) == 30, "all are on their way")
        counts = whole.in_flight()
        assert max(counts) - min(counts) <= WORKERS
        whole.backends["b"].gate.set()
        wait_until(lambda: whole.in_flight()[1] == 0, "b is through")
        more = [threads.submit(send, whole.port, 1) for _ in range(6)]
        assert [future.result() for future in more] == [[200]] * 6  # none of them waits with a or c
        for each in whole.backends.values():
            each.gate.set()
        assert [future.result() for future in asked] == [[200]] * 30


def test_a_limit_holds_over_all_and_who_waits_is_served(whole: Whole) -> None:
    """Whichever worker has the place that becomes free. Each may add one before it has seen what the other has."""
    whole.use("round_robin", limit=2)
    for each in whole.backends.values():
        each.gate.clear()
    with ThreadPoolExecutor(20) as threads:
        asked = [threads.submit(send, whole.port, 3) for _ in range(20)]
        wait_until(lambda: whole.status()["statistics"]["active_requests"] == 20, "all are here")
        wait_until(lambda: whole.status()["statistics"]["waiting_requests"] >= 20 - 3 * (2 + WORKERS - 1), "they wait")
        for each in whole.backends.values():
            each.gate.set()
        assert [future.result() for future in asked] == [[200] * 3] * 20
    assert all(each.most <= 2 + WORKERS - 1 for each in whole.backends.values())


def test_requests_of_all_are_told_and_explained(whole: Whole) -> None:
    """At once: whoever has an answer finds its record, through whichever worker."""
    for number in range(20):
        assert fetch(f"{whole.url}/", **{"X-Request-ID": f"told-{number}"})[0] == 200
        record = fetch_json(f"{whole.url}/requests/told-{number}")
        assert record["algorithm"] == "round_robin"
        assert len(record["tried"][0]["candidates"]) == 3
    status = whole.status()
    ids = {each["request_id"] for each in status["recent_requests"]}
    assert {f"told-{number}" for number in range(20)} <= ids
    whole_, backends = status["statistics"], status["backend_servers"]
    assert whole_["total_requests"] == whole_["successful_requests"] == whole_["codes"]["2xx"] == 20
    assert sum(each["total_requests"] for each in backends) == 20
    assert 0 < whole_["latency"]["p50"] <= whole_["latency"]["p99"] < 60
    metrics = fetch(f"{whole.url}/metrics")[2].decode()
    assert 'lb_backend_selected_total{backend="a"' in metrics


def test_totals_are_exact_after_a_storm_with_a_worker_killed(whole: Whole) -> None:
    """The difference is at most what the worker had in flight."""
    clients, answered, cut = 16, [], []
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            with suppress(OSError, ValueError), connect(whole.port) as client, client.makefile("rb") as stream:
                while not stop.is_set():
                    client.sendall(request())
                    try:
                        answered.append(read_response(stream)[0])
                    except Exception:
                        cut.append(1)
                        break

    threads = [threading.Thread(target=storm, name="storm") for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(answered) > 300, "the storm is on")
        victim = whole.workers()[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: whole.is_running() and whole.workers()[0]["pid"] != victim, "another one is there")
        before = len(answered)
        wait_until(lambda: len(answered) > before + 300, "it goes on")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    wait_until(lambda: whole.status()["statistics"]["active_requests"] == 0, "nothing is in flight")
    assert sum(whole.in_flight()) == 0
    total = whole.status()["statistics"]["total_requests"]
    assert set(answered) == {200}
    assert len(answered) <= total <= len(answered) + len(cut)
    assert len(cut) <= clients
