"""What was worked out for what comes again and again, kept for as long as it may come again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar

Given = TypeVar("Given", bound=Hashable)
Derived = TypeVar("Derived")

NOTED = 1024  # of those that have come once, and may come again: 40 kB


class Table(dict[Given, Derived]):
    """`table[given]` is `derive(given)`, which must depend on nothing else and never change.

    What others send must not fill the memory: about `room` bytes are kept in all. `weigh` says how many each takes, 0
    if it is not worth its room. Nor must what never comes again push out what does: only what comes a second time is
    kept. When there is no room left, all go.

    Any thread may look up. `_lock` guards `_held`, the bytes that are kept, and all changes of the table; finding
    something needs no lock. `_noted` has hashes of what has come once; each look and each note is one step.
    """

    def __init__(self, derive: Callable[[Given], Derived], room: int, weigh: Callable[[Given, Derived], int]) -> None:
        super().__init__()
        self._derive = derive
        self._room = room
        self._weigh = weigh
        self._lock = Lock()
        self._held = 0
        self._noted = [0] * NOTED

    def __missing__(self, given: Given) -> Derived:
        derived = self._derive(given)
        size = self._weigh(given, derived)
        if size and self._has_come_before(given):
            self._keep(given, derived, size)
        return derived

    def _has_come_before(self, given: Given) -> bool:
        """Nearly always right. Nobody outside can choose what falls on one place: hashes of bytes are salted. Each has
        two, or some pair of a few that come all the time would push out each other for ever."""
        found = hash(given)
        first, second = found % NOTED, (found >> 32) % NOTED
        if found in (self._noted[first], self._noted[second]):
            return True
        self._noted[first] = self._noted[second] = found
        return False

    def _keep(self, given: Given, derived: Derived, size: int) -> None:
        with self._lock:
            if given in self:  # by another thread meanwhile
                return
            if self._held + size > self._room:
                self.clear()
                self._held = 0
            self._held += size
            self[given] = derived
