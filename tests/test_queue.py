"""Waiting for a place on a backend: first come, first served, bounded in number and time, and left by who leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Thread
from typing import Any

import pytest
from support import Balancer, connect, exchange, fetch, get, options, split_response, wait_until
from test_backends import GOOD, ORIGIN
from wire import WireBackend

from balancer.balancing.backends import Backend
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool, Lease
from balancer.balancing.strategies import Strategy, create
from balancer.config.settings import Settings
from balancer.config.values import BackendSettings
from balancer.errors import Unavailable
from balancer.loadbalancer import create_app
from balancer.protocol.client import Abortable


class Client:
    """A client that leaves when the test says so."""

    def __init__(self) -> None:
        self.target: Abortable | None = None

    def attach(self, target: Abortable) -> None:
        self.target = target

    def detach(self) -> None:
        self.target = None

    def leave(self) -> None:
        assert self.target is not None
        self.target.abort()


def make_pool(names: str = "a", limit: int | None = 1, **settings: Any) -> BackendPool:
    settings = {"queue_timeout": 30.0, "eject_after": 0} | settings
    pool = BackendPool(create("round_robin"), options(PoolOptions, **settings))
    for name in names:
        pool.record_check(pool.add(name, ORIGIN, max_connections=limit), GOOD)
    return pool


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


def queue_up(pool: BackendPool, threads: ThreadPoolExecutor, count: int, **how: Any) -> list[Future[Lease]]:
    """Requests that wait, in this order."""
    futures = []
    for _ in range(count):
        before = pool.waiting
        futures.append(threads.submit(pool.lease, **{"request": None} | how))
        wait_until(lambda: pool.waiting == before + 1, what="in the queue")  # noqa: B023
    return futures


def serve_all(lease: Lease, futures: list[Future[Lease]]) -> Lease:
    """Each gives its place to the next one; returns the last one's."""
    for future in futures:
        lease.release()
        lease = future.result(60)
    return lease


def test_first_come_first_served(threads: ThreadPoolExecutor) -> None:
    pool = make_pool()
    lease = pool.lease(None)
    futures = queue_up(pool, threads, 5)
    for number, future in enumerate(futures):
        lease.release(0.01)
        lease = future.result(60)
        assert lease.queued > 0 and pool.waiting == 4 - number
        assert not any(later.done() for later in futures[number + 1 :])
    lease.release(0.01)
    assert pool.lease(None).queued == 0.0


def test_the_queue_is_bounded_in_time() -> None:
    pool = make_pool(queue_timeout=0.05)
    pool.lease(None)
    with pytest.raises(Unavailable, match=r"also after 0\.05 s"):
        pool.lease(None)
    assert pool.waiting == 0


def test_the_deadline_of_the_request_ends_the_wait_sooner() -> None:
    pool = make_pool()
    pool.lease(None)
    with pytest.raises(Unavailable):
        pool.lease(None, deadline=0.0)


def test_who_leaves_frees_the_place(threads: ThreadPoolExecutor) -> None:
    pool = make_pool()
    lease, client = pool.lease(None), Client()
    (leaving,) = queue_up(pool, threads, 1, client=client)
    (staying,) = queue_up(pool, threads, 1)
    client.leave()
    with pytest.raises(Unavailable):
        leaving.result(60)
    assert pool.waiting == 1
    lease.release()
    staying.result(60).release()
    assert pool.backends()[0].active == 0


def test_a_retry_that_cannot_use_a_place_is_passed_over(threads: ThreadPoolExecutor) -> None:
    pool = make_pool("ab")
    first, second = pool.lease(None, ["b"]), pool.lease(None, ["a"])
    (retry,) = queue_up(pool, threads, 1, exclude=["a"])
    (plain,) = queue_up(pool, threads, 1)
    first.release()
    assert plain.result(60).backend.id == "a" and not retry.done()
    second.release()
    assert retry.result(60).backend.id == "b"


@pytest.mark.parametrize("change", [{"max_connections": None}, {"max_connections": 2}])
def test_more_room_serves_who_waits(threads: ThreadPoolExecutor, change: dict[str, Any]) -> None:
    pool = make_pool()
    pool.lease(None)
    (future,) = queue_up(pool, threads, 1)
    pool.update("a", change)
    assert future.result(60).backend.id == "a"


def test_a_backend_that_comes_up_serves_who_waits(threads: ThreadPoolExecutor) -> None:
    pool = make_pool("a", limit=None)
    pool.update("a", {"admin_state": "maint"})
    backend = pool.add("b", ORIGIN)
    (future,) = queue_up(pool, threads, 1)
    pool.record_check(backend, GOOD)
    assert future.result(60).backend.id == "b"


def test_a_storm_of_waiting_and_leaving_ends_with_nothing_held(threads: ThreadPoolExecutor) -> None:
    pool = make_pool("ab", limit=2, queue_limit=20, queue_timeout=0.2)
    outcomes: list[str] = []

    def work() -> None:
        for number in range(50):
            client = Client()
            Thread(target=lambda client=client: client.target and client.target.abort(), daemon=True).start()
            try:
                lease = pool.lease(None, ["a"] if number % 5 == 0 else (), client=client)
            except Unavailable:
                outcomes.append("none")
            else:
                assert lease.backend.active <= 2
                lease.release(0.001)
                outcomes.append("served")

    for future in [threads.submit(work) for _ in range(16)]:
        future.result(60)
    assert len(outcomes) == 800 and "served" in outcomes
    assert pool.waiting == 0
    assert [backend.active for backend in pool.backends()] == [0, 0]


# For real.


@pytest.fixture(scope="module")
def limited(scripted: WireBackend) -> Iterator[Balancer]:
    """One backend with room for one request, a queue for two."""
    with Balancer(f"--backend=only={scripted.url}", "--queue-limit=2", "--queue-timeout=20") as balancer:
        fetch(f"{balancer.url}/backends/only", {"max_connections": 1}, "PATCH")
        yield balancer


def test_requests_wait_in_order_and_the_one_too_many_is_told_when_to_come_again(
    limited: Balancer, scripted: WireBackend, threads: ThreadPoolExecutor
) -> None:
    scripted.reset()
    go = scripted.hold()
    first = threads.submit(fetch, f"{limited.url}/first")
    wait_until(lambda: len(scripted.requests) == 1)
    waiting = []
    for number in (1, 2):
        waiting.append(threads.submit(fetch, f"{limited.url}/{number}"))
        wait_until(lambda: limited.status()["statistics"]["waiting_requests"] == number)  # noqa: B023
    status, headers, body = fetch(f"{limited.url}/3")
    assert (status, headers["retry-after"]) == (503, "1") and b"2 requests are waiting already" in body
    go.set()
    assert [future.result(60)[2] for future in (first, *waiting)] == [b"/first", b"/1", b"/2"]
    assert [request.target for request in scripted.requests] == [b"/first", b"/1", b"/2"]
    newest = limited.status()["recent_requests"][0]
    assert newest["path"] == "/2" and newest["queued"] > 0


def test_a_client_that_leaves_the_queue_never_reaches_the_backend(
    limited: Balancer, scripted: WireBackend, threads: ThreadPoolExecutor
) -> None:
    scripted.reset()
    go = scripted.hold()
    first = threads.submit(fetch, f"{limited.url}/first")
    wait_until(lambda: len(scripted.requests) == 1)
    with ExitStack() as clients:
        for number in (1, 2):
            sock = clients.enter_context(connect(limited.port))
            sock.sendall(get(b"/left"))
            wait_until(lambda: limited.status()["statistics"]["waiting_requests"] == number)  # noqa: B023
    wait_until(lambda: limited.status()["statistics"]["waiting_requests"] == 0, what="both have left")
    last = threads.submit(exchange, limited.port, get(b"/last"))
    wait_until(lambda: limited.status()["statistics"]["waiting_requests"] == 1)
    go.set()
    assert first.result(60)[0] == 200
    assert split_response(last.result(60))[2] == b"/last"
    assert [request.target for request in scripted.requests] == [b"/first", b"/last"]
    gone = [one for one in limited.status()["recent_requests"] if one["path"] == "/left"]
    assert [(one["status"], one["attempts"]) for one in gone] == [(499, 0), (499, 0)]
    assert limited.backend("only")["active_connections"] == 0


def test_requests_that_come_before_the_first_check_wait_for_it() -> None:
    with WireBackend() as backend, Balancer(f"--backend=a={backend.url}", wait_ready=False) as balancer:
        assert fetch(f"{balancer.url}/x")[0] == 200


def test_a_removal_serves_who_waits_if_it_makes_room_elsewhere(threads: ThreadPoolExecutor) -> None:
    """`b` is ejected, which counts for nothing when nobody else is left."""
    pool = make_pool("ab", eject_after=1)
    pool.lease(None, ["a"]).release(failure="test")
    pool.lease(None)
    (future,) = queue_up(pool, threads, 1)
    pool.remove("a")
    assert future.result(60).backend.id == "b"


class Sharded(Strategy):
    """The candidate that the request names by its number."""

    def select(self, candidates: Sequence[Backend], request: Any) -> Backend:
        if request is SystemExit:
            raise request
        return candidates[request or 0]

    def backends_changed(self) -> None:
        raise RuntimeError("no change is called off for that")


def test_a_strategy_that_fails_for_one_request_costs_nobody_else_a_place(threads: ThreadPoolExecutor) -> None:
    """Neither those behind it, nor whoever gives a place back or changes something."""
    pool = make_pool()
    pool.use(Sharded())
    held = pool.lease(None)
    before, wrong, behind, exits, last = (queue_up(pool, threads, 1, request=r)[0] for r in (0, 7, 0, SystemExit, 0))
    held.release()
    before.result(60).release()
    with pytest.raises(IndexError):
        wrong.result(60)
    held = behind.result(60)
    pool.update("a", {"weight": 2, "max_connections": 2})
    with pytest.raises(SystemExit):
        exits.result(60)
    held.release()
    last.result(60).release()
    assert pool.waiting == pool.backends()[0].active == 0


def test_never_all_threads_may_wait_for_a_place(threads: ThreadPoolExecutor) -> None:
    """Who holds a place on the express way may need a thread."""
    backend = BackendSettings(id="a", url="http://127.0.0.1:9", max_connections=1)
    app = create_app(Settings(max_threads=8, queue_limit=500, queue_timeout=30, backends=(backend,)))
    pool = app.extensions["balancer"].control.pool
    pool.record_check(pool.get("a"), GOOD)
    lease = pool.lease(None)
    futures = queue_up(pool, threads, 4)
    with pytest.raises(Unavailable, match="4 requests are waiting already"):
        pool.lease(None)
    serve_all(lease, futures).release()


@pytest.mark.parametrize(
    "change", [{"admin_state": "drain"}, {"admin_state": "maint"}, {"weight": 0}, "remove", "down"]
)
def test_who_waits_in_vain_is_told_at_once(threads: ThreadPoolExecutor, change: Any) -> None:
    pool = make_pool()
    lease = pool.lease(None)
    (future,) = queue_up(pool, threads, 1)
    if change == "remove":
        pool.remove("a")
    elif change == "down":
        pool.record_refused(pool.backends()[0], "refused")
    else:
        pool.update("a", change)
    with pytest.raises(Unavailable, match="no backend is available") as caught:
        future.result(60)
    assert list(caught.value.excluded) == ["a"]
    lease.release()
