"""The plugin for pytest, by its own fixtures; tests/test_install.py has pytest find them, and shows its report."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable

import pytest
from support import connect, exchange, fetch, get, read_all, wait_until

from balancer import LoadBalancer
from balancer.testing import Backend

Make = Callable[..., Backend]
Start = Callable[..., LoadBalancer]


def test_a_balancer_in_front_of_backends_by_their_ids(load_balancer: Start, backend_factory: Make) -> None:
    blue, green = backend_factory("blue", body=b"blue"), backend_factory(body=b"green")
    lb = load_balancer([blue, green], algorithm="round_robin")
    wait_until(lambda: all(backend.health.status == "up" for backend in lb.pool.backends()))
    assert [backend.id for backend in lb.pool.backends()] == ["blue", "backend_2"]
    assert {fetch(lb.url)[2] for _ in range(2)} == {b"blue", b"green"}
    assert (len(blue.received), len(green.received)) == (1, 1)


def test_one_backend_needs_no_list(load_balancer: Start, backend_factory: Make) -> None:
    backend = backend_factory("only")
    for one in (backend, backend.url):
        assert fetch(load_balancer(one).url)[::2] == (200, b"ok")


def test_what_a_backend_received(load_balancer: Start, backend_factory: Make) -> None:
    backend = backend_factory()
    lb = load_balancer([backend, "spare=http://127.0.0.1:1"])
    assert fetch(f"{lb.url}/x?y=1", b"body", X_Custom="1")[0] == 200
    chunked = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    port = int(lb.url.rpartition(":")[2])
    assert exchange(port, get(b"/z", method=b"PUT").removesuffix(b"\r\n") + chunked).startswith(b"HTTP/1.1 200")
    first, second = backend.received
    assert (first.method, first.target, first.body, first.headers["x-custom"]) == ("POST", "/x?y=1", b"body", "1")
    assert (second.method, second.body) == ("PUT", b"abc")
    exchange(port, get(b"/", method=b"PROPFIND").replace(b"\r\n\r\n", b"\r\nX-Two: 1\r\nX-Two: 2\r\n\r\n"))
    third = backend.received[2]
    assert (third.method, third.headers["x-two"]) == ("PROPFIND", "2")
    assert [value for name, value in third.lines if name.lower() == "x-two"] == ["1", "2"]


def test_a_backend_changes_while_it_runs(backend_factory: Make) -> None:
    backend = backend_factory(status=503, body=b"sorry")
    assert fetch(backend.url)[::2] == (503, b"sorry")
    assert fetch(f"{backend.url}/health")[0] == 200
    backend.healthy, backend.status = False, 204
    assert fetch(f"{backend.url}/health")[0] == 503
    backend.fault, answers = "hang", []
    client = threading.Thread(target=lambda: answers.append(fetch(backend.url)[0]))
    client.start()
    wait_until(lambda: len(backend.received) == 2)
    backend.fault, backend.status = None, 200
    client.join()
    assert answers == [200]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("latency", "x"),
        ("latency", -1),
        ("latency", float("nan")),
        ("status", 100),
        ("status", 600),
        ("status", "200"),
        ("body", "text"),
        ("fault", "bogus"),
        ("healthy", "no"),
        ("health_path", "health"),
    ],
)
def test_a_wrong_value_is_refused_at_once(backend_factory: Make, name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=f"{name} = .*: expected "):
        backend_factory(**{name: wrong})
    backend = backend_factory()
    with pytest.raises(ValueError, match=f"{name} = .*: expected "):
        setattr(backend, name, wrong)
    with pytest.raises(AttributeError):
        backend.lattency = 1  # type: ignore[attr-defined]


def test_an_answer_without_content_has_none(backend_factory: Make) -> None:
    backend = backend_factory(status=204)
    head, _, rest = exchange(int(backend.url.rpartition(":")[2]), get()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 204") and b"Content-Length" not in head and not rest


def test_another_path_of_its_health_checks(load_balancer: Start, backend_factory: Make) -> None:
    backend = backend_factory(health_path="/up", healthy=False)
    lb = load_balancer(backend, health_path="/up")
    wait_until(lambda: lb.pool.backends()[0].health.status == "down")
    assert not backend.received


def test_balancers_stop_before_their_backends(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_in_this_order(load_balancer, backend_factory, _ends):
            balancer = load_balancer(backend_factory())
            _ends.backends.callback(lambda: print("stopped:", balancer._ended.is_set()))
        """
    )
    pytester.runpytest_inprocess("-p", "balancer.testing", "-s").stdout.fnmatch_lines("*stopped: True*")


@pytest.mark.parametrize("when", ["set-up", "teardown"])
def test_the_report_of_a_fixture_that_fails(pytester: pytest.Pytester, when: str) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.fixture
        def fixture(load_balancer):
            load_balancer()
            if {when == "teardown"}:
                yield
            raise ValueError

        def test_it(fixture):
            pass
        """
    )
    pytester.runpytest_inprocess("-p", "balancer.testing").stdout.fnmatch_lines("*Load balancer http://*")


def test_it_breaks_off_before_and_within_an_answer(backend_factory: Make) -> None:
    backend = backend_factory(fault="reset")
    with pytest.raises(ConnectionResetError):
        fetch(backend.url)
    backend.fault = "broken"
    with pytest.raises(http.client.IncompleteRead):
        fetch(backend.url)


def test_a_backend_that_is_closed_is_gone(backend_factory: Make) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    backend = backend_factory(fault="hang")
    port = int(backend.url.rpartition(":")[2])
    with connect(port) as client:
        client.sendall(get())
        wait_until(lambda: backend.received)
        backend.close()
        assert read_all(client) == b""
    with pytest.raises(ConnectionRefusedError), connect(port):
        pass
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
