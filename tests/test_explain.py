"""Why this backend, why this status: what `/requests/<id>` says of a request, and what bounds its retries."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import (
    Balancer,
    Clock,
    exchange,
    fetch,
    fetch_json,
    free_port,
    get,
    ok,
    options,
    split_response,
    wait_until,
)
from wire import WireBackend, hang_up

from balancer.balancing.backends import EXPLAINED, Backend, LastCheck
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool, Lease
from balancer.balancing.strategies import REGISTRY, create
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

Two = tuple[WireBackend, WireBackend]


@pytest.fixture(scope="module")
def backends() -> Iterator[tuple[WireBackend, WireBackend]]:
    made = WireBackend(), WireBackend()
    yield made
    for backend in made:
        backend.close()


@pytest.fixture(scope="module")
def started(backends: Two) -> Iterator[Balancer]:
    urls = [f"--backend={name}={backend.url}" for name, backend in zip("ab", backends, strict=True)]
    with Balancer(
        *urls,
        f"--backend=gone=http://127.0.0.1:{free_port()}",
        "--backend=off=http://127.0.0.1:1@0",
        "--algorithm=least_connections",
        "--eject-after=0",
        "--retry-budget-minimum=3",
        "--retry-budget=0",
    ) as balancer:
        yield balancer


@pytest.fixture
def balancer(started: Balancer, backends: Two) -> Balancer:
    for backend in backends:
        backend.reset()
    for name in "ab":
        started.wait_healthy(name)
    wait_until(lambda: started.backend("gone")["state"] == "down")
    return started


def explain(balancer: Balancer, request_id: str, status: int, **how: Any) -> Any:
    assert fetch(f"{balancer.url}/x?secret=1", X_Request_ID=request_id, **how)[0] == status
    return fetch_json(f"{balancer.url}/requests/{request_id}")


def asked(number: int) -> Request:
    """Of another client each."""
    return Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", f"192.0.2.{number % 256}", [(b"host", b"a")])


def test_candidates_scores_and_who_was_excluded(balancer: Balancer) -> None:
    told = explain(balancer, "plain-1", 200)
    assert (told["status"], told["attempts"], told["path"], told["method"]) == (200, 1, "/x", "GET")
    (attempt,) = told["tried"]
    assert attempt["algorithm"] == "least_connections" and attempt["outcome"] == "200"
    assert attempt["candidates"] == [{"id": "a", "active": 0, "score": 0.0}, {"id": "b", "active": 0, "score": 0.0}]
    assert attempt["excluded"]["off"] == "weight 0"
    assert attempt["excluded"]["gone"].startswith("down: health check failed")
    assert attempt["backend"] == told["server_id"] in ("a", "b")


def test_every_attempt_is_there_with_its_cause(balancer: Balancer, backends: Two) -> None:
    def once(sock: socket.socket, request: Any) -> None:
        for backend in backends:
            backend.answer(ok())
        hang_up(sock)

    for backend in backends:
        backend.script = once
    told = explain(balancer, "retried-1", 200)
    first, second = told["tried"]
    assert first["outcome"] == "connection_terminated" and "without a complete response" in first["error"]
    assert (second["outcome"], second["error"]) == ("200", None)
    assert second["excluded"][first["backend"]] == "already tried"
    assert [candidate["id"] for candidate in second["candidates"]] == [second["backend"]]
    assert told["first_byte"] == second["seconds"] and told["not_retried"] is None


def test_a_post_that_may_have_had_its_effect_says_so(balancer: Balancer, backends: Two) -> None:
    for backend in backends:
        backend.script = lambda sock, request: hang_up(sock)
    told = explain(balancer, "post-1", 502, body=b"{}")
    assert (told["attempts"], told["not_retried"]) == (1, "POST may have had its effect")
    assert told["bytes_in"] == 2


def test_no_retry_without_another_backend_or_beyond_the_budget(balancer: Balancer, backends: Two) -> None:
    for backend in backends:
        backend.script = lambda sock, request: hang_up(sock)
    reasons = [explain(balancer, f"budget-{number}", 502)["not_retried"] for number in range(40)]
    assert reasons[0] == "no other backend is available"
    assert reasons[-1] == "the retry budget is used up"  # three a second, thirty in ten seconds
    assert {reason for reason in reasons} == {reasons[0], reasons[-1]}


def test_an_answer_names_nobody_and_an_unknown_id_is_404(balancer: Balancer) -> None:
    raw = exchange(balancer.port, get(b"/x", b"X-Request-ID: headers-1"))
    names = {name for name, _ in split_response(raw)[1]}
    assert names <= {b"content-length", b"x-request-id", b"server", b"date", b"connection"}
    status, _, answer = fetch(f"{balancer.url}/requests/none")
    assert status == 404 and b"'none'; kept are the newest, " in answer
    assert fetch(f"{balancer.url}/requests/")[0] == 404


def test_an_id_with_slashes_can_be_asked_for(balancer: Balancer) -> None:
    assert explain(balancer, "a/b:c=d@e", 200)["request_id"] == "a/b:c=d@e"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_score_is_what_the_strategy_goes_by(name: str) -> None:
    strategy = create(name)
    origin = Origin("http", "127.0.0.1", 1)
    candidates = [Backend("a", origin, 1), Backend("b", origin, 2), Backend("c", origin, 3)]
    for backend, active, ewma in zip(candidates, (3, 1, 5), (0.2, 0.1, 0.001), strict=True):
        backend.active, backend.speed.ewma, backend.speed.ewma_at = active, ewma, strategy.clock()
    scores = strategy.scores(candidates)
    if scores is None:
        return
    assert len(scores) == 3
    assert strategy.select(candidates, None) is candidates[list(scores).index(min(scores))]


def test_a_request_that_found_nobody_says_why_of_each_backend() -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with Balancer(f"--backend=gone={gone}", "--backend=off=http://127.0.0.1:1@0") as balancer:
        wait_until(lambda: balancer.backend("gone")["state"] == "down")
        told = explain(balancer, "nobody-1", 503)
        assert (told["tried"], told["error"]) == ([], "no backend is available")
        assert told["excluded"]["off"] == "weight 0" and told["excluded"]["gone"].startswith("down: ")


def test_a_request_that_was_sent_again_because_its_kept_connection_had_died_says_so(
    balancer: Balancer, backends: Two
) -> None:
    def dies_once(sock: socket.socket, request: Any) -> None:
        for backend in backends:
            backend.answer(ok())
        hang_up(sock)

    for _ in range(4):
        assert fetch(f"{balancer.url}/warm")[0] == 200
    for backend in backends:
        backend.script = dies_once
    told = explain(balancer, "resent-1", 200)
    assert [(attempt["outcome"], attempt["resent"]) for attempt in told["tried"]] == [("200", True)]


def test_a_retry_without_budget_does_not_wait_for_a_place() -> None:
    flags = ("--retry-budget=0", "--retry-budget-minimum=0", "--queue-timeout=20", "--eject-after=0")
    with (
        WireBackend() as failing,
        WireBackend() as busy,
        Balancer(f"--backend=failing={failing.url}", f"--backend=busy={busy.url}", *flags) as balancer,
        ThreadPoolExecutor(8) as clients,
    ):
        fetch(f"{balancer.url}/backends/busy", {"max_connections": 1}, "PATCH")
        failing.script = lambda sock, request: hang_up(sock)
        go = busy.hold()
        answers = [clients.submit(fetch, f"{balancer.url}/x") for _ in range(8)]
        wait_until(lambda: busy.requests and sum(answer.done() for answer in answers) >= 1)
        told = next(one for one in balancer.status()["recent_requests"] if one["status"] == 502)
        assert told["not_retried"] == "the retry budget is used up" and told["response_time"] < 20
        go.set()


def test_of_hundreds_of_backends_a_record_explains_the_first_and_the_chosen_one() -> None:
    """Thousands of records are kept: each would take 100 kB with a thousand backends."""
    pool = BackendPool(create("least_connections"), options(PoolOptions))
    for number in range(300):
        added = pool.add(f"b{number}", Origin("http", "127.0.0.1", 1 + number))
        pool.record_check(added, LastCheck(0.0, 0.0, 200 if number % 2 else None, None if number % 2 else "down"))
    for taken in range(120):
        choice = pool.lease(None).choice
        described = choice.describe()
        candidates = [candidate["id"] for candidate in described["candidates"]]
        assert len(candidates) == len(set(candidates)) == len(described["excluded"]) == EXPLAINED
        assert choice.backend.id in candidates
        chosen = described["candidates"][candidates.index(choice.backend.id)]
        assert (chosen["active"], chosen["score"]) == (0, 0.0), taken


def test_of_hundreds_of_backends_that_are_full_a_refusal_names_the_first() -> None:
    backends = [f"--backend=http://127.0.0.1:1@{weight}" for weight in [0] * (EXPLAINED + 50)]
    with Balancer(*backends) as balancer:
        identifier = fetch(f"{balancer.url}/")[1]["x-request-id"]
        assert len(fetch_json(f"{balancer.url}/requests/{identifier}")["excluded"]) == EXPLAINED


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_each_choice_is_told_as_it_was_made_and_the_lowest_score_went(name: str) -> None:
    """Whatever has come and gone since, with backends that are full and such as were tried before."""
    time, chance = Clock(), random.Random(1)
    pool = BackendPool(create(name, clock=time, rng=chance), options(PoolOptions, eject_after=0), clock=time)
    for number, limit in enumerate((None, 2, None, 3, 1, None)):
        origin = Origin("http", "127.0.0.1", 1 + number)
        added = pool.add(f"b{number}", origin, weight=1 + number % 3, max_connections=limit)
        pool.record_check(added, LastCheck(0.0, 0.0, 200, None))
    held: list[Lease] = []
    seen: list[tuple[Lease, dict[str, int], dict[str, str]]] = []
    for number in range(500):
        time.now += chance.expovariate(10)
        if number == 250:
            pool.update("b0", {"weight": 3})
        while held and chance.random() < 0.5:
            lease = held.pop(chance.randrange(len(held)))
            lease.release(chance.choice([None, 0.01, 0.2]), failure=chance.choice(["", "", "reset"]))
        exclude = chance.choice([(), (), ("b0",), ("b2", "b3")])
        excluded = {
            each.id: f"full: {each.active} of {each.max_connections}" for each in pool.backends() if each.is_full
        }
        excluded |= dict.fromkeys(exclude, "already tried")
        active = {each.id: each.active for each in pool.backends() if each.id not in excluded}
        held.append(pool.lease(asked(number), exclude))
        seen.append((held[-1], active, excluded))
    for lease, active, excluded in seen:
        told = lease.choice.describe()
        assert {each["id"]: each["active"] for each in told["candidates"]} == active
        if name != "consistent_hash":  # which passes others over for reasons of its own
            assert told["excluded"] == excluded
        scores = {each["id"]: each["score"] for each in told["candidates"]}
        if scores[lease.backend.id] is not None:
            assert scores[lease.backend.id] == pytest.approx(min(scores.values()))
