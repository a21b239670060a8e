"""Who can be chosen at this moment, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from math import ceil

from balancer.balancing.backends import EXPLAINED, Backend
from balancer.balancing.changes import Note

MOST_PATIENCE = 1000  # requests

Shares = Callable[[Sequence[Backend]], Mapping[str, float] | None]


class Candidates:
    """Derived from the backends of one pool, so that a request need not ask each of them.

    It has no lock of its own: all it has and touches is guarded by the pool's. `ready`, `first`, `absent` and
    `excluded` are replaced, never changed, so a Choice may keep them.
    """

    def __init__(self, backends: Mapping[str, Backend], note: Note) -> None:
        self.ready: tuple[Backend, ...] = ()
        self.first: tuple[Backend, ...] = ()  # those of them who are asked before the others
        self.absent: dict[str, str] = {}  # why each of the others is not `ready`
        self.excluded: dict[str, str] = {}  # why each of the others is not among the `first`; of many, some
        self.limits: dict[Backend, int] = {}  # of those that may be full
        self.is_conditional = False  # not each of the `first` takes every request, or not only these do
        self.are_many = False  # too many to explain each of them
        self.is_panicking = False
        self.may_grow = False  # others come if requests wait
        self._is_judged = False  # one of them is ejected, or on trial
        self.starting: dict[Backend, float] = {}  # slowly, and the usual share of each
        self.waited = 0  # requests for which none of these has earned anything
        self.patience = 0  # how many that may be
        self._backends = backends
        self._note = note

    def refresh(self, panic_threshold: float, usual_shares: Shares = lambda ready: None) -> None:
        """After any change of a backend. With less than this share of the known ones ready, health is ignored."""
        backends = self._backends.values()
        wanted = [backend for backend in backends if backend.is_wanted]
        ready = [backend for backend in wanted if backend.is_ready]
        if not ready:  # better an ejected backend than none
            ready = [backend for backend in wanted if backend.health.status == "up"]
        known = [backend for backend in wanted if backend.health.status != "unknown"]
        self._panic(len(ready) < panic_threshold * len(known))
        self.ready = tuple(known if self.is_panicking else ready)
        self.limits = {b: b.max_connections for b in self.ready if b.max_connections is not None}
        self._is_judged = any(backend.ejection.status != "none" for backend in self.ready)
        self.are_many = len(self.ready) > EXPLAINED
        names = {backend.id for backend in self.ready}
        self.absent = {backend.id: backend.absence for backend in backends if backend.id not in names}
        starting = [backend for backend in self.ready if backend.slow_start.began_at is not None]
        self.starting, self.waited, self.patience = {}, 0, 1
        if starting:
            total = sum(backend.weight for backend in self.ready)
            usual = usual_shares(self.ready) or {backend.id: backend.weight / total for backend in starting}
            self.starting = {backend: usual[backend.id] for backend in starting}
        self.sort()

    def sort(self) -> None:
        """Who is asked first: after a change that leaves all who were ready so."""
        self.first = tuple(_first(self.ready))
        is_all = len(self.first) == len(self.ready)
        self.is_conditional = bool(not is_all or self.limits or self.starting or self._is_judged)
        reasons = self.absent if is_all else self.why_not((), self.first)
        self.excluded = dict(islice(reasons.items(), EXPLAINED))

    def _panic(self, is_due: bool) -> None:
        """So few are available that sending to all is the smaller evil."""
        if is_due != self.is_panicking:
            self.is_panicking = is_due
            if is_due:
                self._note("panic_on", "", "too few backends are available: health is ignored", "error")
            else:
                self._note("panic_off", "", "enough backends are available again", "info")

    def earn(self, now: float, slow_start: float) -> None:
        """What those who start slowly have earned by the requests since the last time; `sort` afterwards."""
        waited, self.waited = self.waited, 0
        missing: list[float] = [MOST_PATIENCE]
        for backend, usual in self.starting.items():
            share = usual * backend.slow_start.share(now, slow_start)
            backend.slow_start.earn(waited * share)
            if backend.slow_start.is_waiting:
                missing.append((1 - backend.slow_start.earned) / share)
        self.patience = ceil(min(missing))

    def narrow(self, exclude: Collection[str]) -> list[Backend]:
        """Those of `ready` among whom a strategy may choose for a request."""
        return _first(backend for backend in self.ready if backend.id not in exclude and not backend.is_full)

    def why_not(self, exclude: Collection[str], candidates: Collection[Backend] = ()) -> dict[str, str]:
        """In words, why each backend is not among the `candidates` that `narrow` found."""
        chosen = set(candidates)
        reasons = dict(self.absent)
        for backend in self.ready:
            if backend not in chosen and (obstacle := _obstacle(backend, exclude)):
                reasons[backend.id] = obstacle
        return reasons

    def is_worth_waiting(self, exclude: Collection[str]) -> bool:
        """Somebody is only full, or is about to have its first check, or to be started."""
        return self.may_grow or any(
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


def _first(backends: Iterable[Backend]) -> list[Backend]:
    """Those that are asked before the others. Better a second request to one on trial than no backend; better one that
    is busy than that; better one that starts slowly than a busy one."""
    ranked = [
        (4 * backend.ejection.is_tried + 2 * backend.health.is_busy + backend.slow_start.is_waiting, backend)
        for backend in backends
    ]
    lowest = min((rank for rank, _ in ranked), default=0)
    return [backend for rank, backend in ranked if rank == lowest]


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
