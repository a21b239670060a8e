"""How many backends a pool needs: decided from what it has to do, and told with the arithmetic.

The rule is that of Kubernetes' HorizontalPodAutoscaler: work / target, rounded up, with a tolerance so that it does not
flap. Work is what is in flight and what waits in the queue, on average over a few seconds. More come at once; fewer
only when fewer would have done for `down_after` seconds, and then as many as were needed at most in that time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import Literal, Protocol

from balancer.config.scaling import ScalingSettings

AVERAGED_SECONDS = 3.0
TOLERANCE = 0.1  # as share of the target, within which nothing is changed
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 60.0  # after a failed start; doubled by each that follows

ScalingNews = Literal["scaled_up", "scaled_down", "scaling_advised", "scaling_failed", "start_failed", "backend_ended"]

Note = Callable[[ScalingNews, str, str | None, str], None]  # what happens in which pool, maybe to one of its backends


@dataclass(frozen=True, slots=True)
class Load:
    """What a pool has to do, and with how many backends. `starting` have not been up yet; `fixed` are those of the
    `healthy` ones that others have to stop."""

    in_flight: int
    waiting: int
    healthy: int
    starting: int = 0
    fixed: int = 0

    @property
    def there(self) -> int:
        return self.healthy + self.starting


class Demand:
    """Asked about once a second. `why` is the arithmetic of the last answer."""

    def __init__(self, options: ScalingSettings) -> None:
        self.options = options
        self.why = ""
        self._looks: deque[tuple[float, Load]] = deque()
        # When it was needed last and how many, in the last `down_after` seconds: falling, for only the most counts.
        self._needs: deque[tuple[float, int]] = deque()

    def wanted(self, load: Load, now: float) -> int:
        options, there = self.options, load.there
        in_flight, waiting = self._averaged(load, now)
        work = in_flight + waiting
        needed = ceil(work / options.target_in_flight)
        if there and abs(work / there / options.target_in_flight - 1) <= TOLERANCE:
            needed = there
        bounded = max(min(max(needed, options.min), options.max), load.fixed)
        wanted, later = self._in_time(bounded, load, now)
        limit = f", {'min' if bounded > needed else 'max'} {bounded}" if needed != bounded == wanted else ""
        over = f"{load.healthy} healthy" + (f" and {load.starting} starting" if load.starting else "")
        share = f" = {_short(work / there)} each" if there else ""
        change = f"{there} stay" if wanted == there else f"{there} -> {wanted}"
        self.why = (
            f"{_short(in_flight)} in flight + {_short(waiting)} waiting over {over}{share}, "
            f"target {options.target_in_flight:g}: {change}{limit}{later}"
        )
        return wanted

    def _averaged(self, load: Load, now: float) -> tuple[float, float]:
        """What is in flight, and what waits."""
        looks = self._looks
        if not load.there:
            looks.clear()  # what was before is of no interest to whoever waits for the first one
        looks.append((now, load))
        while looks[0][0] <= now - AVERAGED_SECONDS:
            looks.popleft()
        return fmean(each.in_flight for _, each in looks), fmean(each.waiting for _, each in looks)

    def _in_time(self, bounded: int, load: Load, now: float) -> tuple[int, str]:
        """Not fewer before their time; and what is to be said of that."""
        options, there, needs = self.options, load.there, self._needs
        if not needs:
            needs.append((now, there))  # whoever is here at the start is believed to be needed
        while needs and needs[-1][1] <= bounded:
            needs.pop()
        needs.append((now, bounded))
        while needs[0][0] <= now - options.down_after and len(needs) > 1:
            needs.popleft()
        most = max(min(needs[0][1], options.max), load.fixed)
        if bounded >= there:
            return bounded, ""
        if most < there:
            is_allowed = most >= needs[0][1]
            return most, f", no more were needed for {options.down_after:g} s" if is_allowed else f", max {options.max}"
        return there, f", {needs[1][1]} in {needs[0][0] + options.down_after - now:.0f} s"


def _short(number: float) -> str:
    return f"{round(number, 1):g}"


class Starts:
    """How starting backends of one pool goes. After a failure the next one waits, longer after each in a row."""

    def __init__(self) -> None:
        self.started = self.failed = self.failed_in_row = 0
        self.last_error: str | None = None
        self._next_at = 0.0

    def are_due(self, now: float) -> bool:
        return now >= self._next_at

    def succeeded(self) -> None:
        self.failed_in_row = 0
        self.last_error = None

    def fail(self, error: str, now: float) -> None:
        self.failed += 1
        self.last_error = error
        if self.are_due(now):  # several that were started together are one step
            self._next_at = now + min(BACKOFF_SECONDS * 2.0 ** min(self.failed_in_row, 10), MAX_BACKOFF_SECONDS)
            self.failed_in_row += 1


class Provider(Protocol):
    """Brings backends to one pool, and takes them away; for its scaler alone. Each may raise SourceFailed."""

    options: ScalingSettings

    def adopt(self) -> None:
        """Take over what a balancer before this one has left."""

    def tend(self) -> None:
        """Look after those that there are."""

    def load(self) -> Load | None:
        """None as long as it cannot be told how many there are."""

    def scale(self, load: Load, wanted: int, why: str) -> None:
        """Begin to, as far as that can be done now."""

    def retire(self) -> None:
        """It is not wanted any more: drain what it has brought."""

    @property
    def is_empty(self) -> bool:
        """Nothing is left of that."""

    def close(self) -> None:
        """Stop at once what is left."""
