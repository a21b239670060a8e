"""What an operator wants to know of afterwards: health transitions, admin actions, changes of the configuration."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from balancer.balancing.changes import ChangeKind, Severity
from balancer.observe.plain import fill
from balancer.protocol.texts import shown

EVENTS_KEPT, MESSAGE_KEPT = 500, 1000  # bytes of each: a reload may have much to say; 600 kB in all
EventKind = Literal[
    ChangeKind,
    Literal["statistics_reset", "write_refused", "config_reloaded", "config_refused"],
    Literal["certificate_changed", "certificate_refused", "certificate_expires"],
    Literal["canary_step", "canary_done", "canary_returned", "draining"],
    Literal["name_kept", "name_found", "source_failed", "source_recovered", "keys_kept", "keys_found"],
    Literal["change_undone", "state_restored", "state_failed", "state_written"],
    Literal["cluster_found", "cluster_lost", "member_joined", "member_left", "decision_left_out"],
    Literal["limit_reached", "limit_keys_full", "scaled_up", "scaled_down", "scaling_advised", "scaling_failed"],
    Literal["start_failed", "backend_ended", "worker_lost"],
]
REFUSED: EventKind = "write_refused"  # the one kind of event that anybody can cause
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)


class Event(TypedDict):
    seq: int
    timestamp: float
    kind: EventKind
    backend: str | None
    message: str
    severity: Severity
    by: str | None
    count: int


class KeptEvent(TypedDict):
    """With its message for readers without a token."""

    event: Event
    public: str


class Events:
    """The newest events with a rising `seq`, so that a reader asks only for what is new.

    `_lock` guards all three: `_seq`, `_events`, `_counts`.
    """

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._lock = Lock()
        self._wall_clock = wall_clock
        self._seq = 0
        self._counts: dict[str, int] = dict.fromkeys(EVENT_KINDS, 0)
        # Each with its message for readers without a token.
        self._events: deque[tuple[Event, str]] = deque(maxlen=EVENTS_KEPT)

    def add(
        self,
        kind: EventKind,
        backend: str | None,
        message: str,
        severity: Severity = "info",
        by: str | None = None,
        *,
        public: str | None = None,
    ) -> None:
        """`by` is who asked for it; `public` the message for readers without a token, where that must be another one.

        Refused writes that follow each other become one event with a `count`, or any page could flood the log.
        """
        message = shown(message, MESSAGE_KEPT)
        public = message if public is None else shown(public, MESSAGE_KEPT)
        with self._lock:
            self._seq += 1
            self._counts[kind] = self._counts.get(kind, 0) + 1
            count = 1
            if kind == REFUSED and self._events and self._events[-1][0]["kind"] == REFUSED:
                count += self._events.pop()[0]["count"]
            event: Event = {
                "seq": self._seq,
                "timestamp": self._wall_clock(),
                "kind": kind,
                "backend": backend or None,
                "message": message,
                "severity": severity,
                "by": by,
                "count": count,
            }
            self._events.append((event, public))

    def since(self, seq: int, whole: bool = True) -> tuple[list[Event], int]:
        """(events with a higher `seq`, oldest first; the newest `seq`). `whole` is for readers with a token."""
        with self._lock:
            newer, latest = [(event, public) for event, public in self._events if event["seq"] > seq], self._seq
        return [event if whole else {**event, "message": public} for event, public in newer], latest

    # Over restarts.

    def kept(self) -> dict[str, KeptEvent]:
        """Those that `since` tells, by their `seq`."""
        with self._lock:
            return {str(event["seq"]): {"event": event, "public": public} for event, public in self._events}

    def restore(self, kept: Iterable[KeptEvent]) -> None:
        """These came before those that there are. What came last may not have been kept, and its `seq` be known to a
        reader, who would not ask for another event of that number: so some are left out."""
        with self._lock:
            ours = self._events.copy()
            self._events.clear()
            self._events.extend(
                (each["event"], each["public"]) for each in sorted(kept, key=lambda each: each["event"]["seq"])
            )
            self._seq = self._events[-1][0]["seq"] + EVENTS_KEPT if self._events else 0
            for event, public in ours:
                self._seq += 1
                self._events.append(({**event, "seq": self._seq}, public))

    def restore_counts(self, kept: Any) -> None:
        """Go on from what `plain` made of `counts`."""
        with self._lock:
            for kind, count in fill({}, kept).items():
                self._counts[kind] = self._counts.get(kind, 0) + count

    def counts(self) -> dict[str, int]:
        """How many of each kind there have been, also those that are no longer kept."""
        with self._lock:
            return self._counts.copy()

    @property
    def latest(self) -> int:
        return self._seq
