"""Waiting for a place on a backend when all are full: one bounded queue, first come, first served.

A waiter may be ahead of others and still not be served first: one that has already tried the only backend with room
cannot use it. Such a waiter is passed over, and keeps its place; no other is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from threading import Lock
from typing import Generic, TypeVar

from balancer.protocol.request import Request

Place = TypeVar("Place")


class Waiter(Generic[Place]):
    """One request in the queue. The thread that waits sleeps on a lock of its own; `wake` is for any thread."""

    __slots__ = ("request", "exclude", "place", "error", "_wake")

    def __init__(self, request: Request, exclude: Collection[str]) -> None:
        self.request = request
        self.exclude = exclude
        self.place: Place | None = None
        self.error: BaseException | None = None  # what choosing a place for it came to
        self._wake = Lock()
        self._wake.acquire()

    def wait(self, seconds: float) -> bool:
        """Until there is a place or the client has left; False if the time is over before."""
        return self._wake.acquire(timeout=max(0.0, seconds))

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was woken already
            self._wake.release()

    abort = wake  # what a leaving client does to whatever its request waits for


class WaitingLine(Generic[Place]):
    """The queue. Not locked; the owner's lock guards it."""

    def __init__(self) -> None:
        self._waiters: dict[Waiter[Place], None] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def join(self, request: Request, exclude: Collection[str]) -> Waiter[Place]:
        waiter: Waiter[Place] = Waiter(request, exclude)
        self._waiters[waiter] = None
        return waiter

    def leave(self, waiter: Waiter[Place]) -> Place | None:
        """Out of the queue, with the place it got, if it got one. Raises what `choose` raised for it."""
        self._waiters.pop(waiter, None)
        if waiter.error is not None:
            raise waiter.error
        return waiter.place

    def serve(self, choose: Callable[[Request, Collection[str]], Place | None]) -> None:
        """Give out places in the order of arrival for as long as `choose` finds any. Never raises."""
        served: list[Waiter[Place]] = []
        for waiter in self._waiters:
            try:
                waiter.place = choose(waiter.request, waiter.exclude)
            except BaseException as error:  # a strategy's, about this request: neither the caller's nor the next one's
                waiter.error = error
            if waiter.place is not None or waiter.error is not None:
                served.append(waiter)
            elif not waiter.exclude:  # it takes any backend and finds none, so those behind it find none either
                break
        for waiter in served:
            del self._waiters[waiter]
            waiter.wake()

    def dismiss(self) -> None:
        """Send everybody away without a place."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            waiter.wake()
