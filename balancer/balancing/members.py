"""What the operator changes at run time: which backends there are, and what is wanted of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from balancer.balancing.backends import Backend, Health
from balancer.balancing.changes import Note
from balancer.balancing.counts import FORMER_KEPT, BackendCounts
from balancer.balancing.options import PoolOptions
from balancer.balancing.strategies import Strategy
from balancer.errors import SettingsError


@dataclass(slots=True)
class PoolChanges:
    """What a pool applies at once, also to itself. `update` has fields per backend id, `url` as an Origin under
    `origin`."""

    add: Sequence[Backend] = ()
    update: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    remove: Sequence[str] = ()
    options: PoolOptions | None = None
    strategy: Strategy | None = None


class Members:
    """The backends of one pool in configured order, and the counts of those that are gone.

    It has no lock of its own: every method is called with the pool's lock held, which guards all it touches. The pool
    settles afterwards who is a candidate. `reweighed` is called when weights are others, or a backend is gone. `gone`
    are those that were taken out and still have requests in flight.
    """

    def __init__(
        self, reweighed: Callable[[], None], note: Note, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self.backends: dict[str, Backend] = {}
        self.gone: set[Backend] = set()
        self._reweighed = reweighed
        self._former: dict[str, BackendCounts] = {}
        self._note = note
        self._clock = clock
        self._wall_clock = wall_clock

    def apply(self, changes: PoolChanges) -> None:
        """Ids to update and remove that are not here any more are passed over."""
        for backend_id, fields in changes.update.items():
            if backend_id in self.backends:
                self.update(self.backends[backend_id], fields)
        for backend_id in changes.remove:
            if backend_id in self.backends:
                self.remove(self.backends[backend_id])
        for backend in changes.add:
            self.add(backend)

    def new_id(self, wanted: str | None, others: Mapping[str, Backend]) -> str:
        """`wanted`, or a free one if that is empty. `others` are not here, but have their ids as well. Raises
        SettingsError if it is taken."""
        known = {**others, **self.backends}
        if not wanted:
            return next(each for number in count(len(known) + 1) if (each := f"backend_{number}") not in known)
        if wanted in known:
            leaving = known[wanted].is_leaving
            hint = "is being removed; admin_state ready calls that off" if leaving else "is taken, choose another"
            raise SettingsError(f"backend id {wanted!r} {hint}")
        return wanted

    def add(self, backend: Backend) -> None:
        backend.health.since = self._wall_clock()
        if backend.id in self.backends:  # one that is leaving
            self.replace(self.backends[backend.id])
        self.backends[backend.id] = backend
        backend.counts = self._former.pop(backend.id, backend.counts)
        self._note("backend_added", backend.id, f"{backend.origin.url}, weight {backend.weight}", "info")

    def kept(self) -> dict[str, BackendCounts]:
        """What happened to each that there is, or was."""
        now = self._clock()
        known = self._former | {backend.id: backend.counts for backend in self.backends.values()}
        return {backend_id: counts.copy(now) for backend_id, counts in known.items()}

    def restore(self, kept: Mapping[str, BackendCounts]) -> None:
        """Go on from there, before the first check."""
        for backend_id, counts in kept.items():
            if backend_id in self.backends:
                self.backends[backend_id].counts = counts
            else:
                self._keep_former(backend_id, counts)

    def _keep_former(self, backend_id: str, counts: BackendCounts) -> None:
        self._former[backend_id] = counts
        if len(self._former) > FORMER_KEPT:
            del self._former[next(iter(self._former))]

    def update(self, backend: Backend, changes: Mapping[str, Any]) -> None:
        """Set fields, already validated."""
        real = {name: value for name, value in changes.items() if getattr(backend, name) != value}
        if "admin_state" in real and backend.admin_state == "maint":  # its health was not checked meanwhile
            backend.health = Health(since=self._wall_clock())
            backend.ejection.end(self._clock())
        for name, value in real.items():
            setattr(backend, name, value)
            if name not in ("source", "configured"):
                text = f"url set to {value.url}" if name == "origin" else f"{name} set to {value}"
                self._note("backend_changed", backend.id, text, "info")
        self._note_draining(backend)
        if backend.admin_state == "ready":
            backend.is_leaving = False  # ready again calls the removal off
        if "weight" in real:
            self._reweighed()
        if "origin" in real:  # another server: nothing is known of it
            backend.forget(self._wall_clock())
            backend.counts.is_down_no_more(self._clock())
        if backend.active == 0 and (backend.is_leaving or real.get("admin_state") == "drain"):
            self.drained(backend)

    def remove(self, backend: Backend, at_once: bool = False) -> int:
        """No new requests from now on; it goes when the last one in flight has ended, or `at_once`. Returns how many
        there are."""
        active = backend.active
        backend.admin_state = "drain"
        backend.is_leaving = True
        self._note_draining(backend)
        if active == 0:
            self._take_out(backend, backend.origin.url)
        elif at_once:
            self._cut(backend, "removed at once")
            self._take_out(backend, backend.origin.url)
        else:
            self._note("backend_draining", backend.id, f"to be removed, {active} requests in flight", "info")
        return active

    def replace(self, backend: Backend) -> None:
        """Another one takes its name, maybe in another pool: it finishes what it has, out of sight."""
        backend.admin_state = "drain"
        backend.is_leaving = True
        self._note_draining(backend)
        self._take_out(backend, "another one takes its name")

    def drained(self, backend: Backend) -> None:
        """The last request has ended of one that gets no more."""
        self.gone.discard(backend)
        if self.backends.get(backend.id) is not backend:
            return  # gone already
        if backend.is_leaving:
            self._take_out(backend, "its last request has ended")
        else:
            self._note("backend_drained", backend.id, "drained: no requests in flight", "info")

    def cut_overdue(self, default: float) -> list[Backend]:
        """Those whose requests in flight must end now, also such as had just begun when others of theirs were ended."""
        now = self._clock()
        late = [backend for backend in chain(self.backends.values(), self.gone) if backend.is_overdue(now, default)]
        late += [backend for backend in self.gone if backend not in late and backend.cut_at > -math.inf]
        for backend in late:
            self._cut(backend, "drain_timeout is over")
        return late

    def _cut(self, backend: Backend, why: str) -> None:
        """What is in flight there now is not its fault from here on; whoever has the pool's clients ends it."""
        if backend.cut_at == -math.inf:
            text = f"{why}: {backend.active} requests in flight are cut off"
            self._note("backend_cut", backend.id, text, "warning")
        backend.cut_at = time.perf_counter()

    def _note_draining(self, backend: Backend) -> None:
        if backend.admin_state == "ready":
            backend.draining_since, backend.cut_at = None, -math.inf
        elif backend.draining_since is None:
            backend.draining_since = self._clock()

    def _take_out(self, backend: Backend, text: str) -> None:
        del self.backends[backend.id]
        if backend.active:
            self.gone.add(backend)
        backend.counts.is_down_no_more(self._clock())
        self._keep_former(backend.id, backend.counts)
        self._reweighed()
        self._note("backend_removed", backend.id, text, "info")
