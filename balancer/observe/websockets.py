"""Open WebSockets, and what went over all there have been since the start of the process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from typing_extensions import TypedDict

from balancer.observe.plain import fill
from balancer.protocol.websocket import By


class WebSocketView(TypedDict):
    seconds: float
    messages_in: int
    messages_out: int
    close_code: int
    closed_by: By


@dataclass(slots=True, eq=False)
class WebSocketRecord:
    """What went over one, `in` from its client; `code` and `by` are known at its end. Whoever has the socket writes,
    anybody may read."""

    backend: str
    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0  # that it was open
    code: int = 0
    by: By = "balancer"

    def describe(self) -> WebSocketView:
        return {
            "seconds": self.seconds,
            "messages_in": self.messages_in,
            "messages_out": self.messages_out,
            "close_code": self.code,
            "closed_by": self.by,
        }


@dataclass(slots=True)
class WebSocketTotals:
    """`closes` by code and by whom; codes of applications count as `3xxx` and `4xxx`, for there are thousands."""

    opened: int = 0
    messages: Counter[str] = field(default_factory=Counter)  # in, out
    bytes: Counter[str] = field(default_factory=Counter)
    closes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, record: WebSocketRecord) -> None:
        self.messages.update({"in": record.messages_in, "out": record.messages_out})
        self.bytes.update({"in": record.bytes_in, "out": record.bytes_out})


class WebSockets:
    """`_lock` guards `_open` and `_ended`."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: set[WebSocketRecord] = set()
        self._ended = WebSocketTotals()

    def opened(self, record: WebSocketRecord) -> None:
        with self._lock:
            self._open.add(record)
            self._ended.opened += 1

    def closed(self, record: WebSocketRecord) -> None:
        code = str(record.code) if record.code < 3000 else f"{record.code // 1000}xxx"
        with self._lock:
            self._open.discard(record)
            self._ended.add(record)
            self._ended.closes[code, record.by] += 1

    def open(self) -> Counter[str]:
        """How many, by backend."""
        with self._lock:
            return Counter(record.backend for record in self._open)

    def all_open(self) -> list[WebSocketRecord]:
        with self._lock:
            return [*self._open]

    def restore(self, kept: Any) -> None:
        """Go on from what `plain` made of `totals`."""
        with self._lock:
            fill(self._ended, kept)

    def totals(self) -> WebSocketTotals:
        """With what went over those that are open."""
        with self._lock:
            ended, still_open = self._ended, list(self._open)
            totals = WebSocketTotals(ended.opened, ended.messages.copy(), ended.bytes.copy(), ended.closes.copy())
        for record in still_open:
            totals.add(record)
        return totals
