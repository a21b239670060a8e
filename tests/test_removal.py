"""Removing and draining a backend whose requests do not end: at once, or when its time is over."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from threading import Event, Thread

import pytest
from support import Balancer, RawRequest, connect, fetch, fetch_json, get, read_all, wait_until
from test_backends import Pool
from wire import HEAD_OK, WireBackend, hang_up, post

ENDLESS = {
    "chunked": (b"Transfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n"),
    "by length": (b"Content-Length: 1000000\r\n\r\n", b"abc"),
    "until it closes": (b"\r\n", b"abc"),
}


class Endless(WireBackend):
    """Answers with a body that does not end; `framing` empty: with nothing at all."""

    framing = "chunked"

    def __init__(self) -> None:
        self.ended = Event()
        super().__init__()
        self.script = self._begin

    def _begin(self, sock: socket.socket, request: RawRequest) -> None:
        if self.framing:
            sock.sendall(HEAD_OK + b"".join(ENDLESS[self.framing]))
        sock.recv(1)  # until the balancer closes
        self.ended.set()
        hang_up(sock)


@pytest.fixture
def endless() -> Iterator[Endless]:
    with Endless() as backend:
        yield backend


@pytest.fixture
def balancer(endless: Endless, scripted: WireBackend) -> Iterator[Balancer]:
    scripted.reset()
    flags = (f"--backend=endless={endless.url}", f"--backend=other={scripted.url}@0")
    with Balancer(*flags, "--eject-after=1") as started:
        yield started


def remove_now(balancer: Balancer) -> None:
    status, _, body = fetch(f"{balancer.url}/backends/endless?force=1", method="DELETE")
    assert (status, b"1 requests in flight are cut off" in body) == (200, True)
    assert fetch(f"{balancer.url}/backends/endless")[0] == 404


def record(balancer: Balancer) -> tuple[str, bool]:
    wait_until(lambda: balancer.library.requests(1), "it is recorded")
    newest = balancer.library.requests(1)[0]
    return newest["reason"] or "", newest["complete"]


@pytest.mark.parametrize("framing", ENDLESS)
def test_removed_at_once_its_answers_break_off_and_it_is_not_to_blame(
    balancer: Balancer, endless: Endless, framing: str
) -> None:
    endless.framing = framing
    with connect(balancer.port) as client:
        client.sendall(get())
        received = b""
        while b"abc" not in received:
            received += client.recv(65536)
        remove_now(balancer)
        rest = read_all(client)
        assert not rest.endswith(b"0\r\n\r\n")
    assert endless.ended.wait(60)
    assert record(balancer) == ("backend_removed", False)
    kinds = [event["kind"] for event in balancer.library.events()]
    assert kinds[-2:] == ["backend_cut", "backend_removed"]


@pytest.mark.parametrize(("data", "status"), [(get(), b"200"), (post(b"Connection: close", body=b"x"), b"502")])
def test_what_had_no_answer_yet_goes_elsewhere_if_it_may_be_repeated(
    balancer: Balancer, endless: Endless, data: bytes, status: bytes
) -> None:
    endless.framing = ""
    with connect(balancer.port) as client:
        client.sendall(data)
        wait_until(lambda: endless.seen, "it has come")
        fetch(f"{balancer.url}/backends/other", {"weight": 1}, "PATCH")
        remove_now(balancer)
        answer = read_all(client)
    assert answer[9:12] == status and (status == b"200") == (b"taken out of service" not in answer)
    explained = balancer.library.requests(1)[0]
    assert explained["tried"][0]["outcome"] == "backend_removed" and explained["complete"]


def test_an_answer_that_its_client_does_not_read_is_ended_too(balancer: Balancer, endless: Endless) -> None:
    def flood(sock: socket.socket, request: RawRequest) -> None:
        sock.sendall(HEAD_OK + b"\r\n")
        while True:
            sock.sendall(b"x" * 65536)

    endless.script = flood
    with connect(balancer.port) as client:
        client.sendall(get())
        assert client.recv(1)
        bridge = balancer.library.bridges[0]
        wait_until(lambda: bridge._parked, "its client has to read first")
        remove_now(balancer)
        assert record(balancer) == ("backend_removed", False)


def test_a_drain_is_over_after_its_time_and_the_backend_may_come_back(balancer: Balancer, endless: Endless) -> None:
    url = f"{balancer.url}/backends/endless"
    assert fetch_json(url)["drain_timeout"] is None
    with connect(balancer.port) as client:
        client.sendall(get())
        assert client.recv(1)
        changed = fetch_json(url, {"drain_timeout": 0.1, "admin_state": "drain"}, "PATCH")
        assert (changed["drain_timeout"], changed["state"]) == (0.1, "drain")
        assert not read_all(client).endswith(b"0\r\n\r\n")
    wait_until(lambda: fetch_json(url)["state"] == "drained", "it has nothing in flight")
    assert record(balancer) == ("backend_removed", False)
    assert fetch_json(url, {"admin_state": "ready"}, "PATCH")["ejection"]["status"] == "none"
    endless.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert fetch(balancer.url)[0] == 200


@pytest.mark.parametrize("query", ["force=2", "force=yes", "force=", "forced=1"])
def test_a_slip_of_the_pen_removes_nothing(balancer: Balancer, query: str) -> None:
    assert fetch(f"{balancer.url}/backends/endless?{query}", method="DELETE")[0] == 400
    assert fetch(f"{balancer.url}/backends/endless")[0] == 200


@pytest.mark.parametrize(
    ("settings", "own", "seconds"),
    [({}, None, 300), ({"backend_drain_timeout": 7}, None, 7), ({}, 3, 3), ({"backend_drain_timeout": 0}, None, 0)],
)
@pytest.mark.parametrize("leave", [Pool.remove, lambda pool, it: pool.update(it, {"admin_state": "maint"})])
def test_time_counts_from_the_moment_it_is_taken_out(
    leave: Callable[[Pool, str], object], settings: dict[str, float], own: float | None, seconds: float
) -> None:
    pool, cut = Pool(**settings), []
    pool.cut_off = lambda backend: cut.append(backend.id)
    pool.add_up("a")
    pool.update("a", {"drain_timeout": own})
    lease = pool.lease(None)
    pool.now += 1000
    leave(pool, "a")
    pool.now += (seconds or 10_000) - 0.001
    pool.sweep()
    assert cut == []
    pool.now += 0.001
    pool.sweep()
    assert cut == (["a"] if seconds else [])
    lease.release()
    pool.sweep()
    assert len(cut) <= 1


def test_what_had_just_begun_there_is_ended_at_the_next_look() -> None:
    pool, cut = Pool(), []
    pool.cut_off = lambda backend: cut.append(backend)
    former = pool.add_up("a")
    lease = pool.lease(None)
    assert (pool.remove("a", at_once=True), pool.ids()) == (1, [])
    pool.add_up("a")
    pool.sweep()
    assert cut == [former, former]
    lease.release()
    pool.sweep()
    assert len(cut) == 2


def test_removing_at_once_while_many_are_under_way_leaves_nothing_behind(balancer: Balancer, endless: Endless) -> None:
    endless.framing = ""

    def ask() -> None:
        fetch(balancer.url, b"x")

    threads = [Thread(target=ask, name="asker") for _ in range(30)]
    for thread in threads:
        thread.start()
    wait_until(lambda: endless.seen, "some have come")
    fetch(f"{balancer.url}/backends/endless?force=1", method="DELETE")
    for thread in threads:
        thread.join(60)
    wait_until(lambda: not balancer.library.bridges[0].calls, "none is in flight")
