"""A finished request as it is recorded: what was tried for it, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balancer.backends import Choice

# Characters that are kept: thousands of requests are, and each may have a path as long as its head may be.
PATH_KEPT = 1000
METHOD_KEPT = 32
PATH_SHOWN = 200  # characters of a path that are kept; the query never is, it may hold secrets


@dataclass(slots=True)
class Attempt:
    """One try on one backend. `seconds` until the response head was here or the attempt had failed."""

    choice: Choice
    outcome: str = ""  # a status, or the reason why there is none
    seconds: float = 0.0
    connect: float | None = None  # seconds for a new connection, None if a kept one was used
    error: str | None = None  # in words, for the operator
    resent: bool = False  # once more on a fresh connection, because the kept one had died
    at: float = 0.0  # seconds from the start of the request to that of the attempt

    @property
    def backend(self) -> str:
        return self.choice.backend.id

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "outcome": self.outcome,
            "error": self.error,
            "at": self.at,
            "seconds": self.seconds,
            "connect": self.connect,
            "resent": self.resent,
        }


@dataclass(slots=True)
class Exchange:
    """A finished request as it is recorded. Times in seconds; bytes are of the bodies.

    `status` is what the client saw, 499 if it had left; `reason` says why, if no backend's answer went through whole.
    """

    timestamp: float
    method: str
    path: str
    request_id: str
    backend: str | None = None
    status: int = 0
    seconds: float = 0.0
    queued: float = 0.0  # waited for a place on a backend
    bytes_in: int = 0
    bytes_out: int = 0
    complete: bool = True
    reason: str | None = None
    trace_id: str | None = None  # of the client's `traceparent`
    not_retried: str | None = None  # why the last failure was final, in words
    error: str | None = None  # of our own answer, in words for the operator
    excluded: Mapping[str, str] | None = None  # why no backend could take it, if that was the cause
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return not self.complete or self.status >= 500

    @property
    def aborted(self) -> bool:
        return self.status == 499 and not self.complete  # not if a backend answered 499 itself

    @property
    def is_troubled(self) -> bool:
        return self.failed or len(self.attempts) > 1

    @property
    def first_byte(self) -> float | None:
        """Seconds until the last attempt had its response head, None if it got none."""
        attempt = self.attempts[-1] if self.attempts else None
        return attempt.seconds if attempt is not None and attempt.outcome.isdecimal() else None

    def describe(self) -> dict[str, Any]:
        return {
            "timestamp": self.timestamp,
            "server_id": self.backend,
            "response_time": self.seconds,
            "status": self.status,
            "method": self.method,
            "path": self.path[:PATH_SHOWN],
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "queued": self.queued,
            "first_byte": self.first_byte,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "attempts": len(self.attempts),
            "tried": [attempt.describe() for attempt in self.attempts],
            "reason": self.reason,
            "not_retried": self.not_retried,
            "complete": self.complete,
        }

    def explain(self) -> dict[str, Any]:
        """`describe` with why each attempt went to its backend."""
        tried = [attempt.describe() | attempt.choice.describe() for attempt in self.attempts]
        algorithm = self.attempts[-1].choice.algorithm if self.attempts else None
        more = {"algorithm": algorithm, "error": self.error, "excluded": dict(self.excluded or {})}
        return self.describe() | more | {"tried": tried}
