"""Counts that one process makes and another reads, in memory that both have: nothing is sent, and what was counted
stays if the writer is killed.

Each kind of event has a cell: its name, how often it happened by how many seconds it took, and sums. One thread at a
time writes, one reads. A name stands there before its cell counts as one, and the number of changes is told last.
"""

from __future__ import annotations

import marshal
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

from balancer.observe.histogram import BOUNDS, Histogram

Kind = tuple[Any, ...]  # of Python's own values

NUMBER = 8  # bytes
NAME = 512  # bytes of the name of a kind, as marshal has it
# Places of the numbers of a cell: how often it was changed, sums, the length of the name; then counts by place in
# BOUNDS, and the name.
CHANGES, FIRST_SUM, SECOND_SUM, SECONDS, LENGTH, COUNTS = range(6)
CELL = COUNTS + len(BOUNDS) + 1 + NAME // NUMBER
USED, HEAD = 0, 8  # the place of the number of cells in use, and numbers in front of the first


class Added(NamedTuple):
    """What has happened since the last look."""

    kind: Kind
    times: Histogram
    sums: tuple[int, int]


def size(cells: int) -> int:
    """Bytes for so many."""
    return (HEAD + cells * CELL) * NUMBER


class Cells:
    """In a part of `memory` that was all 0 when it began, and takes as much as is used."""

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self._numbers = memory.cast("q")
        self._seconds = memory.cast("d")
        self._most = (len(self._numbers) - HEAD) // CELL
        self._starts: dict[Kind, int] = {}  # the writer's
        self._seen: list[tuple[Kind, list[int], float]] = []  # the reader's: name, numbers, seconds

    def add(self, kind: Kind, seconds: float = 0.0, first: int = 0, second: int = 0) -> bool:
        """Once more; False if there is no cell for it."""
        numbers, start = self._numbers, self._starts.get(kind)
        if start is None:
            start = self._new(kind)
            if start is None:
                return False
        numbers[start + COUNTS + bisect_left(BOUNDS, seconds)] += 1
        self._seconds[start + SECONDS] += seconds
        if first:
            numbers[start + FIRST_SUM] += first
        if second:
            numbers[start + SECOND_SUM] += second
        numbers[start + CHANGES] += 1
        return True

    def _new(self, kind: Kind) -> int | None:
        name, used = marshal.dumps(kind), self._numbers[USED]
        if used == self._most or len(name) > NAME:
            return None
        start = self._starts[kind] = HEAD + used * CELL
        self._numbers[start + LENGTH] = len(name)
        at = (start + CELL) * NUMBER - NAME
        self._bytes[at : at + len(name)] = name
        self._numbers[USED] = used + 1
        return start

    def look(self, *, at_all: bool = False) -> Iterator[Added]:
        """What was added since the last time; `at_all` if the writer is dead, and may not have told of the last one."""
        numbers = self._numbers
        for place in range(numbers[USED]):
            start = HEAD + place * CELL
            if place == len(self._seen):
                at = (start + CELL) * NUMBER - NAME
                kind = marshal.loads(self._bytes[at : at + numbers[start + LENGTH]])
                self._seen.append((kind, [0] * (COUNTS + len(BOUNDS) + 1), 0.0))
            kind, before, seconds_before = self._seen[place]
            if numbers[start] == before[CHANGES] and not at_all:
                continue
            latest, seconds = numbers[start : start + len(before)].tolist(), self._seconds[start + SECONDS]
            self._seen[place] = kind, latest, seconds
            times = Histogram()
            times.seconds = seconds - seconds_before
            for bucket, (old, new) in enumerate(zip(before[COUNTS:], latest[COUNTS:], strict=True)):
                if old != new:
                    times.counts[bucket] = new - old
            sums = latest[FIRST_SUM] - before[FIRST_SUM], latest[SECOND_SUM] - before[SECOND_SUM]
            yield Added(kind, times, sums)
