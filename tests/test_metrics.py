"""/metrics: valid for Prometheus, true to what happened, and never a counter that falls."""

from __future__ import annotations

import gzip
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from exposition import Key, promtool, read, scrape, value
from flask import Flask
from prometheus_client.openmetrics import parser as openmetrics
from support import (
    ROOT,
    Balancer,
    Clock,
    RawRequest,
    connect,
    exchange,
    fetch,
    free_port,
    get,
    make_attempt,
    make_record,
    ok,
    options,
    read_all,
    wait_until,
)
from wire import WireBackend

from balancer.balancing.backends import LastCheck
from balancer.balancing.counts import BackendCounts
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.strategies import create
from balancer.config.settings import Settings
from balancer.config.values import BackendSettings
from balancer.control.backendmetrics import BACKEND_REASONS, BUCKETS, STATES
from balancer.control.metrics import QUEUE_BUCKETS, REASONS
from balancer.loadbalancer import create_app
from balancer.observe.events import EVENT_KINDS
from balancer.observe.histogram import BOUNDS, ROUND_BOUNDS
from balancer.observe.record import Attempt
from balancer.observe.statistics import Statistics
from balancer.protocol.origin import Origin

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@pytest.fixture
def app() -> Flask:
    backends = tuple(BackendSettings(id=name, url="http://127.0.0.1:9") for name in ("a", "b"))
    return create_app(Settings(backends=backends))


def samples(app: Flask) -> dict[Key, float]:
    answer = app.test_client().get("/metrics")
    assert answer.status_code == 200
    return read(answer.text)


def attempt(backend: str, outcome: str = "200", connect: float | None = None, error: str | None = None) -> Attempt:
    return make_attempt(backend, outcome, connect=connect, error=error)


def finish(app: Flask, *attempts: Attempt, status: int = 200, seconds: float = 0.02, **fields: Any) -> None:
    statistics: Statistics = app.extensions["control"].statistics
    statistics.begin()
    backend = attempts[-1].backend if attempts else None
    statistics.record(make_record(backend, status, seconds, attempts=list(attempts), **fields))


Pair = tuple[Balancer, WireBackend, WireBackend]

# A real process under all kinds of traffic.


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    first, second = WireBackend(), WireBackend()
    flags = ("--response-timeout=30", "--health-interval=0.2", "--max-request-body=1000", "--eject-after=0")
    balancer = Balancer(f"--backend=one={first.url}", f"--backend=two={second.url}", *flags)
    yield balancer, first, second
    balancer.stop()
    first.close()
    second.close()


@pytest.fixture(scope="module")
def busy(pair: Pair) -> Balancer:
    """Good answers, errors of backends and of clients, a retry, a broken answer, a refused write."""
    balancer, first, second = pair

    def close(sock: socket.socket, request: RawRequest) -> None:
        sock.shutdown(socket.SHUT_RDWR)

    has_begun = threading.Event()

    def break_off(sock: socket.socket, request: RawRequest) -> None:
        """After the head has gone on to the client: nothing can be tried elsewhere."""
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")
        has_begun.wait(60)
        sock.shutdown(socket.SHUT_RDWR)

    for method in ("GET", "HEAD", "DELETE", "BREW"):
        exchange(balancer.port, get(b"/good", method=method.encode()))
    assert fetch(f"{balancer.url}/upload", b"x" * 700)[0] == 200
    assert fetch(f"{balancer.url}/large", b"x" * 2000)[0] == 413
    first.answer(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    for _ in range(2):
        fetch(f"{balancer.url}/bad")
    first.script = close
    for _ in range(2):
        assert fetch(f"{balancer.url}/retried")[0] == 200
    first.script = second.script = break_off
    with connect(balancer.port) as sock:
        sock.sendall(get(b"/broken"))
        assert sock.recv(1) == b"H"
        has_begun.set()
        read_all(sock)
    first.answer(ok())
    second.answer(ok())
    assert fetch(f"{balancer.url}/reset", b"{}")[0] == 415
    wait_until(lambda: value(scrape(balancer.url), "lb_requests_in_flight") == 0, what="all are recorded")
    return balancer


def test_prometheus_itself_finds_nothing_to_say(busy: Balancer) -> None:
    text = fetch(f"{busy.url}/metrics")[2].decode()
    checked = promtool("check", "metrics", text=text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_bad_text_would_be_found() -> None:
    assert promtool("check", "metrics", text="# TYPE lb_things counter\nlb_things 1\n").returncode != 0


def test_it_parses_as_openmetrics_too(busy: Balancer) -> None:
    status, headers, body = fetch(f"{busy.url}/metrics", Accept=OPENMETRICS)
    assert status == 200 and headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(body.decode())}
    assert families["lb_requests"].type == "counter"
    assert families["lb_request_duration_seconds"].type == "histogram"
    assert all(family.documentation for family in families.values())
    assert not any(sample.name.endswith("_created") for family in families.values() for sample in family.samples)


def test_what_happened_is_told(busy: Balancer) -> None:
    told = scrape(busy.url)
    assert value(told, "lb_requests_total", code="200", method="GET") == 5  # one of them did not come whole
    assert value(told, "lb_requests_total", code="200", method="POST") == 1
    assert value(told, "lb_requests_total", code="200", method="other") == 1
    assert value(told, "lb_requests_total", code="413", method="POST") == 1
    assert value(told, "lb_request_errors_total", reason="http_response_incomplete") == 1
    assert value(told, "lb_request_errors_total", reason="http_request_error") == 1
    assert value(told, "lb_retries_total", reason="connection_terminated") == 1
    assert value(told, "lb_request_bytes_total") == 700
    assert value(told, "lb_backend_requests_total", backend="one", code="503") == 1
    assert value(told, "lb_backend_requests_total", backend="one", code="none") == 1
    assert value(told, "lb_backend_errors_total", backend="one", reason="connection_terminated") == 1
    broken = [
        value(told, "lb_backend_errors_total", backend=b, reason="http_response_incomplete") for b in ("one", "two")
    ]
    assert sorted(broken) == [0, 1]
    for backend in ("one", "two"):
        chosen = value(told, "lb_backend_selected_total", backend=backend)
        attempts = sum(
            v
            for (name, labels), v in told.items()
            if name == "lb_backend_requests_total" and ("backend", backend) in labels
        )
        opened = value(told, "lb_backend_connections_opened_total", backend=backend)
        reused = value(told, "lb_backend_connections_reused_total", backend=backend)
        assert chosen == attempts == opened + reused and opened >= 1
        assert value(told, "lb_backend_up", backend=backend) == 1
        assert value(told, "lb_backend_health_checks_total", backend=backend) >= 1
        assert value(told, "lb_backend_health_transitions_total", backend=backend, to="up") == 1
        assert value(told, "lb_backend_expected_share", backend=backend) == 0.5
    assert value(told, "lb_lifecycle_state", state="running") == 1
    assert value(told, "lb_config_last_reload_successful") == 1
    assert value(told, "lb_events_total", kind="backend_up") == 2
    assert value(told, "lb_events_total", kind="write_refused") == 1
    assert value(told, "lb_admin_requests_total", action="reset", code="415") == 1
    assert value(told, "lb_admin_requests_total", action="metrics", code="200") >= 1


def test_histograms_add_up(busy: Balancer) -> None:
    told = scrape(busy.url)
    requests = sum(v for (name, _), v in told.items() if name == "lb_requests_total")
    assert value(told, "lb_request_duration_seconds_count") == requests
    assert value(told, "lb_request_duration_seconds_bucket", le="+Inf") == requests
    rising = [value(told, "lb_request_duration_seconds_bucket", le=str(bound)) for bound in BUCKETS]
    assert rising == sorted(rising) and 0 < rising[-1] <= requests
    assert 0 < value(told, "lb_request_duration_seconds_sum") < 60
    assert value(told, "lb_queue_duration_seconds_count") == 0


def test_head_has_no_body_and_a_length(busy: Balancer) -> None:
    status, headers, body = fetch(f"{busy.url}/metrics", method="HEAD")
    assert (status, body) == (200, b"") and int(headers["content-length"]) > 10_000


def test_it_is_compressed_for_those_who_ask_and_can_be_cut_down(busy: Balancer) -> None:
    _, headers, body = fetch(f"{busy.url}/metrics", Accept_Encoding="gzip")
    assert headers["content-encoding"] == "gzip" and b"lb_requests_total" in gzip.decompress(body)
    only = read(fetch(f"{busy.url}/metrics?name[]=lb_requests_in_flight")[2].decode())
    assert {name for name, _ in only} == {"lb_requests_in_flight"}
    assert fetch(f"{busy.url}/metrics", b"{}", Content_Type="application/json")[0] == 405


def test_series_stay_within_the_budget(busy: Balancer) -> None:
    told = scrape(busy.url)
    of_one = [key for key in told if ("backend", "one") in key[1]]
    whole = [key for key in told if "backend" not in dict(key[1])]
    assert len(of_one) <= 65 and len(whole) <= 150


def test_a_client_cannot_make_up_labels(busy: Balancer) -> None:
    before = len(scrape(busy.url))
    for number in range(20):
        exchange(busy.port, get(b"/made-up-%d" % number, method=b"M%d" % number))
        fetch(f"{busy.url}/backends/made-up-{number}")
    after = scrape(busy.url)
    assert len(after) <= before + 1  # 404 of the control API
    assert not any("made-up" in str(key) or "M1" in str(key) for key in after)


def test_nothing_falls_when_a_backend_is_removed_and_comes_back_or_all_is_reset(pair: Pair, busy: Balancer) -> None:
    _, _, second = pair
    before = scrape(busy.url)
    assert fetch(f"{busy.url}/reset", {})[0] == 200
    assert fetch(f"{busy.url}/backends/two", method="DELETE")[0] == 200
    without = scrape(busy.url)
    assert not any(("backend", "two") in labels for _, labels in without)
    assert fetch(f"{busy.url}/backends", {"id": "two", "url": second.url})[0] == 201
    busy.wait_healthy("two")
    assert busy.status()["statistics"]["total_requests"] == 0
    after = scrape(busy.url)
    assert_none_fell(before, without, whole_only=True)
    assert_none_fell(without, after)
    assert_none_fell(before, after)
    ups = ("lb_backend_health_transitions_total", {"backend": "two", "to": "up"})
    assert value(after, ups[0], **ups[1]) == value(before, ups[0], **ups[1]) + 1


def assert_none_fell(before: dict[Key, float], after: dict[Key, float], whole_only: bool = False) -> None:
    for (name, labels), old in before.items():
        if name.endswith(("_total", "_count", "_sum", "_bucket")) and not (whole_only and "backend" in dict(labels)):
            assert after[name, labels] >= old, name


def test_a_backend_that_is_down_shows(pair: Pair, busy: Balancer) -> None:
    _, first, _ = pair
    first.is_healthy = False
    busy.wait_healthy("one", False)
    told = scrape(busy.url)
    assert value(told, "lb_backend_up", backend="one") == 0
    assert value(told, "lb_backend_state", backend="one", state="down") == 1
    assert value(told, "lb_backend_health_check_failures_total", backend="one") >= 2
    assert value(told, "lb_backend_health_transitions_total", backend="one", to="down") >= 1
    down = value(told, "lb_backend_downtime_seconds_total", backend="one")
    wait_until(lambda: value(scrape(busy.url), "lb_backend_downtime_seconds_total", backend="one") > down)
    first.is_healthy = True
    busy.wait_healthy("one")


def test_a_request_in_flight_shows(pair: Pair, busy: Balancer) -> None:
    _, first, second = pair
    release = first.hold()
    second.script = first.script
    with connect(busy.port) as client:
        client.sendall(get(b"/slow"))
        try:
            told = wait_until(lambda: (t := scrape(busy.url)) and value(t, "lb_requests_in_flight") and t)
            busy_ones = [value(told, "lb_backend_requests_in_flight", backend=b) for b in ("one", "two")]
            assert value(told, "lb_requests_in_flight") == sum(busy_ones) == 1
        finally:
            release.set()
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_refused_connect_is_no_connection() -> None:
    backend = WireBackend()
    flags = (f"--backend=good={backend.url}", f"--backend=gone=http://127.0.0.1:{free_port()}", "--panic-threshold=1")
    with closing(backend), Balancer(*flags) as balancer:  # all are asked, whatever the checks say
        for _ in range(4):
            assert fetch(f"{balancer.url}/x")[0] == 200
        told = scrape(balancer.url)
    refused = value(told, "lb_backend_errors_total", backend="gone", reason="connection_refused")
    assert refused == value(told, "lb_retries_total", reason="connection_refused") == 2
    assert value(told, "lb_backend_connections_opened_total", backend="gone") == 0
    assert value(told, "lb_panic") == 1
    assert value(told, "lb_requests_total", code="200", method="GET") == 4


# One number at a time.


@pytest.mark.parametrize("state", STATES)
def test_exactly_one_state_is_set(app: Flask, state: str) -> None:
    pool: BackendPool = app.extensions["control"].pool
    backend = pool.backends()[0]
    backend.health.status = "down" if state == "down" else "unknown" if state == "unknown" else "up"
    if state in ("ejected", "trial"):
        backend.ejection.status = state  # type: ignore[assignment]
    if state in ("drain", "drained", "maint"):
        backend.admin_state = "maint" if state == "maint" else "drain"
        backend.active = 1 if state == "drain" else 0
    told = samples(app)
    assert {name: value(told, "lb_backend_state", backend="a", state=name) for name in STATES} == {
        name: float(name == state) for name in STATES
    }


@pytest.mark.parametrize("lifecycle", ["starting", "running", "draining"])
def test_the_lifecycle_is_one_state(app: Flask, lifecycle: str) -> None:
    app.extensions["control"].lifecycle = lifecycle
    told = samples(app)
    on = [dict(labels)["state"] for (name, labels), v in told.items() if name == "lb_lifecycle_state" and v]
    assert on == [lifecycle]


def test_waiting_in_the_queue_is_timed_for_those_who_waited(app: Flask) -> None:
    finish(app, attempt("a"))
    finish(app, attempt("a"), queued=0.3)
    finish(app, attempt("a"), queued=0.0002)
    told = samples(app)
    assert value(told, "lb_queue_duration_seconds_count") == 2
    assert value(told, "lb_queue_duration_seconds_sum") == pytest.approx(0.3002)
    assert value(told, "lb_queue_duration_seconds_bucket", le="0.1") == 1
    assert value(told, "lb_queue_duration_seconds_bucket", le="0.5") == 2


def test_a_bound_belongs_to_its_bucket(app: Flask) -> None:
    for bound in BUCKETS:
        finish(app, attempt("a"), seconds=bound)
    finish(app, attempt("a"), seconds=10.001)
    told = samples(app)
    for number, bound in enumerate(BUCKETS, start=1):
        assert value(told, "lb_request_duration_seconds_bucket", le=str(bound)) == number
        assert value(told, "lb_backend_request_duration_seconds_bucket", le=str(bound), backend="a") == number
    assert value(told, "lb_request_duration_seconds_bucket", le="+Inf") == len(BUCKETS) + 1


def test_every_bucket_shown_is_one_that_is_counted() -> None:
    assert {*BUCKETS, *QUEUE_BUCKETS} <= {*ROUND_BOUNDS} <= {*BOUNDS}
    assert all(after / before <= 1.15 + 1e-9 for before, after in zip(BOUNDS, BOUNDS[1:], strict=False))


def test_a_retry_counts_for_both_backends(app: Flask) -> None:
    failed = attempt("a", "http_response_timeout", 0.001, "slow")
    finish(app, failed, attempt("b", "200"))
    told = samples(app)
    assert value(told, "lb_backend_requests_total", backend="a", code="none") == 1
    assert value(told, "lb_backend_requests_total", backend="b", code="200") == 1
    assert value(told, "lb_backend_errors_total", backend="a", reason="http_response_timeout") == 1
    assert value(told, "lb_backend_connections_opened_total", backend="a") == 1
    assert value(told, "lb_backend_connections_reused_total", backend="b") == 1
    assert value(told, "lb_retries_total", reason="http_response_timeout") == 1
    assert value(told, "lb_request_errors_total", reason="http_response_timeout") == 0  # the client saw none


def test_a_client_that_leaves_is_no_fault_of_the_backend(app: Flask) -> None:
    finish(app, attempt("a", ""), status=499, complete=False, reason="client_gone")
    finish(app, attempt("a", "200"), status=499, complete=False, reason="client_gone")
    told = samples(app)
    assert sum(v for (name, _), v in told.items() if name == "lb_backend_errors_total") == 0
    assert value(told, "lb_request_errors_total", reason="client_gone") == 2
    assert value(told, "lb_requests_total", code="499", method="GET") == 2


def test_known_reasons_start_at_zero(app: Flask) -> None:
    told = samples(app)
    assert {dict(labels)["reason"] for name, labels in told if name == "lb_request_errors_total"} == {*REASONS}
    assert {dict(labels)["reason"] for name, labels in told if name == "lb_retries_total"} == {*BACKEND_REASONS}
    assert {"connection_refused", "client_gone", "destination_unavailable", "proxy_loop_detected"} <= {*REASONS}
    assert {dict(labels)["kind"] for name, labels in told if name == "lb_events_total"} == {*EVENT_KINDS}


def test_every_kind_of_event_in_the_code_is_known() -> None:
    sources = [ROOT / "load_balancer.py", *(ROOT / "balancer").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    used = set(re.findall(r'(?:_note|events\.add|\badd)\(\s*"([a-z]+_[a-z_]+|draining)"', text))
    assert {"backend_up", "config_refused", "draining", "statistics_reset"} <= used
    assert used <= {*EVENT_KINDS}


def test_more_former_backends_than_are_kept_drop_the_oldest(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.observe.statistics.FORMER_KEPT", 3)
    monkeypatch.setattr("balancer.balancing.members.FORMER_KEPT", 3)
    control = app.extensions["control"]
    for number in range(6):
        control.pool.add(f"n{number}", Origin.parse("http://127.0.0.1:9"))
        finish(app, attempt(f"n{number}"))
        control.pool.remove(f"n{number}")
    lifetime = control.statistics.lifetime()
    assert {"n4", "n5"} <= set(lifetime.counters) and "n0" not in lifetime.counters
    assert "n0" not in lifetime.totals.backends and "n5" in lifetime.totals.backends
    assert value(samples(app), "lb_requests_total", code="200", method="GET") == 6
    control.pool.restore_counts({f"m{number}": BackendCounts() for number in range(6)})  # nor after a restart
    assert [*control.pool.kept_counts()][:3] == ["m3", "m4", "m5"]


def test_totals_are_exact_whatever_threads_do(app: Flask) -> None:
    def work(backend: str) -> None:
        for number in range(500):
            finish(app, attempt(backend, "200" if number % 5 else "503", None if number % 2 else 0.001))

    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(work, backend) for backend in ("a", "b", "a", "b")]
        before: dict[Key, float] = {}
        while not all(job.done() for job in jobs):
            told = samples(app)
            assert_none_fell(before, told)
            before = told
        for job in jobs:
            job.result()
    told = samples(app)
    for backend in ("a", "b"):
        assert value(told, "lb_backend_requests_total", backend=backend, code="200") == 800
        assert value(told, "lb_backend_requests_total", backend=backend, code="503") == 200
        assert value(told, "lb_backend_connections_opened_total", backend=backend) == 500
        assert value(told, "lb_backend_request_duration_seconds_count", backend=backend) == 1000
    assert value(told, "lb_request_duration_seconds_count") == 2000


# How long a backend was down.


def test_downtime_counts_while_it_is_down_and_goes_on_where_it_was() -> None:
    clock = Clock(100.0)
    pool = BackendPool(create("round_robin"), options(PoolOptions), clock=clock, wall_clock=clock)
    origin = Origin.parse("http://127.0.0.1:9")

    def check(error: str | None) -> None:
        for _ in range(2):
            pool.record_check(pool.backends()[0], LastCheck(clock.now, 0.001, None, error))

    def counts() -> BackendCounts:
        return pool.counts()["a"]

    pool.add("a", origin)
    check(None)
    clock.now = 110.0
    assert (counts().down_seconds, counts().ups, counts().downs) == (0.0, 1, 0)
    check("no answer")
    clock.now = 125.0
    assert (counts().down_seconds, counts().downs) == (15.0, 1)
    check(None)
    clock.now = 200.0
    assert (counts().down_seconds, counts().ups) == (15.0, 2)
    check("no answer")
    clock.now = 205.0
    pool.remove("a")
    clock.now = 300.0
    pool.add("a", origin)
    assert (counts().down_seconds, counts().downs, counts().checks, counts().failed_checks) == (20.0, 2, 8, 4)
    check("no answer")
    clock.now = 301.0
    assert counts().down_seconds == 21.0


def test_a_backend_that_moves_while_it_is_down_is_not_down_any_more() -> None:
    clock = Clock(100.0)
    pool = BackendPool(create("round_robin"), options(PoolOptions), clock=clock, wall_clock=clock)
    backend = pool.add("a", Origin.parse("http://127.0.0.1:9"))
    pool.record_check(backend, LastCheck(100.0, 0.001, None, "no answer"))
    clock.now = 104.0
    pool.update("a", {"origin": Origin.parse("http://127.0.0.1:10")})
    clock.now = 150.0
    assert pool.counts()["a"].down_seconds == 4.0
