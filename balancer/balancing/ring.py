"""A ring of points for consistent hashing: who loses or gains a backend moves few keys, and only to or from it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import chain
from math import ceil

POINTS = 160  # of a backend for each unit of its weight, as nginx and ketama have it
MOST_POINTS = 100_000  # in all: about 0.2 s of work; beyond that each has fewer, in proportion


class Ring:
    """Never changes. Python's own `hash` differs from process to process; this one is the same everywhere."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        """A few milliseconds for ten backends."""
        share = min(1.0, MOST_POINTS / max(1, POINTS * sum(weights.values())))
        points = sorted(
            (_point(b"%s %d" % (backend_id.encode(), number)), backend_id)
            for backend_id, weight in weights.items()
            for number in range(ceil(POINTS * weight * share))
        )
        self._points = [point for point, _ in points]
        self._owners = [owner for _, owner in points]

    def owners(self, key: bytes) -> Iterator[str]:
        """Ids from the key's place on, all the way round: the first one is its backend, the others are next in turn,
        and come several times."""
        place = bisect_left(self._points, _point(key))
        for index in chain(range(place, len(self._owners)), range(place)):
            yield self._owners[index]


def _point(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
