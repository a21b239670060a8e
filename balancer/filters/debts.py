"""What each key owes, in a table of bounded size.

Who owes nothing need not be known, so nobody is let off by being forgotten. When more keys owe something than there is
room for, the one that owes the least gives way, and from then on whoever is not known owes as much. So a flood of
made-up keys frees nobody, neither whoever sends it nor those who owe much, and no key ever gets more than it would with
room for all.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

KEYS_KEPT = 100_000  # of one limit
STEPS = 8  # of tidying up for a new key: more than one, so that it gets done, and few, so that nobody waits


class Debts(dict[str, int]):
    """By key, when it owes nothing any more. Not locked; the owner's lock guards it.

    `_heap` has each key once, by a time when that may be: no later than it is, and put right when it comes to the top.
    `_evicted_until` is when all that gave way would owe nothing: until then owes whoever is not here.
    """

    def __init__(self, room: int = KEYS_KEPT) -> None:
        self._room = room
        self._heap: list[tuple[int, str]] = []
        self._evicted_until = 0
        self.evicted = 0  # keys that gave way

    def of_another(self, now: int) -> int:
        """What a key owes that is not here."""
        self._tidy(now)
        least = self[self._heap[0][1]] if len(self) >= self._room else now
        return max(least, self._evicted_until, now)

    @property
    def floor(self) -> int:
        """At least that much; needs no lock."""
        return max(self._heap[0][0] if len(self) >= self._room else 0, self._evicted_until)

    def add(self, key: str, clear: int) -> bool:
        """One that was not here, right after `of_another`. True if another one gave way."""
        is_full = len(self) >= self._room
        if is_full:
            self._evicted_until = max(self.pop(heappop(self._heap)[1]), self._evicted_until)
            self.evicted += 1
        heappush(self._heap, (clear, key))
        self[key] = clear
        return is_full

    def _tidy(self, now: int) -> None:
        """Forget who owes nothing, and look for who owes the least."""
        heap = self._heap
        for _ in range(STEPS):
            if not heap:
                return
            at, key = heap[0]
            clear = self[key]
            if clear <= now:
                heappop(heap)
                del self[key]
            elif clear > at:
                heapreplace(heap, (clear, key))
            else:
                return
