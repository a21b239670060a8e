"""What was worked out for bytes that come again and again, kept for as long as it may come again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

Given = TypeVar("Given", bound=Hashable)
Derived = TypeVar("Derived")


class Table(dict[Given, Derived]):
    """`table[given]` is `derive(given)`, which must depend on nothing else and never change.

    At most `kept` results are kept, and only those that are `worth` it: what others send must not fill the memory. Any
    thread may look up: each step is one operation.
    """

    def __init__(self, derive: Callable[[Given], Derived], kept: int, worth: Callable[[Given, Derived], bool]) -> None:
        super().__init__()
        self._derive = derive
        self._kept = kept
        self._worth = worth

    def __missing__(self, given: Given) -> Derived:
        derived = self._derive(given)
        if self._worth(given, derived):
            if len(self) >= self._kept:
                self.clear()
            self[given] = derived
        return derived
