"""The balancer in a program of yours: no process, no signals; it starts soon, and ends whole whatever clients do."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import PYTHON, ROOT, connect, fetch, get, ok, read_all, wait_until
from wire import WireBackend

import balancer
from balancer import Filter, LoadBalancer, SettingsError, loadbalancer
from balancer.config.settings import Settings
from balancer.config.values import BackendSettings

LONG = 5000 * "x"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # and empty SETTINGS


@pytest.fixture(scope="module", autouse=True)
def once() -> None:
    """What the first balancer of a process opens for good, such as uvloop's pipe, is no leak of the next."""
    with LoadBalancer(["http://127.0.0.1:1"]):
        pass


@pytest.fixture
def second() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        yield backend


def held() -> tuple[int, int]:
    """Threads of this process, native ones too, and its descriptors."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def nothing_is_left(before: tuple[int, int]) -> None:
    """Granian's threads are native: they end by themselves, a moment after the last connection."""
    wait_until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), what="nothing is left")


def test_it_serves_within_a_with_block(scripted: WireBackend) -> None:
    scripted.reset()
    with LoadBalancer([scripted.url]) as lb:
        assert fetch(f"{lb.url}/x")[::2] == (200, b"ok")
        assert fetch(f"{lb.url}/livez")[0] == 200
        wait_until(lambda: lb.requests(1))
    with pytest.raises(OSError):
        fetch(f"{lb.url}/x")
    (why,) = lb.requests(1)  # what it did can still be asked for
    assert (why["path"], why["status"], why["tried"][0]["backend"]) == ("/x", 200, "backend_1")
    assert [event["kind"] for event in lb.events()] == ["backend_up", "draining"]


def test_backends_in_every_form() -> None:
    forms = ["http://127.0.0.1:1", "b=http://127.0.0.1:2@3", {"id": "c", "url": "http://127.0.0.1:3"}]
    lb = LoadBalancer([*forms, BackendSettings(id="d", url="http://127.0.0.1:4")], slow_start=3)
    shown = [(each.id, each.origin.url, each.weight) for each in lb.pool.backends()]
    assert shown == [
        ("backend_1", "http://127.0.0.1:1", 1),
        ("b", "http://127.0.0.1:2", 3),
        ("c", "http://127.0.0.1:3", 1),
        ("d", "http://127.0.0.1:4", 1),
    ]
    assert (lb.settings.slow_start, lb.settings.port, lb.settings.host) == (3.0, 0, "127.0.0.1")
    alone = ["http://127.0.0.1:1", {"url": "http://127.0.0.1:1"}, BackendSettings(url="http://127.0.0.1:1")]
    for one in alone:
        assert [each.origin.url for each in LoadBalancer(one).pool.backends()] == ["http://127.0.0.1:1"]
    assert not LoadBalancer(None, filters=None).pool.backends()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"port": "x"}, ["port", "'x'", "program"]),
        ({"algoritm": "weighted"}, ["algoritm", "did you mean algorithm?"]),
        ({"nonsense": 1}, ["nonsense", "docs/settings.md"]),
        ({"algorithm": "fastest"}, ["fastest", "round_robin"]),
        ({"algorithm": LONG}, ["xxx...'", "round_robin"]),
        ({"ca_file": LONG}, ["xxx...'", "PEM"]),
        ({"backends": ["nowhere"]}, ["nowhere", "http://HOST:PORT"]),
        ({"backends": [LONG]}, ["xxx...'", "http://HOST:PORT"]),
        ({"backends": 5}, ["backends", "5", "url"]),
        ({"backends": [None]}, ["backends.0", "url"]),
        ({"filters": Filter()}, ["filters", "a list of Filter objects"]),
        ({"filters": [Filter]}, ["filters", "a list of Filter objects"]),
        ({"filters": [None]}, ["filters", "[None]", "a list of Filter objects"]),
        ({"filters": "abc"}, ["filters", "'abc'", "a list of Filter objects"]),
        ({"config": "x.toml"}, ["config", "'x.toml'", "Settings"]),
        (
            {"config": Settings(), "backends": [], "retries": 9, "nonsense": 1},
            ["config", "backends, retries, nonsense"],
        ),
    ],
)
def test_a_wrong_setting_is_one_line(wrong: dict[str, object], named: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        LoadBalancer(**wrong)  # type: ignore[arg-type]
    told = str(error.value)
    assert all(word in told for word in named) and "\n" not in told and "--" not in told and len(told) < 500


@pytest.mark.parametrize("wrong", ["x", float("nan"), -1, None])
def test_a_wrong_argument_is_one_line(wrong: Any) -> None:
    with LoadBalancer() as lb:
        with pytest.raises(SettingsError, match="timeout = .*: expected a number of seconds, 0 or more"):
            lb.stop(wrong)
        with pytest.raises(SettingsError, match="recent = .*: expected a whole number, 0 or more"):
            lb.requests(wrong)
        with pytest.raises(SettingsError, match="no configuration file to reload$"):
            lb.reload()


def test_neither_the_environment_nor_the_process_is_touched(
    scripted: WireBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LB_ALGORITHM", "fastest")

    def settings_of_the_process() -> list[object]:
        signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        root = logging.getLogger()
        return [signals, os.sched_getaffinity(0), gc.get_threshold(), gc.get_freeze_count(), root.level, root.handlers]

    before = settings_of_the_process()
    with LoadBalancer([scripted.url]) as lb:
        assert fetch(lb.url)[0] == 200
        assert settings_of_the_process() == before
    assert settings_of_the_process() == before


def test_a_taken_port_is_named_and_nothing_stays_open(scripted: WireBackend) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, before = taken.getsockname()[1], held()
        lb = LoadBalancer([scripted.url], control_port=port)
        with pytest.raises(SettingsError, match=f"port {port} on 127.0.0.1 is in use"):
            lb.start()
        lb.stop()
        nothing_is_left(before)


def test_it_starts_once() -> None:
    lb = LoadBalancer()
    with pytest.raises(RuntimeError, match=r"start\(\) comes first"):
        lb.url  # noqa: B018
    with lb:
        with pytest.raises(RuntimeError, match="make a new one"):
            lb.start()
    lb.stop()
    lb.stop()  # again does nothing
    with pytest.raises(RuntimeError, match="make a new one"):
        lb.start()
    never = LoadBalancer()
    never.stop()
    with pytest.raises(RuntimeError, match="make a new one"):
        never.start()


def test_start_and_serve_exclude_each_other() -> None:
    with LoadBalancer() as lb:
        with pytest.raises(RuntimeError, match="starts or serves once; make a new one"):
            lb.serve()
        assert fetch(f"{lb.url}/livez")[0] == 200


def test_of_many_starts_at_once_one_succeeds() -> None:
    lb, together = LoadBalancer(), threading.Barrier(4)

    def start(_: int) -> bool:
        together.wait(60)
        try:
            lb.start()
        except RuntimeError as error:
            assert "make a new one" in str(error)
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(start, range(4))) == [False, False, False, True]
    assert fetch(f"{lb.url}/livez")[0] == 200
    lb.stop()


def test_it_can_be_stopped_before_its_thread_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(threading.Thread):
        def start(self) -> None:
            lb.stop()
            super().start()

    before, lb = held(), LoadBalancer()
    monkeypatch.setattr(loadbalancer, "Thread", Late)
    with pytest.raises(RuntimeError, match="make a new one"):
        lb.start()
    nothing_is_left(before)


def test_it_can_be_stopped_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    before, lb = held(), LoadBalancer()
    starting, go, start_parts = threading.Event(), threading.Event(), lb.start_parts

    def slowly() -> None:
        starting.set()
        go.wait(60)
        start_parts()

    monkeypatch.setattr(lb, "start_parts", slowly)
    with ThreadPoolExecutor(2) as pool:
        started = pool.submit(lb.start)
        starting.wait(60)
        stopped = pool.submit(lb.stop)
        wait_until(lambda: lb._ending.done())
        go.set()
        assert (started.result(60), stopped.result(60)) == (lb, None)
    nothing_is_left(before)


def interrupt() -> None:
    """Ctrl-C."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_a_start_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, lb = held(), LoadBalancer()
    start_parts = lb.start_parts

    def interrupted() -> None:
        interrupt()
        assert lb._ending.result(60) == 0
        start_parts()

    monkeypatch.setattr(lb, "start_parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lb.start()
    nothing_is_left(before)


def test_the_next_stop_waits_for_one_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    before, lb, go = held(), LoadBalancer(), threading.Event()
    stop_parts = lb.stop_parts

    def interrupted() -> None:
        interrupt()
        go.wait(60)
        stop_parts()

    monkeypatch.setattr(lb, "stop_parts", interrupted)
    lb.start()
    with pytest.raises(KeyboardInterrupt):
        lb.stop()
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(lb.stop)
        with pytest.raises(TimeoutError):
            again.result(0.1)
        go.set()
        again.result(60)
    assert "load-balancer" not in [thread.name for thread in threading.enumerate()]
    nothing_is_left(before)


@pytest.mark.parametrize("begin", ["listen", "start"])
def test_what_was_closed_is_not_closed_again(begin: str) -> None:
    lb = LoadBalancer()
    getattr(lb, begin)()
    lb.stop()
    others = [os.eventfd(0) for _ in range(32)]
    lb.stop()
    lb.stop_parts()
    for other in others:
        os.close(other)


def test_a_stop_after_serve_closes_nothing_of_others() -> None:
    program = """
import gc, os, signal, threading
from balancer import LoadBalancer
from urllib.request import urlopen
gc.disable()  # as the command has it until it serves
lb = LoadBalancer()
lb.listen()
def end():
    print(urlopen(lb.url + "/livez").status)
    try:
        lb.stop()
    except RuntimeError as error:
        print(error)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end).start()
print(lb.serve(), gc.isenabled())
others = [os.eventfd(0) for _ in range(32)]
lb.stop()
for other in others:
    os.close(other)
"""
    done = subprocess.run([PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    told = "serve() has this process, and ends by a signal such as SIGTERM"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"200\n{told}\n0 True\n", "")


def test_several_at_once_in_one_thread_and_in_others(scripted: WireBackend, second: WireBackend) -> None:
    scripted.reset()
    second.script = lambda sock, request: sock.sendall(ok(b"second"))
    with LoadBalancer([scripted.url]) as one, LoadBalancer([second.url]) as other:
        assert (fetch(one.url)[2], fetch(other.url)[2]) == (b"ok", b"second")
        answers: list[bytes] = []

        def run() -> None:
            with LoadBalancer([second.url]) as lb:
                answers.append(fetch(lb.url)[2])

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [b"second", b"second"]
        one.stop()
        assert fetch(other.url)[2] == b"second"


def test_it_runs_beside_an_event_loop(scripted: WireBackend) -> None:
    async def use() -> int:
        with LoadBalancer([scripted.url]) as lb:
            return (await asyncio.to_thread(fetch, lb.url))[0]

    assert asyncio.run(use()) == 200


def test_a_middleware_sees_every_request(scripted: WireBackend) -> None:
    lb, seen = LoadBalancer([scripted.url]), []
    inner = lb.app.wsgi_app

    def middleware(environ, start_response):  # type: ignore[no-untyped-def]
        seen.append(environ["PATH_INFO"])
        return inner(environ, start_response)

    lb.app.wsgi_app = middleware  # type: ignore[method-assign]
    with lb:
        assert fetch(f"{lb.url}/x")[0] == 200
    assert seen == ["/x"]


# How it ends.


def endless(sock: socket.socket, request: object) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        sock.sendall(b"x" * 65536)


def silent(sock: socket.socket, request: object) -> None:
    sock.recv(1)


CLIENTS: dict[str, tuple[bytes, Callable[[socket.socket, object], None]]] = {
    "connected and silent": (b"", silent),
    "in the middle of a head": (b"GET / HTTP/1.1\r\nHost: te", silent),
    "HTTP/2": (PREFACE, silent),
    "a kept connection": (b"GET / HTTP/1.1\r\nHost: test\r\n\r\n", lambda sock, request: sock.sendall(ok())),
    "a backend that does not answer": (get(), silent),
    "an endless answer": (get(), endless),  # which nobody reads: its call is parked
    "an upload": (b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\nx", silent),
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_it_ends_whole_whatever_a_client_does(second: WireBackend, kind: str) -> None:
    sent, second.script = CLIENTS[kind]
    before, threads = held(), set(threading.enumerate())
    lb = LoadBalancer([second.url]).start()
    with connect(int(lb.url.rpartition(":")[2])) as client:
        client.sendall(sent)
        if sent.startswith((b"GET", b"POST")) and b"\r\n\r\n" in sent:
            wait_until(lambda: second.requests or lb.bridges[0].active)
        if kind == "an endless answer":
            wait_until(lambda: lb.bridges[0]._parked, what="its client reads nothing")
        lb.stop(timeout=0.1)
        assert not [new.name for new in set(threading.enumerate()) - threads if "scripted" not in new.name]
        read_all(client)  # until it is closed
    nothing_is_left(before)


def test_what_is_in_flight_is_finished(second: WireBackend) -> None:
    go = second.hold()
    lb = LoadBalancer([second.url]).start()
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(fetch, f"{lb.url}/x")
        wait_until(lambda: second.requests)
        stopped = threads.submit(lb.stop, 600.0)
        wait_until(lambda: lb.control.lifecycle == "draining")
        go.set()
        stopped.result(60)
        assert answer.result(60)[2] == b"/x"


def test_the_shortest_time_to_stop_counts(second: WireBackend) -> None:
    second.script = silent
    lb = LoadBalancer([second.url]).start()
    with connect(int(lb.url.rpartition(":")[2])) as client, ThreadPoolExecutor(1) as pool:
        client.sendall(get())
        wait_until(lambda: second.requests)
        first = pool.submit(lb.stop, 10_000)
        wait_until(lambda: lb.control.lifecycle == "draining")
        lb.stop(0)
        first.result(60)


def test_twenty_starts_leave_nothing_and_are_quick(scripted: WireBackend) -> None:
    scripted.reset()
    seconds = []

    def once() -> None:
        began = time.monotonic()
        with LoadBalancer([scripted.url]) as lb:
            assert fetch(lb.url)[0] == 200
            seconds.append(time.monotonic() - began)

    once()
    wait_until(lambda: len(scripted.open) == 0)
    before, names = held(), [thread.name for thread in threading.enumerate()]
    for _ in range(20):
        once()
    nothing_is_left(before)
    assert [thread.name for thread in threading.enumerate()] == names
    assert min(seconds) < 0.2  # from start to the answer; the best, for the machine may be busy


def test_a_program_that_forgets_to_stop_it_ends_all_the_same(scripted: WireBackend) -> None:
    program = f"""
from balancer import LoadBalancer
from urllib.request import urlopen
lb = LoadBalancer([{scripted.url!r}]).start()
print(urlopen(lb.url).status)
"""
    done = subprocess.run([PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n", "")


def test_the_face_is_cheap_and_names_what_it_has() -> None:
    program = "import sys, balancer; print(sorted(name for name in sys.modules if name.startswith('balancer')))"
    done = subprocess.run([PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "['balancer']\n"
    assert all(getattr(balancer, name) for name in balancer.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        balancer.nonsense  # type: ignore[attr-defined]  # noqa: B018
