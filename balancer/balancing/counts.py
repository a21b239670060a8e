"""What happened to a backend since the process began; it goes on if the backend is removed and comes back."""

from __future__ import annotations

from dataclasses import dataclass

FORMER_KEPT = 1000  # backends that are gone and whose counts go on if they come back


@dataclass(slots=True)
class BackendCounts:
    """Of one backend. Guarded by the pool's lock. `down_since` is of the pool's clock; None if it is not down."""

    selected: int = 0
    checks: int = 0
    failed_checks: int = 0
    ups: int = 0  # times it came up
    downs: int = 0  # times it went down
    ejections: int = 0
    down_seconds: float = 0.0  # of the times that are over
    down_since: float | None = None

    def went_down(self, now: float) -> None:
        self.downs += 1
        self.down_since = now

    def went_up(self, now: float) -> None:
        self.ups += 1
        self.is_down_no_more(now)

    def is_down_no_more(self, now: float) -> None:
        """It is up, or nothing is known of it any more."""
        self.down_seconds = self.downtime(now)
        self.down_since = None

    def copy(self, now: float) -> BackendCounts:
        """As if a time that it is down were over."""
        seen = self.selected, self.checks, self.failed_checks, self.ups, self.downs, self.ejections
        return BackendCounts(*seen, down_seconds=self.downtime(now))

    def downtime(self, now: float) -> float:
        """Seconds it has been down in all."""
        return self.down_seconds if self.down_since is None else self.down_seconds + now - self.down_since
