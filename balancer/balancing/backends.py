"""A backend: where it listens, what is wanted of it, what was seen of it.

Only `BackendPool` changes a `Backend`, under its lock, but for `elsewhere`. Strategies and everybody else read.

State is two axes. `admin_state` is what the operator wants: `ready`, `drain` (no new requests, checks go on, requests
in flight finish) or `maint` (the same, and no checks). `health` is what the checks saw: `unknown` until the first one,
`up`, or `down` with a reason; `ejection` is what real traffic made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, NotRequired

from typing_extensions import TypedDict

from balancer.balancing.counts import BackendCounts
from balancer.balancing.ejection import Ejection, EjectionView, LatencyWindow
from balancer.balancing.options import PoolOptions
from balancer.balancing.slowstart import SlowStart
from balancer.balancing.speed import Speed
from balancer.protocol.origin import Origin

AdminState = Literal["ready", "drain", "maint"]
HealthStatus = Literal["unknown", "up", "down"]
State = Literal[HealthStatus, "ejected", "trial", "drain", "drained", "maint"]

ID_PATTERN = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"  # also one step of a URL path, so not "." or ".."
MAX_CONNECTIONS = 1_000_000
MAX_WEIGHT = 256  # as in HAProxy: enough for any ratio, and sums stay small


class LastCheck(NamedTuple):
    """The newest health check: epoch seconds, duration in seconds, and what came back, or that nothing came in time."""

    at: float
    duration: float
    status: int | None
    error: str | None
    timed_out: bool = False

    def describe(self) -> LastCheckView:
        return {
            "at": self.at,
            "duration": self.duration,
            "status": self.status,
            "error": self.error,
            "timed_out": self.timed_out,
        }


class LastCheckView(TypedDict):
    at: float
    duration: float
    status: int | None
    error: str | None
    timed_out: bool


class HealthView(TypedDict):
    """What each check changes is left out of backends that are not `timed`."""

    status: HealthStatus
    reason: str | None
    since: float
    fall: int
    rise: int
    consecutive_failures: int
    consecutive_successes: NotRequired[int]
    last_check: NotRequired[LastCheckView | None]


@dataclass(slots=True)
class Health:
    """What the checks have seen. `since` is epoch seconds of the last change of `status`; `alive_at`, of the pool's
    clock, is when it last answered a check, or a request since a check has failed."""

    status: HealthStatus = "unknown"
    reason: str | None = None  # why it is down, or busy
    alive_at: float = 0.0
    since: float = 0.0
    consecutive_failures: int = 0
    consecutive_successes: int = 0
    last_check: LastCheck | None = None

    @property
    def is_busy(self) -> bool:
        """Up, but its requests keep its checks waiting: the others are asked first."""
        return self.status == "up" and self.reason is not None

    @property
    def is_in_transition(self) -> bool:
        """A check contradicts the status but not yet often enough, so the next one should come soon."""
        return self.status == "unknown" or (
            self.consecutive_failures > 0 if self.status == "up" else self.consecutive_successes > 0
        )

    def describe(self, options: PoolOptions) -> HealthView:
        return {
            "status": self.status,
            "reason": self.reason,
            "since": self.since,
            "fall": options.health_fall,
            "rise": options.health_rise,
            "consecutive_failures": self.consecutive_failures,
            "consecutive_successes": self.consecutive_successes,
            "last_check": None if self.last_check is None else self.last_check.describe(),
        }


class BackendView(TypedDict):
    id: str
    pool: str
    url: str
    healthy: bool
    active_connections: int
    weight: int
    max_connections: int | None
    drain_timeout: float | None
    state: State
    admin_state: AdminState
    drained: bool
    source: str
    overrides: dict[str, Any]
    ejection: EjectionView
    health: HealthView
    admission: float
    expected_share: float | None


@dataclass(slots=True, eq=False)
class Backend:
    """One server. `configured` are the fields that the configuration gave it, or who found it. `source` says where it
    came from: a word for a part of the configuration, `api`, or the name of who found it.

    `draining_since`, of the pool's clock, is when it was to get no more requests. What it had in flight at `cut_at`, of
    time.perf_counter(), was cut off.
    """

    id: str
    origin: Origin
    weight: int = 1
    max_connections: int | None = None
    admin_state: AdminState = "ready"
    active: int = 0
    is_leaving: bool = False  # removed by the operator, waits for its last request
    health: Health = field(default_factory=Health)
    ejection: Ejection = field(default_factory=Ejection)
    speed: Speed = field(default_factory=Speed)
    window: LatencyWindow = field(default_factory=LatencyWindow)
    slow_start: SlowStart = field(default_factory=SlowStart)
    counts: BackendCounts = field(default_factory=BackendCounts)
    source: str = "api"
    configured: Mapping[str, Any] = field(default_factory=dict)
    drain_timeout: float | None = None
    draining_since: float | None = None
    cut_at: float = -math.inf
    elsewhere: int = 0  # in flight by way of other members of a cluster, as they told last
    outrun: int = 0  # requests in a row that others have answered in its place
    ended_when_outrun: int = -1  # how many of all had ended at the last one

    @property
    def is_wanted(self) -> bool:
        """The operator lets it have requests."""
        return self.admin_state == "ready" and self.weight > 0

    @property
    def is_starting(self) -> bool:
        """Scaling has started it, and it has not been up yet."""
        return self.source == "scaling" and self.health.status == "unknown"

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

    def is_overdue(self, now: float, default: float) -> bool:
        """Its time for what it has in flight is over; `default` is for one that has no `drain_timeout`, 0 for ever."""
        seconds = default if self.drain_timeout is None else self.drain_timeout
        return self.draining_since is not None and self.active > 0 and 0 < seconds <= now - self.draining_since

    @property
    def state(self) -> State:
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
        self.speed, self.slow_start = Speed(), SlowStart()

    def describe(
        self, pool: str, now: float, wall_now: float, options: PoolOptions, shares: Mapping[str, float] | None
    ) -> BackendView:
        """As plain values, for the API. `now` is of the pool's clock, `shares` are those that the strategy aims at."""
        return {
            "id": self.id,
            "pool": pool,
            "url": self.origin.url,
            "healthy": self.health.status == "up",
            "active_connections": self.active,
            "weight": self.weight,
            "max_connections": self.max_connections,
            "drain_timeout": self.drain_timeout,
            "state": self.state,
            "admin_state": self.admin_state,
            "drained": self.is_drained,
            "source": self.source,
            "overrides": self.overrides,
            "ejection": self.ejection.describe(wall_now - now),
            "health": self.health.describe(options),
            "admission": self.slow_start.share(now, options.slow_start),
            "expected_share": None if shares is None else shares.get(self.id, 0.0),
        }


# Backends of which a record tells why they were or were not chosen: thousands of records are kept.
EXPLAINED = 100


class CandidateView(TypedDict):
    id: str
    active: int
    score: float | None


class ChoiceView(TypedDict):
    algorithm: str
    candidates: list[CandidateView]
    excluded: dict[str, str]


class Scene:
    """The candidates of a row of choices: as they were at first, and what has changed of each since. So a choice needs
    no copy of them, and can still be told as it was made. Of many it has the first.

    `ranks` are what the strategy goes by, and `score` says what one came to at a moment. `limits` are of those that may
    be full. `changes` have requests in flight and rank of a backend after each change.
    """

    __slots__ = ("algorithm", "candidates", "active", "ranks", "score", "excluded", "limits", "changes")

    def __init__(
        self,
        algorithm: str,
        candidates: Sequence[Backend],
        ranks: Sequence[Any],
        score: Callable[[Any, float], float | None],
        excluded: Mapping[str, str],
        limits: Mapping[Backend, int],
    ) -> None:
        self.algorithm = algorithm
        self.candidates = candidates
        self.active = [backend.active for backend in candidates]
        self.ranks = ranks
        self.score = score
        self.excluded = excluded
        self.limits = limits
        self.changes: list[tuple[Backend, int, Any]] = []


# What a single choice saw beside its scene, where that matters: when it looked, of the strategy's clock; the rank of
# whom it chose; ids that were tried before; whom the strategy passed over, and why.
Seen = tuple[float, Any, Collection[str], Mapping[str, str]]
NOTHING_MORE: Seen = (0.0, None, (), {})


class Choice:
    """Why a request went to `backend`: what the strategy saw. Put into words when asked."""

    __slots__ = ("backend", "origin", "_scene", "_moment", "_seen")

    def __init__(self, backend: Backend, scene: Scene, seen: Seen | None = None) -> None:
        self.backend = backend
        self.origin = backend.origin  # as chosen: a reload may move the backend meanwhile
        self._scene = scene
        self._moment = len(scene.changes)
        self._seen = seen

    @property
    def algorithm(self) -> str:
        return self._scene.algorithm

    def describe(self) -> ChoiceView:
        scene, candidates = self._scene, self._candidates()
        now, _, exclude, passed_over = self._seen or NOTHING_MORE
        excluded = dict(passed_over)
        shown: list[CandidateView] = []
        for backend, (active, rank) in candidates.items():
            if backend.id in exclude:
                excluded[backend.id] = "already tried"
            elif active >= scene.limits.get(backend, active + 1):
                excluded[backend.id] = f"full: {active} of {scene.limits[backend]}"
            else:
                shown.append({"id": backend.id, "active": active, "score": scene.score(rank, now)})
        excluded |= scene.excluded
        return {
            "algorithm": scene.algorithm,
            "candidates": shown,
            "excluded": dict(islice(excluded.items(), EXPLAINED)),
        }

    def _candidates(self) -> dict[Backend, tuple[int, Any]]:
        """Requests in flight and rank of each as they were; of many only EXPLAINED, with the chosen one among them."""
        scene = self._scene
        candidates = dict(zip(scene.candidates, zip(scene.active, scene.ranks, strict=True), strict=True))
        for backend, active, rank in scene.changes[: self._moment]:
            if backend in candidates:
                candidates[backend] = active, rank
        if len(candidates) == EXPLAINED and self.backend not in candidates:
            candidates.popitem()
            _, rank, _, _ = self._seen or NOTHING_MORE
            candidates[self.backend] = scene.changes[self._moment][1] - 1, rank  # it has had one more since
        return candidates
