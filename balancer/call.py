"""One request between Granian and the app: its environ, its body, its answer, and its client leaving.

Granian's `send` acts at once, in whichever thread calls it; what it returns need only be waited for when the client is
slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from balancer import accepted
from balancer.errors import BalancerError, ClientGone, ClientTooSlow
from balancer.incoming import CLIENT, HEADER_LINES, Incoming, RequestBody, add_headers
from balancer.messages import SERVER_LINE, parse_content_length

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from balancer.answer import Answer
    from balancer.bridge import Bridge
    from balancer.connection import Abortable
    from balancer.forwarding import Forwarding
    from balancer.outgoing import RequestHeads

log = logging.getLogger("balancer.server")

BODY_GRACE_SECONDS = 5.0  # what a client may keep us waiting for its body before `min_body_rate` counts
LINGER_SECONDS = 2.0  # and LINGER_BYTES: what is read and dropped after an answer that came before the request's end
LINGER_BYTES = 16 * 1024 * 1024
AHEAD_BYTES = 4 * 65536  # of a request body that is asked for, and handed on, at the same time
FRAME_BYTES, READ_BYTES = 16384, 65536  # what hyper gives at a time at most, by default, in HTTP/2 and before
MOST_PIECES = 64  # that are handed on together
MOST_SMALL_PIECES = 16  # in which a small body may come without a thread that waits for it
FLUSH_SECONDS = 0.25  # for an answer to be written, of which Granian says nothing, before its connection is cut
VERSIONS = {"1": "1.0", "1.1": "1.1", "2": "2"}  # Granian calls HTTP/1.0 "1"


def when_done(awaitable: Any, callback: Callable[[Any], object]) -> None:
    """`callback(awaitable)` once what Granian returned is done: in Granian's thread, or at once in this one."""
    if isinstance(awaitable, asyncio.Future):  # Windows: it belongs to the event loop, which calls back
        awaitable.get_loop().call_soon_threadsafe(awaitable.add_done_callback, callback)
    elif is_done(awaitable):
        callback(awaitable)
    else:
        awaitable.add_done_callback(callback)


def is_done(awaitable: Any) -> bool:
    done = getattr(awaitable, "done", None)
    return done is None or bool(done())  # without it: finished when it was made


def result_of(awaitable: Any) -> Any:
    """Of one that is done."""
    result = getattr(awaitable, "result", None)
    if result is not None:
        return result()
    try:
        next(awaitable)  # its first step ends it
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("Granian returned an awaitable of an unknown kind")


class Call:
    """One request, from hyper and back: answered by its `forwarding`, or by the app. Also the `Watcher` of what its
    worker thread blocks on.

    `_lock` guards `_attached` and `is_gone`, which Granian's thread and the worker thread share. `is_body_done` is set
    by the worker before the loop looks at it.
    """

    __slots__ = (
        "bridge",
        "forwarding",
        "scope",
        "protocol",
        "_watcher",
        "started",
        "is_gone",
        "is_watched",
        "is_body_done",
        "has_body",
        "_body_left",
        "_largest",
        "_asked",
        "_patience",
        "_is_too_slow",
        "_lock",
        "_attached",
        "_status",
        "_headers",
        "_is_started",
    )

    def __init__(self, bridge: Bridge, watcher: Any) -> None:
        self.bridge = bridge
        self.forwarding: Forwarding | None = None  # else the app answers
        self.scope: dict[str, Any] = watcher.scope
        self.protocol = watcher.proto
        self._watcher = watcher
        self.started = time.monotonic()
        self.is_gone = False
        self.is_watched = False
        self.is_body_done = False
        self.has_body = False  # all of it has come: `receive` does not wait
        self._body_left: int | None = None  # bytes, if the length is known
        self._largest = 0  # bytes of a piece of the body, so far
        self._asked: list[Any] = []  # for pieces of the body that have not been taken yet, in their order
        self._patience = BODY_GRACE_SECONDS  # seconds that we still wait for the body, as `min_body_rate` has it
        self._is_too_slow = False
        self._lock = Lock()
        self._attached: Abortable | None = None
        self._status: int | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_started = False

    def is_bodiless(self) -> bool:
        """True if the head alone says that no body follows: for a call in the queue, which nobody has read yet."""
        framing = (b"content-length", b"transfer-encoding")
        return self.scope["http_version"] != "2" and not any(name in framing for name, _ in self.scope["headers"])

    # A small body comes in: Granian's thread.

    def is_small(self, most: int) -> bool:
        """True if a body of at most `most` bytes follows, or in HTTP/2 perhaps none, and the client waits for no word
        of ours before it sends it."""
        if self._body_left is None:
            return str(self.scope["http_version"]) == "2"
        return self._body_left <= most and b"expect" not in [name for name, _ in self.scope["headers"]]

    def missing(self) -> Any:
        """What the body still waits for, as Granian's awaitable. None if there is nothing to wait for: it `has_body`
        then, or it is one for a worker thread."""
        left, asked = self._body_left, self._asked
        for number in range(MOST_SMALL_PIECES):
            if number == len(asked):
                asked.append(self.protocol.receive())
            if not is_done(asked[number]):
                return asked[number]
            message = result_of(asked[number])
            if message["type"] != "http.request":
                return None
            if left is None:
                self.has_body = not (message["body"] or message["more_body"])
                return None
            left -= len(message["body"])
            if left == 0:
                self.has_body = True
                return None
        return None

    # The client left: called by Granian's thread, or the loop's. `attach` and `detach` are called by the worker thread.

    def attach(self, target: Abortable) -> None:
        with self._lock:
            self._attached = target
            gone = self.is_gone
        if gone:  # by the worker itself, to which it belongs: no lock needed
            target.abort()

    def detach(self) -> None:
        with self._lock:
            self._attached = None

    def disconnect(self) -> None:
        """Wake the worker if it waits for a backend. The lock is held so that what is attached is still this call's."""
        with self._lock:
            self.is_gone = True
            if self._attached is not None:
                self._attached.abort()

    def cut(self) -> None:
        """End the client's connection so that it cannot take what it got for the whole answer.

        hyper would end a chunked body properly, and Granian has no way to tell it not to, so the socket is shut down.
        An HTTP/2 client loses its other streams too.
        """
        accepted.cut(self.addresses)

    @property
    def addresses(self) -> tuple[accepted.Address, accepted.Address]:
        return self.scope["client"], self.scope["server"]

    # The worker thread.

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    def run(self) -> None:
        """In a worker thread: connect and leave the waiting to the express way, or do it all. Never raises."""
        express = self.bridge.express
        if express is None or not express.connect(self):
            self.answer()

    def answer(self) -> None:
        """Never raises."""
        try:
            self._run()
        except ClientGone:
            if self._is_started and not self.is_gone:  # slow; else there is nobody to be cut, or nothing was sent
                self.cut()
        except Exception:
            # The app's own errors are answered by the app. After the head, cutting is all that is left.
            if self._is_started:
                log.debug("request cut", exc_info=True)
                self.cut()
            else:
                log.exception("request failed")
                self._status, self._headers = 500, [SERVER_LINE]
                self._emit_last(b"")
        finally:
            self._end()

    def _end(self) -> None:
        self.forwarding = None  # it refers to us: garbage of the slow kind otherwise
        self.bridge.finish(self)
        self._watcher.done()

    def _run(self) -> None:
        if self.forwarding is not None:
            self._pass_on(self.forwarding.run())
        else:
            self._stream(self.bridge.app(self._environ(), self.start_response))
        if not (self.is_body_done or self.is_gone):
            self._end_early()

    def _pass_on(self, answer: Answer) -> None:
        self._status, self._headers = answer.status, answer.lines
        if isinstance(answer.body, bytes):
            self._emit_last(answer.body)
        else:
            self._stream(answer.body)

    def _stream(self, chunks: Iterable[bytes]) -> None:
        try:
            for chunk in chunks:
                self._emit(chunk)
                if self.is_gone:
                    return
            self._emit_last(b"")
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    def _end_early(self) -> None:
        """The answer came before the end of the request. Read on for a while before closing: to close on a client that
        still sends would reset the connection, and it might never see the answer (RFC 9112 section 9.6)."""
        self._patience = math.inf  # from now on only these seconds count
        with contextlib.suppress(BalancerError):  # it left, or says no more
            if self._is_too_slow:  # it has had its time
                self._linger(FLUSH_SECONDS)
            elif self.bridge.lingering.acquire(blocking=False):
                try:
                    self._linger(LINGER_SECONDS)
                finally:
                    self.bridge.lingering.release()
        # HTTP/2 ends the stream alone.
        if not (self.is_body_done or self.is_gone) and self.scope["http_version"] != "2":
            self.cut()

    def _linger(self, seconds: float) -> None:
        received, deadline = 0, time.monotonic() + seconds
        while received < LINGER_BYTES and not self.is_body_done and (left := deadline - time.monotonic()) > 0:
            received += sum(map(len, self.receive(left)))

    def refuse(self) -> None:
        """Answer that there is no room, in the calling thread; does not block."""
        self.is_body_done = True
        try:
            if self.forwarding is not None:
                self._pass_on(self.forwarding.refuse())
            else:
                self.start_response("503 Service Unavailable", [("retry-after", "1"), ("content-length", "0")])
                self._emit_last(b"")
        finally:
            self._end()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        if exc_info is not None and self._is_started:
            raise exc_info[1].with_traceback(exc_info[2])
        self._status = int(status[:3])
        self._headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        if not any(name == b"server" for name, _ in self._headers):
            self._headers.append(SERVER_LINE)
        return self._emit

    def _start(self) -> None:
        if self._status is None:
            raise RuntimeError("the app has not called start_response")
        # hyper closes after it (RFC 9112 section 9.6). HTTP/2 has no such field, but GOAWAY.
        if (self.bridge.is_draining or self._is_too_slow) and self.scope["http_version"] != "2":
            self._headers.append((b"connection", b"close"))
        self._is_started = True
        self.protocol.send({"type": "http.response.start", "status": self._status, "headers": self._headers})

    def _emit(self, chunk: bytes) -> None:
        """Send a piece; an empty first one sends the head alone. Blocks while the client is slow."""
        if not self._is_started:
            self._start()
        elif not chunk:
            return
        self._flush(self.protocol.send({"type": "http.response.body", "body": chunk, "more_body": True}))

    def _emit_last(self, chunk: bytes) -> None:
        if not self._is_started:
            self._start()
        self._flush(self.protocol.send({"type": "http.response.body", "body": chunk, "more_body": False}))

    def _flush(self, awaitable: Any) -> None:
        """Wait if the client is slow; else what Granian returned was finished when it was made."""
        if hasattr(awaitable, "done"):
            self._wait(awaitable)

    def receive(self, timeout: float | None = None) -> list[bytes]:
        """What has come of the request body, at least one piece, [] at its end. Raises ClientGone, ClientTooSlow."""
        pieces: list[bytes] = []
        size = 0
        while not self.is_body_done and (
            not pieces or (len(pieces) < MOST_PIECES and self._is_here(AHEAD_BYTES - size))
        ):
            piece = self._receive_piece(timeout or self.bridge.idle_timeout)
            if piece:
                pieces.append(piece)
                size += len(piece)
        return pieces

    def _is_here(self, most: int) -> bool:
        """True if the next piece has come, and has no more than so many bytes."""
        asked = self._asked
        return bool(asked) and is_done(asked[0]) and len(result_of(asked[0]).get("body", b"")) <= most

    def _receive_piece(self, timeout: float) -> bytes:
        self._ask()
        message = self._receive_message(timeout)
        if message["type"] != "http.request":
            self.is_gone = True
            raise ClientGone("the client left before its request was complete")
        body: bytes = message["body"]
        if len(body) > self._largest:
            self._largest = len(body)
        if self._body_left is not None:
            self._body_left -= len(body)
        if message["more_body"] and self._body_left != 0:
            self._ask()
        else:
            self.is_watched = bool(self._asked)  # asked beyond the end, which was not to be: it would seem to have left
            self.is_body_done = True
        return body

    def _ask(self) -> None:
        """For the next pieces, together: each that is waited for by itself costs three switches between threads.

        For no more than there must be: to who asks beyond the end, Granian says from then on that the client has left.
        """
        wanted, left = 1, self._body_left
        if left is not None and left > FRAME_BYTES:
            size = max(self._largest, FRAME_BYTES if self.scope["http_version"] == "2" else READ_BYTES)
            wanted = math.ceil(min(left, AHEAD_BYTES) / size)
        if len(self._asked) <= wanted // 2:
            for _ in range(wanted - len(self._asked)):
                self._asked.append(self.protocol.receive())

    def _receive_message(self, timeout: float) -> Any:
        """Granian's next message. Raises ClientTooSlow after `timeout`, or below `min_body_rate`.

        Only time spent waiting here counts, so that a slow backend, for which the client has to pause, does not. Each
        byte pays for 1/rate seconds of waiting, which are saved up to `idle_timeout`: a client that was fast may pause,
        one that was fast once may not trickle for ever.
        """
        rate, idle = self.bridge.min_body_rate, self.bridge.idle_timeout
        limit = min(timeout, self._patience) if rate else timeout
        started = time.monotonic()
        try:
            message = self._wait(self._asked[0], limit)
        except ClientGone:
            self._is_too_slow = True
            raise ClientTooSlow(
                f"the request body came at less than {rate} bytes/s"
                if limit < timeout
                else f"nothing came of the request body for {timeout:g} s"
            ) from None
        del self._asked[0]
        if rate:
            earned = len(message.get("body", b"")) / rate
            left = max(0.0, self._patience - (time.monotonic() - started))
            self._patience = min(left + earned, max(idle, BODY_GRACE_SECONDS))
        return message

    def _wait(self, awaitable: Any, timeout: float | None = None) -> Any:
        """The result of what Granian returned; blocks this thread until it is there, for `idle_timeout` at most.

        Raises ClientGone after that time.
        """
        if not is_done(awaitable):
            ready = Lock()
            ready.acquire()
            when_done(awaitable, lambda _: ready.release())
            if not ready.acquire(timeout=self.bridge.idle_timeout if timeout is None else timeout):
                raise ClientGone("the client neither sent nor read anything in time")
        return result_of(awaitable)

    # The request.

    def incoming(self, heads: RequestHeads) -> Incoming:
        """For a `Forwarding`."""
        scope = self.scope
        made = Incoming(
            heads,
            scope["method"],
            self._path(),
            self._target(),
            VERSIONS.get(scope["http_version"], "1.1"),
            scope["scheme"],
            scope["client"][0],
            scope["headers"],
        )
        made.client = self
        if made.head.is_bodiless:
            self.is_body_done = True
        else:
            made.is_ended = self._note_body(made.length, b"transfer-encoding" in made.head.fields)
            if not self.is_body_done:
                made.stream = RequestBody(self.receive)
        return made

    def _note_body(self, length: str, is_chunked: bool) -> bool:
        """Where the body ends. True if there may be one without a length, whose end Granian will tell."""
        if length:
            with contextlib.suppress(ValueError):  # who reads it refuses what is not a number
                self._body_left = parse_content_length(length.encode("latin-1"))
            self.is_body_done = self._body_left == 0
            return False
        # HTTP/2 tells only at its end whether there is a body.
        self.is_body_done = not (is_chunked or self.scope["http_version"] == "2")
        return not self.is_body_done

    def _path(self) -> str:
        raw_path: bytes = self.scope["raw_path"]
        return (unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path).decode("latin-1")

    def _target(self) -> bytes:
        raw_path: bytes = self.scope["raw_path"]
        query: bytes = self.scope["query_string"]
        return b"%s?%s" % (raw_path, query) if query else raw_path

    def _environ(self) -> WSGIEnvironment:
        scope = self.scope
        environ: WSGIEnvironment = {
            "REQUEST_METHOD": scope["method"],
            "SCRIPT_NAME": "",
            "PATH_INFO": self._path(),
            "QUERY_STRING": scope["query_string"].decode("latin-1"),
            "REQUEST_URI": self._target().decode("latin-1"),
            "SERVER_PROTOCOL": "HTTP/" + VERSIONS.get(scope["http_version"], "1.1"),
            "SERVER_NAME": scope["server"][0],
            "SERVER_PORT": scope["server"][1],
            "REMOTE_ADDR": scope["client"][0],
            "REMOTE_PORT": scope["client"][1],
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scope["scheme"],
            "wsgi.input": RequestBody(self.receive),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            HEADER_LINES: scope["headers"],
            CLIENT: self,
        }
        add_headers(environ, scope["headers"])
        if self._note_body(environ.get("CONTENT_LENGTH", ""), "HTTP_TRANSFER_ENCODING" in environ):
            environ["wsgi.input_terminated"] = True
        return environ
