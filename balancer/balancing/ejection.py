"""Passive ejection: a backend that fails real traffic is taken out for a while, whatever its health checks say.

    none --(`eject_after` failures in a row)--> ejected --(its time is over)--> trial --(one good answer)--> none
                                                   ^--------(one more failure)----'

A failure is a failed connect, a time-out, a broken answer, or 502, 503, 504; never a 4xx. Each ejection in a row lasts
longer; the count shrinks again while the backend behaves. How much of the pool may be out is the pool's decision.

A backend may also be slow rather than broken: `slow_outliers` finds those that differ from their peers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from typing_extensions import TypedDict

from balancer.balancing.options import PoolOptions

EjectionStatus = Literal["none", "ejected", "trial"]

JITTER = 0.1  # share of the time by which it may be longer, so that backends ejected together come back apart
WINDOW_SECONDS = 10.0  # response times are compared over this long, as in Envoy's success rate detection
MIN_PEERS = 3  # with two there is no saying which of them is the odd one
MIN_SAMPLES = 20  # answers in a window: fewer, and one slow request decides
# The spread counts as at least this, as a share of the median and in seconds: equal peers are no reason to eject one.
MIN_SPREAD_SHARE = 0.1
MIN_SPREAD_SECONDS = 0.001


class EjectionView(TypedDict):
    status: EjectionStatus
    consecutive_failures: int
    count: int
    until: float | None
    reason: str | None


class KeptEjection(TypedDict):
    """Of one that is out, over restarts. `url` is where it was then, `until` in epoch seconds."""

    url: str
    until: float
    count: int
    reason: str | None


@dataclass(slots=True)
class Ejection:
    """Where one backend stands. `until` and `returned_at` are of the pool's clock. Guarded by the pool's lock."""

    status: EjectionStatus = "none"
    consecutive_failures: int = 0
    count: int = 0  # ejections in a row
    until: float = 0.0
    returned_at: float = 0.0
    reason: str | None = None
    is_tried: bool = False  # the one request of the trial is under way

    def start(self, reason: str, options: PoolOptions, now: float, luck: float) -> float:
        """Eject; returns for how many seconds. `luck` from 0 to 1 spreads the end."""
        if self.status == "none":
            self.count -= min(self.count, int((now - self.returned_at) / options.eject_seconds))
        self.count += 1
        seconds = min(options.eject_seconds * self.count, options.eject_max_seconds) * (1 + JITTER * luck)
        self.status, self.until, self.reason = "ejected", now + seconds, reason
        self.consecutive_failures = 0
        return seconds

    def end(self, now: float) -> None:
        """Back to full service; how often it was out is remembered for a while."""
        self.status, self.reason, self.is_tried = "none", None, False
        self.consecutive_failures = 0
        self.returned_at = now

    def kept(self, url: str, to_epoch: float) -> KeptEjection:
        return {"url": url, "until": round(self.until + to_epoch, 1), "count": self.count, "reason": self.reason}

    def restore(self, kept: KeptEjection, to_epoch: float) -> None:
        self.status, self.until = "ejected", kept["until"] - to_epoch
        self.count, self.reason = kept["count"], kept["reason"]

    def describe(self, to_epoch: float) -> EjectionView:
        """As plain values, for the API. `to_epoch` added to the pool's clock gives epoch seconds."""
        return {
            "status": self.status,
            "consecutive_failures": self.consecutive_failures,
            "count": self.count,
            "until": self.until + to_epoch if self.status == "ejected" else None,
            "reason": self.reason,
        }


@dataclass(slots=True)
class LatencyWindow:
    """Response times of one backend since the last comparison."""

    seconds: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.count += 1

    def take(self) -> float | None:
        """The mean, None if there are too few samples to judge; starts a new window."""
        seconds, count = self.seconds, self.count
        self.seconds, self.count = 0.0, 0
        return seconds / count if count >= MIN_SAMPLES else None


def slow_outliers(means: Mapping[str, float], factor: float) -> tuple[dict[str, float], float]:
    """(mean seconds of those slower than the limit, the limit): median + `factor` x median absolute deviation.

    Neither moves much because of the outlier itself, as mean and standard deviation would.
    """
    if len(means) < MIN_PEERS:
        return {}, 0.0
    middle = median(means.values())
    spread = median(abs(mean - middle) for mean in means.values())
    limit = middle + factor * max(spread, MIN_SPREAD_SHARE * middle, MIN_SPREAD_SECONDS)
    return {backend: mean for backend, mean in means.items() if mean > limit}, limit
