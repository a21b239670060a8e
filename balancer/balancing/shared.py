"""What the processes of one balancer have in flight, in memory that all of them see.

Each process has a row and writes to no other, under its pool's lock; the master has none and only reads, but for the
row of a process that is dead. Which backend has which slot, and which pool which area, is in the memory too, and
written by the master alone: before it tells anybody of a backend. Numbers of one slot lie side by side, so that their
sum is one step. Beside them each row has the slots that it changed last and how many changes there were, which is
written last: so others look at what has changed, however many backends there are.

A process may act before it has seen what another has just done: limits hold within one request per process, and so does
an order, but for the last half millisecond.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from collections.abc import Collection
from hashlib import blake2b

from balancer.balancing.backends import Backend
from balancer.balancing.speed import Speed

MASTER = -1  # has no row
ROWS = 64  # processes
POOLS, SLOTS = 64, 1024  # of each pool; what is beyond that is known to each process for itself
CHANGES = 256  # that a row tells: who has not looked for longer looks at all backends

NUMBER = 8  # bytes
SPEED = struct.Struct("4d")  # ewma, peak, ewma_at, answered_at
# An area: counts of changes, waiting requests, slots of the changes, keys of the slots; then of each slot, by row,
# requests in flight, those that wait for their answer to begin, and speeds.
WAITING = ROWS * NUMBER
KEYS = 2 * WAITING
CHANGED = KEYS + SLOTS * NUMBER
ACTIVE = CHANGED + ROWS * CHANGES * NUMBER
UNANSWERED = ACTIVE + SLOTS * ROWS * NUMBER
SPEEDS = UNANSWERED + SLOTS * ROWS * NUMBER
AREA = SPEEDS + SLOTS * ROWS * SPEED.size
HEAD = mmap.PAGESIZE  # how many rows are in use; the keys of the areas


class SharedLoads:
    """The memory: `SharedLoads()` in the master, `SharedLoads(fd, row)` in a worker, with the `fd` of the master. What
    nobody has touched takes no room."""

    def __init__(self, fd: int | None = None, row: int = MASTER) -> None:
        self.fd = os.memfd_create("loads") if fd is None else fd
        if fd is None:
            os.truncate(self.fd, HEAD + POOLS * AREA)
        self._row = row
        self._memory = memoryview(mmap.mmap(self.fd, HEAD + POOLS * AREA))
        self._head = self._memory[:HEAD].cast("q")
        self._keys = self._head[1 : 1 + POOLS]
        self._unused = deque(range(POOLS))  # the master's, as `_used`
        self._used: dict[int, PoolLoads] = {}

    def of(self, pool: str) -> PoolLoads | None:
        """A new pool's, None if there is no area for it. In the master it is the only one of that name from now on."""
        key = _key(pool)
        if self._row != MASTER:
            keys = self._keys.tolist()
            return self._made(keys.index(key)) if key in keys else None
        if key in self._keys.tolist():  # of one that is leaving
            self._keys[self._keys.tolist().index(key)] = 0
        if not self._unused:
            return None
        place = self._unused.popleft()
        made = self._used[place] = self._made(place)
        self._keys[place] = key
        return made

    def _made(self, place: int) -> PoolLoads:
        start = HEAD + place * AREA
        return PoolLoads(self._head, self._memory[start : start + AREA], self._row)

    def release(self, loads: PoolLoads | None) -> None:
        """In the master: its pool is gone, and has nothing in flight anywhere."""
        for place, each in [*self._used.items()]:
            if each is loads:
                del self._used[place]
                self._keys[place] = 0
                each.clear()
                self._unused.append(place)

    def forget(self, row: int) -> None:
        """In the master: the process of this row is dead, or about to begin."""
        self._head[0] = max(self._head[0], row + 1)
        for each in [*self._used.values()]:
            each.forget(row)


class PoolLoads:
    """Those of one pool. Every method but `forget` is called with the pool's lock held, which guards all of it."""

    def __init__(self, head: memoryview, memory: memoryview, row: int) -> None:
        numbers = memory.cast("q")
        self.is_timed = True  # somebody goes by speed
        self.is_told = True  # choices depend on what others have: else nobody tells what has changed
        self._head = head
        self._memory = memory
        self._row = row
        self._counts = numbers[:ROWS]
        self._waiting = numbers[WAITING // NUMBER : KEYS // NUMBER]
        self._keys = numbers[KEYS // NUMBER : CHANGED // NUMBER]
        self._changes = numbers[CHANGED // NUMBER : ACTIVE // NUMBER]
        self._active = numbers[ACTIVE // NUMBER : UNANSWERED // NUMBER]
        self._unanswered = numbers[UNANSWERED // NUMBER : SPEEDS // NUMBER]
        self._slots: dict[Backend, int] = {}
        self._backends: dict[int, Backend] = {}
        self._speeds: dict[Backend, Speed] = {}  # as they were when last followed
        self._unused = deque(range(SLOTS))  # the master's, as `_left`
        self._left: list[int] = []  # until nobody has anything in flight there
        self._seen: list[int] = self._counts[: max(head[0], row + 1)].tolist()

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    # Which backends there are.

    def follow(self, backends: Collection[Backend]) -> None:
        """There are these and no others. Call after every change of them."""
        for backend in self._slots.keys() - set(backends):
            self._leave(backend)
        for backend in backends:
            if backend not in self._slots:
                self._join(backend)
            elif self._speeds[backend] is not backend.speed and self._row != MASTER:
                self._speeds[backend] = backend.speed  # it has moved, and owes no answer there
                self._unanswered[self._slots[backend] * ROWS + self._row] = 0
                self._tell(self._slots[backend])

    def _join(self, backend: Backend) -> None:
        slot = self._given(backend.id) if self._row == MASTER else self._told(backend.id)
        if slot is not None:
            self._slots[backend], self._backends[slot], self._speeds[backend] = slot, backend, backend.speed
            self._take_in(slot)

    def _given(self, backend_id: str) -> int | None:
        """The master gives the slot that has been out of use for the longest: nobody will still think it another's."""
        for slot in [slot for slot in self._left if not any(self._active[slot * ROWS : slot * ROWS + ROWS])]:
            self._left.remove(slot)
            self._unused.append(slot)
        if not self._unused:
            return None
        slot, key = self._unused.popleft(), _key(backend_id)
        for place in range(slot * ROWS, slot * ROWS + ROWS):
            self._active[place] = self._unanswered[place] = 0
            SPEED.pack_into(self._memory, SPEEDS + place * SPEED.size, 0.0, 0.0, 0.0, 0.0)
        for other in self._slots.values():  # another one of its name finishes what it has
            if self._keys[other] == key:
                self._keys[other] = 0
        self._keys[slot] = key
        return slot

    def _told(self, backend_id: str) -> int | None:
        keys, key = self._keys.tolist(), _key(backend_id)
        slot = keys.index(key) if key in keys else None
        if slot is None or slot in self._backends:  # the master has no room, or thinks of the one before
            return None
        place = slot * ROWS + self._row
        self._active[place] = self._unanswered[place] = 0
        return slot

    def _leave(self, backend: Backend) -> None:
        slot = self._slots.pop(backend)
        del self._backends[slot], self._speeds[backend]
        if self._row == MASTER:
            self._left.append(slot)
            if self._keys[slot] == _key(backend.id):
                self._keys[slot] = 0

    def forget(self, row: int) -> None:
        """In the master: what this row has had in flight."""
        for slot in [*self._backends, *self._left]:
            self._active[slot * ROWS + row] = self._unanswered[slot * ROWS + row] = 0
        self._waiting[row] = 0
        self._counts[row] += 2 * CHANGES  # so that all look at everything

    # What this process has.

    def add(self, backend: Backend, active: int, unanswered: int) -> None:
        """It has so many more in flight, of which so many more wait for the beginning of their answer. The backend has
        them already."""
        slot = self._slots.get(backend)
        if slot is None:
            return
        place = slot * ROWS + self._row
        self._active[place] += active
        if unanswered:
            self._unanswered[place] = max(0, self._unanswered[place] + unanswered)
            speed = backend.speed
            told = speed.ewma, speed.peak, speed.ewma_at, speed.answered_at
            SPEED.pack_into(self._memory, SPEEDS + place * SPEED.size, *told)
        if self.is_told:
            self._tell(slot)

    def own(self, backend: Backend) -> int:
        """What it has in flight by way of this process alone."""
        slot = self._slots.get(backend)
        return backend.active if slot is None else self._active[slot * ROWS + self._row]

    def _tell(self, slot: int) -> None:
        row = self._row
        count = self._seen[row]
        self._changes[row * CHANGES + count % CHANGES] = slot
        self._counts[row] = self._seen[row] = count + 1

    def wait(self, requests: int) -> None:
        """So many are in its queue."""
        self._waiting[self._row] = requests

    # What all have.

    @property
    def waiting(self) -> int:
        """Requests in the queues of all."""
        return sum(self._waiting[: self._head[0]])

    def look(self, *, at_all: bool = False) -> list[tuple[Backend, int]]:
        """Take in what others have changed. Returns of which backends, and what each had in flight before."""
        at_all |= self._row == MASTER and not self.is_told
        latest, seen = self._counts[: self._head[0]].tolist(), self._seen
        if latest == seen and not at_all:
            return []
        slots: set[int] = set()
        seen += [0] * (len(latest) - len(seen))
        for row, (before, count) in enumerate(zip(seen, latest, strict=True)):
            first = row * CHANGES
            slots.update(self._changes[first + each % CHANGES] for each in range(max(before, count - CHANGES), count))
            at_all |= self._counts[row] - before > CHANGES  # of some it does not tell any more
        self._seen = latest
        changed = self._backends.keys() if at_all else slots & self._backends.keys()
        before_all = [(self._backends[slot], self._take_in(slot)) for slot in changed]
        return [(backend, before) for backend, before in before_all if self.is_timed or backend.active != before]

    def _take_in(self, slot: int) -> int:
        """What it had in flight before."""
        backend, rows = self._backends[slot], slice(slot * ROWS, slot * ROWS + self._head[0])
        before, backend.active = backend.active, sum(self._active[rows])
        if self.is_timed:
            backend.speed.unanswered = sum(self._unanswered[rows])
            for place in range(rows.start, rows.stop):
                backend.speed.merge(*SPEED.unpack_from(self._memory, SPEEDS + place * SPEED.size))
        return before


def _key(name: str) -> int:
    """Never 0, which is nobody's."""
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big") + 1
