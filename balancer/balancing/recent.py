"""How many requests a pool had in the last seconds, from counts that each choice adds to anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from balancer.balancing.backends import Backend

KEPT_SECONDS = 10


class RecentChoices:
    """Retries count as well. It has no lock of its own: the pool's guards it. `_seen` has what the counts were, about
    once a second, oldest first."""

    def __init__(self, backends: Mapping[str, Backend], clock: Callable[[], float]) -> None:
        self._backends = backends
        self._clock = clock
        self._seen = deque([(clock(), self._counts())], maxlen=KEPT_SECONDS + 1)

    def sweep(self) -> None:
        now = self._clock()
        if now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, self._counts()))

    def count(self) -> int:
        """In the last KEPT_SECONDS and the second that runs, of the backends that are here."""
        before = self._seen[0][1]
        return sum(count - before.get(backend_id, 0) for backend_id, count in self._counts().items())

    def _counts(self) -> dict[str, int]:
        return {backend.id: backend.counts.selected for backend in self._backends.values()}
