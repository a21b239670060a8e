"""A finished request as it is recorded: what was tried for it, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from balancer.balancing.backends import Choice, ChoiceView
from balancer.balancing.pool import DEFAULT_POOL
from balancer.observe.websockets import WebSocketRecord, WebSocketView

# Characters that are kept: about 1,200 requests are, and each may have a path as long as its head may be. So one takes
# 5 kB at most, and of each attempt 1 kB, 50 bytes for each candidate and 100 for each that was none (`EXPLAINED`).
PATH_KEPT = 1000
METHOD_KEPT = 32
Hedged = Literal["won", "lost", "failed", "left"]
HEDGED: tuple[Hedged, ...] = get_args(Hedged)
DROPPED = "dropped"  # the outcome of an attempt that another one was faster than
PATH_SHOWN = 200  # characters of a path that are shown; the query is not even kept, it may hold secrets


def later(default: Any) -> Any:
    """A field that is seldom set, and not when the object is made: until then it costs nothing."""
    return field(default=default, init=False)


class AttemptView(TypedDict):
    backend: str
    outcome: str
    error: str | None
    at: float
    seconds: float
    connect: float | None
    resent: bool
    hedge: bool


class ExplainedAttemptView(AttemptView, ChoiceView):
    """With why it went there."""


@dataclass
class Attempt:
    """One try on one backend. `seconds` until the response head was here or the attempt had failed."""

    choice: Choice
    at: float  # seconds from the start of the request to that of the attempt
    outcome: str = later("")  # a status, or the reason why there is none
    seconds: float = later(0.0)
    connect: float | None = later(None)  # seconds for a new connection, None if a kept one was used
    error: str | None = later(None)  # in words, for the operator
    resent: bool = later(False)  # once more on a fresh connection, because the kept one had died
    hedge: bool = later(False)  # beside another one, which was late

    @property
    def backend(self) -> str:
        return self.choice.backend.id

    def describe(self) -> AttemptView:
        return {
            "backend": self.backend,
            "outcome": self.outcome,
            "error": self.error,
            "at": self.at,
            "seconds": self.seconds,
            "connect": self.connect,
            "resent": self.resent,
            "hedge": self.hedge,
        }


class FinishedView(TypedDict):
    timestamp: float
    server_id: str | None
    route: str | None
    pool: str | None
    response_time: float
    status: int
    method: str
    path: str
    request_id: str
    trace_id: str | None
    subject: str | None
    queued: float
    first_byte: float | None
    bytes_in: int
    bytes_out: int
    attempts: int
    reason: str | None
    not_retried: str | None
    complete: bool
    limit: str | None
    websocket: WebSocketView | None


class RecentView(FinishedView):
    tried: list[AttemptView]


class ExplainedView(FinishedView):
    algorithm: str | None
    error: str | None
    excluded: dict[str, str]
    tried: list[ExplainedAttemptView]


@dataclass
class Record:
    """A finished request as it is recorded. Times in seconds; bytes are of the bodies.

    `status` is what the client saw, 499 if it had left; `reason` says why, if no backend's answer went through whole.
    """

    timestamp: float
    method: str
    path: str
    request_id: str
    attempts: list[Attempt] = field(default_factory=list, init=False)
    route: str | None = later(None)  # its name, if there are any
    pool: str | None = later(DEFAULT_POOL)  # to which that leads, None if it is answered without a backend
    backend: str | None = later(None)
    status: int = later(0)
    seconds: float = later(0.0)
    queued: float = later(0.0)  # waited for a place on a backend
    bytes_in: int = later(0)
    bytes_out: int = later(0)
    complete: bool = later(True)
    reason: str | None = later(None)
    trace_id: str | None = later(None)  # of the client's `traceparent`
    subject: str | None = later(None)  # who sent it, if it was let in as somebody
    not_retried: str | None = later(None)  # why the last failure was final, in words
    error: str | None = later(None)  # of our own answer, in words for the operator
    websocket: WebSocketRecord | None = later(None)  # what came of it, if its backend switched; of no response time
    limit: str | None = later(None)  # the one that refused it, or would have, were its mode not `shadow`
    excluded: Mapping[str, str] | None = later(None)  # why no backend could take it, if that was the cause
    is_late: bool = later(False)  # so that a second backend may have been asked as well

    @property
    def failed(self) -> bool:
        return not self.complete or self.status >= 500

    @property
    def aborted(self) -> bool:
        return self.status == 499 and not self.complete  # not if a backend answered 499 itself

    @property
    def first_byte(self) -> float | None:
        """Seconds until the last attempt had its response head, None if it got none."""
        attempt = self.attempts[-1] if self.attempts else None
        return attempt.seconds if attempt is not None and attempt.outcome.isdecimal() else None

    def _finished(self) -> FinishedView:
        return {
            "timestamp": self.timestamp,
            "server_id": self.backend,
            "route": self.route,
            "pool": self.pool,
            "response_time": self.seconds,
            "status": self.status,
            "method": self.method,
            "path": self.path[:PATH_SHOWN],
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "subject": self.subject,
            "queued": self.queued,
            "first_byte": self.first_byte,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "attempts": len(self.attempts),
            "reason": self.reason,
            "not_retried": self.not_retried,
            "complete": self.complete,
            "limit": self.limit,
            "websocket": None if self.websocket is None else self.websocket.describe(),
        }

    def retried(self) -> list[Attempt]:
        """Those after which another backend was tried."""
        pairs = enumerate(pairwise(self.attempts))  # a hedge in front of another attempt was beside it
        return [each for place, (each, after) in pairs if not after.hedge and (place or not each.hedge)]

    @property
    def hedge(self) -> Hedged | None:
        """What came of the second attempt beside the first one, if there was one: its answer was passed on, or not, or
        it had none, or the client left before."""
        for place, attempt in enumerate(self.attempts):
            if attempt.hedge and not attempt.outcome:
                return "left"
            if attempt.hedge and attempt.outcome.isdecimal():
                return "won" if place == len(self.attempts) - 1 else "lost"
            if attempt.hedge:
                return "lost" if attempt.outcome == DROPPED else "failed"
        return None

    @property
    def in_turn(self) -> list[Attempt]:
        """The attempts as they began. Otherwise the one that the request went on with comes last."""
        return self.attempts if len(self.attempts) < 2 else sorted(self.attempts, key=lambda attempt: attempt.at)

    def describe(self) -> RecentView:
        return {**self._finished(), "tried": [attempt.describe() for attempt in self.in_turn]}

    def explain(self) -> ExplainedView:
        """`describe` with why each attempt went to its backend."""
        return {
            **self._finished(),
            "algorithm": self.attempts[-1].choice.algorithm if self.attempts else None,
            "error": self.error,
            "excluded": dict(self.excluded or {}),
            "tried": [{**attempt.describe(), **attempt.choice.describe()} for attempt in self.in_turn],
        }
