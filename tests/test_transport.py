"""BackendAdapter by itself and mounted in a requests.Session: what `requests` promises, the pool, TLS."""

from __future__ import annotations

import itertools
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from support import Clock, RawRequest, free_port, ok, wait_until
from wire import MIB, WireBackend, hang_up, wait_closed

from balancer.errors import (
    ConnectFailed,
    ConnectionLost,
    ConnectTimedOut,
    ResponseTimedOut,
)
from balancer.protocol.messages import Line
from balancer.protocol.origin import Origin
from balancer.upstream.connection import Connection
from balancer.upstream.dialer import Dialer, tls_context
from balancer.upstream.transport import BackendAdapter, OutgoingRequest, Timeouts

HOST: Line = (b"host", b"test")
PATIENT, QUICK = Timeouts(60, 60, 60, pool_idle_timeout=4), Timeouts(0.5, 0.5, 0.5, pool_idle_timeout=4)


@pytest.fixture(scope="module")
def started() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        yield backend


@pytest.fixture
def backend(started: WireBackend) -> WireBackend:
    started.reset()
    return started


@pytest.fixture
def adapter() -> Iterator[BackendAdapter]:
    made = BackendAdapter(PATIENT)
    yield made
    made.close()


@pytest.fixture
def session(adapter: BackendAdapter) -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.mount("http://", adapter)
        yield made


def outgoing(
    method: str = "GET", target: bytes = b"/", *lines: Line, body: Any = None, length: int | None = None
) -> OutgoingRequest:
    request = OutgoingRequest(method, target, [HOST, *lines])
    if body is not None:
        request.set_body(body, length)
    return request


def fetch(adapter: BackendAdapter, url: str, request: OutgoingRequest | None = None) -> bytes:
    """One exchange, read to its end and closed."""
    response = adapter.exchange(request or outgoing(), Origin.parse(url))
    try:
        return response.body.read()
    finally:
        response.body.close()


# By itself.


def test_the_request_goes_out_as_it_is(adapter: BackendAdapter, backend: WireBackend) -> None:
    fetch(adapter, backend.url, outgoing("PURGE", b"//a%2Fb?%00", (b"x-a", b"1"), (b"x-b", b"caf\xe9"), (b"x-a", b"2")))
    head = b"PURGE //a%2Fb?%00 HTTP/1.1\r\nhost: test\r\nx-a: 1\r\nx-b: caf\xe9\r\nx-a: 2\r\n\r\n"
    assert backend.requests[0].head == head


@pytest.mark.parametrize(
    ("body", "length", "framing"),
    [
        (None, None, b"content-length: 0\r\n"),
        (b"", None, b"content-length: 0\r\n"),
        (b"abc", None, b"content-length: 3\r\n"),
        (iter([b"ab", b"", b"c"]), None, b"transfer-encoding: chunked\r\n"),
        (iter([b"ab", b"c"]), 3, b"content-length: 3\r\n"),
        (iter([]), None, b"transfer-encoding: chunked\r\n"),
    ],
)
def test_framing_is_added_here(
    adapter: BackendAdapter, backend: WireBackend, body: Any, length: int | None, framing: bytes
) -> None:
    """An empty piece must not become the last chunk."""
    fetch(adapter, backend.url, outgoing("POST", body=body, length=length))
    assert backend.requests[0].head == b"POST / HTTP/1.1\r\nhost: test\r\n" + framing + b"\r\n"
    assert backend.requests[0].body in (b"abc", b"")


def test_a_closed_port_is_told_from_other_failures(adapter: BackendAdapter) -> None:
    with pytest.raises(ConnectFailed) as caught:
        fetch(adapter, f"http://127.0.0.1:{free_port()}")
    assert caught.value.refused is True
    with pytest.raises(ConnectFailed) as caught:
        fetch(adapter, "http://no-such-host.invalid:80")
    assert caught.value.refused is False


def test_a_time_limit_is_not_set_again_for_a_moment_less() -> None:
    """The worker way asked the kernel four times a request: 30 s, then 29.9998 s, and back."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours, Origin("http", "127.0.0.1", 1))

        def limit() -> int:
            seconds: int = struct.unpack("@ll", ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))[0]
            return seconds

        found = []
        for seconds in (30.0, 29.8, 29.0, 28.9, 30.0):
            connection.set_timeout(seconds)
            found.append(limit())
        assert found == [30, 30, 29, 29, 30]


@pytest.mark.parametrize("has_begun", [False, True])
def test_the_time_of_a_request_is_over_also_while_it_is_sent(has_begun: bool) -> None:
    """To whoever did not read, it was sent for another `response_timeout`."""
    adapter, request = BackendAdapter(Timeouts(60, 20, 60, pool_idle_timeout=4)), outgoing("PUT", body=bytes(32 * MIB))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        origin, began = Origin("http", *listener.getsockname()), time.monotonic()
        request.deadline = began + 0.3
        sent = adapter.send_now(request, origin, may_connect=True) if has_begun else None
        with pytest.raises(ResponseTimedOut):
            adapter.exchange(request, origin, sent)
        assert time.monotonic() - began < 20


def test_nor_does_it_begin_anew_with_each_piece_that_is_read(backend: WireBackend) -> None:
    is_over = threading.Event()

    def read_slowly(sock: socket.socket, request: RawRequest) -> bool:
        while not is_over.wait(0.05):  # 25 s for all of it
            sock.recv(65536)
        return True

    backend.on_head = read_slowly
    adapter, request = BackendAdapter(PATIENT), outgoing("PUT", body=bytes(32 * MIB))
    began = time.monotonic()
    request.deadline = began + 0.5
    with pytest.raises(ResponseTimedOut):
        adapter.exchange(request, Origin.parse(backend.url))
    assert time.monotonic() - began < 20
    is_over.set()


def test_a_full_accept_queue_times_out() -> None:
    """The kernel neither accepts nor refuses: nothing was sent, so any method may go elsewhere."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for sock in waiting:
                sock.setblocking(False)
                with suppress(BlockingIOError):
                    sock.connect(address)
            with pytest.raises(ConnectTimedOut):
                fetch(BackendAdapter(QUICK), f"http://127.0.0.1:{address[1]}")
        finally:
            for sock in waiting:
                sock.close()


def test_an_error_of_the_body_iterator_comes_through_and_breaks_the_request(
    adapter: BackendAdapter, backend: WireBackend
) -> None:
    """Half a request must never look whole."""

    def pieces() -> Iterator[bytes]:
        yield b"abc"
        raise ValueError("the client is gone")

    with pytest.raises(ValueError, match="the client is gone"):
        fetch(adapter, backend.url, outgoing("POST", body=pieces()))
    wait_until(lambda: backend.broken)
    assert backend.requests == []


def test_a_refusal_stops_a_streamed_body(adapter: BackendAdapter, backend: WireBackend) -> None:
    """401 or 413 comes before the body is sent: the rest is not sent, the connection not kept."""
    done = threading.Event()

    def on_head(sock: socket.socket, _: Any) -> bool:
        sock.sendall(b"HTTP/1.1 413 X\r\nContent-Length: 3\r\n\r\nbig")
        done.wait(60)
        return True

    sent = [0]

    def pieces() -> Iterator[bytes]:
        while sent[0] < 1000:
            sent[0] += 1
            yield b"x" * 65536

    backend.on_head = on_head
    try:
        response = adapter.exchange(outgoing("POST", body=pieces()), Origin.parse(backend.url))
        assert (response.status_code, response.body.read()) == (413, b"big")
        response.body.close()
    finally:
        done.set()
    assert sent[0] < 1000
    backend.on_head = None
    backend.peers.clear()
    assert fetch(adapter, backend.url) == b"ok"


# As requests knows it.


def test_content_text_and_json(session: requests.Session, backend: WireBackend) -> None:
    document = {"name": "B\u00e4ckerei", "n": [1, 2]}
    body = json.dumps(document, ensure_ascii=False).encode()
    backend.answer(ok(body, b"Content-Type: application/json; charset=utf-8"))
    response = session.get(backend.url + "/a?b=c")
    assert response.ok and response.status_code == 200 and response.reason == "OK"
    assert response.content == response.content == body
    assert response.json() == document
    assert "B\u00e4ckerei" in response.text
    assert response.headers["CONTENT-TYPE"].startswith("application/json")
    assert backend.requests[0].target == b"/a?b=c"


@pytest.mark.parametrize("framing", [b"Content-Length: 300000\r\n", b"Transfer-Encoding: chunked\r\n", b""])
def test_iter_content(session: requests.Session, backend: WireBackend, framing: bytes) -> None:
    body = b"0123456789" * 30_000
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if b"chunked" in framing else body
    backend.answer(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n" + sent, close=not framing)
    with session.get(backend.url, stream=True) as response:
        assert b"".join(response.iter_content(1000)) == body


def test_iter_lines(session: requests.Session, backend: WireBackend) -> None:
    backend.answer(ok(b"one\ntwo\nthree"))
    assert list(session.get(backend.url, stream=True).iter_lines()) == [b"one", b"two", b"three"]


@pytest.mark.parametrize(
    "data", [b"abc", "abc", {"a": "b"}, iter([b"ab", b"c"])], ids=["bytes", "str", "form", "stream"]
)
def test_bodies_of_all_kinds(session: requests.Session, backend: WireBackend, data: Any) -> None:
    assert session.post(backend.url, data=data).content == b"ok"
    assert backend.requests[0].body in (b"abc", b"a=b")
    assert backend.requests[0].values(b"host") == [backend.url.removeprefix("http://").encode()]


def test_a_redirect_can_be_followed(session: requests.Session, backend: WireBackend) -> None:
    def script(sock: socket.socket, got: Any) -> None:
        found = b"HTTP/1.1 302 Found\r\nLocation: /next\r\nContent-Length: 0\r\n\r\n"
        sock.sendall(ok(b"there") if got.target == b"/next" else found)

    backend.script = script
    response = session.get(backend.url)
    assert (response.content, len(response.history)) == (b"there", 1)


def test_raise_for_status(session: requests.Session, backend: WireBackend) -> None:
    backend.answer(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(requests.HTTPError, match="503 Server Error"):
        session.get(backend.url).raise_for_status()


def test_no_cookies_are_kept(session: requests.Session, backend: WireBackend) -> None:
    backend.answer(ok(b"ok", b"Set-Cookie: session=secret; Path=/"))
    session.get(backend.url)
    session.get(backend.url)
    assert not backend.requests[1].values(b"cookie")
    assert not session.cookies


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (lambda sock, _: hang_up(sock), requests.exceptions.ConnectionError),
        (lambda sock, _: sock.sendall(b"garbage\r\n\r\n"), requests.exceptions.RequestException),
        (lambda sock, _: wait_closed(sock), requests.exceptions.ReadTimeout),
    ],
    ids=["closed", "garbage", "late"],
)
def test_exceptions_are_those_of_requests(
    session: requests.Session,
    adapter: BackendAdapter,
    backend: WireBackend,
    script: Callable[[socket.socket, Any], None],
    error: type[Exception],
) -> None:
    backend.script = script
    adapter.use(QUICK, None)
    with pytest.raises(error):
        session.get(backend.url)


def test_more_exceptions_of_requests(session: requests.Session, backend: WireBackend) -> None:
    with pytest.raises(requests.exceptions.ConnectionError):
        session.get(f"http://127.0.0.1:{free_port()}")
    backend.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", close=True)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        session.get(backend.url)


def test_a_session_uses_its_connections_again_and_leaks_none(session: requests.Session, backend: WireBackend) -> None:
    """Without `stream=True` nobody closes the response: reading it to its end must be enough, and so must a failure."""
    backend.answer(ok(b"x" * 300_000))
    for _ in range(3):
        assert len(session.get(backend.url).content) == 300_000
    assert len(set(backend.peers)) == 1


# The pool.


def test_connections_are_used_again_last_in_first_out(adapter: BackendAdapter, backend: WireBackend) -> None:
    backend.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
    origin = Origin.parse(backend.url)
    both = [adapter.exchange(outgoing(), origin) for _ in range(2)]
    for sock in list(backend.used):
        sock.sendall(b"ok")
    for response in both:
        assert response.body.read() == b"ok"
        response.body.close()
    backend.answer(ok())
    fetch(adapter, backend.url)
    assert backend.peers[2] == backend.peers[1] != backend.peers[0]


def test_close_is_idempotent_and_gives_back_once(adapter: BackendAdapter, backend: WireBackend) -> None:
    response = adapter.exchange(outgoing(), Origin.parse(backend.url))
    response.body.read()
    response.body.close()
    response.body.close()
    origin = Origin.parse(backend.url)
    backend.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
    first, second = adapter.exchange(outgoing(), origin), adapter.exchange(outgoing(), origin)
    assert backend.peers[-1] != backend.peers[-2], "one connection, two owners"
    first.body.close()
    second.body.close()


def test_a_body_that_is_not_read_to_its_end_costs_the_connection(adapter: BackendAdapter, backend: WireBackend) -> None:
    backend.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
    response = adapter.exchange(outgoing(), Origin.parse(backend.url))
    assert response.body.read_chunk() == b"abc"
    response.body.close()
    backend.answer(ok(b"next"))
    assert fetch(adapter, backend.url) == b"next"
    assert len(set(backend.peers)) == 2


def test_an_idle_connection_expires(backend: WireBackend) -> None:
    """By an injected clock; the limit itself is still good."""
    clock = Clock()
    adapter = BackendAdapter(PATIENT, clock=clock)
    for wait, connections in ((0.0, 1), (4.0, 1), (4.5, 2)):
        clock.now += wait
        fetch(adapter, backend.url)
        assert len(set(backend.peers)) == connections
    adapter.close()
    wait_until(lambda: not backend.used)


def test_close_idle_closes_what_has_expired(backend: WireBackend) -> None:
    clock = Clock()
    adapter = BackendAdapter(PATIENT, clock=clock)
    fetch(adapter, backend.url)
    adapter.close_idle()
    assert len(backend.used) == 1
    clock.now += 5
    adapter.close_idle()
    wait_until(lambda: not backend.used)


def test_what_cannot_be_repeated_meets_no_connection_that_may_be_about_to_end(backend: WireBackend) -> None:
    """This backend ends a kept connection just as the next request comes on it."""
    clock = Clock()
    adapter = BackendAdapter(PATIENT, clock=clock)
    pooled: set[int] = set()

    def script(sock: socket.socket, _: Any) -> None:
        peer = sock.getpeername()[1]
        if peer in pooled:
            hang_up(sock)
        pooled.add(peer)
        sock.sendall(ok(b"ok"))

    backend.script = script
    for body in (b"abc", iter([b"abc"])):
        assert fetch(adapter, backend.url) == b"ok"
        clock.now += 2
        assert fetch(adapter, backend.url, outgoing("POST", body=body)) == b"ok"
    assert fetch(adapter, backend.url, outgoing("PUT", body=b"abc")) == b"ok"  # sent again
    adapter.close()


def test_a_login_that_a_filter_adds_is_seen_too(adapter: BackendAdapter, backend: WireBackend) -> None:
    """It has changed the lines after they were worked out."""
    fetch(adapter, backend.url)
    request = outgoing()
    request.lines = [HOST, (b"authorization", b"NTLM TlRM")]
    assert adapter.send_now(request, Origin.parse(backend.url)) is None
    fetch(adapter, backend.url, request)
    fetch(adapter, backend.url)
    assert backend.peers[0] == backend.peers[1] != backend.peers[2]


@pytest.mark.parametrize(
    ("looked_at", "has_ended", "pause", "is_used_again"),
    [
        (None, False, 0.4, True),
        (None, False, 0.6, False),
        (2.0, False, 0.9, True),  # it was good after 2 s, so half of that is safe
        (2.0, False, 1.1, False),
        (2.0, True, 0.4, True),
        (0.4, True, 0.3, False),
    ],
)
def test_how_long_a_backend_keeps_connections_is_learnt(
    backend: WireBackend, looked_at: float | None, has_ended: bool, pause: float, is_used_again: bool
) -> None:
    clock = Clock()
    adapter = BackendAdapter(PATIENT, clock=clock)
    fetch(adapter, backend.url)
    if looked_at is not None:
        if has_ended:
            backend.drop_connections()
        clock.now += looked_at
        adapter.close_idle()
        fetch(adapter, backend.url)
    clock.now += pause
    fetch(adapter, backend.url, outgoing("POST", body=b"abc"))
    assert (backend.peers[-1] == backend.peers[-2]) is is_used_again
    adapter.close()


class Untold:
    """A socket whose kernel says nothing of use in TCP_INFO."""

    def __init__(self, sock: socket.socket, info: bytes) -> None:
        self._sock = sock
        self._info = info

    def getsockopt(self, *_: int) -> bytes:
        return self._info

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.parametrize("info", [b"", b"\x01", bytes(136), b"\x01" + bytes(135)])
def test_a_kernel_that_tells_less_costs_no_connection(
    adapter: BackendAdapter, backend: WireBackend, info: bytes
) -> None:
    origin = Origin.parse(backend.url)
    fetch(adapter, backend.url)
    (kept,) = adapter._idle[origin]
    kept.sock = Untold(kept.sock, info)  # type: ignore[assignment]
    fetch(adapter, backend.url)
    assert list(adapter._idle[origin]) == [kept]


@pytest.mark.parametrize(
    ("method", "body", "works"),
    [
        ("GET", None, True),
        ("PUT", b"abc", True),
        ("POST", b"abc", False),
        ("PUT", "stream", False),
    ],
)
def test_a_stale_connection_gets_one_fresh_try_if_it_may(
    adapter: BackendAdapter, backend: WireBackend, method: str, body: Any, works: bool
) -> None:
    adapter._clock = Clock()  # no pause, however busy this machine is
    fetch(adapter, backend.url)
    pooled = set(backend.peers)
    backend.script = lambda sock, _: hang_up(sock) if sock.getpeername()[1] in pooled else sock.sendall(ok())
    request = outgoing(method, body=iter([b"abc"]) if body == "stream" else body)
    if works:
        assert fetch(adapter, backend.url, request) == b"ok"
        assert len(backend.requests) == 3
        return
    with pytest.raises(ConnectionLost) as caught:
        fetch(adapter, backend.url, request)
    assert caught.value.stale
    assert len(backend.requests) == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_only_what_can_be_sent_once_more_trusts_whoever_watches(
    adapter: BackendAdapter, backend: WireBackend, method: str
) -> None:
    """The connection has ended, and whoever watches it has not said so yet."""
    fetch(adapter, backend.url)
    ((connection,),) = adapter._idle.values()
    connection.is_watched = True
    backend.drop_connections()
    wait_until(connection.has_input, "the connection has ended")
    request = outgoing(method)
    assert fetch(adapter, backend.url, request) == b"ok"
    assert request.is_resent == (method == "GET")


def test_a_connection_that_dies_after_a_byte_is_not_stale(adapter: BackendAdapter, backend: WireBackend) -> None:
    fetch(adapter, backend.url)
    backend.answer(b"HTTP/1.1 2", close=True)
    with pytest.raises(ConnectionLost) as caught:
        fetch(adapter, backend.url)
    assert not caught.value.stale
    assert len(backend.requests) == 2


def test_threads_share_an_adapter(adapter: BackendAdapter, backend: WireBackend) -> None:
    """Nobody gets the answer of another."""
    backend.script = lambda sock, got: sock.sendall(ok(got.target))
    wrong: list[bytes] = []

    def work(number: int) -> None:
        for serial in range(50):
            target = b"/%d/%d" % (number, serial)
            if fetch(adapter, backend.url, outgoing("GET", target)) != target:
                wrong.append(target)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(backend.requests) == 400
    assert len(set(backend.peers)) <= 8


# TLS.


class TlsBackend(WireBackend):
    """The same behind TLS; counts handshakes that succeeded."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.handshakes = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        super().__init__()

    def _serve(self, plain: socket.socket) -> None:
        self.open.discard(plain)
        with suppress(OSError), plain, self._context.wrap_socket(plain, server_side=True) as sock:
            self.handshakes += 1
            self.open.add(sock)
            super()._serve(sock)


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, which says as little as private ones do, and a certificate of it for localhost."""
    folder = tmp_path_factory.mktemp("authority")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    openssl("req", "-x509", *key, "-keyout", f"{folder}/ca.key", "-out", f"{folder}/ca.pem", "-subj", "/CN=test CA")
    signed = ["-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca.key"]
    extensions = ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    names = ["-keyout", f"{folder}/server.key", "-out", f"{folder}/server.pem", "-subj", "/CN=server"]
    openssl("req", "-x509", *key, *signed, *extensions, *names)
    return folder


@pytest.fixture
def tls_backend(authority: Path) -> Iterator[TlsBackend]:
    with TlsBackend(authority / "server.pem", authority / "server.key") as backend:
        yield backend


@pytest.fixture
def tls_adapter(authority: Path) -> Iterator[BackendAdapter]:
    made = BackendAdapter(Timeouts(5, 5, 5, 4), dialer=Dialer(tls_context(authority / "ca.pem")))
    yield made
    made.close()


def test_tls_with_the_right_authority(tls_adapter: BackendAdapter, tls_backend: TlsBackend) -> None:
    """One handshake for several requests."""
    for _ in range(3):
        assert fetch(tls_adapter, f"https://localhost:{tls_backend.port}") == b"ok"
    assert (tls_backend.handshakes, len(tls_backend.requests)) == (1, 3)


def test_tls_streams_a_body_on_a_fresh_connection(tls_adapter: BackendAdapter, tls_backend: TlsBackend) -> None:
    """TLS 1.3 session tickets make the socket readable; that is no early answer."""
    pieces = [b"x" * 65536] * 16
    assert fetch(tls_adapter, f"https://localhost:{tls_backend.port}", outgoing("POST", body=iter(pieces))) == b"ok"
    assert [got.body for got in tls_backend.requests] == [b"".join(pieces)]


def test_tls_refusal_of_a_body_that_is_not_read_on(tls_adapter: BackendAdapter, tls_backend: TlsBackend) -> None:
    """As without TLS: it must not wait for room where there will be none."""

    def refuse(sock: socket.socket, _: RawRequest) -> bool:
        sock.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
        return is_over.wait(60)

    is_over = threading.Event()
    tls_backend.on_head = refuse
    url = f"https://localhost:{tls_backend.port}"
    try:
        endless = outgoing("POST", body=itertools.repeat(b"x" * 65536))
        assert tls_adapter.exchange(endless, Origin.parse(url)).status_code == 413
    finally:
        is_over.set()


def test_tls_connection_that_the_backend_closed_is_seen_before_use(
    tls_adapter: BackendAdapter, tls_backend: TlsBackend
) -> None:
    url = f"https://localhost:{tls_backend.port}"
    fetch(tls_adapter, url)
    tls_backend.drop_connections()
    (idle,) = tls_adapter._idle[Origin.parse(url)]
    wait_until(idle.has_input)
    assert fetch(tls_adapter, url, outgoing("POST", body=b"abc")) == b"ok"
    assert tls_backend.handshakes == 2


def test_tls_without_the_authority_is_refused(adapter: BackendAdapter, tls_backend: TlsBackend) -> None:
    with pytest.raises(ConnectFailed, match="TLS: .*certificate") as caught:
        fetch(adapter, f"https://localhost:{tls_backend.port}")
    assert not caught.value.refused
    assert tls_backend.requests == []


def test_tls_with_another_host_name_is_refused(tls_adapter: BackendAdapter, tls_backend: TlsBackend) -> None:
    with pytest.raises(ConnectFailed, match="TLS: .*127.0.0.1"):
        fetch(tls_adapter, f"https://127.0.0.1:{tls_backend.port}")
    assert tls_backend.requests == []


@pytest.fixture
def called(tls_backend: TlsBackend) -> list[str | None]:
    """The server names that clients have asked for, in their order."""
    found: list[str | None] = []
    tls_backend._context.sni_callback = lambda sock, name, context: found.append(name)  # type: ignore[assignment]
    return found


def test_tls_without_the_dot_of_an_absolute_name(
    tls_adapter: BackendAdapter, tls_backend: TlsBackend, called: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 6066 section 3. To the resolver the dot says that no domain is to be added."""
    asked, real = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or real("127.0.0.1", *a, **k))
    assert fetch(tls_adapter, f"https://localhost.:{tls_backend.port}") == b"ok"
    assert (called, asked) == (["localhost"], ["localhost."])


def test_tls_with_a_server_name_of_the_operators(
    tls_adapter: BackendAdapter, tls_backend: TlsBackend, called: list[str | None]
) -> None:
    """From the next request on: kept connections were made with another one."""
    url, timeouts = f"https://127.0.0.1:{tls_backend.port}", tls_adapter.timeouts
    tls_adapter.use(timeouts, "localhost.")
    assert fetch(tls_adapter, url) == fetch(tls_adapter, url) == b"ok"
    assert called == ["localhost"]
    before = tls_adapter.exchange(outgoing(), Origin.parse(url))
    tls_adapter.use(timeouts, "another.test")
    before.body.close()
    with pytest.raises(ConnectFailed, match="TLS: .*another.test"):
        fetch(tls_adapter, url)
    assert called[1:] == ["another.test"]


def test_tls_to_a_plain_port_is_refused(tls_adapter: BackendAdapter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_answer_plainly, args=(listener,))
        answering.start()
        with pytest.raises(ConnectFailed, match="TLS"):
            fetch(tls_adapter, f"https://localhost:{listener.getsockname()[1]}")
        answering.join(60)


def _answer_plainly(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock, suppress(OSError):
        sock.recv(1000)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def test_tls_handshake_has_a_time_limit(authority: Path) -> None:
    """Somebody accepts and says nothing: nothing was sent, any method may go elsewhere."""
    adapter = BackendAdapter(QUICK, dialer=Dialer(tls_context(authority / "ca.pem")))
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ConnectTimedOut, match="TLS"):
        fetch(adapter, f"https://localhost:{listener.getsockname()[1]}")


def test_tls_response_has_a_time_limit(authority: Path, tls_backend: TlsBackend) -> None:
    adapter = BackendAdapter(QUICK, dialer=Dialer(tls_context(authority / "ca.pem")))
    tls_backend.script = lambda sock, _: wait_closed(sock)
    with pytest.raises(ResponseTimedOut):
        fetch(adapter, f"https://localhost:{tls_backend.port}")
