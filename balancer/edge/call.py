"""One request between Granian and who answers it: its client, its answer, and the thread that has it.

Granian's `send` acts at once, in whichever thread calls it; what it returns need only be waited for when the client is
slow.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

from balancer.edge import accepted
from balancer.edge.clientbody import ClientBody
from balancer.edge.download import Download
from balancer.edge.listener import Listener
from balancer.edge.promise import is_done_within
from balancer.edge.scope import environ_of, request_of
from balancer.errors import BackendRemoved, BalancerError, ClientGone, ClientStalled
from balancer.forwarding.answer import Answer
from balancer.forwarding.forwarding import Forwarding
from balancer.protocol.client import Abortable, Leaving
from balancer.protocol.messages import SERVER_LINE, parse_content_length
from balancer.protocol.request import Request, RequestBody
from balancer.protocol.requestheads import RequestHeads

log = logging.getLogger("balancer.server")

LINGER_SECONDS = 2.0  # and LINGER_BYTES: what is read and dropped after an answer that came before the request's end
LINGER_BYTES = 16 * 1024 * 1024
FLUSH_SECONDS = 0.25  # for an answer to be written, of which Granian says nothing, before its connection is cut
PACKED_HEAD = 4096  # bytes of a head that HPACK may make small from what it has seen (RFC 7541 section 4.2)


class Call(Leaving):
    """One request, from hyper and back: answered by its `forwarding`, or by the app. To whoever waits on its behalf it
    is the `Client`.

    It belongs to one thread at a time: Granian's that brings it, then maybe a worker, the express thread, a worker
    again. While its client has no room for more of its `download` it is parked with the listener and belongs to nobody:
    whoever takes it out goes on with it.

    Granian's thread says that its client has left.
    """

    __slots__ = (
        *("listener", "is_control", "forwarding", "scope", "is_http2", "protocol", "_watcher", "started"),
        *("is_watched", "body", "download"),
        *("_status", "_headers", "_is_started", "_is_ended", "_is_last"),
    )

    def __init__(self, listener: Listener, watcher: Any, is_control: bool = False, is_last: bool = False) -> None:
        self.listener = listener
        self.is_control = is_control
        self.forwarding: Forwarding | None = None  # else the app answers
        self.scope: dict[str, Any] = watcher.scope
        self.is_http2 = self.scope["http_version"] == "2"
        self.protocol = watcher.proto
        self._watcher = watcher
        self.started = time.monotonic()
        self.is_gone = False
        self.is_watched = False
        self.body: ClientBody | None = None  # there is none, or nobody has looked yet
        self.download: Download | None = None  # once the answer is more than can be handed over whole
        self._lock = Lock()
        self._attached: Abortable | None = None
        self._status: int | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_started = False
        self._is_ended = False
        self._is_last = is_last  # of its connection

    # --- Granian's thread brings it, or a worker makes an environ of it: the request. ---

    def request(self, heads: RequestHeads) -> Request:
        made = request_of(self.scope, heads)
        made.client = self
        if not made.head.is_bodiless:
            self.body = ClientBody(
                self.protocol, self.listener, self.scope["client"], made.head, is_http2=self.is_http2
            )
            made.is_ended = True
            made.stream = RequestBody(self.receive, self.body.is_prompt)
        return made

    # --- The loop's thread, or Granian's: the client is looked after, and may leave. ---

    def may_be_watched(self) -> bool:
        """No more of a body will come, so that Granian can be asked for the client's leaving."""
        if self.body is not None:
            return self.body.is_done and not self.body.is_spent
        framing = (b"content-length", b"transfer-encoding")  # in the queue, nobody has looked yet
        return not self.is_http2 and not any(name in framing for name, _ in self.scope["headers"])

    @property
    def is_paused(self) -> bool:
        """Its client may have to wait until its backend reads on; once it is answered, nobody waits for that."""
        return self.body is not None and self.body.is_paused and not self._is_started

    @property
    def addresses(self) -> tuple[accepted.Address, accepted.Address]:
        return self.scope["client"], self.scope["server"]

    @property
    def source(self) -> str:
        """Whose share of the worker threads it uses; "" has no limit."""
        return self.listener.source_of(self.scope["client"][0])

    # --- Any thread. ---

    def leave_backend(self, is_there: Callable[[Forwarding], bool]) -> bool:
        """End what it has in flight on a backend; False if it is not there. What is attached cannot become another
        backend's meanwhile: that takes the lock."""
        with self._lock:
            forwarding = self.forwarding
            if forwarding is None or not is_there(forwarding):
                return False
            if self._attached is not None:
                self._attached.abort()
        return True

    # --- A worker, or the thread that has it: what a `Client` does. ---

    def watch_upload(self, look: Callable[[bool], bool] | None) -> None:
        if self.body is not None:
            self.body.look = look

    def end_connection(self) -> None:
        self._is_last = True

    def receive(self, timeout: float | None = None) -> list[bytes]:
        """What has come of the request body, [] at its end. Raises ClientGone, ClientTooSlow."""
        if self.body is None:
            return []
        try:
            return self.body.receive(timeout)
        except ClientGone:
            self.is_gone = True
            raise

    # --- A worker. ---

    def run(self) -> None:
        """Connect and leave the waiting to the express way, or do it all. Never raises."""
        try:
            is_handed_on = self.download is None and self.listener.connect(self)
        except BaseException:
            log.exception("request failed")
            self.refuse()
        else:
            if not is_handed_on:
                self.answer(self.listener.patience)

    # --- The thread that has it, whichever it is: the answer, from its beginning to its end. ---

    def answer(self, patience: float = 0.0) -> None:
        """Answer, or go on with the answer. Waits at most so long for the client to read on; the call is parked then,
        and maybe somebody else's. Never raises."""
        is_over = True
        try:
            if self.download is None:
                self._begin_answer()
            if self.download is not None:
                is_over = self._send_pieces(self.download, patience)
            if is_over and self.body is not None and not (self.body.is_done or self.is_gone):
                self._end_early(self.body)
        except ClientGone:
            if self._is_started and not self.is_gone:  # it does not read what an app writes
                self.cut()
        except BaseException:
            self._fail()
        finally:
            if is_over:
                self._end()
        if not is_over:
            self.listener.park(self)

    def refuse(self) -> None:
        """Answer that there is no room, in the calling thread. Neither blocks nor raises."""
        if self.download is not None:  # too late for an answer
            self.abandon()
            return
        try:
            self._is_last |= not self.may_be_watched()  # nobody will read the rest of its body
            if self.forwarding is not None:
                self._pass_on(self.forwarding.refuse())
            else:
                self.start_response("503 Service Unavailable", [("retry-after", "1"), ("content-length", "0")])
                self._send_last(b"")
        except BaseException:
            self._fail()
        finally:
            self._end()

    def abandon(self, why: type[ClientGone | BackendRemoved] = ClientGone) -> None:
        """End a download that is parked, or about to go on. Neither blocks nor raises."""
        try:
            assert self.download is not None
            self.download.close(why)
        except BaseException:
            log.exception("closing an answer failed")
        finally:
            self._end()

    def leave(self) -> bool:
        """The client does not read: True if its stream can end alone, False if its connection has to."""
        return self.is_http2 and self.download is not None and self.listener.leave(self, self.download.unread)

    def cut(self) -> None:
        """End the client's connection: hyper would wait for a client that neither reads nor says any more."""
        accepted.cut_all([self.addresses])

    def _begin_answer(self) -> None:
        if self.forwarding is not None:
            self._pass_on(self.forwarding.run())
        else:
            self._start_download(self._call_app())

    def _pass_on(self, answer: Answer) -> None:
        self._status, _, self._headers, body = answer
        if isinstance(body, bytes):
            self._send_last(body)
        else:
            self._start_download(body)

    def _start_download(self, chunks: Iterable[bytes]) -> None:
        self.download = Download(self.listener, chunks, self._length(), is_http2=self.is_http2)
        self.listener.begin_download(self)

    def _send_pieces(self, download: Download, patience: float) -> bool:
        """False if the client has to read what it has first; True at the end, or if it has left."""
        is_over = True
        try:
            while not self.is_gone:
                if not download.has_room(patience):
                    is_over = False
                    return False
                piece = download.next_piece()
                if piece is None:
                    if not self._is_ended:
                        self._send_last(b"")
                    return True
                if not self._is_started and isinstance(piece, bytes) and len(piece) == download.left:
                    self._send_last(piece)  # else hyper may close while the rest of a refused body is still coming
                elif not self._is_ended:  # else the app has something to do after its last piece
                    download.sent(len(piece), self._send(piece))
            return True
        finally:
            if is_over:
                download.close()

    def _length(self) -> int | None:
        """Bytes of the body, if its head tells."""
        lengths = [value for name, value in self._headers if name == b"content-length"]
        with contextlib.suppress(ValueError):  # an app may say anything
            return parse_content_length(lengths[0]) if lengths else None
        return None

    def _end_early(self, body: ClientBody) -> None:
        """The answer came before the end of the request. Read on for a while before closing: to close on a client that
        still sends would reset the connection, and it might never see the answer (RFC 9112 section 9.6)."""
        body.patience = math.inf  # from now on only these seconds count
        with contextlib.suppress(BalancerError):  # it left, or says no more
            if body.is_too_slow:  # it has had its time
                self._linger(body, FLUSH_SECONDS)
            elif self.listener.lingering.acquire(blocking=False):
                try:
                    self._linger(body, LINGER_SECONDS)
                finally:
                    self.listener.lingering.release()

    def _linger(self, body: ClientBody, seconds: float) -> None:
        received, deadline = 0, time.monotonic() + seconds
        while received < LINGER_BYTES and not body.is_done and (left := deadline - time.monotonic()) > 0:
            received += sum(map(len, self.receive(left)))

    def _fail(self) -> None:
        """After a surprise; the app's own errors are answered by the app. Never raises."""
        if self._is_ended:
            log.exception("failed after the answer")
            return
        if self._is_started:  # after the head, to break the answer off is all that is left
            log.debug("answer broken off", exc_info=True)
            return
        log.exception("request failed")
        self._status, self._headers = 500, [SERVER_LINE]
        with contextlib.suppress(BaseException):
            self._send_last(b"")

    def _end(self) -> None:
        """Give the request back to Granian. If the answer is not whole, that breaks it off so that its client sees it:
        HTTP/2 resets the stream alone (RFC 9113 section 8.1), HTTP/1 ends the connection before the body's end."""
        self.forwarding = None  # it refers to us, and only the garbage collector could free the two
        if self.download is not None:
            self.listener.end_download(self, self.download.unread, self.download.promise)
            self.download = None  # as well
        self.listener.calls.pop(self, None)
        self._watcher.done()
        if self.body is not None and not self.body.is_done:  # HTTP/1 ends the connection now, HTTP/2 the stream alone
            self.body.let_go()
            self._watcher = self.protocol = None

    # --- The same thread: what goes to Granian. ---

    def _send_head(self) -> None:
        if self._status is None:
            raise RuntimeError("the app has not called start_response")
        self._is_started = True
        if self.is_http2:
            size = sum(len(name) + len(value) for name, value in self._headers)
            if size > PACKED_HEAD:
                self.listener.hand_over(self.scope["client"], size)
        elif self._is_last or self.listener.is_draining or (self.body is not None and self.body.is_too_slow):
            # hyper closes after it (RFC 9112 section 9.6). HTTP/2 has no such field, but GOAWAY.
            self._headers.append((b"connection", b"close"))
        self.protocol.send({"type": "http.response.start", "status": self._status, "headers": self._headers})

    def _send(self, piece: bytes) -> Any:
        """An empty first piece sends the head alone. Returns Granian's promise, None if there is none."""
        if not self._is_started:
            self._send_head()
        elif not piece:
            return None
        return self._hand_over(piece, more=True)

    def _send_last(self, piece: bytes) -> None:
        if not self._is_started:
            self._send_head()
        self._hand_over(piece, more=False)
        self._is_ended = True

    def _hand_over(self, piece: bytes, *, more: bool) -> Any:
        if self.is_http2:  # before, hyper has one answer of a connection at a time
            self.listener.hand_over(self.scope["client"], len(piece))
        return self.protocol.send({"type": "http.response.body", "body": piece, "more_body": more})

    # --- A worker, where the app answers: the gateway's side of PEP 3333. ---

    def _call_app(self) -> Iterable[bytes]:
        request = self.request(self.listener.heads)
        if request.refusal is not None:
            self.end_connection()
        return self.listener.app(environ_of(self.scope, request, RequestBody(self.receive)), self.start_response)

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        if exc_info is not None and self._is_started:
            raise exc_info[1].with_traceback(exc_info[2])
        self._status = int(status[:3])
        self._headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        if not any(name == b"server" for name, _ in self._headers):
            self._headers.append(SERVER_LINE)
        return self._write

    def _write(self, piece: bytes) -> None:
        """For apps that cannot do without. Blocks while the client is slow."""
        if not is_done_within(self._send(piece), self.listener.limits.idle_timeout):
            raise ClientStalled("the client read nothing in time")
