"""The body of a request as Granian gives it: how much there is, what has come, and how long to wait for the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from balancer.edge.accepted import Address
from balancer.edge.listener import FRAME_BYTES, GRACE_SECONDS, Listener
from balancer.edge.promise import cancel, is_done, is_done_within, result_of
from balancer.errors import ClientGone, ClientTooSlow, ExpectationFailed
from balancer.protocol.client import Unwanted
from balancer.protocol.requestheads import RequestHead

# A piece costs a switch of threads, however small it is. Of those below SMALL_PIECE bytes a body may have so many, and
# so many more for each second: else a client could send in a moment what keeps us busy for minutes after it has left.
SMALL_PIECE, SMALL_PIECES, SMALL_PIECES_PER_SECOND = 64, 5000, 100
MOMENT_SECONDS = 0.1  # in which more of a small body has to come, or its request goes on without
EXPECT_SECONDS = 2.0  # for a client that waits for 100 (Continue), of a backend's answer; many clients wait for 1 s
MOST_PIECES = 64  # that are handed on together
MOST_SMALL_PIECES = 16  # in which a small body may come without a thread that waits for it


class ClientBody:
    """Used by one thread at a time: Granian's while a small body comes in, then a worker.

    `is_here`: all of it has come, so that `receive` will not wait. `is_done`: all of it has been received.
    `is_too_slow`: it was given up. `is_spent`: Granian was asked for more than there was, so it says from now on that
    the client has left. `is_paused`: what came last is on its way to the backend, and the client may have to wait for
    that. `patience`: seconds that we still wait for it, as `min_body_rate` has it.
    """

    __slots__ = (
        *("_protocol", "_listener", "_address", "_is_http2", "_is_expected", "_waits_for_word", "_left", "_largest"),
        *("_asked", "patience"),
        *("look", "is_here", "is_done", "is_spent", "is_too_slow", "is_paused", "_excused", "_small", "_first_small"),
    )

    def __init__(
        self, protocol: Any, listener: Listener, address: Address, head: RequestHead, *, is_http2: bool
    ) -> None:
        self._protocol = protocol
        self._listener = listener
        self._address = address
        self._is_http2 = is_http2
        # The client waits for 100 (Continue), which hyper sends in HTTP/1.1 once the body is asked for, and else never.
        self._is_expected = b"expect" in head.fields and head.fields[b"expect"][0].lower() == b"100-continue"
        self._waits_for_word = self._is_expected and is_http2  # there, for longer than it likes
        self._left = head.length  # None if only its end will tell
        self._largest = 0  # bytes of a piece, so far
        self.look: Callable[[bool], bool] | None = None  # for an answer, see `Client.watch_upload`
        self._asked: list[Any] = []  # for pieces that have not been taken yet, in their order
        self.patience = GRACE_SECONDS
        self.is_here = False
        self.is_done = head.length == 0 and not is_http2  # there, only the end of the stream tells that this is true
        self.is_spent = False
        self.is_too_slow = False
        self.is_paused = False
        self._excused = 0.0  # seconds of waiting that were not the client's doing
        self._small, self._first_small = 0, 0.0  # pieces, and when the first of them came

    def is_small(self, most: int) -> bool:
        """True if at most `most` bytes follow, or in HTTP/2 perhaps none, and the client waits for no word of ours
        before it sends them."""
        if self._left is None:
            return self._is_http2
        return self._left <= most and not self._is_expected

    def missing(self) -> Any:
        """What it still waits for, as Granian's promise. None if there is nothing to wait for: it `is_here` then, or it
        is one for a worker thread."""
        left, asked = self._left, self._asked
        for number in range(MOST_SMALL_PIECES):
            if number == len(asked):
                asked.append(self._protocol.receive())
            if not is_done(asked[number]):
                return asked[number]
            message = result_of(asked[number])
            if message["type"] != "http.request":
                return None
            if left is None:
                self.is_here = not (message["body"] or message["more_body"])
                return None
            left -= len(message["body"])
            if self._is_end(left, message):
                self.is_here = True
                return None
        return None

    def is_prompt(self) -> bool:
        """True if the next piece comes within a moment, or nothing has to come any more."""
        if self.is_done:
            return True
        self._ask()
        return is_done_within(self._asked[0], MOMENT_SECONDS)

    def receive(self, timeout: float | None = None) -> list[bytes]:
        """What has come, at least one piece, [] at its end. Raises ClientGone, ClientTooSlow."""
        pieces: list[bytes] = []
        size = 0
        self.is_paused = False
        while not self.is_done and (
            not pieces
            or self._left == 0  # the last of them waits for the end of its stream, see `_is_end`
            or (len(pieces) < MOST_PIECES and self._is_here(self._listener.ahead_bytes - size))
        ):
            piece = self._receive_piece(timeout)
            if piece:
                pieces.append(piece)
                size += len(piece)
        self.is_paused = not self.is_done
        if self.is_paused:
            self._ask()  # while these go on
        return pieces

    def let_go(self) -> None:
        """No more of it is wanted. While somebody asks, or could ask, hyper waits for it, also after the answer."""
        for promise in self._asked:
            cancel(promise)
        self._protocol = None

    def _is_here(self, most: int) -> bool:
        """True if the next piece has come, and has no more than so many bytes."""
        asked = self._asked
        return bool(asked) and is_done(asked[0]) and len(result_of(asked[0]).get("body", b"")) <= most

    def _is_end(self, left: int | None, message: Any) -> bool:
        """True if `message` is the last one, after which so many bytes are missing.

        In HTTP/2 the stream has an end of its own, and more may come before it than Content-Length said: such a
        request is malformed and must not go on (RFC 9113 section 8.1.1). hyper sees to it, but only when it comes.
        """
        return not message["more_body"] or (left == 0 and not self._is_http2)

    def _receive_piece(self, timeout: float | None) -> bytes:
        if not self._asked:
            self._ask()
        message = self._receive_message(timeout)
        if message["type"] != "http.request":
            raise ClientGone("the client left before its request was complete")
        body: bytes = message["body"]
        if len(body) > self._largest:
            self._largest = len(body)
            self._waits_for_word = False
        if self._left is not None:
            self._left -= len(body)
        if len(body) < SMALL_PIECE:
            self._count_small()
        if self._is_end(self._left, message):
            self.is_spent = bool(self._asked)  # asked beyond the end, which was not to be
            self.is_done = True
        elif not self._asked:
            self._ask()
        return body

    def _ask(self) -> None:
        """For the next pieces, together: each that is waited for by itself costs three switches between threads.

        No more than there must be: once asked beyond the end, Granian says that the client has left.
        """
        wanted, left = 1, self._left
        if left is not None and left > FRAME_BYTES:
            size = max(self._largest, FRAME_BYTES if self._is_http2 else self._listener.most_read)
            wanted = math.ceil(min(left, self._listener.ahead_bytes) / size)
        if len(self._asked) <= wanted // 2:
            for _ in range(wanted - len(self._asked)):
                self._asked.append(self._protocol.receive())

    def _receive_message(self, timeout: float | None) -> Any:
        """Granian's next message. Raises as `_wait`."""
        waited = 0.0 if is_done(self._asked[0]) else self._wait(timeout)
        message = result_of(self._asked.pop(0))
        self.patience = self._listener.patience_left(self.patience, waited, len(message.get("body", b"")))
        return message

    def _wait(self, timeout: float | None) -> float:
        """For the next message. Returns the seconds that count. Raises ClientTooSlow after `timeout`, or
        `idle_timeout`, or below `min_body_rate`, ExpectationFailed, and Unwanted.

        Only time spent waiting here counts, so that a slow backend, for which the client has to pause, does not.
        """
        longest = timeout or self._listener.limits.idle_timeout
        limit = min(longest, self._listener.longest_wait(self.patience))
        if self._waits_for_word:
            limit = min(limit, EXPECT_SECONDS)
        started = time.monotonic()
        while not is_done_within(self._asked[0], limit, None if self.look is None else self._look_for_answer):
            if timeout is not None or not self._is_excused():
                self.is_too_slow = True
                self._look_for_answer()
                if self._waits_for_word:
                    raise ExpectationFailed("100 (Continue) cannot be sent over HTTP/2, send it without Expect")
                raise ClientTooSlow(
                    f"the request body came at less than {self._listener.limits.min_body_rate} bytes/s"
                    if limit < longest
                    else f"nothing more of the request body came for {longest:g} s"
                )
            now = time.monotonic()
            self._excused += now - started
            started = now
        return time.monotonic() - started

    def _look_for_answer(self) -> None:
        """Raises Unwanted, and as `look`. Who sends no more, or waits for a word, gets any answer that is here."""
        if self.look is not None and self.look(self.is_too_slow or self._waits_for_word):
            raise Unwanted

    def _is_excused(self) -> bool:
        """Other uploads of its connection hold it up. They end within `idle_timeout`, so it is excused no longer."""
        if not self._is_http2 or self._excused > self._listener.limits.idle_timeout:
            return False
        return self._listener.is_held_up(self._address)

    def _count_small(self) -> None:
        """Raises ClientTooSlow: what comes in so many pieces is not worth the work."""
        now = time.monotonic()
        self._first_small = self._first_small or now
        self._small += 1
        if self._small > SMALL_PIECES + SMALL_PIECES_PER_SECOND * (now - self._first_small):
            self.is_too_slow = True
            raise ClientTooSlow(f"the request body came in {self._small} pieces of less than {SMALL_PIECE} bytes")
