"""Who gets how much: every strategy over real traffic, from concurrent clients."""

from __future__ import annotations

import http.client
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from fleet import OPEN, Demo, start_demo
from support import fetch, fetch_json, wait_until
from test_failover import Load

FIRST, SECOND, THIRD = "backend_1", "backend_2", "backend_3"
ALL = (FIRST, SECOND, THIRD)


@pytest.fixture(scope="module")
def shared() -> Iterator[Demo]:
    """One for all tests here. Patient health checks: a busy machine must not look like a failure."""
    started = start_demo("--health-interval=1")
    yield started
    started.stop()


@pytest.fixture
def fleet(shared: Demo) -> Iterator[Demo]:
    """Weights 3, 2, 1, no faults, nothing counted yet."""
    weigh(shared, 3, 2, 1)
    fetch(f"{shared.url}/reset", {})
    yield shared
    gate(shared, OPEN)


def use(fleet: Demo, algorithm: str) -> None:
    assert fetch_json(f"{fleet.url}/algorithm", {"algorithm": algorithm})["current"] == algorithm


def restart(fleet: Demo, algorithm: str) -> None:
    """Use `algorithm` with no memory of the past."""
    use(fleet, "weighted" if algorithm == "round_robin" else "round_robin")
    use(fleet, algorithm)


def weigh(fleet: Demo, *weights: int) -> None:
    for backend, weight in zip(fleet.backends, weights, strict=True):
        assert fetch(f"{fleet.url}/backends/{backend.id}", {"weight": weight}, "PATCH")[0] == 200


def gate(fleet: Demo, event: Event) -> None:
    """Whatever comes from now on waits for this."""
    for backend in fleet.backends:
        backend.gate = event


def slow_down(fleet: Demo, seconds: Sequence[float]) -> None:
    for backend, delay in zip(fleet.backends, seconds, strict=True):
        backend.delay = delay


class Client:
    """One keep-alive connection; `get` returns who served."""

    def __init__(self, fleet: Demo) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", fleet.balancer.port, timeout=60)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, method: str = "GET") -> str:
        self._connection.request(method, "/api/process", body=b"{}" if method == "POST" else None)
        response = self._connection.getresponse()
        response.read()
        assert response.status == 200
        return response.headers["X-Served-By"]


def in_sequence(fleet: Demo, count: int) -> list[str]:
    with Client(fleet) as client:
        return [client.get() for _ in range(count)]


def at_once(fleet: Demo, count: int, clients: int = 10) -> Counter[str]:
    """`count` requests from `clients` connections that each wait for their answers."""

    def one(_: int) -> list[str]:
        return in_sequence(fleet, count // clients)

    with ThreadPoolExecutor(clients) as threads:
        return Counter(served for part in threads.map(one, range(clients)) for served in part)


def share(load: Load, backend: str, newest: int) -> float:
    """Of the `newest` requests; 0.0 before there are that many."""
    served = [answer.served_by for answer in load.answers[-newest:]]
    return served.count(backend) / newest if len(served) == newest else 0.0


# round_robin and weighted.


@pytest.mark.parametrize(("algorithm", "expected"), [("round_robin", (200, 200, 200)), ("weighted", (300, 200, 100))])
def test_shares_are_exact_for_concurrent_clients(fleet: Demo, algorithm: str, expected: tuple[int, ...]) -> None:
    restart(fleet, algorithm)
    served = at_once(fleet, 600)
    assert tuple(served[name] for name in ALL) == expected
    status = fleet.balancer.status()
    assert tuple(backend["total_requests"] for backend in status["backend_servers"]) == expected
    statistics = status["statistics"]
    assert statistics["total_requests"] == statistics["successful_requests"] == 600
    assert all(backend["active_connections"] == 0 for backend in status["backend_servers"])


# least_connections.


@pytest.mark.parametrize(("weights", "expected"), [((1, 1, 1), (4, 4, 4)), ((3, 2, 1), (6, 4, 2))])
def test_least_connections_fills_backends_evenly_for_their_weight(
    fleet: Demo, weights: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Twelve requests that all wait: how they are spread is what the strategy decided."""
    weigh(fleet, *weights)
    go = Event()
    gate(fleet, go)
    restart(fleet, "least_connections")
    with ThreadPoolExecutor(12) as threads:
        waiting = [threads.submit(in_sequence, fleet, 1) for _ in range(12)]
        wait_until(lambda: fleet.balancer.status()["statistics"]["active_requests"] == 12)
        active = tuple(backend["active_connections"] for backend in fleet.balancer.status()["backend_servers"])
        go.set()
        served = Counter(name for result in waiting for name in result.result())
    assert active == expected
    assert tuple(served[name] for name in ALL) == expected


# least_response_time. Backends of their own: how fast one was is remembered for a while.


@pytest.fixture
def unmeasured() -> Iterator[Demo]:
    started = start_demo("--health-interval=1", "--algorithm=least_response_time")
    weigh(started, 1, 1, 1)
    yield started
    started.stop()


def test_least_response_time_leaves_a_slow_backend_and_comes_back_when_it_recovers(unmeasured: Demo) -> None:
    slow_down(unmeasured, (0.12, 0.02, 0.02))
    with Load(unmeasured.balancer.port, per_second=1e6, clients=4) as load:
        wait_until(lambda: load.failed or 0 < share(load, FIRST, 200) < 0.15, "the slow one has less than its third")
        slow_down(unmeasured, (0.02, 0.02, 0.12))  # the first recovers, the third gets slow
        wait_until(lambda: load.failed or share(load, FIRST, 60) > 0.2, "the recovered backend gets its share")
        wait_until(lambda: load.failed or share(load, THIRD, 60) < 0.2, "the slow one loses its")
    assert load.failed == []


# Switching.


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("weighted", "round_robin", (40, 40, 40)),
        ("least_response_time", "weighted", (60, 40, 20)),
        ("round_robin", "weighted", (60, 40, 20)),
    ],
)
def test_a_switch_with_requests_in_flight_is_exact_from_the_next_request_on(
    fleet: Demo, before: str, after: str, expected: tuple[int, ...]
) -> None:
    use(fleet, before)
    in_sequence(fleet, 5)  # stop in the middle of a turn
    go = Event()
    gate(fleet, go)
    with ThreadPoolExecutor(10) as threads:
        waiting = [threads.submit(in_sequence, fleet, 1) for _ in range(10)]
        wait_until(lambda: fleet.balancer.status()["statistics"]["active_requests"] == 10)
        gate(fleet, OPEN)
        use(fleet, after)
        served = at_once(fleet, 120)
        go.set()
        assert all(len(result.result()) == 1 for result in waiting)
    assert tuple(served[name] for name in ALL) == expected
