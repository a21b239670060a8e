"""Who can be chosen at this moment, and why the others cannot."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from balancer.balancing.backends import EXPLAINED, Backend
from balancer.balancing.changes import Note


class Candidates:
    """Derived from the backends of one pool, so that a request need not ask each of them.

    It has no lock of its own: all it has and touches is guarded by the pool's. `ready` and `absent` are replaced by
    `refresh`, never changed, so a Choice may keep them.
    """

    def __init__(self, backends: Mapping[str, Backend], note: Note) -> None:
        self.ready: tuple[Backend, ...] = ()
        self.absent: dict[str, str] = {}  # why each of the others is not among them
        self.is_conditional = False  # not everybody in `ready` takes every request: ask `narrow`
        self.is_panicking = False
        self.are_many = False  # too many to explain each of them
        self._backends = backends
        self._note = note

    def refresh(self, panic_threshold: float) -> None:
        """After any change of a backend. With less than this share of the known ones ready, health is ignored."""
        backends = self._backends.values()
        wanted = [backend for backend in backends if backend.is_wanted]
        ready = [backend for backend in wanted if backend.is_ready]
        if not ready:  # better an ejected backend than none
            ready = [backend for backend in wanted if backend.health.status == "up"]
        known = [backend for backend in wanted if backend.health.status != "unknown"]
        self._panic(len(ready) < panic_threshold * len(known))
        self.ready = tuple(known if self.is_panicking else ready)
        self.are_many = len(backends) > EXPLAINED
        names = {backend.id for backend in self.ready}
        self.absent = {backend.id: backend.absence for backend in backends if backend.id not in names}
        self.is_conditional = any(
            backend.max_connections is not None
            or backend.slow_start.began_at is not None
            or backend.ejection.status != "none"
            or backend.health.is_busy
            for backend in self.ready
        )

    def _panic(self, is_due: bool) -> None:
        """So few are available that sending to all is the smaller evil."""
        if is_due != self.is_panicking:
            self.is_panicking = is_due
            if is_due:
                self._note("panic_on", "", "too few backends are available: health is ignored", "error")
            else:
                self._note("panic_off", "", "enough backends are available again", "info")

    def narrow(self, exclude: Collection[str], now: float, slow_start: float) -> list[Backend]:
        """Those of `ready` among whom the strategy may choose this time; call it once for each choice, because it
        moves the turns of a slow start on."""
        free: list[Backend] = []
        on_trial: list[Backend] = []
        for backend in self.ready:
            if backend.id not in exclude and not backend.is_full:
                (on_trial if backend.ejection.is_tried else free).append(backend)
        free = free or on_trial  # better a second request to one on trial than no backend
        free = [backend for backend in free if not backend.health.is_busy] or free
        return [backend for backend in free if backend.slow_start.takes_part(now, slow_start)] or free

    def why_not(self, exclude: Collection[str], candidates: Collection[Backend] = ()) -> dict[str, str]:
        """In words, why each backend is not among the `candidates` that `narrow` found. Changes nothing."""
        chosen = set(candidates)
        reasons = dict(self.absent)
        for backend in self.ready:
            if backend not in chosen and (obstacle := _obstacle(backend, exclude)):
                reasons[backend.id] = obstacle
        return reasons

    def is_worth_waiting(self, exclude: Collection[str]) -> bool:
        """Somebody is only full, or is about to have its first check."""
        return any(
            backend.is_wanted
            and backend.id not in exclude
            and (backend.id not in self.absent or backend.health.status == "unknown")
            for backend in self._backends.values()
        )

    def why_none(self, exclude: Collection[str]) -> str:
        """In words, why waiting is not worth it."""
        if not self._backends:
            return "no backend is configured"
        return "no other backend is available" if exclude and self.ready else "no backend is available"


def _obstacle(backend: Backend, exclude: Collection[str]) -> str:
    """What keeps a ready backend from taking this request, "" if nothing does."""
    if backend.id in exclude:
        return "already tried"
    if backend.is_full:
        return f"full: {backend.active} of {backend.max_connections}"
    if backend.ejection.is_tried:
        return "its trial request is under way"
    if backend.health.is_busy:
        return f"busy: {backend.health.reason}"
    return "slow start" if backend.slow_start.began_at is not None else ""
