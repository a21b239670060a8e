"""The traffic of the chaos suite: clients of HTTP/1, HTTP/2 and WebSocket that check every byte of what they get."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from threading import Event, Lock, Thread
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

from chaos_backend import GOOD_BYE, PIECE, answer_body, checksum
from support import PATIENCE, wait_until
from test_http2 import WINDOW, WINDOW_UPDATE, Client, Stream, frame
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import Event as Heard
from websockets.uri import parse_uri

KIB, MIB = 1024, 1024 * 1024
REPLAYABLE = 64 * KIB  # bytes of a request body that the balancer keeps for another try
# Mostly small, as traffic is.
SIZES = (0, 0, 1, 200, 200, 3 * KIB, 20 * KIB, REPLAYABLE, REPLAYABLE + 1, 300 * KIB, MIB)
METHODS = ("GET", "GET", "GET", "HEAD", "PUT", "DELETE", "POST", "POST", "PATCH")
ONCE = ("POST", "PATCH")  # must never be executed twice
STREAMS = 4  # of an HTTP/2 client at once, at most
MESSAGES = 5  # of a WebSocket, at most
MESSAGE_SIZES = (0, 1, 200, 200, 3 * KIB, 40 * KIB)  # a whole burst is sent before its echo is read
LINGERING = 0.05  # seconds between two messages, on every second one


@dataclass(frozen=True)
class Plan:
    """One request: what is sent, and how much is asked for."""

    key: str
    method: str
    target: str
    length: int  # bytes of the request body
    is_chunked: bool  # the request, over HTTP/2 of unknown length; the target says how the answer is to be framed
    size: int  # bytes of the answer

    @property
    def body(self) -> bytes:
        """Made anew each time: thousands of plans are remembered."""
        return random.Random(self.key).randbytes(self.length)

    @property
    def digest(self) -> str:
        return checksum(self.method, self.target, self.body)

    @property
    def may_repeat(self) -> bool:
        """The balancer may try another backend whatever happens before the answer's head."""
        return self.method not in ONCE and not self.is_chunked and self.length <= REPLAYABLE


@dataclass(frozen=True)
class Outcome:
    """How it ended for the client.

    `kind` is answered (whole and right), refused (by the balancer), cut (after the head, and it shows), empty (without
    a head), closed (nobody listens), away (a WebSocket whose balancer says that it goes) or wrong (never allowed).
    """

    plan: Plan
    kind: str
    status: int = 0
    text: str = ""


def make_plan(key: str, rng: random.Random) -> Plan:
    method, size = rng.choice(METHODS), rng.choice(SIZES)
    length, is_chunked = 0, False
    if method in ("PUT", "POST", "PATCH"):
        length = rng.choice(SIZES)
        is_chunked = rng.random() < 0.3
        size = min(size, 20 * KIB)
    framing = "chunked" if rng.random() < 0.3 else "plain"
    return Plan(key, method, f"/{key}?size={size}&{framing}=1", length, is_chunked, size)


def judge(plan: Plan, status: int, data: bytes) -> Outcome:
    if status == 200:
        is_right = data == (b"" if plan.method == "HEAD" else answer_body(plan.digest, plan.size))
        return Outcome(plan, "answered" if is_right else "wrong", status, "" if is_right else repr(data[:200]))
    if plan.method == "HEAD":
        return Outcome(plan, "refused", status)

    try:
        refusal = json.loads(data)
        is_ours = bool(refusal["error"] and refusal["request_id"])
    except (ValueError, KeyError, TypeError):
        is_ours = False
    return Outcome(plan, "refused" if is_ours and status in (502, 503, 504) else "wrong", status, repr(data[:200]))


class TrafficClient(Protocol):
    def turn(self, keys: Iterator[str], rng: random.Random) -> list[Outcome]:
        """Ask for something, or for some things at once, and judge what comes."""

    def close(self) -> None: ...


class Http1Client:
    """Keeps its connection while the answers are good."""

    def __init__(self, url: str, ended: Event) -> None:
        kind = http.client.HTTPSConnection if url.startswith("https:") else http.client.HTTPConnection
        self._connection = kind(urlsplit(url).netloc, timeout=PATIENCE)
        self.close = self._connection.close

    def turn(self, keys: Iterator[str], rng: random.Random) -> list[Outcome]:
        outcome = self._ask(make_plan(next(keys), rng))
        if outcome.kind != "answered":
            self.close()
        return [outcome]

    def _ask(self, plan: Plan) -> Outcome:
        head: http.client.HTTPResponse | None = None
        try:
            self._send(plan)
            if self._connection.sock is None:  # its handshake had failed
                return Outcome(plan, "empty")
            head = self._connection.getresponse()
            outcome = judge(plan, head.status, head.read())
        except ConnectionRefusedError:
            return Outcome(plan, "closed")
        except (OSError, http.client.HTTPException) as error:
            return Outcome(plan, "cut" if head else "empty", head.status if head else 0, repr(error))
        if outcome.kind == "answered" and head.headers.get("X-Digest") != plan.digest:
            return replace(outcome, kind="wrong", text=repr(head.headers.items()))

        return outcome

    def _send(self, plan: Plan) -> None:
        connection = self._connection
        connection.putrequest(plan.method, plan.target)
        body: Any = plan.body or None
        if plan.is_chunked:
            connection.putheader("Transfer-Encoding", "chunked")
            body = pieces(plan.body)
        elif plan.method in ("PUT", "POST", "PATCH"):
            connection.putheader("Content-Length", str(plan.length))
        try:
            connection.endheaders(body, encode_chunked=plan.is_chunked)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused in the middle of the body: the answer may be here already


def pieces(body: bytes) -> Iterator[bytes]:
    return (body[at : at + PIECE] for at in range(0, len(body), PIECE))


def connect(url: SplitResult, *protocols: str) -> socket.socket:
    """With TLS if it says so."""
    sock = socket.create_connection((url.hostname, url.port), timeout=PATIENCE)
    if url.scheme == "https":
        context = ssl.create_default_context()
        context.set_alpn_protocols(protocols)
        sock = context.wrap_socket(sock, server_hostname=url.hostname, do_handshake_on_connect=False)
        try:
            sock.do_handshake()
        except OSError:
            sock.close()
            raise
    return sock


def failed(plan: Plan, error: OSError) -> Outcome:
    """There was no connection."""
    return Outcome(plan, "closed" if isinstance(error, ConnectionRefusedError) else "empty", 0, repr(error))


class Http2Client:
    """Several streams at once on a connection that it keeps until it is told to go. Over TLS, or by prior knowledge."""

    def __init__(self, url: str, ended: Event) -> None:
        self._url = urlsplit(url)
        self._sock: socket.socket | None = None

    def turn(self, keys: Iterator[str], rng: random.Random) -> list[Outcome]:
        plans = [make_plan(next(keys), rng) for _ in range(rng.randint(1, STREAMS))]
        plans = [replace(plan, method="GET") if plan.method == "HEAD" else plan for plan in plans]  # it reads no fields
        try:
            client = self._connected()
        except OSError as error:
            return [failed(plan, error) for plan in plans]
        sent = [(plan, self._begin(client, plan)) for plan in plans]  # all, for none may after a GOAWAY (RFC 9113 6.8)
        for plan, stream in sent:
            self._upload(client, plan, stream)
        return [self._judge(plan, client.finish(stream)) for plan, stream in sent]

    def _connected(self) -> Client:
        if self._sock is not None:
            self._client.sync()
            if self._client.is_told_to_go or self._client.is_closed:
                self.close()
        if self._sock is None:
            sock = connect(self._url, "h2")
            try:
                self._client, self._ids = Client(sock), count(1, 2)
                self._client.raw(frame(WINDOW_UPDATE, 0, 0, (2**31 - 1 - WINDOW).to_bytes(4, "big")))
            except OSError:  # it is closed again already
                sock.close()
                raise
            self._sock = sock
        return self._client

    def _begin(self, client: Client, plan: Plan) -> int:
        stream = next(self._ids)
        fields = [(b":path", plan.target.encode()), (b":scheme", self._url.scheme.encode())]
        if plan.length and not plan.is_chunked:
            fields.append((b"content-length", str(plan.length).encode()))
        client.request(stream, *fields, method=plan.method.encode(), end=not plan.length)
        return stream

    def _upload(self, client: Client, plan: Plan, stream: int) -> None:
        if plan.length and client.upload(stream, plan.body, patience=PATIENCE):
            client.cancel(stream)  # it is answered already, or broken
        elif plan.length:
            client.data(stream, b"")

    def _judge(self, plan: Plan, stream: Stream) -> Outcome:
        if stream.is_ended and stream.status:
            return judge(plan, stream.status, stream.body)
        return Outcome(plan, "cut" if stream.status else "empty", stream.status or 0, f"reset: {stream.reset_code}")

    def close(self) -> None:
        if self._sock is not None:
            self._client.close()
            self._sock.close()
            self._sock = None


class WebSocketClient:
    """A socket for each turn: a burst, or messages one by one, and then a good bye, to which the backend closes.

    The backend, and not the client: what both of them would count otherwise depends on what comes first, the client's
    close frame or the end of a backend that is killed. No thread reads while another writes: OpenSSL allows no such
    thing, and a handshake in a thousand would hang.
    """

    def __init__(self, url: str, ended: Event) -> None:
        self._url = urlsplit(url)
        self._ended = ended

    def turn(self, keys: Iterator[str], rng: random.Random) -> list[Outcome]:
        key = next(keys)
        plan = Plan(key, "GET", f"/{key}?size=0&plain=1", 0, False, 0)
        messages = [make_message(rng) for _ in range(rng.randint(1, MESSAGES))]
        groups = [[message] for message in messages] if rng.random() < 0.5 else [messages]
        try:
            sock = connect(self._url)
        except OSError as error:
            return [failed(plan, error)]
        with sock:
            talk = Talk(sock, f"ws://{self._url.netloc}{plan.target}")
            try:
                talk.run(groups, self._ended)
            except TimeoutError as error:
                return [Outcome(plan, "wrong", 101, repr(error))]
            except (OSError, EOFError):
                pass  # what it is, the judge says
        return [self._judge(plan, talk, messages)]

    def _judge(self, plan: Plan, talk: Talk, messages: list[str | bytes]) -> Outcome:
        head, got, close = talk.response, talk.received, talk.protocol.close_rcvd
        if head is None:
            return Outcome(plan, "empty")
        if head.status_code != 101:
            return judge(plan, head.status_code, bytes(head.body or b""))
        kind = {None: "cut", 1000: "answered", 1001: "away", 1011: "cut"}.get(close and close.code, "wrong")
        if got != messages[: len(got)] or (kind == "answered" and len(got) < len(messages)):
            kind = "wrong"
        return Outcome(plan, kind, 101, f"{close}, {len(got)} of {len(messages)} messages")

    def close(self) -> None:
        pass


class Talk:
    """What is said over one WebSocket."""

    def __init__(self, sock: socket.socket, uri: str) -> None:
        self._sock = sock
        self.protocol = ClientProtocol(parse_uri(uri), max_size=None)
        self._events: list[Heard] = []
        self.response: Response | None = None
        self.received: list[str | bytes] = []

    def run(self, groups: list[list[str | bytes]], ended: Event) -> None:
        """Until it is closed."""
        self.protocol.send_request(self.protocol.connect())
        response = self._next()
        assert isinstance(response, Response)
        self.response = response
        if response.status_code != 101:
            return
        for group in [*groups, [GOOD_BYE.decode()]]:
            for message in group:
                if isinstance(message, str):
                    self.protocol.send_text(message.encode())
                else:
                    self.protocol.send_binary(message)
            for _ in group:
                frame = self._next()
                assert isinstance(frame, Frame)
                if frame.opcode is Opcode.CLOSE:
                    self._flush()
                    return
                data = bytes(frame.data)
                self.received.append(data.decode() if frame.opcode is Opcode.TEXT else data)
            ended.wait(LINGERING)

    def _next(self) -> Heard:
        self._flush()
        while not self._events:
            data = self._sock.recv(65536)
            if not data:
                raise EOFError
            self.protocol.receive_data(data)
            self._events += self.protocol.events_received()
        return self._events.pop(0)

    def _flush(self) -> None:
        for data in self.protocol.data_to_send():
            self._sock.sendall(data)


def make_message(rng: random.Random) -> str | bytes:
    data = rng.randbytes(rng.choice(MESSAGE_SIZES))
    return data.hex() if rng.random() < 0.5 else data


Kind = Callable[[str, Event], TrafficClient]
CLIENTS: Sequence[Kind] = (Http1Client, Http2Client, Http1Client, WebSocketClient)


class Traffic:
    """Clients that send mixed requests until the block ends, a `pause` after each turn. `outcomes` grows as answers
    come."""

    _runs = count(1)

    def __init__(
        self, url: str, clients: int = 8, seed: int = 1, pause: float = 0.0, kinds: Sequence[Kind] = CLIENTS
    ) -> None:
        self._url, self._pause, self._kinds = url, pause, kinds
        self._ended = Event()
        self._lock = Lock()  # guards `outcomes`
        self._name = f"t{next(self._runs)}-{os.getpid()}"
        self.outcomes: list[Outcome] = []
        self._threads = [Thread(target=self._run, args=(n, seed), name=f"traffic-{n}") for n in range(clients)]

    def _run(self, number: int, seed: int) -> None:
        rng = random.Random(seed * 1000 + number)
        client = self._kinds[number % len(self._kinds)](self._url, self._ended)
        keys = (f"{self._name}-{number}-{serial}" for serial in count())
        while not self._ended.wait(self._pause):
            outcomes = client.turn(keys, rng)
            if outcomes[0].kind == "closed":
                break
            with self._lock:
                self.outcomes += outcomes
        client.close()

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        self.wait_for(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Each client ends after the answers it waits for."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, number: int) -> None:
        """That many more requests have ended, one way or another."""
        goal = len(self.outcomes) + number
        wait_until(lambda: len(self.outcomes) >= goal, f"{number} more answers")
