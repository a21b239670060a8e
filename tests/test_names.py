"""How backends are found, and what they are called: names, addresses, Host."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support import Balancer, Clock, RawRequest, exchange, fetch, fetch_json, free_port, get, ok, wait_until
from test_http2 import curl
from wire import WireBackend

from balancer.errors import ConnectFailed, ConnectTimedOut
from balancer.protocol.origin import Origin
from balancer.upstream.dialer import in_turns
from balancer.upstream.names import FRESH_SECONDS, KEPT_SECONDS, MOST_THREADS, Names
from balancer.upstream.transport import BackendAdapter, OutgoingRequest, Timeouts

SERVFAIL = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
NXDOMAIN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
QUICK = Timeouts(0.5, 0.5, 0.5, pool_idle_timeout=4)
Answer = list[str] | socket.gaierror


class NameServer:
    """Answers for names that end in `.test` or in a dot; `silence` keeps its answers back until it is cleared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.speaks = threading.Event()
        self.speaks.set()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: str, port: int, *args: Any, **named: Any) -> Any:
        if not host.endswith((".test", ".")):
            return self._real(host, port, *args, **named)
        self.asked.append(host)
        self.speaks.wait(60)
        answer = self.answers[host]
        if isinstance(answer, socket.gaierror):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answer]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer(monkeypatch)
    yield server
    server.speaks.set()
    wait_until(lambda: not any(thread.name == "names" for thread in threading.enumerate()))


@pytest.fixture
def backend() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        yield backend


def ask(adapter: BackendAdapter, url: str, request: OutgoingRequest | None = None) -> bytes:
    request = request or OutgoingRequest("GET", b"/", [(b"host", b"test")])
    return adapter.exchange(request, Origin.parse(url)).body.read()


def test_a_name_server_that_fails_costs_no_request(server: NameServer, backend: WireBackend) -> None:
    """It cannot be asked, which says nothing of the backend: its last good address stays in use."""
    server.answers["svc.test"] = ["127.0.0.1"]
    backend.answer(ok(), close=True)  # so that each request needs a connection
    with Balancer(f"--backend=svc=http://svc.test:{backend.port}") as balancer:
        server.answers["svc.test"] = SERVFAIL
        (event,) = wait_until(lambda: named(balancer, "name_kept"))
        assert "svc.test: Temporary failure" in event["message"] and "s ago stays in use: 127.0.0.1" in event["message"]
        checks = len(server.asked) + 2
        while len(server.asked) < checks:
            assert fetch(f"{balancer.url}/x")[0] == 200
        assert named(balancer, "backend_down") == []
        server.answers["svc.test"] = ["127.0.0.1"]
        wait_until(lambda: named(balancer, "name_found"))


def named(balancer: Balancer, kind: str) -> list[dict[str, Any]]:
    return [event for event in fetch_json(f"{balancer.url}/events")["events"] if event["kind"] == kind]


def test_an_answer_is_used_until_there_is_another(server: NameServer) -> None:
    clock = Clock()
    names = Names(clock=clock)

    def found(after: float, answer: Answer) -> list[str]:
        """What is found once that answer is here."""
        server.answers["svc.test"], asked = answer, len(server.asked)
        clock.now += after
        with suppress(OSError):
            names.find("svc.test", 80, 5)
        wait_until(lambda: names._threads == 0)
        if after > FRESH_SECONDS:
            assert len(server.asked) > asked
        return [address[0] for _, address in names.find("svc.test", 80, 5)]

    assert found(0, ["10.0.0.1", "10.0.0.2"]) == ["10.0.0.1", "10.0.0.2"]
    assert found(FRESH_SECONDS / 2, ["10.0.0.3"]) == ["10.0.0.1", "10.0.0.2"]  # it is not asked again for each request
    assert found(FRESH_SECONDS * 2, ["10.0.0.3"]) == ["10.0.0.3"]  # a name that moves is followed
    assert found(FRESH_SECONDS * 2, SERVFAIL) == ["10.0.0.3"]
    with pytest.raises(OSError, match="not known"):  # "there is none" is an answer
        found(FRESH_SECONDS * 2, NXDOMAIN)
    assert found(FRESH_SECONDS * 2, ["10.0.0.4"]) == ["10.0.0.4"]
    with pytest.raises(OSError, match="Temporary"):
        found(KEPT_SECONDS * 2, SERVFAIL)


def test_a_silent_name_server_holds_nobody_for_longer_than_the_limit(server: NameServer, backend: WireBackend) -> None:
    server.answers = {f"{number}.test": ["127.0.0.1"] for number in range(3 * MOST_THREADS)}
    adapter = BackendAdapter(QUICK)
    assert ask(adapter, f"http://0.test:{backend.port}") == b"ok"
    adapter.close()
    server.speaks.clear()
    started = time.monotonic()
    asking = [threading.Thread(target=refused, args=(adapter, f"http://{host}:1")) for host in list(server.answers)[1:]]
    for thread in asking:
        thread.start()
    assert ask(adapter, f"http://127.0.0.1:{backend.port}") == b"ok"  # who has an address asks nobody
    assert ask(adapter, f"http://0.test:{backend.port}") == b"ok"  # nor waits long who knows one
    for thread in asking:
        thread.join()
    assert time.monotonic() - started < 11  # one after the other it would be 12 s
    assert sum(thread.name == "names" for thread in threading.enumerate()) <= MOST_THREADS
    adapter.close()


def refused(adapter: BackendAdapter, url: str) -> None:
    with pytest.raises(ConnectTimedOut, match="test:1 was not resolved within 0.5 s"):
        ask(adapter, url)


@contextmanager
def swallowing(addresses: list[str], port: int) -> Iterator[None]:
    """Nothing answers there: the kernel drops what comes for a listener whose queue is full."""
    with ExitStack() as stack:
        for address in addresses:
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(0)
            for _ in range(4):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                with suppress(BlockingIOError):
                    sock.connect((address, port))
        yield


def test_a_dead_address_costs_a_moment_and_no_more(server: NameServer, backend: WireBackend) -> None:
    server.answers["svc.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    adapter = BackendAdapter(Timeouts(40, 5, 5, 4))
    with swallowing(["127.0.0.2"], backend.port):
        request = OutgoingRequest("GET", b"/", [(b"host", b"test")])
        assert ask(adapter, f"http://svc.test:{backend.port}", request) == b"ok"
        assert (
            request.connect_seconds is not None and request.connect_seconds < 20
        )  # of 40 s; 0.25 s on a quiet machine
    adapter.close()


def test_the_limit_for_connecting_is_one_for_all_addresses(server: NameServer) -> None:
    server.answers["svc.test"] = dead = [f"127.0.0.{number}" for number in range(2, 6)]
    adapter, port = BackendAdapter(Timeouts(1, 5, 5, 4)), free_port()
    with swallowing(dead, port):
        started = time.monotonic()
        with pytest.raises(ConnectTimedOut, match="did not accept within 1 s"):
            ask(adapter, f"http://svc.test:{port}")
        assert 0.9 < time.monotonic() - started < 3.9  # not 4 x 1 s


def test_closed_ports_of_all_addresses_are_a_refusal(server: NameServer) -> None:
    server.answers["svc.test"] = ["127.0.0.2", "127.0.0.3"]
    with pytest.raises(ConnectFailed) as caught:
        ask(BackendAdapter(QUICK), f"http://svc.test:{free_port()}")
    assert caught.value.refused


def test_families_take_turns() -> None:
    """RFC 8305 section 4."""
    six, four = (socket.AF_INET6, socket.AF_INET)
    addresses: list[Any] = [(six, "a"), (six, "b"), (six, "c"), (four, "d")]
    assert [address for _, address in in_turns(addresses)] == ["a", "d", "b", "c"]


# Host.


def test_backends_and_checks_get_the_host_that_is_set(backend: WireBackend, tmp_path: Path) -> None:
    file, asked = tmp_path / "balancer.toml", Hosts(backend)
    settings = f'control_reads = "open"\nhealth_path = "/check"\nbackends = ["only={backend.url}"]\n'
    file.write_text(settings)
    with Balancer(f"--config={file}") as balancer:
        assert asked.checks() == {f"127.0.0.1:{backend.port}".encode()}
        assert asked.after(lambda: exchange(balancer.port, get(b"/x"))) == [b"test"]
        file.write_text(f'{settings}backend_host = "api.example"\nhealth_host = "health.example:81"\n')
        assert fetch(f"{balancer.url}/reload", {}, "POST")[0] == 200
        for data in (get(b"/x"), b"GET /x HTTP/1.0\r\n\r\n", get(b"/x", method=b"OPTIONS")):
            assert asked.after(lambda data=data: exchange(balancer.port, data)) == [b"api.example"]
        assert asked.after(lambda: curl(balancer, path="/x")) == [b"api.example"]
        assert asked.newest(b"/x").values(b"x-forwarded-host") == [f"127.0.0.1:{balancer.port}".encode()]
        wait_until(lambda: asked.checks() == {b"health.example:81"})


class Hosts:
    """The `Host` lines that a backend gets."""

    def __init__(self, backend: WireBackend) -> None:
        self._requests = backend.requests

    def checks(self) -> set[bytes]:
        """Of the newest check."""
        return set(self.newest(b"/check").values(b"host"))

    def after(self, act: Callable[[], object]) -> list[bytes]:
        act()
        return self.newest(b"/x").values(b"host")

    def newest(self, target: bytes) -> RawRequest:
        return next(request for request in reversed(self._requests) if request.target == target)
