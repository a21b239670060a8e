"""Requests that no authentication has let in, counted since the start of the process."""

from __future__ import annotations

from collections import defaultdict
from threading import Lock
from typing import Any, Literal, get_args

from balancer.observe.plain import fill

# From what says least to what says most: of several, the last one decides about the answer.
Why = Literal["missing", "invalid", "throttled", "unavailable", "forbidden"]
WHYS: tuple[Why, ...] = get_args(Why)


class Refusals:
    """`_lock` guards `_counts`: by the name of the authentication that decided, and why."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: defaultdict[tuple[str, Why], int] = defaultdict(int)

    def count(self, name: str, why: Why, count: int = 1) -> None:
        with self._lock:
            self._counts[name, why] += count

    def restore(self, kept: Any) -> None:
        """Go on from what `plain` made of `counts`."""
        with self._lock:
            fill(self._counts, kept)

    def counts(self) -> dict[tuple[str, Why], int]:
        with self._lock:
            return dict(self._counts)
