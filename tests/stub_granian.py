"""In place of Granian: a request whose body comes when the test says so. `bench.guard.Client` has all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import guard

GONE = {"type": "http.disconnect"}


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


class Promise:
    """What Granian's `receive` returns: done later, in another thread."""

    def __init__(self) -> None:
        self._message: dict[str, Any] | None = None
        self._callback: Callable[[Any], object] | None = None

    def done(self) -> bool:
        return self._message is not None

    def result(self) -> dict[str, Any]:
        assert self._message is not None
        return self._message

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._callback = callback

    @property
    def is_awaited(self) -> bool:
        return self._callback is not None

    def keep(self, message: dict[str, Any]) -> None:
        self._message = message
        if self._callback is not None:
            self._callback(self)


class Client(guard.Client):
    """`asked` has what was asked for, in order; `is_done` once the request was given back, `is_whole` if its
    answer was: else Granian breaks that off."""

    def __init__(self, kind: guard.Kind = guard.KINDS["get"]) -> None:
        super().__init__(kind)
        self.asked: list[Promise] = []
        self.is_done = self.is_whole = False
        self._come: list[dict[str, Any]] = []

    def receive(self) -> Promise:  # type: ignore[override]
        promise = Promise()
        self.asked.append(promise)
        if self._come:
            promise.keep(self._come.pop(0))
        return promise

    def send(self, message: dict[str, Any]) -> Any:
        done = super().send(message)
        self.is_whole |= not message.get("more_body", True)
        return done

    def come(self, *messages: dict[str, Any]) -> None:
        """Messages that are here before they are asked for."""
        self._come += messages

    def done(self) -> None:
        self.is_done = True
