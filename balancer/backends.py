"""A backend: where it listens, what is wanted of it, what was seen of it.

Only `BackendPool` changes a `Backend`, under its lock. Strategies and everybody else read.

State is two axes. `admin_state` is what the operator wants: `ready`, `drain` (no new requests, checks go on, requests
in flight finish) or `maint` (the same, and no checks). `health` is what the checks saw: `unknown` until the first one,
`up`, or `down` with a reason; `ejection` is what real traffic made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

from balancer.ejection import Ejection, LatencyWindow
from balancer.origin import Origin
from balancer.tally import Tally

AdminState = Literal["ready", "drain", "maint"]
HealthStatus = Literal["unknown", "up", "down"]

ID_PATTERN = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"  # also one step of a URL path, so not "." or ".."
MAX_CONNECTIONS = 1_000_000
MAX_WEIGHT = 256  # as in HAProxy: enough for any ratio, and sums stay small

# One new sample counts 20 %: ten requests tell a change of speed.
EWMA_SHARE = 0.2
# A failed attempt counts as this slow, or as twice what is remembered: a backend that refuses quickly must not look
# like the fastest and draw all traffic.
FAILURE_SECONDS = 1.0
# Without samples the remembered time halves every 5 s, so a slow backend is tried again: one that was 10 times slower
# gets its next chance after about 17 s without traffic.
EWMA_HALF_LIFE_SECONDS = 5.0
SLOW_START_SHARE = 0.1  # of its traffic for a backend that has just come back (Envoy's minimum)


@dataclass(slots=True)
class LastCheck:
    """The newest health check: epoch seconds, duration in seconds, and what came back."""

    at: float
    duration: float
    status: int | None
    error: str | None


@dataclass(slots=True)
class Health:
    """What the checks have seen. `since` is epoch seconds of the last change of `status`."""

    status: HealthStatus = "unknown"
    reason: str | None = None
    since: float = 0.0
    consecutive_failures: int = 0
    consecutive_successes: int = 0
    last_check: LastCheck | None = None

    @property
    def is_in_transition(self) -> bool:
        """A check contradicts the status but not yet often enough, so the next one should come soon."""
        return self.status == "unknown" or (
            self.consecutive_failures > 0 if self.status == "up" else self.consecutive_successes > 0
        )

    def describe(self, limits: Mapping[str, int]) -> dict[str, Any]:
        check = self.last_check
        return {
            "status": self.status,
            "reason": self.reason,
            "since": self.since,
            **limits,
            "consecutive_failures": self.consecutive_failures,
            "consecutive_successes": self.consecutive_successes,
            "last_check": None if check is None else asdict(check),
        }


@dataclass(slots=True, eq=False)
class Backend:
    """One server. `configured` are the fields that the configuration gave it, `source` where it came from."""

    id: str
    origin: Origin
    weight: int = 1
    max_connections: int | None = None
    admin_state: AdminState = "ready"
    active: int = 0
    is_leaving: bool = False  # removed by the operator, waits for its last request
    health: Health = field(default_factory=Health)
    ejection: Ejection = field(default_factory=Ejection)
    ewma: float = 0.0
    peak: float = 0.0
    ewma_at: float = 0.0
    unanswered: int = 0  # of `active`: those whose response has not begun
    heard_at: float = 0.0  # pool clock: the newest first byte, or when `unanswered` rose from 0
    window: LatencyWindow = field(default_factory=LatencyWindow)
    slow_start_at: float | None = None  # pool clock when it came back, while it gets less than its share
    _turns: float = 0.0  # of the slow start: choices it has earned to take part in
    tally: Tally = field(default_factory=Tally)
    source: str = "api"
    configured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_wanted(self) -> bool:
        """The operator lets it have requests."""
        return self.admin_state == "ready" and self.weight > 0

    @property
    def is_ready(self) -> bool:
        """Takes requests as long as it has room."""
        return self.is_wanted and self.health.status == "up" and self.ejection.status != "ejected"

    @property
    def is_full(self) -> bool:
        return self.max_connections is not None and self.active >= self.max_connections

    @property
    def is_drained(self) -> bool:
        return self.admin_state != "ready" and self.active == 0

    @property
    def state(self) -> str:
        """What to show: the operator's word unless it is `ready`, else the health, else what traffic made of it."""
        if self.admin_state != "ready":
            return "drained" if self.admin_state == "drain" and self.is_drained else self.admin_state
        if self.health.status == "up" and self.ejection.status != "none":
            return self.ejection.status
        return self.health.status

    @property
    def absence(self) -> str:
        """Why it takes no requests, in words."""
        if self.admin_state != "ready":
            return self.admin_state
        if self.weight == 0:
            return "weight 0"
        if self.health.status != "up":
            return f"{self.health.status}: {self.health.reason}" if self.health.reason else self.health.status
        return f"ejected: {self.ejection.reason}"

    @property
    def overrides(self) -> dict[str, Any]:
        """What the configuration says where the operator has changed it at run time."""
        return {name: value for name, value in self.configured.items() if self.setting(name) != value}

    def setting(self, name: str) -> Any:
        """The live value of a field as the configuration writes it."""
        return self.origin.url if name == "url" else getattr(self, name)

    def forget(self, wall_now: float) -> None:
        """It has moved to another origin: nothing is known of it."""
        self.health = Health(since=wall_now)
        self.ejection, self.window = Ejection(), LatencyWindow()
        self.ewma = self.peak = 0.0
        self.unanswered = 0
        self.slow_start_at = None

    def describe(self, now: float, wall_now: float, limits: Mapping[str, int]) -> dict[str, Any]:
        """As plain values, for the API. `now` is of the pool's clock; `limits` are fall and rise."""
        return {
            "id": self.id,
            "url": self.origin.url,
            "healthy": self.health.status == "up",
            "active_connections": self.active,
            "weight": self.weight,
            "max_connections": self.max_connections,
            "state": self.state,
            "admin_state": self.admin_state,
            "drained": self.is_drained,
            "source": self.source,
            "overrides": self.overrides,
            "ejection": self.ejection.describe(wall_now - now),
            "health": self.health.describe(limits),
        }

    # Speed.

    def response_time(self, now: float) -> float:
        """Remembered time to first byte in seconds, 0.0 if never measured; decays while there are no samples."""
        return self.ewma * self._freshness(now)

    def peak_time(self, now: float) -> float:
        """Like `response_time`, but a worse sample counts in full at once and is forgotten only as time passes."""
        return self.peak * self._freshness(now)

    def silence(self, now: float) -> float:
        """Seconds for which requests have been waiting here without one being answered: what a backend that stalls
        will show as response time only when it is too late. 0.0 while nothing waits."""
        return now - self.heard_at if self.unanswered else 0.0

    def ask(self, now: float) -> None:
        """One more request waits for its answer to begin."""
        if not self.unanswered:
            self.heard_at = now
        self.unanswered += 1

    def hear(self, seconds: float | None, now: float) -> None:
        """One request waits no longer: answered after `seconds`, failed, or given up (None), which says how slow it is
        at least."""
        if seconds is not None:
            self.observe(seconds, now)
            self.heard_at = now
        elif (silence := self.silence(now)) > self.response_time(now):
            self.observe(silence, now)
        self.unanswered = max(0, self.unanswered - 1)  # 0 if the backend has moved to and fro meanwhile

    def observe(self, seconds: float, now: float) -> None:
        """Blend in one measured time to first byte. The staler the memory, the more the new sample counts."""
        staleness = 1 - self._freshness(now)
        share = max(EWMA_SHARE, staleness) if self.ewma else 1.0
        self.ewma += share * (seconds - self.ewma)
        self.peak = max(seconds, self.peak + staleness * (seconds - self.peak))
        self.ewma_at = now

    def _freshness(self, now: float) -> float:
        return math.exp2((self.ewma_at - now) / EWMA_HALF_LIFE_SECONDS)

    # Slow start.

    def admission(self, now: float, slow_start: float) -> float:
        """Share of its usual traffic, rising from SLOW_START_SHARE to 1 over `slow_start` seconds."""
        if self.slow_start_at is None or slow_start <= 0:
            return 1.0
        return min(1.0, max(SLOW_START_SHARE, (now - self.slow_start_at) / slow_start))

    def takes_part(self, now: float, slow_start: float) -> bool:
        """Whether it is among the candidates this time: so often that it gets its share, without chance."""
        if self.slow_start_at is None:
            return True
        self._turns += self.admission(now, slow_start)
        if self._turns < 1:
            return False
        self._turns -= 1
        return True


# Backends of which a record tells why they were or were not chosen: thousands of records are kept.
EXPLAINED = 100


class Choice:
    """Why a request went to `backend`: what the strategy saw. Kept as it was then, put into words when asked."""

    __slots__ = ("algorithm", "backend", "origin", "_candidates", "_active", "_scores", "_excluded")

    def __init__(
        self,
        algorithm: str,
        backend: Backend,
        candidates: Sequence[Backend],
        active: Sequence[int],
        scores: Sequence[float] | None,
        excluded: Mapping[str, str],
    ) -> None:
        self.algorithm = algorithm
        self.backend = backend
        self.origin = backend.origin  # as chosen: a reload may move the backend meanwhile
        self._candidates = candidates
        self._active = active
        self._scores = scores
        self._excluded = excluded

    def shorten(self) -> None:
        """To the first EXPLAINED of each, with the chosen one among them."""
        places = list(range(min(EXPLAINED, len(self._candidates))))
        chosen = self._candidates.index(self.backend)
        if chosen >= EXPLAINED:
            places[-1] = chosen
        self._candidates = [self._candidates[place] for place in places]
        self._active = [self._active[place] for place in places]
        self._scores = None if self._scores is None else [self._scores[place] for place in places]
        self._excluded = dict(islice(self._excluded.items(), EXPLAINED))

    def describe(self) -> dict[str, Any]:
        scores: Sequence[float | None] = self._scores or [None] * len(self._candidates)
        return {
            "algorithm": self.algorithm,
            "candidates": [
                {"id": backend.id, "active": active, "score": score}
                for backend, active, score in zip(self._candidates, self._active, scores, strict=True)
            ],
            "excluded": dict(self._excluded),
        }
