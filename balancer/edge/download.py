"""An answer that goes to its client in pieces, each when there is room for it: how large they are, how long we wait.

Granian keeps four pieces beside the one that hyper has, and says of the sixth when there is room for it. So what a
client can make us hold is six pieces of each of its answers. They are the smaller, the more answers are under way, and
larger for a client that reads on at once, for each is a switch of threads. The last six are together no larger than an
answer that goes whole, for of either nobody tells us whether it was read; so are the first six in HTTP/2, where a
client may ask for many answers and read none. Any other six are there no larger than what a connection may leave
unread, so that a stream that is paused can end alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from balancer.edge.accepted import MOST_OWED
from balancer.edge.listener import GRACE_SECONDS, Listener
from balancer.edge.promise import is_done, is_done_within
from balancer.errors import BackendRemoved, ClientGone
from balancer.forwarding.answer import ResponseStream
from balancer.forwarding.forwarding import WHOLE_STREAM

WHOLE = 131072  # bytes of an answer that is handed over whole, before HTTP/2, where hyper has one of them at a time
UNREAD_PIECES = 6  # of an answer can be handed over while nothing of it was read
# Bytes of a piece: at least, at most, at most if we cannot know the last ones, and of one piece of each answer in all.
LEAST_PIECE, LARGEST_PIECE, LARGEST_ENDLESS, PIECES = 8192, 131072, 32768, 4 * 1024 * 1024
# Of a client that has room again so soon; with pieces as large a slow one would not be seen to read for a minute.
LARGEST_PROMPT, PROMPT_SECONDS = 524288, 0.25
LARGEST_STREAMED = MOST_OWED // UNREAD_PIECES  # at most in HTTP/2


class Download:
    """Used by one thread at a time: whoever has its call.

    `promise`: of the newest piece, while the client has no room for it. `left`: bytes still to come, if that is known.
    """

    __slots__ = (
        *("_listener", "_chunks", "_iterator", "_stream", "_whole", "_is_http2", "left", "_chunk", "_at", "_pieces"),
        *("promise", "_since", "_patience", "_largest", "_sent", "_is_prompt"),
    )

    def __init__(self, listener: Listener, chunks: Iterable[bytes], length: int | None, *, is_http2: bool) -> None:
        """`length` in bytes, None if nobody knows."""
        self._listener = listener
        self._chunks = chunks
        self._iterator = iter(chunks)
        self._stream = chunks if isinstance(chunks, ResponseStream) else None
        self._whole = WHOLE_STREAM if is_http2 else WHOLE
        self._is_http2 = is_http2
        self.left = length
        self._chunk = b""  # of which `_at` bytes are sent
        self._at = 0
        self._pieces = self._largest = self._sent = 0  # how many, bytes of one, of all
        self.promise: Any = None
        self._since = 0.0  # of time.monotonic(): we wait for `promise` from then on
        self._is_prompt = True  # its client had room for the newest piece that had to wait within PROMPT_SECONDS
        self._patience = GRACE_SECONDS  # for which we still wait, as `min_body_rate` has it

    @property
    def is_here(self) -> bool:
        """No piece has to be waited for, so that any thread may go on with it."""
        return self._stream is not None and self._stream.is_here

    def next_piece(self) -> bytes | None:
        """None at the end."""
        most = self._most()
        if self._stream is not None:
            self._stream.most = most
            return next(self._stream, None)
        if self._at == len(self._chunk):
            chunk = next(self._iterator, None)
            if chunk is None or len(chunk) <= (most if self._pieces else self._whole):
                return chunk
            self._chunk, self._at = chunk, 0
        piece = self._chunk[self._at : self._at + most]
        self._at += len(piece)
        return piece

    def _most(self) -> int:
        """Bytes of the next piece."""
        small = self._whole // UNREAD_PIECES
        if self._is_http2 and self._pieces < UNREAD_PIECES:
            return small
        size = max(LEAST_PIECE, PIECES // max(1, len(self._listener.downloads)))
        largest = LARGEST_STREAMED if self._is_http2 else LARGEST_PIECE
        if self._is_prompt and self._pieces > UNREAD_PIECES and not self._is_http2:  # it has read one at least
            largest = LARGEST_PROMPT
        return min(size, LARGEST_ENDLESS if self.left is None else max(small, self.left - self._whole), largest)

    def sent(self, size: int, promise: Any) -> None:
        """A piece was handed over. Only time spent waiting for the client counts, as with `ClientBody`."""
        self._pieces += 1
        self._sent += size
        self._largest = max(self._largest, size)
        if self.left is not None:
            self.left -= size
        self._count(0.0, size)
        if not is_done(promise):
            self.promise = promise
            self._since = time.monotonic()

    def has_room(self, seconds: float) -> bool:
        """True if another piece may follow; waits at most so many seconds for it."""
        if self.promise is not None:
            if not is_done_within(self.promise, min(seconds, self._limit())):
                return False
            self.note_room()
        return True

    @property
    def unread(self) -> int:
        """Bytes that its client may not have read, of what was handed over."""
        return min(UNREAD_PIECES * self._largest, self._sent)

    def note_room(self) -> None:
        """The client has read on."""
        self.promise = None
        waited = time.monotonic() - self._since
        self._is_prompt = waited < PROMPT_SECONDS
        self._count(waited, 0)

    def _count(self, waited: float, size: int) -> None:
        self._patience = self._listener.patience_left(self._patience, waited, size)

    @property
    def deadline(self) -> float:
        """Of time.monotonic(): the client must have read on by then."""
        return self._since + self._limit()

    def _limit(self) -> float:
        return self._listener.longest_wait(self._patience)

    def close(self, why: type[ClientGone | BackendRemoved] = ClientGone) -> None:
        """Idempotent for what we forward. Before the end, `why` is recorded."""
        if self._stream is not None:
            self._stream.close(why)
        elif (close := getattr(self._chunks, "close", None)) is not None:
            close()
