"""Who gets how much: every strategy over real traffic, from concurrent clients."""

from __future__ import annotations

import http.client
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from threading import Event, Thread

import pytest
from fleet import Demo, start_demo
from support import fetch, fetch_json, wait_until

FIRST, SECOND, THIRD = "backend_1", "backend_2", "backend_3"
ALL = (FIRST, SECOND, THIRD)


@pytest.fixture(scope="module")
def shared() -> Iterator[Demo]:
    """One for all tests here. Patient health checks: a busy machine must not look like a failure."""
    started = start_demo("--health-timeout=5", "--health-interval=1")
    yield started
    started.stop()


@pytest.fixture
def fleet(shared: Demo) -> Iterator[Demo]:
    """Weights 3, 2, 1, no faults, nothing counted yet."""
    weigh(shared, 3, 2, 1)
    fetch(f"{shared.url}/reset", {})
    yield shared
    slow_down(shared, (0, 0, 0))


def use(fleet: Demo, algorithm: str) -> None:
    assert fetch_json(f"{fleet.url}/algorithm", {"algorithm": algorithm})["current"] == algorithm


def restart(fleet: Demo, algorithm: str) -> None:
    """Use `algorithm` with no memory of the past."""
    use(fleet, "weighted" if algorithm == "round_robin" else "round_robin")
    use(fleet, algorithm)


def weigh(fleet: Demo, *weights: int) -> None:
    for backend, weight in zip(fleet.backends, weights, strict=True):
        assert fetch(f"{fleet.url}/backends/{backend.id}", {"weight": weight}, "PATCH")[0] == 200


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


class Load:
    """Clients that ask without pause until the block ends; `served` holds who answered, in order of arrival."""

    def __init__(self, fleet: Demo, clients: int) -> None:
        self._fleet = fleet
        self._ended = Event()
        self.served: list[str] = []
        self.errors: list[BaseException] = []
        self._threads = [Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        try:
            with Client(self._fleet) as client:
                while not self._ended.is_set():
                    self.served.append(client.get())
        except (OSError, http.client.HTTPException, AssertionError) as error:
            self.errors.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def share(self, backend: str, newest: int) -> float:
        """Of the `newest` requests; 0.0 before there are that many."""
        seen = self.served[-newest:]
        return seen.count(backend) / newest if len(seen) == newest else 0.0

    def next(self, count: int) -> Counter[str]:
        """Who serves the next `count` requests."""
        start = len(self.served)
        wait_until(lambda: self.errors or len(self.served) >= start + count, f"{count} requests")
        return Counter(islice(self.served, start, start + count))


def assert_status_agrees(fleet: Demo, served: Counter[str]) -> None:
    """What the balancer counted is what the clients saw."""
    status = fleet.balancer.status()
    counted = {backend["id"]: backend["total_requests"] for backend in status["backend_servers"]}
    assert counted == {name: served[name] for name in ALL}
    statistics = status["statistics"]
    assert statistics["total_requests"] == statistics["successful_requests"] == served.total()
    assert all(backend["active_connections"] == 0 for backend in status["backend_servers"])


# round_robin and weighted.


def test_round_robin_gives_exact_thirds_to_concurrent_clients(fleet: Demo) -> None:
    restart(fleet, "round_robin")
    served = at_once(fleet, 300)
    assert served == dict.fromkeys(ALL, 100)
    assert_status_agrees(fleet, served)


def test_round_robin_takes_turns_in_configured_order_whatever_the_weights(fleet: Demo) -> None:
    restart(fleet, "round_robin")
    assert in_sequence(fleet, 12) == list(ALL) * 4


def test_weighted_is_exact_for_concurrent_clients(fleet: Demo) -> None:
    restart(fleet, "weighted")
    served = at_once(fleet, 600)
    assert served == {FIRST: 300, SECOND: 200, THIRD: 100}
    assert_status_agrees(fleet, served)


def test_weighted_is_smooth(fleet: Demo) -> None:
    """Every six requests hold exactly 3, 2 and 1, wherever the six begin, and nobody gets three in a row."""
    restart(fleet, "weighted")
    served = in_sequence(fleet, 60)
    windows = [Counter(served[start : start + 6]) for start in range(55)]
    assert all(window == {FIRST: 3, SECOND: 2, THIRD: 1} for window in windows)
    assert max(len(list(run)) for _, run in groupby(served)) <= 2
    assert all(served[start : start + 3].count(SECOND) <= 2 for start in range(58))


@pytest.mark.parametrize(
    ("weights", "expected"), [((1, 1, 1), (60, 60, 60)), ((4, 0, 1), (144, 0, 36)), ((0, 0, 5), (0, 0, 180))]
)
def test_weights_changed_at_run_time_are_exact_from_the_next_request_on(
    fleet: Demo, weights: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    use(fleet, "weighted")
    in_sequence(fleet, 4)  # stop in the middle of a turn
    weigh(fleet, *weights)
    served = at_once(fleet, 180)
    assert tuple(served[name] for name in ALL) == expected


def test_expected_shares_are_those_that_come(fleet: Demo) -> None:
    for algorithm in ("round_robin", "weighted"):
        restart(fleet, algorithm)
        served = at_once(fleet, 120)
        for backend in fleet.balancer.status()["backend_servers"]:
            assert backend["expected_share"] == pytest.approx(served[backend["id"]] / 120)


def test_posts_are_shared_out_like_gets(fleet: Demo) -> None:
    restart(fleet, "weighted")
    with Client(fleet) as client:
        served = Counter(client.get("POST" if number % 2 else "GET") for number in range(60))
    assert served == {FIRST: 30, SECOND: 20, THIRD: 10}


# least_connections.


def test_least_connections_shares_ties_by_weight(fleet: Demo) -> None:
    """One client at a time: nobody has a connection, so every choice is a tie."""
    restart(fleet, "least_connections")
    assert Counter(in_sequence(fleet, 60)) == {FIRST: 30, SECOND: 20, THIRD: 10}
    weigh(fleet, 1, 1, 1)
    restart(fleet, "least_connections")
    assert in_sequence(fleet, 9) == list(ALL) * 3


def test_least_connections_gives_fast_backends_more(fleet: Demo) -> None:
    weigh(fleet, 1, 1, 1)
    slow_down(fleet, (0.02, 0.02, 0.3))
    restart(fleet, "least_connections")
    with Load(fleet, 9) as load:
        served = load.next(300)
    assert not load.errors
    assert served[THIRD] < 60  # a third would be 100; by speed it is 300 / 31
    assert min(served[FIRST], served[SECOND]) > 90


@pytest.mark.parametrize(("weights", "expected"), [((1, 1, 1), (4, 4, 4)), ((3, 2, 1), (6, 4, 2))])
def test_least_connections_fills_backends_evenly_for_their_weight(
    fleet: Demo, weights: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Twelve requests that all wait: how they are spread is what the strategy decided."""
    weigh(fleet, *weights)
    slow_down(fleet, (1.5, 1.5, 1.5))
    restart(fleet, "least_connections")
    with ThreadPoolExecutor(12) as threads:
        waiting = [threads.submit(in_sequence, fleet, 1) for _ in range(12)]
        wait_until(lambda: fleet.balancer.status()["statistics"]["active_requests"] == 12)
        active = tuple(backend["active_connections"] for backend in fleet.balancer.status()["backend_servers"])
        served = Counter(name for result in waiting for name in result.result())
    assert active == expected
    assert tuple(served[name] for name in ALL) == expected


# least_response_time. Backends of their own: how fast one was is remembered for a while.


@pytest.fixture
def unmeasured() -> Iterator[Demo]:
    started = start_demo("--health-timeout=5", "--health-interval=1", "--algorithm=least_response_time")
    weigh(started, 1, 1, 1)
    yield started
    started.stop()


def test_least_response_time_leaves_a_slow_backend_and_comes_back_when_it_recovers(unmeasured: Demo) -> None:
    slow_down(unmeasured, (0.12, 0.02, 0.02))
    with Load(unmeasured, 4) as load:
        load.next(20)  # everybody is measured
        served = load.next(200)
        assert served[FIRST] < 30  # a third would be 67
        assert min(served[SECOND], served[THIRD]) > 10
        slow_down(unmeasured, (0.02, 0.02, 0.12))  # the first recovers, the third gets slow
        wait_until(lambda: load.errors or load.share(FIRST, 60) > 0.2, "the recovered backend gets its share")
        wait_until(lambda: load.errors or load.share(THIRD, 60) < 0.2, "the slow one loses its")
    assert not load.errors


def test_least_response_time_tries_everybody_and_then_spares_the_slow_one(unmeasured: Demo) -> None:
    slow_down(unmeasured, (0.3, 0.01, 0.01))
    served = in_sequence(unmeasured, 40)
    assert set(served[:3]) == set(ALL)
    assert served.count(FIRST) <= 3


# Switching.


def test_switching_under_load_loses_nothing(fleet: Demo) -> None:
    algorithms = ("round_robin", "least_connections", "power_of_two", "weighted", "least_response_time", "peak_ewma")
    with Load(fleet, 8) as load:
        for round_number in range(40):
            use(fleet, algorithms[round_number % len(algorithms)])
            load.next(5)
    assert not load.errors
    assert_status_agrees(fleet, Counter(load.served))
    assert fleet.balancer.status()["statistics"]["failed_requests"] == 0


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
    slow_down(fleet, (1.5, 1.5, 1.5))
    with ThreadPoolExecutor(10) as threads:
        waiting = [threads.submit(in_sequence, fleet, 1) for _ in range(10)]
        wait_until(lambda: fleet.balancer.status()["statistics"]["active_requests"] == 10)
        slow_down(fleet, (0, 0, 0))
        use(fleet, after)
        served = at_once(fleet, 120)
        still_waiting = sum(not result.done() for result in waiting)
        assert all(len(result.result()) == 1 for result in waiting)
    assert still_waiting > 0
    assert tuple(served[name] for name in ALL) == expected
