"""The client of a request, as those see it who wait on its behalf: it may leave at any time."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Protocol


class Unwanted(Exception):
    """A backend has answered: no more of the request body is wanted."""


class Abortable(Protocol):
    """What a request can block on: a connection, a place in a queue.

    `abort` wakes whoever blocks on it, from any thread, and makes what blocks later return at once; twice is as good as
    once. It neither blocks nor takes a lock that is held during `attach` or `detach`. The owner still cleans up.
    """

    def abort(self) -> None: ...


class Client(Protocol):
    """The client's side: aborts what is attached when the client leaves, at once if it has left already.

    One thing at a time, attached and detached by the thread to which the request belongs at that time. After `detach`
    it is not aborted any more, so that a descriptor closed then cannot be hit as somebody else's.
    """

    is_gone: bool

    def attach(self, target: Abortable) -> None: ...

    def detach(self) -> None: ...

    def watch_upload(self, look: Callable[[bool], bool] | None) -> None:
        """Its request body is sent on as it comes. Whoever waits for more of it looks now and then whether an answer of
        the backend has made that vain; with True any answer has. Then Unwanted ends the wait."""

    def end_connection(self) -> None:
        """The answer will be the last one; over HTTP/2 only a stream ends, which it does anyway."""


class Leaving:
    """Base of those that may leave: whoever makes one sets `is_gone` to False, `_lock`, and `_attached` to None.

    `_lock` guards `_attached` and the setting of `is_gone`, for which the leaving comes from another thread at any
    time; `is_gone` only ever becomes True, and may be read without the lock.
    """

    __slots__ = ("is_gone", "_lock", "_attached")

    is_gone: bool
    _lock: Lock
    _attached: Abortable | None

    def attach(self, target: Abortable) -> None:
        with self._lock:
            self._attached = target
            gone = self.is_gone
        if gone:  # by the thread that has it: no lock needed
            target.abort()

    def detach(self) -> None:
        with self._lock:
            self._attached = None

    def disconnect(self) -> None:
        """Wake whoever waits on its behalf. The lock is held so that what is attached is still this one's."""
        with self._lock:
            self.is_gone = True
            if self._attached is not None:
                self._attached.abort()


class Caller(Leaving):
    """One of ours, who waits for an answer itself, and leaves when it is no longer wanted."""

    def __init__(self) -> None:
        self.is_gone = False
        self._lock = Lock()
        self._attached = None

    def watch_upload(self, look: Callable[[bool], bool] | None) -> None: ...

    def end_connection(self) -> None: ...


class Unwatched:
    """A client of a server that cannot tell when clients leave."""

    is_gone = False

    def attach(self, target: Abortable) -> None:
        pass

    def detach(self) -> None:
        pass

    def watch_upload(self, look: Callable[[bool], bool] | None) -> None:
        pass

    def end_connection(self) -> None:
        pass


UNWATCHED: Client = Unwatched()
